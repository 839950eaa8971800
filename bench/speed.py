"""The speed of the loop, side by side in one run: from a click to the next options.

    python bench/speed.py                        # the demo model, in a real browser where there is one
    python bench/speed.py --model FOLDER --reading 0,5

Clicks with and without time to read, with foresight and without; undo and redo; beside them what a click cost in the
first Trellis (bench/baseline.py). In a browser the clock runs from the key to the frame in which the text is there.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the server that tests start is the one that is measured
DEMO = ROOT / "src" / "trellis" / "demo" / "text" / "model"

WATCH = """
() => {
  const offer = () => document.querySelector("#choose [name=offer]").value;
  const texts = () => [...document.querySelectorAll("[data-text]")].map((place) => place.textContent);
  const seen = () => document.querySelector("[data-status]").dataset.status;
  window.bench = { before: offer(), pressed: 0, first: 0, all: 0 };
  const look = () => {
    const bench = window.bench;
    if (!bench.pressed || bench.all || offer() === bench.before) return;
    if (!bench.first && texts().some(Boolean)) bench.first = performance.now() - bench.pressed;
    if (texts().every(Boolean) && seen() === "ready") bench.all = performance.now() - bench.pressed;
  };
  // The frame after a change, and none where nothing changes: a clock that draws all the time would be measured too.
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; setTimeout(look); });
  }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
  addEventListener("keydown", () => {
    window.bench = { before: offer(), pressed: performance.now(), first: 0, all: 0 };
  }, true);
}
"""


class Person:
    """Somebody who presses keys and sees what comes of them."""

    def press(self, key: str) -> tuple[float, float]:
        """Seconds from a key to the first new text, and to all of it."""
        raise NotImplementedError

    def press_after(self, reading: float, key: str) -> tuple[float, float]:
        time.sleep(reading)
        return self.press(key)


class InBrowser(Person):
    """A person with a browser: keys, and what is on the screen."""

    def __init__(self, page: Any, session: str) -> None:
        self._page = page
        page.goto(session)
        page.wait_for_selector("[data-status=ready]", timeout=300_000)
        page.evaluate(WATCH)

    def press(self, key: str) -> tuple[float, float]:
        self._page.keyboard.press(key)
        self._page.wait_for_function("window.bench.all > 0", timeout=300_000, polling=20)
        seen = self._page.evaluate("window.bench")
        return seen["first"] / 1000, seen["all"] / 1000


class OnTheWire(Person):
    """A program that follows the events as a page does."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        from tests.server import read_events

        self._client, self._url = client, f"/api/steering/sessions/{session}"
        self._events = self._follow(read_events)
        self._offer, *_ = next(self._events)

    def _follow(self, read_events: Any) -> Iterator[tuple[str, float, float]]:
        """(offer, when its first text came, when it was whole)."""
        first = 0.0
        with self._client.stream("GET", f"{self._url}/events", timeout=None) as stream:
            for _, name, data in read_events(stream):
                now = time.perf_counter()
                if name == "state" and data["status"] == "ready":
                    yield data["offer"]["id"], now, now
                elif name == "offer_started":
                    first = 0.0
                elif name == "option_delta":
                    first = first or now
                elif name == "offer_ready":
                    yield data["offer"], first or now, now

    def press(self, key: str) -> tuple[float, float]:
        started = time.perf_counter()
        body = {"offer": self._offer, "choice": "abcd".index(key)} if key in "abcd" else {}
        what = {"u": "undo", "r": "redo"}.get(key, "choose")
        self._client.post(f"{self._url}/{what}", json=body).raise_for_status()
        self._offer, first, whole = next(self._events)
        return first - started, whole - started


def late(values: list[float]) -> float:
    """The 95th percentile."""
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


def middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def row(what: str, seen: list[tuple[float, float]]) -> None:
    cells = [f"{middle(each) * 1000:7.0f} {late(each) * 1000:7.0f}" for each in map(list, zip(*seen, strict=True))]
    print(f"{what:44} {cells[0]}   {cells[1]}", flush=True)


