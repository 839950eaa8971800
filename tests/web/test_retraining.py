"""Whole logs and blind comparisons over HTTP: the JSON API, the pages, and what they refuse."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest

from tests.server import Server, new_session, wait_ready

API = "/api/steering/sessions"
LIKES = "".join(
    json.dumps({"prompt": f"Why {number}?", "chosen": "Because.", "rejected": "No."}) + "\n" for number in range(4)
)


@pytest.fixture
def session(client: httpx.Client) -> dict[str, Any]:
    state = new_session(client)
    client.post(f"{API}/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 1})
    deadline = time.monotonic() + 20
    while wait_ready(client, state["id"])["head"]["step"] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return wait_ready(client, state["id"])


def finished(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 20
    while (found := client.get(f"/api/jobs/{job['id']}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["state"] == "done", found["error"]
    result: dict[str, Any] = found["result"]
    return result


def upload(server: Server, text: str, name: str = "likes.jsonl") -> str:
    folder = server.save_dir / "prompts"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def test_a_branch_is_fitted_afresh_by_program(client: httpx.Client, session: dict[str, Any]) -> None:
    url = f"{API}/{session['id']}"
    answer = client.post(f"{url}/refit", json={"epochs": 2}, headers={"idempotency-key": session["id"]})
    assert answer.status_code == 202
    again = client.post(f"{url}/refit", json={"epochs": 2}, headers={"idempotency-key": session["id"]})
    assert again.json()["id"] == answer.json()["id"]
    result = finished(client, answer.json())
    assert (result["lessons"], result["epochs"]) == (1, 2)
    node = next(node for node in client.get(f"{url}/tree").json()["nodes"] if node["id"] == result["node"])
    assert node["choice"]["kind"] == "refit"
    assert [job["id"] for job in client.get(f"{url}/fits").json()] == [answer.json()["id"]]
    assert client.post(f"{url}/goto", json={"node": result["node"]}).status_code == 202


def test_a_file_of_choices_is_learned_from(server: Server, client: httpx.Client, session: dict[str, Any]) -> None:
    url = f"{API}/{session['id']}"
    name = upload(server, LIKES + '{"prompt": "Why?", "chosen": "A", "rejected": "A"}\n')
    job = client.post(f"{url}/import", json={"file": name}).json()
    assert job["about"]["notes"] == ["1 of 5 rows skipped, the first in line 5: both answers are identical."]
    assert finished(client, job)["lessons"] == 4
    page = client.get(f"/steer/{session['id']}/log").text
    assert "1 of 5 rows skipped" in page
    assert "4/4" in page


def test_choices_that_were_exported_can_be_learned_from(
    server: Server, client: httpx.Client, session: dict[str, Any]
) -> None:
    url = f"{API}/{session['id']}"
    for layout in ("raw", "trl-preference", "trl-unpaired", "openai-dpo"):
        lines = client.get(f"{url}/choices", params={"format": layout}).text
        job = client.post(f"{url}/import", json={"file": upload(server, lines, f"{layout}.jsonl")}).json()
        assert finished(client, job)["lessons"] == 1


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("refit", {"epochs": 0}, 422, "epochs"),
        ("refit", {"epochs": 10**9}, 422, "epochs"),
        ("refit", {"node": "n404"}, 404, "node"),
        ("refit", {"nope": 1}, 422, "nope"),
        ("import", {}, 422, "file"),
        ("import", {"file": "../trellis.db"}, 422, "file"),
        ("import", {"file": "/etc/passwd"}, 422, "file"),
        ("import", {"file": "a\x00b"}, 422, "file"),
        ("import", {"file": "broken.jsonl"}, 422, "file"),
        ("replay", {"model": "nope"}, 404, "config.model"),
        ("replay", {"model": "x" * 1000}, 422, "model"),
        ("blind", {"left": "n404", "right": "n404"}, 404, "node"),
        ("blind", {"left": 1, "right": 2}, 422, "left"),
        ("blind", {"left": "a", "right": "b", "rounds": 0}, 422, "rounds"),
        ("blind", {"left": "a", "right": "b", "prompts": ["  "]}, 422, "prompts.0"),
    ],
)
def test_bad_input_is_refused_with_its_field(
    server: Server, client: httpx.Client, session: dict[str, Any], path: str, body: Any, status: int, field: str
) -> None:
    upload(server, "{nope\n", "broken.jsonl")
    answer = client.post(f"{API}/{session['id']}/{path}", json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["field"] == field
    assert error["message"]
    assert error["next_step"]


def test_a_blind_comparison_by_program(client: httpx.Client, session: dict[str, Any]) -> None:
    url = f"{API}/{session['id']}"
    tree = client.get(f"{url}/tree").json()
    body = {"left": tree["nodes"][0]["id"], "right": tree["head"], "rounds": 2, "prompts": ["Why?"]}
    answer = client.post(f"{url}/blind", json=body)
    assert answer.status_code == 201
    trial = f"{url}/blind/{answer.json()['id']}"
    for number in range(2):
        deadline = time.monotonic() + 20
        while not (found := client.get(trial).json())["round"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert found["result"] is None
        found = client.post(f"{trial}/verdict", json={"round": number, "verdict": "first"}).json()
    assert found["state"] == "done"
    assert found["result"]["left"] + found["result"]["right"] == 2
    assert client.post(f"{trial}/verdict", json={"round": 0, "verdict": "first"}).status_code == 200
    assert client.post(f"{trial}/undo").status_code == 409
    late = client.post(f"{trial}/verdict", json={"round": 0, "verdict": "second"})
    assert late.status_code == 409
    assert late.json()["error"]["code"] == "stale_round"
    assert [each["id"] for each in client.get(f"{url}/blind").json()] == [found["id"]]
    assert client.post(f"{trial}/end").json()["state"] == "done"
    assert "## Blind tests" in client.get(f"{url}/journal").text
    assert client.get(f"{url}/blind/b404").status_code == 404


def test_the_pages_work_without_a_script(server: Server, client: httpx.Client, session: dict[str, Any]) -> None:
    place = f"/steer/{session['id']}"
    page = client.get(f"{place}/blind").text
    nodes = re.findall(r'<option value="(n[0-9a-f]+)"', page)
    form = {"left": nodes[-1], "right": nodes[0], "rounds": "1", "prompts": "Why?", "request": "r" * 12 + session["id"]}
    answer = client.post(f"{place}/blind", data=form, follow_redirects=False)
    assert answer.status_code == 303
    trial = answer.headers["location"]
    deadline = time.monotonic() + 20
    while "is better" not in (text := client.get(trial).text):
        assert 'http-equiv="refresh"' in text
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = client.post(f"{trial}/verdict", data={"round": "0", "verdict": "second"}, follow_redirects=True).text
    assert "won 1 of 1 decided rounds" in done
    assert "No clear winner" in done
    assert client.post(f"{place}/blind", data=form | {"rounds": "many", "request": "q" * 12}).status_code == 422
    assert client.post(f"{place}/blind", data=form | {"left": nodes[0], "request": "p" * 12}).status_code == 422
    answer = client.post(f"{place}/refit", data={"epochs": "nine"})
    assert answer.status_code == 422
    assert "must be 1 to 50" in answer.text
    assert client.post(f"{place}/import", data={"file": "absent.jsonl"}).status_code == 422
    assert client.post(f"{place}/replay", data={"model": "absent"}).status_code == 404
    answer = client.post(f"{place}/refit", data={"epochs": "1"}, follow_redirects=True)
    assert "Retrain from scratch: " in answer.text
    upload(server, LIKES)
    assert (
        "Preference data: likes.jsonl"
        in client.post(f"{place}/import", data={"file": "likes.jsonl"}, follow_redirects=True).text
    )
