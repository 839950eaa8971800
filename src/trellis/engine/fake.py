"""The same messages without torch: words drawn by hash instead of by a model.

For tests of everything above the wire. It keeps the engine's promises (pure, resumable, weights on disk
whole or not at all), held to them by the same contract suite.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ..blobs import Blobs
from ..errors import EngineError, Invalid, TrellisError, WeightsMissing
from ..messages import (  # fmt: skip
    LOG_FILE,
    Answered,
    Assess,
    Assessed,
    Cancelled,
    Chat,
    Delta,
    Drawn,
    Fit,
    Heard,
    Learn,
    Learned,
    Load,
    Loaded,
    Merge,
    Merged,
    Metrics,
    Offer,
    Offered,
    Option,
    Plant,
    Planted,
    Progress,
    Spoke,
    Status,
    StatusReport,
)
from .known_errors import failed
from .scheduler import Handler, Steps, Together, Told
from .text.quality_metrics import variety_of

WORDS = [
    "the",
    "sea",
    "keeps",
    "its",
    "own",
    "time",
    "and",
    "bread",
    "rises",
    "while",
    "cats",
    "watch",
    "trains",
    "pass",
    "under",
    "a",
    "slow",
    "moon",
    "that",
    "tastes",
    "of",
    "tea",
]

STEP_SECONDS = 0.002

CONTEXT = 1024
"""Words of a conversation that are taken."""

REPEAT = "repeat yourself"
"""Where a prompt says so, the third answer is the first one again."""

SAY = re.compile(r"say (\d{1,6}) (words|times) at (\d{1,6}) a second")


class FakeEngine:
    lanes = 2

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._path: str | None = None
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._chats = FakeChats(self._may_chat)

    def together(self) -> Mapping[type, Together]:
        return {Chat: self._chats}

    def _may_chat(self, request: Chat) -> None:
        self._require_loaded()
        if request.weights:
            self._steps_of(request.weights)

    def handlers(self) -> Mapping[type, Handler]:
        return {
            Load: self.load, Plant: self.plant, Offer: self.offer, Learn: self.learn, Fit: self.fit,
            Assess: self.assess, Merge: self.merge, Status: self.status,
        }  # fmt: skip

    def load(self, request: Load) -> Steps:
        for done in range(1, 5):
            time.sleep(STEP_SECONDS)
            yield Progress(
                stage="reading",
                fraction=done / 5,
                message="Reading nothing",
                bytes=done,
                total_bytes=4,
            )
        self._path = request.path
        return Loaded(
            fingerprint="fake",
            parameters=0,
            architecture="Fake",
            device="none",
            dtype="none",
            bytes=0,
            seconds=0.0,
            lanes=self.lanes,
        )

    def plant(self, request: Plant) -> Steps:
        yield None
        self._require_loaded()
        made = request.makes_on(["fake"])
        if made not in self._blobs:
            self._write(made, 0, None)
        return Planted(weights=made)

    def offer(self, request: Offer) -> Steps:
        self._require_loaded()
        self._steps_of(request.weights)
        prompt = request.prompt.text.split()
        room = request.sampling.max_new_tokens
        if len(prompt) + room > request.context_length:
            raise Invalid(
                f"The prompt has {len(prompt)} words.",
                code="prompt_too_long",
                field="prompt",
                next_step="Shorten it.",
            )
        key = request.model_dump_json()
        drawn = list(range(request.group_size))
        if REPEAT in request.prompt.text and len(drawn) > 2:
            drawn[2] = 0
        lengths = [min(3 + _draw(key, index, "length") % 12, room) for index in drawn]
        texts = [""] * request.group_size
        tokens: list[list[int]] = [[] for _ in texts]
        for step in range(max(lengths)):
            time.sleep(STEP_SECONDS)
            delta = {}
            for index, length in enumerate(lengths):
                if step < length:
                    token = _draw(key, drawn[index], step) % len(WORDS)
                    tokens[index].append(token)
                    delta[index] = (" " if step else "") + WORDS[token]
                    texts[index] += delta[index]
            yield Delta(texts=delta)
        options = tuple(
            Option(text=text, tokens=tuple(ids), finish="stop", logprob=-float(len(ids)))
            for text, ids in zip(texts, tokens, strict=True)
        )
        return Offered(options=options, prompt_tokens=len(prompt), seconds_to_first=0.0, seconds=0.0)

    def learn(self, request: Learn) -> Steps:
        self._require_loaded()
        made = request.makes()
        yield None
        if known := self._made_before(made, request.keep):
            return known
        steps = self._steps_of(request.weights) + 1
        for _ in range(request.learning.inner_steps):
            time.sleep(STEP_SECONDS)
            yield None
        metrics = Metrics(
            loss=1.6,
            kl=0.01,
            share_before=0.2,
            share_after=0.6,
            drift=0.01 * steps,
            inner_steps=4,
            seconds=0.01,
            fluency=-1.0,
            variety=variety_of([option.tokens for option in request.lesson.options]),
        )
        self._unwritten[made] = _about(steps, metrics)
        if request.keep:
            self._keep(made)
        return Learned(weights=made, metrics=metrics)

    def fit(self, request: Fit) -> Steps:
        self._require_loaded()
        made = request.makes()
        yield None
        if known := self._made_before(made):
            return known
        steps = self._steps_of(request.weights)
        try:
            count = len((Path(request.path) / LOG_FILE).read_text(encoding="utf-8").splitlines())
        except FileNotFoundError:
            raise TrellisError("The log is gone.", code="log_missing", next_step="Fit the branch again.") from None
        for done in range(request.epochs * 10):
            time.sleep(STEP_SECONDS)
            yield Progress(stage="fitting", fraction=done / (request.epochs * 10), message="Fitting nothing")
        metrics = Metrics(
            loss=1.0,
            kl=0.02,
            share_before=0.2,
            share_after=0.7,
            drift=0.01 * (steps + 1),
            inner_steps=request.epochs * 10,
            seconds=0.01,
            agreed=count,
            agreed_of=count,
        )
        self._write(made, steps + 1, metrics)
        return Learned(weights=made, metrics=metrics)

    def assess(self, request: Assess) -> Steps:
        self._steps_of(request.weights)
        yield None
        return Assessed(agreed=len(request.lessons), of=len(request.lessons))

    def merge(self, request: Merge) -> Steps:
        self._steps_of(request.weights)
        into = Path(request.into)
        into.mkdir()
        for done in range(1, 21):
            time.sleep(STEP_SECONDS)
            yield Progress(stage="merging", fraction=done / 20, message="Merging nothing")
        (into / "model.safetensors").write_bytes(b"nothing")
        return Merged(
            files={"model.safetensors": 7},
            dtype="none",
            tokens=len(request.probes),
            largest_difference=0.0,
            mean_difference=0.0,
            agreement=1.0,
            seconds=0.0,
        )

    def status(self, request: Status) -> Steps:
        yield None
        return StatusReport(model=self._path, resident_bytes=psutil.Process().memory_info().rss)

    def _require_loaded(self) -> None:
        if self._path is None:
            raise EngineError("No model is loaded.", code="not_loaded", next_step="Load the model first.")

    def _write(self, weights_id: str, steps: int, metrics: Metrics | None) -> None:
        self._unwritten[weights_id] = _about(steps, metrics)
        self._keep(weights_id)

    def _keep(self, weights_id: str) -> None:
        about = self._unwritten.get(weights_id)
        if about is None:
            return
        with self._blobs.writing(weights_id) as folder:
            (folder / "weights.json").write_text(json.dumps(about))
            (folder / "adapter_config.json").write_text("{}")
            (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        self._unwritten.pop(weights_id, None)

    def _steps_of(self, weights_id: str) -> int:
        about = self._about(weights_id)
        if about is None:
            raise WeightsMissing(weights_id)
        return int(about["steps"])

    def _made_before(self, made: str, keep: bool = True) -> Learned | None:
        known = self._about(made)
        if known is None:
            return None
        if keep:
            self._keep(made)
        return Learned(weights=made, metrics=Metrics.model_validate(known["metrics"]))

    def _about(self, weights_id: str) -> dict[str, Any] | None:
        if weights_id in self._unwritten:
            return self._unwritten[weights_id]
        try:
            about: dict[str, Any] = json.loads((self._blobs.path(weights_id) / "weights.json").read_text())
        except (OSError, ValueError):
            return None
        return about


class FakeSeat:
    """One conversation. A last message that says “say N words at M a second” is answered so; “say N times …” by the
    time on the computer's steady clock, from which a bench reads how long a word was under way."""

    def __init__(self, number: int, request: Chat) -> None:
        self.number, self.request = number, request
        asked_last = [turn.text for turn in request.turns if turn.role == "user"]
        said = asked_last[-1] if asked_last else request.text
        goes_on = bool(request.turns) and request.turns[-1].role == "assistant"
        self.before = len(request.turns[-1].text.split()) if goes_on else 0
        asked = SAY.search(said)
        heard = sum(len(turn.text.split()) for turn in request.turns) or len(request.text.split())
        self.heard = min(heard, CONTEXT)
        self.left_out = 1 if heard > CONTEXT and request.trims else 0
        wanted = int(asked[1]) if asked else 3 + _draw(request.seed, said) % 12
        self.most = min(max(1, wanted - self.before), request.sampling.max_new_tokens)
        self.is_cut = self.most < wanted - self.before
        self.pause = 1 / float(asked[3]) if asked else STEP_SECONDS
        self.tells_time = bool(asked and asked[2] == "times")
        self.key = (request.seed, request.weights, said)
        self.count = 0
        self.started = self.due = time.monotonic()

    def word(self) -> str:
        place = self.before + self.count
        if self.tells_time:
            return f" {time.monotonic():.6f}"
        return (" " if place else "") + WORDS[_draw(self.key, place) % len(WORDS)]


