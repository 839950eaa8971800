"""Who may ask, and from where: each class of attack over the real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import Server, new_session, read_events
from trellis.errors import Refused
from trellis.settings import Settings, is_loopback
from trellis.web.pages.login import _safe_redirect_path

PASSWORD = "correct horse battery staple"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("locked"), TRELLIS_PASSWORD=PASSWORD)
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8117",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::2]",
        "2130706433",
        "localhost:@evil.example",
        "localhost:[x",
        "localhost:123456",
        "localhost/x",
        "a@localhost",
    ],
)
def test_a_foreign_host_is_refused_before_anything_else(client: httpx.Client, host: str) -> None:
    for path in ("/", "/healthz", "/api/steering/sessions", "/nothing"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "bad_host"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:99"])
def test_our_own_names_are_known(client: httpx.Client, host: str) -> None:
    assert client.get("/healthz", headers={"Host": host}).status_code == 200


def test_two_hosts_are_one_too_many(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        assert b" 400 " in raw.recv(4096).split(b"\r\n")[0]


def test_a_foreign_host_is_refused_on_a_websocket(server: Server) -> None:
    port = int(server.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(
            b"GET /ws HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 403 " in raw.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://["},
    ],
)
def test_no_change_is_taken_from_another_site(client: httpx.Client, headers: dict[str, str]) -> None:
    before = client.get("/api/steering/sessions").json()
    for method, path in (("POST", "/api/steering/sessions"), ("POST", "/steer"), ("DELETE", "/api/steering/sessions/x"),
                         ("PATCH", "/api/steering/sessions/x"), ("POST", "/models/demo/load")):  # fmt: skip
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 403, (method, path)
        assert answer.json()["error"]["code"] == "foreign_origin"
    assert client.get("/api/steering/sessions").json() == before


def test_our_own_pages_and_programs_may_change_things(client: httpx.Client, server: Server) -> None:
    for headers in ({}, {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}):
        assert client.post("/api/steering/sessions/nope/undo", headers=headers).status_code == 404


def test_nothing_changes_by_get(client: httpx.Client) -> None:
    session = new_session(client)["id"]
    paths = [f"/steer/{session}/{verb}" for verb in ("choose", "skip", "undo", "delete", "rename", "resume", "goto")]
    paths += [f"/api/steering/sessions/{session}/{verb}" for verb in ("choose", "skip", "undo")]
    paths += ["/steer", "/models/load", "/models/demo/unload", "/api/models/load", "/logout"]
    for path in paths:
        assert client.get(path).status_code == 405, path


@pytest.mark.parametrize("path", ["/", "/models", "/api/models", "/nothing", "/static/app.css", "/healthz"])
def test_every_answer_holds_the_browser_to_our_own_files(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] in ("no-store", "public, max-age=31536000, immutable")


@pytest.mark.parametrize(
    "path", ["../settings.py", "..%2fapp.py", "%2e%2e/app.py", "....//app.py", "%00", "//etc/passwd"]
)
def test_no_file_outside_the_static_folder_is_served(client: httpx.Client, path: str) -> None:
    answer = client.get(f"/static/{path}")
    assert answer.status_code in (404, 405, 400)
    assert "import" not in answer.text


# ── The password ───────────────────────────────────────────────────────────────────────────────────


def login(client: httpx.Client, password: str = PASSWORD) -> httpx.Response:
    return client.post("/login", data={"password": password, "next": "/models"})


def test_nothing_is_shown_without_the_password(locked: Server) -> None:
    with locked.client() as client:
        for path in ("/api/steering/sessions", "/api/models", "/openapi.json", "/steer/x", "/readyzz"):
            answer = client.get(path)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "login_required"
        assert client.post("/api/steering/sessions", json={}).status_code == 401
        page = client.get("/models", headers={"Accept": "text/html"})
        assert (page.status_code, page.headers["location"]) == (303, "/login?next=/models")
        assert client.get("/healthz").status_code == 200
        assert "Password" in client.get("/login").text


def test_the_password_opens_and_logging_out_closes(locked: Server) -> None:
    with locked.client() as client:
        answer = login(client)
        assert (answer.status_code, answer.headers["location"]) == (303, "/models")
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=lax" in cookie
        assert client.get("/models").status_code == 200
        stolen = dict(client.cookies)
        assert client.post("/logout").status_code == 303
    with locked.client(cookies=stolen) as thief:
        assert thief.get("/models").status_code == 401


def test_the_token_is_not_in_the_database(locked: Server) -> None:
    with locked.client() as client:
        login(client)
        token = client.cookies["trellis"]
    kept = b"".join(file.read_bytes() for file in locked.save_dir.glob("trellis.db*"))
    assert token.encode() not in kept
    assert PASSWORD.encode() not in kept


def test_a_stream_ends_with_the_login(locked: Server) -> None:
    with locked.client() as client:
        login(client)
        session = new_session(client)["id"]
        closed = threading.Event()

        def watch() -> None:
            try:
                with locked.client(cookies=dict(client.cookies)) as own:
                    with own.stream("GET", f"/api/steering/sessions/{session}/events") as response:
                        for _ in read_events(response):
                            opened.set()
            except httpx.TransportError:
                pass
            closed.set()

        opened = threading.Event()
        threading.Thread(target=watch, daemon=True).start()
        assert opened.wait(10)
        started = time.monotonic()
        client.post("/logout")
        assert closed.wait(5), "the stream outlived its login"
        assert time.monotonic() - started < 2


def test_guessing_is_slowed_down(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD=PASSWORD)
    try:
        with server.client() as client:
            answers = [login(client, f"guess {number}").status_code for number in range(7)]
            assert answers[:5] == [401] * 5
            assert answers[5:] == [429] * 2
            assert login(client).status_code == 429
    finally:
        server.stop()


@pytest.mark.parametrize(
    "next", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:x", "/a\r\nb", ""]
)
def test_a_login_leads_to_our_own_pages_only(next: str) -> None:
    assert _safe_redirect_path(next) == "/"


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::", "example.org"])
def test_other_addresses_need_a_password(host: str) -> None:
    with pytest.raises(Refused, match="no password is set"):
        Settings(host=host).require_password_beyond_loopback()
    Settings(host=host, password="x").require_password_beyond_loopback()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("[::1]", True),
     ("0.0.0.0", False), ("::", False), ("example.org", False)],
)  # fmt: skip
def test_what_counts_as_this_computer(host: str, own: bool) -> None:
    assert is_loopback(host) is own


def test_a_client_cannot_name_itself_to_guess_on(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD=PASSWORD)
    try:
        with server.client() as client:
            answers = [
                client.post("/login", data={"password": "x"}, headers={"X-Forwarded-For": f"10.0.0.{n}"}).status_code
                for n in range(8)
            ]
        assert answers == [401] * 5 + [429] * 3
    finally:
        server.stop()


def test_a_password_that_cannot_be_encoded_is_a_wrong_one(locked: Server) -> None:
    body = '--b\r\nContent-Disposition: form-data; name="password"\r\nContent-Type: text/plain; charset=utf-7\r\n\r\n'
    with locked.client() as client:
        answer = client.post(
            "/login", content=(body + "+2AA-\r\n--b--\r\n").encode(),
            headers={"content-type": "multipart/form-data; boundary=b; charset=utf-7"},
        )  # fmt: skip
        assert answer.status_code in (400, 401, 422)
