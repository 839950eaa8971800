"""Handlers of a text model's requests: load, create adapter, offer, learn, retrain, … Each is a generator for the
scheduler."""

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
    AdapterCreated,
    Assess,
    Assessed,
    Chat,
    CreateAdapter,
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
    Progress,
    Retrain,
    Status,
    StatusReport,
    Written,
    recipe_id,
)
from ..options import Learning
from .hub_download import download
from .learning.log_probs import Group, scorer_for
from .learning.losses import METHODS
from .learning.merging import merge
from .learning.retraining import RetrainOutcome, evaluate_choices, retrain
from .learning.step import TrainingState, learn_choice
from .scheduler import Handler, RequestBatch, Steps
from .text.adapters import AdapterSlot
from .text.chat_batch import ChatBatch
from .text.decoding import GrowingOption, decode_group
from .text.group_forward import group_forward_for
from .text.kv_cache import SequenceCache, sequence_cache_for
from .text.loaded_model import LoadedModel
from .text.loading import load_model, require_free_memory
from .text.quality_metrics import fluency_of, variety_of
from .text.sampling import MIN_TEMPERATURE, overflow_error
from .text.weights_store import Weights, WeightsStore

PROGRESS_SECONDS = 0.2
MAX_REFERENCES = 1024
"""How many lessons' base log-probabilities are cached: a few for each session that learns."""

CHAT_CACHE_BYTES = 1_000_000_000
"""Lower bound on the memory for the KV cache and adapters of the chat batch; a quarter of the free memory if that is
more."""

PREFIX_CACHE_BYTES = 256_000_000
"""Memory for the prefix cache of chats, which saves reading a whole conversation again for its next message."""

DELTA_SECONDS = 0.025
"""Interval between text deltas: short enough to look live, long enough to cost nothing."""


