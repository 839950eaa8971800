"""Simulated people who like one voice: how soon does the model speak in it, on prompts it was not steered on?

    python bench/people.py --voices pirate,poet,terse --seeds 3 --clicks 20

Each person goes through the real studio and a real engine: chooses the option in their voice, else "none of
these". The share of the voice is measured on prompts that are held out from steering, 16 answers to each of 5.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from trellis.blobs import Blobs
from trellis.demo.prompts import load_prompts
from trellis.demo.voices import voice_of
from trellis.store.store import Store, migrate
from trellis.studio.session import Session
from trellis.studio.studio import Studio
from trellis.workers.processes import ProcessSpawner

HELD_OUT = load_prompts("held_out")[:5]
ANSWERS = 16


async def ready(session: Session) -> dict[str, Any]:
    while session.status != "ready":
        if session.error:
            raise session.error
        await asyncio.sleep(0.002)
    return session.state()


async def share(studio: Studio, session: Session, voice: str) -> tuple[float, int]:
    """The share of a voice among answers to held-out prompts, and how many of them are distinct."""
    answers: list[str] = []
    for prompt in HELD_OUT:
        answers += await studio.steering.sample(session.id, prompt, None, ANSWERS, {})
    return sum(voice_of(answer) == voice for answer in answers) / len(answers), len(set(answers))


async def person(studio: Studio, voice: str, seed: int, clicks: int, at: list[int], config: dict[str, Any]) -> Any:
    session = await studio.steering.create(None, {"seed": seed, "control_prompt": "", **config})
    shares, distinct, seconds, nones = {}, {}, [], 0
    for click in range(clicks + 1):
        state = await ready(session)
        if click in at:
            shares[click], distinct[click] = await share(studio, session, voice)
        if click == clicks:
            break
        offer = state["offer"]
        fitting = [option["index"] for option in offer["options"] if voice_of(option["text"]) == voice]
        nones += not fitting
        started = time.perf_counter()
        await session.choose(offer["id"], fitting[0] if fitting else "none", f"click-{click}")
        while session.busy:
            await asyncio.sleep(0.001)
        seconds.append(time.perf_counter() - started)
    return {
        "voice": voice, "seed": seed, "share": shares, "distinct": distinct, "nones": nones,
        "drift": state["head"]["drift"], "learn_seconds": statistics.median(seconds),
    }  # fmt: skip


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voices", default="pirate,poet,terse")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--config", type=json.loads, default={}, help="options of the session, as JSON")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of the engine; 0 takes one per core")
    parser.add_argument("--json", type=Path, help="write every figure to a file")
    arguments = parser.parse_args()
    at = sorted({0, arguments.clicks // 2, arguments.clicks})
    results = []
    with tempfile.TemporaryDirectory() as folder:
        save = Path(folder)
        url = f"sqlite:///{save / 'trellis.db'}"
        migrate(url)
        studio = Studio(
            Store(url),
            ProcessSpawner(save / "weights", save / "logs", arguments.threads, fake=False),
            save / "models",
            Blobs(save / "weights"),
        )
        await studio.open()
        print(f"{platform.machine()}, {ANSWERS} answers to each of {len(HELD_OUT)} held-out prompts")
        print(f"{'voice':12} {'seed':>4}  " + "".join(f"{f'after {n}':>10}" for n in at) + "   nones   drift  s/click")
        for voice in arguments.voices.split(","):
            for seed in range(arguments.seeds):
                row = await person(studio, voice, seed, arguments.clicks, at, arguments.config)
                results.append(row)
                print(
                    f"{voice:12} {seed:4}  "
                    + "".join(f"{row['share'][n]:>10.0%}" for n in at)
                    + f"   {row['nones']:5}  {row['drift']:6.2%}  {row['learn_seconds']:7.2f}"
                    + f"   distinct {[row['distinct'][n] for n in at]}",
                    flush=True,
                )
        await studio.close()
    for n in at:
        print(f"median after {n}: {statistics.median(row['share'][n] for row in results):.0%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
