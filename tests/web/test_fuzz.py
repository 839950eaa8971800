"""Whatever is sent, no answer is a bug's, every error has the one shape, and nothing hangs; whatever id a stream is
resumed with, it goes on where that says; whatever is done meanwhile, who follows the events sees what the API says."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.result import Ok

from tests.server import Server, new_session, wait_ready

API = "/api/steering/sessions"
LONGEST = 10.0
"""Seconds of silence after which a request counts as hung."""

Event = tuple[str, str, Any]
Operation = APIOperation[Any, Any, Any, Any]

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""What a server does takes its time, more on a busy machine."""


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, which takes any number of requests and finds no hub."""
    server = Server(
        tmp_path_factory.mktemp("fuzzed"),
        TRELLIS_RATE_LIMIT="0",
        TRELLIS_HUB_TIMEOUT="1",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


@pytest.fixture(scope="module")
def client(fuzzed: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fuzzed.url, timeout=LONGEST) as client:
        yield client


def require_one_shape(status: int, body: bytes, asked: str) -> None:
    """An answer is none of a bug, and an error has the one shape, with something to read in it."""
    said = f"{asked} → {status}: {body[:2000]!r}"
    assert status != 500, said
    if status < 400:
        return
    error = json.loads(body)["error"]
    if set(error) == {"message", "type", "param", "code"}:  # as OpenAI's clients know it
        assert "/v1/" in asked, said
        assert error["message"], said
        assert error["code"] not in ("", "internal"), said
        return
    assert set(error) - {"fields"} == {"code", "message", "next_step", "field"}, said
    assert error["code"] not in ("", "internal"), said
    assert error["message"], said
    assert error["next_step"], said
    assert error["field"] is None or isinstance(error["field"], str), said
    if status == 422:
        assert all(set(entry) == {"field", "message"} for entry in error["fields"]), said


# ── Every operation ────────────────────────────────────────────────────────────────────────────────


class Place:
    """A studio with something in it, to be put where made-up ids would lead nowhere. What a request has taken away
    is made again."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._session = ""
        self._fresh = itertools.count(1)

    def put_into(self, case: Case[Any]) -> None:
        """Let a case ask for what there is, and for names that are free."""
        known = self._ids()
        for name in case.path_parameters:
            case.path_parameters[name] = known.get(name, case.path_parameters[name])
        if not isinstance(case.body, dict):
            return
        case.body |= {name: known[name] for name in case.body if name in known}
        if "kind" in case.body and "name" in case.body:
            case.body["name"] = f"new {next(self._fresh)}"
        files = case.body.get("files")
        for file in files if isinstance(files, list) else []:
            if isinstance(file, dict) and "path" in file:
                file["path"] = f"new {next(self._fresh)}.txt"
        config = case.body.get("config")
        if isinstance(config, dict) and "model" in config:
            config["model"] = known["model"]

    def _ids(self) -> dict[str, Any]:
        state = self._settled()
        if state is None:
            state = new_session(self._client, control_prompt="")
            self._session = state["id"]
            self._client.post(f"{self._url}/choose", json={"offer": state["offer"]["id"], "choice": 0})
            state = wait_ready(self._client, self._session)
        nodes = self._client.get(f"{self._url}/tree").json()["nodes"]
        self._client.post(f"{self._url}/exports", json={"kind": "adapter", "name": "mine"})
        files = [{"path": "mine.txt", "bytes": 1_000_000}]
        begun = self._client.post("/api/uploads", json={"kind": "prompts", "name": "mine", "files": files}).json()
        return {
            "session": self._session,
            "offer": state["offer"]["id"],
            "node": nodes[-1]["id"],
            "left": nodes[0]["id"],
            "right": nodes[-1]["id"],
            "job": self._client.get("/api/jobs").json()[0]["id"],
            "upload": begun["id"],
            "number": 0,
            "name": "mine",
            "model": "demo",
        }

    @property
    def _url(self) -> str:
        return f"{API}/{self._session}"

    def _settled(self) -> dict[str, Any] | None:
        """The session's state once a person can choose; None when it is gone or has failed."""
        deadline = time.monotonic() + 20
        while self._session and time.monotonic() < deadline:
            answer = self._client.get(self._url)
            if answer.status_code == 404 or answer.json()["status"] == "failed":
                return None
            if answer.json()["status"] == "ready":
                return dict(answer.json())
            time.sleep(0.005)
        return None


