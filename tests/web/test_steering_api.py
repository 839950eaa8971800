"""The JSON API of steering, over the real server."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import httpx
import pytest

from tests.server import Server, new_session, read_events, wait_ready

API = "/api/steering/sessions"


def choose(client: httpx.Client, state: dict[str, Any], choice: Any, **headers: str) -> httpx.Response:
    body = {"offer": state["offer"]["id"], "choice": choice}
    return client.post(f"{API}/{state['id']}/choose", json=body, headers=headers)


def test_schema_and_defaults_tell_of_every_option(client: httpx.Client) -> None:
    schema, defaults = client.get("/api/steering/schema").json(), client.get("/api/steering/defaults").json()
    assert set(schema["properties"]) == set(defaults)
    assert {"model", "group_size", "temperature", "max_new_tokens", "learning_rate", "kl_beta", "lora_rank",
            "system_prompt", "seed"} <= set(defaults)  # fmt: skip
    assert defaults["model"] == "demo"
    assert all(option["description"] for option in schema["properties"].values())


def test_a_whole_session_by_program(client: httpx.Client) -> None:
    state = new_session(client, seed=4)
    url = f"{API}/{state['id']}"
    assert state["head"]["step"] == 0
    for number, choice in enumerate([1, [0, 2], {"ranking": [2, 1]}, "none", {"written": "Mine."}], start=1):
        answer = choose(client, state, choice)
        assert answer.status_code == 202
        assert answer.json()["request"]
        state = wait_ready(client, state["id"])
        assert state["head"]["step"] == number
    tree = client.get(f"{url}/tree").json()
    assert len(tree["nodes"]) == 6
    assert tree["head"] == state["head"]["node"]
    assert client.post(f"{url}/undo").status_code == 202
    assert wait_ready(client, state["id"])["head"]["step"] == 4
    assert client.post(f"{url}/redo").status_code == 202
    assert client.post(f"{url}/goto", json={"node": tree["nodes"][0]["id"]}).status_code == 202
    assert wait_ready(client, state["id"])["head"]["step"] == 0
    assert client.post(f"{url}/prompt", json={"text": "What is rain?"}).status_code == 202
    assert wait_ready(client, state["id"])["offer"]["prompt"] == "What is rain?"
    assert client.post(f"{url}/skip").status_code == 202
    wait_ready(client, state["id"])
    answers = client.post(f"{url}/sample", json={"prompt": "What is rain?", "n": 2, "sampling": {"temperature": 0}})
    assert len(answers.json()["answers"]) == 2
    assert client.patch(url, json={"name": "Renamed"}).json()["name"] == "Renamed"
    journal = client.get(f"{url}/journal")
    assert journal.headers["content-type"].startswith("text/markdown")
    assert "# Renamed" in journal.text
    raw = client.get(f"{url}/choices", params={"format": "raw"})
    assert len([json.loads(line) for line in raw.text.splitlines()]) == 6
    assert any(row["id"] == state["id"] for row in client.get(API).json())
    assert client.delete(url).status_code == 204
    assert client.get(url).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("", {"config": {"group_size": 1}}, 422, "config.group_size"),
        ("", {"config": {"nope": 1}}, 422, "config.nope"),
        ("", {"config": {"temperature": "warm"}}, 422, "config.temperature"),
        ("", {"config": {"temperature": 1e999}}, 422, "config.temperature"),
        ("", {"config": {"model": "nope"}}, 404, "config.model"),
        ("", {"config": {"dataset": {"source": "nope"}}}, 422, "config.dataset.source"),
        ("", {"config": {"system_prompt": "a\x00b"}}, 422, "config.system_prompt"),
        ("", {"config": []}, 422, "config"),
        ("", {"name": ""}, 422, "name"),
        ("", {"name": "   "}, 422, "name"),
        ("", {"name": "x" * 300}, 422, "name"),
        ("", [], 422, ""),
        ("", None, 422, ""),
        ("/{s}/choose", {}, 422, "offer"),
        ("/{s}/choose", {"offer": "{o}", "choice": 4}, 422, "choice"),
        ("/{s}/choose", {"offer": "{o}", "choice": -1}, 422, "choice"),
        ("/{s}/choose", {"offer": "{o}", "choice": 10**30}, 422, "choice"),
        ("/{s}/choose", {"offer": "{o}", "choice": True}, 422, None),
        ("/{s}/choose", {"offer": "{o}", "choice": "maybe"}, 422, None),
        ("/{s}/choose", {"offer": "{o}", "choice": []}, 422, None),
        ("/{s}/choose", {"offer": "{o}", "choice": {"written": ""}}, 422, None),
        ("/{s}/choose", {"offer": "{o}", "choice": {"written": " "}}, 422, "choice.written"),
        ("/{s}/choose", {"offer": "o" * 1000, "choice": 0}, 422, "offer"),
        ("/{s}/choose", {"offer": "other", "choice": 0}, 409, None),
        ("/{s}/prompt", {"text": ""}, 422, "text"),
        ("/{s}/prompt", {"text": " \n"}, 422, "text"),
        ("/{s}/prompt", {"text": "x" * 1_000_000}, 422, "text"),
        ("/{s}/prompt", {"text": "x\x00"}, 422, "text"),
        ("/{s}/prompt", {"text": 5}, 422, "text"),
        ("/{s}/goto", {"node": "nope"}, 404, "node"),
        ("/{s}/sample", {"prompt": "x", "n": 1000}, 422, "n"),
        ("/{s}/sample", {"prompt": "x", "sampling": {"temperature": 99}}, 422, "config.temperature"),
        ("/{s}/sample", {"prompt": "x", "node": "nope"}, 404, "node"),
        ("/{s}/undo", None, 409, None),
        ("/{s}/redo", None, 409, None),
        ("/nope/undo", None, 404, None),
    ],
)
def test_bad_input_gets_a_clear_error_in_the_one_shape(
    client: httpx.Client, bad_input_session: dict[str, Any], path: str, body: Any, status: int, field: str | None
) -> None:
    state = bad_input_session
    text = json.dumps(body).replace("{o}", state["offer"]["id"])
    answer = client.post(
        API + path.replace("{s}", state["id"]), content=text, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"code", "message", "next_step", "field"}
    assert error["message"]
    assert error["next_step"]
    if field is not None:
        assert error["field"] == field
    if status == 422:
        assert error["fields"]
    if status == 409:
        assert answer.json()["state"]["id"] == state["id"]
    assert client.get(f"{API}/{state['id']}").json()["offer"] == state["offer"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("", '{"name": "\\ud800"}'),
        ("", '{"config": {"\\ud800": 1}}'),
        ("", '{"config": {"system_prompt": "\\ud800"}}'),
        ("", '{"config": {"model": "\\ud800"}}'),
        ("", '{"\\ud800": 1}'),
        ("/{s}/prompt", '{"text": "\\ud800"}'),
        ("/{s}/choose", '{"offer": "\\ud800", "choice": 0}'),
        ("/{s}/choose", '{"offer": "{o}", "choice": {"written": "\\ud800"}}'),
        ("/{s}/choose", '{"offer": "{o}", "choice": {"written": "a\\u0000b"}}'),
        ("/{s}/goto", '{"node": "\\ud800"}'),
        ("/{s}/sample", '{"prompt": "x", "sampling": {"\\ud800": 1}}'),
        ("/../../models/load", '{"model": "\\ud800"}'),
    ],
)
def test_text_that_cannot_be_encoded_is_refused_and_quoted_safely(
    client: httpx.Client, bad_input_session: dict[str, Any], path: str, body: str
) -> None:
    state = bad_input_session
    answer = client.post(
        API + path.replace("{s}", state["id"]), content=body.replace("{o}", state["offer"]["id"]),
        headers={"content-type": "application/json"},
    )  # fmt: skip
    assert answer.status_code in (404, 409, 422), answer.text
    assert answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def bad_input_session(server: Server) -> dict[str, Any]:
    with server.client() as client:
        return new_session(client)


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b"[1,", b"nul", b'{"a":' * 5000])
def test_broken_json_is_said_to_be_broken(client: httpx.Client, body: bytes) -> None:
    answer = client.post(API, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["next_step"]


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    answer = client.post(API, content=b"x" * 3_000_000, headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"


def test_the_same_key_is_one_action(client: httpx.Client) -> None:
    first = client.post(API, json={}, headers={"Idempotency-Key": "make one"}).json()
    again = client.post(API, json={}, headers={"Idempotency-Key": "make one"}).json()
    assert first["id"] == again["id"]
    state = wait_ready(client, first["id"])
    keys = {choose(client, state, 0, **{"Idempotency-Key": "choose one"}).json()["request"] for _ in range(3)}
    assert keys == {"choose one"}
    state = wait_ready(client, first["id"])
    assert state["head"]["step"] == 1


def test_a_second_choice_while_learning_is_refused_with_the_state(client: httpx.Client) -> None:
    state = new_session(client)
    assert choose(client, state, 0).status_code == 202
    answers = [choose(client, state, 1) for _ in range(3)]
    refused = [answer for answer in answers if answer.status_code == 409]
    assert refused
    assert refused[0].json()["error"]["code"] in ("busy", "stale_offer")
    assert refused[0].json()["state"]["id"] == state["id"]
    assert wait_ready(client, state["id"])["head"]["step"] == 1


# ── The stream ─────────────────────────────────────────────────────────────────────────────────────


class Screen:
    """What a client shows that does nothing but follow the events."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.last = ""
        self.names: list[str] = []

    def take(self, event: tuple[str, str, Any]) -> None:
        self.last, name, data = event[0] or self.last, event[1], event[2]
        self.names.append(name)
        if name == "state":
            self.state = data
        elif name == "offer_started":
            self.state["offer"] = {"id": data["offer"], "prompt": data["prompt"], "options": data["options"]}
        elif name == "option_delta":
            assert data["offer"] == self.state["offer"]["id"]
            self.state["offer"]["options"][data["index"]]["text"] += data["text"]
        elif name == "offer_ready":
            shown = [option["text"] for option in self.state["offer"]["options"]]
            whole = [option["text"] for option in data["options"]]
            assert all(text in ("", full) for text, full in zip(shown, whole, strict=True))
            self.state["offer"]["options"] = data["options"]
            self.state["offer"]["ready"] = True
        elif name == "head_moved":
            self.state["head"] |= data

    @property
    def whole(self) -> bool:
        return bool((self.state.get("offer") or {}).get("ready"))

    def texts(self) -> list[str]:
        return [option["text"] for option in self.state["offer"]["options"]]


