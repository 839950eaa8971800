from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.server import Server

EXPECTED = re.compile(r"Failed to load resource|net::|^htmx:|^Response Status Error")
"""What browsers and htmx write to the console when a server is away or refuses; the pages tell of it themselves."""

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def chromium() -> str | None:
    """The browser to drive: one that was named, Debian's, or (None) Playwright's own."""
    named = os.environ.get("TRELLIS_TEST_BROWSER")
    return named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


expect.set_options(timeout=20_000)  # a busy machine is slow, and that is not what these tests are about


@pytest.fixture(scope="package")  # no longer: its event loop would be in the way of asynchronous tests
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Shared by many tests, which start more in a minute than one person may.
    server = Server(tmp_path_factory.mktemp("save"), TRELLIS_RATE_LIMIT="0")
    yield server
    assert server.stop() == 0


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Pages that fail the test when their script does, or when the policy stopped something."""
    contexts: list[Any] = []
    problems: list[str] = []

    def open(**options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: (
                problems.append(message.text) if message.type == "error" and not EXPECTED.search(message.text) else None
            ),
        )
        return page

    yield open
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def save_dir(tmp_path: Path) -> Path:
    return tmp_path / "save"
