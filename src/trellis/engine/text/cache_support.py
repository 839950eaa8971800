"""Detect how a model can continue a text: with which cache, in which chunks, or only by reading everything again.

It knows transformers' caches and tokens; not adapters, sampling or requests. Caches differ: not every state can be
repeated for a group of answers, and some models silently read a second chunk as if it were the first. So what a model
can do is tried once, against a pass over the whole text.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from .target_modules import probe_ids

log = logging.getLogger(__name__)

ChunkSupport = Literal["any", "single", "none"]
"""What a model can read after a first chunk: any chunk, single tokens only, or nothing, so that it reads all again."""

CACHE_ARGUMENTS = ("past_key_values", "cache_params", "state")
"""The names that models give to their cache as argument and output."""

EXACT_TOLERANCE = 1e-4
"""Relative difference of fp32 logits up to which two ways of reading are the same."""

CACHED_TOLERANCE = 0.05
"""The same for cached decoding as far as transformers' own goes: some models round their states."""

ROUNDED_TOLERANCE = 0.3
"""Where every pass is rounded differently (16 bits, or 8-bit activations), the closest text differs by less than this
fraction of its logits' spread. A model that forgot what it read is far off in all texts."""

FIRST_CHUNK, SECOND_CHUNK, LAST_CHUNK = 7, 4, 1
"""Tokens in the chunks of the trial."""


@dataclass(frozen=True)
class CacheSupport:
    """What was detected for a model.

    `argument` is the name of its cache, None if there is no usable one; `made_by_model`: only the model can create it.
    `single_token_start`: a first chunk may be a single token. `can_repeat`: one row can be continued as several. A
    cache takes `fixed_bytes` plus `bytes_per_token`. `is_causal` is False if a token's logits depend on later tokens.
    """

    argument: str | None = None
    made_by_model: bool = False
    chunks: ChunkSupport = "none"
    single_token_start: bool = True
    can_repeat: bool = False
    has_logits_to_keep: bool = True
    fixed_bytes: float = 0.0
    bytes_per_token: float = 0.0
    is_causal: bool = True

    def bytes_for(self, tokens: int) -> int:
        """Return the bytes that the cache of a text with so many tokens takes."""
        return int(self.fixed_bytes + self.bytes_per_token * tokens)


class ModelCache:
    """What a model has read in some rows. Each step names the model, since the adapter in it may have changed."""

    def __init__(self, support: CacheSupport) -> None:
        self._support = support
        self._chunks = support.chunks
        self._cache: Any = None
        self._tokens: Tensor | None = None
        """The tokens (R, T) read so far, if no cache holds them."""
        self._is_started = False

    def read(self, model: Any, ids: Tensor, last_only: bool) -> Tensor:
        """Read tokens (R, T). Returns logits (R, T, V), or (R, 1, V) with `last_only`."""
        width = ids.shape[1]
        if not self._is_started and width == 1 and not self._support.single_token_start:
            self._chunks = "none"
        if self._chunks == "none":
            self._tokens = ids if self._tokens is None else torch.cat([self._tokens, ids], dim=1)
            logits = last_logits(
                model, self._tokens, 1 if last_only else width, self._support.has_logits_to_keep, use_cache=False
            )
        elif self._is_started and self._chunks == "single" and width > 1:
            logits = torch.cat([self._step(model, ids[:, place : place + 1], 1) for place in range(width)], dim=1)
            logits = logits[:, -1:] if last_only else logits
        else:
            logits = self._step(model, ids, 1 if last_only else width)
        self._is_started = True
        return logits

    def repeat(self, count: int) -> bool:
        """Continue with copies of the only row. Returns False if the cache cannot be copied, so the prompt must be read
        again."""
        if self._chunks == "none":
            assert self._tokens is not None
            self._tokens = self._tokens.expand(count, -1)
            return True
        if not self._support.can_repeat:
            return False
        for layer in self._cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(torch.zeros(count, dtype=torch.long, device=layer.device))
            else:
                layer.batch_repeat_interleave(count)
        return True

    def crop(self, tokens: int) -> bool:
        """Forget the last tokens. Returns False if that is not possible."""
        if self._chunks == "none":
            assert self._tokens is not None
            self._tokens = self._tokens[:, : self._tokens.shape[1] - tokens]
            return True
        # Sliding-window layers and recurrent states have not kept what came before.
        if type(self._cache) is not DynamicCache or any(
            type(layer) is not DynamicLayer for layer in self._cache.layers
        ):
            return False
        self._cache.crop(-tokens)
        return True

    @property
    def nbytes(self) -> int:
        """The current size of the cache."""
        held = vars(self._cache) if hasattr(self._cache, "__dict__") else self._cache
        return sum(each.nbytes for each in _iter_tensors(held))

    @property
    def cache(self) -> Any:
        return self._cache

    def _step(self, model: Any, ids: Tensor, keep: int) -> Tensor:
        support = self._support
        assert support.argument is not None
        if not self._is_started and not support.made_by_model:
            self._cache = DynamicCache(config=model.config)
        given = {} if self._cache is None else {support.argument: self._cache}
        options = {"logits_to_keep": keep} if support.has_logits_to_keep else {}
        output = model(input_ids=ids, use_cache=True, **given, **options)
        self._cache = getattr(output, support.argument, self._cache)
        logits: Tensor = output.logits[:, -keep:]
        return logits