def follow(client: httpx.Client, session: str, screen: Screen, events: int) -> None:
    """Read some events, then let the connection drop."""
    params = {"after": screen.last} if screen.last else {}
    with client.stream("GET", f"{API}/{session}/events", params=params) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        for event in read_events(response):
            screen.take(event)
            events -= 1
            if events == 0 or screen.whole:
                return


@pytest.mark.parametrize("seed", range(5))
def test_texts_after_any_pattern_of_drops_are_the_texts_without(client: httpx.Client, seed: int) -> None:
    drops = random.Random(seed)
    session = client.post(API, json={"config": {"seed": seed}}).json()["id"]
    screen = Screen()
    while not screen.whole:
        follow(client, session, screen, drops.randint(1, 12))
    assert screen.texts() == [option["text"] for option in wait_ready(client, session)["offer"]["options"]]
    assert screen.names.count("state") >= 1


def test_two_tabs_see_the_same(server: Server, client: httpx.Client) -> None:
    state = new_session(client, control_prompt="")
    screens = [Screen(), Screen()]
    opened = threading.Barrier(3)

    def watch(screen: Screen) -> None:
        with server.client() as own, own.stream("GET", f"{API}/{state['id']}/events") as response:
            for event in read_events(response):
                screen.take(event)
                if len(screen.names) == 1:
                    opened.wait(10)
                if screen.state["offer"].get("ready"):
                    return

    tabs = [threading.Thread(target=watch, args=(screen,)) for screen in screens]
    for tab in tabs:
        tab.start()
    opened.wait(10)
    choose(client, state, 2)
    for tab in tabs:
        tab.join(20)
    assert screens[0].names == screens[1].names
    assert screens[0].texts() == screens[1].texts()
    assert screens[0].names[:4] == ["state", "learning", "node_added", "head_moved"]
    assert "option_delta" in screens[0].names


