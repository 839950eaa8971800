"""What is worked out while a person reads: found when they choose, the same as without, in nobody's way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select

from tests.conftest import open_studio, ready, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine import fake
from trellis.engine.fake import FakeEngine
from trellis.messages import (
    Cancel,
    Event,
    Learn,
    Offer,
    Request,
    RequestFrame,
    SetPriority,
    Status,
    StatusReport,
    Written,
)
from trellis.options import ModelOptions
from trellis.store.steering import commit_node
from trellis.store.tables import intents, nodes, offers
from trellis.studio.models.devices import has_mains_power, make_foresight_check
from trellis.studio.steering.background_work import CONTROL_SAMPLING
from trellis.studio.steering.foresight import ForesightRequest, last_event
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio
from trellis.workers.channel import Channel
from trellis.workers.processes import ProcessSpawner
from trellis.workers.worker import Spawn, Worker

pytestmark = pytest.mark.anyio


class Listening:
    """What engines were asked for, and what they were told beside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[Request, int]] = []
        self.told: list[SetPriority | Cancel] = []
        stream, send = Worker.stream, Channel.send

        def listening(
            worker: Worker, request: Request, priority: int = 0, owner: str = "", continues_turn: bool = False
        ) -> AsyncGenerator[Event, None]:
            self.asked.append((request, priority))
            return stream(worker, request, priority, owner, continues_turn)

        async def sending(channel: Channel, down: RequestFrame) -> None:
            if isinstance(down.body, (SetPriority, Cancel)):
                self.told.append(down.body)
            await send(channel, down)

        monkeypatch.setattr(Worker, "stream", listening)
        monkeypatch.setattr(Channel, "send", sending)

    def of(self, kind: type[Request]) -> list[int]:
        """The priorities of what was asked for of a kind, control prompts left out."""
        return [
            priority for request, priority in self.asked
            if isinstance(request, kind) and not (isinstance(request, Offer) and request.sampling == CONTROL_SAMPLING)
        ]  # fmt: skip


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> Listening:
    return Listening(monkeypatch)


@pytest.fixture
async def session(studio: Studio) -> Session:
    session = await studio.steering.create("Test", {"seed": 5})
    await ready(session)
    return session


def spawner(folder: Path) -> Spawn:
    return thread_spawner(lambda: FakeEngine(Blobs(folder / "weights")))


def foreseen(session: Session) -> bool:
    """Whether everything that may be chosen next is worked out."""
    return session.status == "ready" and not session._background.foresight_steps() and not session.work.is_running


async def choose(session: Session, choice: Any, request: str) -> None:
    assert session.offer is not None
    await session.commands.choose(session.offer.id, choice, request)


