"""How the studio holds up: many steps, many sessions, many tabs, many prompts, a long prompt.

    python bench/scale.py            # everything, about ten minutes on two cores
    python bench/scale.py --steps 100

Server times are from the sending of a request to the whole answer, over one kept connection on this computer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the server that tests start is the one that is measured
API = "/api/steering/sessions"


def row(what: str, value: str, beside: str = "") -> None:
    print(f"{what:<58} {value:>14}  {beside}", flush=True)


def timed(work: Callable[[], Any], times: int = 20) -> tuple[float, float]:
    """Median and 95th percentile in milliseconds."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begun) * 1000)
    taken.sort()
    return statistics.median(taken), taken[max(0, round(len(taken) * 0.95) - 1)]


def pages(client: httpx.Client, paths: dict[str, str]) -> None:
    for what, path in paths.items():
        client.get(path)
        median, high = timed(lambda path=path: client.get(path).raise_for_status())  # type: ignore[misc]
        row(f"  {what}", f"{median:.1f} ms", f"p95 {high:.1f} ms")


def resident(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss) / 1e6


def wait_ready(client: httpx.Client, session: str) -> dict[str, Any]:
    while True:
        state: dict[str, Any] = client.get(f"{API}/{session}").json()
        if state["status"] == "ready":
            return state
        assert state["status"] != "failed", state["error"]
        time.sleep(0.01)


def watch(server: Any, session: str) -> None:
    """A page that is open until the server ends."""
    events = f"{server.url}{API}/{session}/events"
    with suppress(httpx.HTTPError), httpx.stream("GET", events, timeout=None) as stream:
        for _ in stream.iter_bytes():
            pass


def many_steps(steps: int) -> None:
    from tests.server import Server

    print(f"\n{steps} steps of one session on the demo model")
    config = {"max_new_tokens": 12, "inner_steps": 1, "replay": 1, "group_size": 2}
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), fake=False, TRELLIS_RATE_LIMIT="0")
        with server.client() as client:
            session = client.post(API, json={"config": config}).json()["id"]
            threading.Thread(target=watch, args=(server, session), daemon=True).start()  # what is seen is foreseen
            begun = time.perf_counter()
            for step in range(1, steps + 1):
                state = wait_ready(client, session)
                client.post(f"{API}/{session}/choose", json={"offer": state["offer"]["id"], "choice": step % 2})
                if step in (10, steps // 5, steps // 2, steps):
                    wait_ready(client, session)
                    (engine,) = server.engine_pids()
                    disk = sum(file.stat().st_size for file in (Path(folder) / "weights").rglob("*") if file.is_file())
                    row(
                        f"  after {step} steps: web, engine, weights on disk", f"{resident(server.process.pid):.0f} MB",
                        f"{resident(engine):.0f} MB, {disk / 1e6:.0f} MB",
                    )  # fmt: skip
            row("  a step", f"{(time.perf_counter() - begun) / steps * 1000:.0f} ms")
            place = f"/steer/{session}"
            parts = {
                "workbench": place, "tree, folded": f"{place}/side/tree", "tree, all": f"{place}/side/tree?all=1",
                "figures": f"{place}/side/figures", "review": f"{place}/review", "state": f"{API}/{session}",
                "tree as JSON": f"{API}/{session}/tree",
            }  # fmt: skip
            pages(client, parts)
            root = client.get(f"{API}/{session}/tree").json()["nodes"]
            far = root[len(root) // 2 + 3]["id"]
            begun = time.perf_counter()
            client.post(f"{API}/{session}/goto", json={"node": far})
            wait_ready(client, session)
            row("  back to a step whose weights were pruned", f"{(time.perf_counter() - begun) * 1000:.0f} ms")
        server.stop()
        begun = time.perf_counter()
        server.start()
        with server.client() as client:
            client.get(f"{API}/{session}").raise_for_status()
            row("  the studio started again and the session opened", f"{(time.perf_counter() - begun) * 1000:.0f} ms")
        server.stop()


def many_sessions(count: int) -> None:
    from tests.server import Server

    print(f"\n{count} sessions in the list (fake engine)")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), TRELLIS_RATE_LIMIT="0")
        with server.client() as client:
            for _ in range(count):
                client.post(API, json={"config": {"control_prompt": ""}}).raise_for_status()
            time.sleep(5)
            pages(client, {"first page": "/", "first page, all": "/?all=1", "searched": "/?q=hop", "as JSON": API,
                           "form of all options": "/new", "models": "/models", "healthz": "/healthz"})  # fmt: skip
        server.stop()


