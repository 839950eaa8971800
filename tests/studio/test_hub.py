"""Replay: whatever a reader misses, it reads in the end exactly what was said, once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trellis.studio.hub import RING_SIZE, Hub, HubEvent

pytestmark = pytest.mark.anyio


def nothing() -> tuple[str, dict[str, Any]]:
    return "state", {}


async def take(hub: Hub, after: str | None, count: int, said: list[int] | None = None) -> list[HubEvent]:
    events = []
    stream = hub.subscribe("t", after, lambda: ("state", {"said": list(said or [])}))
    async for event in stream:
        events.append(event)
        if len(events) == count:
            break
    return events


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_any_pattern_of_drops_reads_the_same_as_none(reads: list[int]) -> None:
    async def main() -> None:
        hub, total = Hub(), sum(reads)
        start = hub.last_event_id("t")
        for number in range(total):
            hub.publish("t", "n", {"n": number})
        seen: list[int] = []
        after: str | None = start
        for count in reads:
            events = await take(hub, after, count)
            seen += [event.data["n"] for event in events]
            after = events[-1].id
        assert seen == list(range(total))

    asyncio.run(main())


async def test_a_new_reader_gets_a_snapshot_and_then_what_follows() -> None:
    hub, said = Hub(), [1, 2]
    for number in said:
        hub.publish("t", "n", {"n": number})
    reading = asyncio.create_task(take(hub, None, 2, said))
    await asyncio.sleep(0)
    hub.publish("t", "n", {"n": 3})
    first, second = await reading
    assert (first.name, first.data) == ("state", {"said": [1, 2]})
    assert second.data == {"n": 3}
    assert [event.data for event in await take(hub, first.id, 1)] == [{"n": 3}]


@pytest.mark.parametrize("after", ["", "x", "abc-1", "00000000-99999", "\u0662-\u0662", "1-" + "9" * 40])
async def test_an_id_that_is_not_ours_gets_a_snapshot(after: str) -> None:
    hub = Hub()
    hub.publish("t", "n", {"n": 1})
    assert (await take(hub, after, 1))[0].name == "state"
    ours = hub.last_event_id("t").split("-")[0]
    assert (await take(hub, f"{ours}-99", 1))[0].name == "state"


async def test_a_reader_that_is_too_slow_gets_a_snapshot_and_costs_nothing() -> None:
    hub = Hub()
    start = hub.last_event_id("t")
    for number in range(RING_SIZE + 5):
        hub.publish("t", "n", {"n": number})
    (event,) = await take(hub, start, 1)
    assert event.name == "state"
    assert event.id == hub.last_event_id("t")
    (oldest,) = await take(hub, f"{start.split('-')[0]}-5", 1)
    assert oldest.data == {"n": 5}


async def test_an_id_of_a_topic_that_was_let_go_is_not_taken_for_one_of_its_successor() -> None:
    hub = Hub()
    hub.publish("t", "n", {"n": 1})
    before = hub.last_event_id("t")
    hub.close_topic("t")
    hub.publish("t", "n", {"n": 2})
    assert (await take(hub, before, 1))[0].name == "state"


async def test_a_topic_that_ends_lets_its_readers_finish() -> None:
    hub = Hub()

    async def read() -> list[str]:
        return [event.name async for event in hub.subscribe("t", None, nothing)]

    reading = asyncio.create_task(read())
    await asyncio.sleep(0)
    place = hub._topics["t"]
    assert len(place.waiters) == 1
    hub.publish("t", "done", {})
    hub.close_topic("t")
    assert await asyncio.wait_for(reading, 1) == ["state", "done"]
    assert not place.waiters
    assert "t" not in hub._topics


async def test_closing_the_hub_lets_everyone_go() -> None:
    hub = Hub()

    async def read() -> list[str]:
        return [event.name async for event in hub.subscribe("t", None, nothing)]

    readers = [asyncio.create_task(read()) for _ in range(3)]
    await asyncio.sleep(0)
    hub.close()
    assert await asyncio.wait_for(asyncio.gather(*readers), 1) == [["state"]] * 3