@pytest.fixture(scope="module")
def operations(fuzzed: Server) -> list[Operation]:
    """All operations but the endless ones, with what OpenAPI leaves open told in full: a configuration is what
    `/api/steering/schema` says, and a piece of an upload is bytes."""
    document = httpx.get(f"{fuzzed.url}/openapi.json").json()
    config = json.loads(
        httpx.get(f"{fuzzed.url}/api/steering/schema").text.replace("#/$defs/", "#/components/schemas/")
    )
    schemas = document["components"]["schemas"]
    schemas |= config.pop("$defs")
    schemas["NewSession"]["properties"]["config"] = schemas["Check"]["properties"]["config"] = config
    schemas["Preview"]["properties"]["dataset"] = schemas["Dataset"]
    piece = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    document["paths"]["/api/uploads/{upload}/files/{number}"]["put"]["requestBody"] = piece
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=fuzzed.url)
    found: list[Operation] = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        found.append(result.ok())
    endless = [operation for operation in found if operation.path.endswith("/events")]
    assert len(endless) == 2
    return [operation for operation in found if operation not in endless]


@pytest.mark.slow
def test_no_operation_answers_with_a_bug_or_hangs(client: httpx.Client, operations: list[Operation]) -> None:
    """As Schemathesis makes requests up, right and wrong ones, and with what there is put into half of them."""
    place = Place(client)
    reached: set[str] = set()
    with requests.Session() as connection:
        for operation in operations:

            @settings(relaxed, max_examples=5)
            @given(
                case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in GenerationMode]),
                there=st.booleans(),
            )
            def is_answered(case: Case[Any], there: bool) -> None:
                if there:
                    place.put_into(case)
                answer = case.call(session=connection, timeout=LONGEST)
                require_one_shape(answer.status_code, answer.content, case.as_curl_command())
                if answer.status_code < 400:
                    reached.add(case.operation.label)

            is_answered()
    assert len(reached) > len(operations) / 3, "most requests were refused at the door"
    assert wait_ready(client, new_session(client)["id"])["offer"]["options"]


def test_what_no_route_takes_is_refused_in_the_one_shape(client: httpx.Client, operations: list[Operation]) -> None:
    refused = set()
    for path in {operation.path for operation in operations} | {"/nothing", "/api/nothing", "/static/nothing"}:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"):
            answer = client.request(method, path)
            require_one_shape(answer.status_code, answer.content, f"{method} {path}")
            if not any((operation.method.upper(), operation.path) == (method, path) for operation in operations):
                assert answer.status_code in (404, 405), f"{method} {path}"
                refused.add(answer.json()["error"]["code"])
    assert {"not_found", "method_not_allowed"} <= refused


# ── Where a stream goes on ─────────────────────────────────────────────────────────────────────────


def frames(response: httpx.Response) -> Iterator[Event]:
    """(id, name, data) of each event. Lines end with \\n alone: those of httpx end at marks that a prompt may hold."""
    left = b""
    for chunk in response.iter_bytes():
        *whole, left = (left + chunk).split(b"\n\n")
        for frame in whole:
            lines = dict(line.split(": ", 1) for line in frame.decode().split("\n") if not line.startswith(":"))
            if "data" in lines:
                yield lines["id"], lines["event"], json.loads(lines["data"])


class Near(NamedTuple):
    """Almost an id of a ring: its mark changed, a number somewhere by the last one, padded, with more after it."""

    mark: Literal["own", "upper", "short", "none", "other"]
    back: int
    zeros: int
    tail: str


