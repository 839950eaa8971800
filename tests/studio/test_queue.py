"""Many sessions on one engine: everybody is served, and who waits is told their place."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.conftest import ready, until
from trellis.engine import fake
from trellis.studio.studio import Studio

pytestmark = pytest.mark.anyio


async def test_who_waits_for_others_is_told_their_place_until_it_is_their_turn(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    monkeypatch.setattr(fake, "STEP_SECONDS", 0.02)

    async def choose(number: int) -> None:
        session = sessions[number]
        assert session.offer is not None
        await session.choose(session.offer.id, number % 4, "r1")

    await asyncio.gather(*(choose(number) for number in range(6)))
    await until(lambda: any(session.state()["queue"] for session in sessions))
    for session in sessions:
        state = await ready(session)
        assert state["head"]["step"] == 1
        assert state["queue"] is None
    first = [places[0] for places in told.values() if places]
    assert {1, 2, 3, 4} <= set(first)  # two lanes, and four who wait
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
            await session.choose(session.offer.id, (seed + number) % 4, f"r{number}")
        await ready(session)
        return [*seen, session.tree.head.weights]

    together = await asyncio.gather(*(lived(f"Together {seed}", seed) for seed in range(8)))
    assert [await lived(f"Alone {seed}", seed) for seed in range(8)] == together
    assert len({lives[-1] for lives in together}) == 8
