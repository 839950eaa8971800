"""The handlers of a text model: load, plant, offer, learn, status. Each is a generator for the loop."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..blobs import Blobs
from ..errors import EngineError, Invalid, TrellisError
from ..messages import (  # fmt: skip
    LOG_FILE,
    Assess,
    Assessed,
    Chat,
    Delta,
    Fit,
    Learn,
    Learned,
    Lesson,
    Load,
    Loaded,
    Merge,
    Metrics,
    Offer,
    Offered,
    Option,
    Plant,
    Planted,
    Progress,
    Status,
    StatusReport,
    Written,
    recipe_id,
)
from ..params import Learning
from .hub_download import download
from .learning.log_probs import Group, reading_of
from .learning.losses import METHODS
from .learning.merging import merge
from .learning.retraining import fit_steps, sight
from .learning.step import Point, learn_steps
from .scheduler import Handler, Steps, Together
from .text.adapters import Shelf, Slot, Weights
from .text.chat_batch import Chats
from .text.decoding import Growing, decode_group
from .text.group_forward import forward_of
from .text.kv_cache import Lines, lines_of
from .text.loaded_model import LoadedModel, read_model, require_memory
from .text.quality_metrics import fluency_of, variety_of
from .text.sampling import COLDEST, overflowed

PROGRESS_SECONDS = 0.2
REFERENCES = 1024
"""Lessons of which the base model's log-probabilities are kept: a few of each session that learns."""

CHATS_BYTES = 1_000_000_000
"""Keys, values and adapters that a batch of conversations may take at least; a quarter of what was free, where that is
more."""

WARM_BYTES = 256_000_000
"""Keys and values that are kept of conversations, so that a next message need not have all of them read again."""

DELTA_SECONDS = 0.025
"""Text goes up in batches of about this long: often enough to look alive, seldom enough to cost nothing."""