@contextmanager
def person(server: Any, browser: Any, config: dict[str, Any]) -> Iterator[Any]:
    from tests.server import wait_ready

    with server.client() as client:
        made = client.post("/api/steering/sessions", json={"config": config}).json()
        wait_ready(client, made["id"], 300)
        if browser is None:
            yield OnTheWire(client, made["id"])
            return
        page = browser.new_page(viewport={"width": 1440, "height": 900}, bypass_csp=True)  # the clock is a script
        yield InBrowser(page, f"{server.url}/steer/{made['id']}")
        page.close()


def loop(browser: Any, model: str, foresight: str, readings: list[float], clicks: int, device: str) -> None:
    import psutil

    environment = {"TRELLIS_FORESIGHT": foresight}
    if model:
        environment["TRELLIS_MODEL_DIRS"] = str(Path(model).parent)
    config: dict[str, Any] = {"control_prompt": "", "max_new_tokens": 96, "device": device}
    config |= {"model": Path(model).name} if model else {}
    dice = random.Random(1)
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), environment) as (server, health):
        for reading in readings:
            with person(server, browser, config | {"seed": int(reading * 10)}) as someone:
                seen = []
                for _ in range(clicks + 1):
                    seen.append(someone.press_after(reading, "abcd"[dice.randrange(4)]))
                row(f"choose, {reading:g} s to read, foresight {foresight}", seen[1:])
                if reading == readings[-1]:
                    for key, what in (("u", "undo"), ("r", "redo")):
                        row(
                            f"{what}, foresight {foresight}",
                            [someone.press_after(0.5, key) for _ in range(min(clicks, 15))],
                        )
        row("/healthz meanwhile", [(seconds, seconds) for seconds in health])
        web = psutil.Process(server.process.pid).memory_info().rss
        engine = psutil.Process(server.engines()[0]).memory_info().rss
        print(f"  up after {server.seconds_to_start:.2f} s; web {web / 1e6:.0f} MB, engine {engine / 1e6:.0f} MB")


@contextmanager
def running(folder: Path, environment: dict[str, str]) -> Iterator[tuple[Any, list[float]]]:
    """The real server, and how long it takes to answer meanwhile."""
    from tests.server import Server

    server = Server(folder, fake=False, **environment)
    health: list[float] = []
    ended = threading.Event()
    polling = threading.Thread(target=poll_health, args=(server.url, health, ended), daemon=True)
    polling.start()
    try:
        yield server, health
    finally:
        ended.set()
        polling.join()
        server.stop()


def poll_health(base: str, seconds: list[float], ended: threading.Event) -> None:
    """How long the event loop takes to answer while a model works beside it."""
    with httpx.Client(base_url=base) as client:
        while not ended.wait(0.1):
            started = time.perf_counter()
            client.get("/healthz")
            seconds.append(time.perf_counter() - started)


@contextmanager
def a_browser() -> Iterator[Any]:
    """Chromium, or None where there is none to drive."""
    try:
        from playwright.sync_api import Error, sync_playwright
        from tests.journeys.conftest import FLAGS, chromium
    except ImportError:
        yield None
        return
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        except Error:
            yield None
            return
        yield browser
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--reading", default="0,1,3,10", help="seconds, with commas")
    parser.add_argument("--model", default="", help="a folder with a model; the demo model where it is left out")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-baseline", action="store_true")
    arguments = parser.parse_args()
    readings = [float(seconds) for seconds in arguments.reading.split(",")]
    with a_browser() as browser:
        where = "in Chromium, from the key to the frame that shows it" if browser else "on the wire"
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {where}", flush=True)
        print(f"{'milliseconds: median, 95th percentile':44}   first new text     all options")
        loop(browser, arguments.model, "off", readings[:1], arguments.clicks, arguments.device)
        loop(browser, arguments.model, "on", readings, arguments.clicks, arguments.device)
    if not arguments.no_baseline:
        import torch

        import baseline
        from trellis.demo.text.prompts import load_prompts

        device = "cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu"
        model = Path(arguments.model or DEMO)
        row("the first Trellis's click", baseline.clicks(model, arguments.clicks + 1, load_prompts("steer"), device))


if __name__ == "__main__":
    main()
