"""Every page in every state on the screens that people have: no sideways scroll, and nothing covers a control."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

from tests.journeys.conftest import Open
from tests.states import StatesServer

pytestmark = pytest.mark.browser

SIZES = {
    "laptop": {"width": 1366, "height": 650},
    "wide": {"width": 1280, "height": 800},
    "phone": {"width": 375, "height": 740},
    "laptop at 200 %": {"width": 683, "height": 325},
    "wide at 200 %": {"width": 640, "height": 400},
}
PASSWORD = "a long enough password"

SIDEWAYS = """() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return null;
  const wide = [...document.querySelectorAll("body *")].filter((each) =>
    each.getBoundingClientRect().right > root.clientWidth + 1);
  const shown = wide.slice(-3).map((each) => each.outerHTML.slice(0, 160));
  return `${root.scrollWidth} > ${root.clientWidth}: ${shown.join(" | ")}`;
}"""
"""How a page scrolls sideways, if it does: the last elements that reach out of it."""

COVERED = """() => {
  const found = [];
  const controls = "a.button, button, summary, input:not([type=hidden]), select, textarea";
  for (const each of document.querySelectorAll(controls)) {
    if (!each.checkVisibility({ visibilityProperty: true, opacityProperty: true })) continue;
    if (each.closest(".visually-hidden") || each.matches(".visually-hidden")) continue;
    each.scrollIntoView({ block: "center", inline: "nearest", behavior: "instant" });
    const box = each.getBoundingClientRect();
    const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
    const label = each.labels?.[0];
    if (at && (each.contains(at) || label?.contains(at))) continue;
    found.push(`${each.outerHTML.slice(0, 120)} under ${at ? at.outerHTML.slice(0, 120) : "nothing"}`);
  }
  scrollTo(0, 0);
  return found;
}"""
"""Controls that cannot be pressed where they are, each scrolled to first."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[StatesServer]:
    with StatesServer(tmp_path_factory.mktemp("states"), tiny_llama, rate_limit=0) as server:
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[StatesServer]:
    """The same behind a password."""
    folder = tmp_path_factory.mktemp("locked")
    with StatesServer(folder, tiny_llama, rate_limit=0, password=PASSWORD) as server:
        yield server


def settled(page: Page, url: str) -> None:
    page.goto(url)
    page.wait_for_load_state("load")
    page.wait_for_timeout(150)


def problems(page: Page) -> list[str]:
    sideways = page.evaluate(SIDEWAYS)
    return [*([f"sideways: {sideways}"] if sideways else []), *page.evaluate(COVERED)]


def walk(page: Page, server: StatesServer) -> dict[str, Any]:
    wrong = {}
    for name, path in server.states.pages.items():
        settled(page, server.url + path)
        if found := problems(page):
            wrong[name] = found
    return wrong


@pytest.mark.parametrize("size", SIZES)
def test_no_page_scrolls_sideways_and_nothing_covers_a_control(
    open_page: Open, server: StatesServer, size: str
) -> None:
    assert walk(open_page(viewport=SIZES[size]), server) == {}


@pytest.mark.parametrize("size", ["phone", "wide at 200 %"])
def test_nor_does_any_with_a_password(open_page: Open, locked: StatesServer, size: str) -> None:
    page = open_page(viewport=SIZES[size])
    settled(page, locked.url)
    assert page.url.endswith("/login?next=/") or "/login" in page.url
    assert page.get_by_role("button", name="Log out").count() == 0
    assert problems(page) == []
    page.get_by_label("Password").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    page.locator(".field-error").wait_for()
    assert problems(page) == []
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="Log out").wait_for()
    assert walk(page, locked) == {}


IN_VIEW = """() => [...document.querySelectorAll(".option:not([hidden]) [data-text]")].filter((text) => {
  const box = text.getBoundingClientRect();
  const range = document.createRange();
  range.selectNodeContents(text);
  const words = range.getBoundingClientRect();
  const at = document.elementFromPoint(words.x + 4, words.bottom - 4);
  const whole = words.top >= 0 && words.bottom <= innerHeight && text.scrollHeight <= text.clientHeight + 1;
  return whole && text.contains(at);
}).length"""
"""How many answers can be read whole without scrolling."""


@pytest.mark.parametrize("size", ["laptop", "wide"])
def test_all_answers_can_be_read_without_scrolling(open_page: Open, server: StatesServer, size: str) -> None:
    page = open_page(viewport=SIZES[size])
    settled(page, f"{server.url}/steer/{server.states.fresh_session}")
    page.locator("[data-status=ready]").wait_for()
    assert page.evaluate(IN_VIEW) == 4
    before = page.locator("[name=offer]").first.input_value()
    page.keyboard.press("s")
    page.locator(f"[name=offer]:not([value='{before}'])").first.wait_for(state="attached")
    page.locator("[data-status=ready]").wait_for()
    page.wait_for_timeout(300)
    assert page.evaluate(IN_VIEW) == 4


LONGEST_PROMPT = "What would you say about the first winter in a house of wood and stone by the cold sea?"
LONGEST = (
    "Now, this was told to me as a child. The old people knew that mushrooms are neither plants nor animals but "
    "something in between, and they told it to us by the fire. They tell it in that village to this day.",
    "It is recorded that, upon a certain occasion, a family burned their last log on the coldest night, and a "
    "neighbour came through the drifts with more; the event was, I understand, widely remarked upon.",
    "I am obliged to you for the question. In the first place, people have cooked with it for hundreds of thousands of "
    "years; in the second, fire needs fuel, heat and air, and dies without any one of them.",
    "The red heart under the ash, orange cloth torn by the wind;\nan old man carried embers in a pot from house to "
    "house, and the village had one fire for a hundred years,\nslow as the shadow of a cloud.",
)
"""The longest of 3,000 answers of the demo's corpus, and the one with the most lines."""

