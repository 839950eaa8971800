"""The handlers of a text model: load, plant, offer, learn, status. Each is a generator for the loop."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..blobs import Blobs
from ..errors import EngineError
from ..messages import (
    Delta,
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
    Status,
    StatusReport,
    Written,
    recipe_id,
    recipe_of,
)  # fmt: skip
from .adapters import Shelf, Slot, Weights
from .decode import Growing, decode_group
from .download import download
from .learning import Group, Point, answer_logprobs, learn_steps
from .loaded import LoadedModel, read_model, require_memory
from .loop import Handler, Steps
from .merging import merge
from .methods import METHODS
from .vitals import fluency_of, variety_of

DELTA_SECONDS = 0.025
"""Text goes up in batches of about this long: often enough to look alive, seldom enough to cost nothing."""


class TextEngine:
    """One text model and the weights grown on it. All state is a cache of files and of pure functions."""

    def __init__(self, blobs: Blobs, hub_timeout: float = 60.0) -> None:
        self._shelf = Shelf(blobs)
        self._hub_timeout = hub_timeout
        self._loaded: LoadedModel | None = None
        self._path: str | None = None
        self._references: OrderedDict[str, Tensor] = OrderedDict()

    def handlers(self) -> Mapping[type, Handler]:
        return {
            Load: self.load, Plant: self.plant, Offer: self.offer, Learn: self.learn, Merge: self.merge,
            Status: self.status,
        }  # fmt: skip

    @property
    def loaded(self) -> LoadedModel:
        if self._loaded is None:
            raise EngineError("No model is loaded.", code="not_loaded", next_step="Load the model first.")
        return self._loaded

    def load(self, request: Load) -> Steps:
        path = Path(request.path)
        if request.repository:
            path = yield from download(
                request.repository, request.revision, path, request.remote_code, self._hub_timeout
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
        recipe = {"model": self.loaded.about.fingerprint, **recipe_of(request)}
        weights_id = recipe_id("w", recipe)
        slot = self.loaded.slots.get(request.adapter)
        if not self._shelf.readable(slot, weights_id):
            self._shelf.plant(slot, weights_id, request.seed)
        return Planted(weights=weights_id)

    def offer(self, request: Offer) -> Steps:
        started = time.monotonic()
        loaded, (slot, weights) = self.loaded, self.weights(request.weights)
        prompt = loaded.prompt_tokens(request.prompt, request.sampling.max_new_tokens, request.context_length)
        slot.install(weights.flat)
        growing = decode_group(
            slot.model,
            loaded.tokenizer,
            prompt,
            loaded.ends,
            request.sampling,
            request.group_size,
            request.seed,
        )
        group: list[Growing] = []
        sent = [0] * request.group_size
        first = 0.0
        told = started
        for group in growing:
            now = time.monotonic()
            first = first or now - started
            if now - told >= DELTA_SECONDS or told == started:
                told = now
                yield _delta(group, sent)
            else:
                yield None
            slot.install(weights.flat)
        if delta := _delta(group, sent):
            yield delta
        options = tuple(
            Option(text=o.text, tokens=tuple(o.tokens), finish=o.finish or "length", logprob=o.logprob) for o in group
        )
        seconds = time.monotonic() - started
        return Offered(options=options, prompt_tokens=len(prompt), seconds_to_first=first, seconds=seconds)

    def learn(self, request: Learn) -> Steps:
        started = time.monotonic()
        made = request.makes()
        yield None
        if (known := self._shelf.metrics(made)) is not None and self._has(made):
            return Learned(weights=made, metrics=known)
        slot, weights = self.weights(request.weights)
        lessons = [request.lesson, *request.replay]
        groups = [self._group(lesson, request) for lesson in lessons]
        references = []
        for group in groups:
            references.append(self._reference(slot, group))
            yield None
        drawn = request.lesson.options
        sums = references[0].sum(dim=-1).tolist()[: len(drawn)]
        start = Point(weights.flat, weights.first, weights.second, weights.steps)
        outcome = yield from learn_steps(slot, start, groups[0], groups[1:], references, request.learning, made)
        end = outcome.point
        metrics = Metrics(
            loss=outcome.loss,
            kl=outcome.kl,
            share_before=outcome.share_before,
            share_after=outcome.share_after,
            drift=slot.drift(end.flat),
            inner_steps=outcome.inner_steps,
            seconds=time.monotonic() - started,
            fluency=fluency_of(sums, [len(option.tokens) for option in drawn]),
            variety=variety_of([option.tokens for option in drawn]),
        )
        self._shelf.save(slot, Weights(made, slot.settings, end.flat, end.first, end.second, end.steps), metrics)
        return Learned(weights=made, metrics=metrics)

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

    def _has(self, weights_id: str) -> bool:
        slot = self.loaded.slots.get(self._shelf.settings(weights_id))
        return self._shelf.readable(slot, weights_id)

    def _group(self, lesson: Lesson, request: Learn) -> Group:
        answers = [list(option.tokens) for option in lesson.options]
        if isinstance(lesson.choice, Written):
            answers.append(self.loaded.answer_tokens(lesson.choice.written))
        longest = max(len(answer) for answer in answers)
        prompt = self.loaded.prompt_tokens(lesson.prompt, longest, request.context_length)
        sharpened = METHODS[request.learning.learning_method].tempered
        return Group(prompt, answers, lesson.choice, (lesson.temperature or 1.0) if sharpened else 1.0)

    def _reference(self, slot: Slot, group: Group) -> Tensor:
        """The base model's log-probabilities of a lesson's answers. They never change, so they are kept."""
        key = recipe_id("r", [group.prompt, group.answers, group.temperature])
        if key not in self._references:
            with torch.no_grad(), slot.reference():
                self._references[key] = answer_logprobs(slot.model, group)
            while len(self._references) > 256:
                self._references.popitem(last=False)
        return self._references[key]


def _delta(group: list[Growing], sent: list[int]) -> Delta | None:
    """What each option grew by since `sent`, which is brought up to date."""
    texts = {}
    for index, option in enumerate(group):
        if len(option.text) > sent[index]:
            texts[index] = option.text[sent[index] :]
            sent[index] = len(option.text)
    return Delta(texts=texts) if texts else None
