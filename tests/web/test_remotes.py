"""Models elsewhere: a second real server is talked to, and hostile ones are borne."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server


@contextmanager
def elsewhere(answer: bytes, status: int = 200, **headers: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers everything so. Yields its address, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("content-length", 0))
            asked.append({"path": self.path, "headers": dict(self.headers), "body": self.rfile.read(length)})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(answer)

        do_GET = do_POST = answer  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def studio(folder: Path, *own: str) -> Iterator[tuple[Server, httpx.Client]]:
    server = Server(folder, TRELLIS_LOCAL_SERVERS=",".join(own))
    try:
        with server.client() as client:
            yield server, client
    finally:
        server.stop()


def told(client: httpx.Client, model: str, text: str = "Hello.", **more: Any) -> dict[str, Any]:
    """The answer of a model in a new room."""
    made = client.post("/api/rooms", json={"models": [model]})
    assert made.status_code == 201, made.text
    room = made.json()["id"]
    sent = client.post(f"/api/rooms/{room}/messages", json={"text": text} | more)
    assert sent.status_code == 202, sent.text
    deadline = time.monotonic() + 30
    while (state := client.get(f"/api/rooms/{room}").json())["growing"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    answer: dict[str, Any] = state["messages"][-1]
    return answer


def test_a_second_studio_is_talked_to(tmp_path: Path, server: Server, client: httpx.Client) -> None:
    key = client.post("/api/keys", json={"name": "the other studio"}).json()["key"]
    there = server.url.removeprefix("http://")
    with studio(tmp_path, there) as (other, here):
        added = here.post("/api/remotes", json={"name": "first", "url": f"{server.url}/v1", "key": key})
        assert added.status_code == 201, added.text
        assert "demo" in added.json()["models"]
        names = [each["name"] for each in here.get("/api/rooms/speakers").json()]
        assert "remote:first/demo" in names
        answer = told(here, "remote:first/demo", "say 9 words at 500 a second")
        assert answer["state"] == "done", answer
        assert len(answer["text"].split()) == 9
        assert answer["usage"]["completion_tokens"] == 9
        assert answer["usage"]["prompt_tokens"] == 7
        assert answer["label"] == "demo at first"
        through = here.post("/v1/completions", json={"model": "remote:first/demo", "prompt": "The sea"})
        assert through.json()["choices"][0]["text"]
        seen = here.get("/connections").text + json.dumps(here.get("/api/remotes").json())
        assert key not in seen
        assert here.delete(f"/api/remotes/{added.json()['id']}").status_code == 204
        assert here.post("/api/rooms", json={"models": ["remote:first/demo"]}).status_code == 404
    assert key not in other.output


def test_a_wrong_key_and_a_silent_place_are_said(tmp_path: Path, server: Server) -> None:
    there = server.url.removeprefix("http://")
    with studio(tmp_path, there, "127.0.0.1:1") as (_, client):
        wrong = client.post("/api/remotes", json={"name": "a", "url": f"{server.url}/v1", "key": "trellis-wrong"})
        assert wrong.json()["error"]["code"] == "wrong_key"
        silent = client.post("/api/remotes", json={"name": "a", "url": "http://127.0.0.1:1/v1"})
        assert silent.status_code == 502
        assert silent.json()["error"]["code"] == "network"
        not_ours = client.post("/api/remotes", json={"name": "a", "url": server.url})
        assert not_ours.status_code >= 400


@pytest.mark.parametrize(
    "field", [{"name": "a/b"}, {"name": ""}, {"url": "ftp://x"}, {"key": "a b\n"}, {"models": [""]}]
)
def test_bad_input_is_said(client: httpx.Client, field: dict[str, Any]) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": "https://example.org/v1", "models": ["m"]} | field)
    assert response.status_code == 422
    assert response.json()["error"]["field"].split(".")[0] in field


def test_a_private_address_is_refused_with_the_way_to_allow_it(client: httpx.Client) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": "http://localhost:11434/v1"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "private_address"
    assert "TRELLIS_LOCAL_SERVERS" in response.json()["error"]["next_step"]


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        elsewhere(b"", 302, Location="http://169.254.169.254/") as (there, asked),
        studio(tmp_path, there) as (_, client),
    ):
        refused = client.post("/api/remotes", json={"name": "a", "url": f"http://{there}/v1"})
        assert refused.json()["error"]["code"] == "redirected"
        assert len(asked) == 1


STREAMS = [
    (b"data: not json\n\n", "failed"), (b"data: [1, 2]\n\ndata: [DONE]\n\n", "failed"), (b"", "failed"),
    (b'data: {"choices": "x"}\n\ndata: {"choices": [5, {"delta": 7}]}\n\n', "failed"),
    (b'data: {"error": {"message": "out of <b>memory</b>"}}\n\n', "failed"),
    (b'data: {"choices": [{"delta": {"content": "<script>alert(1)</script>"}}], "usage": {"prompt_tokens": "x"}}\n\n',
     "done"),
    (b"x" * 3_000_000, "failed"), (b"data: " + b"[" * 20_000 + b"\n\n", "failed"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "state"), STREAMS)
def test_whatever_a_server_says_is_borne(tmp_path: Path, answer: bytes, state: str) -> None:
    with elsewhere(answer) as (there, asked), studio(tmp_path, there) as (server, client):
        about = {"name": "odd", "url": f"http://{there}/v1", "models": ["m"], "key": "the-secret"}
        client.post("/api/remotes", json=about)
        found = told(client, "remote:odd/m")
        assert found["state"] == state, found
        assert asked[-1]["headers"]["authorization"] == "Bearer the-secret"
        assert "<script>" not in found["html"]
        assert client.get("/healthz").status_code == 200
    assert "the-secret" not in server.output
    assert "Traceback" not in server.output, server.output


def test_a_secret_that_a_server_says_back_is_not_shown(tmp_path: Path) -> None:
    with elsewhere(b"your key the-secret is bad", 500) as (there, _), studio(tmp_path, there) as (_, client):
        client.post(
            "/api/remotes", json={"name": "odd", "url": f"http://{there}/v1", "models": ["m"], "key": "the-secret"}
        )
        found = told(client, "remote:odd/m")
        assert found["state"] == "failed"
        assert "the-secret" not in json.dumps(found)


def test_pictures_go_to_who_sees(tmp_path: Path) -> None:
    picture = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    stream = b'data: {"choices": [{"delta": {"content": "A cat."}}]}\n\ndata: [DONE]\n\n'
    with elsewhere(stream) as (there, asked), studio(tmp_path, there) as (_, client):
        for name, sees in (("eyes", True), ("blind", False)):
            about = {"name": name, "url": f"http://{there}/v1", "models": ["m"], "sees": sees}
            assert client.post("/api/remotes", json=about).status_code == 201
        room = client.post("/api/rooms", json={}).json()["id"]
        file = client.post(f"/api/rooms/{room}/files?name=cat.png", content=picture).json()
        assert file["kind"] == "picture"
        for model in ("demo", "remote:blind/m"):
            body = {"text": "What is it?", "attachments": [file["id"]], "models": [model]}
            refused = client.post(f"/api/rooms/{room}/messages", json=body)
            assert refused.status_code == 422
            assert refused.json()["error"]["code"] == "cannot_see"
        body = {"text": "What is it?", "attachments": [file["id"]], "models": ["remote:eyes/m"]}
        assert client.post(f"/api/rooms/{room}/messages", json=body).status_code == 202
        deadline = time.monotonic() + 20
        while client.get(f"/api/rooms/{room}").json()["growing"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        content = json.loads(asked[-1]["body"])["messages"][0]["content"]
        assert [part["type"] for part in content] == ["text", "image_url"]
        assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_halves_of_characters_become_whole_and_none_are_left(tmp_path: Path) -> None:
    pieces = ["\\ud83c", "\\udf31 and \\ud83c", " alone", "a\\u0000b"]
    stream = "".join(f'data: {{"choices": [{{"delta": {{"content": "{piece}"}}}}]}}\n\n' for piece in pieces)
    with elsewhere(stream.encode()) as (there, _), studio(tmp_path, there) as (server, client):
        client.post("/api/remotes", json={"name": "odd", "url": f"http://{there}/v1", "models": ["m"]})
        found = told(client, "remote:odd/m")
        assert found["state"] == "done", found
        assert found["text"] == "🌱 and \ufffd aloneab"
    assert "Traceback" not in server.output


def test_a_server_that_does_not_stream_is_understood(tmp_path: Path) -> None:
    answer = {"choices": [{"message": {"content": "All at once."}, "finish_reason": "stop"}],
              "usage": {"prompt_tokens": 3, "completion_tokens": 4}}  # fmt: skip
    headers = {"Content-Type": "application/json"}
    with elsewhere(json.dumps(answer).encode(), **headers) as (there, _), studio(tmp_path, there) as (_, client):
        client.post("/api/remotes", json={"name": "odd", "url": f"http://{there}/v1", "models": ["m"]})
        found = told(client, "remote:odd/m")
        assert found["text"] == "All at once."
        assert found["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize("url", ["http://münchen.invalid/v1", "http://a..b/v1", f"http://{'x' * 70}.invalid/v1"])
def test_odd_names_of_servers_are_said(client: httpx.Client, url: str) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": url})
    assert response.status_code in (422, 502), response.text
    assert response.json()["error"]["field"] == "url"
