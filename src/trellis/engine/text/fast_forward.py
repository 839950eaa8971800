"""A fast forward pass for common decoder architectures: the same numbers as transformers to rounding, in fewer and
larger operations.

It knows the tensors of one loaded model and of its adapters; not prompts, sampling or learning. Supported are Llama
(arXiv 2302.13971), Mistral, Qwen 2 and 3, and Gemma; all other models use transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .fused_layers import FusedLayer, FusedLinear
from .packed_weights import MAX_PACKED_BYTES, has_memory_for_copy, pack_weight

SUPPORTED_FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
SUPPORTED_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
"""Rotary embeddings whose angles depend only on the position."""


MAX_MERGED_BYTES = 50_000_000
"""Adapters are merged into a copy of the layers up to this size: most of a small model's time is the overhead of its
operations."""


class FastForward:
    """A loaded model of a supported architecture. `layers` are without an adapter."""

    def __init__(self, model: Any) -> None:
        config = model.config
        inner = model.model
        attention = inner.layers[0].self_attn
        self.family: str = config.model_type
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.scale = float(attention.scaling)
        self.norm_eps = float(config.rms_norm_eps)
        self.window: int | None = getattr(config, "sliding_window", None)
        self.activation: Callable[[Tensor], Tensor] = inner.layers[0].mlp.act_fn
        self.embedding: Tensor = inner.embed_tokens.weight.data
        self.embedding_scale: Tensor | None = None
        if self.family == "gemma":  # in the embeddings' dtype and device, as transformers rounds it
            self.embedding_scale = torch.tensor(config.hidden_size**0.5).to(self.embedding)
        self.lm_head: Tensor = model.lm_head.weight.data
        self.norm = self._norm_weight(inner.norm)
        self.layers = [self._fuse_layer(layer) for layer in inner.layers]
        self._fused_lm_head = FusedLinear(self.lm_head, None, ())
        linears = [self._fused_lm_head, *(each for layer in self.layers for each in layer.linears())]
        size = sum(each.weight.nbytes for each in linears)
        if MAX_MERGED_BYTES < size <= MAX_PACKED_BYTES and has_memory_for_copy(size):
            for each in linears:
                each.packed = pack_weight(each.weight)
        self.unused_rows: Tensor | None = None
        """Vocabulary rows without a token."""
        self._rotary = inner.rotary_emb
        self._rotary_tables: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_model(cls, model: Any) -> FastForward | None:
        """Return the fast forward pass of a model; None if its architecture is not supported. Must come before anything
        else refers to the model's weights: they move."""
        config = model.config
        if config.model_type not in SUPPORTED_FAMILIES or config._attn_implementation == "eager":
            return None
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            return None
        if model.model.rotary_emb.rope_type not in SUPPORTED_ROPE_TYPES or model.lm_head.bias is not None:
            return None
        linears = [module for module in model.modules() if "Linear" in type(module).__name__]
        kinds = {(type(module), module.weight.dtype) for module in linears}
        if len(kinds) != 1 or kinds.pop() not in {(nn.Linear, torch.float32), (nn.Linear, torch.bfloat16)}:
            return None
        return cls(model)

    def _norm_weight(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.data
        return 1 + weight if self.family == "gemma" else weight

    def _fuse_layer(self, layer: Any) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if self.family == "qwen3":
            norms = [attention.q_norm.weight.data] * self.heads + [attention.k_norm.weight.data] * self.kv_heads
            qk_norm = torch.stack(norms)
        return FusedLayer(
            input_norm=self._norm_weight(layer.input_layernorm),
            qkv=FusedLinear.fuse({"q_proj": attention.q_proj, "k_proj": attention.k_proj, "v_proj": attention.v_proj}),
            qk_norm=qk_norm,
            attention_out=FusedLinear.fuse({"o_proj": attention.o_proj}),
            mlp_norm=self._norm_weight(layer.post_attention_layernorm),
            gate_up=FusedLinear.fuse({"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}),
            down=FusedLinear.fuse({"down_proj": mlp.down_proj}),
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (at least `length`, D) by position. The sines of the first half are negated, so that
        rotation is x cos + roll(x) sin."""
        tables = self._rotary_tables
        if tables is None or len(tables[0]) < length:
            size = max(256, 1 << (length - 1).bit_length())
            cos, sin = self._rotary(self.embedding[:1], torch.arange(size, device=self.device)[None])
            sign = torch.ones(self.head_dim, device=self.device, dtype=sin.dtype)
            sign[: self.head_dim // 2] = -1
            tables = cos[0], sin[0] * sign
            if (
                self._rotary_tables is None or len(self._rotary_tables[0]) < size
            ):  # another thread may have made a longer one
                self._rotary_tables = tables
        return tables

    def has_full_attention(self, length: int) -> bool:
        """Whether each of so many tokens attends to all before it."""
        return self.window is None or length <= self.window

    def forward(self, layers: Sequence[FusedLayer], ids: Tensor, cache: KVCache) -> Tensor:
        """Read tokens (R, T) after the cached ones, and cache them. Returns hidden states (R, T, H)."""
        rows, width = ids.shape
        start, end = cache.length, cache.length + width
        cos, sin = (table[start:end, None] for table in self.rotary_tables(end))
        mask = None
        if width > 1 and start:
            positions = torch.arange(end, device=ids.device)
            mask = positions[None, :] <= positions[start:, None]
        x = self.embed(ids.reshape(-1))
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            q, k, v = self.project_qkv(layer, x, rows, width, cos, sin)
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            attended = functional.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=mask, is_causal=width > 1 and not start,
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            x = self.finish_layer(layer, x, attended)
        cache.length = end
        return self.rms_norm(x, self.norm).view(rows, width, -1)

    def step(self, layers: Sequence[FusedLayer], ids: Tensor, cache: KVCache, lengths: Tensor, capacity: int) -> Tensor:
        """Read one token (R,) into rows of different lengths (R,), all below `capacity`. Returns hidden states (R, H).

        The caller keeps track of the lengths.
        """
        rows = torch.arange(len(ids), device=ids.device)
        cos, sin = (table[lengths][:, None, None] for table in self.rotary_tables(capacity))
        mask = (torch.arange(capacity, device=ids.device) <= lengths[:, None])[:, None, None]
        x = self.embed(ids)
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            q, k, v = self.project_qkv(layer, x, len(ids), 1, cos, sin)
            keys[rows, :, lengths] = k[:, :, 0]
            values[rows, :, lengths] = v[:, :, 0]
            attended = functional.scaled_dot_product_attention(
                q, keys[: len(ids), :, :capacity], values[: len(ids), :, :capacity], attn_mask=mask, scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            x = self.finish_layer(layer, x, attended)
        return self.rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to logits (..., V); vocabulary rows without a token get −inf."""
        logits = self._fused_lm_head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        return logits if self.unused_rows is None else logits.index_fill_(-1, self.unused_rows, float("-inf"))

    def embed(self, ids: Tensor) -> Tensor:
        """(N,) to (N, H)."""
        x = functional.embedding(ids, self.embedding)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def project_qkv(
        self, layer: FusedLayer, x: Tensor, rows: int, width: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (R, heads, T, D), the first two rotated."""
        heads, kv = self.heads, self.kv_heads
        projected = layer.qkv(self.rms_norm(x, layer.input_norm))
        projected = projected.view(rows, width, heads + 2 * kv, self.head_dim)
        queries_keys = projected[:, :, : heads + kv]
        queries_keys = self.apply_rotary(layer, queries_keys, cos, sin).transpose(1, 2)
        return queries_keys[:, :heads], queries_keys[:, heads:], projected[:, :, heads + kv :].transpose(1, 2)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, self.norm_eps)

    def apply_rotary(self, layer: FusedLayer, queries_keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalize queries and keys (..., heads + kv heads, D) if the model does, and rotate them by position."""
        if layer.qk_norm is not None:
            queries_keys = functional.rms_norm(queries_keys, (self.head_dim,), None, self.norm_eps) * layer.qk_norm
        return torch.addcmul(queries_keys * cos, queries_keys.roll(self.head_dim // 2, -1), sin)

    def finish_layer(self, layer: FusedLayer, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: x (N, H), and the attention output (R, heads, T, D)."""
        x = layer.attention_out.add_to(x, attended.transpose(1, 2).reshape(len(x), -1))
        gate, up = layer.gate_up(self.rms_norm(x, layer.mlp_norm)).chunk(2, -1)
        return layer.down.add_to(x, self.activation(gate) * up)


class KVCache:
    """Keys and values (R, kv heads, capacity, D) of each layer, and the number of positions filled."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int = 0) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def empty(cls, fast_forward: FastForward, rows: int, capacity: int) -> KVCache:
        shape = (rows, fast_forward.kv_heads, capacity, fast_forward.head_dim)
        like = fast_forward.embedding
        return cls(
            [like.new_empty(shape) for _ in fast_forward.layers], [like.new_empty(shape) for _ in fast_forward.layers]
        )

    def copy_prefix(self, other: KVCache, length: int) -> None:
        """Copy the first positions of another cache's first row into every row."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for here, there in zip(mine, theirs, strict=True):
                here[:, :, :length] = there[:1, :, :length]
        self.length = length


class AdaptedLayers:
    """The layers of a model with one slot's adapter; its values are replaced in place.

    A small model's layers are merged with the adapter, W + s B A. A large model keeps both separate, as does
    `unmerged`.
    """

    def __init__(
        self,
        fast_forward: FastForward,
        slices: Sequence[tuple[str, slice, torch.Size]],
        scale: float,
        unmerged: bool = False,
    ) -> None:
        self.fast_forward = fast_forward
        self._scale = scale
        self._slices = [(where, shape) for _, where, shape in slices]
        self._installed: Tensor | None = None
        order = {name[name.index(".layers.") :]: number for number, (name, _, _) in enumerate(slices)}
        self.lora_pairs = {
            (number, place): [self._pair_numbers(order, number, name) for name, _ in each.parts]
            for number, layer in enumerate(fast_forward.layers)
            for place, each in enumerate(layer.linears())
        }
        """By layer number and position of the linear layer in it: the indices of A and B of its parts among the slices;
        None for a part without an adapter."""
        self.layers: list[FusedLayer] = []
        size = sum(each.weight.nbytes for layer in fast_forward.layers for each in layer.linears())
        # In a lower precision, merging would round small changes away.
        self._is_merged = not unmerged and size <= MAX_MERGED_BYTES and fast_forward.embedding.dtype == torch.float32
        self._writers: list[Callable[[Tensor], None]] = []
        for number, layer in enumerate(fast_forward.layers):
            qkv, out, gate_up, down = (
                self._adapt(each, self.lora_pairs[number, place]) for place, each in enumerate(layer.linears())
            )
            self.layers.append(FusedLayer(layer.input_norm, qkv, layer.qk_norm, out, layer.mlp_norm, gate_up, down))

    @staticmethod
    def is_supported(fast_forward: FastForward, slices: Sequence[tuple[str, slice, torch.Size]]) -> bool:
        """Whether every layer that an adapter changes is known here."""
        known = {name for layer in fast_forward.layers for each in layer.linears() for name, _ in each.parts}
        return all(".layers." in name and name.split(".")[-3] in known for name, _, _ in slices)

    def install(self, flat: Tensor) -> None:
        """Put an adapter's values (P,) into the layers. Cheap if they are there already."""
        if self._installed is not flat:
            for put in self._writers:
                put(flat)
            self._installed = flat

    def _pair_numbers(self, order: dict[str, int], number: int, name: str) -> tuple[int, int] | None:
        """Return the indices of A and B of a linear layer among the slices; None if it has no adapter."""
        for block in ("self_attn", "mlp"):
            end = f".layers.{number}.{block}.{name}"
            if f"{end}.lora_A.weight" in order:
                return order[f"{end}.lora_A.weight"], order[f"{end}.lora_B.weight"]
        return None

    def _adapt(self, base: FusedLinear, pairs_of: list[tuple[int, int] | None]) -> FusedLinear:
        found = {
            name: [self._slices[at] for at in pair] if pair else None
            for (name, _), pair in zip(base.parts, pairs_of, strict=True)
        }
        ranks = sum(pair[0][1][0] for pair in found.values() if pair)
        if not ranks:
            return base
        if self._is_merged:
            merged = FusedLinear(base.weight.clone(), base.bias, base.parts)
            pairs = [(rows, pair) for name, rows in base.parts if (pair := found[name])]
            self._writers.append(self._merged_writer(base, merged, pairs))
            return merged
        like = base.weight
        lora_a, lora_b = like.new_zeros(ranks, like.shape[1]), like.new_zeros(ranks, like.shape[0])
        start = 0
        for name, rows in base.parts:
            if pair := found[name]:
                rank = pair[0][1][0]
                self._writers.append(
                    self._unmerged_writer(lora_a[start : start + rank], lora_b[start : start + rank, rows], pair)
                )
                start += rank
        return FusedLinear(base.weight, base.bias, base.parts, lora_a, lora_b, base.packed)

    def _merged_writer(
        self, base: FusedLinear, merged: FusedLinear, pairs: list[tuple[slice, list[tuple[slice, torch.Size]]]]
    ) -> Callable[[Tensor], None]:
        def write(flat: Tensor) -> None:
            for rows, ((a, a_shape), (b, b_shape)) in pairs:
                up, down = flat[b].view(b_shape), flat[a].view(a_shape)
                torch.addmm(base.weight[rows], up, down, alpha=self._scale, out=merged.weight[rows])

        return write

    def _unmerged_writer(
        self, lora_a: Tensor, lora_b: Tensor, pair: list[tuple[slice, torch.Size]]
    ) -> Callable[[Tensor], None]:
        (a, a_shape), (b, b_shape) = pair

        def write(flat: Tensor) -> None:
            lora_a.copy_(flat[a].view(a_shape))
            lora_b.copy_(flat[b].view(b_shape).T * self._scale)

        return write
