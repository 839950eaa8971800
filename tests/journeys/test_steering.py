"""A person at the workbench, in a real browser: from the first click to a branch, a crash and a phone."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.journeys.conftest import Open
from tests.server import Server, new_session, wait_ready

pytestmark = pytest.mark.browser


def is_ready(page: Page) -> None:
    expect(page.locator("[data-status=ready]")).to_be_visible(timeout=30_000)


def start(page: Page, server: Server) -> None:
    page.goto(server.url)
    page.get_by_role("button", name="Start with the demo").click()
    page.wait_for_url("**/steer/*")
    is_ready(page)


def answers(page: Page) -> list[str]:
    return page.locator("[data-text]").all_inner_texts()


def step(page: Page) -> str:
    return page.locator("#all-metrics dd").first.text_content() or ""


def press(page: Page, key: str) -> None:
    """A key, and then the next options whole."""
    before = page.locator("[name=offer]").first.input_value()
    page.keyboard.press(key)
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    is_ready(page)


def test_the_whole_loop_by_keyboard(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    first = answers(page)
    assert len(first) == 4
    assert all(first)
    press(page, "a")
    expect(page.locator("[data-strip-text]")).to_have_text(
        re.compile(r"^Learned\. Your last pick: \d+% → \d+% \(3\.0×\)\.$")
    )
    assert answers(page) != first
    expect(page.locator("#all-metrics dd").first).to_have_text("1")
    expect(page.locator("#figures [data-report]")).to_have_text(re.compile(r"^Last pick: \d+% → \d+% \(3\.0×\)$"))
    expect(page.locator("#all-metrics div", has_text="Preference accuracy").locator("dd")).to_have_text("1/1")
    press(page, "n")
    expect(page.locator("#tree li")).to_have_count(3)
    expect(page.locator("#tree [aria-current]")).to_contain_text("none of these")
    press(page, "s")
    expect(page.locator("#tree li")).to_have_count(4)
    for _ in range(3):
        press(page, "u")
    assert answers(page) == first
    expect(page.get_by_role("button", name="Undo")).to_be_disabled()
    press(page, "b")
    expect(page.locator("#tree li")).to_have_count(5)
    expect(page.locator("#tree [aria-current]")).to_contain_text("1")
    press(page, "u")
    press(page, "r")
    expect(page.get_by_role("button", name="Redo")).to_be_disabled()


def test_a_card_can_be_clicked_and_any_node_returned_to(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    first = answers(page)
    before = page.locator("[name=offer]").first.input_value()
    page.locator(".option").nth(2).locator("[data-text]").click()
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    is_ready(page)
    page.get_by_role("button", name="Base model").click()
    expect(page.locator("[name=offer]").first).to_have_value(before)
    is_ready(page)
    assert answers(page) == first
    assert page.locator("#tree li").count() == 2


def test_the_prompt_is_edited_in_place_and_an_answer_written(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.keyboard.press("e")
    page.locator("#edit-text").fill("What is rain?")
    page.get_by_role("button", name="Generate new answers").click()
    expect(page.locator("[data-prompt]")).to_have_text("What is rain?")
    is_ready(page)
    page.keyboard.press("w")
    page.locator("#written").fill("Rain is the sky, arr.")
    page.get_by_role("button", name="Train on this answer").click()
    expect(page.locator("[data-strip-text]")).to_contain_text("Learned. Your answer: ")
    is_ready(page)
    expect(page.locator("#tree li").first).to_contain_text("Rain is the sky, arr.")


def test_typing_in_a_field_presses_no_keys(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.locator(".title").fill("a b n s u")
    page.keyboard.press("Enter")
    time.sleep(0.3)
    assert page.locator("#tree li").count() == 1
    page.reload()
    expect(page.locator(".title")).to_have_value("a b n s u")


def test_a_reload_and_the_back_button_restore_what_was_on_the_screen(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    shown = answers(page)
    page.reload()
    is_ready(page)
    assert answers(page) == shown
    page.goto(f"{server.url}/models")
    page.go_back()
    is_ready(page)
    assert answers(page) == shown
    press(page, "b")


def test_two_tabs_on_one_session_show_the_same(open_page: Open, server: Server) -> None:
    one, two = open_page(), open_page()
    start(one, server)
    two.goto(one.url)
    is_ready(two)
    press(one, "c")
    expect(two.locator("#tree li")).to_have_count(2)
    is_ready(two)
    assert answers(two) == answers(one)


def test_a_page_goes_on_after_the_server_was_killed(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    page = open_page()
    start(page, server)
    press(page, "a")
    before = answers(page)
    server.kill()
    expect(page.locator("[data-connection]")).to_be_visible()
    server.start()
    expect(page.locator("[data-connection]")).to_be_hidden(timeout=30_000)
    is_ready(page)
    assert answers(page) == before
    # Weights that were not saved yet are recomputed first; a click waits until the button is enabled again.
    offer = page.locator("[name=offer]").first.input_value()
    page.get_by_role("button", name="Choose B").click()
    expect(page.locator("[name=offer]").first).not_to_have_value(offer)
    is_ready(page)
    expect(page.locator("#tree li")).to_have_count(3)
    assert server.stop() == 0


def test_a_page_says_so_when_the_studio_refuses(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.evaluate("document.querySelector('[name=offer]').value = 'stale'")
    page.keyboard.press("a")
    expect(page.locator(".toast.error")).to_contain_text("These answers are out of date")
    expect(page.get_by_role("button", name="Choose A")).to_be_enabled()


def test_a_failure_is_shown_with_a_way_out(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.keyboard.press("e")
    page.locator("#edit-text").fill("word " * 2000)
    page.get_by_role("button", name="Generate new answers").click()
    expect(page.locator("[data-strip][data-kind=failed]")).to_contain_text("Shorten it")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()
    page.locator("[data-edit] summary").click()
    page.locator("#edit-text").fill("What is rain?")
    page.get_by_role("button", name="Generate new answers").click()
    is_ready(page)


def test_a_deleted_session_sends_its_watchers_home(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    with server.client() as client:
        client.delete(f"/api/steering/sessions/{page.url.rsplit('/', 1)[1]}")
    page.wait_for_url(f"{server.url}/")


def test_deleting_asks_first(open_page: Open, server: Server) -> None:
    with server.client() as client:
        name = new_session(client)["name"]
    page = open_page()
    page.goto(server.url)
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name=f"Delete {name}", exact=True).click()
    row = page.locator(".session-link strong", has_text=re.compile(f"^{re.escape(name)}$"))
    expect(row).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name=f"Delete {name}", exact=True).click()
    expect(row).to_have_count(0)


def test_it_works_on_a_phone(open_page: Open, server: Server) -> None:
    page = open_page(viewport={"width": 375, "height": 740}, has_touch=True, is_mobile=True)
    start(page, server)
    before = page.locator("[name=offer]").first.input_value()
    page.get_by_role("button", name="Choose B").tap()
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    is_ready(page)
    page.get_by_role("link", name="Tree", exact=True).tap()
    expect(page.locator("#tree li")).to_have_count(2)
    page.get_by_role("link", name="Metrics", exact=True).tap()
    expect(page.locator("#figures")).to_be_visible()
    page.get_by_role("link", name="Answers", exact=True).tap()
    undo = page.get_by_role("button", name="Undo")
    box = undo.bounding_box()
    assert box is not None
    assert box["y"] > 600
    undo.tap()
    expect(page.locator("[name=offer]").first).to_have_value(before)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 375])
def test_every_page_passes_axe_and_fits_its_screen(open_page: Open, server: Server, scheme: str, width: int) -> None:
    with server.client() as client:
        session = new_session(client)["id"]
        offer = wait_ready(client, session)["offer"]["id"]
        client.post(f"/api/steering/sessions/{session}/choose", json={"offer": offer, "choice": 0})
        wait_ready(client, session)
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce")
    steering = f"/steer/{session}"
    for path in (
        "/",
        "/new",
        steering,
        f"{steering}/review",
        f"{steering}/compare",
        "/models",
        "/steer/nope",
        "/login",
    ):
        page.goto(server.url + path)
        for summary in page.locator("main details:not([hidden], [data-edit], [data-write]) > summary:visible").all():
            summary.click()
        found = Axe().run(page)
        assert found.violations_count == 0, f"{path}: {found.generate_report()}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    page.goto(f"{server.url}/steer/{session}")
    for tab in ("Tree", "Metrics") if width == 375 else ():
        page.get_by_role("link", name=tab, exact=True).click()
        if tab == "Metrics":
            page.get_by_text("All metrics").click()
        found = Axe().run(page)
        assert found.violations_count == 0, f"{tab}: {found.generate_report()}"


def test_everything_can_be_reached_by_keyboard(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("(document.activeElement.ariaLabel || document.activeElement.innerText || '').trim()")
        )
    for wanted in ("Choose A", "Choose D", "Skip", "Edit prompt", "None of these", "Write my own", "Base model"):
        assert any(wanted in name for name in reached), (wanted, reached)


def test_without_javascript_a_choice_is_a_plain_form(open_page: Open, server: Server) -> None:
    page = open_page(java_script_enabled=False)
    page.goto(server.url)
    page.get_by_role("button", name="Start with the demo").click()
    page.wait_for_url("**/steer/*")
    session = page.url.rsplit("/", 1)[1]
    with server.client() as client:
        wait_ready(client, session)
        page.reload()
        page.get_by_role("button", name="Choose B").click()
        wait_ready(client, session)
        page.reload()
        expect(page.locator("#tree li")).to_have_count(2)
        page.get_by_role("button", name="Undo").click()
        assert wait_ready(client, session)["head"]["step"] == 0


def test_models_load_in_plain_sight(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)  # of its own, where no session is at work with the model
    try:
        page = open_page()
        page.goto(f"{server.url}/models")
        page.get_by_role("button", name="Load demo").click()
        expect(page.get_by_role("button", name="Unload")).to_be_visible()
        page.get_by_role("button", name="Unload").click()
        expect(page.get_by_role("button", name="Load demo")).to_be_visible()
    finally:
        server.stop()


def test_the_theme_switch_is_remembered(open_page: Open, server: Server) -> None:
    page = open_page(color_scheme="light")
    page.goto(server.url)
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(18, 18, 17)"
    page.goto(f"{server.url}/models")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(18, 18, 17)"


def test_with_many_options_e_chooses_and_p_edits(open_page: Open, server: Server) -> None:
    with server.client() as client:
        session = new_session(client, group_size=6)["id"]
    page = open_page()
    page.goto(f"{server.url}/steer/{session}")
    is_ready(page)
    press(page, "e")
    expect(page.locator("[data-strip-text]")).to_contain_text("Learned. Your last pick: ")
    page.keyboard.press("p")
    expect(page.locator("#edit-text")).to_be_visible()


def test_a_written_answer_stays_with_the_prompt_it_was_begun_for(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.keyboard.press("w")
    page.locator("#written").fill("An answer to the first prompt.")
    before = page.locator("#choose [name=offer]").input_value()
    with server.client() as client:
        client.post(f"/api/steering/sessions/{page.url.rsplit('/', 1)[1]}/skip")
    expect(page.locator("#choose [name=offer]")).not_to_have_value(before)
    is_ready(page)
    page.get_by_role("button", name="Train on this answer").click()
    expect(page.locator(".toast.error")).to_contain_text("These answers are out of date")
    expect(page.locator("#written")).to_have_value("An answer to the first prompt.")


def test_undo_is_a_way_out_of_a_failure_that_came_back(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    try:
        page = open_page()
        start(page, server)
        press(page, "a")
        weights = save_dir / "weights"
        while len([each for each in weights.iterdir() if not each.name.startswith(".")]) < 2:
            page.wait_for_timeout(20)  # they are written behind the click
        weights.rename(save_dir / "aside")
        weights.write_text("in the way")
        page.keyboard.press("b")
        expect(page.locator("[data-strip][data-kind=failed]")).to_be_visible()
        page.get_by_role("button", name="Try again").click()
        page.wait_for_timeout(500)
        expect(page.locator("[data-strip][data-kind=failed]")).to_be_visible()
        expect(page.get_by_role("button", name="Undo")).to_be_enabled()
        weights.unlink()
        (save_dir / "aside").rename(weights)
        page.get_by_role("button", name="Undo").click()
        is_ready(page)
    finally:
        server.stop()


def test_a_page_shows_that_its_model_was_unloaded_elsewhere(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    try:
        page = open_page()
        start(page, server)
        expect(page.locator("[data-engine-text]")).to_have_text("demo · ready")
        with server.client() as client:
            client.post("/api/models/demo/unload")
        expect(page.locator("[data-engine-text]")).to_have_text("demo · unloaded")
        press(page, "a")
        expect(page.locator("[data-engine-text]")).to_have_text("demo · ready")
    finally:
        server.stop()


def test_options_that_are_the_same_are_one_card_and_one_choice(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.keyboard.press("e")
    page.locator("#edit-text").fill("Please repeat yourself.")
    page.get_by_role("button", name="Generate new answers").click()
    expect(page.locator("[data-prompt]")).to_have_text("Please repeat yourself.")
    is_ready(page)
    expect(page.locator(".option:visible")).to_have_count(3)
    expect(page.locator("[data-option='0'] [data-times]")).to_have_text("×2")
    expect(page.locator("[data-times]:visible")).to_have_count(1)
    page.keyboard.press("Shift+C")  # there is no C on the page
    page.keyboard.press("c")
    expect(page.locator(".option.marked")).to_have_count(0)
    page.reload()
    is_ready(page)
    expect(page.locator(".option:visible")).to_have_count(3)
    press(page, "a")
    expect(page.locator("[data-strip-text]")).to_contain_text("Learned. Your last pick: ")
    session = page.url.rsplit("/", 1)[1]
    with server.client() as client:
        nodes = client.get(f"/api/steering/sessions/{session}/tree").json()["nodes"]
    assert nodes[-1]["choice"] == [0, 2]
    expect(page.locator(".option:visible")).to_have_count(4)
    page.goto(f"{page.url}/review")
    expect(page.locator(".story li")).to_contain_text("you chose A, drawn 2 times")


def test_a_ranking_is_told_as_a_ranking(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    words = answers(page)[1][:20]
    page.keyboard.press("Shift+B")
    page.keyboard.press("Shift+A")
    press(page, "o")
    page.keyboard.press("Shift+C")
    page.keyboard.press("Shift+D")
    press(page, "m")
    page.goto(f"{page.url}/review")
    expect(page.locator(".story li").first).to_contain_text("you ranked B › A, best first")
    expect(page.locator(".story li").first).to_contain_text(words)
    expect(page.locator(".story li").nth(1)).to_contain_text("you picked C and D")


def test_letters_act_on_the_workbench_and_on_no_other_page(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    session = page.url.rsplit("/", 1)[1]
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method != "GET" else None)
    for path in (
        "/",
        "/models",
        "/connections",
        "/new",
        *(f"/steer/{session}/{at}" for at in ("review", "compare", "log")),
    ):
        page.goto(f"{server.url}{path}")
        page.wait_for_load_state("networkidle")
        page.evaluate("document.activeElement.blur()")
        before = page.url
        sent.clear()
        for key in "abcdnsurewmop":
            page.keyboard.press(key)
        page.wait_for_timeout(200)
        assert (sent, page.url) == ([], before)