class TextEngine:
    """One text model and the weights grown on it. All state is a cache of files and of pure functions."""

    def __init__(self, blobs: Blobs, hub_timeout: float = 60.0, cache: int | None = None) -> None:
        self._shelf = Shelf(blobs, cache)
        self._hub_timeout = hub_timeout
        self._loaded: LoadedModel | None = None
        self._path: str | None = None
        self._lines: Lines | None = None
        self._room_for_chats = CHATS_BYTES
        self._chats = Chats(self._lines_now, lambda: self.loaded, lambda: self._room_for_chats)
        self._references: OrderedDict[str, Tensor] = OrderedDict()
        self._keeping = threading.Lock()

    def handlers(self) -> Mapping[type, Handler]:
        return {
            Load: self.load, Plant: self.plant, Offer: self.offer, Learn: self.learn, Fit: self.fit,
            Assess: self.assess, Merge: self.merge, Status: self.status,
        }  # fmt: skip

    def together(self) -> Mapping[type, Together]:
        return {Chat: self._chats}

    def _lines_now(self) -> Lines:
        if self._lines is None:
            loaded = self.loaded
            self._room_for_chats = max(CHATS_BYTES, free_bytes(loaded.about.device) // 4)
            self._lines = lines_of(loaded.slots, loaded.lean, self.weights, WARM_BYTES)
        return self._lines

    @property
    def lanes(self) -> int:
        """How many requests may be worked on at once."""
        return self._loaded.about.lanes if self._loaded else 1

    @property
    def loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineError("No model is loaded.", code="not_loaded", next_step="Load the model first.")
        return self._loaded

    def load(self, request: Load) -> Steps:
        path = Path(request.path)
        if request.repository:
            path = yield from download(
                request.repository, request.revision, path, request.remote_code, self._hub_timeout, request.fetches
            )
            require_memory(path, request)
        self._loaded = yield from read_model(path, request)
        self._path = str(path)
        about: Loaded = self._loaded.about
        return about

    def merge(self, request: Merge) -> Steps:
        merged = yield from merge(request, self._shelf.blobs.path(request.weights))
        return merged

    def plant(self, request: Plant) -> Steps:
        yield None
        about = self.loaded.about
        weights_id = request.makes_on([about.fingerprint, about.former_fingerprint])
        slot = self.loaded.slots.get(request.adapter)
        if not self._shelf.readable(slot, weights_id):
            self._shelf.plant(slot, weights_id, request.seed)
        return Planted(weights=weights_id, left_out=slot.left_out)

    def offer(self, request: Offer) -> Steps:
        started = time.monotonic()
        loaded, (slot, weights) = self.loaded, self.weights(request.weights)
        prompt = loaded.prompt_tokens(request.prompt, request.sampling.max_new_tokens, request.context_length)
        growing = decode_group(
            forward_of(slot, weights.flat, len(prompt) + request.sampling.max_new_tokens), loaded.tokenizer, prompt,
            loaded.ends, request.sampling, request.group_size, request.seed, request.openings,
        )  # fmt: skip
        group: list[Growing] = []
        sent = [0] * request.group_size
        first = 0.0
        told = started
        for group in growing:
            now = time.monotonic()
            if not first and not group[0].tokens:
                yield None
            elif not first or now - told >= DELTA_SECONDS:
                first, told = first or now - started, now
                yield _delta(group, sent)
            else:
                yield None
        lost = [option for option in group if option.overflowed]
        if lost and (len(lost) == len(group) or not all(option.tokens for option in lost)):
            raise overflowed()
        if delta := _delta(group, sent):
            yield delta
        options = tuple(
            Option(text=o.text, tokens=tuple(o.tokens), finish=o.finish or "length", logprob=o.logprob) for o in group
        )
        seconds = time.monotonic() - started
        return Offered(
            options=options, prompt_tokens=len(prompt), seconds_to_first=first, seconds=seconds,
            overflowed=tuple(index for index, option in enumerate(group) if option.overflowed),
        )  # fmt: skip

    def learn(self, request: Learn) -> Steps:
        started = time.monotonic()
        made = request.makes()
        yield None
        if known := self._made_before(made, request.keep):
            return known
        slot, weights = self.weights(request.weights)
        groups = [self._group(request.lesson, request.context_length, request.learning)]
        for lesson in request.replay:
            with suppress(Invalid):  # one of a log that was too long to be fitted is too long to be replayed
                groups.append(self._group(lesson, request.context_length, request.learning))
        references = []
        for group in groups:
            references.append(self._reference(slot, group))
            yield None
        shown = groups[0].answers[: len(request.lesson.options)]
        sums = references[0].sum(dim=-1).tolist()[: len(shown)]
        start = Point(weights.flat, weights.first, weights.second, weights.steps)
        outcome = yield from learn_steps(slot, start, groups[0], groups[1:], references, request.learning, made)
        metrics = Metrics(
            loss=outcome.loss,
            kl=outcome.kl,
            share_before=outcome.share_before,
            share_after=outcome.share_after,
            drift=slot.drift(outcome.point.flat),
            inner_steps=outcome.inner_steps,
            seconds=time.monotonic() - started,
            fluency=fluency_of(sums, [len(answer) for answer in shown]),
            variety=variety_of(shown),
        )
        self._shelf.add(slot, _weights_at(made, slot, outcome.point), metrics, request.keep)
        return Learned(weights=made, metrics=metrics)

    def fit(self, request: Fit) -> Steps:
        started = time.monotonic()
        made = request.makes()
        yield None
        if known := self._made_before(made):
            return known
        slot, weights = self.weights(request.weights)
        groups, left_out, too_long = [], 0, None
        for number, lesson in enumerate(lessons_in(Path(request.path))):
            try:
                groups.append(self._group(lesson, request.context_length, request.learning))
            except Invalid as error:  # one that does not fit into the context must not cost all the others
                left_out, too_long = left_out + 1, too_long or error
            if number % 50 == 0:
                yield None
        if not groups:
            raise too_long or Invalid("The log has no choices.", code="empty_log", next_step="Choose another one.")
        references: dict[int, Tensor] = {}

        def reference(group: Group) -> Tensor:
            if id(group) not in references:
                references[id(group)] = self._reference(slot, group)
            return references[id(group)]

        start = Point(weights.flat, weights.first, weights.second, weights.steps)
        steps = fit_steps(slot, start, groups, reference, request.learning, request.epochs, request.seed, made)
        told = 0.0
        while True:
            try:
                done, total, loss = next(steps)
            except StopIteration as end:
                fitted = end.value
                break
            now = time.monotonic()
            if now - told < PROGRESS_SECONDS:
                yield None
                continue
            told = now
            yield _fit_progress(done, total, loss, now - started, len(groups))
        metrics = Metrics(
            loss=fitted.loss,
            kl=fitted.kl,
            share_before=fitted.share_before,
            share_after=fitted.share_after,
            drift=slot.drift(fitted.point.flat),
            inner_steps=fitted.steps,
            seconds=time.monotonic() - started,
            agreed=fitted.agreed,
            agreed_of=fitted.judged,
            left_out=left_out,
        )
        self._shelf.add(slot, _weights_at(made, slot, fitted.point), metrics, keep=True)
        return Learned(weights=made, metrics=metrics)

    def assess(self, request: Assess) -> Steps:
        slot, weights = self.weights(request.weights)
        groups = [self._group(lesson, request.context_length, request.learning) for lesson in request.lessons]
        looking = sight(slot, weights.flat, groups, lambda group: self._reference(slot, group), request.learning)
        while True:
            try:
                next(looking)
            except StopIteration as end:
                return Assessed(agreed=end.value.agreed, of=len(groups))
            yield None

    def status(self, request: Status) -> Steps:
        yield None
        return StatusReport(
            model=self._path,
            resident_bytes=psutil.Process().memory_info().rss,
            device_bytes=torch.cuda.memory_allocated() if torch.cuda.is_available() else None,
        )

    def weights(self, weights_id: str) -> tuple[Slot, Weights]:
        """Weights by id, and the slot that they go into. Raises WeightsMissing."""
        slot = self.loaded.slots.get(self._shelf.settings(weights_id))
        return slot, self._shelf.get(slot, weights_id)

    def _made_before(self, made: str, keep: bool = True) -> Learned | None:
        """What learning once made and is whole in memory or on disk, as it was told then."""
        metrics = self._shelf.metrics(made)
        if metrics is None:
            return None
        slot = self.loaded.slots.get(self._shelf.settings(made))
        if not self._shelf.readable(slot, made):
            return None
        if keep:
            self._shelf.keep(slot, made)
        return Learned(weights=made, metrics=metrics)

    def _group(self, lesson: Lesson, context_length: int, learning: Learning) -> Group:
        """A lesson as numbers. An option that has no tokens, as one from another model or a file, gets this model's."""
        loaded, prompt = self.loaded, self.loaded.render(lesson.prompt)
        answers = [
            list(option.tokens) if option.tokens else loaded.answer_tokens(option.text, option.finish == "stop", prompt)
            for option in lesson.options
        ]
        if isinstance(lesson.choice, Written):
            answers.append(loaded.answer_tokens(lesson.choice.written, after=prompt))
        answers = [answer or [loaded.end_token or 0] for answer in answers]
        for answer in answers:
            loaded.require_known(answer, "choice")
        loaded.require_room(prompt, max(len(answer) for answer in answers), context_length)
        sharpened = METHODS[learning.learning_method].tempered
        temperature = lesson.temperature if sharpened and lesson.temperature >= COLDEST else 1.0
        return Group(prompt.tokens, answers, lesson.choice, temperature)

    def _reference(self, slot: Slot, group: Group) -> Tensor:
        """The base model's log-probabilities of a lesson's answers. They never change, so they are kept."""
        key = recipe_id("r", [group.prompt, group.answers, group.temperature])
        known = self._references.get(key)
        if known is None:
            (known,) = reading_of(slot, [group]).logprobs([group], None)
            if not bool(torch.isfinite(known).all()):
                raise overflowed()
            with self._keeping:
                self._references[key] = known
                while len(self._references) > REFERENCES:
                    self._references.popitem(last=False)
        return known


def free_bytes(device: str) -> int:
    """Memory that is free where a model is."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def _weights_at(made: str, slot: Slot, point: Point) -> Weights:
    return Weights(made, slot.settings, point.flat, point.first, point.second, point.steps)


def lessons_in(folder: Path) -> Iterator[Lesson]:
    """The lessons of a log. Raises TrellisError when it is gone."""
    try:
        with (folder / LOG_FILE).open(encoding="utf-8") as lines:
            for line in lines:
                yield Lesson.model_validate_json(line)
    except FileNotFoundError:
        raise TrellisError(
            "The training data for this step no longer exists on disk.",
            code="log_missing",
            next_step="Retrain the branch, or import the file again.",
        ) from None


def _fit_progress(done: int, total: int, loss: float, seconds: float, lessons: int) -> Progress:
    told = f", loss {loss:.2f}" if loss == loss else ""
    return Progress(
        stage="fitting",
        fraction=min(done / total, 1.0),
        message=f"Optimizer step {min(done + 1, total)} of {total}, {lessons} choices{told}",
        seconds_left=seconds / done * (total - done) if done else None,
    )


def _delta(group: list[Growing], sent: list[int]) -> Delta | None:
    """What each option grew by since `sent`, which is brought up to date."""
    texts = {}
    for index, option in enumerate(group):
        if len(option.text) > sent[index]:
            texts[index] = option.text[sent[index] :]
            sent[index] = len(option.text)
    return Delta(texts=texts) if texts else None
