"""Estimate how much memory a model needs before it is loaded: from tensor shapes and session options.

Pure arithmetic; it does not know files, engines or devices. The form, the check before a load and the engine's check
after a download share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .options import OPENING_TOKEN_BUDGET, Precision, SessionConfig

LIBRARY_BYTES = 510_000_000
"""Memory of an engine's libraries before any model is loaded (measured, docs/log.md)."""

BYTES_PER_WEIGHT: Mapping[Precision, float] = {"32-bit": 4.0, "16-bit": 2.0, "8-bit": 1.03, "4-bit": 0.57}
"""Bytes per weight of a linear layer, scales included; embeddings stay in 16 or 32 bits."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine a model's memory. `linear` counts the weights of linear layers; `linear_features` sums
    their inputs and outputs, from which an adapter's size follows; `expert_features` is the same for expert layers,
    which are stacked in one tensor and not quantized."""

    parameters: int = 0
    linear: int = 0
    linear_features: int = 0
    expert_features: int = 0
    layers: int = 0
    hidden: int = 0
    key_value_size: int = 0
    vocabulary: int = 0
    positions: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Bytes. `loading` must be free to load at all; the rest is needed for the longest prompt and answers."""

    weights: int
    adapter: int
    answers: int
    learning: int
    libraries: int = LIBRARY_BYTES

    @property
    def loading(self) -> int:
        return self.weights + self.libraries

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.answers + self.learning + self.libraries

    def as_json(self) -> dict[str, int]:
        return {
            "weights": self.weights, "adapter": self.adapter, "answers": self.answers, "learning": self.learning,
            "libraries": self.libraries, "loading": self.loading, "total": self.total,
        }  # fmt: skip


def model_shape(config: Mapping[str, Any], tensors: Mapping[str, list[int]]) -> ModelShape:
    """Return a model's shape from its config.json and the shapes of its tensors by name.

    Quantized weights are counted as the numbers they stand for, since they are dequantized on reading.
    """

    def number(*names: str) -> int:
        inner = config.get("text_config")
        places = [config, inner if isinstance(inner, Mapping) else {}]
        found = [place[name] for place in places for name in names if isinstance(place.get(name), int)]
        return max(0, found[0]) if found else 0

    tensors = _unpacked_shapes(tensors, number("hidden_size") or 1)
    sizes = {name: _product(shape) for name, shape in tensors.items()}
    experts = {name: shape for name, shape in tensors.items() if _is_expert_layer(name, shape)}
    linear = {
        name: shape
        for name, shape in tensors.items()
        if len(shape) == 2 and not _is_embedding(name) and name not in experts
    }
    hidden, heads = number("hidden_size", "n_embd", "d_model"), number("num_attention_heads", "n_head") or 1
    key_heads = number("num_key_value_heads") or heads
    return ModelShape(
        parameters=sum(sizes.values()),
        linear=sum(sizes[name] for name in linear),
        linear_features=sum(shape[0] + shape[1] for shape in linear.values()),
        expert_features=sum(_product(shape[:-2]) * (shape[-2] + shape[-1]) for shape in experts.values()),
        layers=number("num_hidden_layers", "n_layer"),
        hidden=hidden,
        key_value_size=2 * key_heads * (number("head_dim") or hidden // heads),
        vocabulary=number("vocab_size"),
        positions=number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length") or None,
    )


def estimate_memory(shape: ModelShape, config: SessionConfig, precision: Precision) -> Estimate:
    """Estimate the bytes an engine needs for a session with these options; `precision` must not be “auto”."""
    unquantized_bytes = 4 if precision == "32-bit" else 2
    per_weight = BYTES_PER_WEIGHT[precision]
    weights = shape.linear * per_weight + (shape.parameters - shape.linear) * unquantized_bytes
    adapter = 4 * config.lora_rank * (shape.linear_features + (shape.expert_features if adapts_experts(config) else 0))
    tokens = config.group_size * min(config.context_length, shape.positions or config.context_length)
    # Answers: keys and values per token, and one row of logits per option; per opening while openings are generated.
    openings = config.group_size * config.openings
    cached_tokens = max(tokens, min(tokens * config.openings, OPENING_TOKEN_BUDGET))
    answers = cached_tokens * shape.layers * shape.key_value_size * unquantized_bytes + openings * shape.vocabulary * 4
    # Learning: activations kept for the backward pass (about 17 hidden-size vectors per token and layer, after
    # Korthikanti et al., arXiv 2205.05198, without attention scores) and three copies of the answers' logits.
    logits = 3 * 4 * config.group_size * config.max_new_tokens * shape.vocabulary
    learning = 17 * unquantized_bytes * tokens * shape.hidden * shape.layers + logits
    return Estimate(int(weights), 8 * adapter, answers, learning)


def changes_that_fit(
    shape: ModelShape, config: SessionConfig, precision: Precision, available: int
) -> Iterator[tuple[dict[str, Any], Estimate]]:
    """Yield changes of options with which a session would fit, the mildest first, each with its estimate."""
    ladder: list[Precision] = ["32-bit", "16-bit", "8-bit", "4-bit"]
    changes: list[dict[str, Any]] = []
    shorter = max(64, config.context_length // 2)
    if config.max_new_tokens < shorter < config.context_length:
        changes.append({"context_length": shorter})
    if config.group_size > 2:
        changes.append({"group_size": 2})
    smaller: list[dict[str, Any]] = [{"precision": step} for step in ladder[ladder.index(precision) + 1 :]]
    changes += smaller
    if changes and smaller:
        changes.append(changes[0] | smaller[-1] | ({"group_size": 2} if config.group_size > 2 else {}))
    for change in changes:
        changed = config.model_copy(update=change)
        found = estimate_memory(shape, changed, change.get("precision", precision))
        if found.total <= available:
            yield change, found


def _unpacked_shapes(tensors: Mapping[str, list[int]], hidden: int) -> dict[str, list[int]]:
    """Return shapes without scales and quantization states; 4-bit bitsandbytes stores two weights in a byte."""
    four_bit = {name.rsplit(".quant_state.", 1)[0] for name in tensors if ".quant_state." in name}
    shapes: dict[str, list[int]] = {}
    for name, shape in tensors.items():
        if name in four_bit:
            count = 2 * _product(shape)
            shapes[name] = [count // hidden, hidden]
        elif not name.endswith(("_scale_inv", ".SCB", ".weight_format")) and name.rpartition(".weight.")[0] == "":
            shapes[name] = shape
    return shapes


def adapts_experts(config: SessionConfig) -> bool:
    """Whether the session's options give the experts of a model an adapter."""
    named = config.target_modules.split(", ")
    return not config.lora_dropout and ("all-linear" in named or "experts" in named)


def _is_expert_layer(name: str, shape: list[int]) -> bool:
    """Whether a tensor is an expert layer: one of many, or all of them stacked (experts, ., .)."""
    if len(shape) == 2:
        return ".experts." in name
    return len(shape) == 3 and min(shape) > 1 and "conv" not in name


def _is_embedding(name: str) -> bool:
    """Whether a tensor is an embedding or the output layer, which get no adapter and are not quantized."""
    return any(part in name for part in ("embed", "wte", "wpe", "lm_head"))


def _product(shape: list[int]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