def has_logits_to_keep(model: Any) -> bool:
    """Whether a model can compute only its last logits."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def last_logits(model: Any, ids: Tensor, keep: int, has_logits_to_keep: bool = True, **options: Any) -> Tensor:
    """Return the last `keep` logits (R, keep, V) of whole texts (R, T). Some models accept the argument but compute all
    of them."""
    arguments = {"logits_to_keep": keep} if has_logits_to_keep else {}
    logits: Tensor = model(input_ids=ids, **options, **arguments).logits[:, -keep:]
    return logits


def detect_cache_support(model: Any) -> CacheSupport:
    """Detect how a model can continue a text, with its adapters off.

    It takes four short passes for a model with attention only, and about fifteen for others.
    """
    parameters = inspect.signature(model.forward).parameters
    no_cache = CacheSupport(has_logits_to_keep=has_logits_to_keep(model))
    argument = next((name for name in CACHE_ARGUMENTS if name in parameters), None)
    ids = (
        probe_ids(model, 2 * (FIRST_CHUNK + SECOND_CHUNK + LAST_CHUNK)).view(2, -1).to(next(model.parameters()).device)
    )
    with torch.inference_mode():
        whole = last_logits(model, ids, ids.shape[1], no_cache.has_logits_to_keep, use_cache=False)
        for made_by_model in (False, True) if argument else ():
            support = _try_support(
                model, ids, whole, replace(no_cache, argument=argument, made_by_model=made_by_model, chunks="any")
            )
            if support is not None:
                return support
        return replace(no_cache, is_causal=not _looks_ahead(model, ids, whole, no_cache.has_logits_to_keep))


def _is_deterministic(model: Any, logits: Tensor) -> bool:
    """Whether the same tokens give the same numbers in any pass. 8-bit layers round their inputs by the largest values
    of all tokens in a pass (LLM.int8(), arXiv 2208.07339)."""
    return logits.dtype == torch.float32 and not any("8bit" in type(module).__name__ for module in model.modules())


def _looks_ahead(model: Any, ids: Tensor, whole: Tensor, has_logits_to_keep: bool) -> bool:
    """Whether a token's logits depend on later tokens; undecidable where passes are rounded differently."""
    if not _is_deterministic(model, whole):
        return False
    first = last_logits(model, ids[:, :FIRST_CHUNK], FIRST_CHUNK, has_logits_to_keep, use_cache=False)
    return not _are_mostly_close(first, whole[:, :FIRST_CHUNK])


def _try_support(model: Any, ids: Tensor, whole: Tensor, support: CacheSupport) -> CacheSupport | None:
    """Try `support` on two texts (2, T) at once. Returns it with what the trial showed; None if it does not work."""
    tolerance = CACHED_TOLERANCE if _is_deterministic(model, whole) else None
    try:
        cache = ModelCache(support)
        first = cache.read(model, ids[:, :FIRST_CHUNK], last_only=False)
        if cache.cache is None or not _are_close(first, whole[:, :FIRST_CHUNK], tolerance):
            return None
        if (
            tolerance
            and not _are_mostly_close(first, whole[:, :FIRST_CHUNK])
            and _looks_ahead(model, ids, whole, support.has_logits_to_keep)
        ):
            return None
        small = cache.nbytes / 2
        is_plain = _is_repeatable(cache.cache) and not any(
            isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.cache.layers
        )
        if is_plain:
            rows = [cache.read(model, ids[:, FIRST_CHUNK : FIRST_CHUNK + SECOND_CHUNK], last_only=False)]
            rows.append(cache.read(model, ids[:, FIRST_CHUNK + SECOND_CHUNK :], last_only=False))
            support = replace(support, can_repeat=True)
        else:
            places = range(FIRST_CHUNK, FIRST_CHUNK + SECOND_CHUNK + LAST_CHUNK)
            rows = [cache.read(model, ids[:, place : place + 1], last_only=True) for place in places]
        large = cache.nbytes / 2
        if not _are_close(torch.cat(rows, dim=1), whole[:, FIRST_CHUNK:], tolerance):
            return None
        if not is_plain:
            if not _isolates_sequences(model, ids, support):
                return None
            support = replace(
                support,
                chunks="any" if tolerance and _reads_chunks(model, ids, whole, support) else "single",
                can_repeat=_repeats_correctly(model, ids[:1], whole[:1], support),
                single_token_start=_are_close(
                    ModelCache(support).read(model, ids[:, :1], last_only=True), whole[:, :1], tolerance
                ),
            )
    except Exception as error:
        if "out of memory" in str(error):
            raise
        log.info("%s cannot go on with %s", type(model).__name__, support, exc_info=True)
        return None
    per_token = (large - small) / (SECOND_CHUNK + LAST_CHUNK)
    return replace(support, fixed_bytes=max(0.0, small - FIRST_CHUNK * per_token), bytes_per_token=per_token)


