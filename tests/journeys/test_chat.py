"""Chat in a real browser: words that grow, branches, comparisons, a line that breaks, and everything by keyboard."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.journeys.conftest import Open
from tests.server import Server, new_session, wait_ready
from tests.tiny import make_memorizing_llama

pytestmark = pytest.mark.browser

SLOW = "say 400 words at 60 a second"
MARKDOWN = """<think>
They want *everything*.
</think>
# A title

Words with `code` and $a_1 * b_1$.

```python
def f(x):
    return "<b>"
```

| a | b |
|---|---|
| 1 | 2 |

- one
- two

<img src=x onerror=alert(1)> ![p](http://evil.example/p) [link](https://example.org)
"""


def begin(page: Page, server: Server, text: str = "Hello.") -> str:
    """A new room with a first message. Returns its id."""
    page.goto(f"{server.url}/chat")
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    page.wait_for_url("**/chat/r*")
    expect(page.locator("[data-connection]")).to_have_attribute("data-state", "connected")
    return page.url.split("/chat/")[1].split("#")[0]


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def whole(page: Page, answers: int) -> None:
    """Wait until so many answers stand there, whole."""
    expect(page.locator(".message.assistant[data-state=done]")).to_have_count(answers)


def stored(server: Server, room: str) -> list[dict[str, Any]]:
    with server.client() as client:
        messages: list[dict[str, Any]] = client.get(f"/api/rooms/{room}").json()["messages"]
        return messages


def on_screen(page: Page) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(".message.assistant .said").all_inner_texts()]


def test_a_conversation(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server, "Tell me\nabout the sea.")
    whole(page, 1)
    assert on_screen(page) == [stored(server, room)[1]["text"]]
    expect(page.locator(".measured")).to_contain_text("TTFT")
    expect(page.locator(".measured")).to_contain_text("context")
    expect(page).to_have_title("Tell me · Chat · Trellis")
    box = page.get_by_label("Message", exact=True)
    box.fill("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert box.input_value() == "One\ntwo"
    page.keyboard.press("Enter")
    whole(page, 2)
    expect(box).to_have_value("")
    assert [each["text"] for each in stored(server, room) if each["role"] == "user"][1] == "One\ntwo"
    expect(page.locator("#room-list a[aria-current=page]")).to_contain_text("Tell me")


def test_stop_by_button_and_by_key_and_go_on(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    say(page, SLOW)
    expect(page.locator(".tail.growing")).to_contain_text(" ")
    page.get_by_role("button", name="Stop Esc").click()
    expect(page.get_by_text("Stopped", exact=True)).to_be_visible()
    text = stored(server, room)[-1]["text"]
    assert on_screen(page)[-1] == text
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".tail.growing")).to_be_visible()
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped", exact=True)).to_be_visible()
    more = stored(server, room)[-1]["text"]
    assert more.startswith(text)
    assert len(more) > len(text)
    expect(page.locator(".message.assistant .said").last).to_have_text(more)


def test_edits_and_answers_once_more_keep_their_branches(open_page: Open, server: Server) -> None:
    page = open_page()
    begin(page, server, "Hello.")
    whole(page, 1)
    first = on_screen(page)[0]
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".branches")).to_contain_text("2/2")
    whole(page, 1)
    assert on_screen(page)[0] != first
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".branches")).to_contain_text("1/2")
    assert on_screen(page) == [first]
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("ArrowUp")
    page.get_by_role("textbox", name="Text").first.fill("Good evening.")
    page.get_by_role("button", name="Save & submit").click()
    expect(page.locator(".message.user .tail")).to_have_text("Good evening.")
    whole(page, 1)
    expect(page.locator(".branches").first).to_contain_text("2/2")
    page.get_by_role("button", name="Previous version").first.click()
    expect(page.locator(".message.user .tail")).to_have_text("Hello.")


def test_two_people_see_the_same_as_it_grows(open_page: Open, server: Server) -> None:
    one, other = open_page(), open_page()
    room = begin(one, server)
    whole(one, 1)
    other.goto(f"{server.url}/chat/{room}")
    expect(other.locator("[data-connection]")).to_have_attribute("data-state", "connected")
    say(one, "say 240 words at 60 a second")
    for page in (one, other):
        expect(page.locator(".tail.growing")).to_contain_text(" ")
    for page in (one, other):
        whole(page, 2)
        assert on_screen(page) == [each["text"] for each in stored(server, room) if each["role"] == "assistant"]


def test_a_reload_in_mid_answer_loses_and_doubles_nothing(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    say(page, "say 120 words at 80 a second")
    for _ in range(2):
        expect(page.locator(".tail.growing")).to_contain_text(" ")
        page.reload()
    whole(page, 2)
    assert on_screen(page)[-1] == stored(server, room)[-1]["text"]
    assert len(on_screen(page)[-1].split()) == 120


def test_what_is_written_offline_is_sent_once_when_the_line_is_back(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    page.context.set_offline(True)
    page.evaluate("dispatchEvent(new Event('offline'))")
    cut_all_lines(page)
    expect(page.locator("[data-connection]")).not_to_have_attribute("data-state", "connected")
    say(page, "Written in a tunnel.")
    expect(page.locator("[data-outbox]")).to_contain_text("Written in a tunnel.")
    assert len(stored(server, room)) == 2
    page.context.set_offline(False)
    page.evaluate("dispatchEvent(new Event('online'))")
    whole(page, 2)
    assert [each["text"] for each in stored(server, room) if each["role"] == "user"].count("Written in a tunnel.") == 1
    expect(page.locator("[data-outbox]")).to_be_empty()


def test_several_messages_that_were_written_offline_are_all_said_in_order(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    server.kill()
    expect(page.locator("[data-connection]")).to_have_attribute("data-state", "reconnecting")
    for text in ("First.", "Second.", "Third."):
        say(page, text)
    expect(page.locator("[data-outbox] .tail")).to_have_text(["First.", "Second.", "Third."])
    server.start()
    try:
        whole(page, 4)
        texts = [each["text"] for each in stored(server, room) if each["role"] == "user"]
        assert texts == ["Hello.", "First.", "Second.", "Third."]
        expect(page.locator("[data-outbox]")).to_be_empty()
        page.reload()
        whole(page, 4)
        expect(page.locator("[data-outbox]")).to_be_empty()
    finally:
        server.stop()


def cut_all_lines(page: Page) -> None:
    """Have the page's socket close, as a network that goes away does after a while."""
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.emulateNetworkConditions",
                 {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0})  # fmt: skip
    page.evaluate("document.dispatchEvent(new Event('trellis:cut'))")
    session.send("Network.emulateNetworkConditions",
                 {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1})  # fmt: skip


