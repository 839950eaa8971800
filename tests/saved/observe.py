"""What a studio on the saved folder shows, and what it does when one goes on with it: as JSON, over HTTP and sockets.

Only names that are fixed are used here: addresses, fields, tables. `make.py` writes down what the version that made the
folder says, `tests/faults/test_saved.py` asks the present one the same.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import sqlite3
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from tests.processor import describe_processor
from tests.server import Server, read_events, wait_ready

HERE = Path(__file__).parent
ARCHIVE = HERE / "v0-save-folder.tar.xz"
EXPECTED = HERE / "expected.json"
PASSWORD = "an old password"
ENVIRONMENT = {
    "TRELLIS_PASSWORD": PASSWORD,
    "TRELLIS_RATE_LIMIT": "0",
    "TRELLIS_FORESIGHT": "off",
    "TRELLIS_ENGINE_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
STEERING = "/api/steering/sessions"
LAYOUTS = ("raw", "trl-preference", "trl-unpaired", "openai-dpo")
UPLOAD = {"kind": "prompts", "name": "half.txt", "files": [{"path": "half.txt", "bytes": 20}], "mark": "one"}
HALF, OTHER_HALF = b"What is a\n", b"What is b\n"

Json = dict[str, Any]


def unpack(folder: Path) -> None:
    """The saved folder as if it had been used just now: what is a week old is forgotten on purpose."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    for each in [folder, *folder.rglob("*")]:
        os.utime(each)
    with closing(sqlite3.connect(folder / "trellis.db")) as database, database:
        database.execute("UPDATE logins SET created = ?", (time.time(),))


@contextmanager
def studio(folder: Path, cookie: str) -> Iterator[tuple[Server, httpx.Client]]:
    server = Server(folder, fake=False, **ENVIRONMENT)
    try:
        with server.client(cookies={"trellis": cookie}) as client:
            client.timeout = httpx.Timeout(60)
            yield server, client
    finally:
        server.stop()
    assert "Traceback" not in server.output, server.output


def got(response: httpx.Response) -> Any:
    assert response.status_code < 300, (response.request.url, response.text)
    return response.json() if response.content else None


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@contextmanager
def socket_of(server: Server, client: httpx.Client, room: str) -> Iterator[ClientConnection]:
    cookie = {"Cookie": f"trellis={client.cookies['trellis']}"}
    with connect(f"{server.url.replace('http', 'ws')}/ws/chat/{room}", additional_headers=cookie) as socket:
        yield socket


def told(socket: ClientConnection, *kinds: str, count: int = 1) -> list[Json]:
    """All events up to the last of so many of some kinds."""
    events: list[Json] = []
    while sum(event["type"] in kinds for event in events) < count:
        events.append(json.loads(socket.recv(timeout=60)))
        assert events[-1]["type"] != "error" or "error" in kinds, events[-1]
    return events


