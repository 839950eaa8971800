"""Pages of other sites in a real browser: what they can do at `/v1` with a key, and without one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.server import Server

ASK = """async ([url, key, credentials]) => {
  const headers = {"content-type": "application/json", "x-stainless-lang": "js"};
  if (key) headers.authorization = `Bearer ${key}`;
  const body = JSON.stringify({model: "demo", messages: [{role: "user", content: "Hello"}], stream: true});
  try {
    const response = await fetch(`${url}/v1/chat/completions`, {method: "POST", headers, body, credentials});
    return [response.status, await response.text()];
  } catch (error) {
    return [0, String(error)];
  }
}"""


class Elsewhere(BaseHTTPRequestHandler):
    """A site that has nothing to do with the studio."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>Elsewhere</title>")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    site = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{site.server_port}/"
    site.shutdown()
    site.server_close()


@pytest.mark.parametrize("password", ["", "correct horse"])
def test_a_page_elsewhere_needs_a_key_and_no_cookie_helps(
    browser: Browser, elsewhere: str, tmp_path: Path, password: str
) -> None:
    server = Server(tmp_path / "save", TRELLIS_PASSWORD=password)
    context = browser.new_context()
    try:
        with server.client() as owner:
            owner.post("/login", data={"password": password})
            key = owner.post("/api/keys", json={"name": "a page"}).json()["key"]
        page = context.new_page()
        if password:
            page.goto(f"{server.url}/login")
            page.fill("input[name=password]", password)
            page.press("input[name=password]", "Enter")
            page.wait_for_url(lambda url: "/login" not in url)
        local = tmp_path / "page.html"
        local.write_text("<!doctype html><title>A file</title>")
        for address in (elsewhere, local.as_uri()):
            page.goto(address)
            status, text = page.evaluate(ASK, [server.url, key, "omit"])
            assert status == 200, text
            assert "data: [DONE]" in text
            wrong, text = page.evaluate(ASK, [server.url, "trellis-wrong", "omit"])
            assert wrong == 401
            assert "invalid_api_key" in text
            for none, credentials in ((None, "omit"), (None, "include"), (key, "include"), ("x", "include")):
                status, text = page.evaluate(ASK, [server.url, none, credentials])
                assert status == 0, "the browser gives the page nothing"
                assert "Failed to fetch" in text
    finally:
        context.close()
        server.stop()
