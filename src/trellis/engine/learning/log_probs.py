"""Log-probabilities of answers, with gradients: through transformers, or through the fast forward pass, which reads the
prompt of a group once.

It knows prompts and answers as tokens, and the adapter's values; not losses, choices or optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ...messages import Choice
from ..parallel import SMALL_MODEL_PARAMETERS
from ..text.adapters import AdapterSlot
from ..text.cache_support import has_logits_to_keep, last_logits
from ..text.fast_forward import FastForward
from ..text.fused_layers import FusedLinear


@dataclass(frozen=True)
class Group:
    """A lesson as tokens: one prompt, its answers (each with its end token if it is complete), the choice.

    A written answer comes last.
    """

    prompt: list[int]
    answers: list[list[int]]
    choice: Choice
    temperature: float

    def mask(self, device: torch.device) -> Tensor:
        """Return a mask (G, T), true where an answer has a token: from lengths, never from token ids."""
        lengths = torch.tensor([len(answer) for answer in self.answers], device=device)
        return torch.arange(int(lengths.max()), device=device)[None, :] < lengths[:, None]


def answer_logprobs(model: Any, group: Group) -> Tensor:
    """Return log-probabilities (G, T) of each answer's tokens given the prompt: fp32, zero at padding."""
    return batch_answer_logprobs(model, [group])[0]


PADDING_WORTH_A_PASS = 120
"""Padding, in tokens, that is worth another forward pass: about the overhead of a small model's pass."""


def batch_answer_logprobs(model: Any, groups: Sequence[Group]) -> list[Tensor]:
    """Compute `answer_logprobs` of several groups, with rows of similar length in one pass.

    Rows are padded on the right, which causal attention never sees, so no attention mask is needed. Logits are computed
    only from the first position that predicts an answer token.
    """
    rows = [(group, answer) for group in groups for answer in group.answers]
    logprobs_by_row: list[Tensor] = [torch.empty(0)] * len(rows)
    for numbers in _batch_by_length([len(group.prompt) + len(answer) for group, answer in rows]):
        width = max(len(rows[number][0].prompt) + len(rows[number][1]) for number in numbers)
        first = min(len(rows[number][0].prompt) for number in numbers) - 1
        padded = [[*rows[number][0].prompt, *rows[number][1]] for number in numbers]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in padded], device=model.device)
        logits = last_logits(model, ids[:, :-1], width - 1 - first, has_logits_to_keep(model), use_cache=False)
        temperatures = torch.tensor([rows[number][0].temperature for number in numbers], device=model.device)
        logprobs = torch.log_softmax(logits.float() / temperatures[:, None, None], dim=-1)
        token_logprobs = logprobs.gather(-1, ids[:, first + 1 :, None])[..., 0]
        for place, number in enumerate(numbers):
            group, answer = rows[number]
            begin = len(group.prompt) - 1 - first
            logprobs_by_row[number] = token_logprobs[place, begin : begin + len(answer)]
    by_group = []
    for group in groups:
        mine, logprobs_by_row = logprobs_by_row[: len(group.answers)], logprobs_by_row[len(group.answers) :]
        by_group.append(pad_sequence(mine, batch_first=True))
    return by_group


def _batch_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return row numbers by pass: longest first, split where the saved padding is worth another pass."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    passes = [order[:1]]
    for place, number in enumerate(order[1:], start=1):
        if (lengths[passes[-1][0]] - lengths[number]) * (len(order) - place) > PADDING_WORTH_A_PASS:
            passes.append([])
        passes[-1].append(number)
    return passes


MAX_PASS_WORK = 10_000_000_000
"""Tokens times parameters up to which groups share a pass. Sharing saves overhead for a small model; for a large model
or a long prompt it would only cost memory."""


def split_into_passes(groups: Sequence[Group], parameters: int) -> list[range]:
    """Return which neighbouring groups go through the model together, at least one per pass."""
    planned: list[range] = []
    for number in range(len(groups)):
        begin = planned[-1].start if planned else 0
        together = groups[begin : number + 1]
        rows = sum(len(group.answers) for group in together)
        width = max(len(group.prompt) + max(map(len, group.answers)) for group in together)
        if planned and rows * width * parameters <= MAX_PASS_WORK:
            planned[-1] = range(begin, number + 1)
        else:
            planned.append(range(number, number + 1))
    return planned