def test_a_restart_of_the_server_in_mid_answer(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    say(page, SLOW)
    expect(page.locator(".tail.growing")).to_contain_text(" ")
    page.wait_for_timeout(2500)
    server.kill()
    expect(page.locator("[data-connection]")).to_have_attribute("data-state", "reconnecting")
    server.start()
    try:
        expect(page.locator("[data-connection]")).to_have_attribute("data-state", "connected")
        expect(page.get_by_text("Interrupted when the server stopped.")).to_be_visible()
        assert on_screen(page)[-1] == stored(server, room)[-1]["text"] != ""
        page.get_by_role("button", name="Continue").click()
        expect(page.locator(".tail.growing")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("Stopped", exact=True)).to_be_visible()
        expect(page.locator(".message.assistant .said").last).to_have_text(stored(server, room)[-1]["text"])
    finally:
        server.stop()


def test_models_answer_side_by_side_and_one_is_gone_on_with(open_page: Open, server: Server) -> None:
    with server.client() as client:
        state = new_session(client)
    page = open_page()
    page.goto(f"{server.url}/steer/{state['id']}")
    page.get_by_role("link", name="Chat with this step").click()
    chosen = page.locator("[data-model]").first
    expect(chosen.locator("option:checked")).to_have_text(f"{state['name']}, Base model")
    page.get_by_text("Compare", exact=True).click()
    page.get_by_label("Model 2").select_option("demo")
    say(page, "Hello.")
    page.wait_for_url("**/chat/r*")
    whole(page, 2)
    expect(page.locator(".turn.columns .message")).to_have_count(2)
    expect(page.locator(".turn.columns .who")).to_have_text([f"{state['name']}, Base model", "demo"])
    page.get_by_role("button", name="Use this answer").click()
    expect(page.locator(".turn.columns .message.aside .who")).to_have_text(f"{state['name']}, Base model")
    page.get_by_role("button", name="Good answer").last.click()
    expect(page.get_by_role("button", name="Good answer").last).to_have_attribute("aria-pressed", "true")
    page.locator(".teach summary").last.click()
    page.get_by_role("button", name="Train", exact=True).last.click()
    page.get_by_role("link", name="Show progress").click()
    page.wait_for_url("**/log#fits")
    expect(page.get_by_text("an answer in").first).to_be_visible()


def imported(server: Server, *texts: str) -> str:
    messages = [
        {"id": str(place), "parent": str(place - 1) if place else None, "role": "assistant" if place % 2 else "user",
         "text": text, "model": "demo" if place % 2 else None,
         "usage": {"time_to_first_token_ms": 210, "tokens_per_second": 41, "context_used": 99, "context_length": 1024}}
        for place, text in enumerate(texts)
    ]  # fmt: skip
    body = {"format": "trellis-room-1", "title": texts[0][:60], "messages": messages, "head": str(len(texts) - 1)}
    response = httpx.post(f"{server.url}/api/rooms/import", content=json.dumps(body))
    assert response.status_code == 201, response.text
    return str(response.json()["rooms"][0]["id"])


def test_markdown_is_shown_and_is_nothing_more(open_page: Open, server: Server) -> None:
    page = open_page()
    page.on("dialog", lambda dialog: pytest.fail("a script of the model ran"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.url}/chat/{imported(server, '<img src=x onerror=alert(1)>', MARKDOWN)}")
    expect(page.locator(".prose h1")).to_have_text("A title")
    expect(page.locator(".prose table td")).to_have_text(["1", "2"])
    expect(page.locator(".prose .maths")).to_have_text("$a_1 * b_1$")
    expect(page.locator(".thought")).not_to_have_attribute("open", "")
    page.locator(".thought summary").click()
    expect(page.locator(".thought em")).to_have_text("everything")
    assert page.locator("main img").count() == 0
    expect(page.locator(".prose a").last).to_have_attribute("rel", "noopener noreferrer nofollow")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[data-copy-code]").click()
    expect(page.locator("[data-copy-code]")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "<b>"\n'
    assert not [url for url in asked if "evil" in url]


def test_files_are_dropped_shown_and_refused(open_page: Open, server: Server, tmp_path: Path) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    (tmp_path / "notes.md").write_text("What I noted.")
    (tmp_path / "bad.bin").write_bytes(b"\x00\x01")
    page.locator("#add-file").set_input_files([tmp_path / "notes.md", tmp_path / "bad.bin"])
    expect(page.locator(".toast.error")).to_contain_text("bad.bin")
    expect(page.locator("[data-chips] .chip")).to_have_count(1)
    expect(page.locator("[data-chips] .chip")).to_contain_text("notes.md")
    say(page, "What is it?")
    whole(page, 2)
    expect(page.locator(".message.user .chip")).to_contain_text("notes.md")
    with page.expect_download() as download:
        page.locator(".message.user .chip a").click()
    assert download.value.path().read_text() == "What I noted."
    assert stored(server, room)[-2]["files"][0]["name"] == "notes.md"


def test_prompts_by_slash_and_keys_by_question_mark(open_page: Open, server: Server) -> None:
    page = open_page()
    begin(page, server)
    whole(page, 1)
    box = page.get_by_label("Message", exact=True)
    box.press_sequentially("/brief Answer in three words.")
    page.get_by_role("button", name="Save as /brief").click()
    expect(box).to_have_value("Answer in three words.")
    box.fill("")
    box.press_sequentially("/br")
    expect(page.locator(".prompt-row")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(box).to_have_value("Answer in three words.")
    page.get_by_role("button", name="Shortcuts").click()
    expect(page.get_by_role("dialog", name="Shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Shortcuts")).not_to_be_visible()


@pytest.mark.parametrize("text", ["/etc/fstab is broken, why?", "/brief is what I would call it", "/nobody", "/a/b"])
def test_a_message_that_begins_with_a_slash_is_sent(open_page: Open, server: Server, text: str) -> None:
    before = httpx.get(f"{server.url}/api/rooms/prompts").json()
    page = open_page()
    page.goto(f"{server.url}/chat")
    page.get_by_label("Message", exact=True).press_sequentially(text)
    page.wait_for_timeout(300)  # the library has been asked
    page.keyboard.press("Enter")
    page.wait_for_url("**/chat/r*")
    room = page.url.split("/chat/")[1].split("#")[0]
    whole(page, 1)
    page.get_by_label("Message", exact=True).press_sequentially(text)
    page.wait_for_timeout(300)
    page.keyboard.press("Enter")
    whole(page, 2)
    assert [each["text"] for each in stored(server, room) if each["role"] == "user"] == [text, text]
    assert httpx.get(f"{server.url}/api/rooms/prompts").json() == before


@pytest.mark.parametrize("place", ["start", "room"])
def test_enter_that_an_input_method_takes_sends_nothing(open_page: Open, server: Server, place: str) -> None:
    """Chromium says `isComposing`; Safari says keyCode 229 alone."""
    page = open_page()
    if place == "room":
        begin(page, server)
        whole(page, 1)
    else:
        page.goto(f"{server.url}/chat")
    box = page.get_by_label("Message", exact=True)
    box.fill("こんにちは")
    for options in ({"isComposing": True}, {"keyCode": 229}):
        box.evaluate(
            "(node, options) => node.dispatchEvent(new KeyboardEvent('keydown', "
            "{key: 'Enter', bubbles: true, cancelable: true, ...options}))",
            options,
        )
    page.wait_for_timeout(300)
    expect(box).to_have_value("こんにちは")
    expect(page.locator("[data-outbox] article, .message.user .tail", has_text="こんにちは")).to_have_count(0)


def test_a_text_that_is_too_long_is_kept_told_and_can_become_a_file(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    box = page.get_by_label("Message", exact=True)
    text = "word " * 30_004 + "last"
    box.evaluate("(node, text) => { node.focus(); document.execCommand('insertText', false, text); }", text)
    expect(page.locator("#say-limit")).to_contain_text("150,024 characters; the limit is 100,000")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert box.input_value() == text, "nothing of it is lost"
    assert len(stored(server, room)) == 2
    page.get_by_role("button", name="Attach it as a file").click()
    expect(page.locator("[data-chips] .chip")).to_contain_text("pasted.txt")
    expect(box).to_have_value("")
    expect(page.locator("#say-limit")).to_be_hidden()
    say(page, "What is it?")
    whole(page, 2)
    file = stored(server, room)[2]["files"][0]
    assert httpx.get(f"{server.url}/api/rooms/{room}/files/{file['id']}").text == text


def test_an_edit_that_is_too_long_is_kept_and_told(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    page.get_by_label("Message", exact=True).focus()
    page.keyboard.press("ArrowUp")
    page.get_by_role("textbox", name="Text").first.fill("x" * 100_001)
    page.get_by_role("button", name="Save & submit").click()
    expect(page.get_by_text("100,001 characters; the limit is 100,000")).to_be_visible()
    page.wait_for_timeout(200)
    assert len(stored(server, room)) == 2


def test_what_is_being_written_survives_a_reload(open_page: Open, server: Server, tmp_path: Path) -> None:
    page = open_page()
    page.goto(f"{server.url}/chat")
    box = page.get_by_label("Message", exact=True)
    box.fill("The first one,\nhalf written")
    page.reload()
    expect(box).to_have_value("The first one,\nhalf written")
    page.keyboard.press("Enter")
    box.press("Enter")
    page.wait_for_url("**/chat/r*")
    whole(page, 1)
    (tmp_path / "notes.md").write_text("What I noted.")
    page.locator("#add-file").set_input_files([tmp_path / "notes.md"])
    expect(page.locator("[data-chips] .chip span")).to_have_text("notes.md")  # it has arrived
    box.fill("The second one")
    page.reload()
    expect(box).to_have_value("The second one")
    expect(page.locator("[data-chips] .chip")).to_contain_text("notes.md")
    box.press("Enter")
    whole(page, 2)
    expect(page.locator(".message.user .chip")).to_contain_text("notes.md")
    page.reload()
    expect(box).to_have_value("")
    page.goto(f"{server.url}/chat")
    expect(box).to_have_value("")


@pytest.mark.parametrize("place", ["start", "room"])
def test_letters_outside_of_a_field_are_written_and_do_nothing_else(
    open_page: Open, server: Server, place: str
) -> None:
    page = open_page()
    if place == "room":
        begin(page, server)
        whole(page, 1)
    else:
        page.goto(f"{server.url}/chat")
    url = page.url
    page.evaluate("document.activeElement.blur()")
    page.keyboard.type("no, that is wrong? sure")
    page.wait_for_timeout(300)
    assert page.url == url
    expect(page.get_by_label("Message", exact=True)).to_have_value("no, that is wrong? sure")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_the_first_message_takes_files_and_one_that_cannot_be_used_is_refused_alone(
    open_page: Open, server: Server, tmp_path: Path
) -> None:
    page = open_page()
    page.goto(f"{server.url}/chat")
    (tmp_path / "notes.md").write_text("What I noted.")
    (tmp_path / "bad.bin").write_bytes(b"\x00\x01")
    (tmp_path / "cat.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"0" * 20)
    rooms = len(httpx.get(f"{server.url}/api/rooms").json())
    for bad, reason in (("bad.bin", "isn't UTF-8 text"), ("cat.png", "can't read images")):
        page.locator("#add-file").set_input_files([tmp_path / bad])
        expect(page.locator(".toast.error")).to_contain_text(bad)
        expect(page.locator(".toast.error")).to_contain_text(reason)
    page.locator("#add-file").set_input_files([tmp_path / "notes.md"])
    expect(page.locator("[data-chips] .chip")).to_have_count(1)
    assert len(httpx.get(f"{server.url}/api/rooms").json()) == rooms, "there is no room before it is sent"
    say(page, "What is it?")
    page.wait_for_url("**/chat/r*")
    whole(page, 1)
    room = page.url.split("/chat/")[1].split("#")[0]
    first = stored(server, room)[0]
    assert (first["text"], first["files"][0]["name"]) == ("What is it?", "notes.md")
    assert len(httpx.get(f"{server.url}/api/rooms").json()) == rooms + 1
    page.locator("#add-file").set_input_files([tmp_path / "cat.png"])
    expect(page.locator(".toast.error")).to_contain_text("can't read images")
    expect(page.locator("[data-chips] .chip")).to_have_count(0)


def test_a_file_that_is_far_too_large_or_gone_is_told_as_that(open_page: Open, server: Server, tmp_path: Path) -> None:
    page = open_page()
    page.goto(f"{server.url}/chat")
    (tmp_path / "large.txt").write_bytes(b"x" * 13_000_000)
    page.locator("#add-file").set_input_files([tmp_path / "large.txt"])
    expect(page.locator(".toast.error")).to_contain_text("It is 13.0 MB; the limit is 12.0 MB.")
    page.locator("[data-say]").evaluate("""node => {
        const gone = new File(['x'], 'folder');
        gone.slice = () => ({ arrayBuffer: () => Promise.reject(new DOMException('', 'NotFoundError')) });
        const event = new Event('paste');
        event.clipboardData = { files: [gone] };
        node.dispatchEvent(event);
    }""")
    expect(page.locator(".toast.error")).to_contain_text("it is a folder")
    expect(page.locator("[data-chips] .chip")).to_have_count(0)


def test_a_local_server_is_permitted_on_the_page(open_page: Open, server: Server, tmp_path: Path) -> None:
    """The studio of this test stands for the local server: it speaks the OpenAI API too."""
    other = Server(tmp_path / "other")
    try:
        page = open_page(viewport={"width": 375, "height": 800})
        page.goto(f"{other.url}/connections")
        page.get_by_label("Name", exact=True).fill("local")
        page.get_by_label("Base URL").fill(server.url)
        page.get_by_role("button", name="Add provider").click()
        expect(page.get_by_role("alert")).to_contain_text("this computer or its local network")
        expect(page.get_by_role("button", name="Allow and add provider")).to_be_in_viewport()
        expect(page.get_by_label("Base URL")).to_have_value(server.url)
        page.get_by_role("button", name="Allow and add provider").click()
        expect(page.locator("li", has_text="local")).to_contain_text(f"{server.url}/v1")
        page.goto(f"{other.url}/chat?model=remote:local/demo")
        say(page, "Hello.")
        page.wait_for_url("**/chat/r*")
        whole(page, 1)
        expect(page.locator(".message.assistant .who")).to_have_text("demo at local")
    finally:
        other.stop()


def test_prompts_work_in_the_first_message_too(open_page: Open, server: Server) -> None:
    httpx.put(f"{server.url}/api/rooms/prompts", json={"name": "greet", "text": "Greet me."})
    page = open_page()
    page.goto(f"{server.url}/chat")
    box = page.get_by_label("Message", exact=True)
    box.press_sequentially("/gree")
    expect(page.locator(".prompt-row")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(box).to_have_value("Greet me.")


def test_looking_at_the_steps_of_a_session_chooses_none(open_page: Open, server: Server) -> None:
    with server.client() as client:
        state = new_session(client)
        state = client.patch(f"/api/steering/sessions/{state['id']}", json={"name": "Fern, the first"}).json()
        for number in range(2):
            offer = wait_ready(client, state["id"])["offer"]["id"]
            client.post(f"/api/steering/sessions/{state['id']}/choose", json={"offer": offer, "choice": 0})
            deadline = time.monotonic() + 20
            while client.get(f"/api/steering/sessions/{state['id']}").json()["head"]["step"] <= number:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        client.post(f"/api/steering/sessions/{state['id']}/undo")
    page = open_page()
    page.goto(f"{server.url}/chat?model=session:{state['id']}")
    select = page.locator("[data-model]").first
    for _ in range(2):
        page.get_by_role("button", name="Choose step").first.click()
        expect(select.locator("optgroup[data-steps] option")).to_have_count(3)
        expect(select).to_have_value(f"session:{state['id']}")
    texts = select.locator("optgroup[data-steps] option").all_inner_texts()
    assert all(text.startswith(state["name"]) and not text.rstrip().endswith((":", ",")) for text in texts), texts
    assert [("newest" in text, "current" in text) for text in texts] == [
        (True, False), (False, True), (False, False),
    ]  # fmt: skip
    page.keyboard.press("Escape")
    value = select.locator("optgroup[data-steps] option").nth(1).get_attribute("value")
    select.select_option(value)
    page.get_by_role("button", name="Choose step").first.click()
    expect(select).to_have_value(value or "")
    page.route("**/versions", lambda route: (page.wait_for_timeout(300), route.continue_()))
    page.get_by_role("button", name="Choose step").first.click()
    other = select.locator("optgroup[data-steps] option").nth(2).get_attribute("value")
    with page.expect_response("**/versions"):
        select.select_option(other)  # while the list is still on its way
    expect(select).to_have_value(other or "")


def test_teach_takes_the_session_that_answered_or_says_why_it_cannot(open_page: Open, server: Server) -> None:
    with server.client() as client:
        mine, other = new_session(client), new_session(client)
        room = client.post("/api/rooms", json={"models": [f"session:{mine['id']}"]}).json()["id"]
    page = open_page()
    page.goto(f"{server.url}/chat/{room}")
    say(page, "Hello.")
    whole(page, 1)
    page.locator(".teach summary").click()
    expect(page.locator(".teach .help")).to_contain_text("Rate it or regenerate first")
    page.get_by_role("button", name="Good answer").click()
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    page.locator(".teach summary").click()
    expect(page.locator(".teach select")).to_have_value(mine["id"])
    url = page.url
    page.get_by_role("button", name="Train", exact=True).click()
    expect(page.locator("[data-taught]")).to_contain_text(f"Training “{mine['name']}” on this answer")
    assert page.url == url, "the talk goes on where it was"
    say(page, "And then?")
    whole(page, 2)
    page.locator(".teach summary").last.click()
    expect(page.locator(".teach .help").last).to_contain_text("Only answers to the first message of a chat")
    page.goto(f"{server.url}/chat?model=demo")
    say(page, "Hello.")
    page.wait_for_url("**/chat/r*")
    whole(page, 1)
    page.get_by_role("button", name="Good answer").click()
    page.locator(".teach summary").click()
    expect(page.locator(".teach select")).to_have_value("")
    assert other["id"] in page.locator(".teach select").inner_html()


def test_what_the_server_refuses_comes_back_to_where_it_was_written(open_page: Open, server: Server) -> None:
    page = open_page()
    room = begin(page, server)
    whole(page, 1)
    page.locator("[data-model]").first.evaluate(
        "node => { node.append(new Option('Gone', 'session:gone')); node.value = 'session:gone'; }"
    )
    say(page, "Do not lose me.")
    expect(page.locator(".toast.error")).to_contain_text("There is no model")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Do not lose me.")
    assert len(stored(server, room)) == 2


def test_rooms_are_found_renamed_and_deleted(open_page: Open, server: Server) -> None:
    page = open_page()
    begin(page, server, "Of zebras and quaggas.")
    whole(page, 1)
    page.get_by_label("Chat title").fill("Striped ones")
    page.keyboard.press("Enter")
    expect(page.locator("#room-list a[aria-current=page] strong")).to_have_text("Striped ones")
    page.get_by_label("Search chats").fill("QUAGGAS zebras")
    expect(page.locator("#room-list li")).to_have_count(1)
    expect(page.locator("#room-list .found")).to_contain_text("quaggas")
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator(".room-menu summary").first.click()
    page.get_by_role("button", name="Delete chat").click()
    page.wait_for_url(re.compile("/chat([?]done=deleted)?$"))
    expect(page.get_by_role("status").filter(has_text="Chat deleted")).to_be_visible()
    expect(page.locator("#room-list")).not_to_contain_text("Striped ones")


@pytest.mark.parametrize("size", [(1440, 900), (375, 780), (720, 450), (320, 256)])
def test_the_composer_grows_with_its_text_and_shrinks_again(
    open_page: Open, server: Server, size: tuple[int, int]
) -> None:
    """The last two are a laptop and a phone at 200 %."""
    page = open_page(viewport={"width": size[0], "height": size[1]})
    begin(page, server)
    whole(page, 1)

    def height() -> float:
        return float(page.locator(".composer").evaluate("node => node.getBoundingClientRect().height"))

    small = height()
    assert small < (130 if size[1] > 500 else 110)
    box = page.get_by_label("Message", exact=True)
    box.fill("line\n" * 40)
    assert small < height() < small + size[1] * 0.3, "it grows, and leaves the messages their place"
    box.fill("")
    assert height() == small
    box.fill("line\n" * 40)
    page.keyboard.press("Enter")
    whole(page, 2)
    assert height() == small


def test_icons_have_names_and_say_them(open_page: Open, server: Server) -> None:
    room = imported(server, "Hello.", "Good day.")
    page = open_page(viewport={"width": 375, "height": 780})
    page.goto(f"{server.url}/chat/{room}")
    icons = page.locator(".message .icon")
    names = [icon.get_attribute("aria-label") for icon in icons.all()]
    answer = ["Good answer", "Bad answer", "Regenerate", "Copy", "Edit", "Use for training"]
    assert names == ["Copy", "Edit", *answer]
    for icon, name in zip(icons.all(), names, strict=True):
        box = icon.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) >= 44, f"“{name}” is too small for a thumb"
    page.get_by_label("Bad answer").focus()
    page.keyboard.press("Tab")
    shown = "node => [getComputedStyle(node, '::after').display, getComputedStyle(node, '::after').content]"
    assert page.get_by_label("Regenerate").evaluate(shown) == ["block", '"Regenerate"']
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_label("Copy").last.click()
    expect(page.locator(".toast")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "Good day."


def test_what_was_done_is_said(open_page: Open, server: Server) -> None:
    page = open_page()
    begin(page, server)
    whole(page, 1)
    page.locator(".room-menu summary").first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_role("button", name="Save", exact=True).first.click()
    expect(page.locator(".toast")).to_have_text("Saved")
    page.locator(".room-menu summary").first.click()
    page.get_by_role("button", name="Archive").click()
    expect(page.get_by_text("Chat archived")).to_be_visible()
    expect(page).to_have_url(f"{server.url}/chat")
    chats = [{"title": f"Chat {number}", "messages": [{"role": "user", "content": "Hello."}]} for number in range(3)]
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Import chats").set_input_files(
        {"name": "chats.json", "mimeType": "application/json", "buffer": json.dumps(chats).encode()}
    )
    page.get_by_role("button", name="Import", exact=True).click()
    expect(page.get_by_text("Imported 3 chats")).to_be_visible()


def test_the_view_follows_unless_the_reader_scrolled_up(open_page: Open, server: Server) -> None:
    page = open_page(viewport={"width": 1000, "height": 500})
    begin(page, server)
    whole(page, 1)
    say(page, SLOW)
    scroller = page.locator("[data-scroller]")
    at = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    page.wait_for_timeout(2500)
    assert scroller.evaluate(at) < 60
    scroller.hover()
    page.mouse.wheel(0, -5000)
    deadline = time.monotonic() + 10  # the way up is drawn frame by frame
    while scroller.evaluate("node => node.scrollTop") > 0:
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)
    page.wait_for_timeout(600)
    assert scroller.evaluate("node => node.scrollTop") == 0
    page.get_by_role("button", name="Jump to latest").click()
    page.wait_for_timeout(300)
    assert scroller.evaluate(at) < 60
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped", exact=True)).to_be_visible()


def test_five_hundred_messages_open_and_can_be_written_under(open_page: Open, server: Server) -> None:
    room = imported(server, *[f"{MARKDOWN} number {number}" for number in range(500)])
    page = open_page()
    page.goto(f"{server.url}/chat/{room}")
    expect(page.locator(".message")).to_have_count(200)
    page.get_by_role("link", name="Show 300 earlier messages").click()
    expect(page.locator(".message")).to_have_count(500)
    say(page, "Still here?")
    expect(page.locator(".message")).to_have_count(502)


def test_without_a_script(open_page: Open, server: Server) -> None:
    page = open_page(java_script_enabled=False)
    page.goto(f"{server.url}/chat")
    page.get_by_label("Message", exact=True).fill("Hello.")
    page.get_by_role("button", name="Send").click()
    page.wait_for_url("**/chat/r*")
    page.wait_for_timeout(700)
    page.reload()
    whole(page, 1)
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator(".branches")).to_contain_text("2/2")
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".branches")).to_contain_text("1/2")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1440), ("dark", 1440), ("light", 375), ("dark", 375)])
def test_every_page_of_chat_passes_axe_and_fits(open_page: Open, server: Server, scheme: str, width: int) -> None:
    room = imported(server, "Show me everything.", MARKDOWN)
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True)
    for path in ("/chat", f"/chat/{room}", "/chat?archived=true", "/chat?q=nothing-like-it", "/connections"):
        page.goto(server.url + path)
        page.wait_for_timeout(300)
        found = Axe().run(page)
        assert found.violations_count == 0, f"{path}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.goto(f"{server.url}/chat/{room}")
    page.locator(".room-menu summary").first.click()
    page.locator(".edit-message summary").last.click()
    page.wait_for_timeout(200)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 375:
        page.locator(".room-menu summary").first.click()
        page.get_by_role("button", name="Show chats").click()
        expect(page.locator("#room-list a").first).to_be_visible()
        assert Axe().run(page).response["violations"] == []


