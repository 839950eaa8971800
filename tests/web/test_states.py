"""Every page with an entry of every state in every list: none of them may be an error, or hide what can be done."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import open_studio
from tests.states import StatefulEngine, States, make_models, make_spawner, make_states
from trellis.settings import Settings
from trellis.studio.studio import Studio
from trellis.web.app import create_app

pytestmark = pytest.mark.anyio
HTML = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture
async def studio(tmp_path: Path, tiny_llama: Path) -> AsyncIterator[Studio]:
    make_models(tmp_path, tiny_llama)
    StatefulEngine.may_continue.clear()
    async with open_studio(tmp_path, make_spawner(tmp_path)) as studio:
        yield studio
        StatefulEngine.may_continue.set()


@pytest.fixture
async def states(studio: Studio) -> States:
    return await make_states(studio)


@pytest.fixture
async def client(studio: Studio, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_app(studio, Settings(save_dir=tmp_path)))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=HTML) as client:
        yield client


async def test_every_page_can_be_shown_with_an_entry_of_every_state(
    client: httpx.AsyncClient, studio: Studio, states: States
) -> None:
    for name, path in states.pages.items():
        answer = await client.get(path)
        assert answer.status_code == (404 if name == "error" else 200), (name, path, answer.text[:2000])
    jobs = {(job["kind"], job["state"]) for job in await studio.jobs.list()}
    for kind in ("export", "refit", "import", "replay", "compare"):
        assert {(kind, state) for state in ("running", "failed", "cancelled")} <= jobs
    assert {("load", "done"), ("load", "failed"), ("load", "running")} <= jobs
    assert {model["state"] for model in await studio.models.list_models()} == {"loaded", "loading", "unloaded"}


async def test_a_load_that_failed_can_be_tried_again_changed_and_removed(
    client: httpx.AsyncClient, states: States
) -> None:
    page = (await client.get("/models")).text
    card = page[page.index('data-failed="org/never-there"') :]
    card = card[: card.index("</article>")]
    assert "is not a whole file" in card
    assert ">Retry</button>" in card
    assert '<input type="hidden" name="revision" value="v1.0">' in card
    assert '<input type="hidden" name="precision" value="8-bit">' in card
    link = re.search(r'href="(/models\?model=[^"]+)">Change model', card)
    assert link
    form = (await client.get(link[1].replace("&amp;", "&"))).text
    assert 'name="model" value="org/never-there"' in form
    assert 'name="revision" value="v1.0"' in form
    assert ">Remove</button>" in card
    assert (await client.post("/models/org/never-there/forget")).status_code == 303
    assert 'data-failed="org/never-there"' not in (await client.get("/models")).text
    assert (await client.post("/models/org/never-there/forget")).status_code == 404
    assert (await client.post("/models/slow/forget")).status_code == 409
    assert 'data-model="broken"' in (await client.get("/models")).text
    assert (await client.post("/models/broken/forget")).status_code == 303
    page = (await client.get("/models")).text
    assert 'data-model="broken"' in page
    assert "Dismiss" not in page


async def test_a_session_whose_model_cannot_be_loaded_shows_ways_out_instead_of_empty_options(
    client: httpx.AsyncClient, states: States
) -> None:
    page = (await client.get(f"/steer/{states.failed_session}")).text
    assert re.search(r"<div class=\"stuck\" data-stuck>", page)
    assert "Change model" in page
    assert "Delete session" in page
    assert re.search(r'<form id="choose" hidden', page)
    page = (await client.get(f"/steer/{states.session}")).text
    assert re.search(r"<div class=\"stuck\" data-stuck hidden>", page)
