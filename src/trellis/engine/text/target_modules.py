"""Which layers of a base model an adapter can change, by the model's own names, and which it cannot, and why.

It knows modules and PEFT's abilities; not adapters' values, prompts or learning.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers, get_model_conversion_mapping
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EXPERTS_TARGET = "experts"
"""The target name for all stacked expert weights of a model. Adapters in one model must agree on the parameters they
change (PEFT nests its wrappers), so it is all of them or none."""

BYPASSED_REASON = "the model reads its weight directly, past any adapter"

PROBE_TOKENS = 8


@dataclass(frozen=True)
class AdaptableLayers:
    """The layers of a model that an adapter can change.

    `linear` names its linear layers and `experts` its stacked expert weights, both in the model's order; `head` is the
    output layer. `unsupported` maps short names of linear layers that PEFT cannot adapt to the reason.
    """

    linear: tuple[str, ...]
    experts: tuple[str, ...]
    head: str | None
    unsupported: dict[str, str] = field(default_factory=dict)
    module_counts: Counter[str] = field(default_factory=Counter)
    """How many modules of any kind have each short name."""

    def shorten_names(self, names: list[str]) -> list[str]:
        """Return the usual short names of some linear layers (q_proj), which other programs know, if no other module
        has them; else the names unchanged."""
        short_names = Counter(map(short_name, names))
        return (
            sorted(short_names)
            if all(self.module_counts[each] == count for each, count in short_names.items())
            else names
        )

    @property
    def target_names(self) -> list[str]:
        """The names that may be targets: the short name of each layer, and “experts” if there are any."""
        return sorted({short_name(name) for name in self.linear} | ({EXPERTS_TARGET} if self.experts else set()))


def short_name(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def find_adaptable_layers(model: Any, probe: bool = True) -> AdaptableLayers:
    """Find the layers of a model without adapters that can get one.

    With `probe`, run a few tokens through the model to see which layers return what a linear layer should.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    stacked = dict(_stacked_experts(model))
    expert_modules = {name.rpartition(".")[0] for name in stacked}
    watched_modules = linear | {name: model.get_submodule(name) for name in expert_modules}
    broken, idle = _probe_modules(model, watched_modules) if probe else ({}, set())
    unsupported_by_peft = _unsupported_by_peft(model, linear)
    used_names = {short_name(name) for name in linear if name not in idle}
    reasons = {
        name: broken.get(name)
        or unsupported_by_peft.get(short_name(name))
        or (None if short_name(name) in used_names else BYPASSED_REASON)
        for name in linear
    }
    supported = tuple(name for name, reason in reasons.items() if reason is None)
    unsupported = {short_name(name): reason for name, reason in reasons.items() if reason is not None}
    for name in {short_name(each) for each in supported}:
        unsupported.pop(name, None)
    experts = tuple(stacked)
    if not expert_modules.isdisjoint(idle):
        experts, unsupported[EXPERTS_TARGET] = (), BYPASSED_REASON
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = next((name for name, module in linear.items() if module is head), None)
    modules = Counter(short_name(name) for name, _ in model.named_modules())
    return AdaptableLayers(supported, experts, head_name, unsupported, modules)


def _stacked_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield parameters (experts, ., .) that stack a layer's expert weights, with their names."""
    for name, module in model.named_modules():
        if "expert" not in f"{name}.{type(module).__name__}".lower() or is_linear(module):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1 and parameter.is_floating_point():
                yield f"{name}.{own}", parameter


def _unsupported_by_peft(model: Any, linear: dict[str, nn.Module]) -> dict[str, str]:
    """Return the short names that PEFT does not treat as linear layers of this model, with reasons."""
    reasons: dict[str, str] = {}
    conversions = get_model_conversion_mapping(model) if hasattr(model, "config") else []
    for name in sorted({short_name(each) for each in linear}):
        config = LoraConfig(target_modules=[name], task_type="CAUSAL_LM")
        try:
            _check_lora_target_modules_mamba(config, model, name)
        except ValueError:
            reasons[name] = "PEFT does not adapt it in models with Mamba layers"
            continue
        try:
            convert_peft_config_for_transformers(config, model, conversions)
        except ValueError:  # it would require neighbouring layers as well
            config.target_modules = set()
        if name not in (config.target_modules or ()):
            reasons[name] = "PEFT takes this name for the experts of an older file format"
    return reasons


def _probe_modules(model: Any, watched: dict[str, nn.Module]) -> tuple[dict[str, str], set[str]]:
    """Run a few tokens through the model and watch some modules.

    Returns the linear layers that do not return one tensor (..., out), with reasons, and the modules that did not run
    although their parent did: an adapter around these would never be called.
    """
    outcomes: dict[nn.Module, str | None] = {}

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        outcomes[module] = None
        if is_linear(module) and inputs and isinstance(inputs[0], Tensor):
            features = module.weight.shape[1] if isinstance(module, Conv1D) else module.out_features
            if not isinstance(output, Tensor) or output.shape != (*inputs[0].shape[:-1], features):
                outcomes[module] = "it returns something else than a linear layer does"

    parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in watched}
    hooks = [module.register_forward_hook(watch) for module in {*watched.values(), *parents.values()}]
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            model(input_ids=probe_ids(model, PROBE_TOKENS).to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    broken = {name: reason for name, module in watched.items() if (reason := outcomes.get(module)) is not None}
    idle = {name for name, module in watched.items() if module not in outcomes and parents[name] in outcomes}
    return broken, idle


def probe_ids(model: Any, length: int) -> Tensor:
    """Return distinct tokens (1, T) from the first half of the vocabulary, away from special ones."""
    size = model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else 64
    return (torch.arange(length)[None] * 37 + 11) % max(1, size // 2)


@contextmanager
def restored_on_error(root: nn.Module) -> Iterator[None]:
    """If the block raises, restore all modules: children, parameters, hooks and attributes.

    Nothing that stays is missing at any moment, since other threads use the model; and containers are restored in
    place, since modules may share them, as PEFT's share their settings.
    """
    saved_attributes = [(vars(module), dict(vars(module))) for module in root.modules()]
    containers = {
        id(value): value for _, attributes in saved_attributes for value in attributes.values() if _is_container(value)
    }
    contents = [(value, copy.copy(value)) for value in containers.values()]
    gradients = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    try:
        yield
    except BaseException:
        for now, before in [*saved_attributes, *contents]:
            _restore(now, before)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        raise


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set))


def _restore(current: Any, saved: Any) -> None:
    """Restore the contents of a container in place, in their order."""
    if isinstance(current, list):
        current[:] = saved
    elif isinstance(current, set):
        current &= saved
        current |= saved
    elif list(current) != list(saved) or any(current[key] is not value for key, value in saved.items()):
        current.update(saved)
        for key in [key for key in current if key not in saved]:
            del current[key]
        if list(current) != list(saved):  # the order of modules is that of their layers
            current.clear()
            current.update(saved)


def adapted_modules(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield the modules that hold an adapter's matrices, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter in getattr(module, "lora_A", ()):
            yield name, module