def test_a_key_is_shown_once(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/connections")
    page.get_by_label("Key name").fill("My script")
    page.get_by_role("button", name="Create API key").click()
    key = page.locator("[data-made-key]").inner_text()
    assert httpx.get(f"{server.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    page.goto(f"{server.url}/connections")
    expect(page.get_by_text("My script")).to_be_visible()
    expect(page.locator("body")).not_to_contain_text(key)
    page.on("dialog", lambda dialog: dialog.accept())
    page.locator("li", has_text="My script").get_by_role("button", name="Revoke").click()
    expect(page.locator("main")).not_to_contain_text("My script")


@pytest.mark.engine
@pytest.mark.slow
def test_a_real_model_is_talked_to_and_what_it_says_is_text(open_page: Open, save_dir: Path) -> None:
    attack = "<img src=x onerror=alert(1)>"
    make_memorizing_llama(save_dir / "models" / "parrot", attack)
    server = Server(save_dir, fake=False)
    try:
        page = open_page()
        page.on("dialog", lambda dialog: pytest.fail("a script of the model ran"))
        page.goto(f"{server.url}/chat?model=parrot")
        say(page, attack)
        page.wait_for_url("**/chat/r*")
        expect(page.locator(".message.assistant[data-state=done]")).to_have_count(1, timeout=60_000)
        expect(page.locator(".message.assistant .said")).to_contain_text("<img src=")
        expect(page.locator(".message.user .tail")).to_have_text(attack)
        assert page.locator("main img").count() == 0
        page.locator("[data-model]").first.select_option("demo")
        say(page, "Tell me about the sea.")
        expect(page.locator(".message.assistant[data-state=done]")).to_have_count(2, timeout=60_000)
        expect(page.locator(".measured").last).to_contain_text("tokens/s")
    finally:
        server.stop()