async def test_a_choice_that_was_foreseen_asks_the_engine_for_nothing_and_is_there_at_once(
    session: Session, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.add_watcher()
    await until(lambda: foreseen(session))
    published: list[str] = []
    publish = session._hub.publish

    def publishing(topic: str, name: str, data: dict[str, Any]) -> str:
        published.append(name)
        return publish(topic, name, data)

    monkeypatch.setattr(session._hub, "publish", publishing)
    assert listening.of(Learn) == [3] * 5  # four options and none of these
    assert listening.of(Offer) == [3] * 6  # and what follows each of them, and a skip
    write, writes = session.work._store.write, []

    async def writing(work: Any, *args: Any, **kwargs: Any) -> Any:
        writes.append(work)
        return await write(work, *args, **kwargs)

    monkeypatch.setattr(session.work._store, "write", writing)
    for choice, request in ((2, "r1"), ("none", "r2"), ("skip", "r3")):
        listening.asked.clear()
        writes.clear()
        await choose(session, choice, request)
        assert session.status == "ready"  # when the command is answered
        assert writes == [commit_node]  # in one transaction
        await choose(session, choice, request)  # asked again by a client that did not hear the answer
        assert writes == [commit_node]
        await ready(session)
        shown = [request for request, priority in listening.asked if priority == 0 and isinstance(request, Offer)]
        assert shown == []
        assert published.count("option_delta") <= 4  # what is all there is told at once
        published.clear()
        assert 0 not in [p for request, p in listening.asked if isinstance(request, Learn) and not request.keep]
        await until(lambda: foreseen(session))


async def test_nothing_is_foreseen_for_a_session_that_nobody_looks_at_or_when_it_is_turned_off(
    tmp_path: Path, session: Session, listening: Listening
) -> None:
    await choose(session, 0, "r1")
    await ready(session)
    await until(lambda: not session.work.is_running)
    assert 3 not in listening.of(Learn) + listening.of(Offer)
    async with open_studio(tmp_path / "other", spawner(tmp_path / "other"), foresight="off") as studio:
        quiet = await studio.steering.create(None, {})
        quiet.add_watcher()
        await ready(quiet)
        await until(lambda: not quiet.work.is_running)
    assert 3 not in listening.of(Learn) + listening.of(Offer)


def test_on_mains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Battery:
        power_plugged: bool | None = False

    monkeypatch.setattr("psutil.sensors_battery", lambda: Battery, raising=False)
    assert not has_mains_power()
    assert [make_foresight_check(setting)() for setting in ("on", "mains", "off")] == [True, False, False]
    Battery.power_plugged = True
    assert make_foresight_check("mains")()
    monkeypatch.setattr("psutil.sensors_battery", lambda: None, raising=False)
    assert has_mains_power()


@pytest.mark.parametrize("stage", [Learn, Offer])
async def test_what_is_being_worked_out_when_it_is_chosen_goes_on_and_is_urgent(
    session: Session, listening: Listening, monkeypatch: pytest.MonkeyPatch, stage: type[Request]
) -> None:
    monkeypatch.setattr(fake, "STEP_SECONDS", 0.02)
    session.add_watcher()
    await until(lambda: listening.of(stage))
    first = session._background.likely_choices()[0]
    await choose(session, first, "r1")
    state = await ready(session)
    assert state["head"]["step"] == 1
    assert 0 not in [p for request, p in listening.asked if isinstance(request, Learn) and not request.keep]
    assert any(isinstance(told, SetPriority) and told.priority == 0 for told in listening.told)
    if stage is Offer:
        assert 0 not in listening.of(Offer)


async def test_what_becomes_urgent_before_it_was_sent_is_sent_as_urgent(tmp_path: Path, listening: Listening) -> None:
    worker = await Worker.start(spawner(tmp_path))
    ahead = ForesightRequest(worker, "s", Status(), "n")
    await ahead.raise_priority()
    assert isinstance(await last_event(ahead.follow()), StatusReport)
    assert listening.asked == [(Status(), 0)]
    await worker.stop()


async def test_what_was_not_chosen_gives_way_at_once(
    session: Session, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "STEP_SECONDS", 0.02)
    session.add_watcher()
    await until(lambda: len(listening.of(Learn)) >= 2)  # one for each lane
    last = session._background.likely_choices()[-2]
    await choose(session, last, "r1")
    await ready(session)
    assert any(isinstance(told, Cancel) for told in listening.told)
    asked = listening.of(Learn)
    assert asked[asked.index(0) - 1] == 3


async def story(studio: Studio, seed: int, looked_at: bool, longest: float = 0.1, **config: Any) -> list[Any]:
    """What a person sees who says the same things, at random moments: the weights and the options after each."""
    session = await studio.steering.create(None, {"seed": 3, "group_size": 3, "inner_steps": 2} | config)
    if looked_at:
        session.add_watcher()
    said, pauses, seen = random.Random(seed), random.Random(seed + 1000), []
    for number in range(8):
        state = await ready(session, 60)
        seen.append((session.tree.head.weights, [option["text"] for option in state["offer"]["options"]]))
        if looked_at:
            await asyncio.sleep(longest * pauses.choice([0.0, 0.05, 0.2, 1.0]))
        what = said.choice(["choose", "choose", "choose", "none", "skip", "undo", "written", "prompt", "many"])
        if what == "undo" and not session.tree.undo_target:
            what = "choose"
        match what:
            case "choose":
                await choose(session, said.randrange(3), f"r{number}")
            case "many":
                await choose(session, (0, 2), f"r{number}")
            case "none" | "skip":
                await choose(session, what, f"r{number}")
            case "written":
                await choose(session, Written(written="Mine."), f"r{number}")
            case "undo":
                await session.commands.undo(f"r{number}")
            case "prompt":
                await session.commands.replace_prompt(f"Question {number}?", f"r{number}")
    await ready(session, 60)
    await until(lambda: not session._engine.unsaved_nodes, 60)  # weights are written behind the click
    return [*seen, await studio.store.read(written_of, session.id)]


UNLIKE = {"id", "session", "created", "metrics", "control"}


def written_of(connection: Connection, session: str) -> list[Any]:
    """What the database says of a session, but for its own id, times, and what is answered when there is time."""
    node_ids = {row.id: number for number, row in enumerate(
        connection.execute(select(nodes).where(nodes.c.session == session).order_by(nodes.c.created))
    )}  # fmt: skip
    offer_ids = {row.id: number for number, row in enumerate(
        connection.execute(select(offers).where(offers.c.session == session).order_by(offers.c.created))
    )}  # fmt: skip
    found: list[Any] = []
    for table in (nodes, offers):
        ids = node_ids if table is nodes else offer_ids
        for row in connection.execute(select(table).where(table.c.session == session)).mappings():
            plain = {name: node_ids.get(value, offer_ids.get(value, value)) if isinstance(value, str) else value
                     for name, value in row.items() if name not in UNLIKE}  # fmt: skip
            found.append((table.name, ids[row["id"]], plain))
    for row in connection.execute(select(intents).where(intents.c.session == session)).mappings():
        found.append((row["request"], row["kind"], row["state"]))
    return sorted(found, key=str)


@pytest.mark.parametrize("seed", range(8))
async def test_a_session_is_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(fake, "STEP_SECONDS", 0.001)
    async with open_studio(tmp_path / "plain", spawner(tmp_path / "plain")) as studio:
        plain = await story(studio, seed, looked_at=False)
    async with open_studio(tmp_path / "other", spawner(tmp_path / "other")) as studio:
        assert await story(studio, seed, looked_at=True) == plain


@pytest.mark.engine
@pytest.mark.parametrize("seed", range(3))
async def test_a_session_on_a_real_engine_is_the_same_to_the_bit(tmp_path: Path, tiny_llama: Path, seed: int) -> None:
    from trellis.engine.handlers import TextEngine

    class OnTwoLanes(TextEngine):
        lanes = 2

    seen = []
    for name, engine in (("plain", TextEngine), ("other", OnTwoLanes)):
        spawn = thread_spawner(lambda name=name, engine=engine: engine(Blobs(tmp_path / name / "weights")))
        async with open_studio(tmp_path / name, spawn, model_dirs=str(tiny_llama.parent)) as studio:
            seen.append(await story(
                studio, seed, looked_at=name == "other", longest=1.0, model=tiny_llama.name, max_new_tokens=12,
                learning_rate=1e-3, openings=3,
            ))  # fmt: skip
        weights = seen[-1][-2][0]
        seen[-1].append((tmp_path / name / "weights" / weights / "adapter_model.safetensors").read_bytes())
    assert seen[0] == seen[1]


async def test_weights_are_written_behind_the_click_and_made_again_where_the_engine_died_before(tmp_path: Path) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", 0, fake=True)
    blobs = Blobs(tmp_path / "weights")
    async with open_studio(tmp_path, spawn) as studio:
        session = await studio.steering.create(None, {})
        session.add_watcher()
        await ready(session)
        await until(lambda: foreseen(session))
        before = {path.name for path in blobs.root.iterdir()}
        await choose(session, 1, "r1")
        state = await ready(session)
        worker = await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)
        worker._engine.kill()
        await until(lambda: not worker.is_alive)
        await until(lambda: session.tree.head.weights in blobs and foreseen(session))
        assert session.state()["offer"] == state["offer"]
        await choose(session, 0, "r2")
        assert (await ready(session))["head"]["step"] == 2
        await until(lambda: foreseen(session))
    named = {node.weights for node in session.tree.nodes.values()}
    assert {path.name for path in blobs.root.iterdir()} - before <= named  # what was not chosen is never written


async def test_a_model_that_is_unloaded_meanwhile_stays_unloaded_until_somebody_chooses(
    studio: Studio, session: Session, listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "STEP_SECONDS", 0.02)
    session.add_watcher()
    await until(lambda: listening.of(Learn))
    await studio.models.unload("demo")
    await until(lambda: not session.work.is_running)
    assert session.error is None
    assert session.status == "ready"
    assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
    await choose(session, 0, "r1")
    assert (await ready(session))["head"]["step"] == 1
