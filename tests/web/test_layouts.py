"""Models with experts or recurrent layers, with the real engine through the real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server import Server, wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]
API = "/api/steering/sessions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.tiny import make_model

    save = tmp_path_factory.mktemp("save")
    for kind in ("mixtral", "mamba"):
        make_model(save / "models" / kind, kind)
    server = Server(save, fake=False, TRELLIS_RATE_LIMIT="0")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def steered(client: httpx.Client, model: str, **config: Any) -> dict[str, Any]:
    asked = {"model": model, "control_prompt": "", "max_new_tokens": 8, "context_length": 256, **config}
    made = client.post(API, json={"config": asked})
    assert made.status_code == 201, made.text
    state = wait_ready(client, made.json()["id"], seconds=120)
    client.post(f"{API}/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 1})
    return wait_ready(client, state["id"], seconds=60)


def test_experts_are_steered_and_chatted_with(client: httpx.Client) -> None:
    state = steered(client, "mixtral")
    assert state["head"]["step"] == 1
    assert state["layers_left_out"] == []
    said = {"model": "mixtral", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    answer = client.post("/v1/chat/completions", json=said, timeout=60)
    assert answer.status_code == 200, answer.text


def test_what_gets_no_adapter_is_shown_in_the_session(client: httpx.Client) -> None:
    state = steered(client, "mamba")
    expected = "out_proj (PEFT does not adapt it in models with Mamba layers)"
    assert expected in state["layers_left_out"]
    page = client.get(f"/steer/{state['id']}").text
    assert "Layers without an adapter: " in page
    assert expected in page


def test_a_session_that_asks_for_what_is_not_there_leaves_the_engine_as_it_was(client: httpx.Client) -> None:
    for name, said in (("w9", "has no linear layer “w9”"), ("base_layer", "has no linear layer “base_layer”")):
        answer = client.post(API, json={"config": {"model": "mixtral", "target_modules": name}})
        wrong = answer.json() if answer.status_code >= 400 else _failed(client, answer.json()["id"])
        assert said in wrong["error"]["message"]
        assert "base_layer," not in wrong["error"]["message"]
    assert steered(client, "mixtral", lora_rank=8)["head"]["step"] == 1


def _failed(client: httpx.Client, session: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while True:
        state: dict[str, Any] = client.get(f"{API}/{session}").json()
        if state["error"]:
            return state
        assert time.monotonic() < deadline
        time.sleep(0.05)