class TextEngine:
    """One text model and the weights trained on it. All state is a cache of files and of pure functions."""

    def __init__(self, blobs: Blobs, hub_timeout: float = 60.0, cache_bytes: int | None = None) -> None:
        self._weights_store = WeightsStore(blobs, cache_bytes)
        self._hub_timeout = hub_timeout
        self._loaded: LoadedModel | None = None
        self._path: str | None = None
        self._sequence_cache: SequenceCache | None = None
        self._chat_cache_bytes = CHAT_CACHE_BYTES
        self._chat_batch = ChatBatch(self._get_sequence_cache, lambda: self.loaded, lambda: self._chat_cache_bytes)
        self._references: OrderedDict[str, Tensor] = OrderedDict()
        self._references_lock = threading.Lock()

    def handlers(self) -> Mapping[type, Handler]:
        return {
            Load: self.load, CreateAdapter: self.create_adapter, Offer: self.offer, Learn: self.learn,
            Retrain: self.retrain,
            Assess: self.assess, Merge: self.merge, Status: self.status,
        }  # fmt: skip

    def batches(self) -> Mapping[type, RequestBatch]:
        return {Chat: self._chat_batch}

    def _get_sequence_cache(self) -> SequenceCache:
        if self._sequence_cache is None:
            loaded = self.loaded
            self._chat_cache_bytes = max(CHAT_CACHE_BYTES, free_bytes(loaded.info.device) // 4)
            self._sequence_cache = sequence_cache_for(
                loaded.slots, loaded.fast_forward, self.weights, PREFIX_CACHE_BYTES
            )
        return self._sequence_cache

    @property
    def lanes(self) -> int:
        """How many requests may run concurrently."""
        return self._loaded.info.lanes if self._loaded else 1

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
            require_free_memory(path, request)
        self._loaded = yield from load_model(path, request)
        self._path = str(path)
        about: Loaded = self._loaded.info
        return about

    def merge(self, request: Merge) -> Steps:
        merged = yield from merge(request, self._weights_store.blobs.path(request.weights))
        return merged

    def create_adapter(self, request: CreateAdapter) -> Steps:
        yield None
        about = self.loaded.info
        weights_id = request.weights_id_on([about.fingerprint, about.former_fingerprint])
        slot = self.loaded.slots.get(request.adapter)
        if not self._weights_store.is_available(slot, weights_id):
            self._weights_store.create_initial(slot, weights_id, request.seed)
        return AdapterCreated(weights=weights_id, left_out=slot.left_out)

    def offer(self, request: Offer) -> Steps:
        started = time.monotonic()
        loaded, (slot, weights) = self.loaded, self.weights(request.weights)
        prompt = loaded.tokenize_prompt(request.prompt, request.sampling.max_new_tokens, request.context_length)
        steps = decode_group(
            group_forward_for(slot, weights.flat, len(prompt) + request.sampling.max_new_tokens), loaded.tokenizer,
            prompt,
            loaded.end_tokens, request.sampling, request.group_size, request.seed, request.openings,
        )  # fmt: skip
        group: list[GrowingOption] = []
        sent_lengths = [0] * request.group_size
        seconds_to_first = 0.0
        last_sent = started
        for group in steps:
            now = time.monotonic()
            if not seconds_to_first and not group[0].tokens:
                yield None
            elif not seconds_to_first or now - last_sent >= DELTA_SECONDS:
                seconds_to_first, last_sent = seconds_to_first or now - started, now
                yield _text_delta(group, sent_lengths)
            else:
                yield None
        overflowed_options = [option for option in group if option.overflowed]
        if overflowed_options and (
            len(overflowed_options) == len(group) or not all(option.tokens for option in overflowed_options)
        ):
            raise overflow_error()
        if delta := _text_delta(group, sent_lengths):
            yield delta
        options = tuple(
            Option(text=o.text, tokens=tuple(o.tokens), finish=o.finish or "length", logprob=o.logprob) for o in group
        )
        seconds = time.monotonic() - started
        return Offered(
            options=options, prompt_tokens=len(prompt), seconds_to_first=seconds_to_first, seconds=seconds,
            overflowed=tuple(index for index, option in enumerate(group) if option.overflowed),
        )  # fmt: skip

    def learn(self, request: Learn) -> Steps:
        started = time.monotonic()
        weights_id = request.weights_id()
        yield None
        if already_made := self._already_made(weights_id, request.keep):
            return already_made
        slot, weights = self.weights(request.weights)
        groups = [self._group(request.lesson, request.context_length, request.learning)]
        for lesson in request.replay:
            with suppress(Invalid):  # a lesson too long to be learned from a log is too long to be replayed
                groups.append(self._group(lesson, request.context_length, request.learning))
        references = []
        for group in groups:
            references.append(self._reference(slot, group))
            yield None
        shown = groups[0].answers[: len(request.lesson.options)]
        sums = references[0].sum(dim=-1).tolist()[: len(shown)]
        start = TrainingState(weights.flat, weights.first, weights.second, weights.steps)
        outcome = yield from learn_choice(slot, start, groups[0], groups[1:], references, request.learning, weights_id)
        metrics = Metrics(
            loss=outcome.loss,
            kl=outcome.kl,
            share_before=outcome.share_before,
            share_after=outcome.share_after,
            drift=slot.drift(outcome.state.flat),
            inner_steps=outcome.inner_steps,
            seconds=time.monotonic() - started,
            fluency=fluency_of(sums, [len(answer) for answer in shown]),
            variety=variety_of(shown),
        )
        self._weights_store.add(slot, _weights_from(weights_id, slot, outcome.state), metrics, request.keep)
        return Learned(weights=weights_id, metrics=metrics)

    def retrain(self, request: Retrain) -> Steps:
        started = time.monotonic()
        weights_id = request.weights_id()
        yield None
        if already_made := self._already_made(weights_id):
            return already_made
        slot, weights = self.weights(request.weights)
        groups, left_out, too_long = [], 0, None
        for number, lesson in enumerate(read_lessons(Path(request.path))):
            try:
                groups.append(self._group(lesson, request.context_length, request.learning))
            except Invalid as error:  # one lesson that is too long must not fail all others
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

        start = TrainingState(weights.flat, weights.first, weights.second, weights.steps)
        steps = retrain(slot, start, groups, reference, request.learning, request.epochs, request.seed, weights_id)
        last_report = 0.0
        while True:
            try:
                done, total, loss = next(steps)
            except StopIteration as end:
                outcome: RetrainOutcome = end.value
                break
            now = time.monotonic()
            if now - last_report < PROGRESS_SECONDS:
                yield None
                continue
            last_report = now
            yield _retrain_progress(done, total, loss, now - started, len(groups))
        metrics = Metrics(
            loss=outcome.loss,
            kl=outcome.kl,
            share_before=outcome.share_before,
            share_after=outcome.share_after,
            drift=slot.drift(outcome.state.flat),
            inner_steps=outcome.steps,
            seconds=time.monotonic() - started,
            agreed=outcome.agreed,
            agreed_of=outcome.evaluated,
            left_out=left_out,
        )
        self._weights_store.add(slot, _weights_from(weights_id, slot, outcome.state), metrics, save=True)
        return Learned(weights=weights_id, metrics=metrics)

    def assess(self, request: Assess) -> Steps:
        slot, weights = self.weights(request.weights)
        groups = [self._group(lesson, request.context_length, request.learning) for lesson in request.lessons]
        evaluation = evaluate_choices(
            slot, weights.flat, groups, lambda group: self._reference(slot, group), request.learning
        )
        while True:
            try:
                next(evaluation)
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

    def weights(self, weights_id: str) -> tuple[AdapterSlot, Weights]:
        """Return weights by id and the slot they belong to. Raises WeightsMissing."""
        slot = self.loaded.slots.get(self._weights_store.settings(weights_id))
        return slot, self._weights_store.get(slot, weights_id)

    def _already_made(self, weights_id: str, keep: bool = True) -> Learned | None:
        """Return the earlier result of the same learning request, if its weights are still available."""
        metrics = self._weights_store.metrics(weights_id)
        if metrics is None:
            return None
        slot = self.loaded.slots.get(self._weights_store.settings(weights_id))
        if not self._weights_store.is_available(slot, weights_id):
            return None
        if keep:
            self._weights_store.save(slot, weights_id)
        return Learned(weights=weights_id, metrics=metrics)

    def _group(self, lesson: Lesson, context_length: int, learning: Learning) -> Group:
        """Return a lesson as tokens. Options without tokens (from another model or a file) are tokenized here."""
        loaded, prompt = self.loaded, self.loaded.render_prompt(lesson.prompt)
        answers = [
            list(option.tokens)
            if option.tokens
            else loaded.tokenize_answer(option.text, option.finish == "stop", prompt)
            for option in lesson.options
        ]
        if isinstance(lesson.choice, Written):
            answers.append(loaded.tokenize_answer(lesson.choice.written, prompt=prompt))
        answers = [answer or [loaded.end_token or 0] for answer in answers]
        for answer in answers:
            loaded.require_known_tokens(answer, "choice")
        loaded.require_fits_context(prompt, max(len(answer) for answer in answers), context_length)
        uses_temperature = METHODS[learning.learning_method].uses_temperature
        temperature = lesson.temperature if uses_temperature and lesson.temperature >= MIN_TEMPERATURE else 1.0
        return Group(prompt.tokens, answers, lesson.choice, temperature)

    def _reference(self, slot: AdapterSlot, group: Group) -> Tensor:
        """Return the base model's log-probabilities of a lesson's answers. They never change, so they are cached."""
        key = recipe_id("r", [group.prompt, group.answers, group.temperature])
        logprobs = self._references.get(key)
        if logprobs is None:
            (logprobs,) = scorer_for(slot, [group]).logprobs([group], None)
            if not bool(torch.isfinite(logprobs).all()):
                raise overflow_error()
            with self._references_lock:
                self._references[key] = logprobs
                while len(self._references) > MAX_REFERENCES:
                    self._references.popitem(last=False)
        return logprobs


def free_bytes(device: str) -> int:
    """Return the free memory of a model's device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return int(psutil.virtual_memory().available)


def _weights_from(weights_id: str, slot: AdapterSlot, state: TrainingState) -> Weights:
    return Weights(weights_id, slot.settings, state.flat, state.first, state.second, state.steps)


def read_lessons(folder: Path) -> Iterator[Lesson]:
    """Read the lessons of a log. Raises TrellisError if it is gone."""
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


def _retrain_progress(done: int, total: int, loss: float, seconds: float, lessons: int) -> Progress:
    loss_text = f", loss {loss:.2f}" if loss == loss else ""
    return Progress(
        stage="fitting",
        fraction=min(done / total, 1.0),
        message=f"Optimizer step {min(done + 1, total)} of {total}, {lessons} choices{loss_text}",
        seconds_left=seconds / done * (total - done) if done else None,
    )


def _text_delta(group: list[GrowingOption], sent_lengths: list[int]) -> Delta | None:
    """Return the text each option grew by since `sent_lengths`, which is updated."""
    texts = {}
    for index, option in enumerate(group):
        if len(option.text) > sent_lengths[index]:
            texts[index] = option.text[sent_lengths[index] :]
            sent_lengths[index] = len(option.text)
    return Delta(texts=texts) if texts else None
