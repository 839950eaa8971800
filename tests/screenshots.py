"""Every page in light, dark and phone, into docs/images: `make screenshots`. The real studio on the demo model."""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.journeys.conftest import FLAGS, chromium
from tests.server import Server
from trellis.demo.text.voices import classify_voice

IMAGES = Path(__file__).parent.parent / "docs" / "images"
SCREENS = {
    "light": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1440, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 375, "height": 780}, "color_scheme": "light", "device_scale_factor": 2},
}


def wait_ready(page: Page) -> None:
    page.locator("[data-status=ready]").wait_for(timeout=60_000)


def steer(page: Page, voice: str, clicks: int) -> None:
    """Choose a voice, with an undo and a branch on the way, so that there is something to see."""
    for click in range(clicks):
        wait_ready(page)
        texts = page.locator("[data-text]").all_inner_texts()
        fitting = [index for index, text in enumerate(texts) if classify_voice(text) == voice]
        before = page.locator("[name=offer]").first.input_value()
        page.keyboard.press("abcd"[fitting[0]] if fitting else "n")
        page.wait_for_function("before => document.querySelector('[name=offer]').value !== before", arg=before)
        if click == clicks // 2:
            wait_ready(page)
            page.keyboard.press("u")
            page.wait_for_function("before => document.querySelector('[name=offer]').value === before", arg=before)
            wait_ready(page)
            page.keyboard.press("d" if not fitting or fitting[0] != 3 else "a")
            page.wait_for_function("before => document.querySelector('[name=offer]').value !== before", arg=before)
            wait_ready(page)
            page.keyboard.press("u")
            page.wait_for_function("before => document.querySelector('[name=offer]').value === before", arg=before)
            wait_ready(page)
            page.keyboard.press("abcd"[fitting[0]] if fitting else "n")
            page.wait_for_function("before => document.querySelector('[name=offer]').value !== before", arg=before)
    wait_ready(page)


def judge_rounds(page: Page, voice: str, rounds: int) -> None:
    """Judge rounds of the blind comparison that is open, by the voice."""
    for _ in range(rounds):
        page.locator(".answer").first.wait_for(timeout=60_000)
        texts = page.locator(".answer blockquote").all_inner_texts()
        number = page.locator("[data-round]").get_attribute("data-round")
        fits = [classify_voice(text) == voice for text in texts]
        page.wait_for_timeout(350)
        page.keyboard.press("t" if fits[0] == fits[1] else "ab"[fits.index(True)])
        page.locator(f"[data-round='{number}']").wait_for(state="detached")


MARKDOWN = """A loop, and what it gives:

```python
for step in range(3):
    print(f"step {step}")
```

| step | drift |
|---|---|
| 0 | 0.0 % |
| 3 | 1.2 % |
"""


def make_room(page: Page, server: Server, session: str) -> str:
    """A room in which the base model and the session answer the same. Returns its path."""
    with server.client() as client:
        said = [
            {"id": "1", "role": "user", "text": "How do I watch a model grow?"},
            {"id": "2", "parent": "1", "role": "assistant", "text": MARKDOWN, "model": "demo"},
        ]
        body = {"format": "trellis-room-1", "title": "Watching it grow", "messages": said, "head": "2"}
        client.post("/api/rooms/import", json=body)
    page.goto(f"{server.url}/chat?model=session:{session}")
    page.get_by_text("Compare", exact=True).click()
    page.get_by_label("Model 2").select_option("demo")
    page.get_by_label("Message", exact=True).fill("What do you think of the sea?")
    page.keyboard.press("Enter")
    page.wait_for_url("**/chat/r*")
    page.locator(".message.assistant[data-state=done]").nth(1).wait_for(timeout=60_000)
    page.get_by_role("button", name="Good answer").first.click()
    return page.url.removeprefix(server.url).split("#")[0]


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder), fake=False)
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        first = browser.new_context(bypass_csp=True).new_page()  # wait_for_function is an eval
        first.goto(server.url)
        first.get_by_role("button", name="Start with the demo").click()
        first.wait_for_url("**/steer/*")
        steer(first, "pirate", 10)
        first.wait_for_function("!document.querySelector('.control blockquote:last-of-type').textContent.includes('…')")
        session = first.url
        first.goto(f"{session}/compare")
        first.get_by_role("button", name="Compare", exact=True).click()
        first.locator(".round").first.wait_for(timeout=60_000)
        compared = first.url.split("job=")[1]
        first.goto(f"{session}/blind")
        first.get_by_label("Rounds").fill("16")
        first.get_by_role("button", name="Start").click()
        judge_rounds(first, "pirate", 16)
        first.locator(".verdict").wait_for()
        result = first.url.removeprefix(server.url)
        first.goto(f"{session}/blind")
        first.get_by_role("button", name="Start").click()
        judge_rounds(first, "pirate", 4)
        first.locator(".answer").first.wait_for()
        judging = first.url.removeprefix(server.url)
        first.goto(f"{session}/log")
        first.locator("#refit-title ~ form button").click()
        first.get_by_text("Preference accuracy").wait_for(timeout=120_000)
        room = make_room(first, server, session.split("/steer/")[1])
        for name, options in SCREENS.items():
            page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
            steering = session.removeprefix(server.url)
            for path, what in (
                ("/", "start"), ("/new", "new"), (steering, "steering"), (f"{steering}/review", "review"),
                (f"{steering}/compare?job={compared}", "compare"), ("/models", "models"), (f"{steering}/log", "log"),
                (f"{steering}/blind", "blind-start"), ("/chat", "chat-start"), (room, "chat"),
                ("/connections", "connections"), (judging, "blind"), (result, "blind-result"),
            ):  # fmt: skip
                page.goto(server.url + path)
                page.wait_for_timeout(800)
                page.screenshot(path=IMAGES / f"{what}-{name}.png")
            if name == "phone":
                page.goto(session)
                for tab, what in (("Tree", "tree"), ("Metrics", "figures")):
                    page.get_by_role("link", name=tab, exact=True).click()
                    page.wait_for_timeout(300)
                    page.screenshot(path=IMAGES / f"steering-{name}-{what}.png")
        browser.close()
        server.stop()


if __name__ == "__main__":
    main()
