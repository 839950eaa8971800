"""Judging blind and learning from whole logs, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.journeys.conftest import Open
from tests.journeys.test_steering import is_ready, press, start
from tests.server import Server

pytestmark = pytest.mark.browser


def clean(page: Page) -> None:
    """Neither axe nor a phone finds anything wrong."""
    assert Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def judged(page: Page, key: str) -> None:
    """Press a key and wait for the next round or the result."""
    before = page.locator("[data-round]").get_attribute("data-round")
    page.wait_for_timeout(350)  # a round that has just come cannot have been read
    page.keyboard.press(key)
    expect(page.locator(f"[data-round='{before}']")).to_have_count(0)
    expect(page.locator("[data-round='waiting']")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_two_steps_are_judged_blind_by_keys(open_page: Open, server: Server, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    start(page, server)
    press(page, "a")
    page.get_by_role("link", name="Review and export").click()
    page.get_by_role("link", name="Blind test").click()
    clean(page)
    page.get_by_label("Rounds").fill("4")
    page.get_by_role("button", name="Start").click()
    expect(page.get_by_text("Round 1 of 4")).to_be_visible()
    expect(page.locator(".answer")).to_have_count(2)
    expect(page.locator("main")).not_to_contain_text("Step 1")
    clean(page)
    page.set_viewport_size({"width": 375, "height": 740})
    clean(page)
    page.set_viewport_size({"width": 1440, "height": 900})
    judged(page, "a")
    first = page.locator("[data-round]").get_attribute("data-round")
    judged(page, "b")
    page.keyboard.press("u")
    expect(page.locator(f"[data-round='{first}']")).to_be_visible()
    judged(page, "t")
    page.reload()
    expect(page.get_by_text("Round 3 of 4")).to_be_visible()
    judged(page, "b")
    judged(page, "b")
    expect(page.locator(".verdict h2")).to_be_focused()
    expect(page.locator(".verdict")).to_contain_text("4 of 4 planned rounds")
    expect(page.locator(".round")).to_have_count(4)
    expect(page.locator(".won")).to_have_count(3)
    clean(page)
    page.get_by_role("link", name="Test again").click()
    expect(page.locator(".trial-card")).to_have_count(1)
    clean(page)


def test_a_comparison_is_ended_early_after_asking(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    page.goto(f"{page.url}/blind")
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".answer")).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="End and show result").click()
    expect(page.locator(".answer")).to_have_count(2)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="End and show result").click()
    expect(page.get_by_role("heading", name="No winner")).to_be_visible()


def test_a_branch_is_fitted_afresh_and_a_file_is_learned_from(open_page: Open, server: Server, tmp_path: Path) -> None:
    page = open_page()
    start(page, server)
    session = page.url
    page.goto(f"{session}/log")
    expect(page.get_by_role("button", name="Retrain on 0 choices")).to_be_disabled()
    clean(page)
    page.goto(session)
    is_ready(page)
    press(page, "a")
    expect(page.locator("#all-metrics div", has_text="Preference accuracy").locator("dd")).to_have_text("1/1")
    page.goto(f"{session}/log")
    page.get_by_role("button", name="Retrain on 1 choice").click()
    card = page.locator(".card", has_text="Retrain from scratch")
    expect(card).to_contain_text("1/1")
    file = tmp_path / "likes.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}?", "chosen": "A", "rejected": "B"}) + "\n" for n in range(9)))
    page.locator("#upload-choices").set_input_files(file)
    expect(page.locator("#import-file")).to_have_value("likes.jsonl")
    page.get_by_role("button", name="Train on this file").click()
    card = page.locator(".card", has_text="Preference data: likes.jsonl")
    expect(card).to_contain_text("9/9")
    clean(page)
    page.set_viewport_size({"width": 375, "height": 740})
    clean(page)
    card.get_by_role("button", name="Go to this step").click()
    is_ready(page)
    expect(page.locator("#tree [aria-current]")).to_contain_text("imported 9 choices")
    expect(page.locator("#figures")).to_contain_text("Last training: ")