def schedule_passes(groups: Sequence[Group], parameters: int) -> list[list[range]]:
    """Return the passes in sequence; for a small model whose groups fit one pass, two halves to run in parallel."""
    planned = split_into_passes(groups, parameters)
    if len(planned) > 1 or len(groups) < 2 or parameters >= SMALL_MODEL_PARAMETERS:
        return [[each] for each in planned]
    lengths = [len(group.prompt) + sum(map(len, group.answers)) for group in groups]
    cut = min(range(1, len(groups)), key=lambda at: max(sum(lengths[:at]), sum(lengths[at:])))
    return [[range(cut), range(cut, len(groups))]]


MAX_PACKED_TOKENS = 2048
"""Up to this many tokens a group gets one attention mask over all of them; longer ones go through transformers."""


Seed = tuple[str | int, ...]
Loss = Callable[[list[Tensor]], Tensor]
"""A scalar function of the log-probabilities (G, T) of some groups."""


GradientPart = tuple[Sequence[Group], Seed, Loss]


class Scorer(ABC):
    """Computes log-probabilities of groups' answers under an adapter's values, and gradients by these."""

    @abstractmethod
    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        """Return (G, T) for each group without a gradient: fp32, zero at padding. `flat` (P,) are the adapter's values;
        None means the base model. `seed` seeds dropout."""

    @abstractmethod
    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        """Return the gradient (P,) of `loss` by the adapter's values, and the loss."""

    def gradients(self, parts: Sequence[GradientPart], flat: Tensor) -> list[tuple[Tensor, float]]:
        """Compute `gradient` of several parts. Two may run in parallel, each `loss` in its own thread."""
        return [self.gradient(groups, flat, seed, loss) for groups, seed, loss in parts]


