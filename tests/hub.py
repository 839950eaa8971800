"""A hub on this computer that speaks the Hugging Face hub's protocol over a folder: `models/org/name/…`, `datasets/…`.

It can break off, hang, refuse, and count what it sent, so that a test sees what a bad network does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class FakeHub:
    """Serves until it is closed. `gated` repositories answer 403; with `hang` set nothing is answered any more."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        self.hang = False
        self.disconnect_after: int | None = None
        self.seconds_per_chunk = 0.0
        self.bytes_sent: dict[str, int] = {}
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                return

            def do_GET(self) -> None:
                hub._handle(self, body=True)

            def do_HEAD(self) -> None:
                hub._handle(self, body=False)

            def do_POST(self) -> None:
                hub._handle(self, body=True)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                return  # clients that go away are part of the tests

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.hang = False
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        url = urlsplit(handler.path)
        path = unquote(url.path)
        self.requests.append(f"{handler.command} {handler.path}")
        length = int(handler.headers.get("content-length") or 0)
        posted = handler.rfile.read(length) if length else b""
        if token := handler.headers.get("authorization"):
            self.tokens.add(token.removeprefix("Bearer "))
        while self.hang:
            time.sleep(0.05)
        if found := re.fullmatch(
            r"/api/(models|datasets)/([^/]+(?:/[^/]+)?)(?:/(revision|tree|paths-info)/(.+))?", path
        ):
            self._send_api(handler, *found.groups(), parse_qs(url.query), posted)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            kind = "datasets" if found[1] else "models"
            self._send_file(handler, kind, found[2], found[3], found[4], body)
        else:
            self._send_json(handler, 404, {"error": "Not Found"})

    def _send_api(
        self, handler: Any, kind: str, repository: str, what: str | None, at: str | None, query: Any, posted: bytes
    ) -> None:
        folder = self.root / kind / repository
        if repository in self.gated:
            self._send_json(handler, 403, {"error": "gated"}, {"x-error-code": "GatedRepo"})
        elif not folder.is_dir():
            self._send_json(handler, 401, {"error": "Repository not found"}, {"x-error-code": "RepoNotFound"})
        elif at and at.split("/")[0] not in ("main", COMMIT):
            self._send_json(handler, 404, {"error": "Invalid rev id"}, {"x-error-code": "RevisionNotFound"})
        elif what == "tree":
            inside = at.partition("/")[2] if at else ""
            self._send_json(handler, 200, self._list_tree(folder, inside, "recursive" in query))
        elif what == "paths-info":
            wanted = parse_qs(posted.decode()).get("paths") or json.loads(posted or b"{}").get("paths", [])
            rows = [row for row in self._list_tree(folder, "", True) if row["path"] in wanted]
            self._send_json(handler, 200, rows)
        else:
            files = [row for row in self._list_tree(folder, "", True) if row["type"] == "file"]
            siblings = [{"rfilename": row["path"], "size": row["size"], "blobId": row["oid"]} for row in files]
            self._send_json(
                handler, 200,
                {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False,
                 "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0},
            )  # fmt: skip

    def _list_tree(self, folder: Path, inside: str, recursive: bool) -> list[dict[str, Any]]:
        root = folder / inside
        rows = []
        for file in sorted(root.rglob("*") if recursive else root.iterdir()):
            name = str(file.relative_to(folder))
            if file.is_dir():
                rows.append(
                    {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
                )
            else:
                rows.append({"type": "file", "path": name, "oid": _etag(file), "size": file.stat().st_size})
        return rows

    def _send_file(self, handler: Any, kind: str, repository: str, revision: str, name: str, body: bool) -> None:
        file = self.root / kind / repository / name
        if repository in self.gated:
            self._send_json(handler, 403, {"error": "gated"}, {"x-error-code": "GatedRepo"})
            return
        if revision not in ("main", COMMIT):
            self._send_json(handler, 404, {"error": "Invalid rev id"}, {"x-error-code": "RevisionNotFound"})
            return
        if not file.is_file():
            self._send_json(handler, 404, {"error": "Entry not found"}, {"x-error-code": "EntryNotFound"})
            return
        data = file.read_bytes()
        start, end = 0, len(data)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("range", "")):
            start, end = int(found[1]), int(found[2]) + 1 if found[2] else len(data)
        handler.send_response(206 if "range" in handler.headers else 200)
        for header, value in {
            "content-length": str(end - start), "etag": f'"{_etag(file)}"', "x-repo-commit": COMMIT,
            "accept-ranges": "bytes", "content-type": "application/octet-stream",
            "content-range": f"bytes {start}-{end - 1}/{len(data)}",
        }.items():  # fmt: skip
            handler.send_header(header, value)
        handler.end_headers()
        if not body:
            return
        for at in range(start, end, 16_384):
            piece = data[at : min(at + 16_384, end)]
            if self.disconnect_after is not None and self.bytes_sent.get(name, 0) + len(piece) > self.disconnect_after:
                handler.close_connection = True
                handler.connection.close()
                return
            while self.hang:
                time.sleep(0.05)
            handler.wfile.write(piece)
            self.bytes_sent[name] = self.bytes_sent.get(name, 0) + len(piece)
            if self.seconds_per_chunk:
                handler.wfile.flush()
                time.sleep(self.seconds_per_chunk)

    def _send_json(self, handler: Any, status: int, data: Any, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(data).encode()
        handler.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(text)),
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(text)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
