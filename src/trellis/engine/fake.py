"""The same messages without torch: words are picked by hash instead of by a model.

For tests of everything above the engine. It is held to the real engine's promises (pure, resumable, weights on disk
complete or absent) by the same contract tests.
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
    AdapterCreated,
    AnswerDone,
    Assess,
    Assessed,
    Cancelled,
    Chat,
    CreateAdapter,
    Delta,
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
    Progress,
    PromptRead,
    Retrain,
    SampledToken,
    Status,
    StatusReport,
    TextDelta,
)
from .known_errors import failed_event
from .scheduler import Handler, RequestBatch, RequestEvents, Steps
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

CONTEXT_WORDS = 1024
"""The longest accepted conversation, in words."""

REPEAT_PHRASE = "repeat yourself"
"""A prompt with this phrase makes the third answer repeat the first one."""

SAY_COMMAND = re.compile(r"say (\d{1,6}) (words|times) at (\d{1,6}) a second")


class FakeEngine:
    lanes = 2

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._path: str | None = None
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._chat_batch = FakeChatBatch(self._require_can_chat)

    def batches(self) -> Mapping[type, RequestBatch]:
        return {Chat: self._chat_batch}

    def _require_can_chat(self, request: Chat) -> None:
        self._require_loaded()
        if request.weights:
            self._steps_of(request.weights)

    def handlers(self) -> Mapping[type, Handler]:
        return {
            Load: self.load, CreateAdapter: self.create_adapter, Offer: self.offer, Learn: self.learn,
            Retrain: self.retrain,
            Assess: self.assess, Merge: self.merge, Status: self.status,
        }  # fmt: skip

    def load(self, request: Load) -> Steps:
        for done in range(1, 5):
            time.sleep(STEP_SECONDS)
            yield Progress(stage="reading", fraction=done / 5, message="Reading nothing", bytes=done, total_bytes=4)
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

    def create_adapter(self, request: CreateAdapter) -> Steps:
        yield None
        self._require_loaded()
        weights_id = request.weights_id_on(["fake"])
        if weights_id not in self._blobs:
            self._write(weights_id, 0, None)
        return AdapterCreated(weights=weights_id)

    def offer(self, request: Offer) -> Steps:
        self._require_loaded()
        self._steps_of(request.weights)
        prompt = request.prompt.text.split()
        room = request.sampling.max_new_tokens
        if len(prompt) + room > request.context_length:
            raise Invalid(
                f"The prompt has {len(prompt)} words.", code="prompt_too_long", field="prompt", next_step="Shorten it."
            )
        key = request.model_dump_json()
        seeds = list(range(request.group_size))
        if REPEAT_PHRASE in request.prompt.text and len(seeds) > 2:
            seeds[2] = 0
        lengths = [min(3 + _hash_number(key, index, "length") % 12, room) for index in seeds]
        texts = [""] * request.group_size
        tokens: list[list[int]] = [[] for _ in texts]
        for step in range(max(lengths)):
            time.sleep(STEP_SECONDS)
            delta = {}
            for index, length in enumerate(lengths):
                if step < length:
                    token = _hash_number(key, seeds[index], step) % len(WORDS)
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
        weights_id = request.weights_id()
        yield None
        if already_made := self._already_made(weights_id, request.keep):
            return already_made
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
        self._unwritten[weights_id] = _metadata_of(steps, metrics)
        if request.keep:
            self._save(weights_id)
        return Learned(weights=weights_id, metrics=metrics)

    def retrain(self, request: Retrain) -> Steps:
        self._require_loaded()
        weights_id = request.weights_id()
        yield None
        if already_made := self._already_made(weights_id):
            return already_made
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
        self._write(weights_id, steps + 1, metrics)
        return Learned(weights=weights_id, metrics=metrics)

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
        self._unwritten[weights_id] = _metadata_of(steps, metrics)
        self._save(weights_id)

    def _save(self, weights_id: str) -> None:
        about = self._unwritten.get(weights_id)
        if about is None:
            return
        with self._blobs.writing(weights_id) as folder:
            (folder / "weights.json").write_text(json.dumps(about))
            (folder / "adapter_config.json").write_text("{}")
            (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        self._unwritten.pop(weights_id, None)

    def _steps_of(self, weights_id: str) -> int:
        about = self._metadata(weights_id)
        if about is None:
            raise WeightsMissing(weights_id)
        return int(about["steps"])

    def _already_made(self, weights_id: str, keep: bool = True) -> Learned | None:
        metadata = self._metadata(weights_id)
        if metadata is None:
            return None
        if keep:
            self._save(weights_id)
        return Learned(weights=weights_id, metrics=Metrics.model_validate(metadata["metrics"]))

    def _metadata(self, weights_id: str) -> dict[str, Any] | None:
        if weights_id in self._unwritten:
            return self._unwritten[weights_id]
        try:
            about: dict[str, Any] = json.loads((self._blobs.path(weights_id) / "weights.json").read_text())
        except (OSError, ValueError):
            return None
        return about


class FakeSlot:
    """One conversation. If the last message is “say N words at M a second”, it is answered so; “say N times …” answers
    with monotonic clock readings, from which a benchmark computes the latency of a word."""

    def __init__(self, number: int, request: Chat) -> None:
        self.number, self.request = number, request
        asked_last = [turn.text for turn in request.turns if turn.role == "user"]
        last_text = asked_last[-1] if asked_last else request.text
        continues = bool(request.turns) and request.turns[-1].role == "assistant"
        self.words_before = len(request.turns[-1].text.split()) if continues else 0
        command = SAY_COMMAND.search(last_text)
        prompt_words = sum(len(turn.text.split()) for turn in request.turns) or len(request.text.split())
        self.prompt_tokens = min(prompt_words, CONTEXT_WORDS)
        self.left_out = 1 if prompt_words > CONTEXT_WORDS and request.trims else 0
        wanted_words = int(command[1]) if command else 3 + _hash_number(request.seed, last_text) % 12
        self.max_words = min(max(1, wanted_words - self.words_before), request.sampling.max_new_tokens)
        self.is_cut = self.max_words < wanted_words - self.words_before
        self.pause = 1 / float(command[3]) if command else STEP_SECONDS
        self.says_time = bool(command and command[2] == "times")
        self.key = (request.seed, request.weights, last_text)
        self.count = 0
        self.started = self.next_word_at = time.monotonic()

    def next_word(self) -> str:
        index = self.words_before + self.count
        if self.says_time:
            return f" {time.monotonic():.6f}"
        return (" " if index else "") + WORDS[_hash_number(self.key, index) % len(WORDS)]


class FakeChatBatch:
    """Conversations side by side, each at its own pace."""

    def __init__(self, check: Callable[[Chat], None]) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._slots: dict[int, FakeSlot] = {}
        self._pending_events: RequestEvents = []

    def join(self, number: int, owner: str, request: Any) -> None:
        try:
            self._check(request)
        except TrellisError as error:
            with self._lock:
                self._pending_events.append((number, failed_event(error), True))
            return
        slot = FakeSlot(number, request)
        prompt_read = PromptRead(
            read=slot.prompt_tokens,
            prompt_tokens=slot.prompt_tokens,
            warm=0,
            left_out=slot.left_out,
            context_length=CONTEXT_WORDS,
        )
        with self._lock:
            self._pending_events.append((number, prompt_read, False))
            self._slots[number] = slot

    def leave(self, number: int) -> None:
        with self._lock:
            if self._slots.pop(number, None):
                self._pending_events.append((number, Cancelled(), True))

    @property
    def has_work(self) -> bool:
        return bool(self._slots or self._pending_events)

    def abort(self) -> list[int]:
        with self._lock:
            numbers = list(self._slots)
            self._slots.clear()
            return numbers

    def step(self) -> RequestEvents:
        with self._lock:
            events, self._pending_events = self._pending_events, []
            now = time.monotonic()
            due = [slot for slot in self._slots.values() if slot.next_word_at <= now]
            for slot in due:
                text = slot.next_word()
                slot.count += 1
                slot.next_word_at += slot.pause
                drawn = (
                    (SampledToken(text=text, bytes=tuple(text.encode()), logprob=-1.0),)
                    if slot.request.top is not None
                    else ()
                )
                events.append((slot.number, TextDelta(text=text, tokens=slot.count, drawn=drawn), False))
                if slot.count >= slot.max_words:
                    seconds = now - slot.started
                    done = AnswerDone(
                        finish="length" if slot.is_cut else "stop",
                        tokens=slot.count,
                        prompt_tokens=slot.prompt_tokens,
                        seconds_to_first=0.0,
                        seconds=seconds,
                    )
                    events.append((slot.number, done, True))
                    del self._slots[slot.number]
            soonest = min((slot.next_word_at for slot in self._slots.values()), default=now)
        if not events:
            time.sleep(min(max(soonest - now, 0.0), STEP_SECONDS))
        return events


def _metadata_of(steps: int, metrics: Metrics | None) -> dict[str, Any]:
    return {"steps": steps, "metrics": metrics.model_dump(mode="json") if metrics else None}


def _hash_number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
