"""Weights by id: an adapter with its optimizer state, cached in memory over folders on disk in PEFT's layout.

It does not know prompts, losses or sessions.
"""

from __future__ import annotations

import json
import mmap
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...blobs import Blobs
from ...errors import TrellisError, WeightsMissing
from ...messages import Metrics
from ...options import Adapter
from .adapters import AdapterSlot


@dataclass(frozen=True)
class Weights:
    """An adapter's values and optimizer state. The tensors are never changed.

    flat, first, second: (P,) fp32 on the model's device, the adapter's parameters and AdamW's two moments.
    """

    id: str
    adapter: Adapter
    flat: Tensor
    first: Tensor
    second: Tensor
    steps: int

    @property
    def is_valid(self) -> bool:
        """Whether all values are finite and the optimizer state is one that steps can reach."""
        fits = self.first.shape == self.second.shape == self.flat.shape
        finite = all(bool(each.isfinite().all()) for each in (self.flat, self.first, self.second))
        return fits and finite and bool((self.second >= 0).all())

    @property
    def nbytes(self) -> int:
        return self.flat.nbytes * (3 if self.steps else 1)  # before the first step the moments are shared by all


def copy_outside_allocator(tensor: Tensor) -> Tensor:
    """Copy a CPU tensor to memory of its own. Long-lived tensors among short-lived ones would fragment the allocator's
    heap."""
    if tensor.device.type != "cpu":
        return tensor
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    copy = torch.frombuffer(mmap.mmap(-1, tensor.nbytes, **private), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


DEFAULT_CACHE_BYTES = 500_000_000
"""Memory for adapters and optimizer states; at least two are cached, however large they are."""


def not_finite_error() -> TrellisError:
    """Return the error for weights that are no longer finite after learning."""
    return TrellisError(
        "The model's numbers overflowed while it learned, and what it learned was not kept.",
        code="not_finite",
        next_step="Undo a few steps, or use a lower learning rate in a new session.",
    )


class WeightsStore:
    """Weights by id: a bounded cache in memory over folders on disk. Thread-safe."""

    def __init__(self, blobs: Blobs, cache_bytes: int | None = None) -> None:
        self.blobs = blobs
        self._cache_bytes = DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes
        self._cache: OrderedDict[str, Weights] = OrderedDict()
        self._unsaved_metrics: dict[str, Metrics] = {}
        """Metrics of weights that are only in the cache."""
        self._lock = threading.Lock()
        """Held for access to memory, never during disk access."""

    def settings(self, weights_id: str) -> Adapter:
        """Return the adapter settings of weights. Raises WeightsMissing."""
        if (cached := self._cached(weights_id)) is not None:
            return cached.adapter
        metadata = self._read_metadata(weights_id)
        try:
            return Adapter.model_validate(metadata["adapter"])
        except (KeyError, ValueError):
            self.blobs.discard(weights_id)
            raise WeightsMissing(weights_id) from None

    def create_initial(self, slot: AdapterSlot, weights_id: str, seed: int) -> Weights:
        """Create the weights a session starts from: A initialized as LoRA prescribes (Kaiming uniform), B zero."""
        generator = torch.Generator().manual_seed(seed)
        flat = torch.zeros(slot.flat.shape)
        for name, where, shape in slot.slices:
            if "lora_A" in name:
                bound = (1 / shape[1]) ** 0.5
                sampled = torch.empty(shape).uniform_(-bound, bound, generator=generator)
                flat[where] = sampled.flatten()
        flat = flat.to(slot.flat.device)
        weights = Weights(weights_id, slot.settings, flat, slot.zero_moments, slot.zero_moments, 0)
        return self.add(slot, weights, None, save=True)

    def get(self, slot: AdapterSlot, weights_id: str) -> Weights:
        """Return weights from memory or disk. Raises WeightsMissing if no complete folder fits."""
        if (cached := self._cached(weights_id)) is not None:
            return cached
        metadata = self._read_metadata(weights_id)
        folder = self.blobs.path(weights_id)
        try:
            flat = slot.join(load_file(folder / "adapter_model.safetensors"))
            state = load_file(folder / "optimizer.safetensors")
            steps = int(metadata["steps"])
            first, second = (
                state[name].to(flat.device) if steps else slot.zero_moments for name in ("first", "second")
            )
            weights = Weights(weights_id, slot.settings, flat, first, second, steps)
            if not weights.is_valid:
                raise ValueError("some of its values are not finite")
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, SafetensorError):
            self.blobs.discard(weights_id)
            raise WeightsMissing(weights_id) from None
        return self._add_to_cache(slot, weights)

    def add(self, slot: AdapterSlot, weights: Weights, metrics: Metrics | None, save: bool) -> Weights:
        """Cache new weights, and write them with `save`. Unsaved ones may have to be computed again.

        Raises TrellisError for weights that are not finite: they would count as damaged wherever they are read.
        """
        if not weights.is_valid:
            raise not_finite_error()
        if save:
            self._write(slot, weights, metrics)
        return self._add_to_cache(slot, weights, None if save or weights.id in self.blobs else metrics)

    def save(self, slot: AdapterSlot, weights_id: str) -> None:
        """Write weights to disk if they are not there. Raises WeightsMissing if they are not in memory either."""
        if weights_id not in self.blobs:
            self._write(slot, self.get(slot, weights_id), self._unsaved_metrics.get(weights_id))
        self._unsaved_metrics.pop(weights_id, None)

    def _write(self, slot: AdapterSlot, weights: Weights, metrics: Metrics | None) -> None:
        """Write weights in PEFT's layout with the optimizer state beside it, completely or not at all."""
        metadata = {
            "adapter": weights.adapter.model_dump(mode="json"),
            "steps": weights.steps,
            "metrics": metrics.model_dump(mode="json") if metrics else None,
        }
        with self.blobs.writing(weights.id) as folder:
            named = {name: tensor.contiguous().cpu() for name, tensor in slot.split(weights.flat).items()}
            save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            state = {
                "first": weights.first.cpu(),
                "second": weights.second.cpu().clone(),
            }  # save_file rejects shared memory
            save_file(state, folder / "optimizer.safetensors")
            slot.config.save_pretrained(folder)
            (folder / "weights.json").write_text(json.dumps(metadata, indent=1))

    def is_available(self, slot: AdapterSlot, weights_id: str) -> bool:
        """Whether the weights are on disk, complete, or in memory and unsaved."""
        if weights_id not in self.blobs and weights_id not in self._unsaved_metrics:
            return False
        try:
            self.get(slot, weights_id)
        except WeightsMissing:
            return False
        return True

    def metrics(self, weights_id: str) -> Metrics | None:
        """Return the metrics measured when the weights were made, if they are available."""
        if (unsaved := self._unsaved_metrics.get(weights_id)) is not None:
            return unsaved
        if weights_id not in self.blobs:
            return None
        try:
            found = self._read_metadata(weights_id).get("metrics")
            return Metrics.model_validate(found) if found else None
        except (WeightsMissing, ValueError):
            return None

    def _read_metadata(self, weights_id: str) -> dict[str, Any]:
        try:
            metadata = json.loads((self.blobs.path(weights_id) / "weights.json").read_text())
            if not isinstance(metadata, dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError):
            self.blobs.discard(weights_id)
            raise WeightsMissing(weights_id) from None
        return metadata

    def _cached(self, weights_id: str) -> Weights | None:
        """Return weights from memory."""
        with self._lock:
            if weights_id in self._cache:
                self._cache.move_to_end(weights_id)
            return self._cache.get(weights_id)

    def _add_to_cache(self, slot: AdapterSlot, weights: Weights, unsaved_metrics: Metrics | None = None) -> Weights:
        """Cache weights, with their metrics if they are not on disk."""
        flat, first, second = (
            each if each is slot.zero_moments else copy_outside_allocator(each)
            for each in (weights.flat, weights.first, weights.second)
        )
        weights = replace(weights, flat=flat, first=first, second=second)
        with self._lock:
            if unsaved_metrics is not None:
                self._unsaved_metrics[weights.id] = unsaved_metrics
            self._cache[weights.id] = weights
            self._cache.move_to_end(weights.id)
            total_bytes = sum(each.nbytes for each in self._cache.values())
            while total_bytes > self._cache_bytes and len(self._cache) > 2:
                _, dropped = self._cache.popitem(last=False)
                self._unsaved_metrics.pop(dropped.id, None)
                total_bytes -= dropped.nbytes
        return weights
