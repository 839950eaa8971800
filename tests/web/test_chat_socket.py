"""The socket of a room over the real server: who may open it, what it takes, what it tells, and what it survives."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.server import Server

pytestmark = pytest.mark.anyio

LONG = "say 900 words at 100 a second"


def new_room(client: httpx.Client, **about: Any) -> str:
    response = client.post("/api/rooms", json=about)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


@asynccontextmanager
async def line(server: Server, room: str, **about: Any) -> AsyncIterator[ClientConnection]:
    query = f"?after={about.pop('after')}" if "after" in about else ""
    url = f"{server.url.replace('http', 'ws')}/ws/chat/{room}{query}"
    async with websockets.connect(url, **about) as socket:
        yield socket


async def say(socket: ClientConnection, kind: str, **data: Any) -> None:
    await socket.send(json.dumps({"type": kind, **data}))


async def until(socket: ClientConnection, *kinds: str, seconds: float = 20) -> list[dict[str, Any]]:
    """All events up to the first of some kinds."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(seconds):
        while not events or events[-1]["type"] not in kinds:
            events.append(json.loads(await socket.recv()))
    return events


async def test_what_is_said_is_told_to_all_who_are_there(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as one, line(server, room) as other:
        (connected,) = await until(one, "connected")
        assert connected["room"]["id"] == room
        await until(other, "connected")
        await say(one, "send", text="Hello.", request="a-request")
        mine, theirs = await until(one, "done"), await until(other, "done")
        assert mine == theirs
        asked, answer = (event["message"] for event in mine if event["type"] == "message")
        assert (asked["text"], asked["request"]) == ("Hello.", "a-request")
        text = "".join(event["text"] for event in mine if event["type"] == "delta")
        usage = mine[-1]["usage"]
        assert {"prompt_tokens", "completion_tokens", "time_to_first_token_ms", "tokens_per_second",
                "context_used"} <= set(usage)  # fmt: skip
        numbers = [event["seq"] for event in mine]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        stored = client.get(f"/api/rooms/{room}").json()["messages"]
        assert [each["text"] for each in stored] == ["Hello.", text]
        assert stored[1]["id"] == answer["id"]


async def test_who_comes_back_is_told_what_they_missed(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        (connected,) = await until(socket, "connected")
        await say(socket, "send", text="say 30 words at 900 a second")
        events = await until(socket, "done")
    at = len(events) // 2
    async with line(server, room, after=events[at]["seq"]) as socket:
        await until(socket, "connected")
        assert await until(socket, "done") == events[at + 1 :]
        await say(socket, "sync", after=connected["last"])
        assert await until(socket, "done") == events
        await say(socket, "sync", after=1)
        told = await until(socket, "message") + await until(socket, "message")
        assert [event["message"]["role"] for event in told] == ["user", "assistant"]
        assert told[1]["message"]["text"] == "".join(each["text"] for each in events if each["type"] == "delta")


async def test_stop_is_quick_and_says_so(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await say(socket, "send", text=LONG)
        await until(socket, "delta")
        await say(socket, "stop")
        stopped = (await until(socket, "stopped"))[-1]
        assert stopped["state"] == "stopped"
        words = stopped["usage"]["completion_tokens"]
        await asyncio.sleep(0.1)
        await say(socket, "ping")
        assert [event["type"] for event in await until(socket, "pong")] == ["pong"]
        stored = client.get(f"/api/rooms/{room}").json()["messages"][-1]
        assert len(stored["text"].split()) == words < 900


async def test_all_that_can_be_done_with_a_message(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await say(socket, "send", text="Hello.")
        events = await until(socket, "done")
        asked, answer = (event["message"]["id"] for event in events if event["type"] == "message")
        await say(socket, "regenerate", message=answer)
        again = (await until(socket, "done"))[0]
        assert again["message"]["parent"] == asked
        await say(socket, "choose", message=answer)
        assert (await until(socket, "message"))[-1]["head"] == answer
        await say(socket, "rate", message=answer, rating=1)
        assert (await until(socket, "message"))[-1]["message"]["rating"] == 1
        await say(socket, "edit", message=asked, text="Good evening.")
        await until(socket, "done")
        await say(socket, "send", text=LONG)
        await until(socket, "delta")
        await say(socket, "stop")
        stopped = (await until(socket, "stopped"))[-1]
        await say(socket, "go_on", message=stopped["message"])
        await until(socket, "delta")
        await say(socket, "stop")
        await until(socket, "stopped")


BAD = [
    ("{", "bad_json", None), ("[]", "unknown_type", "type"), ("null", "unknown_type", "type"),
    ('{"type": "shout"}', "unknown_type", "type"), ('{"type": ["send"]}', "unknown_type", "type"),
    ('{"type": "send"}', "invalid", "text"), ('{"type": "send", "text": 5}', "invalid", "text"),
    ('{"type": "send", "text": "\\ud800"}', "invalid", "text"), ('{"type": "send", "text": ""}', "invalid", "text"),
    ('{"type": "send", "text": "x", "more": 1}', "invalid", "more"), ("[" * 100_000, "bad_json", None),
    ('{"type": "send", "text": "x", "sampling": {"temperature": 99}}', "invalid", "sampling.temperature"),
    ('{"type": "send", "text": "x", "model": "nobody"}', "model_not_found", "model"),
    ('{"type": "send", "text": "x", "parent": "nothing"}', "not_found", "message"),
    ('{"type": "send", "text": "x", "attachments": ["nothing"]}', "not_found", "files"),
    ('{"type": "edit", "message": "nothing", "text": "x"}', "not_found", "message"),
    ('{"type": "\\ud800"}', "unknown_type", "type"),
    (json.dumps({"type": "ping"} | {f"k{number}": 1 for number in range(5000)}), "invalid", ""),
    (json.dumps({"type": "send", "text": "x", "sampling": {f"k{n}": 1 for n in range(5000)}}), "invalid", ""),
    ('{"type": "sync", "after": -1}', "invalid", "after"), ('{"type": "rate", "message": "x"}', "invalid", "rating"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "code", "field"), BAD)
async def test_bad_input_is_said_and_nothing_is_lost(
    server: Server, client: httpx.Client, text: str, code: str, field: str | None
) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await until(socket, "connected")
        await socket.send(text)
        (told,) = await until(socket, "error")
        assert told["error"]["code"] == code
        assert told["error"]["field"] == field
        assert told["error"]["next_step"]
        await say(socket, "ping")
        await until(socket, "pong")
    assert client.get(f"/api/rooms/{room}").json()["messages"] == []


async def test_bytes_are_refused_in_words(server: Server, client: httpx.Client) -> None:
    async with line(server, new_room(client)) as socket:
        await until(socket, "connected")
        await socket.send(b"\x00\x01")
        assert (await until(socket, "error"))[-1]["error"]["code"] == "bad_json"


async def test_a_message_of_a_megabyte_is_refused_and_a_larger_frame_ends_the_line(
    server: Server, client: httpx.Client
) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await until(socket, "connected")
        await say(socket, "send", text="x" * 1_000_000)
        assert (await until(socket, "error"))[-1]["error"]["field"] == "text"
        with pytest.raises(ConnectionClosed) as closed:
            await asyncio.gather(socket.send("x" * 100_000_000), socket.recv())
        assert closed.value.rcvd is None or closed.value.rcvd.code == 1009
    assert client.get("/healthz").status_code == 200


async def test_a_room_that_is_not_there_is_said(server: Server) -> None:
    for name in ("r0000000000000000", "%2e%2e", "x" * 300):
        async with line(server, name) as socket:
            (told,) = await until(socket, "error")
            assert told["error"]["code"] == "not_found"
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 4404


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
async def test_another_site_cannot_open_it(server: Server, client: httpx.Client, headers: dict[str, str]) -> None:
    room = new_room(client)
    with pytest.raises(InvalidStatus) as refused:
        async with line(server, room, additional_headers=headers):
            pass
    assert refused.value.response.status_code == 403


async def test_a_flood_over_one_line_is_refused_then_cut_off(server: Server, client: httpx.Client) -> None:
    async with line(server, new_room(client)) as socket:
        await until(socket, "connected")
        for _ in range(50):
            await say(socket, "ping")
        told = (await until(socket, "error"))[-1]
        assert told["error"]["code"] == "too_many_requests"
        with pytest.raises(ConnectionClosed) as closed:
            await flood(socket)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
    assert client.get("/healthz").status_code == 200


async def flood(socket: ClientConnection) -> None:
    for _ in range(2000):
        await say(socket, "ping")
        await asyncio.wait_for(socket.recv(), 5)


async def test_asking_for_much_is_counted_for_each_person(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_RATE_LIMIT="3")
    try:
        with server.client() as client:
            room = new_room(client)
        async with line(server, room) as socket:
            for _ in range(2):
                await say(socket, "send", text="Hello.")
                await until(socket, "done")
            await say(socket, "send", text="Hello.")
            assert (await until(socket, "error"))[-1]["error"]["code"] == "too_many_requests"
    finally:
        server.stop()


async def test_a_login_is_wanted_and_its_end_ends_the_line(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD="correct horse")
    try:
        with server.client(follow_redirects=False) as client:
            client.post("/login", data={"password": "correct horse"})
            room = new_room(client)
            cookie = f"trellis={client.cookies['trellis']}"
            for headers in ({}, {"Cookie": "trellis=wrong"}):
                with pytest.raises(InvalidStatus) as refused:
                    async with line(server, room, additional_headers=headers):
                        pass
                assert refused.value.response.status_code == 403
            async with line(server, room, additional_headers={"Cookie": cookie}) as socket:
                await until(socket, "connected")
                client.post("/logout")
                started = time.monotonic()
                with pytest.raises(ConnectionClosed):
                    await asyncio.wait_for(socket.recv(), 5)
                assert time.monotonic() - started < 5
    finally:
        server.stop()


async def test_a_reader_who_stops_reading_slows_nobody(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room, max_queue=1) as stuck, line(server, room) as socket:
        await say(socket, "send", text="say 900 words at 9000 a second")
        events = await until(socket, "done")
        text = "".join(event["text"] for event in events if event["type"] == "delta")
        assert len(text.split()) == 900
        told = await until(stuck, "done")
        assert "".join(event["text"] for event in told if event["type"] == "delta") == text


async def test_two_people_edit_and_send_at_once(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as one, line(server, room) as other:
        await say(one, "send", text="Hello.")
        asked = next(event for event in await until(one, "done") if event["type"] == "message")["message"]["id"]
        await until(other, "done")
        await asyncio.gather(
            say(one, "edit", message=asked, text="From one."), say(other, "edit", message=asked, text="From the other.")
        )
        for socket in (one, other):
            await until(socket, "done")
            await until(socket, "done")
    texts = {each["text"] for each in client.get(f"/api/rooms/{room}").json()["messages"] if each["role"] == "user"}
    assert texts == {"Hello.", "From one.", "From the other."}


async def test_a_deleted_room_says_goodbye(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await until(socket, "connected")
        client.delete(f"/api/rooms/{room}")
        assert (await until(socket, "closed"))[-1]["reason"] == "deleted"


async def test_ctrl_c_ends_the_server_with_many_connected(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with server.client() as client:
        room = new_room(client)
    sockets = [await websockets.connect(f"{server.url.replace('http', 'ws')}/ws/chat/{room}") for _ in range(50)]
    await say(sockets[0], "send", text=LONG)
    await until(sockets[0], "delta")
    assert await asyncio.to_thread(server.stop) == 0
    assert "Traceback" not in server.output, server.output
    for socket in sockets:
        await socket.close()


async def test_kill_9_in_mid_answer_loses_little_and_shows_it(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with server.client() as client:
        room = new_room(client)
    async with line(server, room) as socket:
        await say(socket, "send", text=LONG)
        seen = ""
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            event = json.loads(await socket.recv())
            seen += event["text"] if event["type"] == "delta" else ""
        server.kill()
    server.start()
    try:
        with server.client() as client:
            answer = client.get(f"/api/rooms/{room}").json()["messages"][-1]
            assert answer["state"] == "interrupted"
            assert seen.startswith(answer["text"]) or answer["text"].startswith(seen)
            assert len(answer["text"]) > len(seen) * 0.3, "it was written down every two seconds"
        async with line(server, room) as socket:
            await say(socket, "go_on", message=answer["id"])
            more = (await until(socket, "delta"))[-1]
            assert more["at"] == len(answer["text"])
            await say(socket, "stop")
            await until(socket, "stopped")
    finally:
        server.stop()


async def test_the_api_of_rooms(client: httpx.Client) -> None:
    room = new_room(client, title="Mine", system="Be brief.", models=["demo"], sampling={"temperature": 0.2})
    assert client.patch(f"/api/rooms/{room}", json={"title": "Yours", "archived": True}).json()["archived"] is True
    assert room in [each["id"] for each in client.get("/api/rooms?archived=true").json()]
    assert room not in [each["id"] for each in client.get("/api/rooms").json()]
    sent = client.post(f"/api/rooms/{room}/messages", json={"text": "Hello."}, headers={"idempotency-key": "the key"})
    again = client.post(f"/api/rooms/{room}/messages", json={"text": "Hello."}, headers={"idempotency-key": "the key"})
    assert sent.status_code == again.status_code == 202
    assert sent.json() == again.json()
    wait(lambda: not client.get(f"/api/rooms/{room}").json()["growing"])
    state = client.get(f"/api/rooms/{room}").json()
    assert [each["role"] for each in state["messages"]] == ["user", "assistant"]
    for format in ("json", "markdown", "open-webui"):
        response = client.get(f"/api/rooms/{room}/export?format={format}")
        ending = {"json": "json", "markdown": "md", "open-webui": "open-webui.json"}[format]
        assert f'attachment; filename="yours.{ending}"' in response.headers["content-disposition"]
        made = client.post("/api/rooms/import", content=response.content)
        assert made.status_code == 201, made.text
    assert client.delete(f"/api/rooms/{room}").status_code == 204
    assert client.get(f"/api/rooms/{room}").status_code == 404


def test_an_import_tells_what_it_left_out(client: httpx.Client) -> None:
    good = {"title": "The good one", "messages": [{"role": "user", "content": "Hello."},
                                                  {"role": "tool", "content": "42"}]}  # fmt: skip
    bad = {"title": "The bad <b>one</b>", "messages": [{"role": "user", "content": 7}]}
    files = {"file": ("chats.json", json.dumps([good, bad]).encode())}
    page = client.post("/chat/import", files=files)
    assert page.status_code == 200
    assert "Imported 1 chat, skipped 1" in page.text
    assert "“The bad &lt;b&gt;one&lt;/b&gt;”: message 1 isn&#39;t text or a list of parts." in page.text
    assert "“The good one”: 1 message of the role “tool” was left out." in page.text
    told = client.post("/api/rooms/import", content=json.dumps([good, bad])).json()
    assert [room["title"] for room in told["rooms"]] == ["The good one"]
    assert (len(told["left_out"]), len(told["notes"])) == (1, 1)


def test_a_long_message_from_a_form_comes_back_with_the_reason(client: httpx.Client) -> None:
    text = "word " * 30_004 + "last"
    room = new_room(client)
    for place in ("/chat", f"/chat/{room}/send"):
        page = client.post(place, data={"text": text, "models": "demo"})
        assert page.status_code == 422
        assert "150,024 characters; the limit is 100,000" in page.text
        assert text in page.text, "all of it"


def test_a_file_is_checked_before_there_is_a_room(client: httpx.Client) -> None:
    rooms = client.get("/api/rooms").json()
    picture = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    good = client.post("/api/rooms/new/files?name=a.md&model=demo", content=b"What I noted.")
    assert good.json() == {"name": "a.md", "kind": "text", "bytes": 13, "characters": 13}
    assert client.post("/api/rooms/new/files?name=a.bin", content=b"\x00").json()["error"]["code"] == "bad_file"
    refused = client.post("/api/rooms/new/files?name=a.png&model=demo", content=picture)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "cannot_see")
    assert client.get("/api/rooms").json() == rooms
    room = new_room(client)
    assert client.post(f"/api/rooms/{room}/files?name=a.png&model=demo", content=picture).status_code == 422
    assert client.post(f"/api/rooms/{room}/files?name=a.png", content=picture).status_code == 201


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_what_is_sent_again_is_told_again_and_said_once(server: Server, client: httpx.Client) -> None:
    room = new_room(client)
    async with line(server, room) as socket:
        await say(socket, "send", text="Hello.", request="the-request")
        first = await until(socket, "done")
        asked = next(event for event in first if event["type"] == "message")
        await say(socket, "send", text="Hello.", request="the-request")
        again = (await until(socket, "message"))[-1]
        assert again["message"]["id"] == asked["message"]["id"]
    assert len(client.get(f"/api/rooms/{room}").json()["messages"]) == 2


async def test_a_refusal_names_the_command_that_it_refuses(server: Server, client: httpx.Client) -> None:
    async with line(server, new_room(client)) as socket:
        for command in ({"text": 5}, {"text": "x", "model": "nobody"}, {"text": "x", "attachments": [None]}):
            await say(socket, "send", request="the-request", **command)
            assert (await until(socket, "error"))[-1]["request"] == "the-request"


async def test_a_flood_of_mistakes_is_told_in_few_words(server: Server, client: httpx.Client) -> None:
    async with line(server, new_room(client)) as socket:
        await until(socket, "connected")
        await say(socket, "send", text="x", model=[1] * 300_000)
        told = await socket.recv()
        assert len(told) < 20_000


async def test_a_socket_where_none_is_is_refused_before_the_login_too(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD="correct horse")
    try:
        for path in ("/v1/chat/completions", "/api/rooms", "/"):
            with pytest.raises(InvalidStatus) as refused:
                async with websockets.connect(server.url.replace("http", "ws") + path):
                    pass
            assert refused.value.response.status_code == 403
    finally:
        server.stop()
    assert "Traceback" not in server.output, server.output
