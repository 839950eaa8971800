"""The pages without a browser: forms that work without JavaScript, errors as pages, output that stays text."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import httpx
import pytest

from tests.server import Server, new_session, wait_ready
from trellis.options import Dataset, SessionConfig
from trellis.web.pages.steering.options_form import config_from_values
from trellis.web.render import format_age

HTML = {"Accept": "text/html,application/xhtml+xml"}
ATTACK = "<img src=x onerror=alert(1)>"


def ids(page: str) -> list[str]:
    found: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name == "id")

    Parser().feed(page)
    return found


def test_the_first_page_leads_on(client: httpx.Client) -> None:
    page = client.get("/").text
    assert "Start with the demo" in page
    assert 'href="/new"' in page
    assert len(ids(page)) == len(set(ids(page)))


def test_the_form_has_a_field_for_every_option(client: httpx.Client) -> None:
    page = client.get("/new").text
    rows = [(name, field) for name, field in SessionConfig.model_fields.items() if name != "dataset"]
    rows += [(f"dataset.{name}", field) for name, field in Dataset.model_fields.items()]
    for name, field in rows:
        assert f'name="{name}"' in page
        assert str(field.title).replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#39;") in page
    assert len(ids(page)) == len(set(ids(page)))


def test_a_session_by_plain_forms(client: httpx.Client) -> None:
    started = client.post(
        "/steer", data={"name": "By form", "group_size": "3", "learning_rate": "", "control_prompt": ""}
    )
    assert started.status_code == 303
    path = started.headers["location"]
    state = wait_ready(client, path.rsplit("/", 1)[1])
    assert (state["name"], len(state["offer"]["options"]), state["control"]) == ("By form", 3, None)
    page = client.get(path, headers=HTML).text
    assert state["offer"]["options"][2]["text"] in page
    assert (
        client.post(f"{path}/choose", data={"offer": state["offer"]["id"], "choice": "1"}).headers["location"] == path
    )
    state = wait_ready(client, state["id"])
    assert state["head"]["step"] == 1
    for verb in ("skip", "undo", "redo", "undo"):
        assert client.post(f"{path}/{verb}", data={}).status_code == 303
        wait_ready(client, state["id"])
    client.post(f"{path}/choose", data={"offer": wait_ready(client, state["id"])["offer"]["id"], "choice": "none"})
    wait_ready(client, state["id"])
    client.post(f"{path}/prompt", data={"text": "What is rain?"})
    assert wait_ready(client, state["id"])["offer"]["prompt"] == "What is rain?"
    offer = wait_ready(client, state["id"])["offer"]["id"]
    client.post(f"{path}/choose", data={"offer": offer, "written": "Mine."})
    assert wait_ready(client, state["id"])["head"]["step"] == 3
    root = client.get(f"/api/steering/sessions/{state['id']}/tree").json()["nodes"][0]["id"]
    client.post(f"{path}/goto", data={"node": root})
    assert wait_ready(client, state["id"])["head"]["step"] == 0
    client.post(f"{path}/rename", data={"name": "Other"})
    assert "Other" in client.get("/").text
    assert client.post(f"{path}/delete").headers["location"] == "/"
    assert client.get(path, headers=HTML).status_code == 404


@pytest.mark.parametrize("name", ["x" * 201, "a\x00b"])
def test_a_name_in_the_form_has_the_limits_that_it_has_elsewhere(client: httpx.Client, name: str) -> None:
    answer = client.post("/steer", data={"name": name}, headers=HTML)
    assert answer.status_code == 422
    assert "name" in answer.text


def test_a_double_press_is_one_action(client: httpx.Client) -> None:
    state = new_session(client)
    form = {"offer": state["offer"]["id"], "choice": "0", "request": "one press only"}
    answers = [client.post(f"/steer/{state['id']}/choose", data=form, headers={"HX-Request": "true"}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [204] * 3
    assert wait_ready(client, state["id"])["head"]["step"] == 1


def test_errors_are_pages_for_people_and_json_for_scripts(client: httpx.Client) -> None:
    page = client.get("/steer/nope", headers=HTML)
    assert page.status_code == 404
    assert "There is no session “nope”." in page.text
    assert "Back to home" in page.text
    assert client.get("/steer/nope", headers=HTML | {"HX-Request": "true"}).json()["error"]["code"] == "not_found"
    assert client.get("/nothing/here", headers=HTML).status_code == 404
    wrong = client.post("/steer", data={"group_size": "99"}, headers=HTML)
    assert wrong.status_code == 422
    assert "Answers per prompt</a>: Must be 8 or less." in wrong.text


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("choose", {"offer": "{o}", "choice": ATTACK}),
        ("choose", {"offer": "{o}", "choice": "9"}),
        ("choose", {"offer": "{o}", "choice": ""}),
        ("choose", {"offer": "{o}", "choice": "0", "extra": "x"}),
        ("choose", {"offer": "{o}", "written": "x" * 100_001}),
        ("choose", {}),
        ("prompt", {"text": ""}),
        ("prompt", {"text": "a\x00b"}),
        ("rename", {"name": " "}),
        ("goto", {"node": "x" * 101}),
        ("skip", {"request": "x"}),
    ],
)
def test_forms_refuse_what_does_not_fit(client: httpx.Client, path: str, form: dict[str, str]) -> None:
    state = new_session(client)
    data = {name: value.replace("{o}", state["offer"]["id"]) for name, value in form.items()}
    answer = client.post(f"/steer/{state['id']}/{path}", data=data, headers=HTML)
    assert answer.status_code == 422, answer.text
    assert ATTACK not in answer.text
    assert wait_ready(client, state["id"])["head"]["step"] == 0


def test_names_and_prompts_stay_text_on_every_page(client: httpx.Client) -> None:
    made = client.post("/api/steering/sessions", json={"name": ATTACK, "config": {"control_prompt": ATTACK}}).json()
    state = wait_ready(client, made["id"])
    client.post(f"/api/steering/sessions/{state['id']}/prompt", json={"text": f"</script>{ATTACK}"})
    state = wait_ready(client, state["id"])
    written = {"offer": state["offer"]["id"], "choice": {"written": ATTACK}}
    client.post(f"/api/steering/sessions/{state['id']}/choose", json=written)
    wait_ready(client, state["id"])
    client.post(f"/api/steering/sessions/{state['id']}/undo")
    for path in ("/", f"/steer/{state['id']}", f"/steer/{state['id']}/side/tree", f"/steer/{state['id']}/side/figures"):
        page = client.get(path, headers=HTML).text
        assert ATTACK not in page, path
        assert "</script><" not in page.replace("</script>\n  <", ""), path


def test_static_files_are_asked_for_with_a_version_and_kept(client: httpx.Client) -> None:
    page = client.get("/").text
    files = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(files) >= 5
    for file in files:
        assert re.match(r"/static/[0-9a-f]{12}/", file)
        assert client.get(file).headers["cache-control"] == "public, max-age=31536000, immutable"


def test_the_page_is_whole_without_the_stream(client: httpx.Client) -> None:
    state = new_session(client)
    page = client.get(f"/steer/{state['id']}").text
    assert state["offer"]["prompt"] in page.replace("&#39;", "'")
    assert "<script>" not in page
    assert not re.search(r'\sstyle="', page)
    assert not re.search(r"\son[a-z]+=", page)
    assert len(ids(page)) == len(set(ids(page)))


def test_models_can_be_loaded_and_unloaded_by_plain_forms(quiet_client: httpx.Client) -> None:
    assert quiet_client.post("/models/load", data={"model": "demo"}).headers["location"] == "/models"
    for _ in range(500):
        if quiet_client.get("/api/models").json()[0]["state"] == "loaded":
            break
    assert "Unload" in quiet_client.get("/models").text
    assert "Load demo" in quiet_client.post("/models/demo/unload", headers={"HX-Request": "true"}).text


def test_words_for_numbers() -> None:
    assert format_age("2020-01-01T00:00:00Z").endswith("days ago")


def test_a_form_that_is_refused_comes_back_as_it_was_sent_with_the_fields_named(client: httpx.Client) -> None:
    sent = {"name": "Kept", "group_size": "99", "temperature": "warm", "system_prompt": "Be kind.", "lora_rank": "8"}
    answer = client.post("/steer", data=sent, headers=HTML)
    assert answer.status_code == 422
    for value in ('value="Kept"', 'value="99"', 'value="warm"', ">Be kind.</textarea>", 'value="8"'):
        assert value in answer.text, value
    assert answer.text.count('aria-invalid="true"') == 2
    assert re.search(r"<details open>\s*<summary>Advanced: adapter", answer.text)
    assert answer.text.count("<details open>") == 1
    assert client.post("/steer", data={"model": "nope"}, headers=HTML).status_code == 404


def test_an_empty_prompt_is_said_to_be_empty(client: httpx.Client) -> None:
    state = new_session(client)
    answer = client.post(f"/steer/{state['id']}/prompt", data={"text": "  "}, headers={"HX-Request": "true"})
    assert answer.json()["error"]["message"] == "text: is empty."


def test_hostile_forms_are_refused_and_not_a_bug(client: httpx.Client) -> None:
    for data in ({"dataset": "x", "dataset.id": "y"}, {"dataset.id.more": "x"}, {"nope": "1"}, {"model": "   "}):
        for path in ("/steer", "/new/preview", "/models/load"):
            answer = client.post(path, data=data, headers=HTML)
            assert answer.status_code in (200, 303, 404, 422), (path, data)


def test_a_folder_that_is_no_export_hides_none(client: httpx.Client, server: Server) -> None:
    state = new_session(client)
    for name, text in (("odd-list", "[]"), ("odd-empty", "{}"), ("odd-text", "nope")):
        folder = server.save_dir / "exports" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trellis.json").write_text(text)
    assert client.get(f"/steer/{state['id']}/review").status_code == 200
    assert not any(each["name"].startswith("odd") for each in client.get("/api/exports").json())


def test_what_a_form_shows_is_checked_as_it_was_sent() -> None:
    values = {
        "remote_code": False,
        "chat_template": True,
        "temperature": 0.5,
        "dataset.id": "a.jsonl",
        "lora_rank": None,
    }
    assert config_from_values(values) == {
        "remote_code": False, "chat_template": True, "temperature": "0.5", "dataset": {"id": "a.jsonl"},
    }  # fmt: skip


def test_an_error_of_no_field_is_told_beside_those_of_fields(client: httpx.Client) -> None:
    answer = client.post(
        "/steer", data={"dataset.source": "file", "dataset.id": "../x", "temperature": "99"}, headers=HTML
    )
    alert = re.search(r'<div class="problem" role="alert">(.*?)</div>', answer.text, re.S)
    assert alert
    assert "Temperature" in alert[1]
    assert "config." not in alert[1]


def test_what_is_left_out_of_a_file_of_prompts_stands_on_every_page(server: Server, client: httpx.Client) -> None:
    folder = server.save_dir / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / "gaps.jsonl").write_text('{"prompt": "Why?"}\n{"prompt": ""}\n{"prompt": "How?"}\n')
    dataset = {"source": "file", "id": "gaps.jsonl"}
    told = "1 of 3 rows was left out: 1 is empty (line 2)."
    found = client.post("/api/steering/preview", json={"dataset": dataset}).json()
    assert (found["notes"], found["total"]) == ([told], 2)
    assert found["left_out"] == [{"reason": "is empty", "count": 1, "first": "line 2"}]
    form = {f"dataset.{name}": value for name, value in dataset.items()}
    assert told in client.post("/new/preview", data=form, headers=HTML).text
    state = new_session(client, dataset=dataset, control_prompt="")
    assert state["dataset"]["notes"] == [told]
    for page in ("", "/review"):
        assert told in client.get(f"/steer/{state['id']}{page}").text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "Why?"}\n{"prompt": "How?",}\n', "line 2, column 19 is not JSON: there is a comma too many"),
        ('{"prompt": "Why?"}\n' * 30_000 + "{nope", "line 30001, column 2 is not JSON"),
    ],
)
def test_a_broken_line_is_named_before_a_session_begins_or_when_it_is_reached(
    server: Server, client: httpx.Client, content: str, message: str
) -> None:
    folder = server.save_dir / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / "broken.jsonl").write_text(content)
    config = {"dataset": {"source": "file", "id": "broken.jsonl"}, "control_prompt": ""}
    answer = client.post("/api/steering/sessions", json={"config": config})
    if answer.status_code == 422:
        error = answer.json()["error"]
    else:
        url = f"/api/steering/sessions/{answer.json()['id']}"
        deadline = time.monotonic() + 60
        while (state := client.get(url).json())["status"] != "failed":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        error = state["error"]
    assert message in error["message"]
    assert error["field"] == "config.dataset.id"