NEAR = st.builds(
    Near,
    st.sampled_from(["own", "own", "own", "own", "upper", "short", "none", "other"]),
    st.integers(-3, 30) | st.integers(-(10**18), 10**18),
    st.sampled_from([0, 0, 0, 0, 1, 8, 14, 60]),
    st.sampled_from(["", "", "", "", "-1", " ", ".0", "e1", "x", "\xb2"]),
)
IN_HEADERS = "\t" + "".join(map(chr, [*range(0x20, 0x7F), *range(0x80, 0x100)]))
AFTER = st.none() | NEAR | st.text(max_size=70)
LAST_EVENT_ID = st.none() | NEAR | st.text(IN_HEADERS, max_size=70)


class Ring:
    """A topic as its stream tells it: all its events so far, and what must come first after an id."""

    def __init__(self, client: httpx.Client, url: str, snapshot: str) -> None:
        self._client, self._url, self._snapshot = client, url, snapshot
        with client.stream("GET", url) as response:
            (at, name, _) = next(frames(response))
        assert name == snapshot
        self._mark, _, last = at.partition("-")
        with client.stream("GET", url, params={"after": f"{self._mark}-0"}) as response:
            self.events = list(itertools.islice(frames(response), int(last)))
        assert [event[0] for event in self.events] == [f"{self._mark}-{n}" for n in range(1, int(last) + 1)]

    def spelled(self, wanted: str | Near | None) -> str | None:
        if not isinstance(wanted, Near):
            return wanted
        own = self._mark
        mark = {"own": own, "upper": own.upper(), "short": own[1:], "none": "", "other": "0" * len(own)}[wanted.mark]
        return f"{mark}-{'0' * wanted.zeros}{len(self.events) - wanted.back}{wanted.tail}"

    def require_place(self, after: str | None, last_event_id: str | None) -> None:
        """Open the stream after an id, or two, and require what comes first."""
        params = {} if after is None else {"after": after}
        headers = [] if last_event_id is None else [(b"Last-Event-ID", last_event_id.encode("latin-1"))]
        with self._client.stream("GET", self._url, params=params, headers=headers) as response:
            if max(len(after or ""), len(last_event_id or "")) > 64:
                require_one_shape(response.status_code, response.read(), f"{after!r}, {last_event_id!r}")
                assert response.status_code == 422
                return
            assert response.status_code == 200
            found = re.fullmatch(rf"{self._mark}-([0-9]{{1,15}})", last_event_id or after or "")
            place = int(found[1]) if found else len(self.events) + 1
            if place < len(self.events):
                assert next(frames(response)) == self.events[place]
            elif place > len(self.events):
                at, name, data = next(frames(response))
                assert (at, name) == (f"{self._mark}-{len(self.events)}", self._snapshot)
                self.check_snapshot(data)
            else:
                self.require_news(response)

    def check_snapshot(self, data: Any) -> None:
        """Require of a snapshot what is known of it."""

    def require_news(self, response: httpx.Response) -> None:
        """A stream that was resumed at the end is open, and has nothing to tell yet."""
        assert next(response.iter_bytes()).startswith(b"retry: ")


