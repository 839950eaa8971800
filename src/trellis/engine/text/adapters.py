"""LoRA adapters injected into one base model: their layers, values as one flat vector, gradients, drift.

PEFT injects an adapter; its parameters then become views into one vector, so that switching weights is one copy and an
optimizer step a few operations. It does not know prompts, losses or files.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import Invalid
from ...messages import derived_seed, recipe_id
from ...options import Adapter
from ..parallel import SINGLE_CORE, CorePool
from .cache_support import CacheSupport, detect_cache_support
from .cuda_graphs import StepGraphs
from .fast_forward import AdaptedLayers, FastForward
from .target_modules import (
    EXPERTS_TARGET,
    AdaptableLayers,
    adapted_modules,
    find_adaptable_layers,
    restored_on_error,
    short_name,
)


class AdapterSlots:
    """The adapters injected into one base model, one slot per adapter settings."""

    def __init__(self, base: nn.Module, fast_forward: FastForward | None = None, cores: CorePool = SINGLE_CORE) -> None:
        """`fast_forward` is the base model's fast forward pass, if it has one; `cores` runs its parallel halves."""
        self._base = base
        self._fast_forward = fast_forward
        self._cores = cores
        self.unused_rows: Tensor | None = None
        """Vocabulary rows without a token, which are never sampled."""
        self._model: PeftModel | None = None
        self._slots: dict[Adapter, AdapterSlot] = {}
        self._lock = threading.RLock()
        self._layers: AdaptableLayers | None = None
        self._cache_support: CacheSupport | None = None

    def get(self, settings: Adapter) -> AdapterSlot:
        """Return the slot for these settings, injecting it on first use. On failure the model stays as it was."""
        with self._lock:
            if settings not in self._slots:
                targets = self._find_targets(settings)  # reject what is impossible before touching anything
                with restored_on_error(self._model or self._base):
                    self._slots[settings] = self._inject(settings, *targets)
            return self._slots[settings]

    @property
    def layers(self) -> AdaptableLayers:
        """The layers that adapters can change."""
        with self._lock:
            if self._layers is None:  # first asked for before the first injection
                self._layers = find_adaptable_layers(self._base, probe=self._fast_forward is None)
            return self._layers

    @property
    def cache_support(self) -> CacheSupport:
        """How the model caches, as detected with the adapters off."""
        with self._lock:
            if self._cache_support is None:
                with self._model.disable_adapter() if self._model else nullcontext():
                    self._cache_support = detect_cache_support(self._base)
            return self._cache_support

    def _inject(
        self, settings: Adapter, modules: list[str], parameters: list[str], left_out: tuple[str, ...]
    ) -> AdapterSlot:
        name = recipe_id("a", settings.model_dump(mode="json"))
        config = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=self.layers.shorten_names(modules),
            target_parameters=parameters or None,
            fan_in_fan_out=any(self._is_conv1d(module) for module in modules),
            task_type="CAUSAL_LM",
        )
        _restore_8bit_scales(self._base)
        if self._model is None:
            model = get_peft_model(self._base, config, adapter_name=name)
        else:
            model = self._model
            model.add_adapter(name, config)
        model.eval()
        slot = AdapterSlot(self, model, name, settings, self._fast_forward, self._lock, self._cores, left_out)
        self._model = model
        return slot

    def _is_conv1d(self, name: str) -> bool:
        module = self._base.get_submodule(name)
        return isinstance(getattr(module, "base_layer", module), Conv1D)

    def _find_targets(self, settings: Adapter) -> tuple[list[str], list[str], tuple[str, ...]]:
        """Return the linear layers and expert weights that get an adapter, and the requested ones that cannot, with
        reasons. Raises Invalid, listing the available names, for an unknown one."""
        layers = self.layers
        experts = list(layers.experts)
        unsupported = dict(layers.unsupported)
        if experts and settings.lora_dropout:
            experts, unsupported[EXPERTS_TARGET] = [], "PEFT adapts them without dropout only"
        if settings.target_modules == "all-linear":
            all_linear = [name for name in layers.linear if name != layers.head]
            if not all_linear and not experts:
                raise Invalid(
                    "target_modules: PEFT can adapt no layer of this model.",
                    field="config.target_modules", next_step="Choose another model.",
                )  # fmt: skip
            return all_linear, experts, tuple(f"{name} ({reason})" for name, reason in sorted(unsupported.items()))
        requested = settings.target_modules.split(", ")
        available = set(layers.target_names) - set(unsupported)
        if unknown := sorted(set(requested) - available):
            first = unknown[0]
            wrong = f"the model has no linear layer “{first}”"
            if first in unsupported:
                wrong = f"“{first}” cannot get an adapter ({unsupported[first]})"
            raise Invalid(
                f"target_modules: {wrong}. It has: {', '.join(sorted(available))}.",
                field="config.target_modules",
                next_step="Start a session with some of these, or with “all-linear”.",
            )
        named = [name for name in layers.linear if short_name(name) in requested]
        return named, experts if EXPERTS_TARGET in requested else [], ()


