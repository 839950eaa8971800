"""Behind a real nginx with its default settings: streams arrive as they are said, a nginx that is killed loses
nothing, logins are secure and counted for each client, and pages and pieces of uploads pass."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server, new_session, read_events, wait_ready

API = "/api/steering/sessions"
PASSWORD = "correct horse battery staple"
PUBLIC = "studio.example"
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CONFIG = """\
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{upstream};
      proxy_set_header Host $host:$server_port;
      {more}
    }}
  }}
}}
"""
FORWARDED = "proxy_set_header X-Forwarded-Proto https; proxy_set_header X-Forwarded-For $remote_addr;"

Event = tuple[str, str, Any]


class Nginx:
    """A nginx on a free port before a server, with its folder as its own; it may be killed and started again."""

    def __init__(self, folder: Path, server: Server, more: str = "") -> None:
        if not Path(NGINX).is_file():
            pytest.fail("nginx is missing: apt-get install nginx-light")
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir()
        text = CONFIG.format(
            folder=folder,
            port=self.port,
            upstream=server.url.rsplit(":", 1)[1],
            # Its worker would be “nobody” under root, who cannot write into a folder of pytest's.
            user="user root;" if os.geteuid() == 0 else "",
            more=more,
        )
        (folder / "nginx.conf").write_text(text)
        self.start()

    def start(self) -> None:
        """Start, and wait until it listens."""
        command = [NGINX, "-p", str(self._folder), "-c", str(self._folder / "nginx.conf")]
        command += ["-e", str(self._folder / "error.log")]
        # A session of its own, so that its worker can be killed with it.
        self._process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            log = self._folder / "error.log"
            said = log.read_text() if log.exists() else ""
            assert self._process.poll() is None, f"nginx did not start: {said}"
            assert time.monotonic() < deadline, f"nginx does not listen: {said}"
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9, the worker too."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)

    def client(self, address: str = "127.0.0.1", **options: Any) -> httpx.Client:
        """A client that comes from an address of this computer."""
        transport = httpx.HTTPTransport(local_address=address)
        return httpx.Client(base_url=self.url, timeout=20, transport=transport, **options)


@pytest.fixture
def nginx(tmp_path: Path, server: Server) -> Iterator[Nginx]:
    nginx = Nginx(tmp_path / "nginx", server)
    yield nginx
    nginx.kill()


@pytest.fixture
def proxied(nginx: Nginx) -> Iterator[httpx.Client]:
    with nginx.client() as client:
        yield client


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    """A nginx that says who asks, before a server that believes it, asks for a password and has a public name."""
    folder = tmp_path_factory.mktemp("secure")
    server = Server(folder / "save", TRELLIS_PASSWORD=PASSWORD, TRELLIS_BEHIND_PROXY="1", TRELLIS_ALLOWED_HOSTS=PUBLIC)
    try:
        nginx = Nginx(folder / "nginx", server, FORWARDED)
        yield nginx
        nginx.kill()
    finally:
        assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


def number(event: Event) -> int:
    """Which event of its ring it is."""
    return int(event[0].split("-")[1])


def until(events: Iterator[Event], name: str) -> list[Event]:
    """The events up to the first of a name."""
    found = []
    for event in events:
        found.append(event)
        if event[1] == name:
            return found
    raise AssertionError(f"the stream ended before {name}: {[event[1] for event in found]}")


# ── Streams ────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Meanwhile no engine of a server does anything."""
    engines = server.engine_pids()
    assert engines
    for pid in engines:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in engines:
            os.kill(pid, signal.SIGCONT)


