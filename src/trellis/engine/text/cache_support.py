"""How a model goes on with a text that it has read: with which cache, in what pieces, and when it has to read all of it
again.

It knows transformers' caches and tokens; not adapters, sampling or who asks. Models differ in what their caches can do:
not every state can be copied for a group of answers, and some models read the second piece of a text as if it were the
first, without an error. So what a model can do is tried out once, against a pass over the whole text.
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

Pieces = Literal["any", "single", "none"]
"""What a model can read after a first piece: any piece, single tokens alone, or nothing: then it reads all again."""

CACHES = ("past_key_values", "cache_params", "state")
"""The names that models give the argument and the output that is their cache."""

ROUNDING = 1e-4
"""Up to this relative difference of logits in 32 bits, two ways of reading are the same."""

SAME = 0.05
"""Up to this one, as far as transformers' own cached decoding goes: some models round their states."""

COARSE = 0.3
"""Where every pass is rounded otherwise (16 bits, or activations in 8), the text that is least far off differs by less
than this part of the spread of its logits. A model that forgot what it read is far off in all."""

FIRST, SECOND, LAST = 7, 4, 1
"""Tokens in the pieces of the trial."""


@dataclass(frozen=True)
class Caching:
    """What was found out about a model.

    `argument` is the name of its cache, None where it has none that can be used; `own` says that only the model can
    make one. `single_first`: whether a first piece may be of one token. `copies`: whether one row that was read can go
    on as several. A cache takes `fixed` bytes and `per_token` for each token. `causal` is False where what a token is
    read as depends on those after it.
    """

    argument: str | None = None
    own: bool = False
    pieces: Pieces = "none"
    single_first: bool = True
    copies: bool = False
    keeps_logits: bool = True
    fixed: float = 0.0
    per_token: float = 0.0
    causal: bool = True

    def takes(self, tokens: int) -> int:
        """Bytes that one text of so many tokens takes."""
        return int(self.fixed + self.per_token * tokens)


class Past:
    """What a model has read in some rows. Every step names the model, since the adapter in it may have changed."""

    def __init__(self, caching: Caching) -> None:
        self._caching = caching
        self._pieces = caching.pieces
        self._cache: Any = None
        self._read: Tensor | None = None
        """The tokens (R, T) read so far, where there is no cache that holds them."""
        self._begun = False

    def read(self, model: Any, ids: Tensor, last: bool) -> Tensor:
        """Read tokens (R, T). Returns logits (R, T, V) after each, or (R, 1, V) after the last one alone."""
        width = ids.shape[1]
        if not self._begun and width == 1 and not self._caching.single_first:
            self._pieces = "none"
        if self._pieces == "none":
            self._read = ids if self._read is None else torch.cat([self._read, ids], dim=1)
            found = last_logits(model, self._read, 1 if last else width, self._caching.keeps_logits, use_cache=False)
        elif self._begun and self._pieces == "single" and width > 1:
            found = torch.cat([self._step(model, ids[:, place : place + 1], 1) for place in range(width)], dim=1)
            found = found[:, -1:] if last else found
        else:
            found = self._step(model, ids, 1 if last else width)
        self._begun = True
        return found

    def spread(self, count: int) -> bool:
        """Go on with so many copies of the only row. False where the cache cannot be copied: it must be read anew."""
        if self._pieces == "none":
            assert self._read is not None
            self._read = self._read.expand(count, -1)
            return True
        if not self._caching.copies:
            return False
        for layer in self._cache.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(torch.zeros(count, dtype=torch.long, device=layer.device))
            else:
                layer.batch_repeat_interleave(count)
        return True

    def cut(self, tokens: int) -> bool:
        """Forget the last tokens. False where that cannot be done."""
        if self._pieces == "none":
            assert self._read is not None
            self._read = self._read[:, : self._read.shape[1] - tokens]
            return True
        # Layers that slide, or hold a sum of what they read, have not kept what was before.
        if type(self._cache) is not DynamicCache or any(
            type(layer) is not DynamicLayer for layer in self._cache.layers
        ):
            return False
        self._cache.crop(-tokens)
        return True

    @property
    def nbytes(self) -> int:
        """What the cache takes now."""
        held = vars(self._cache) if hasattr(self._cache, "__dict__") else self._cache
        return sum(each.nbytes for each in _tensors(held))

    @property
    def cache(self) -> Any:
        return self._cache

    def _step(self, model: Any, ids: Tensor, keep: int) -> Tensor:
        caching = self._caching
        assert caching.argument is not None
        if not self._begun and not caching.own:
            self._cache = DynamicCache(config=model.config)
        given = {} if self._cache is None else {caching.argument: self._cache}
        more = {"logits_to_keep": keep} if caching.keeps_logits else {}
        output = model(input_ids=ids, use_cache=True, **given, **more)
        self._cache = getattr(output, caching.argument, self._cache)
        logits: Tensor = output.logits[:, -keep:]
        return logits


