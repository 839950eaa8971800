"""Simulated people: hidden rules over the demo model and the second one, and how such a person uses an engine.

What a person goes through is what the studio does, message for message, on a real engine in this process; only the
page and the database are left out.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import second_model
from trellis.blobs import Blobs
from trellis.demo.text.prompts import load_prompts
from trellis.demo.text.voices import classify_voice
from trellis.engine.handlers import TextEngine
from trellis.engine.learning.log_probs import Group, answer_logprobs
from trellis.messages import Choice, CreateAdapter, Learn, Lesson, Load, Offer, Offered, Option, Prompt, derived_seed
from trellis.options import Adapter, Learning, Sampling, SessionConfig, default_learning_rate
from trellis.studio.steering.tree import Node, choices_to_replay

DEMO = Path(second_model.__file__).resolve().parent.parent / "src" / "trellis" / "demo" / "text" / "model"
WHOLE = (0, 10, 20, 40, 100, 200)
"""After so many clicks fluency and variety are measured too."""

ANSWERS, PROMPTS = 16, 5
"""How many answers to how many held-out prompts a share is measured on."""


@dataclass(frozen=True)
class Rule:
    """What a simulated person wants. `errs` is how often they choose against it; `tuning` rules are never reported."""

    name: str
    model: str
    kind: str
    fits: Callable[[str], bool]
    errs: float = 0.0
    tuning: bool = False


def _words(text: str) -> int:
    return len(text.split())


def _says(pattern: str) -> Callable[[str], bool]:
    return lambda text: bool(re.search(pattern, text, re.IGNORECASE))


def _never(pattern: str) -> Callable[[str], bool]:
    return lambda text: not re.search(pattern, text, re.IGNORECASE) and classify_voice(text) is not None


def _voice(*names: str) -> Callable[[str], bool]:
    return lambda text: classify_voice(text) in names


def _manner(*names: str) -> Callable[[str], bool]:
    return lambda text: second_model.manner_of(text) in names


RULES = [
    Rule("pirate", "demo", "voice", _voice("pirate"), tuning=True),
    Rule("terse", "demo", "length", _voice("terse"), tuning=True),
    Rule("grumpy", "demo", "voice", _voice("grumpy"), tuning=True),
    Rule("exclaims", "demo", "form", lambda text: text.endswith("!") and classify_voice(text) is not None, tuning=True),
    Rule("noisy pirate", "demo", "noisy", _voice("pirate"), errs=0.2, tuning=True),
    Rule("poet", "demo", "voice", _voice("poet")),
    Rule("scientist", "demo", "voice", _voice("scientist")),
    Rule("formal", "demo", "voice", _voice("formal")),
    Rule("long", "demo", "length", lambda text: _words(text) >= 30 and classify_voice(text) is not None),
    Rule("asks a question", "demo", "form", lambda text: text.rstrip().endswith("?") and bool(classify_voice(text))),
    Rule("says “you”", "demo", "word", lambda text: _says(r"\byou\b")(text) and classify_voice(text) is not None),
    Rule("is fond of it", "demo", "opinion", _voice("cheerful")),
    Rule("never says “I”", "demo", "avoidance", _never(r"\b(I|my|me)\b")),
    Rule("poet or grumpy", "demo", "mixture", _voice("poet", "grumpy")),
    Rule("noisy scientist", "demo", "noisy", _voice("scientist"), errs=0.2),
    Rule("warning", "second", "voice", _manner("warning"), tuning=True),
    Rule("noisy warning", "second", "noisy", _manner("warning"), errs=0.2, tuning=True),
    Rule("gossip", "second", "voice", _manner("gossip")),
    Rule("list", "second", "form", _manner("list")),
    Rule("brief", "second", "length", _manner("brief")),
    Rule("noisy proud", "second", "noisy", _manner("proud"), errs=0.2),
]  # fmt: skip


def steered(model: str) -> tuple[list[str], list[str]]:
    """Prompts to steer on, and held-out ones."""
    return (load_prompts("steer"), load_prompts("held_out")) if model == "demo" else second_model.prompts()


def finished(steps: Generator[Any, Any, Any]) -> Any:
    """The result of a handler."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@dataclass