def scorer_for(slot: AdapterSlot, groups: Sequence[Group]) -> Scorer:
    """Return the fastest scorer that can handle these groups."""
    adapted = slot.adapted_layers
    if adapted is None or slot.settings.lora_dropout or adapted.fast_forward.embedding.dtype != torch.float32:
        return GenericScorer(slot)
    longest = max(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
    longest_sequence = max(len(group.prompt) + max(map(len, group.answers)) for group in groups)
    if longest > MAX_PACKED_TOKENS or not adapted.fast_forward.has_full_attention(longest_sequence):
        return GenericScorer(slot)
    return FastScorer(slot)


class GenericScorer(Scorer):
    """Through transformers' forward pass with PEFT's layers."""

    def __init__(self, slot: AdapterSlot) -> None:
        self._slot = slot

    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        slot = self._slot
        with slot.lock, torch.no_grad():
            if flat is not None:
                return self._adapted_logprobs(groups, flat, seed)
            with slot.without_adapter():
                return batch_answer_logprobs(slot.model, groups)

    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        with self._slot.lock:
            value = loss(self._adapted_logprobs(groups, flat, seed))
            return self._slot.gradient(value), float(value.detach())

    def _adapted_logprobs(self, groups: Sequence[Group], flat: Tensor, seed: Seed) -> list[Tensor]:
        self._slot.install(flat)
        with self._slot.dropout(*seed):
            return batch_answer_logprobs(self._slot.model, groups)


class FastScorer(Scorer):
    """Through the fast forward pass. All tokens are packed in one sequence: of each group the prompt, then the answers,
    each of which attends to the prompt and itself."""

    def __init__(self, slot: AdapterSlot) -> None:
        assert slot.adapted_layers
        self._fast_forward: FastForward = slot.adapted_layers.fast_forward
        self._scale = slot.settings.lora_alpha / slot.settings.lora_rank
        self._shapes = [shape for _, _, shape in slot.slices]
        self._sizes = [where.stop - where.start for _, where, _ in slot.slices]
        self._pairs = slot.adapted_layers.lora_pairs
        self._cores = slot.cores

    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        with torch.no_grad():
            return self._packed_logprobs(groups, flat)

    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        leaf = flat.detach().requires_grad_()
        value = loss(self._packed_logprobs(groups, leaf))
        return torch.autograd.grad(value, leaf)[0], float(value.detach())

    def gradients(self, parts: Sequence[GradientPart], flat: Tensor) -> list[tuple[Tensor, float]]:
        jobs = [partial(self.gradient, groups, flat, seed, loss) for groups, seed, loss in parts]
        return list(self._cores.run_both(*jobs)) if len(jobs) == 2 else [work() for work in jobs]

    def _packed_logprobs(self, groups: Sequence[Group], flat: Tensor | None) -> list[Tensor]:
        adapter: list[Tensor] | None = None
        if flat is not None:
            adapter = [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]
        packed = PackedGroups(groups, self._fast_forward.device)
        logits = self._logits(packed, adapter)
        logprobs = -functional.cross_entropy(logits, packed.targets, reduction="none")
        answers = iter(logprobs.split([len(answer) for group in groups for answer in group.answers]))
        return [pad_sequence([next(answers) for _ in group.answers], batch_first=True) for group in groups]

    def _logits(self, packed: PackedGroups, adapter: list[Tensor] | None) -> Tensor:
        """Return logits (M, V) over the temperatures, at the positions that predict answer tokens."""
        fast_forward = self._fast_forward
        cos, sin = (table[packed.positions, None] for table in fast_forward.rotary_tables(packed.length))
        x = fast_forward.embed(packed.ids)
        for number, layer in enumerate(fast_forward.layers):
            q, k, v = self._fused_linear(layer.qkv, (number, 0), fast_forward.rms_norm(x, layer.input_norm), adapter)
            both = torch.cat([q, k], dim=1).view(len(x), -1, fast_forward.head_dim)
            queries, keys = fast_forward.apply_rotary(layer, both, cos, sin).split(
                [fast_forward.heads, fast_forward.kv_heads], dim=1
            )
            attended = self._attend(packed, queries, keys, v.view(len(x), -1, fast_forward.head_dim))
            if number == len(fast_forward.layers) - 1:  # the rest of the last layer is per token
                x, attended = x[packed.predicting], attended[packed.predicting]
            (out,) = self._fused_linear(layer.attention_out, (number, 1), attended, adapter)
            x = x + out
            gate, up = self._fused_linear(layer.gate_up, (number, 2), fast_forward.rms_norm(x, layer.mlp_norm), adapter)
            (down,) = self._fused_linear(layer.down, (number, 3), fast_forward.activation(gate) * up, adapter)
            x = x + down
        return (
            functional.linear(fast_forward.rms_norm(x, fast_forward.norm), fast_forward.lm_head) / packed.temperatures
        )

    def _attend(self, packed: PackedGroups, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend group by group: (N, heads, D) to (N, heads D)."""
        fast_forward = self._fast_forward
        attended = []
        for span, mask in packed.spans:
            q, k, v = (each[span].transpose(0, 1)[None] for each in (queries, keys, values))
            if fast_forward.heads != fast_forward.kv_heads:
                k, v = (each.repeat_interleave(fast_forward.heads // fast_forward.kv_heads, dim=1) for each in (k, v))
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=fast_forward.scale)
            attended.append(found[0].transpose(0, 1).reshape(span.stop - span.start, -1))
        return torch.cat(attended)

    def _fused_linear(
        self, base: FusedLinear, place: tuple[int, int], x: Tensor, adapter: list[Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Apply the fused linear layers and their adapters to x (N, in); one output per layer."""
        parts = functional.linear(x, base.weight, base.bias).split(
            [rows.stop - rows.start for _, rows in base.parts], dim=1
        )
        pairs = self._pairs[place]
        if adapter is None or not any(pairs):
            return tuple(parts)
        lora_as = [adapter[pair[0]] for pair in pairs if pair]
        projected = functional.linear(x, torch.cat(lora_as) if len(lora_as) > 1 else lora_as[0])
        projections = iter(projected.split([len(down) for down in lora_as], dim=1))
        return tuple(
            torch.addmm(part, next(projections), adapter[pair[1]].T, alpha=self._scale) if pair else part
            for part, pair in zip(parts, pairs, strict=True)
        )


class PackedGroups:
    """The tokens of some groups packed in one sequence, with their positions and prediction targets."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        predicting: list[int] = []
        targets: list[int] = []
        temperatures: list[float] = []
        self.spans: list[tuple[slice, Tensor]] = []
        """The slice of each group, and its attention mask (T, T)."""
        for group in groups:
            begin, prompt = len(ids), len(group.prompt)
            owners = [-1] * prompt
            ids += group.prompt
            positions += range(prompt)
            for number, answer in enumerate(group.answers):
                predicting += [begin + prompt - 1, *range(len(ids), len(ids) + len(answer) - 1)]
                targets += answer
                temperatures += [group.temperature] * len(answer)
                ids += answer[:-1]  # the last token predicts nothing
                positions += range(prompt, prompt + len(answer) - 1)
                owners += [number] * (len(answer) - 1)
            place, owner = torch.tensor(positions[begin:], device=device), torch.tensor(owners, device=device)
            same = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
            self.spans.append((slice(begin, len(ids)), same & (place[None, :] <= place[:, None])))
        self.length = max(positions) + 1
        self.ids = torch.tensor(ids, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.predicting = torch.tensor(predicting, device=device)
        self.targets = torch.tensor(targets, device=device)
        self.temperatures = torch.tensor(temperatures, device=device)[:, None]
