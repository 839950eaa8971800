"""What a person can do in a session, over a real store and the fake engine: every move, every refusal, every crash."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio, ready, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import Conflict, Invalid, NotFound, TrellisError
from trellis.messages import Event, Offer, Ranking, Request, Written
from trellis.options import ModelOptions, Sampling, default_learning_rate
from trellis.store import steering as rows
from trellis.studio.steering.background_work import CONTROL_SAMPLING
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio
from trellis.workers.processes import ProcessSpawner
from trellis.workers.worker import Spawn, Worker

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session(studio: Studio) -> Session:
    session = await studio.steering.create("Test", {"seed": 5})
    await ready(session)
    return session


def texts(state: dict[str, Any]) -> list[str]:
    return [option["text"] for option in state["offer"]["options"]]


async def choose(session: Session, choice: Any, request: str | None = None) -> dict[str, Any]:
    state = await ready(session)
    await session.commands.choose(state["offer"]["id"], choice, request or uuid.uuid4().hex)
    await until(lambda: not session.is_busy)
    return await ready(session)


async def test_a_new_session_offers_options_of_its_own_accord(session: Session) -> None:
    state = session.state()
    assert state["status"] == "ready"
    assert state["head"] == {"node": session.tree.root.id, "step": 0, "drift": 0.0}
    assert len(state["offer"]["options"]) == 4
    assert all(option["text"] and option["finish"] for option in state["offer"]["options"])
    assert (state["can_undo"], state["can_redo"]) == (False, False)
    assert state["dataset"]["position"] == 0
    assert state["dataset"]["total"] > 100
    assert state["config"]["learning_rate"] is not None


async def test_a_choice_makes_a_node_and_the_next_prompt(session: Session) -> None:
    before = session.state()
    after = await choose(session, 1)
    assert after["head"]["step"] == 1
    assert after["head"]["drift"] > 0
    assert after["offer"]["prompt"] != before["offer"]["prompt"]
    assert after["figures"]["share_after"] > after["figures"]["share_before"]
    assert after["can_undo"]
    assert session.tree.head.weights != session.tree.root.weights


@pytest.mark.parametrize("choice", [(0, 2), "none", Ranking(ranking=(1, 0)), Written(written="Mine.")], ids=str)
async def test_every_kind_of_choice_is_a_step(session: Session, choice: Any) -> None:
    assert (await choose(session, choice))["head"]["step"] == 1


async def test_after_a_refusal_options_are_chosen_from_more_openings(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await studio.steering.create(None, {"openings": 3})
    await ready(session)
    asked: list[Offer] = []
    stream = Worker.stream

    def listening(worker: Worker, request: Request, *others: Any) -> AsyncGenerator[Event, None]:
        if isinstance(request, Offer):
            asked.append(request)
        return stream(worker, request, *others)

    monkeypatch.setattr(Worker, "stream", listening)
    for choice in (1, "none", "skip", 0):
        await choose(session, choice)
    await session.nodes.sample("Why?", None, 2, Sampling(), 1)
    await session.commands.undo("u1")
    await session.commands.replace_prompt("And now?", "p1")
    await ready(session)
    assert [offer.openings for offer in asked if offer.sampling != CONTROL_SAMPLING] == [1, 3, 1, 1, 1, 1]
    assert all(offer.openings == 1 for offer in asked if offer.sampling == CONTROL_SAMPLING)


async def test_skip_moves_on_without_learning(session: Session) -> None:
    before = session.state()
    await session.commands.skip("skip-1")
    after = await ready(session)
    assert after["head"]["step"] == 0
    assert after["offer"]["prompt"] != before["offer"]["prompt"]
    assert session.tree.head.weights == session.tree.root.weights
    await session.commands.undo("undo-1")
    assert texts(await ready(session)) == texts(before)


async def test_undo_and_redo_bring_everything_back(session: Session) -> None:
    start = session.state()
    middle = await choose(session, 0)
    end = await choose(session, 2)
    weights = session.tree.head.weights
    await session.commands.undo("u1")
    assert texts(session.state()) == texts(middle)
    await session.commands.undo("u2")
    back = session.state()
    assert (texts(back), back["offer"]["id"], back["head"]) == (texts(start), start["offer"]["id"], start["head"])
    await session.commands.redo("r1")
    await session.commands.redo("r2")
    again = await ready(session)
    assert (texts(again), again["head"], session.tree.head.weights) == (texts(end), end["head"], weights)


async def test_the_same_choice_after_an_undo_is_the_same_node(session: Session) -> None:
    after = await choose(session, 0)
    await session.commands.undo("u1")
    again = await choose(session, 0, "another request")
    assert again["head"] == after["head"]
    assert texts(again) == texts(after)
    assert len(session.tree.nodes) == 2


async def test_another_choice_after_an_undo_is_a_branch_and_loses_nothing(session: Session) -> None:
    first = await choose(session, 0)
    await session.commands.undo("u1")
    second = await choose(session, 1)
    assert second["head"]["node"] != first["head"]["node"]
    assert len(session.tree.children(session.tree.root.id)) == 2
    await session.commands.go_to(first["head"]["node"], "g1")
    assert texts(await ready(session)) == texts(first)
    await session.commands.undo("u2")
    await session.commands.redo("r2")
    assert session.tree.head_id == first["head"]["node"]


async def test_two_sessions_with_the_same_seed_and_choices_are_the_same(studio: Studio) -> None:
    seen = []
    for _ in range(2):
        session = await studio.steering.create(None, {"seed": 9})
        states = [
            await ready(session),
            await choose(session, 0),
            await choose(session, "none"),
            await choose(session, 1),
        ]
        seen.append([(texts(state), state["offer"]["prompt"]) for state in states])
    assert seen[0] == seen[1]


async def test_a_prompt_can_be_replaced(session: Session) -> None:
    before = session.state()
    await session.commands.replace_prompt("What is rain?", "p1")
    after = await ready(session)
    assert after["offer"]["prompt"] == "What is rain?"
    assert texts(after) != texts(before)
    chosen = await choose(session, 0)
    assert chosen["offer"]["prompt"] != "What is rain?"
    await session.commands.undo("u1")
    assert session.state()["offer"]["prompt"] == "What is rain?"


async def test_samples_do_not_move_the_session(studio: Studio, session: Session) -> None:
    before = session.state()
    await choose(session, 0)
    answers = await studio.steering.sample(session.id, "What is rain?", session.tree.root.id, 3, {"max_new_tokens": 5})
    assert len(answers) == 3
    assert await studio.steering.sample(
        session.id, "What is rain?", session.tree.root.id, 3, {"max_new_tokens": 5}
    ) == (answers)
    assert session.state()["head"]["step"] == 1
    assert before["head"]["step"] == 0


async def test_the_control_prompt_is_answered_before_and_after_each_step(session: Session) -> None:
    await until(lambda: session.state()["control"]["original"] is not None)
    await choose(session, 0)
    await until(lambda: session.state()["control"]["current"] is not None)
    control = session.state()["control"]
    assert control["prompt"] == "Tell me about the sea."
    assert control["current"] != control["original"]


# ── Refusals ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("choice", [4, -1, (0, 9), (1, 1), Ranking(ranking=(0, 7)), Written(written="  ")], ids=str)
async def test_a_choice_that_does_not_fit_is_refused(session: Session, choice: Any) -> None:
    before = session.state()
    with pytest.raises(Invalid) as raised:
        await session.commands.choose(before["offer"]["id"], choice, "r1")
    assert (raised.value.field or "").startswith("choice")
    # the control prompt's answer may have come meanwhile
    assert session.state() | {"control": None} == before | {"control": None}


async def test_an_offer_that_is_not_on_the_screen_is_refused_with_the_state(session: Session) -> None:
    with pytest.raises(Conflict) as raised:
        await session.commands.choose("o123", 0, "r1")
    assert raised.value.code == "stale_offer"
    assert raised.value.details["state"]["offer"]["id"] == session.state()["offer"]["id"]


async def test_nothing_else_is_taken_while_learning(session: Session) -> None:
    offer = session.state()["offer"]["id"]
    await session.commands.choose(offer, 0, "r1")
    for again in (
        session.commands.choose(offer, 1, "r2"), session.commands.skip("r3"), session.commands.undo("r4"),
        session.commands.replace_prompt("x", "r5"),
        session.commands.go_to(session.tree.root.id, "r6"),
    ):  # fmt: skip
        with pytest.raises(Conflict) as raised:
            await again
        assert raised.value.code == "busy"
    assert (await ready(session))["head"]["step"] == 1


async def test_options_that_are_still_growing_cannot_be_chosen_but_skipped(studio: Studio) -> None:
    session = await studio.steering.create(None, {})
    await until(lambda: session.status == "offering" and session.offer)
    assert session.offer is not None
    with pytest.raises(Conflict, match="still being generated"):
        await session.commands.choose(session.offer.id, 0, "r1")
    await session.commands.skip("r2")
    assert (await ready(session))["dataset"]["position"] == 1


async def test_there_is_no_undo_at_the_beginning_and_no_redo_at_the_end(session: Session) -> None:
    with pytest.raises(Conflict, match="Nothing to undo"):
        await session.commands.undo("r1")
    with pytest.raises(Conflict, match="Nothing to redo"):
        await session.commands.redo("r2")
    with pytest.raises(NotFound, match="Node “n123” not found"):
        await session.commands.go_to("n123", "r3")


async def test_unknown_things_are_refused(studio: Studio) -> None:
    with pytest.raises(NotFound, match="There is no session “nope”"):
        await studio.steering.session("nope")
    with pytest.raises(NotFound, match="Known: demo"):
        await studio.steering.create(None, {"model": "nope"})
    with pytest.raises(Invalid, match=r"config\.group_size.*got “9”"):
        await studio.steering.create(None, {"group_size": 9})


async def test_the_same_request_is_one_action(studio: Studio, session: Session) -> None:
    offer = session.state()["offer"]["id"]
    await session.commands.choose(offer, 0, "once")
    await session.commands.choose(offer, 0, "once")
    await until(lambda: not session.is_busy)
    await session.commands.choose(offer, 1, "once")
    await ready(session)
    await session.commands.skip("skip once")
    await session.commands.skip("skip once")
    await ready(session)
    assert len(session.tree.nodes) == 3
    made = await studio.steering.create(None, {}, "new once")
    assert await studio.steering.create(None, {}, "new once") is made


async def test_a_prompt_that_does_not_fit_fails_openly_and_can_be_replaced(session: Session) -> None:
    await session.commands.replace_prompt("word " * 2000, "p1")
    await until(lambda: session.error)
    state = session.state()
    assert state["status"] == "failed"
    assert state["error"]["code"] == "prompt_too_long"
    await session.commands.replace_prompt("What is rain?", "p2")
    assert (await ready(session))["offer"]["prompt"] == "What is rain?"


async def test_a_session_can_be_renamed_and_deleted(studio: Studio, session: Session, tmp_path: Path) -> None:
    await choose(session, 0)
    await session.commands.rename("Other")
    assert [row["name"] for row in await studio.steering.list_sessions()] == ["Other"]
    twin = await studio.steering.create("Twin", {"seed": 5})
    await ready(twin)
    own = {node.weights for node in session.tree.nodes.values()}
    await studio.steering.delete(session.id)
    assert [row["name"] for row in await studio.steering.list_sessions()] == ["Twin"]
    left = {name for name in own if name in Blobs(tmp_path / "weights")}
    assert left == {twin.tree.root.weights}, "weights that another session names stay, the others go"
    with pytest.raises(NotFound):
        await studio.steering.session(session.id)


async def test_names_are_chosen_and_not_repeated(studio: Studio) -> None:
    names = {(await studio.steering.create(None, {})).name for _ in range(20)}
    assert len(names) == 20


# ── Restarts and engines that die ──────────────────────────────────────────────────────────────────


async def test_after_a_restart_everything_is_where_it_was(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Kept", {"seed": 3})
        await choose(session, 0)
        await choose(session, 3)
        await session.commands.undo("u1")
        before = session.state()
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        after = again.state()
        # what was measured for the live display is not kept
        live = {"figures": None, "control": None, "engine": None}
        assert after | live == before | live
        assert (await choose(again, 3))["head"]["step"] == 2


async def test_a_choice_that_was_acknowledged_is_learned_from_after_a_restart(
    tmp_path: Path, fake_spawn: Spawn
) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Kept", {})
        state = await ready(session)
        await session.commands.choose(state["offer"]["id"], 2, "r1")
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        after = await ready(again)
        assert after["head"]["step"] == 1
        assert len(again.tree.nodes) == 2


async def test_weights_that_were_lost_are_worked_out_again_from_the_log(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {})
        for choice in (0, 1, "none", 2):
            await choose(session, choice)
        await session.commands.skip("s1")
        await ready(session)
    blobs = Blobs(tmp_path / "weights")
    names = {node.weights for node in session.tree.nodes.values()}
    for name in names:
        blobs.discard(name)
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        assert (await choose(again, 0))["head"]["step"] == 5
    assert all(name in blobs for name in names)


async def test_an_engine_that_dies_in_mid_step_is_replaced_and_the_step_is_made(tmp_path: Path) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 0, fake=True)
    async with open_studio(tmp_path, spawn) as studio:
        session = await studio.steering.create(None, {})
        state = await ready(session)
        worker = await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)
        assert worker.pid is not None
        await session.commands.choose(state["offer"]["id"], 0, "r1")
        worker._engine.kill()
        after = await until(lambda: session.status == "ready" and session.state())
        assert after["head"]["step"] == 1
        assert (await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)).pid != worker.pid


async def test_an_engine_that_always_dies_is_told_about_and_can_be_tried_again(tmp_path: Path) -> None:
    class Dying(FakeEngine):
        lanes = 1  # it dies with the thread that it began on

        broken = True

        def offer(self, request: Any) -> Any:
            if Dying.broken:
                raise SystemExit
            return (yield from super().offer(request))

    spawn = thread_spawner(lambda: Dying(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        session = await studio.steering.create(None, {})
        await until(lambda: session.error)
        assert session.state()["error"]["code"] == "engine_died"
        Dying.broken = False
        await session.commands.resume()
        await ready(session)


async def test_a_model_that_was_exchanged_is_noticed(tmp_path: Path) -> None:
    class Other(FakeEngine):
        def create_adapter(self, request: Any) -> Any:
            yield None
            self._write("wother", 0, None)
            from trellis.messages import AdapterCreated

            return AdapterCreated(weights="wother")

    async with open_studio(tmp_path, thread_spawner(lambda: FakeEngine(Blobs(tmp_path / "weights")))) as one:
        session = await one.steering.create(None, {})
        await ready(session)
    async with open_studio(tmp_path, thread_spawner(lambda: Other(Blobs(tmp_path / "weights")))) as two:
        again = await two.steering.session(session.id)
        state = await ready(again)
        await again.commands.choose(state["offer"]["id"], 0, "r1")
        await until(lambda: again.error)
        assert again.state()["error"]["code"] == "model_changed"
        await again.commands.undo("u1") if again.tree.undo_target else await again.commands.skip("s1")
        assert again.error is None or again.error.code == "model_changed"


@pytest.mark.parametrize("how", ["resumed", "watched"])
async def test_a_model_that_was_exchanged_is_refused_before_a_choice(how: str, tmp_path: Path) -> None:
    class Other(FakeEngine):
        def create_adapter(self, request: Any) -> Any:
            return (yield from super().create_adapter(request.model_copy(update={"seed": request.seed + 1})))

    spawn = thread_spawner(lambda: FakeEngine(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as one:
        session = await one.steering.create(None, {"control_prompt": ""})
        await ready(session)
    async with open_studio(tmp_path, thread_spawner(lambda: Other(Blobs(tmp_path / "weights")))) as two:
        again = await two.steering.session(session.id)
        state = await ready(again)
        if how == "resumed":
            await again.commands.resume()
        else:
            again.add_watcher()
            again.preload_model()
        await until(lambda: again.error)
        assert again.error is not None
        assert again.error.code == "model_changed"
        assert "original files" in again.error.next_step
        assert again.state()["offer"]["id"] == state["offer"]["id"]
    async with open_studio(tmp_path, spawn) as three:  # the original one is back
        session = await three.steering.session(session.id)
        await session.commands.resume()
        state = await ready(session)
        await session.commands.choose(state["offer"]["id"], 0, "r2")
        await until(lambda: session.tree.head.step == 1)


async def test_an_option_that_overflowed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(FakeEngine):
        def offer(self, request: Any) -> Any:
            offered = yield from super().offer(request)
            return offered.model_copy(update={"overflowed": (1, 3)})

    async with open_studio(tmp_path, thread_spawner(lambda: Overflowing(Blobs(tmp_path / "weights")))) as studio:
        told: list[tuple[str, dict[str, Any]]] = []
        publish = studio.hub.publish

        def publishing(topic: str, name: str, data: dict[str, Any]) -> str:
            told.append((name, data))
            return publish(topic, name, data)

        monkeypatch.setattr(studio.hub, "publish", publishing)
        await ready(await studio.steering.create(None, {}))
        notices = [data["message"] for name, data in told if name == "notice"]
        assert len(notices) == 1
        assert notices[0].startswith("Truncated after a numeric overflow: B and D.")


async def test_deleting_in_mid_stream_lets_everyone_go(studio: Studio) -> None:
    session = await studio.steering.create(None, {})
    seen: list[str] = []

    async def watch() -> None:
        async for event in studio.steering.events(session.id, None):
            seen.append(event.name)

    watching = asyncio.create_task(watch())
    await until(lambda: "option_delta" in seen)
    await studio.steering.delete(session.id)
    await asyncio.wait_for(watching, 5)
    assert seen[-1] == "done"
    assert await studio.store.read(rows.list_sessions) == []


async def test_a_bug_is_shown_as_one_and_the_session_lives(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(session._engine, "learn", broken)
    await session.commands.choose(session.state()["offer"]["id"], 0, "r1")
    await until(lambda: session.error)
    assert session.state()["error"]["code"] == "internal"
    assert isinstance(session.error, TrellisError)
    monkeypatch.undo()
    await session.commands.resume()
    assert (await ready(session))["head"]["step"] == 1


def test_a_good_learning_rate_falls_with_the_models_size() -> None:
    rates = [default_learning_rate(size) for size in (1, 10**6, 10**8, 10**9, 10**11)]
    assert rates == sorted(rates, reverse=True)
    assert (rates[0], rates[-1]) == (3e-3, 5e-5)


async def test_a_log_that_no_longer_leads_to_the_weights_is_an_error_and_not_a_loop(
    tmp_path: Path, fake_spawn: Spawn
) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {})
        await choose(session, 0)
        await choose(session, 1)
    blobs = Blobs(tmp_path / "weights")
    for node in session.tree.nodes.values():
        blobs.discard(node.weights)
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        again.requests._config = again.config.model_copy(update={"kl_beta": 5.0})
        await again.commands.skip("s1")
        await until(lambda: again.error)
        assert again.state()["error"]["code"] == "weights_changed"


async def test_a_control_prompt_that_fails_leaves_the_options_alone(tmp_path: Path) -> None:
    from trellis.errors import EngineError

    class Forgetful(FakeEngine):
        def offer(self, request: Any) -> Any:
            if request.group_size == 1:
                yield None
                raise EngineError("There was not enough memory.", code="out_of_memory", next_step="Use less.")
            return (yield from super().offer(request))

    spawn = thread_spawner(lambda: Forgetful(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        session = await studio.steering.create(None, {})
        await until(lambda: session.state()["control"]["original"])
        assert session.state()["control"]["original"] == "There was not enough memory."
        assert session.status == "ready"


async def test_a_session_of_another_version_keeps_nobody_else_from_opening(tmp_path: Path, fake_spawn: Spawn) -> None:
    from sqlalchemy import text

    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Old", {})
        state = await ready(session)
        await session.commands.choose(state["offer"]["id"], 2, "r1")
        await studio.store.write(
            lambda connection: connection.execute(text("UPDATE sessions SET config = '{\"from_the_future\": 1}'"))
        )
    async with open_studio(tmp_path, fake_spawn) as studio:
        with pytest.raises(TrellisError, match="This version can't read the session “Old”") as raised:
            await studio.steering.session(session.id)
        assert raised.value.code == "session_unreadable"
        await ready(await studio.steering.create("New", {}))


async def test_a_command_whose_asker_goes_away_is_done_to_its_end(session: Session) -> None:
    offer = session.state()["offer"]["id"]
    asking = asyncio.create_task(session.commands.choose(offer, 0, "r1"))
    await asyncio.sleep(0.001)
    asking.cancel()
    await asyncio.wait([asking])
    assert (await until(lambda: session.status == "ready" and session.state()["head"]["step"] == 1)) is True
    moving = asyncio.create_task(session.commands.undo("u1"))
    await asyncio.sleep(0)
    moving.cancel()
    await until(lambda: session.tree.head is session.tree.root)


async def test_sessions_that_nobody_uses_leave_memory_and_come_back(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trellis.studio.steering import sessions

    after = await choose(session, 1)
    await until(lambda: session.state()["control"]["current"] is not None and session.is_idle)
    monkeypatch.setattr(sessions, "IDLE_SECONDS", 0.0)
    other = await studio.steering.create(None, {})
    await studio.steering.delete(other.id)
    with pytest.raises(NotFound):
        await studio.steering.session(other.id)
    found = await studio.steering.session(session.id)
    last = studio.hub.last_event_id(session.topic)
    # opening another one lets the idle ones go
    studio.steering._sessions.pop(session.id)
    again = await studio.steering.session(session.id)
    assert again is not found
    assert again.state()["offer"] == after["offer"]
    assert (
        studio.hub.last_event_id(session.topic) == last
        or last.split("-")[0] != studio.hub.last_event_id(session.topic).split("-")[0]
    )


async def test_a_deleted_session_can_be_neither_renamed_nor_woken(studio: Studio, session: Session) -> None:
    await studio.steering.delete(session.id)
    with pytest.raises(NotFound):
        await session.commands.rename("x")
    session.work.wake()
    assert session.is_idle
