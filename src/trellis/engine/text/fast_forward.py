"""A lean forward pass for the common decoder layouts: the same numbers as transformers' own to rounding, in fewer and
larger operations.

It knows the tensors of one loaded model and of the adapters in it; not prompts, sampling or learning. The layouts are
those of Llama (arXiv 2302.13971), Mistral, Qwen 2 and 3, and Gemma. Whatever differs from them has no lean pass, and
transformers' own is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packed_weights import PACKED_BYTES, ROWS, pack, packed_linear, room_for

FAMILIES = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
ROPES = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary embedding whose angles depend on the position alone."""


MERGED_BYTES = 50_000_000
"""An adapter is merged into a copy of the layers where that copy is no larger: most of a small model's time goes into
the number of its operations."""


class Mix:
    """Which rows of a batch have which of some adapters. Rows of one adapter are multiplied by it together."""

    def __init__(self, adapters: Sequence[int | None], count: int, device: torch.device) -> None:
        """The number of each row's adapter, of so many; None for a row that has none."""
        members: list[list[int]] = [[] for _ in range(count)]
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                members[adapter].append(row)
        self._count, self._width = count, max(map(len, members))
        rows = [row for each in members for row in each]
        slots = [number * self._width + place for number, each in enumerate(members) for place in range(len(each))]
        self._rows = torch.tensor(rows, device=device, dtype=torch.long)
        self._slots = torch.tensor(slots, device=device, dtype=torch.long)

    def onto(self, found: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """found (N, out) and what each row's adapter, of down (K, in, r) and up (K, r, out), makes of x (N, in)."""
        grouped = x.new_zeros(self._count * self._width, x.shape[1])
        grouped[self._slots] = x[self._rows]
        seen = torch.bmm(torch.bmm(grouped.view(self._count, self._width, -1), down), up)
        return found.index_add(0, self._rows, seen.view(len(grouped), -1)[self._slots])


@dataclass
class Linear:
    """Linear layers that read the same input, as one: x Wᵀ + b, and x Aᵀ Bᵀ where an adapter is in it."""

    weight: Tensor
    bias: Tensor | None
    parts: tuple[tuple[str, slice], ...]
    """Which output rows belong to which layer, by the end of its name."""
    down: Tensor | None = None
    up: Tensor | None = None
    packed: Tensor | None = None
    mix: Mix | None = None
    """Which row has which of several adapters; `down` is then (K, in, r) and `up` (K, r, out)."""

    @classmethod
    def over(cls, layers: dict[str, nn.Linear]) -> Linear:
        """Layers as one; their own weights become views into it, so that nothing is held twice."""
        parts, start = [], 0
        for name, layer in layers.items():
            parts.append((name, slice(start, start + layer.out_features)))
            start += layer.out_features
        if len(layers) == 1:
            (layer,) = layers.values()
            return cls(layer.weight.data, layer.bias, tuple(parts))
        weight = torch.cat([layer.weight.data for layer in layers.values()])
        for (_, where), layer in zip(parts, layers.values(), strict=True):
            layer.weight.data = weight[where]
        biases = [
            torch.zeros(layer.out_features).to(weight) if layer.bias is None else layer.bias.data
            for layer in layers.values()
        ]
        some = any(layer.bias is not None for layer in layers.values())
        return cls(weight, torch.cat(biases) if some else None, tuple(parts))

    def __call__(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        if self.packed is not None and len(x) <= ROWS:
            found = packed_linear(x, self.packed, self.bias)
        else:
            found = functional.linear(x, self.weight, self.bias)
        if self.down is None or self.up is None:
            return found
        if self.mix is not None:
            return self.mix.onto(found, x, self.down, self.up)
        return found.addmm_(functional.linear(x, self.down), self.up)

    def onto(self, x: Tensor, seen: Tensor) -> Tensor:
        """x (N, out) and what this makes of `seen` (N, in)."""
        if self.packed is None and self.bias is None and self.down is None:
            return torch.addmm(x, seen, self.weight.T)
        return x + self(seen)


@dataclass
class Layer:
    before_attention: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    out: Linear
    before_mlp: Tensor
    gate_up: Linear
    down: Linear

    def linears(self) -> tuple[Linear, ...]:
        return self.qkv, self.out, self.gate_up, self.down


class Lean:
    """A loaded model of a known layout. `layers` are those of the model without an adapter."""

    def __init__(self, model: Any) -> None:
        config = model.config
        inner = model.model
        attention = inner.layers[0].self_attn
        self.family: str = config.model_type
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = attention.head_dim
        self.scale = float(attention.scaling)
        self.eps = float(config.rms_norm_eps)
        self.window: int | None = getattr(config, "sliding_window", None)
        self.activation: Callable[[Tensor], Tensor] = inner.layers[0].mlp.act_fn
        self.embedding: Tensor = inner.embed_tokens.weight.data
        self.embedding_scale: Tensor | None = None
        if self.family == "gemma":  # rounded as the embeddings are, and on their device
            self.embedding_scale = torch.tensor(config.hidden_size**0.5).to(self.embedding)
        self.head: Tensor = model.lm_head.weight.data
        self.norm = self._norm(inner.norm)
        self.layers = [self._layer(layer) for layer in inner.layers]
        self._head = Linear(self.head, None, ())
        linears = [self._head, *(each for layer in self.layers for each in layer.linears())]
        size = sum(each.weight.nbytes for each in linears)
        if MERGED_BYTES < size <= PACKED_BYTES and room_for(size):
            for each in linears:
                each.packed = pack(each.weight)
        self.missing: Tensor | None = None
        """Rows of the vocabulary that no token belongs to."""
        self._rotary = inner.rotary_emb
        self._angles: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, model: Any) -> Lean | None:
        """The lean pass of a model; None where its layout is another one. Made before anything else is made of the
        model: its weights move."""
        config = model.config
        if config.model_type not in FAMILIES or config._attn_implementation == "eager":
            return None
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            return None
        if model.model.rotary_emb.rope_type not in ROPES or model.lm_head.bias is not None:
            return None
        linears = [module for module in model.modules() if "Linear" in type(module).__name__]
        kinds = {(type(module), module.weight.dtype) for module in linears}
        if len(kinds) != 1 or kinds.pop() not in {(nn.Linear, torch.float32), (nn.Linear, torch.bfloat16)}:
            return None
        return cls(model)

    def _norm(self, module: Any) -> Tensor:
        weight: Tensor = module.weight.data
        return 1 + weight if self.family == "gemma" else weight

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        qk_norm = None
        if self.family == "qwen3":
            norms = [attention.q_norm.weight.data] * self.heads + [attention.k_norm.weight.data] * self.kv_heads
            qk_norm = torch.stack(norms)
        return Layer(
            before_attention=self._norm(layer.input_layernorm),
            qkv=Linear.over({"q_proj": attention.q_proj, "k_proj": attention.k_proj, "v_proj": attention.v_proj}),
            qk_norm=qk_norm,
            out=Linear.over({"o_proj": attention.o_proj}),
            before_mlp=self._norm(layer.post_attention_layernorm),
            gate_up=Linear.over({"gate_proj": mlp.gate_proj, "up_proj": mlp.up_proj}),
            down=Linear.over({"down_proj": mlp.down_proj}),
        )

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (at least `length`, D) by position; the sines of the first half are negative, so that
        rotating is x cos + roll(x) sin."""
        known = self._angles
        if known is None or len(known[0]) < length:
            size = max(256, 1 << (length - 1).bit_length())
            cos, sin = self._rotary(self.embedding[:1], torch.arange(size, device=self.device)[None])
            sign = torch.ones(self.head_dim, device=self.device, dtype=sin.dtype)
            sign[: self.head_dim // 2] = -1
            known = cos[0], sin[0] * sign
            if self._angles is None or len(self._angles[0]) < size:  # another thread may want a longer one
                self._angles = known
        return known

    def reaches(self, length: int) -> bool:
        """Whether every token of so many sees all before it."""
        return self.window is None or length <= self.window

    def forward(self, layers: Sequence[Layer], ids: Tensor, cache: Cache) -> Tensor:
        """Read tokens (R, T) after what is in the cache, and put them there. Returns hidden states (R, T, H)."""
        rows, width = ids.shape
        start, end = cache.length, cache.length + width
        cos, sin = (table[start:end, None] for table in self.angles(end))
        mask = None
        if width > 1 and start:
            places = torch.arange(end, device=ids.device)
            mask = places[None, :] <= places[start:, None]
        x = self.embed(ids.reshape(-1))
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            q, k, v = self.heads_of(layer, x, rows, width, cos, sin)
            keys[:, :, start:end] = k
            values[:, :, start:end] = v
            seen = functional.scaled_dot_product_attention(
                q, keys[:, :, :end], values[:, :, :end], attn_mask=mask, is_causal=width > 1 and not start,
                scale=self.scale, enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            x = self.after_attention(layer, x, seen)
        cache.length = end
        return self.normed(x, self.norm).view(rows, width, -1)

    def step(self, layers: Sequence[Layer], ids: Tensor, cache: Cache, lengths: Tensor, room: int) -> Tensor:
        """Read one token (R,) each into rows of different lengths (R,), all below `room`. Returns hidden states (R, H).

        The lengths are the caller's to keep.
        """
        rows = torch.arange(len(ids), device=ids.device)
        cos, sin = (table[lengths][:, None, None] for table in self.angles(room))
        mask = (torch.arange(room, device=ids.device) <= lengths[:, None])[:, None, None]
        x = self.embed(ids)
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            q, k, v = self.heads_of(layer, x, len(ids), 1, cos, sin)
            keys[rows, :, lengths] = k[:, :, 0]
            values[rows, :, lengths] = v[:, :, 0]
            seen = functional.scaled_dot_product_attention(
                q, keys[: len(ids), :, :room], values[: len(ids), :, :room], attn_mask=mask, scale=self.scale,
                enable_gqa=self.heads != self.kv_heads,
            )  # fmt: skip
            x = self.after_attention(layer, x, seen)
        return self.normed(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., H) to logits (..., V) to draw from: rows that no token belongs to are impossible."""
        found = self._head(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)
        return found if self.missing is None else found.index_fill_(-1, self.missing, float("-inf"))

    def embed(self, ids: Tensor) -> Tensor:
        """(N,) to (N, H)."""
        x = functional.embedding(ids, self.embedding)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def heads_of(
        self, layer: Layer, x: Tensor, rows: int, width: int, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (R, heads, T, D), the first two turned by their positions."""
        heads, kv = self.heads, self.kv_heads
        made = layer.qkv(self.normed(x, layer.before_attention))
        made = made.view(rows, width, heads + 2 * kv, self.head_dim)
        both = made[:, :, : heads + kv]
        both = self.turned(layer, both, cos, sin).transpose(1, 2)
        return both[:, :heads], both[:, heads:], made[:, :, heads + kv :].transpose(1, 2)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, self.eps)

    def turned(self, layer: Layer, both: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys (..., heads + kv heads, D) after their norm, where there is one, turned by positions."""
        if layer.qk_norm is not None:
            both = functional.rms_norm(both, (self.head_dim,), None, self.eps) * layer.qk_norm
        return torch.addcmul(both * cos, both.roll(self.head_dim // 2, -1), sin)

    def after_attention(self, layer: Layer, x: Tensor, seen: Tensor) -> Tensor:
        """The rest of a layer: x (N, H), and what its heads saw (R, heads, T, D)."""
        x = layer.out.onto(x, seen.transpose(1, 2).reshape(len(x), -1))
        gate, up = layer.gate_up(self.normed(x, layer.before_mlp)).chunk(2, -1)
        return layer.down.onto(x, self.activation(gate) * up)


class Cache:
    """Keys and values (R, kv heads, room, D) of each layer, and how many positions of them are filled."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: int = 0) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def empty(cls, lean: Lean, rows: int, room: int) -> Cache:
        shape = (rows, lean.kv_heads, room, lean.head_dim)
        like = lean.embedding
        return cls([like.new_empty(shape) for _ in lean.layers], [like.new_empty(shape) for _ in lean.layers])

    def begin_with(self, other: Cache, length: int) -> None:
        """Take over the first positions of the first row of another cache, into every row."""
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for here, there in zip(mine, theirs, strict=True):
                here[:, :, :length] = there[:1, :, :length]
        self.length = length


class Adapted:
    """The layers of a lean model with one slot's adapter in them. Other values are put in place.

    A small model's layers are merged with the adapter, W + s B A; a large one keeps both apart, as does who wants them
    `apart`.
    """

    def __init__(
        self, lean: Lean, slices: Sequence[tuple[str, slice, torch.Size]], scale: float, apart: bool = False
    ) -> None:
        self.lean = lean
        self._scale = scale
        self._slices = [(where, shape) for _, where, shape in slices]
        self._installed: Tensor | None = None
        order = {name[name.index(".layers.") :]: number for number, (name, _, _) in enumerate(slices)}
        self.pairs = {
            (number, place): [self._numbers(order, number, name) for name, _ in each.parts]
            for number, layer in enumerate(lean.layers)
            for place, each in enumerate(layer.linears())
        }
        """Of each linear layer, by the layer's number and its place there: where A and B of its parts stand among the
        slices; None for a part without."""
        self.layers: list[Layer] = []
        size = sum(each.weight.nbytes for layer in lean.layers for each in layer.linears())
        # Merged with fewer digits, small changes would be rounded away.
        self._merges = not apart and size <= MERGED_BYTES and lean.embedding.dtype == torch.float32
        self._puts: list[Callable[[Tensor], None]] = []
        for number, layer in enumerate(lean.layers):
            qkv, out, gate_up, down = (
                self._adapted(each, self.pairs[number, place]) for place, each in enumerate(layer.linears())
            )
            self.layers.append(Layer(layer.before_attention, qkv, layer.qk_norm, out, layer.before_mlp, gate_up, down))

    @staticmethod
    def fits(lean: Lean, slices: Sequence[tuple[str, slice, torch.Size]]) -> bool:
        """Whether the lean pass knows every layer that an adapter changes."""
        known = {name for layer in lean.layers for each in layer.linears() for name, _ in each.parts}
        return all(".layers." in name and name.split(".")[-3] in known for name, _, _ in slices)

    def install(self, flat: Tensor) -> None:
        """Put an adapter's values (P,) into the layers. Cheap when they are there already."""
        if self._installed is not flat:
            for put in self._puts:
                put(flat)
            self._installed = flat

    def _numbers(self, order: dict[str, int], number: int, name: str) -> tuple[int, int] | None:
        """The numbers of A and B of a layer among the slices, where it has an adapter."""
        for block in ("self_attn", "mlp"):
            end = f".layers.{number}.{block}.{name}"
            if f"{end}.lora_A.weight" in order:
                return order[f"{end}.lora_A.weight"], order[f"{end}.lora_B.weight"]
        return None

    def _adapted(self, base: Linear, pairs_of: list[tuple[int, int] | None]) -> Linear:
        found = {
            name: [self._slices[at] for at in pair] if pair else None
            for (name, _), pair in zip(base.parts, pairs_of, strict=True)
        }
        ranks = sum(pair[0][1][0] for pair in found.values() if pair)
        if not ranks:
            return base
        if self._merges:
            made = Linear(base.weight.clone(), base.bias, base.parts)
            pairs = [(rows, pair) for name, rows in base.parts if (pair := found[name])]
            self._puts.append(self._merging(base, made, pairs))
            return made
        like = base.weight
        down, up = like.new_zeros(ranks, like.shape[1]), like.new_zeros(ranks, like.shape[0])
        start = 0
        for name, rows in base.parts:
            if pair := found[name]:
                rank = pair[0][1][0]
                self._puts.append(self._placing(down[start : start + rank], up[start : start + rank, rows], pair))
                start += rank
        return Linear(base.weight, base.bias, base.parts, down, up, base.packed)

    def _merging(
        self, base: Linear, made: Linear, pairs: list[tuple[slice, list[tuple[slice, torch.Size]]]]
    ) -> Callable[[Tensor], None]:
        def put(flat: Tensor) -> None:
            for rows, ((a, a_shape), (b, b_shape)) in pairs:
                up, down = flat[b].view(b_shape), flat[a].view(a_shape)
                torch.addmm(base.weight[rows], up, down, alpha=self._scale, out=made.weight[rows])

        return put

    def _placing(self, down: Tensor, up: Tensor, pair: list[tuple[slice, torch.Size]]) -> Callable[[Tensor], None]:
        (a, a_shape), (b, b_shape) = pair

        def put(flat: Tensor) -> None:
            down.copy_(flat[a].view(a_shape))
            up.copy_(flat[b].view(b_shape).T * self._scale)

        return put
