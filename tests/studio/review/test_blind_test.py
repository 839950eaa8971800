"""Blind comparison over the fake engine: who is who is not told before the end, and nothing is lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio, ready, until
from tests.studio.steering.test_sessions import choose
from trellis.errors import Conflict, Invalid, NotFound
from trellis.store import blind_test as rows
from trellis.studio.review.journal import journal_markdown
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session(studio: Studio) -> Session:
    session = await studio.steering.create("Test", {"seed": 5})
    await choose(session, 1)
    return session


async def start(studio: Studio, session: Session, **options: Any) -> dict[str, Any]:
    return await studio.blind_tests.start(session.id, session.tree.root.id, session.tree.head_id, **options)


def as_said(row: dict[str, Any]) -> Any:
    """The verdict of a round as the person gave it."""
    return "tie" if row["verdict"] == "tie" else "first" if row["verdict"] == row["first"] else "second"


async def current(studio: Studio, trial: dict[str, Any]) -> dict[str, Any]:
    """The comparison with a round to judge, or at its end."""
    while True:
        found = await studio.blind_tests.state(trial["session"], trial["id"])
        if found["round"] or found["state"] == "done" or found["error"]:
            return found
        await asyncio.sleep(0.01)


async def test_a_person_who_knows_one_of_them_by_its_words_is_found_out(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=12, prompts=["Why?", "How?"])
    prompts, orders = [], []
    while (found := await current(studio, trial))["state"] == "open":
        assert found["result"] is None
        assert set(found["round"]) == {"number", "prompt", "answers"}
        row = (await studio.store.read(rows.get_rounds, trial["id"]))[found["round"]["number"]]
        liked = found["round"]["answers"].index(row["right"])
        orders.append(row["first"])
        prompts.append(found["round"]["prompt"])
        said = "second" if liked else "first"
        found = await studio.blind_tests.judge(session.id, trial["id"], found["round"]["number"], said)
    result = found["result"]
    assert (result["left"], result["right"], result["rate"], result["enough"]) == (0, 12, 1.0, True)
    assert prompts == ["Why?", "How?"] * 6
    assert set(orders) == {"left", "right"}
    assert len({each["left"] for each in result["rounds"]}) > 6
    text = await journal_markdown(studio.store, session)
    assert "## Blind tests" in text
    assert "Base model vs. Step 1: Step 1 won 12 of 12 decided rounds" in text


async def test_the_prompts_are_those_that_come_next_where_none_are_named(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=2)
    found = await current(studio, trial)
    assert session.prompts
    assert found["round"]["prompt"] == session.prompts.at(session.tree.head.position + 1)


async def test_a_round_is_judged_once(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=3)
    await current(studio, trial)
    saying = [studio.blind_tests.judge(session.id, trial["id"], 0, said) for said in ("tie", "first", "second", "tie")]  # type: ignore[arg-type]
    found = await asyncio.gather(*saying, return_exceptions=True)
    assert sum(isinstance(each, Conflict) for each in found) >= 2
    rounds = await studio.store.read(rows.get_rounds, trial["id"])
    assert [each["number"] for each in rounds if each["verdict"]] == [0]
    assert (await studio.blind_tests.judge(session.id, trial["id"], 0, as_said(rounds[0])))["judged"] == 1
    with pytest.raises(Conflict, match="Round 7 is not the current round"):
        await studio.blind_tests.judge(session.id, trial["id"], 7, "first")


async def test_a_verdict_can_be_taken_back_until_the_end(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=2)
    with pytest.raises(Conflict, match="no vote to undo"):
        await studio.blind_tests.undo_verdict(session.id, trial["id"])
    first = (await current(studio, trial))["round"]
    assert (await studio.blind_tests.judge(session.id, trial["id"], 0, "first"))["can_undo"]
    back = await studio.blind_tests.undo_verdict(session.id, trial["id"])
    assert (back["judged"], back["round"], back["can_undo"]) == (0, first, False)
    for number in range(2):
        await current(studio, trial)
        await studio.blind_tests.judge(session.id, trial["id"], number, "second")
    with pytest.raises(Conflict, match="no vote to undo"):
        await studio.blind_tests.undo_verdict(session.id, trial["id"])


async def test_the_prompts_are_new_to_every_branch_of_the_session(studio: Studio, session: Session) -> None:
    head = session.tree.head_id
    await choose(session, 0)
    furthest = session.tree.head.position
    await session.commands.go_to(head, "back")
    trial = await start(studio, session, planned=1)
    found = await current(studio, trial)
    assert session.prompts
    assert found["round"]["prompt"] == session.prompts.at(furthest + 1)


async def test_it_can_be_ended_early_and_then_nothing_more_is_drawn(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=50)
    await current(studio, trial)
    await studio.blind_tests.judge(session.id, trial["id"], 0, "tie")
    found = await studio.blind_tests.end(session.id, trial["id"])
    assert (found["state"], found["judged"], found["result"]["ties"]) == ("done", 1, 1)
    with pytest.raises(Conflict):
        await studio.blind_tests.judge(session.id, trial["id"], 1, "first")
    drawn = len(await studio.store.read(rows.get_rounds, trial["id"]))
    await asyncio.sleep(0.2)
    assert len(await studio.store.read(rows.get_rounds, trial["id"])) == drawn < 10


async def test_a_round_that_is_still_drawn_at_the_end_does_not_change_the_result(
    studio: Studio, session: Session
) -> None:
    trial = await start(studio, session, planned=3)
    found = await studio.blind_tests.end(session.id, trial["id"])
    late = {
        "trial": trial["id"], "number": 2, "prompt": "Why?", "first": "left", "left": "A", "right": "A",
        "verdict": "same", "created": 0.0,
    }  # fmt: skip
    await studio.store.write(rows.add_round, late)
    await studio.store.write(rows.add_round, late | {"trial": "b404"})
    assert await studio.blind_tests.state(session.id, trial["id"]) == found


async def test_answers_that_are_the_same_are_ties_that_nobody_is_asked_about(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def same(*arguments: Any) -> list[str]:
        return ["Just so."]

    monkeypatch.setattr(session.nodes, "sample", same)
    trial = await start(studio, session, planned=4)
    found = await current(studio, trial)
    assert (found["state"], found["judged"], found["result"]["ties"]) == ("done", 4, 4)


async def test_what_makes_no_sense_is_refused(studio: Studio, session: Session) -> None:
    root, head = session.tree.root.id, session.tree.head_id
    with pytest.raises(Invalid, match="same weights"):
        await studio.blind_tests.start(session.id, head, head)
    with pytest.raises(Invalid, match="rounds"):
        await studio.blind_tests.start(session.id, root, head, planned=0)
    with pytest.raises(NotFound):
        await studio.blind_tests.start(session.id, root, "n404")
    with pytest.raises(NotFound):
        await studio.blind_tests.state(session.id, "b404")
    other = await studio.steering.create(None, {})
    trial = await start(studio, session)
    with pytest.raises(NotFound):
        await studio.blind_tests.state(other.id, trial["id"])


async def test_the_same_request_is_one_comparison(studio: Studio, session: Session) -> None:
    first, second = await start(studio, session, request="r1"), await start(studio, session, request="r1")
    assert first["id"] == second["id"]
    assert len(await studio.blind_tests.list_trials(session.id)) == 1
    both = await asyncio.gather(*(start(studio, session, request="r2") for _ in range(4)))
    assert len({each["id"] for each in both}) == 1
    other = await studio.steering.create(None, {})
    with pytest.raises(Conflict, match="another action"):
        await studio.blind_tests.start(other.id, other.tree.root.id, other.tree.root.id, request="r1")


async def test_trouble_is_told_and_can_be_tried_again(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: Any) -> list[str]:
        raise Conflict("No.", code="no", next_step="Again.")

    with monkeypatch.context() as patch:
        patch.setattr(session.nodes, "sample", broken)
        trial = await start(studio, session, planned=2)
        found = await current(studio, trial)
        assert found["error"]["message"] == "No."
        assert (await studio.blind_tests.state(session.id, trial["id"]))["error"]
    await studio.blind_tests.retry(session.id, trial["id"])
    assert (await current(studio, trial))["round"]


async def test_a_comparison_goes_on_after_a_restart_with_the_same_rounds(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Test", {})
        await choose(session, 1)
        trial = await start(studio, session, planned=5)
        before = (await current(studio, trial))["round"]
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.session(trial["session"])
        await ready(session)
        assert (await current(studio, trial))["round"] == before
        await studio.blind_tests.judge(session.id, trial["id"], 0, "first")
        assert (await current(studio, trial))["round"]["number"] == 1


async def test_a_deleted_session_takes_its_comparisons_along(studio: Studio, session: Session) -> None:
    trial = await start(studio, session, planned=200)
    await until(lambda: True)
    await studio.steering.delete(session.id)
    assert await studio.store.read(rows.get_trial, trial["id"]) is None
