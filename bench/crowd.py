"""Many sessions on one model: what each further one costs, and how long people wait who choose at the same time.

    python bench/crowd.py                              # 200 sessions, 20 people, the demo model; about ten minutes
    python bench/crowd.py --sessions 50 --people 8

Times are on the wire, from the sending of a choice to the event that brings the first new text, and the whole options.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the server that tests start is the one that is measured

from speed import late, middle  # noqa: E402 - it lies beside this file

API = "/api/steering/sessions"


def resident(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss)


async def events_of(client: httpx.AsyncClient, session: str) -> AsyncIterator[tuple[str, Any]]:
    async with client.stream("GET", f"{API}/{session}/events", timeout=None) as stream:
        name = ""
        async for line in stream.aiter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


class Person:
    """Somebody with a page open, who reads and chooses."""

    def __init__(self, client: httpx.AsyncClient, session: str, seed: int) -> None:
        self._client, self._session, self._dice = client, session, random.Random(seed)
        self._events = events_of(client, session)
        self._offer = ""
        self.waits: list[tuple[float, float]] = []
        self.place = 0

    async def arrive(self) -> None:
        async for name, data in self._events:
            if name == "state" and data["status"] == "ready":
                self._offer = data["offer"]["id"]
                return

    async def choose(self, reading: float) -> None:
        await asyncio.sleep(reading * self._dice.uniform(0.5, 1.5))
        started = time.perf_counter()
        body = {"offer": self._offer, "choice": self._dice.randrange(4)}
        answer = await self._client.post(f"{API}/{self._session}/choose", json=body, timeout=120)
        answer.raise_for_status()
        first = 0.0
        async for name, data in self._events:
            now = time.perf_counter()
            if name == "queued" and data["place"]:
                self.place = max(self.place, data["place"])
            elif name == "option_delta" or (name == "offer_started" and data["options"][0]["text"]):
                first = first or now
            elif name == "offer_ready":
                self._offer = data["offer"]
                self.waits.append(((first or now) - started, now - started))
                return

    async def leave(self) -> None:
        await self._events.aclose()  # type: ignore[attr-defined]


async def ready(client: httpx.AsyncClient, session: str) -> dict[str, Any]:
    while True:
        state: dict[str, Any] = (await client.get(f"{API}/{session}")).json()
        assert state["status"] != "failed", state["error"]
        if state["status"] == "ready":
            return state
        await asyncio.sleep(0.02)


async def many(server: Any, client: httpx.AsyncClient, count: int) -> list[str]:
    """Sessions that have learned from one choice each."""
    made: list[str] = []
    seen: list[tuple[int, float, float]] = []
    for number in range(count):
        config = {"seed": number, "control_prompt": ""}
        made.append((await client.post(API, json={"config": config})).json()["id"])
        state = await ready(client, made[-1])
        body = {"offer": state["offer"]["id"], "choice": number % 4}
        (await client.post(f"{API}/{made[-1]}/choose", json=body)).raise_for_status()
        await ready(client, made[-1])
        if number + 1 in (count // 4, count):
            (engine,) = server.engines()
            seen.append((number + 1, resident(server.process.pid), resident(engine)))
    weights = next(file.parent for file in (server.save_dir / "weights").glob("w*/optimizer.safetensors"))
    size = sum((weights / f"{name}.safetensors").stat().st_size for name in ("adapter_model", "optimizer"))
    (few, web_few, engine_few), (all_of, web_all, engine_all) = seen
    web, engine = (web_all - web_few) / (all_of - few), (engine_all - engine_few) / (all_of - few)
    print(f"\n{count} sessions, a choice learned from in each")
    print(f"  adapter and optimiser state of one             {size / 1e6:8.2f} MB")
    print(f"  a further session: engine                      {engine / 1e6:8.2f} MB, {engine / size:.2f} times as much")
    print(f"                     web process                 {web / 1e3:8.0f} kB")
    print(f"  in all: web {web_all / 1e6:.0f} MB, engine {engine_all / 1e6:.0f} MB")
    return made


async def crowd(server: Any, client: httpx.AsyncClient, sessions: list[str], reading: float, rounds: int) -> None:
    people = [Person(client, session, seed) for seed, session in enumerate(sessions)]
    await asyncio.gather(*(person.arrive() for person in people))
    health: list[float] = []

    async def look() -> None:
        while True:
            started = time.perf_counter()
            await client.get("/healthz")
            health.append(time.perf_counter() - started)
            await asyncio.sleep(0.2)

    async def stay(person: Person) -> None:
        for _ in range(rounds):
            await person.choose(reading)

    looking = asyncio.create_task(look())
    started = time.perf_counter()
    await asyncio.gather(*(stay(person) for person in people))
    seconds = time.perf_counter() - started
    looking.cancel()
    await asyncio.gather(*(person.leave() for person in people))
    first, whole = ([wait[at] for person in people for wait in person.waits] for at in (0, 1))
    own = [middle([wait[1] for wait in person.waits]) for person in people]
    print(f"\n{len(people)} people, {rounds} choices each, {reading:g} seconds of reading (half to one and a half)")
    print(f"  to the first new text         {middle(first) * 1000:7.0f} ms, 95 %: {late(first) * 1000:.0f}")
    print(f"  to all options                {middle(whole) * 1000:7.0f} ms, 95 %: {late(whole) * 1000:.0f}")
    print(f"  who waits longest and least   {max(own) / max(min(own), 1e-9):7.1f} times (medians)")
    print(f"  choices a second              {len(first) / seconds:7.2f}")
    print(f"  furthest place in the queue   {max(person.place for person in people):7d}")
    print(
        f"  /healthz meanwhile            {middle(health) * 1000:7.1f} ms, 95 %: {late(health) * 1000:.1f}", flush=True
    )


async def measure(chosen: argparse.Namespace) -> None:
    from tests.server import Server

    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), fake=False, TRELLIS_RATE_LIMIT="0", TRELLIS_ENGINE_CACHE_GB="4")
        try:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
                sessions = await many(server, client, chosen.sessions)
                for reading in map(float, chosen.reading.split(",")):
                    await crowd(server, client, sessions[: chosen.people], reading, chosen.rounds)
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reading", default="0,10,60", help="seconds, with commas")
    chosen = parser.parse_args()
    print(f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}")
    asyncio.run(measure(chosen))


if __name__ == "__main__":
    main()
