"""A thousand people in rooms: how fast they get in, what each costs, and how long a word is under way to them.

The real server with a password, on loopback, with the fake engine, whose words are the time at which they were drawn.
Clients are as small as can be (a protocol that looks for the time in what comes), in a process of their own, so that
what is measured is the server. Prints a table; `--people` and `--seconds` make it shorter.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the server that tests start is the one that is measured

from tests.server import Server  # noqa: E402

PASSWORD = "correct horse"
RATE = 10
STAMP = re.compile(rb'"text":" (\d+\.\d+)"')


class Listener(asyncio.Protocol):
    """One socket: the handshake, then every word's time under way."""

    def __init__(self, host: str, path: str, cookie: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.hello = (
            f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nCookie: {cookie}\r\n\r\n"
        ).encode()
        self.opened: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.latencies: list[float] = []
        self.first = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.started = time.monotonic()
        transport.write(self.hello)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.opened.done():
            if b'"connected"' in data:
                self.opened.set_result(now - self.started)
            elif b" 403 " in data[:20]:
                self.opened.set_exception(RuntimeError("refused"))
            return
        place = data.find(b'"type":"delta"')
        while place >= 0:
            if stamp := STAMP.search(data, place, place + 300):
                self.latencies.append(now - float(stamp[1]))
            place = data.find(b'"type":"delta"', place + 20)
        if b'"type":"done"' in data and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError("the server closed the line"))
        self.done.cancel()


async def connect(server: Server, room: str, cookie: str) -> Listener:
    host, port = server.url.removeprefix("http://").split(":")
    _, listener = await asyncio.get_running_loop().create_connection(
        lambda: Listener(f"{host}:{port}", f"/ws/chat/{room}", cookie), host, int(port)
    )
    await listener.opened
    return listener


