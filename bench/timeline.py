"""A picture of one click, with and without foresight: what the engine was asked for, and when it was done.

python bench/timeline.py                                     # writes docs/images/timeline.svg
python bench/timeline.py --reading 5 --into click.svg
"""

from __future__ import annotations

import argparse
import asyncio
import html
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.conftest import open_studio, ready, until  # noqa: E402

from trellis.messages import Assess, Event, Learn, Offer, Request  # noqa: E402
from trellis.studio.steering.background_work import CONTROL_SAMPLING  # noqa: E402
from trellis.workers.processes import ProcessSpawner  # noqa: E402
from trellis.workers.worker import Worker  # noqa: E402

COLOURS = {"learn": "#b7791f", "options": "#2f6f4f", "control": "#8a8f98", "figures": "#8a8f98", "written": "#8a8f98"}
WIDTH, LEFT, ROW = 940, 120, 26


@dataclass
class Span:
    what: str
    begun: float
    ended: float
    waited_for: bool


class Seen:
    """What an engine is asked for, with times in seconds."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        stream = Worker.stream

        async def seeing(
            worker: Worker, request: Request, priority: int = 0, *others: Any
        ) -> AsyncGenerator[Event, None]:
            span = Span(name_of(request), time.perf_counter(), 0.0, priority == 0)
            self.spans.append(span)
            try:
                async for event in stream(worker, request, priority, *others):
                    yield event
            finally:
                span.ended = time.perf_counter()

        Worker.stream = seeing  # type: ignore[method-assign, assignment]


def name_of(request: Request) -> str:
    match request:
        case Learn(keep=True):
            return "written"
        case Learn():
            return "learn"
        case Offer() if request.sampling == CONTROL_SAMPLING:
            return "control"
        case Offer():
            return "options"
        case Assess():
            return "figures"
    return request.type


@dataclass
class Click:
    spans: list[Span]
    first: float
    whole: float


async def click(folder: Path, seen: Seen, foresight: str, reading: float) -> Click:
    spawn = ProcessSpawner(folder / "weights", folder / "logs", 0)
    async with open_studio(folder, spawn, foresight=foresight) as studio:
        session = await studio.steering.create(None, {"seed": 3})
        session.add_watcher()
        for number in range(4):  # until a click learns from three choices beside its own
            await ready(session, 120)
            await asyncio.sleep(1)
            assert session.offer
            await session.commands.choose(session.offer.id, number % 4, f"r{number}")
        await ready(session, 120)
        seen.spans.clear()
        await asyncio.sleep(reading)
        first: list[float] = []
        publish = studio.hub.publish

        def publishing(topic: str, name: str, data: dict[str, Any]) -> str:
            if name == "option_delta" or (name == "offer_started" and data["options"][0]["text"]):
                first.append(time.perf_counter())
            return publish(topic, name, data)

        studio.hub.publish = publishing  # type: ignore[method-assign]
        assert session.offer
        choice = session._background.likely_choices()[2]
        started = time.perf_counter()
        await session.commands.choose(session.offer.id, choice, "click")
        await until(lambda: session.status == "ready", 60)
        whole = time.perf_counter()
        await asyncio.sleep(0.4)
        for span in seen.spans:
            span.begun, span.ended = span.begun - started, (span.ended or time.perf_counter()) - started
        await session.close()
        return Click(list(seen.spans), first[0] - started, whole - started)


def in_rows(spans: list[Span]) -> list[list[Span]]:
    """Spans that are under way at once stand in different rows."""
    rows: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.begun):
        row = next((row for row in rows if row[-1].ended <= span.begun + 0.002), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    return rows


def drawn(clicks: dict[str, Click], reading: float) -> str:
    last = max(click.whole for click in clicks.values()) + 0.25
    scale = (WIDTH - LEFT - 20) / (reading + last)
    at = lambda seconds: LEFT + (seconds + reading) * scale  # noqa: E731
    parts: list[str] = []
    y = 20
    for name, shown in clicks.items():
        parts.append(f'<text x="12" y="{y + 12}" font-weight="700">{html.escape(name)}</text>')
        told = f"first text after {shown.first * 1000:.0f} ms, all after {shown.whole * 1000:.0f} ms"
        parts.append(f'<text x="{LEFT}" y="{y + 12}">{told}</text>')
        y += 22
        top = y
        parts.append(f'<text x="12" y="{y + 16}">the person</text>')
        for begin, end, colour, what in (
            (-reading, 0.0, "#dfe3e8", "reads"),
            (0.0, shown.first, "#f0c9c4", ""),
            (shown.first, shown.whole, "#f7e6d0", ""),
        ):
            parts.append(box(at(begin), y, at(min(end, last)), colour, what, "#333"))
        y += ROW
        for number, row in enumerate(in_rows(shown.spans)):
            parts.append(f'<text x="12" y="{y + 16}">{"the engine" if number == 0 else ""}</text>')
            for span in row:
                begin, end = max(span.begun, -reading), min(span.ended, last)
                if end > begin:
                    parts.append(box(at(begin), y, at(end), COLOURS.get(span.what, "#8a8f98"), span.what, "#fff"))
            y += ROW
        parts.append(f'<path d="M{at(0):.1f} {top - 4}V{y}" stroke="#c0392b" stroke-width="2"/>')
        y += 18
    for second in range(-int(reading), int(last) + 1):
        parts.append(f'<text x="{at(second):.1f}" y="{y + 4}" text-anchor="middle">{second} s</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 16}" font-family="system-ui, sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def box(begin: float, y: float, end: float, colour: str, what: str, ink: str) -> str:
    told = f'<text x="{begin + 4:.1f}" y="{y + 15}" fill="{ink}">{what}</text>' if end - begin > 7 * len(what) else ""
    size = f'width="{max(end - begin - 1, 1):.1f}" height="{ROW - 5}"'
    return f'<rect x="{begin:.1f}" y="{y}" {size} fill="{colour}"/>{told}'


async def measure(reading: float) -> dict[str, Click]:
    seen = Seen()
    clicks = {}
    for name, foresight in (("Without", "off"), ("Foresight", "on")):
        with tempfile.TemporaryDirectory() as folder:
            clicks[name] = await click(Path(folder), seen, foresight, reading)
    return clicks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", type=float, default=3.0, help="seconds")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "images" / "timeline.svg")
    chosen = parser.parse_args()
    clicks = asyncio.run(measure(chosen.reading))
    for name, shown in clicks.items():
        print(f"{name:10} first text after {shown.first * 1000:.0f} ms, all after {shown.whole * 1000:.0f} ms")
    chosen.into.write_text(drawn(clicks, chosen.reading))
    print(f"drawn into {chosen.into}")


if __name__ == "__main__":
    main()
