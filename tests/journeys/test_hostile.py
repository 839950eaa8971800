"""A model made to say `<img src=x onerror=alert(1)>`: the real engine says it, and every page shows it as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.journeys.conftest import Open
from tests.server import Server, new_session, wait_ready
from tests.tiny import make_memorizing_llama

pytestmark = [pytest.mark.browser, pytest.mark.engine, pytest.mark.slow]
ATTACK = "<img src=x onerror=alert(1)>"


def test_what_a_model_says_is_text_everywhere(open_page: Open, save_dir: Path) -> None:
    make_memorizing_llama(save_dir / "models" / "parrot", ATTACK)
    server = Server(save_dir, fake=False)
    try:
        with server.client() as client:
            state = new_session(client, model="parrot", control_prompt="Say it.", max_new_tokens=40, temperature=0)
            assert [option["text"] for option in state["offer"]["options"]] == [ATTACK] * 4
            client.post(
                f"/api/steering/sessions/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 0}
            )
            wait_ready(client, state["id"])
        page = open_page()
        page.on("dialog", lambda dialog: pytest.fail("a script of the model ran"))
        page.goto(f"{server.url}/steer/{state['id']}")
        page.locator("[data-status=ready]").wait_for()
        page.keyboard.press("s")
        expect(page.locator("[data-position]")).to_contain_text("3 of")
        expect(page.locator("[data-text]")).to_have_text([ATTACK] * 4)
        expect(page.locator("#tree")).to_contain_text(ATTACK)
        expect(page.locator(".control blockquote").first).to_have_text(ATTACK)
        assert page.locator("img").count() == 0
        page.goto(server.url)
        assert page.locator("img").count() == 0
    finally:
        server.stop()