def many_tabs(count: int) -> None:
    from tests.server import Server, read_events

    print(f"\n{count} tabs on one session (demo model)")
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder), fake=False, TRELLIS_RATE_LIMIT="0")
        with server.client() as client:
            session = client.post(API, json={"config": {"control_prompt": "", "max_new_tokens": 48}}).json()["id"]
            wait_ready(client, session)
            seen: list[float] = []

            def watch() -> None:
                with server.client() as own, own.stream("GET", f"{API}/{session}/events", timeout=60) as response:
                    for _, name, _data in read_events(response):
                        if name == "offer_ready":
                            seen.append(time.perf_counter())
                            return

            for tabs in (1, count):
                state = wait_ready(client, session)
                seen.clear()
                threads = [threading.Thread(target=watch) for _ in range(tabs)]
                for thread in threads:
                    thread.start()
                time.sleep(0.5)
                begun = time.perf_counter()
                client.post(f"{API}/{session}/choose", json={"offer": state["offer"]["id"], "choice": 0})
                answers = [timed(lambda: client.get("/healthz"), 1)[0] for _ in range(50)]
                for thread in threads:
                    thread.join()
                last = (max(seen) - begun) * 1000
                beside = f"healthz meanwhile {statistics.median(answers):.1f} ms"
                row(f"  {tabs} tab(s): click to whole options in the last", f"{last:.0f} ms", beside)
        server.stop()


def many_prompts(count: int) -> None:
    from tests.server import Server

    print(f"\n{count:,} prompts in a file (fake engine)".replace(",", " "))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts" / "million.jsonl"
        file.parent.mkdir()
        with file.open("w") as out:
            for number in range(count):
                out.write(json.dumps({"prompt": f"What would plant number {number} say about the weather?"}) + "\n")
        server = Server(Path(folder), TRELLIS_RATE_LIMIT="0")
        dataset = {"source": "file", "id": "million.jsonl"}
        with server.client() as client:
            median, high = timed(
                lambda: client.post("/api/steering/preview", json={"dataset": dataset}).raise_for_status(), 5
            )
            row(
                f"  preview of a file of {file.stat().st_size / 1e6:.0f} MB", f"{median:.0f} ms", f"worst {high:.0f} ms"
            )
            begun = time.perf_counter()
            session = client.post(API, json={"config": {"dataset": dataset, "control_prompt": ""}}).json()["id"]
            slow = 0.0
            while client.get(f"{API}/{session}").json()["status"] != "ready":
                slow = max(slow, timed(lambda: client.get("/healthz"), 1)[0])
            row(
                "  to the first options, all prompts made ready",
                f"{time.perf_counter() - begun:.1f} s",
                f"healthz at most {slow:.1f} ms",
            )
            median, high = timed(lambda: (client.post(f"{API}/{session}/skip"), wait_ready(client, session)))
            row("  a skip to the next prompt and its options", f"{median:.0f} ms", f"p95 {high:.0f} ms")
            row("  web process", f"{resident(server.process.pid):.0f} MB")
        server.stop()


def long_prompt(tokens: int) -> None:
    from tests.server import Server
    from tests.tiny import make_llama

    print(f"\na prompt of {tokens} tokens (a random Llama of 8 layers)")
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder) / "models" / "long", hidden=128, layers=8, positions=8192)
        server = Server(Path(folder), fake=False, TRELLIS_RATE_LIMIT="0")
        with server.client() as client:
            config = {
                "model": "long",
                "context_length": 8192,
                "max_new_tokens": 32,
                "control_prompt": "",
                "inner_steps": 1,
            }
            session = client.post(API, json={"config": config}).json()["id"]
            wait_ready(client, session)
            text = "sea " * tokens
            begun = time.perf_counter()
            client.post(f"{API}/{session}/prompt", json={"text": text}).raise_for_status()
            state = wait_ready(client, session)
            row("  edited prompt to whole options", f"{time.perf_counter() - begun:.1f} s")
            begun = time.perf_counter()
            client.post(f"{API}/{session}/choose", json={"offer": state["offer"]["id"], "choice": 0})
            wait_ready(client, session)
            row("  click to the next whole options", f"{time.perf_counter() - begun:.1f} s")
            pages(client, {"workbench": f"/steer/{session}"})
            (engine,) = server.engine_pids()
            row("  engine", f"{resident(engine):.0f} MB")
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--tabs", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=7980)
    chosen = parser.parse_args()
    print(f"{platform.platform()}, {psutil.cpu_count()} cores, Python {platform.python_version()}")
    many_sessions(chosen.sessions)
    many_prompts(chosen.prompts)
    many_tabs(chosen.tabs)
    long_prompt(chosen.tokens)
    many_steps(chosen.steps)


if __name__ == "__main__":
    main()
