"""Many sessions on one engine: everybody is served, and who waits is told their place."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from tests.conftest import ready, until
from trellis.engine.fake import FakeEngine
from trellis.engine.scheduler import Steps
from trellis.messages import Learn
from trellis.studio.studio import Studio

pytestmark = pytest.mark.anyio


async def test_who_waits_for_others_is_told_their_place_until_it_is_their_turn(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    gate.set()
    learn = FakeEngine.learn

    def when_all_have_asked(engine: FakeEngine, request: Learn) -> Steps:
        gate.wait(20)
        return (yield from learn(engine, request))

    monkeypatch.setattr(FakeEngine, "learn", when_all_have_asked)
    sessions = [await studio.steering.create(f"Person {number}", {"control_prompt": ""}) for number in range(6)]
    for session in sessions:
        await ready(session)
    told: dict[str, list[int | None]] = {session.id: [] for session in sessions}
    publish = studio.hub.publish

    def publishing(topic: str, name: str, data: dict[str, Any]) -> str:
        if name == "queued":
            told[topic.removeprefix("steering/")].append(data["place"])
        return publish(topic, name, data)

    monkeypatch.setattr(studio.hub, "publish", publishing)
    gate.clear()

    async def choose(number: int) -> None:
        session = sessions[number]
        assert session.offer is not None
        await session.commands.choose(session.offer.id, number % 4, "r1")

    await asyncio.gather(*(choose(number) for number in range(6)))
    # Two are being learned from, and four wait.
    await until(
        lambda: sorted(session.queue_position for session in sessions if session.queue_position) == [1, 2, 3, 4]
    )
    assert sorted(session.state()["queue"] or 0 for session in sessions) == [0, 0, 1, 2, 3, 4]
    gate.set()
    for session in sessions:
        state = await ready(session)
        assert state["head"]["step"] == 1
        assert state["queue"] is None
    for places in told.values():
        waits = " ".join(str(place) for place in places).split("None")
        for wait in waits:  # nobody falls back
            numbers = [int(place) for place in wait.split()]
            assert numbers == sorted(numbers, reverse=True)
        assert not places or places[-1] is None


async def test_sessions_that_learn_at_once_are_what_they_are_alone(studio: Studio) -> None:
    async def lived(name: str, seed: int) -> list[Any]:
        session = await studio.steering.create(name, {"seed": seed, "control_prompt": ""})
        seen: list[Any] = []
        for number in range(3):
            state = await ready(session)
            seen.append([option["text"] for option in state["offer"]["options"]])
            assert session.offer is not None
            await session.commands.choose(session.offer.id, (seed + number) % 4, f"r{number}")
        await ready(session)
        return [*seen, session.tree.head.weights]

    together = await asyncio.gather(*(lived(f"Together {seed}", seed) for seed in range(8)))
    assert [await lived(f"Alone {seed}", seed) for seed in range(8)] == together
    assert len({lives[-1] for lives in together}) == 8
