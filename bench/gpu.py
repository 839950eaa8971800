"""Everything that needs a GPU, in one run of under ten minutes and one table: the tests that are skipped elsewhere,
drawing, learning, a click, and a batch of conversations. Parts that there is no time left for are listed as left out.

    python bench/gpu.py                       # a random Llama of 1.2 billion parameters in bf16
    python bench/gpu.py --model FOLDER        # a model of yours
    python bench/gpu.py --rehearse            # the same script on a CPU with the demo model: says nothing about speed
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import random_model
from chats import MODEL, Talk, run
from decoding import group_speed, waited
from trellis.messages import Learn, Lesson, Offer, Prompt
from trellis.options import Learning, Sampling

ROOT = Path(__file__).resolve().parent.parent
SIZE = "1.2 billion"
PROMPT = "Tell me about the sea, and why it keeps its own time."


@dataclass(frozen=True)
class Row:
    """One line of the table. `ratio` is against what `against` names, within this run."""

    what: str
    value: str
    ratio: str = ""
    against: str = ""


def tests() -> Iterator[Row]:
    """The tests that are skipped where there is no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "tests/engine/test_cuda.py"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        print(found.stdout[-4000:], found.stderr[-2000:], sep="\n")
    last = found.stdout.strip().splitlines()
    yield Row("tests/engine/test_cuda.py", last[-1].strip("= ") if last else f"exit status {found.returncode}")


def drawing(make: Callable[[], Any], tokenizer: Path, tokens: int, times: int) -> Iterator[Row]:
    """Groups of answers, beside transformers' `generate` with the same adapter."""
    found = group_speed(make, tokenizer, tokens, times)
    yield Row("drawing, tokens/s", f"{found.ours:.0f}", f"{found.ours / found.theirs:.2f}", "generate with PEFT")
    yield Row("drawing, first token", f"{found.first * 1000:.1f} ms")
    yield Row("drawing, one step", f"{found.step * 1000:.2f} ms", f"{found.of_memory:.0%}", "what the memory can read")


def clicks(talk: Talk, tokens: int, times: int) -> Iterator[Row]:
    """Learning from a choice, and a click as a person has it: learning, then the next options."""
    engine, weights = talk.engine, talk.weights[0]
    device = engine.loaded.info.device
    learning = Learning(learning_rate=1e-4, target_share=0.999)  # never reached: all inner steps are taken
    offered = run(engine.offer(offer_of(weights, tokens, 0)))
    learned_in, clicked_in, steps, replay = [], [], [], []
    for number in range(1, times + 2):
        lesson = Lesson(prompt=Prompt(text=PROMPT), options=offered.options, choice=0, temperature=1.0)
        request = Learn(
            weights=weights,
            lesson=lesson,
            replay=tuple(replay[-3:]),
            learning=learning,
            context_length=1024,
            keep=False,
        )
        started = waited(device)
        learned = run(engine.learn(request))
        learned_in.append(waited(device) - started)
        weights = learned.weights
        offered = run(engine.offer(offer_of(weights, tokens, number)))
        clicked_in.append(waited(device) - started)
        steps.append(learned.metrics.inner_steps)
        replay.append(lesson)
    per_step = statistics.median(seconds / count for seconds, count in zip(learned_in[1:], steps[1:], strict=True))
    learns, whole = statistics.median(learned_in[1:]), statistics.median(clicked_in[1:])
    yield Row(
        "learning from a choice, up to 3 replayed", f"{learns:.2f} s", f"{per_step * 1000:.0f} ms", "an inner step"
    )
    yield Row(
        f"a click: learning and 4 options of {tokens} tokens", f"{whole:.2f} s", f"{whole / learns:.2f}", "learning"
    )


def offer_of(weights: str, tokens: int, seed: int) -> Offer:
    return Offer(
        weights=weights, prompt=Prompt(text=PROMPT), sampling=Sampling(max_new_tokens=tokens), group_size=4, seed=seed,
        context_length=1024,
    )  # fmt: skip


def conversations(talk: Talk, times: int) -> Iterator[Row]:
    """A batch of conversations, beside the same ones one after another."""
    cases = [("8 conversations one by one", 8, 1, False), ("8 together", 8, 1, True), ("32 together", 32, 1, True),
             ("32 together, 16 adapters", 32, 16, True)]  # fmt: skip
    alone = 0.0
    for name, count, adapters, together in cases:
        weights = talk.weights[:adapters] if adapters > 1 else [""]
        speeds = [talk.speed(count, weights, together) for _ in range(times + 1)][1:]
        speed = statistics.median(speeds)
        alone = alone or speed
        yield Row(f"{name}, tokens/s", f"{speed:.0f}", f"{speed / alone:.2f}", "one by one")


def table(rows: list[Row]) -> str:
    lines = [("what", "value", "ratio", "to"), *((row.what, row.value, row.ratio, row.against) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder instead of a random model")
    parser.add_argument("--tokens", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--times", type=int, default=5, help="rounds; medians are shown")
    parser.add_argument("--minutes", type=float, default=9.0, help="after so many, what is left is left out")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU with the demo model")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("There is no GPU here. `--rehearse` runs the script on a CPU.", file=sys.stderr)
        return 2
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()
    on_gpu = torch.cuda.is_available() and not arguments.rehearse
    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model
        if model is None and on_gpu:
            model = Path(folder) / "model"
            random_model.save(SIZE, model)
        model = model or MODEL
        device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)

        def make() -> Any:
            base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(device)
            return base.eval().requires_grad_(False)

        talks: list[Talk] = []

        def talk() -> Talk:
            if not talks:
                talks.append(Talk(str(Path(folder) / "weights"), 16, model, device))
            return talks[0]

        parts: dict[str, Callable[[], Iterator[Row]]] = {
            "tests": tests,
            "drawing": lambda: drawing(make, model, arguments.tokens, arguments.times),
            "clicks": lambda: clicks(talk(), arguments.tokens, arguments.times),
            "conversations": lambda: conversations(talk(), arguments.times),
        }
        for name, part in parts.items():
            seconds = time.monotonic() - began
            if seconds > arguments.minutes * 60:
                rows.append(Row(name, "left out: no time"))
                continue
            for row in part():
                rows.append(row)
                print(f"  {time.monotonic() - began:5.0f} s  {row.what}: {row.value}", flush=True)
    print(f"\n{table(rows)}")
    if on_gpu:
        print(f"\nmost memory taken by this process: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