class SessionRing(Ring):
    """A quiet session's: its snapshot is its state, and naming a node is news."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._session = f"{API}/{session}"
        self._root = client.get(f"{self._session}/tree").json()["nodes"][0]["id"]
        super().__init__(client, f"{self._session}/events", "state")

    def check_snapshot(self, data: Any) -> None:
        assert data == self._client.get(self._session).json()

    def require_news(self, response: httpx.Response) -> None:
        name = f"name {len(self.events)}"
        assert self._client.patch(f"{self._session}/nodes/{self._root}", json={"name": name}).status_code == 200
        news = next(frames(response))
        assert news == (f"{self._mark}-{len(self.events) + 1}", "node_named", {"node": self._root, "name": name})
        self.events.append(news)


def require_places(ring: Ring, examples: int) -> None:
    @settings(relaxed, max_examples=examples)
    @given(after=AFTER, last_event_id=LAST_EVENT_ID)
    def leads_where_it_says(after: str | Near | None, last_event_id: str | Near | None) -> None:
        header = ring.spelled(last_event_id)
        ring.require_place(ring.spelled(after), header if header is None else header.strip(" \t"))

    leads_where_it_says()


def test_a_session_goes_on_after_any_id_or_tells_its_whole_state(client: httpx.Client) -> None:
    session = new_session(client, control_prompt="")["id"]
    for _ in range(2):
        client.post(f"{API}/{session}/skip")
        wait_ready(client, session)
    ring = SessionRing(client, session)
    assert len(ring.events) > 20
    require_places(ring, 80)


def signalled(server: Server, sign: signal.Signals) -> None:
    for pid in server.engine_pids():
        os.kill(pid, sign)


@contextlib.contextmanager
def half_done(server: Server, client: httpx.Client) -> Iterator[str]:
    """A job that has said something and stays as it is meanwhile, since the engine that it needs stands still."""
    state = new_session(client, control_prompt="")
    node = state["head"]["node"]
    body = {"left": node, "right": node, "prompts": [f"What is {number}?" for number in range(12)]}
    try:
        for _ in range(10):
            job: str = client.post(f"{API}/{state['id']}/compare", json=body).json()["id"]
            while client.get(f"/api/jobs/{job}").json()["progress"]["fraction"] < 0.1:
                time.sleep(0.001)
            signalled(server, signal.SIGSTOP)
            time.sleep(0.2)  # what the engine has said already is on its way
            if client.get(f"/api/jobs/{job}").json()["state"] == "running":
                yield job
                return
            signalled(server, signal.SIGCONT)  # a busy machine let it end before it was stopped
        raise AssertionError("no job could be stopped while it ran")
    finally:
        signalled(server, signal.SIGCONT)


def test_a_job_goes_on_after_any_id_and_ends_for_all(fuzzed: Server, client: httpx.Client) -> None:
    with contextlib.ExitStack() as reading:
        with half_done(fuzzed, client) as job:
            ring = Ring(client, f"/api/jobs/{job}/events", "progress")
            assert len(ring.events) > 2
            require_places(ring, 50)
            resumed = client.stream("GET", f"/api/jobs/{job}/events", params={"after": ring.events[0][0]})
            events = frames(reading.enter_context(resumed))
            assert [next(events) for _ in ring.events[1:]] == ring.events[1:]
        rest = list(events)
    assert {event[1] for event in rest[:-1]} == {"progress"}
    assert rest[-1][1] == "done"

    @settings(relaxed, max_examples=20)
    @given(after=AFTER, last_event_id=LAST_EVENT_ID)
    def ends(after: str | Near | None, last_event_id: str | Near | None) -> None:
        params = {"after": (ring.spelled(after) or "")[:64]}
        headers = [(b"Last-Event-ID", (ring.spelled(last_event_id) or "")[:64].strip(" \t").encode("latin-1"))]
        with client.stream("GET", f"/api/jobs/{job}/events", params=params, headers=headers) as response:
            assert [event[1:] for event in frames(response)] == [rest[-1][1:]]

    ends()


# ── What is done while streams drop ────────────────────────────────────────────────────────────────


class Follower:
    """A person's screen that knows of the session what its events say, over a line that drops all the time."""

    def __init__(self, client: httpx.Client, session: str, drops: list[int], by_header: bool) -> None:
        self._client, self._url, self._by_header = client, f"{API}/{session}/events", by_header
        self._drops = itertools.cycle(drops)
        self.last = ""
        self.offer: dict[str, Any] | None = None
        self.head: dict[str, Any] = {}
        self.can: dict[str, bool] = {}
        self.ended = False

    def follow(self) -> None:
        """Read until a node is called “the end”."""
        while not self.ended:
            self._read(next(self._drops))

    def _read(self, events: int) -> None:
        """Some events, and then the line drops."""
        headers = {"Last-Event-ID": self.last} if self.last and self._by_header else {}
        params = {"after": self.last} if self.last and not self._by_header else {}
        with self._client.stream("GET", self._url, headers=headers, params=params) as response:
            for event in itertools.islice(frames(response), events):
                self._take(*event)
                if self.ended:
                    return

    def _take(self, at: str, name: str, data: Any) -> None:
        mark, _, number = self.last.partition("-")
        assert not self.last or at == f"{mark}-{int(number) + 1}", f"after {self.last} came {at} ({name})"
        self.last = at
        match name:
            case "state":
                self.offer, self.head = data["offer"], data["head"]
                self.can = {verb: data[verb] for verb in ("can_undo", "can_redo")}
            case "head_moved":
                self.offer, self.head = None, {"node": data["node"], "step": data["step"]}
                self.can = {verb: data[verb] for verb in ("can_undo", "can_redo")}
            case "offer_started":
                self.offer = {"id": data["offer"], "prompt": data["prompt"], "options": data["options"]}
            case "option_delta":
                assert self.offer is not None
                assert self.offer["id"] == data["offer"]
                self.offer["options"][data["index"]]["text"] += data["text"]
            case "offer_ready":
                assert self.offer is not None
                assert self.offer["id"] == data["offer"]
                assert self.texts == [option["text"] for option in data["options"]]
                self.offer["options"] = data["options"]
            case "node_named":
                self.ended = data["name"] == "the end"
            case "failed":
                raise AssertionError(data)

    @property
    def texts(self) -> list[str]:
        assert self.offer is not None
        return [option["text"] for option in self.offer["options"]]