def test_every_event_arrives_while_the_next_is_not_said_yet(proxied: httpx.Client, server: Server) -> None:
    """Nothing here waits for time: the engine stands still until the first event of a choice has arrived, and the
    next choice is made because the last event of the one before has. Held back in a buffer, it would time out."""
    state = new_session(proxied, control_prompt="")
    url = f"{API}/{state['id']}"
    with proxied.stream("GET", f"{url}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        # a figure of the last choice comes whenever the engine has time for it
        events = (event for event in read_events(response) if event[1] != "assessed")
        first = next(events)
        assert first[1] == "state"
        offer = first[2]["offer"]["id"]
        for choice in (0, [1, 2], "none", {"written": "Mine."}):
            with frozen(server):
                assert proxied.post(f"{url}/choose", json={"offer": offer, "choice": choice}).status_code == 202
                assert next(events)[1] == "learning"
            seen = until(events, "offer_ready")
            names = [event[1] for event in seen]
            assert names[:3] == ["node_added", "head_moved", "offer_started"]
            assert set(names[3:-1]) == {"option_delta"}
            offer = seen[-1][2]["offer"]
        assert proxied.delete(url).status_code == 204
        assert [event[1] for event in events] == ["done"]


def test_a_stream_goes_on_when_nginx_is_killed_in_the_middle(nginx: Nginx, client: httpx.Client) -> None:
    """`client` asks the server itself; what it reads at the end in one piece is what was read behind nginx in many."""
    dice = random.Random(7)
    state = new_session(client, control_prompt="")
    url = f"{API}/{state['id']}"
    seen: list[Event] = []
    for _ in range(8):
        headers = {"Last-Event-ID": seen[-1][0]} if seen else {}
        kill_after = dice.randint(1, 8)  # a choice is eight events at least before the one that says it is whole
        broke_off = False
        with contextlib.suppress(httpx.TransportError), nginx.client() as proxied:
            with proxied.stream("GET", f"{url}/events", headers=headers) as response:
                assert response.status_code == 200
                events = read_events(response)
                if not seen:
                    seen.append(next(events))
                said = {"offer": state["offer"]["id"], "choice": dice.randrange(4)}
                assert client.post(f"{url}/choose", json=said).status_code == 202
                for count, event in enumerate(events, start=1):
                    seen.append(event)
                    if count == kill_after:
                        nginx.kill()
                        broke_off = True
        assert broke_off
        wait_ready(client, state["id"])
        assert client.post(f"{url}/skip").status_code == 202
        state = wait_ready(client, state["id"])
        nginx.start()
    assert client.patch(f"{url}/nodes/{state['head']['node']}", json={"name": "the last word"}).status_code == 200
    with nginx.client() as proxied:
        with proxied.stream("GET", f"{url}/events", headers={"Last-Event-ID": seen[-1][0]}) as response:
            seen += until(read_events(response), "node_named")
    with client.stream("GET", f"{url}/events", headers={"Last-Event-ID": seen[0][0]}) as response:
        assert seen[1:] == until(read_events(response), "node_named")
    first = number(seen[0])
    assert [number(event) for event in seen] == list(range(first, first + len(seen)))
    names = [event[1] for event in seen]
    assert (names.count("state"), names.count("learning"), names.count("head_moved")) == (1, 8, 16)
    assert texts(seen) == [option["text"] for option in state["offer"]["options"]]
    assert state["head"]["step"] == 8


def texts(events: list[Event]) -> list[str]:
    """What the options of the last offer have grown to, piece by piece."""
    grown: list[str] = []
    for _, name, data in events:
        if name == "offer_started":
            grown = [option["text"] for option in data["options"]]
        elif name == "option_delta":
            grown[data["index"]] += data["text"]
        elif name == "offer_ready":
            assert grown == [option["text"] for option in data["options"]]
    return grown


# ── Logins ─────────────────────────────────────────────────────────────────────────────────────────


def login(client: httpx.Client, password: str, **headers: str) -> httpx.Response:
    return client.post("/login", data={"password": password, "next": "/models"}, headers=headers)


def test_the_cookie_of_a_login_behind_https_is_secure_and_opens(secure: Nginx) -> None:
    with secure.client() as client:
        assert client.get("/api/models").status_code == 401
        answer = login(client, PASSWORD)
        assert (answer.status_code, answer.headers["location"]) == (303, "/models")
        cookie = answer.headers["set-cookie"]
        assert {"secure", "httponly", "samesite=lax"} <= {part.strip().lower() for part in cookie.split(";")}
        # The client knows only http here, over which it would not send a secure cookie by itself.
        token = {"Cookie": cookie.split(";")[0]}
        assert client.get("/api/models", headers=token).status_code == 200
        assert client.get("/api/models").status_code == 401


def test_wrong_passwords_are_counted_for_each_client_behind_the_proxy(secure: Nginx) -> None:
    with secure.client("127.0.0.2") as guesser, secure.client("127.0.0.3") as owner:
        assert [login(guesser, "wrong").status_code for _ in range(6)] == [401] * 5 + [429]
        assert login(guesser, PASSWORD).status_code == 429
        assert login(guesser, "wrong", **{"X-Forwarded-For": "10.0.0.9"}).status_code == 429
        assert [login(owner, "wrong").status_code for _ in range(2)] == [401] * 2
        assert login(owner, PASSWORD).status_code == 303


# ── Everything else ────────────────────────────────────────────────────────────────────────────────


def from_page(origin: str) -> dict[str, str]:
    return {"Origin": origin, "Sec-Fetch-Site": "same-origin"}


def test_a_page_passes_and_so_does_what_is_done_on_it(nginx: Nginx, proxied: httpx.Client) -> None:
    page = proxied.get("/models", headers={"Accept": "text/html"})
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.text.rstrip().endswith("</html>")
    assert proxied.post(f"{API}/nope/undo", headers=from_page(nginx.url)).status_code == 404
    refused = proxied.post(f"{API}/nope/undo", headers=from_page("http://evil.example"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "foreign_origin")
    refused = proxied.get("/models", headers={"Host": PUBLIC})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_host")


def test_a_browser_logs_in_under_the_public_name(secure: Nginx) -> None:
    host = f"{PUBLIC}:{secure.port}"
    with secure.client(headers={"Host": host}) as client:
        asked = client.get("/models", headers={"Accept": "text/html"})
        assert (asked.status_code, asked.headers["location"]) == (303, "/login?next=/models")
        answer = login(client, PASSWORD, **from_page(f"https://{host}"))
        assert (answer.status_code, answer.headers["location"]) == (303, "/models")
        token = {"Cookie": answer.headers["set-cookie"].split(";")[0]}
        assert client.get("/models", headers=token).text.rstrip().endswith("</html>")
        assert login(client, PASSWORD, **from_page("https://evil.example")).status_code == 403


def test_a_piece_of_an_upload_passes_the_limit_that_nginx_sets_by_itself(proxied: httpx.Client, server: Server) -> None:
    text = bytes(random.Random(1).choices(b"abcdefgh \n", k=1_001_234))
    files = [{"path": "through nginx.txt", "bytes": len(text)}]
    begun = proxied.post("/api/uploads", json={"kind": "prompts", "name": "Mine", "files": files}).json()
    assert begun["piece"] == 1_000_000
    for start in (0, begun["piece"]):
        piece = text[start : start + begun["piece"]]
        answer = proxied.put(f"/api/uploads/{begun['id']}/files/0", params={"offset": start}, content=piece)
        assert answer.status_code == 200, answer.text
        assert answer.json()["files"][0]["received"] == start + len(piece)
    assert answer.json()["state"] == "done"
    assert (server.save_dir / "prompts" / "through nginx.txt").read_bytes() == text
