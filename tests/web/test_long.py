"""A context of 8,192 tokens with the real engine: offered, learned from, and there again after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server import Server, new_session, wait_failed, wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]
API = "/api/steering/sessions"


def test_a_prompt_of_eight_thousand_tokens_is_steered_on_and_resumed(tmp_path: Path) -> None:
    from tests.tiny import make_llama

    make_llama(tmp_path / "models" / "long", positions=8192)
    server = Server(tmp_path, fake=False)
    try:
        with server.client() as client:
            state = new_session(
                client, model="long", context_length=8192, max_new_tokens=16, control_prompt="", inner_steps=1
            )
            url = f"{API}/{state['id']}"
            too_long = "sea " * 8300
            client.post(f"{url}/prompt", json={"text": too_long})
            state = wait_failed(client, state["id"])
            assert state["error"]["code"] == "prompt_too_long"
            assert "context of 8192" in state["error"]["message"]
            text = "sea " * 7980
            client.post(f"{url}/prompt", json={"text": text})
            state = wait_ready(client, state["id"], 120)
            assert state["offer"]["prompt"] == text.strip() or state["offer"]["prompt"] == text
            client.post(f"{url}/choose", json={"offer": state["offer"]["id"], "choice": 1})
            state = wait_ready(client, state["id"], 120)
            assert state["head"]["step"] == 1
            assert state["figures"]["share_after"] > state["figures"]["share_before"]
        server.kill()
        server.start()
        with server.client() as client:
            again = wait_ready(client, state["id"], 120)
            assert again["offer"] == state["offer"]
            client.post(f"{url}/undo")
            assert wait_ready(client, state["id"], 120)["offer"]["prompt"] == text
    finally:
        server.stop()
