"""Several people on one real engine: the page says that others are at work, and then goes on by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.journeys.conftest import Open
from tests.server import Server, wait_ready

pytestmark = [pytest.mark.browser, pytest.mark.engine]


def test_who_chooses_while_others_are_learned_for_sees_how_many_come_first(open_page: Open, save_dir: Path) -> None:
    server = Server(save_dir, fake=False)
    try:
        with server.client() as client:

            def begin(seed: int) -> str:
                config = {"seed": seed, "control_prompt": ""}
                made = client.post("/api/steering/sessions", json={"config": config}).json()["id"]
                wait_ready(client, made, 60)
                return str(made)

            mine, *others = (begin(seed) for seed in range(8))
            page = open_page(viewport={"width": 375, "height": 800})
            page.goto(f"{server.url}/steer/{mine}")
            expect(page.locator("[data-status=ready]")).to_be_visible()
            before = page.locator("[name=offer]").first.input_value()
            for other in others:
                offer = client.get(f"/api/steering/sessions/{other}").json()["offer"]["id"]
                body = {"offer": offer, "choice": 1}
                client.post(f"/api/steering/sessions/{other}/choose", json=body).raise_for_status()
            page.keyboard.press("b")
            strip = page.locator("[data-strip-text]")
            expect(strip).to_contain_text("Learning from your choice. Queued: ")
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            expect(page.locator("[name=offer]").first).not_to_have_value(before, timeout=60_000)
            expect(page.locator("[data-status=ready]")).to_be_visible(timeout=60_000)
            expect(strip).not_to_contain_text("Queued")
            for other in others:
                assert wait_ready(client, other, 60)["head"]["step"] == 1
    finally:
        assert server.stop() == 0