def _repeats_correctly(model: Any, ids: Tensor, whole: Tensor, support: CacheSupport) -> bool:
    """Whether one row can be continued correctly as two."""
    cache = ModelCache(replace(support, can_repeat=True))
    cache.read(model, ids[:, :FIRST_CHUNK], last_only=True)
    if not _is_repeatable(cache.cache):
        return False
    cache.repeat(2)
    logits = cache.read(model, ids[:, FIRST_CHUNK : FIRST_CHUNK + 1].expand(2, -1), last_only=True)
    tolerance = CACHED_TOLERANCE if _is_deterministic(model, whole) else None
    return _are_close(logits, whole[:, FIRST_CHUNK : FIRST_CHUNK + 1].expand(2, -1, -1), tolerance)


def _isolates_sequences(model: Any, ids: Tensor, support: CacheSupport) -> bool:
    """Whether reading another text in between changes nothing: some models hold their state in their modules."""
    found = []
    for is_interleaved in (False, True):
        cache = ModelCache(support)
        cache.read(model, ids[:, :FIRST_CHUNK], last_only=True)
        if is_interleaved:
            ModelCache(support).read(model, ids[:, -FIRST_CHUNK:], last_only=True)
        found.append(cache.read(model, ids[:, FIRST_CHUNK : FIRST_CHUNK + 1], last_only=True))
    return _are_close(found[1], found[0], CACHED_TOLERANCE)


def _reads_chunks(model: Any, ids: Tensor, whole: Tensor, support: CacheSupport) -> bool:
    """Whether a second chunk is read as the continuation of the first. A recurrent model may take it for a beginning,
    which shows little in a few tokens: only call this where rounding cannot hide it."""
    try:
        cache = ModelCache(support)
        cache.read(model, ids[:, :FIRST_CHUNK], last_only=True)
        second = cache.read(model, ids[:, FIRST_CHUNK : FIRST_CHUNK + SECOND_CHUNK], last_only=False)
        last = cache.read(model, ids[:, FIRST_CHUNK + SECOND_CHUNK :], last_only=False)
    except Exception as error:
        if "out of memory" in str(error):
            raise
        log.info("%s reads no second piece", type(model).__name__, exc_info=True)
        return False
    return _are_close(torch.cat([second, last], dim=1), whole[:, FIRST_CHUNK:], EXACT_TOLERANCE)


def _are_close(one: Tensor, other: Tensor, tolerance: float | None) -> bool:
    """Whether logits (R, T, V) are equal within a tolerance; without one, whether any text is close despite
    rounding."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    if tolerance is None:
        spread = (other - other.mean(dim=-1, keepdim=True)).norm(dim=(1, 2))
        return bool(((one - other).norm(dim=(1, 2)) <= ROUNDED_TOLERANCE * spread).any())
    return float((one - other).norm()) <= tolerance * float(other.norm())


def _are_mostly_close(one: Tensor, other: Tensor) -> bool:
    """Whether most logits (R, T, V) are equal in 32 bits. A few may not be: at a tie, other experts are selected."""
    gaps = (one - other).norm(dim=-1) / other.norm(dim=-1)
    return float(gaps.median()) <= EXACT_TOLERANCE


def _is_repeatable(cache: Any) -> bool:
    """Whether every layer of a cache can be copied: transformers' own, and others that implement it."""
    return type(cache) is DynamicCache and all(_is_layer_repeatable(layer) for layer in cache.layers)


def _is_layer_repeatable(layer: Any) -> bool:
    if type(layer).__module__ == DynamicLayer.__module__:
        return True
    return not isinstance(layer, LinearAttentionCacheLayerMixin) and "batch_repeat_interleave" in vars(type(layer))


def _iter_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _iter_tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _iter_tensors(each)
    elif isinstance(value, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        yield from _iter_tensors(vars(value))