def test_the_browsers_own_way_to_resume_wins_over_the_address(client: httpx.Client) -> None:
    session = new_session(client, control_prompt="")["id"]
    with client.stream("GET", f"{API}/{session}/events") as response:
        first = next(read_events(response))
    client.post(f"{API}/{session}/skip")
    wait_ready(client, session)
    with client.stream(
        "GET", f"{API}/{session}/events", params={"after": "old-1"}, headers={"Last-Event-ID": first[0]}
    ) as response:
        assert next(read_events(response))[1] == "node_added"


def test_the_server_answers_at_once_while_a_model_works(client: httpx.Client) -> None:
    state = new_session(client)
    choose(client, state, 0)
    slowest = 0.0
    for _ in range(50):
        started = time.perf_counter()
        assert client.get("/healthz").status_code == 200
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 2, "a request hung while the engine worked"


def test_models_and_jobs(quiet_client: httpx.Client) -> None:
    job = quiet_client.post("/api/models/load", json={"model": "demo"}).json()
    assert set(job) >= {"id", "kind", "state", "progress", "result", "error"}
    with quiet_client.stream("GET", f"/api/jobs/{job['id']}/events") as response:
        events = list(read_events(response))
    assert events[-1][1] == "done"
    assert events[-1][2]["result"]["architecture"] == "Fake"
    assert quiet_client.get(f"/api/jobs/{job['id']}").json()["state"] == "done"
    assert any(row["id"] == job["id"] for row in quiet_client.get("/api/jobs").json())
    assert quiet_client.post(f"/api/jobs/{job['id']}/cancel").status_code == 409
    assert quiet_client.post("/api/models/demo/unload").status_code == 202
    assert quiet_client.post("/api/models/demo/unload").status_code == 409
    assert quiet_client.get("/api/jobs/nope").json()["error"]["code"] == "not_found"
    assert quiet_client.get("/api/jobs/nope/events").status_code == 404
    assert quiet_client.post("/api/models/load", json={"model": "../../etc"}).status_code == 404


def test_health(client: httpx.Client) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").json()["status"] == "ok"
    assert client.get("/openapi.json").json()["info"]["title"] == "Trellis"