class FakeChats:
    """Conversations side by side, each at its own pace."""

    def __init__(self, check: Callable[[Chat], None]) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._seats: dict[int, FakeSeat] = {}
        self._said: Told = []

    def join(self, number: int, owner: str, request: Any) -> None:
        try:
            self._check(request)
        except TrellisError as error:
            with self._lock:
                self._said.append((number, failed(error), True))
            return
        seat = FakeSeat(number, request)
        heard = Heard(read=seat.heard, prompt_tokens=seat.heard, warm=0, left_out=seat.left_out, context_length=CONTEXT)
        with self._lock:
            self._said.append((number, heard, False))
            self._seats[number] = seat

    def leave(self, number: int) -> None:
        with self._lock:
            if self._seats.pop(number, None):
                self._said.append((number, Cancelled(), True))

    @property
    def wanted(self) -> bool:
        return bool(self._seats or self._said)

    def give_up(self) -> list[int]:
        with self._lock:
            numbers = list(self._seats)
            self._seats.clear()
            return numbers

    def step(self) -> Told:
        with self._lock:
            told, self._said = self._said, []
            now = time.monotonic()
            due = [seat for seat in self._seats.values() if seat.due <= now]
            for seat in due:
                text = seat.word()
                seat.count += 1
                seat.due += seat.pause
                drawn = (
                    (Drawn(text=text, bytes=tuple(text.encode()), logprob=-1.0),)
                    if seat.request.top is not None
                    else ()
                )
                told.append((seat.number, Spoke(text=text, tokens=seat.count, drawn=drawn), False))
                if seat.count >= seat.most:
                    seconds = now - seat.started
                    answered = Answered(
                        finish="length" if seat.is_cut else "stop",
                        tokens=seat.count,
                        prompt_tokens=seat.heard,
                        seconds_to_first=0.0,
                        seconds=seconds,
                    )
                    told.append((seat.number, answered, True))
                    del self._seats[seat.number]
            soonest = min((seat.due for seat in self._seats.values()), default=now)
        if not told:
            time.sleep(min(max(soonest - now, 0.0), STEP_SECONDS))
        return told


def _about(steps: int, metrics: Metrics | None) -> dict[str, Any]:
    return {"steps": steps, "metrics": metrics.model_dump(mode="json") if metrics else None}


def _draw(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
