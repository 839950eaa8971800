"""Setting a session up in a real browser: the form, its checks, presets, cloned settings, files, and what it costs."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.journeys.conftest import Open
from tests.journeys.test_steering import is_ready
from tests.server import Server, new_session

pytestmark = pytest.mark.browser


def field(page: Page, name: str) -> object:
    return page.locator(f"[name='{name}']").input_value()


def test_the_form_is_checked_while_it_is_filled_in_and_when_it_is_sent(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    size = page.get_by_label("Answers per prompt")
    size.fill("99")
    expect(page.locator("#error-option-group_size")).to_contain_text("Must be 8 or less")
    expect(size).to_have_attribute("aria-invalid", "true")
    expect(page.locator("[data-problems]")).to_contain_text("Answers per prompt")
    page.get_by_role("button", name="Load demo and start").click()
    expect(page.get_by_role("alert")).to_contain_text("Answers per prompt: Must be 8 or less")
    expect(page.get_by_label("Answers per prompt")).to_be_focused()
    size = page.get_by_label("Answers per prompt")
    expect(size).to_have_value("99")
    size.fill("3")
    expect(page.locator("[data-problems]")).to_be_empty()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Session name").fill("Of my own")
    page.get_by_role("button", name="Load demo and start").click()
    page.wait_for_url("**/steer/*")
    is_ready(page)
    expect(page.locator(".option")).to_have_count(3)
    expect(page.get_by_label("Session name")).to_have_value("Of my own")


def test_a_preset_fills_the_form_and_keeps_what_was_typed(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    page.get_by_label("Temperature").fill("0.33")
    page.get_by_role("button", name="Thinking model").click()
    expect(page.get_by_label("Max new tokens")).to_have_value("1024")
    expect(page.get_by_label("Answers per prompt")).to_have_value("3")
    assert page.locator("[name=append_think]").is_checked()
    page.get_by_role("button", name="Small").click()
    expect(page.get_by_label("Context length")).to_have_value("2048")
    expect(page.get_by_label("Answers per prompt")).to_have_value("4")
    assert not page.locator("[name=append_think]").is_checked()
    expect(page.get_by_label("Temperature")).to_have_value("0.33")
    page.get_by_role("button", name="Large").click()
    expect(page.locator("[name=precision]")).to_have_value("4-bit")
    expect(page.locator("[data-preset-note]")).to_contain_text("Set by the preset: Model, Weight precision, ")
    expect(page.get_by_label("Model", exact=True)).to_have_value("Qwen/Qwen2.5-14B-Instruct")
    page.get_by_role("button", name="Demo").click()
    expect(page.locator("[name=precision]")).to_have_value("auto")
    expect(page.get_by_label("Model", exact=True)).to_have_value("demo")
    page.get_by_label("Model", exact=True).fill("my-own")
    page.get_by_role("button", name="Thinking model").click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("my-own")
    note = page.locator("[data-preset-note]")
    expect(note).to_have_text(
        re.compile("^Set by the preset: Context length, .*\\. Kept as you set them: Model, Temperature\\.$")
    )


def test_without_javascript_presets_clones_previews_and_the_form_work(open_page: Open, server: Server) -> None:
    page = open_page(java_script_enabled=False)
    page.goto(f"{server.url}/new")
    page.get_by_label("Model", exact=True).fill("demo-of-mine")
    page.get_by_label("Temperature").fill("0,5")
    page.get_by_role("button", name="Thinking model").click()
    page.get_by_role("button", name="Base model").click()
    expect(page.get_by_label("Max new tokens")).to_have_value("80")
    expect(page.get_by_label("Model", exact=True)).to_have_value("demo-of-mine")
    expect(page.get_by_label("Temperature")).to_have_value("0,5")
    expect(page.locator("[data-preset-note]")).to_contain_text("Kept as you set them: Model, Temperature.")
    page.get_by_label("Model", exact=True).fill("demo")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator(".samples li")).to_have_count(3)
    expect(page.get_by_label("Max new tokens")).to_have_value("80")
    page.get_by_role("button", name="Load the model and start").click()
    page.wait_for_url("**/steer/*")
    page.goto(server.url)
    page.get_by_role("link", name=re.compile("^Duplicate the settings")).first.click()
    expect(page.get_by_label("Max new tokens")).to_have_value("80")
    assert not page.locator("[name=chat_template]").is_checked()
    assert field(page, "temperature") == "0.5"


@pytest.mark.parametrize("size", [(1366, 650), (375, 780)])
def test_start_and_memory_stay_in_sight_and_cover_no_field(
    open_page: Open, server: Server, size: tuple[int, int]
) -> None:
    page = open_page(viewport={"width": size[0], "height": size[1]})
    page.goto(f"{server.url}/new")
    assert page.locator("details[open]").count() == 0
    start, memory = page.get_by_role("button", name="Load demo and start"), page.locator("[data-memory-text]")
    for summary in page.locator("summary").all():
        summary.click()
    page.get_by_label("Session name").focus()
    for _ in range(80):
        if page.evaluate("document.activeElement.closest('.setup-end') !== null"):
            break
        expect(start).to_be_in_viewport(ratio=1)
        expect(memory).to_be_in_viewport(ratio=1)
        covered = page.evaluate("""() => {
            const field = document.activeElement.getBoundingClientRect();
            const at = document.elementFromPoint(field.left + field.width / 2, field.top + field.height / 2);
            return at === null || at.closest(".setup-end") !== null;
        }""")
        assert not covered, page.evaluate("document.activeElement.outerHTML")
        page.keyboard.press("Tab")
    else:
        raise AssertionError("Start is not reached by Tab")


def test_memory_follows_the_options_and_what_would_fit_can_be_taken(
    open_page: Open, tiny_llama: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path, TRELLIS_ENGINE_MEMORY_GB="0.75")
    try:
        page = open_page()
        page.goto(f"{server.url}/new")
        memory = page.locator("[data-memory-text]")
        expect(memory).to_contain_text("may not fit")
        before = memory.inner_text()
        page.get_by_label("Max new tokens").fill("64")
        expect(memory).not_to_have_text(before)
        page.get_by_role("button", name=re.compile("^Use .*, fits")).first.click()
        expect(memory).to_contain_text(": fits")
    finally:
        server.stop()


def test_a_file_of_prompts_is_uploaded_previewed_and_steered_on(
    open_page: Open, server: Server, tmp_path: Path
) -> None:
    file = tmp_path / "garden.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"How does plant {number} grow? {'x' * 900}"}) + "\n" for number in range(2500))
    )
    page = open_page()
    page.goto(f"{server.url}/new")
    page.locator("#upload-prompts").set_input_files(file)
    expect(page.locator("[data-upload-status]")).to_contain_text("“garden.jsonl” uploaded")
    expect(page.locator("[name='dataset.source']")).to_have_value("file")
    expect(page.locator("[name='dataset.id']")).to_have_value("garden.jsonl")
    expect(page.locator(".samples li")).to_have_count(3)
    expect(page.locator("#preview")).to_contain_text("2,500 prompts")
    page.get_by_role("button", name="Load demo and start").click()
    page.wait_for_url("**/steer/*")
    expect(page.locator("[data-prompt]")).to_contain_text("How does plant")
    expect(page.locator("[data-position]")).to_contain_text("of 2,500")


@pytest.mark.parametrize("width", [1280, 375])
def test_what_is_left_out_of_a_file_is_told_before_and_after_the_start(
    open_page: Open, server: Server, tmp_path: Path, width: int
) -> None:
    file = tmp_path / f"gaps{width}.csv.gz"
    file.write_bytes(gzip.compress(b"id;question\n1;Why, oh why?\n2;\n3;How?\n"))
    told = "1 of 3 rows was left out: 1 is empty (line 3)."
    page = open_page(viewport={"width": width, "height": 800})
    page.goto(f"{server.url}/new")
    page.locator("#upload-prompts").set_input_files(file)
    expect(page.locator("#preview .notes")).to_have_text(told)
    expect(page.locator(".samples")).to_contain_text("Why, oh why?")
    page.get_by_role("button", name="Load demo and start").click()
    page.wait_for_url("**/steer/*")
    page.get_by_text("Prompts left out").click()
    expect(page.locator("[data-notes-list]")).to_have_text(told)
    expect(page.locator("[data-notes-list]")).to_be_in_viewport()


def test_an_upload_goes_on_after_the_connection_broke(open_page: Open, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "broken.txt"
    file.write_text("".join(f"Question {number}? {'y' * 100}\n" for number in range(30_000)))
    page = open_page()
    page.goto(f"{server.url}/new")
    failures = {"left": 2}

    def sometimes(route: object) -> None:
        if failures["left"]:
            failures["left"] -= 1
            route.abort()  # type: ignore[attr-defined]
        else:
            route.continue_()  # type: ignore[attr-defined]

    page.route("**/api/uploads/*/files/*", sometimes)
    page.locator("#upload-prompts").set_input_files(file)
    expect(page.locator("[data-upload-status]")).to_contain_text("“broken.txt” uploaded")
    assert (server.save_dir / "prompts" / "broken.txt").read_bytes() == file.read_bytes()


def test_what_cannot_be_uploaded_is_told_in_place(open_page: Open, server: Server, tmp_path: Path) -> None:
    file = tmp_path / "program.exe"
    file.write_bytes(b"MZ")
    page = open_page()
    page.goto(f"{server.url}/new")
    page.locator("#upload-prompts").set_input_files(file)
    expect(page.locator("[data-upload-status] .field-error")).to_contain_text(
        "“program.exe” is not a supported prompt file"
    )


def test_a_wrong_split_is_told_with_what_there_is(open_page: Open, server: Server) -> None:
    folder = server.save_dir / "prompts" / "parted"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("Why?\n")
    page = open_page()
    page.goto(f"{server.url}/new")
    page.locator("[name='dataset.source']").select_option("file")
    page.locator("[name='dataset.id']").fill("parted")
    page.get_by_text("Advanced: prompts").click()
    page.locator("[name='dataset.split']").fill("dev")
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview")).to_contain_text("The splits are “test”, “train”.")


def test_sessions_are_searched_and_gone_on_with(open_page: Open, server: Server) -> None:
    with server.client() as client:
        for name in ("Needle in the hay", "Hay one", "Hay two", "Hay three", "Hay four", "Hay five"):
            made = new_session(client)
            client.patch(f"/api/steering/sessions/{made['id']}", json={"name": name})
            if name.startswith("Needle"):
                needle = made["id"]
    page = open_page()
    page.goto(server.url)
    page.get_by_label("Search your sessions").fill("needle")
    expect(page.locator(".session-link")).to_have_count(1)
    page.locator(".session-link").click()
    page.wait_for_url(f"**/steer/{needle}")
    page.goto(server.url)
    expect(page.get_by_role("link", name="Continue “Needle in the hay”")).to_be_visible()
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies()}  # type: ignore[typeddict-item]
    assert cookies["trellis_last"]["httpOnly"]
    page.goto(f"{server.url}/?q=needle")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete Needle in the hay").click()
    expect(page.locator(".toast")).to_have_text("Deleted “Needle in the hay”")
    page.goto(f"{server.url}/?q=nothing+like+it")
    expect(page.locator(".empty")).to_contain_text("No matching sessions")


def test_what_the_server_refused_stays_on_the_page_until_it_is_changed(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    page.locator("[name='dataset.source']").select_option("file")
    page.locator("[name='dataset.id']").fill("not-there.jsonl")
    page.get_by_label("Session name").fill("Kept name")
    page.get_by_role("button", name="Load demo and start").click()
    expect(page.get_by_role("alert")).to_contain_text("not-there.jsonl")
    with page.expect_response("**/api/steering/check"):  # what the page asks by itself sees nothing wrong
        page.get_by_label("Temperature").fill("0.5")
    page.wait_for_timeout(300)
    expect(page.get_by_role("alert")).to_contain_text("not-there.jsonl")
    expect(page.locator("#error-option-dataset-id")).to_contain_text("not-there.jsonl")
    expect(page.locator("[data-problems]")).not_to_be_empty()
    expect(page.get_by_label("Session name")).to_have_value("Kept name")
    page.locator("[name='dataset.id']").fill("another.jsonl")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#error-option-dataset-id")).to_be_empty()


def test_all_that_is_wrong_is_told_at_once_beside_its_field(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    page.get_by_label("Model", exact=True).fill("no such model")
    page.get_by_label("Temperature").fill("99")
    page.locator("[name='dataset.source']").select_option("file")
    page.locator("[name='dataset.id']").fill("nowhere.csv")
    page.get_by_role("button", name=re.compile("and start$")).click()
    alert = page.get_by_role("alert")
    for text in ("no such model", "Temperature", "nowhere.csv"):
        expect(alert).to_contain_text(text)
    for name in ("model", "temperature", "dataset-id"):
        expect(page.locator(f"#error-option-{name}")).not_to_be_empty()
        expect(page.locator(f"#option-{name}")).to_have_attribute("aria-invalid", "true")


def test_what_was_typed_survives_a_refusal_and_then_a_preset(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    page.get_by_label("Temperature").fill("0.33")
    page.get_by_label("Answers per prompt").fill("99")
    page.get_by_role("button", name="Load demo and start").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("button", name="Thinking model").click()
    expect(page.get_by_label("Max new tokens")).to_have_value("1024")
    expect(page.get_by_label("Temperature")).to_have_value("0.33")
    expect(page.get_by_label("Answers per prompt")).to_have_value("99")


def test_preview_and_start_say_at_once_that_they_are_at_work(open_page: Open, server: Server) -> None:
    page = open_page()
    page.goto(f"{server.url}/new")
    held: list[Any] = []
    page.route("**/new/preview", lambda route: held.append(route))
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview .working")).to_contain_text("Reading prompts")
    expect(page.locator("#preview .spinner")).to_be_visible()
    expect(page.locator("#preview .num")).to_have_text("1 s")
    held[0].continue_()
    expect(page.locator(".samples li")).to_have_count(3)
    expect(page.locator(".working")).to_have_count(0)
    page.evaluate("addEventListener('submit', (event) => event.preventDefault())")  # the page as it is until the answer
    page.get_by_role("button", name="Load demo and start").click()
    expect(page.locator("[data-beginning] .working")).to_contain_text("Checking options and prompts")
    expect(page.locator("[data-begin]")).to_have_attribute("aria-busy", "true")
