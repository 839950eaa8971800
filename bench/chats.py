"""Many conversations with one model: what a shared batch gains, what adapters of their own cost in it, what a warm
beginning saves, and what talking costs somebody who steers. The demo model, in one process; ratios within one run.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import trellis.demo.text
from trellis.blobs import Blobs
from trellis.engine.handlers import TextEngine
from trellis.messages import AnswerDone, Chat, CreateAdapter, Load, PromptRead, Turn
from trellis.options import Adapter, Device, Sampling

LONGEST = 64
MODEL = Path(trellis.demo.text.__file__).parent / "model"


def run(steps: Iterator[Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Talk:
    """An engine with some adapters, and conversations that all say as much."""

    def __init__(self, folder: str, adapters: int, model: Path = MODEL, device: Device = "auto") -> None:
        self.engine = TextEngine(Blobs(Path(folder)))
        run(self.engine.load(Load(path=str(model), device=device)))
        self.weights = [
            run(self.engine.create_adapter(CreateAdapter(adapter=Adapter(), seed=seed))).weights
            for seed in range(adapters)
        ]
        self.numbers = 0

    def asked(self, number: int, weights: list[str], turns: tuple[Turn, ...] = ()) -> Chat:
        self.numbers += 1
        text = f"Tell me about the sea, number {self.numbers}."
        return Chat(
            turns=turns or (Turn(role="user", text=text),), weights=weights[number % len(weights)],
            sampling=Sampling(max_new_tokens=LONGEST), seed=self.numbers,
        )  # fmt: skip

    def speed(self, count: int, weights: list[str], together: bool = True) -> float:
        """Tokens a second of so many conversations."""
        requests = [self.asked(number, weights) for number in range(count)]
        started, tokens = time.perf_counter(), 0
        for group in [requests] if together else [[request] for request in requests]:
            for number, request in enumerate(group):
                self.engine._chat_batch.join(number, str(number), request)
            while self.engine._chat_batch.has_work:
                tokens += sum(
                    event.tokens for _, event, _ in self.engine._chat_batch.step() if isinstance(event, AnswerDone)
                )
        return tokens / (time.perf_counter() - started)

    def first_word(self, turns: tuple[Turn, ...]) -> tuple[float, int]:
        """Seconds to the first word of an answer to a conversation, and how many tokens of it were warm."""
        self.engine._chat_batch.join(1, "", self.asked(0, [""], turns))
        warm = 0
        while self.engine._chat_batch.has_work:
            for _, event, _ in self.engine._chat_batch.step():
                if isinstance(event, PromptRead):
                    warm = event.warm
                if isinstance(event, AnswerDone):
                    return event.seconds_to_first, warm
        raise AssertionError("it was not answered")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        talk = Talk(folder, 16)
        base, one, many = [""], talk.weights[:1], talk.weights
        cases = {
            "1 with the base model": (1, base, True), "8 one after another": (8, base, False),
            "8 together": (8, base, True), "8 together, one adapter": (8, one, True),
            "8 together, 8 adapters": (8, many[:8], True), "32 together": (32, base, True),
            "32 together, 16 adapters": (32, many, True),
        }  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds + 1):
            for name, (count, weights, together) in cases.items():
                found[name].append(talk.speed(count, weights, together))
        alone = statistics.median(found["8 one after another"][1:])
        print(f"{'conversations':<32}{'tokens/s':>10}{'to one by one':>15}")
        for name, speeds in found.items():
            middle = statistics.median(speeds[1:])
            print(f"{name:<32}{middle:>10.0f}{middle / alone:>14.1f}x")
        said = tuple(
            Turn(role="user" if place % 2 == 0 else "assistant", text=f"The sea is wide, and {place} is a number.")
            for place in range(41)
        )
        cold = [talk.first_word((Turn(role="user", text=f"Round {number}."), *said[1:]))[0] for number in range(rounds)]
        talk.first_word(said)
        warm = [talk.first_word(said) for _ in range(rounds)]
        first = statistics.median(seconds for seconds, _ in warm)
        print(f"first word after {warm[0][1]} tokens: {statistics.median(cold) * 1000:.0f} ms cold, "
              f"{first * 1000:.0f} ms warm ({statistics.median(cold) / first:.1f}x)")  # fmt: skip


if __name__ == "__main__":
    main()