# A word first: what is only spaces is refused, and which signs are spaces is another question.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).map(lambda text: f"say {text}")
CHOICES = (
    st.integers(0, 3)
    | st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
    | st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True).map(lambda indexes: {"ranking": indexes})
    | st.sampled_from(["none", "skip"])
    | WORDS.map(lambda text: {"written": text})
)
ACTIONS = (
    st.tuples(st.just("choose"), CHOICES)
    | st.tuples(st.sampled_from(["skip", "undo", "redo"]), st.none())
    | st.tuples(st.just("goto"), st.integers(0, 20))
    | st.tuples(st.just("prompt"), WORDS)
)
"""(what, with what): a node to go to is meant by its place in the tree."""


def act(client: httpx.Client, url: str, verb: str, what: Any) -> None:
    """Do one thing, or be told that it cannot be done now."""
    body: dict[str, Any] | None = None
    if verb == "choose":
        offer = client.get(url).json()["offer"]
        body = {"offer": offer["id"] if offer else "", "choice": what}
    elif verb == "goto":
        nodes = client.get(f"{url}/tree").json()["nodes"]
        body = {"node": nodes[what % len(nodes)]["id"]}
    elif verb == "prompt":
        body = {"text": what}
    answer = client.post(f"{url}/{verb}", json=body)
    require_one_shape(answer.status_code, answer.content, f"{verb} {what!r}")
    assert answer.status_code in (202, 409), answer.text


def test_who_follows_the_events_over_a_bad_line_sees_what_the_api_says(client: httpx.Client) -> None:
    @settings(relaxed, max_examples=15)
    @given(
        actions=st.lists(st.tuples(ACTIONS, st.booleans()), min_size=1, max_size=8),
        drops=st.lists(st.integers(1, 15), min_size=1, max_size=5),
        by_header=st.booleans(),
    )
    def sees_it(actions: list[tuple[tuple[str, Any], bool]], drops: list[int], by_header: bool) -> None:
        session = client.post(API, json={"config": {"control_prompt": ""}}).json()["id"]
        url = f"{API}/{session}"
        follower = Follower(client, session, drops, by_header)
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(follower.follow)
            for (verb, what), patiently in actions:
                if patiently:
                    wait_ready(client, session)
                act(client, url, verb, what)
            state = wait_ready(client, session)
            client.patch(f"{url}/nodes/{state['head']['node']}", json={"name": "the end"})
            following.result(20)
        assert follower.offer is not None
        assert (follower.offer["id"], follower.offer["prompt"]) == (state["offer"]["id"], state["offer"]["prompt"])
        assert follower.offer["options"] == state["offer"]["options"]
        assert follower.head["node"] == state["head"]["node"]
        assert follower.head["step"] == state["head"]["step"]
        assert follower.can == {verb: state[verb] for verb in ("can_undo", "can_redo")}
        assert client.delete(url).status_code == 204

    sees_it()