def keeps_last_logits(model: Any) -> bool:
    """Whether a model can be asked for its last logits alone."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def last_logits(model: Any, ids: Tensor, keep: int, keeps_logits: bool = True, **options: Any) -> Tensor:
    """The last `keep` logits (R, keep, V) of whole texts (R, T). Some models take the argument and make all of them."""
    more = {"logits_to_keep": keep} if keeps_logits else {}
    logits: Tensor = model(input_ids=ids, **options, **more).logits[:, -keep:]
    return logits


def caching_of(model: Any) -> Caching:
    """Find out how a model goes on with a text. Its adapters, where it has any, are off.

    It takes four short passes for a model with attention alone, and some fifteen for others.
    """
    parameters = inspect.signature(model.forward).parameters
    none = Caching(keeps_logits=keeps_last_logits(model))
    argument = next((name for name in CACHES if name in parameters), None)
    ids = probe_ids(model, 2 * (FIRST + SECOND + LAST)).view(2, -1).to(next(model.parameters()).device)
    with torch.inference_mode():
        whole = last_logits(model, ids, ids.shape[1], none.keeps_logits, use_cache=False)
        for own in (False, True) if argument else ():
            found = _tried(model, ids, whole, replace(none, argument=argument, own=own, pieces="any"))
            if found is not None:
                return found
        return replace(none, causal=not _looks_ahead(model, ids, whole, none.keeps_logits))


def _is_exact(model: Any, logits: Tensor) -> bool:
    """Whether the same tokens give the same numbers in any pass. Layers in 8 bits round what they are given by the
    largest values of all tokens in a pass (LLM.int8(), arXiv 2208.07339)."""
    return logits.dtype == torch.float32 and not any("8bit" in type(module).__name__ for module in model.modules())


def _looks_ahead(model: Any, ids: Tensor, whole: Tensor, keeps_logits: bool) -> bool:
    """Whether what a token is read as depends on those after it; where passes are rounded one cannot tell."""
    if not _is_exact(model, whole):
        return False
    begun = last_logits(model, ids[:, :FIRST], FIRST, keeps_logits, use_cache=False)
    return not _mostly_same(begun, whole[:, :FIRST])


def _tried(model: Any, ids: Tensor, whole: Tensor, caching: Caching) -> Caching | None:
    """`caching`, with what a trial of it on two texts (2, T) at once showed; None where it does not work."""
    tolerance = SAME if _is_exact(model, whole) else None
    try:
        past = Past(caching)
        begun = past.read(model, ids[:, :FIRST], last=False)
        if past.cache is None or not _same(begun, whole[:, :FIRST], tolerance):
            return None
        if (
            tolerance
            and not _mostly_same(begun, whole[:, :FIRST])
            and _looks_ahead(model, ids, whole, caching.keeps_logits)
        ):
            return None
        small = past.nbytes / 2
        plain = _can_be_copied(past.cache) and not any(
            isinstance(layer, LinearAttentionCacheLayerMixin) for layer in past.cache.layers
        )
        if plain:
            rows = [past.read(model, ids[:, FIRST : FIRST + SECOND], last=False)]
            rows.append(past.read(model, ids[:, FIRST + SECOND :], last=False))
            caching = replace(caching, copies=True)
        else:
            places = range(FIRST, FIRST + SECOND + LAST)
            rows = [past.read(model, ids[:, place : place + 1], last=True) for place in places]
        large = past.nbytes / 2
        if not _same(torch.cat(rows, dim=1), whole[:, FIRST:], tolerance):
            return None
        if not plain:
            if not _keeps_apart(model, ids, caching):
                return None
            caching = replace(
                caching,
                pieces="any" if tolerance and _reads_pieces(model, ids, whole, caching) else "single",
                copies=_copies(model, ids[:1], whole[:1], caching),
                single_first=_same(Past(caching).read(model, ids[:, :1], last=True), whole[:, :1], tolerance),
            )
    except Exception as error:
        if "out of memory" in str(error):
            raise
        log.info("%s cannot go on with %s", type(model).__name__, caching, exc_info=True)
        return None
    per_token = (large - small) / (SECOND + LAST)
    return replace(caching, fixed=max(0.0, small - FIRST * per_token), per_token=per_token)


def _copies(model: Any, ids: Tensor, whole: Tensor, caching: Caching) -> bool:
    """Whether one row that was read goes on rightly in two."""
    past = Past(replace(caching, copies=True))
    past.read(model, ids[:, :FIRST], last=True)
    if not _can_be_copied(past.cache):
        return False
    past.spread(2)
    found = past.read(model, ids[:, FIRST : FIRST + 1].expand(2, -1), last=True)
    tolerance = SAME if _is_exact(model, whole) else None
    return _same(found, whole[:, FIRST : FIRST + 1].expand(2, -1, -1), tolerance)


def _keeps_apart(model: Any, ids: Tensor, caching: Caching) -> bool:
    """Whether a text goes on as if no other had been read in between: some models hold their state in their modules."""
    found = []
    for between in (False, True):
        past = Past(caching)
        past.read(model, ids[:, :FIRST], last=True)
        if between:
            Past(caching).read(model, ids[:, -FIRST:], last=True)
        found.append(past.read(model, ids[:, FIRST : FIRST + 1], last=True))
    return _same(found[1], found[0], SAME)


def _reads_pieces(model: Any, ids: Tensor, whole: Tensor, caching: Caching) -> bool:
    """Whether a second piece is read as what follows the first. A model that remembers a sum of what it read may take
    it for a beginning, which shows little in a few tokens: this is only asked where rounding cannot hide it."""
    try:
        past = Past(caching)
        past.read(model, ids[:, :FIRST], last=True)
        second = past.read(model, ids[:, FIRST : FIRST + SECOND], last=False)
        last = past.read(model, ids[:, FIRST + SECOND :], last=False)
    except Exception as error:
        if "out of memory" in str(error):
            raise
        log.info("%s reads no second piece", type(model).__name__, exc_info=True)
        return False
    return _same(torch.cat([second, last], dim=1), whole[:, FIRST:], ROUNDING)


def _same(one: Tensor, other: Tensor, tolerance: float | None) -> bool:
    """Whether logits (R, T, V) are the same but for rounding; without a tolerance, where every pass is rounded
    otherwise, whether any text is near."""
    if one.shape != other.shape:
        return False
    one, other = one.float(), other.float()
    if tolerance is None:
        spread = (other - other.mean(dim=-1, keepdim=True)).norm(dim=(1, 2))
        return bool(((one - other).norm(dim=(1, 2)) <= COARSE * spread).any())
    return float((one - other).norm()) <= tolerance * float(other.norm())


def _mostly_same(one: Tensor, other: Tensor) -> bool:
    """Whether most logits (R, T, V) are the same in 32 bits. A few may not be: experts change places at a tie."""
    gaps = (one - other).norm(dim=-1) / other.norm(dim=-1)
    return float(gaps.median()) <= ROUNDING


def _can_be_copied(cache: Any) -> bool:
    """Whether every layer of a cache is known to be copied whole: transformers' own, and others that say how."""
    return type(cache) is DynamicCache and all(_layer_can_be_copied(layer) for layer in cache.layers)


def _layer_can_be_copied(layer: Any) -> bool:
    if type(layer).__module__ == DynamicLayer.__module__:
        return True
    return not isinstance(layer, LinearAttentionCacheLayerMixin) and "batch_repeat_interleave" in vars(type(layer))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        yield from _tensors(vars(value))