def until(look: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def finished(client: httpx.Client, job: Json) -> Json:
    """A job once it has ended well."""
    found: Json = until(
        lambda: (at := got(client.get(f"/api/jobs/{job['id']}")))["state"] not in ("queued", "running") and at
    )
    assert found["state"] == "done", found["error"]
    return found


def settled(client: httpx.Client, session: str) -> Json:
    """The state of a session once a person can choose and the control prompt is answered."""

    def whole() -> Json | None:
        state = wait_ready(client, session, 60)
        return None if state["control"] and state["control"]["current"] is None else state

    found: Json = until(whole)
    return found


def chosen(client: httpx.Client, session: str, choice: Any) -> Json:
    """Choose, and wait until the next options are there: the state then."""
    before, url = settled(client, session), f"{STEERING}/{session}"
    got(client.post(f"{url}/choose", json={"offer": before["offer"]["id"], "choice": choice}))
    until(lambda: got(client.get(url))["head"]["node"] != before["head"]["node"])
    return settled(client, session)


def rows_of(folder: Path, tables: dict[str, list[str]] | None = None) -> dict[str, list[Json]]:
    """All rows of the database, in the order of their keys. With `tables`, only these and their columns."""
    with closing(sqlite3.connect(f"file:{folder / 'trellis.db'}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        if tables is None:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            tables = {name: [row["name"] for row in database.execute(f"PRAGMA table_info({name})")] for name in names}
        found: dict[str, list[Json]] = {}
        for table, columns in sorted(tables.items()):
            listed = ", ".join(f'"{column}"' for column in columns)
            rows = [dict(row) for row in database.execute(f'SELECT {listed} FROM "{table}"')]
            if table == "logins":
                rows = [row | {"created": 0} for row in rows]
            found[table] = sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))
    return found


def columns_of(rows: dict[str, list[Json]]) -> dict[str, list[str]]:
    return {table: list(found[0]) for table, found in rows.items() if found}


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two JSON values differ, each place with what stands there."""
    if isinstance(one, dict) and isinstance(other, dict):
        odd = [f"{place}/{name}: is gone" for name in one if name not in other]
        odd += [f"{place}/{name}: was not there" for name in other if name not in one]
        both = [name for name in one if name in other]
        return odd + [each for name in both for each in differences(one[name], other[name], f"{place}/{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [each for number, (a, b) in pairs for each in differences(a, b, f"{place}/{number}")]
    return [] if one == other and type(one) is type(other) else [f"{place}: {one!r} != {other!r}"[:600]]


# ── What it shows ──────────────────────────────────────────────────────────────────────────────────


def shown(server: Server, client: httpx.Client, key: str) -> Any:
    """What a studio that was just started says of all that is saved. Nothing of it changes what is saved."""
    steering = {state["id"]: session(client, state["id"]) for state in got(client.get(STEERING))}
    rooms = got(client.get("/api/rooms")) + got(client.get("/api/rooms", params={"archived": True}))
    found = {
        "sessions": got(client.get(STEERING)),
        "steering": steering,
        "defaults": got(client.get("/api/steering/defaults")),
        "files": got(client.get("/api/steering/files")),
        "rooms": rooms,
        "found": got(client.get("/api/rooms", params={"q": "MOSS"})),
        "chat": {each["id"]: room(server, client, each["id"]) for each in rooms},
        "prompts": got(client.get("/api/rooms/prompts")),
        "speakers": got(client.get("/api/rooms/speakers")),
        "keys": got(client.get("/api/keys")),
        "remotes": got(client.get("/api/remotes")),
        "jobs": [each | {"ended": list(stream(client, f"/api/jobs/{each['id']}/events"))}
                 for each in got(client.get("/api/jobs"))],
        "exports": got(client.get("/api/exports")),
        "zip": zip_of(client.get("/api/exports/oak-adapter/zip").content),
        "models": [{name: each[name] for name in ("id", "kind", "source")} | {"names": sorted(each)}
                   for each in got(client.get("/api/models"))],
        "upload": got(client.post("/api/uploads", json=UPLOAD)),
        "v1": [each["id"] for each in got(client.get("/v1/models", headers=bearer(key)))["data"]],
        "local servers": json.loads((server.save_dir / "local-servers.json").read_text()),
    }  # fmt: skip
    for state in found["sessions"]:
        steering[state["id"]]["event"] = first_event(client, state["id"])
    return json.loads(json.dumps(found).replace(str(server.save_dir), "{save}"))


WORDS = {"journal", "label", "notes", "what"}
"""Fields of what is shown that are sentences for people, made when they are asked for."""


def words_apart(value: Any, words: Json, place: str = "") -> Any:
    """A JSON value without the words that people read, which are put into `words` by their places."""
    if isinstance(value, list):
        return [words_apart(each, words, f"{place}/{number}") for number, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    read = {name for name in WORDS & value.keys() if isinstance(value[name], str | list)}
    words |= {f"{place}/{name}": value[name] for name in read}
    return {name: words_apart(each, words, f"{place}/{name}") for name, each in value.items() if name not in read}


def session(client: httpx.Client, session_id: str) -> Json:
    url = f"{STEERING}/{session_id}"
    state = at_rest(got(client.get(url)))
    trials = got(client.get(f"{url}/blind"))
    return {
        "state": state,
        "tree": got(client.get(f"{url}/tree")),
        "journal": client.get(f"{url}/journal").text,
        "choices": {name: lines_of(client.get(f"{url}/choices", params={"format": name})) for name in LAYOUTS},
        "fits": got(client.get(f"{url}/fits")),
        "blind": trials,
        "trials": [got(client.get(f"{url}/blind/{each['id']}")) for each in trials if each["state"] == "done"],
        "preview": got(client.post("/api/steering/preview", json={"dataset": state["config"]["dataset"]})),
        "versions": got(client.get(f"/api/rooms/speakers/{session_id}/versions")),
    }


def first_event(client: httpx.Client, session_id: str) -> Json:
    name, data = next(stream(client, f"{STEERING}/{session_id}/events"))
    return {"name": name, "data": at_rest(data)}


def at_rest(state: Json) -> Json:
    """The state of a session without what its engine is at."""
    return {name: value for name, value in state.items() if name not in ("engine", "load", "queue")}


def fields_of(data: Json) -> Json:
    """The names of the fields of an event, and of those within them."""
    return {name: sorted(value) if isinstance(value, dict) else None for name, value in data.items()}


@contextmanager
def followed(client: httpx.Client, session: str, names: Json) -> Iterator[None]:
    """Within this a page is open: `names` are the fields of each event that it is sent until the step is whole."""
    begun = threading.Event()
    whole = {"state", "learning", "node_added", "head_moved", "offer_started", "option_delta", "offer_ready", "control",
             "assessed"}  # fmt: skip

    def follow() -> None:
        for name, data in stream(client, f"{STEERING}/{session}/events"):
            begun.set()
            if name in whole:
                names[name] = fields_of(data)
            if whole == set(names):
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    assert begun.wait(60)
    yield
    thread.join(60)
    assert whole == set(names)


def stream(client: httpx.Client, url: str) -> Iterator[tuple[str, Any]]:
    with client.stream("GET", url) as response:
        for _, name, data in read_events(response):
            yield name, data


def lines_of(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def room(server: Server, client: httpx.Client, room_id: str) -> Json:
    url = f"/api/rooms/{room_id}"
    state = got(client.get(url))
    assert state.pop("last") > 0
    with socket_of(server, client, room_id) as socket:
        (connected,) = told(socket, "connected")
        socket.send(json.dumps({"type": "sync", "after": 0}))
        events = [connected, *told(socket, "message", count=len(state["messages"]))]
    for event in events:
        assert event.pop("seq") > 0
    assert connected.pop("last") > 0
    names = [file for message in state["messages"] for file in message["files"]]
    files = {file["id"]: client.get(f"{url}/files/{file['id']}") for file in names}
    return {
        "state": state,
        "events": events,
        "json": client.get(f"{url}/export", params={"format": "json"}).json(),
        "open-webui": client.get(f"{url}/export", params={"format": "open-webui"}).json(),
        "markdown": client.get(f"{url}/export", params={"format": "markdown"}).text,
        "files": {
            file_id: [each.headers["content-disposition"], base64.b64encode(each.content).decode()]
            for file_id, each in files.items()
        },
    }


def zip_of(content: bytes) -> dict[str, int]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # The card names the version and the place of the model.
        return {each.filename: each.CRC for each in archive.infolist() if each.filename.endswith(".safetensors")}


# ── What can be called ─────────────────────────────────────────────────────────────────────────────


def interface(client: httpx.Client) -> Json:
    """Addresses, parameters and bodies of the JSON API, pages, and their forms; without words for people."""
    described = got(client.get("/openapi.json"))
    schemas = described["components"]["schemas"]
    paths = {
        f"{method} {re.sub(r'{[^}]*}', '{}', path)}": {
            "parameters": [
                {"name": each["name"], "in": each["in"], "required": each.get("required", False)}
                | {"schema": plain(each["schema"], schemas)}
                for each in about.get("parameters", [])
                if each["in"] != "path"
            ],
            "body": plain(about.get("requestBody", {}).get("content", {}), schemas),
            "statuses": sorted(about["responses"]),
        }
        for path, methods in described["paths"].items()
        for method, about in methods.items()
    }
    schema = got(client.get("/api/steering/schema"))
    pages, forms = {}, Forms()
    for place in sorted(places(client)):
        page = client.get(place)
        pages[place] = page.status_code
        forms.feed(page.text)
    return {
        "paths": paths,
        "options": plain(schema, schema.get("$defs", {})),
        "pages": pages,
        "forms": {form: sorted(names) for form, names in forms.found.items()},
    }


def places(client: httpx.Client) -> list[str]:
    """The addresses of pages: of all, and of each session, comparison and room."""
    found = ["/", "/new", "/chat", "/connections", "/models", "/models/cards"]
    for state in got(client.get(STEERING)):
        place = f"/steer/{state['id']}"
        found += [place, *(f"{place}/{name}" for name in ("review", "exports", "compare", "blind", "log"))]
        trials = got(client.get(f"{STEERING}/{state['id']}/blind"))
        found += [f"{place}/blind/{each['id']}" for each in trials]
    for each in got(client.get("/api/rooms")):
        found += [f"/chat/{each['id']}", f"/chat/{each['id']}/thread"]
    return found


class Forms(HTMLParser):
    """The forms of pages: where each is sent, with the names of its fields."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = {}
        self._ids: dict[str, str] = {}
        self._form = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        about = dict(attributes)
        if tag == "form":
            action = re.sub(r"/[a-z][0-9a-f]{16,32}(?=/|$)", "/{}", about.get("action") or "")
            self._form = f"{about.get('method') or 'get'} {action}"
            self.found.setdefault(self._form, set())
            if name := about.get("id"):
                self._ids[name] = self._form
        form = self._ids.get(about.get("form") or "", self._form)
        if tag in ("input", "select", "textarea", "button") and form and (name := about.get("name")):
            self.found[form].add(name)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = ""


def plain(schema: Any, known: Json) -> Any:
    """A JSON schema without words for people and without names of classes."""
    if isinstance(schema, list):
        return [plain(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return plain(known[schema["$ref"].rsplit("/", 1)[1]], known)
    found = {}
    for name, value in schema.items():
        if name in ("properties", "content"):
            found[name] = {each: plain(about, known) for each, about in value.items()}
        elif name not in ("title", "description", "group", "unit", "advanced", "$defs", "discriminator"):
            found[name] = plain(value, known)
    return found


# ── What it does when one goes on ──────────────────────────────────────────────────────────────────


def gone_on(server: Server, client: httpx.Client, key: str) -> Json:
    """Go on with what is saved. `ids` must be the same on any machine, `texts` on the processor that made them."""
    sessions = {state["name"]: state["id"] for state in got(client.get(STEERING))}
    oak, elm = sessions["Oak"], sessions["Elm"]
    weights = server.save_dir / "weights"
    ids: Json = {}
    texts: Json = {"processor": describe_processor()}

    # Each session goes to its deepest step, whose weights are not on disk: they are made again.
    nodes = {each["id"]: each for each in rows_of(server.save_dir)["nodes"]}
    before = {place.name for place in weights.iterdir()}
    ids["missing"] = sorted({node["weights"] for node in nodes.values()} - before)
    for session_id in (oak, elm):
        own = [node for node in nodes.values() if node["session"] == session_id and node["weights"] not in before]
        deepest = max((node for node in own if node["shown"]), key=lambda node: (node["step"], node["created"]))
        got(client.post(f"{STEERING}/{session_id}/goto", json={"node": deepest["id"]}))
        state = settled(client, session_id)
        assert state["offer"]["id"] == deepest["shown"]
        ids[f"went to in {session_id}"] = deepest["id"]
        until((weights / deepest["weights"] / "adapter_model.safetensors").is_file)
        settled(client, session_id)

    # Every node answers from its own weights; those that are not on disk are made again under their old names.
    for node in nodes.values():
        body = {"prompt": "What is rain?", "node": node["id"], "sampling": {"temperature": 0, "max_new_tokens": 8}}
        texts[f"answer of {node['id']}"] = got(client.post(f"{STEERING}/{node['session']}/sample", json=body))
        assert (weights / node["weights"] / "adapter_model.safetensors").is_file()
    made = {place.name: place for place in weights.iterdir() if not place.name.startswith(".")}
    ids["made again"] = sorted(set(made) - before)
    ids["files"] = {name: sorted(file.name for file in place.iterdir()) for name, place in sorted(made.items())}

    # Steering goes on: the same choice leads to the same names.
    for session_id in (oak, elm):
        url = f"{STEERING}/{session_id}"
        state = settled(client, session_id)
        with followed(client, session_id, ids.setdefault(f"events in {session_id}", {})):
            after = chosen(client, session_id, {"ranking": [1, 0]})
        ids[f"choice in {session_id}"] = [after["head"]["node"], after["head"]["step"], after["offer"]["id"]]
        (row,) = [row for row in rows_of(server.save_dir)["nodes"] if row["id"] == after["head"]["node"]]
        ids[f"weights in {session_id}"] = row["weights"]
        texts[f"options of {session_id}"] = after["offer"]["options"]
        texts[f"control of {session_id}"] = after["control"]
        texts[f"figures of {session_id}"] = {
            name: value for name, value in after["figures"].items() if not re.search("second|agreed", name)
        }
        got(client.post(f"{url}/undo"))
        back = settled(client, session_id)
        assert back["offer"] == state["offer"], "what was shown there comes back"
        ids[f"again in {session_id}"] = chosen(client, session_id, {"ranking": [1, 0]})["head"]["node"]

    # What was exported can be brought in again: choices as a log that is named by its content, rooms as rooms.
    for layout in LAYOUTS:
        lines = client.get(f"{STEERING}/{oak}/choices", params={"format": layout}).content
        lines = b"".join(line + b"\n" for line in lines.splitlines()[:4])
        (server.save_dir / "prompts" / f"{layout}.jsonl").write_bytes(lines)
        job = got(client.post(f"{STEERING}/{elm}/import", json={"file": f"{layout}.jsonl", "epochs": 1}))
        node = finished(client, job)["result"]["node"]
        (row,) = [row for row in rows_of(server.save_dir)["nodes"] if row["id"] == node]
        ids[f"import of {layout}"] = [node, row["weights"], json.loads(row["choice"])]

    # Chat goes on in an old room, by each command of the socket.
    rooms = {each["title"]: each["id"] for each in got(client.get("/api/rooms"))}
    moss = rooms["About moss"]
    for format in ("json", "markdown", "open-webui"):
        file = client.get(f"/api/rooms/{moss}/export", params={"format": format}).content
        about = got(client.post("/api/rooms/import", content=file))
        back = [got(client.get(f"/api/rooms/{each['id']}")) for each in about["rooms"]]
        ids[f"rooms of {format}"] = [
            [each["title"], each["system"], each["models"], [(said["role"], said["text"]) for said in each["messages"]]]
            for each in back
        ] + [about["left_out"]]
    messages = got(client.get(f"/api/rooms/{moss}"))["messages"]
    first, answer = messages[0]["id"], messages[1]["id"]
    commands = [
        ({"type": "send", "text": "And then?", "model": [f"session:{oak}", "session:Oak@2"]}, "done", 2),
        ({"type": "regenerate", "message": answer, "model": "demo"}, "done", 1),
        ({"type": "edit", "message": first, "text": "What is a fern?"}, "done", 1),
        ({"type": "choose", "message": answer}, "message", 1),
        ({"type": "go_on", "message": answer}, "done", 1),
        ({"type": "rate", "message": answer, "rating": -1}, "message", 1),
        ({"type": "stop"}, "", 0),
        ({"type": "ping"}, "pong", 1),
        ({"type": "rate", "message": "m404", "rating": 1}, "error", 1),
    ]
    with socket_of(server, client, moss) as socket:
        fields = {"connected": fields_of(told(socket, "connected")[0])}
        for number, (command, kind, count) in enumerate(commands):
            if command["type"] == "stop":  # an answer that still grew would be stopped on a slow machine alone
                until(lambda: "growing" not in {m["state"] for m in got(client.get(f"/api/rooms/{moss}"))["messages"]})
            socket.send(json.dumps(command | {"request": f"go on {number}"}))
            events = told(socket, kind, count=count) if count else []
            for event in events:
                if event["type"] != "progress":  # its fields depend on what there is to tell
                    fields[event["type"]] = fields_of(event)
        got(client.patch(f"/api/rooms/{moss}", json={"title": "More about moss"}))
        fields["room"] = fields_of(told(socket, "room")[-1])
        state = got(client.get(f"/api/rooms/{moss}"))
    ids["socket"] = fields
    ids["messages"] = [[each["role"], each["model"], each["state"], each["rating"]] for each in state["messages"]]

    # A key made then opens /v1; a half sent upload goes on.
    bare = httpx.get(f"{server.url}/v1/models")
    assert bare.status_code == 401, bare.text
    body = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4, "temperature": 0}
    for model in ("demo", "session:Oak", "session:Oak@2", "session:Oak@Gentle", f"session:{elm}"):
        url = f"{server.url}/v1/chat/completions"
        said = got(httpx.post(url, json=body | {"model": model}, headers=bearer(key), timeout=60))
        ids[f"/v1 {model}"] = [said["object"], said["model"], said["usage"]["prompt_tokens"]]
    streamed = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body | {"model": "demo", "stream": True},
        headers=bearer(key),
        timeout=60,
    )
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    ids["/v1 streamed"] = [sorted(chunks[0]), chunks[0]["object"], sorted(chunks[0]["choices"][0])]
    upload = got(client.post("/api/uploads", json=UPLOAD))
    got(client.put(f"/api/uploads/{upload['id']}/files/0?offset={len(HALF)}", content=OTHER_HALF))
    assert (server.save_dir / "prompts" / "half.txt").read_bytes() == HALF + OTHER_HALF
    ids["/files"] = [each["name"] for each in got(client.get("/api/steering/files"))]
    return {"ids": json.loads(json.dumps(ids)), "texts": texts}