FILL = """([prompt, texts]) => {
  document.querySelector("[data-prompt]").textContent = prompt;
  const fill = (text, index) => { text.textContent = texts[index % texts.length]; };
  document.querySelectorAll("[data-text]").forEach(fill);
}"""


@pytest.mark.parametrize("size", ["laptop", "wide"])
@pytest.mark.parametrize("texts", [LONGEST, LONGEST[3:]], ids=["longest", "most lines"])
def test_the_longest_answers_of_the_demo_are_all_in_sight(
    open_page: Open, server: StatesServer, size: str, texts: tuple[str, ...]
) -> None:
    page = open_page(viewport=SIZES[size])
    settled(page, f"{server.url}/steer/{server.states.fresh_session}")
    page.locator("[data-status=ready]").wait_for()
    before = page.locator("[name=offer]").first.input_value()
    page.keyboard.press("a")  # the strip then says what the last pick did
    page.locator(f"[name=offer]:not([value='{before}'])").first.wait_for(state="attached")
    page.locator("[data-status=ready]").wait_for()
    page.locator("[data-strip-text]", has_text="Learned.").wait_for()
    page.evaluate(FILL, [LONGEST_PROMPT, texts])
    assert page.evaluate(IN_VIEW) == 4
    assert page.evaluate("scrollY") == 0
    assert page.get_by_role("button", name="None of these").is_visible()
    assert problems(page) == []


def test_what_ticking_is_for_is_said_before_anything_is_ticked(open_page: Open, server: StatesServer) -> None:
    for size, said in (("laptop", "best first (Shift+letter)"), ("phone", "best first")):
        page = open_page(viewport=SIZES[size])
        settled(page, f"{server.url}/steer/{server.states.fresh_session}")
        page.locator("[data-status=ready]").wait_for()
        hint = page.locator(".hint")
        assert hint.inner_text().strip() == f"More than one good? Tick them, {said}"
        page.get_by_label("Tick A").check()
        assert not hint.is_visible()


def test_skip_links_lead_to_the_content_and_to_the_answers_without_an_outline(
    open_page: Open, server: StatesServer
) -> None:
    page = open_page(viewport=SIZES["laptop"])
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for name, path in server.states.pages.items():
        settled(page, server.url + path)
        page.get_by_role("link", name="Skip to content").press("Enter")
        assert page.evaluate("document.activeElement.id") == "main", name
        assert page.evaluate(outline) == "none", name
    settled(page, f"{server.url}/steer/{server.states.fresh_session}")
    page.locator("[data-status=ready]").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the answers"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "choose"
    assert page.evaluate(outline) == "none"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "Choose A"


TALL = 'document.querySelector(".options-grid").offsetHeight'


def test_a_tall_answer_does_not_keep_the_cards_tall(open_page: Open, server: StatesServer) -> None:
    page = open_page(viewport=SIZES["laptop"])
    settled(page, f"{server.url}/steer/{server.states.fresh_session}")
    page.locator("[data-status=ready]").wait_for()
    usual = page.evaluate(TALL)
    page.evaluate("document.querySelector('[data-text]').append(' many words'.repeat(200))")
    tall = page.evaluate(TALL)
    for _ in range(2):
        before = page.locator("[name=offer]").first.input_value()
        page.keyboard.press("s")
        page.wait_for_timeout(50)
        page.locator("[data-status=ready]").wait_for()
        page.wait_for_timeout(300)
        assert page.locator("[name=offer]").first.input_value() != before
    assert usual - 60 < page.evaluate(TALL) < usual + 60 < tall


@pytest.mark.parametrize("size", ["laptop", "wide", "phone"])
def test_marking_covers_no_answer(open_page: Open, server: StatesServer, size: str) -> None:
    page = open_page(viewport=SIZES[size])
    settled(page, f"{server.url}/steer/{server.states.fresh_session}")
    page.locator("[data-status=ready]").wait_for()
    before = page.locator(".actions").bounding_box()
    page.keyboard.press("Shift+A")
    page.keyboard.press("Shift+B")
    after = page.locator(".actions").bounding_box()
    assert before
    assert after
    if size != "phone":
        assert after["height"] <= before["height"] + 1
        assert page.evaluate(IN_VIEW) == 4
    assert problems(page) == []


def test_a_notice_covers_no_control(open_page: Open, server: StatesServer) -> None:
    for size in ("laptop", "wide", "phone"):
        page = open_page(viewport=SIZES[size])
        settled(page, f"{server.url}/steer/{server.states.fresh_session}")
        page.locator("[data-status=ready]").wait_for()
        page.evaluate("document.querySelector('[name=offer]').value = 'stale'")
        page.keyboard.press("a")
        page.locator(".toast.error").wait_for()
        assert problems(page) == []
        toast = page.locator(".toast").bounding_box()
        refuse = page.get_by_role("button", name="None").bounding_box()
        assert toast
        assert refuse
        apart = toast["x"] + toast["width"] <= refuse["x"] or toast["y"] + toast["height"] <= refuse["y"]
        assert apart, (toast, refuse)


def test_pages_in_every_state_are_accessible(open_page: Open, server: StatesServer) -> None:
    page = open_page()
    for name in (
        "failed",
        "loading",
        "fresh",
        "models",
        "review",
        "log",
        "blind",
        "trial in trouble",
        "new",
        "steering",
    ):
        settled(page, server.url + server.states.pages[name])
        found = Axe().run(page)
        assert found.violations_count == 0, (name, found.generate_report())