class Subject:
    """A model in an engine, and what is known of its own answers to the held-out prompts."""

    name: str
    engine: TextEngine
    config: SessionConfig
    steer: list[str]
    held_out: list[str]
    weights: Path
    base: list[tuple[str, str, float]] = field(default_factory=list)
    """(prompt, answer, log-probability per token) of the model before any steering."""

    @classmethod
    def load(cls, name: str, folder: Path, weights: Path, base_answers: int = 192) -> Subject:
        engine = TextEngine(Blobs(weights))
        about = finished(engine.load(Load(path=str(folder), device="cpu")))
        steer, held_out = steered(name)
        config = SessionConfig(learning_rate=default_learning_rate(about.parameters), control_prompt="")
        subject = cls(name, engine, config, steer, held_out[:PROMPTS], weights)
        planted = finished(engine.create_adapter(CreateAdapter(adapter=config.extract(Adapter), seed=0))).weights
        for round_ in range(base_answers // ANSWERS):
            drawn = subject.sample(planted, derived_seed("base", round_))
            for prompt in subject.held_out:
                subject.base += subject.weighed(prompt, [option for asked, _, option in drawn if asked == prompt])
        return subject

    def offer(
        self, weights: str, prompt: str, size: int, seed: int, config: SessionConfig, refused: bool = False
    ) -> Offered:
        request = Offer(
            weights=weights, prompt=Prompt(text=prompt), sampling=config.extract(Sampling), group_size=size,
            openings=config.openings if refused else 1, seed=seed,
            context_length=config.context_length,
        )  # fmt: skip
        offered: Offered = finished(self.engine.offer(request))
        return offered

    def sample(self, weights: str, seed: int) -> list[tuple[str, str, Option]]:
        """Answers to all held-out prompts at once: prompt, text, and the answer as tokens."""
        loaded, sampling = self.engine.loaded, self.config.extract(Sampling)
        slot, values = self.engine.weights(weights)
        slot.install(values.flat)
        asked = [loaded.tokenize_prompt(Prompt(text=prompt), 1, self.config.context_length) for prompt in self.held_out]
        width = max(map(len, asked))
        ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in asked]).repeat_interleave(ANSWERS, 0)
        mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in asked])
        torch.manual_seed(seed)
        with torch.inference_mode():
            drawn = slot.model.generate(
                input_ids=ids, attention_mask=mask.repeat_interleave(ANSWERS, 0), do_sample=True, top_k=0,
                temperature=sampling.temperature, min_p=sampling.min_p, max_new_tokens=sampling.max_new_tokens,
                eos_token_id=sorted(loaded.end_tokens), pad_token_id=0,
            )[:, width:].tolist()  # fmt: skip
        found = []
        for number, row in enumerate(drawn):
            stop = next((place + 1 for place, token in enumerate(row) if token in loaded.end_tokens), None)
            tokens = row[:stop]
            text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
            option = Option(text=text, tokens=tuple(tokens), finish="stop" if stop else "length")
            found.append((self.held_out[number // ANSWERS], text, option))
        return found

    def weighed(self, prompt: str, options: Sequence[Option]) -> list[tuple[str, str, float]]:
        """Answers with what the base model thinks of each: mean log-probability per token."""
        loaded = self.engine.loaded
        slot = loaded.slots.get(self.config.extract(Adapter))
        tokens = loaded.tokenize_prompt(Prompt(text=prompt), 1, self.config.context_length)
        group = Group(tokens, [list(option.tokens) for option in options], "none", 1.0)
        with torch.no_grad(), slot.without_adapter():
            logprobs: Tensor = answer_logprobs(slot.model, group)
        means = (logprobs.sum(-1) / group.mask(logprobs.device).sum(-1)).tolist()
        return [(prompt, option.text, mean) for option, mean in zip(options, means, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def measure(subject: Subject, rule: Rule, weights: str, seed: int, whole: bool = True) -> dict[str, float]:
    """How the model answers held-out prompts: share that fits, fluency and variety against the base's own answers."""
    drawn = subject.sample(weights, derived_seed("measure", seed))
    fits = [rule.fits(text) for _, text, _ in drawn]
    if not whole:
        return {"share": mean(fits), "distinct": len({text for _, text, _ in drawn}) / len(drawn)}
    found = [
        row for prompt in subject.held_out for row in subject.weighed(prompt, [o for p, _, o in drawn if p == prompt])
    ]
    fitting = [row for row in found if rule.fits(row[1])]
    own = [row for row in subject.base if rule.fits(row[1])]
    # Of as many answers as the base gives in the wanted class to the same prompt, how many are distinct?
    dice, ratios = random.Random(seed), []
    for prompt in subject.held_out:
        there, here = [r[1] for r in own if r[0] == prompt], [r[1] for r in fitting if r[0] == prompt]
        if (size := min(len(there), len(here))) >= 3:
            before = mean([len(set(dice.sample(there, size))) for _ in range(20)])
            after = mean([len(set(dice.sample(here, size))) for _ in range(20)])
            ratios.append(after / before)
    return {
        "share": len(fitting) / len(found),
        "fluency": mean([row[2] for row in fitting]) - mean([row[2] for row in own]),
        "all_fluency": mean([row[2] for row in found]) - mean([row[2] for row in subject.base]),
        "distinct": len({row[1] for row in found}) / len(found),
        "variety": mean(ratios),
    }


def live(
    subject: Subject, rule: Rule, seed: int, clicks: int, at: Sequence[int], settings: dict[str, Any],
    behave: str = "steady",
) -> dict[str, Any]:  # fmt: skip
    """One person's session. Returns what was measured after the clicks in `at`, and what it cost."""
    config = SessionConfig.parse(subject.config.model_dump() | {"seed": seed} | settings)
    adapter, learning = config.extract(Adapter), config.extract(Learning)
    dice = random.Random(derived_seed("person", rule.name, seed))
    prompts = dice.sample(subject.steer, len(subject.steer))
    weights = finished(subject.engine.create_adapter(CreateAdapter(adapter=adapter, seed=seed))).weights
    nodes = [Node("n0", "s", None, 0, weights, 0, None, None, None, None, None, None, 0.0)]
    lessons: dict[str, Lesson] = {}
    measured, seconds, offers, nones, metrics = {}, [], [], 0, None
    for click in range(clicks + 1):
        if click in at:
            measured[click] = measure(subject, rule, weights, seed, whole=click in WHOLE or click == clicks)
            measured[click]["drift"] = metrics.drift if metrics else 0.0
        if click == clicks:
            break
        prompt = prompts[click % len(prompts)]
        started = time.perf_counter()
        offered = subject.offer(
            weights,
            prompt,
            config.group_size,
            derived_seed("offer", seed, weights, click),
            config,
            nodes[-1].choice == "none",
        )
        offers.append(time.perf_counter() - started)
        choice = choose(rule, [option.text for option in offered.options], dice, behave, click)
        nones += choice == "none"
        lesson = Lesson(
            prompt=Prompt(text=prompt), options=offered.options, choice=choice, temperature=config.temperature
        )
        earlier = choices_to_replay(config, nodes)
        started = time.perf_counter()
        learned = finished(
            subject.engine.learn(
                Learn(
                    weights=weights, lesson=lesson, replay=tuple(lessons[node.id] for node, _ in earlier),
                    learning=learning, context_length=config.context_length,
                )
            )
        )  # fmt: skip
        seconds.append(time.perf_counter() - started)
        weights, metrics = learned.weights, learned.metrics
        node = replace(
            nodes[-1], id=f"n{click + 1}", parent=nodes[-1].id, step=click + 1, weights=weights, choice=choice
        )
        nodes.append(node)
        lessons[node.id] = lesson
    return {
        "rule": rule.name, "model": rule.model, "kind": rule.kind, "seed": seed, "measured": measured,
        "nones": nones, "learn_seconds": sorted(seconds)[len(seconds) // 2],
        "offer_seconds": sorted(offers)[len(offers) // 2],
    }  # fmt: skip


def choose(rule: Rule, texts: Sequence[str], dice: random.Random, behave: str, click: int) -> Choice:
    """What the person says: one of the options that fit, else none of them; now and then something else."""
    fitting = [index for index, text in enumerate(texts) if rule.fits(text)]
    other = [index for index in range(len(texts)) if index not in fitting]
    if behave == "random":
        return dice.randrange(len(texts))
    if (behave == "contrary" and click % 2) or dice.random() < rule.errs:
        return dice.choice(other or fitting)
    return dice.choice(fitting) if fitting else "none"
