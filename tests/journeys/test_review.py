"""Looking back, comparing, naming, marking and taking away, in a real browser."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.journeys.conftest import Open
from tests.journeys.test_steering import answers, is_ready, press, start, step
from tests.server import Server, new_session, wait_ready

pytestmark = pytest.mark.browser


def test_several_good_ones_are_marked_by_keys_and_learned_together(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    before = page.locator("[name=offer]").first.input_value()
    page.keyboard.press("Shift+C")
    page.keyboard.press("Shift+A")
    expect(page.locator("[data-marked-text]")).to_have_text("Ticked: C › A")
    page.get_by_role("button", name="Learn all ticked").click()
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    is_ready(page)
    expect(page.locator("[data-strip-text]")).to_contain_text("Learned. Your last pick: ")
    session = page.url.rsplit("/", 1)[1]
    with server.client() as client:
        nodes = client.get(f"/api/steering/sessions/{session}/tree").json()["nodes"]
    assert nodes[-1]["choice"] == [2, 0]


def test_a_ranking_is_given_by_the_order_of_marking(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    for letter in ("B", "D", "A"):
        page.get_by_label(f"Tick {letter}").check()
    page.get_by_label("Tick D").uncheck()
    press(page, "o")
    session = page.url.rsplit("/", 1)[1]
    with server.client() as client:
        nodes = client.get(f"/api/steering/sessions/{session}/tree").json()["nodes"]
    assert nodes[-1]["choice"] == {"ranking": [1, 0]}
    expect(page.locator(".option.marked")).to_have_count(0)


def test_an_answer_is_repaired_and_a_draft_survives_a_reload(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    text = answers(page)[1]
    page.get_by_role("button", name="Edit this answer (B)").click()
    place = page.locator("#written")
    expect(place).to_have_value(text)
    place.press_sequentially(" And more.")
    page.reload()
    expect(page.locator("#written")).to_have_value(f"{text} And more.")
    before = page.locator("[name=offer]").first.input_value()
    page.locator("#written").press("Control+Enter")
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    is_ready(page)
    expect(page.locator("#tree [aria-current]")).to_contain_text(text[:12])
    page.reload()
    expect(page.locator("#written")).to_have_value("")


def test_a_step_is_named_and_two_steps_are_compared(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    page.get_by_label("Name step 1").fill("The good one")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".toast")).to_have_text("Saved")
    expect(page.locator("#tree [aria-current]")).to_contain_text("The good one")
    press(page, "b")
    page.get_by_role("link", name="Compare", exact=True).click()
    page.get_by_label("One prompt per line").fill("What is rain?\nWhy?")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator(".round")).to_have_count(2, timeout=30_000)
    expect(page.locator(".round").first).to_contain_text("What is rain?")
    expect(page.locator(".round").first.locator("article")).to_have_count(2)
    expect(page.locator(".round").first).to_contain_text("Base model")
    expect(page.locator(".round").first).to_contain_text("Step 2")
    page.reload()
    expect(page.locator(".round")).to_have_count(2)


def test_a_name_that_is_being_written_outlives_what_happens_meanwhile(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    place = page.get_by_label("Name step 1")
    place.fill("Kept")
    place.press("ArrowLeft")
    with page.expect_response(lambda response: response.url.endswith("/side/tree")):
        page.evaluate("htmx.trigger('#tree', 'trellis:tree')")
    expect(place).to_have_value("Kept")
    expect(place).to_be_focused()
    page.locator(".option .letter").nth(1).click()
    expect(page.locator("#tree [aria-current] .step")).to_have_text("2")
    expect(place).to_have_value("Kept")  # it still names the step that it was begun for
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#tree button", has_text="Kept").locator(".step")).to_have_text("1")
    expect(page.get_by_label("Name step 2")).to_have_value("")


def test_the_view_is_in_the_address_and_the_back_button_goes_back(open_page: Open, server: Server) -> None:
    page = open_page(viewport={"width": 375, "height": 740})
    start(page, server)
    page.get_by_role("link", name="Tree", exact=True).click()
    expect(page.locator("#tree")).to_be_visible()
    page.reload()
    expect(page.locator("#tree")).to_be_visible()
    page.get_by_role("link", name="Metrics", exact=True).click()
    page.go_back()
    expect(page.locator("#tree")).to_be_visible()
    page.go_back()
    expect(page.locator(".option").first).to_be_visible()


def test_the_review_tells_the_story_and_gives_it_all_away(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    press(page, "n")
    page.get_by_role("link", name="Review", exact=True).click()
    story = page.locator(".story li")
    expect(story).to_have_count(2)
    expect(story.first).to_contain_text("you chose A")
    expect(story.nth(1)).to_contain_text("you chose none of these")
    expect(page.locator(".chart polyline")).to_have_count(4)
    expect(page.locator(".markdown h2").first).to_contain_text("Step 1: chose A")
    page.get_by_label("Name", exact=True).fill("browser-adapter")
    page.get_by_role("button", name="Export adapter").click()
    card = page.locator("[data-export=browser-adapter]")
    expect(card).to_be_visible()
    page.get_by_label("Name", exact=True).fill("browser")
    page.get_by_role("button", name="Export merged model").click()
    merged = page.locator("[data-export=browser-merged]")
    expect(merged).to_contain_text("nats/token")
    with page.expect_download() as download:
        merged.get_by_role("link", name="Download zip").click()
    with zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes())) as archive:
        assert archive.testzip() is None
        assert "browser-merged/model.safetensors" in archive.namelist()
        assert "browser-merged/README.md" in archive.namelist()
    with page.expect_download() as download:
        page.get_by_role("link", name="Journal (Markdown)").click()
    assert "## Step 1: chose A" in Path(download.value.path()).read_text()
    page.get_by_label("Name", exact=True).fill("browser-merged")
    page.get_by_role("button", name="Export adapter").click()
    expect(page.locator(".toast.error")).to_contain_text("An export named “browser-merged” already exists")
    page.once("dialog", lambda dialog: dialog.accept())
    card.get_by_role("button", name="Delete").click()
    expect(card).to_have_count(0)
    expect(page.locator(".toast")).to_have_text("Export deleted")
    page.get_by_role("button", name="New session with these settings").click()
    page.wait_for_url("**/steer/*")
    is_ready(page)
    assert step(page) == "Base model"


def test_without_javascript_marks_review_and_export_are_plain_forms(open_page: Open, server: Server) -> None:
    with server.client() as client:
        session = new_session(client)["id"]
        page = open_page(java_script_enabled=False)
        page.goto(f"{server.url}/steer/{session}")
        page.get_by_label("Tick A").check()
        page.get_by_label("Tick B").check()
        page.get_by_role("button", name="Learn all ticked").click()
        assert wait_ready(client, session)["head"]["step"] == 1
        page.goto(f"{server.url}/steer/{session}/review")
        page.get_by_label("Name", exact=True).fill("by-plain-form")
        page.get_by_role("button", name="Export adapter").click()
        for _ in range(20):
            page.goto(f"{server.url}/steer/{session}/review")
            if page.locator("[data-export=by-plain-form]").count():
                break
        expect(page.locator("[data-export=by-plain-form]")).to_be_visible()
        page.goto(f"{server.url}/steer/{session}?view=figures")
        expect(page.locator("#figures")).to_be_visible()


def block_streams(page: Page) -> list[str]:
    blocked: list[str] = []
    page.route("**/events*", lambda route: (blocked.append(route.request.url), route.abort()))
    return blocked


def test_where_streams_are_blocked_a_page_asks_by_ordinary_requests(open_page: Open, server: Server) -> None:
    page = open_page()
    blocked = block_streams(page)
    page.goto(server.url)
    page.get_by_role("button", name="Start with the demo").click()
    page.wait_for_url("**/steer/*")
    is_ready(page)
    before = page.locator("[name=offer]").first.input_value()
    page.keyboard.press("a")
    expect(page.locator("[name=offer]").first).not_to_have_value(before, timeout=30_000)
    is_ready(page)
    expect(page.locator("#all-metrics dd").first).to_have_text("1")
    expect(page.locator("#tree li")).to_have_count(2)
    assert len(blocked) >= 3


def test_where_streams_are_blocked_a_load_ends_in_the_same_state(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir)
    try:
        page = open_page()
        block_streams(page)
        page.goto(f"{server.url}/models")
        page.get_by_role("button", name="Load demo").click()
        expect(page.locator(".badge.loaded")).to_be_visible(timeout=30_000)
        expect(page.get_by_role("button", name="Unload")).to_be_visible()
    finally:
        server.stop()


def test_a_screen_reader_hears_what_happened_and_no_tokens(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    expect(page.locator("[data-announce]")).to_have_text("Learned. Your last pick: 20% → 60% (3.0×). 4 new answers.")
    live = page.locator("[aria-live], [role=status], [role=alert]")
    for region in live.all():
        assert not region.locator("[data-text]").count()
    expect(page.locator("[aria-busy=false]")).to_have_count(1)


def test_the_focus_stays_where_it_was_when_a_part_is_renewed(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    page.locator("#tree button[name=node]").last.focus()
    focused = page.evaluate("document.activeElement.value")
    page.wait_for_timeout(500)
    assert page.evaluate("document.activeElement.value") == focused
    for _ in range(5):  # two parts at once, the other one while this one settles
        with (
            page.expect_response(lambda response: response.url.endswith("/side/tree")),
            page.expect_response(lambda response: response.url.endswith("/side/figures")),
        ):
            page.evaluate("for (const part of ['tree', 'figures']) htmx.trigger(`#${part}`, `trellis:${part}`)")
        page.wait_for_timeout(100)
        assert page.evaluate("document.activeElement.value") == focused


def test_marks_do_not_outlive_the_answers_they_were_made_for(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    page.keyboard.press("Shift+A")
    expect(page.locator(".option.marked")).to_have_count(1)
    session = page.url.rsplit("/", 1)[1]
    before = page.locator("[name=offer]").first.input_value()
    with server.client() as client:
        client.post(f"/api/steering/sessions/{session}/prompt", json={"text": "Asked in another tab?"})
    expect(page.locator("[name=offer]").first).not_to_have_value(before)
    expect(page.locator(".option.marked")).to_have_count(0)


def test_a_curve_tells_its_values_at_the_pointer_and_by_keys(open_page: Open, server: Server) -> None:
    page = open_page()
    start(page, server)
    press(page, "a")
    press(page, "b")
    session = page.url.rsplit("/", 1)[1]
    with server.client() as client:
        nodes = client.get(f"/api/steering/sessions/{session}/tree").json()["nodes"]
    drifts = [f"{100 * node['metrics']['drift']:.3g}" for node in nodes if node["metrics"]]
    page.get_by_role("link", name="Review", exact=True).click()
    figure = page.locator(".chart").first
    curve, readout = figure.get_by_role("slider"), figure.locator("[data-readout]")
    box = curve.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    expect(readout).to_have_text(f"step 1: {drifts[0]}%")
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
    expect(readout).to_have_text(f"step 2: {drifts[1]}%")
    page.mouse.move(0, 0)
    expect(readout).to_contain_text("arrow keys")
    curve.focus()
    page.keyboard.press("Home")
    expect(curve).to_have_attribute("aria-valuetext", "step 0: 0%")
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text(f"step 1: {drifts[0]}%")
    page.keyboard.press("End")
    expect(curve).to_have_attribute("aria-valuenow", "2")
    expect(figure.locator(".axis-values span").first).to_contain_text("%")
    expect(figure.locator(".axis-steps span")).to_have_text(["step 0", "1", "2"])
