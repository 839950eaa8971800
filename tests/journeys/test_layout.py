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