def _restore_8bit_scales(base: nn.Module) -> None:
    """Put the scales of 8-bit layers back on their weights. Once such a layer of bitsandbytes has run, only its state
    has them, and PEFT would lose them when it moves the weight."""
    for module in base.modules():
        state: Any = getattr(module, "state", None)
        weight: Any = getattr(module, "weight", None)
        if getattr(state, "SCB", None) is not None and getattr(weight, "SCB", 0) is None:
            weight.SCB, weight.CB = state.SCB, weight.data


def dequantized_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer, dequantized if necessary."""
    if (own := getattr(layer, "dequantized", None)) is not None:
        return own()
    return dequantize_module_weight(layer).detach()


class ThreadState(threading.local):
    """What each thread has of a slot: layers with the adapter's values, and graphs over them."""

    adapted_layers: AdaptedLayers | None = None
    graphs: StepGraphs | None = None


class AdapterSlot:
    """One adapter injected into the base model; its values are switched in place.

    All threads share one model: hold `lock` while using it. Each thread has its own adapted layers.
    """

    def __init__(
        self,
        slots: AdapterSlots,
        model: PeftModel,
        name: str,
        settings: Adapter,
        fast_forward: FastForward | None,
        lock: threading.RLock,
        cores: CorePool,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self._slots = slots
        self.model = model
        self.name = name
        self.settings = settings
        self.lock = lock
        self.cores = cores
        self.left_out = left_out
        """Layers that “all-linear” includes but that cannot get an adapter, with reasons."""
        self.config = model.peft_config[name]
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        model.set_adapter(name)
        parameters = [(path, p) for path, p in model.named_parameters() if p.requires_grad]
        total = sum(p.numel() for _, p in parameters)
        device = parameters[0][1].device
        self.flat = torch.zeros(total, device=device)
        self.grad = torch.zeros(total, device=device)
        self.zero_moments = torch.zeros(total, device=device)
        """The optimizer's moments before its first step; never changed, and shared by all."""
        self.slices: list[tuple[str, slice, torch.Size]] = []
        start = 0
        for path, parameter in parameters:
            where = slice(start, start + parameter.numel())
            parameter.data = self.flat[where].view(parameter.shape)
            parameter.grad = self.grad[where].view(parameter.shape)
            self.slices.append((path.replace(f".{name}.", "."), where, parameter.shape))
            start = where.stop
        self._installed: Tensor | None = None
        self._thread = ThreadState()
        self._fast_forward = (
            fast_forward if fast_forward is not None and AdaptedLayers.is_supported(fast_forward, self.slices) else None
        )
        self._experts = {
            f"{path}.lora_A.weight": getattr(module, "num_experts", 1) for path, module in adapted_modules(model, name)
        }
        self._base_norm = self._compute_base_norm()

    @property
    def cache_support(self) -> CacheSupport:
        """How the model caches."""
        return self._slots.cache_support

    @property
    def unused_rows(self) -> Tensor | None:
        """Vocabulary rows without a token; the same for all slots, whenever they were made."""
        return self._slots.unused_rows

    @property
    def adapted_layers(self) -> AdaptedLayers | None:
        """This thread's layers for the fast forward pass; None if the model or the adapter does not support it."""
        if self._thread.adapted_layers is None and self._fast_forward is not None:
            scale = self.settings.lora_alpha / self.settings.lora_rank
            self._thread.adapted_layers = AdaptedLayers(self._fast_forward, self.slices, scale)
        return self._thread.adapted_layers

    def unmerged_layers(self, fast_forward: FastForward) -> AdaptedLayers:
        """Return layers with the adapter unmerged, owned by the caller."""
        return AdaptedLayers(
            fast_forward, self.slices, self.settings.lora_alpha / self.settings.lora_rank, unmerged=True
        )

    @property
    def graphs(self) -> StepGraphs | None:
        """The captured steps over this thread's layers, on a GPU."""
        if self._thread.graphs is None and self.flat.is_cuda and self.adapted_layers is not None:
            self._thread.graphs = StepGraphs(self.adapted_layers.fast_forward, self.adapted_layers.layers)
        return self._thread.graphs

    def install(self, flat: Tensor) -> None:
        """Put values (P,) into the model. Cheap if they are there already."""
        if self.model.active_adapter != self.name:
            self.model.set_adapter(self.name)
        if self._installed is not flat:
            self.flat.copy_(flat)
            self._installed = flat

    @contextmanager
    def dropout(self, *seed: str | int) -> Iterator[None]:
        """Context in which LoRA dropout is active, if the settings have any, with random numbers from the seed."""
        if not self.settings.lora_dropout:
            yield
            return
        layers = [module for path, module in self.model.named_modules() if path.endswith(f"lora_dropout.{self.name}")]
        devices = [self.flat.device] if self.flat.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(derived_seed("dropout", *seed))
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()

    def gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient (P,) of a scalar loss by the installed values, as a new vector."""
        self.grad.zero_()
        loss.backward()
        return self.grad.clone()

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Context in which the adapter is off: the model is the base model."""
        return self.model.disable_adapter()

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return a flat vector as named tensors, with the names of PEFT's files."""
        return {name: flat[where].view(shape) for name, where, shape in self.slices}

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """Return named tensors as a flat vector. Raises KeyError or RuntimeError if they do not fit."""
        flat = torch.empty_like(self.flat)
        for name, where, shape in self.slices:
            if tensors[name].shape != shape:
                raise RuntimeError(f"“{name}” has the shape {tuple(tensors[name].shape)} and not {tuple(shape)}")
            flat[where] = tensors[name].to(flat.device, torch.float32).flatten()
        return flat

    def drift(self, flat: Tensor) -> float:
        """Return how far the weights moved: the Frobenius norm of all changes over that of the changed weights.

        ‖BA‖² is the sum over (BᵀB) ∘ (AAᵀ), two rank-by-rank matrices, so no full matrix is ever made.
        """
        named = self.split(flat)
        scale = self.settings.lora_alpha / self.settings.lora_rank
        total = 0.0
        for name, down in named.items():
            if "lora_A" in name:
                up = named[name.replace("lora_A", "lora_B")]
                total += float(_squared_norm(down, up, self._experts[name]))
        return scale * max(total, 0.0) ** 0.5 / self._base_norm

    def _compute_base_norm(self) -> float:
        squares = 0.0
        for _, module in adapted_modules(self.model, self.name):
            experts = isinstance(module, ParamWrapper)
            weight = module.get_param().detach() if experts else dequantized_weight(module.base_layer)
            squares += float(weight.float().square().sum())
        return max(squares**0.5, 1e-12)


def _squared_norm(down: Tensor, up: Tensor, experts: int) -> Tensor:
    """Return ‖BA‖² of A (r, in) and B (out, r); for stacked experts the sum over all, in PEFT's layout: A is (experts,
    r, in) and B (out, r, experts), each as a matrix."""
    a = down.view(experts, -1, down.shape[1])
    b = up.view(len(up), -1, experts).permute(2, 0, 1)
    return ((b.mT @ b) * (a @ a.mT)).sum()