def percent(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def line(what: str, values: list[float]) -> str:
    each = [
        value * 1000 for value in (statistics.median(values), percent(values, 0.95), percent(values, 0.99), max(values))
    ]
    return f"{what:<58}" + "".join(f"{value:9.1f}" for value in each)


async def words(client: httpx.AsyncClient, rooms: list[str], listeners: list[Listener], seconds: float) -> list[float]:
    """How long words were under way when all of some rooms are answered at once, ten words a second each."""
    for listener in listeners:
        listener.latencies.clear()
        listener.done = asyncio.get_running_loop().create_future()
    text = f"say {int(seconds * RATE)} times at {RATE} a second"
    for room in rooms:
        (await client.post(f"/api/rooms/{room}/messages", json={"text": text})).raise_for_status()
    await asyncio.wait_for(asyncio.gather(*(listener.done for listener in listeners)), seconds + 120)
    return [latency for listener in listeners for latency in listener.latencies]


async def measure(server: Server, people: int, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        await client.post("/login", data={"password": PASSWORD})
        cookie = f"trellis={client.cookies['trellis']}"

        async def new_room() -> str:
            return str((await client.post("/api/rooms", json={})).json()["id"])

        process = psutil.Process(server.process.pid)
        one = await new_room()
        first = await connect(server, one, cookie)
        (await client.post(f"/api/rooms/{one}/messages", json={"text": "Hello."})).raise_for_status()
        await first.done  # the engine is there, and all that is imported late
        print(f"{'milliseconds':<58}{'median':>9}{'95 %':>9}{'99 %':>9}{'worst':>9}")

        before = process.memory_info().rss
        together = []
        for _ in range(people):
            together.append(await connect(server, one, cookie))
        print(line(f"handshake with sign-in, {people} one after another", [each.opened.result() for each in together]))
        each = (process.memory_info().rss - before) / people
        health: list[float] = []

        async def ask_health() -> None:
            while True:
                started = time.monotonic()
                await client.get("/healthz")
                health.append(time.monotonic() - started)
                await asyncio.sleep(0.05)

        asking = asyncio.create_task(ask_health())
        latencies = await words(client, [one], [*together, first], seconds)
        print(line(f"a word to {people} listeners in one room, {RATE} a second", latencies))
        asking.cancel()
        bare = await floor(people, seconds)
        print(line("the same from a server that only writes", bare))
        ratio = statistics.median(latencies) / statistics.median(bare)
        print(line("/healthz meanwhile", health))
        busy = (process.memory_info().rss - before) / people
        for listener in together:
            listener.transport.close()
        await asyncio.sleep(1)

        rooms = [await new_room() for _ in range(10)]
        spread = [await connect(server, rooms[place % len(rooms)], cookie) for place in range(people)]
        latencies = await words(client, rooms, spread, seconds)
        print(line(f"a word to {people} listeners in {len(rooms)} rooms, {RATE} a second each", latencies))
        for listener in spread:
            listener.transport.close()
        await asyncio.sleep(1)
        alone = await connect(server, rooms[0], cookie)
        print(line("a word to one listener alone", await words(client, rooms[:1], [alone], seconds)))
        print(
            line(
                f"first byte of an answer by /v1, {people // 10} one after another",
                await first_bytes(client, people // 10),
            )
        )
        print(f"in one room {ratio:.1f} times what a server takes that only writes")
        print(f"memory of a socket: {each / 1024:.0f} KiB idle, {busy / 1024:.0f} KiB after words")

        await many(server, one, cookie, people)
        started = time.monotonic()
    code = await asyncio.to_thread(server.stop)
    print(f"Ctrl-C with {people} connected: {time.monotonic() - started:.1f} s, exit code {code}")


FLOOR = f"""
import asyncio, base64, hashlib, time
from trellis.web.broadcast import text_frame
lines = []
class Line(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        if data.startswith(b"GET"):
            key = data.split(b"Sec-WebSocket-Key: ")[1].split(b"\\r")[0] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key).digest())
            hello = b"HTTP/1.1 101 Switching Protocols\\r\\nSec-WebSocket-Accept: " + accept
            self.transport.write(hello + b"\\r\\n\\r\\n")
            self.transport.write(text_frame('{{"type":"connected"}}'))
            lines.append(self.transport)
async def main():
    server = await asyncio.get_running_loop().create_server(Line, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while True:
        await asyncio.sleep(1 / {RATE})
        about = '{{"type":"delta","seq":1795716105653,"message":"m7069d184bf1727d8","text":" %.6f","at":18}}'
        frame = text_frame(about % time.monotonic())
        for each in lines:
            each.write(frame)
asyncio.run(main())
"""
"""A server that does nothing but write the same frames to the same sockets: what there is to be had here."""


async def floor(people: int, seconds: float) -> list[float]:
    """How long words are under way from a server that only writes them."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", FLOOR, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    port = int(await process.stdout.readline())
    listeners = []
    for _ in range(people):
        _, listener = await asyncio.get_running_loop().create_connection(
            lambda: Listener("127.0.0.1", "/", ""), "127.0.0.1", port
        )
        await listener.opened
        listeners.append(listener)
    for listener in listeners:
        listener.latencies.clear()
    await asyncio.sleep(seconds)
    process.kill()
    await process.wait()
    return [latency for listener in listeners for latency in listener.latencies]


async def many(server: Server, room: str, cookie: str, people: int) -> list[Listener]:
    return [await connect(server, room, cookie) for _ in range(people)]


async def first_bytes(client: httpx.AsyncClient, count: int) -> list[float]:
    found = []
    body = {"model": "demo", "messages": [{"role": "user", "content": "say 1 words at 1000 a second"}], "stream": True}
    key = (await client.post("/api/keys", json={"name": "bench"})).json()["key"]
    for _ in range(count):
        started = time.monotonic()
        headers = {"authorization": f"Bearer {key}"}
        async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
            async for _ in response.aiter_bytes():
                found.append(time.monotonic() - started)
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), TRELLIS_PASSWORD=PASSWORD, TRELLIS_RATE_LIMIT="0")
        try:
            asyncio.run(measure(server, arguments.people, arguments.seconds))
        finally:
            if server.process.poll() is None:
                server.stop()
            if "Traceback" in server.output:
                print(json.dumps(server.output[-2000:]))


if __name__ == "__main__":
    main()
