"""How likely a model finds answers, with a gradient: through transformers' own forward, or through the lean pass, which
reads the prompt of a group once.

It knows prompts and answers as tokens, and the adapter's values; not losses, choices' meaning or optimisers.
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
from ..parallel import SMALL
from ..text.adapters import Slot
from ..text.cache_support import keeps_last_logits, last_logits
from ..text.fast_forward import Lean, Linear


@dataclass(frozen=True)
class Group:
    """A lesson as numbers: one prompt, its answers as tokens (each with its end token if it ended), the choice.

    A written answer stands last among the answers.
    """

    prompt: list[int]
    answers: list[list[int]]
    choice: Choice
    temperature: float

    def mask(self, device: torch.device) -> Tensor:
        """(G, T) true where an answer has a token. From lengths, never from token ids."""
        lengths = torch.tensor([len(answer) for answer in self.answers], device=device)
        return torch.arange(int(lengths.max()), device=device)[None, :] < lengths[:, None]


def answer_logprobs(model: Any, group: Group) -> Tensor:
    """Log-probabilities (G, T) of each answer's tokens given the prompt, fp32, zero where there is none."""
    return answers_logprobs(model, [group])[0]


WORTH_A_PASS = 120
"""Padding, in tokens, that is worth another pass through the model: about what a small one's overhead costs."""


def answers_logprobs(model: Any, groups: Sequence[Group]) -> list[Tensor]:
    """`answer_logprobs` of several groups, rows of like length in one pass each.

    Rows are padded on the right, which a causal model never looks at, so no attention mask is needed;
    logits are only made from the first position that predicts an answer.
    """
    rows = [(group, answer) for group in groups for answer in group.answers]
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for numbers in _of_like_length([len(group.prompt) + len(answer) for group, answer in rows]):
        width = max(len(rows[number][0].prompt) + len(rows[number][1]) for number in numbers)
        first = min(len(rows[number][0].prompt) for number in numbers) - 1
        padded = [[*rows[number][0].prompt, *rows[number][1]] for number in numbers]
        ids = torch.tensor([row + [0] * (width - len(row)) for row in padded], device=model.device)
        logits = last_logits(model, ids[:, :-1], width - 1 - first, keeps_last_logits(model), use_cache=False)
        temperatures = torch.tensor([rows[number][0].temperature for number in numbers], device=model.device)
        logprobs = torch.log_softmax(logits.float() / temperatures[:, None, None], dim=-1)
        told = logprobs.gather(-1, ids[:, first + 1 :, None])[..., 0]
        for place, number in enumerate(numbers):
            group, answer = rows[number]
            begin = len(group.prompt) - 1 - first
            found[number] = told[place, begin : begin + len(answer)]
    picked = []
    for group in groups:
        mine, found = found[: len(group.answers)], found[len(group.answers) :]
        picked.append(pad_sequence(mine, batch_first=True))
    return picked


def _of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of rows in passes: the longest first, cut where the padding saved is worth a pass of its own."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    passes = [order[:1]]
    for place, number in enumerate(order[1:], start=1):
        if (lengths[passes[-1][0]] - lengths[number]) * (len(order) - place) > WORTH_A_PASS:
            passes.append([])
        passes[-1].append(number)
    return passes


PASS_WORK = 10_000_000_000
"""Tokens times parameters up to which groups share a pass. That spares a small model its overhead; a large model or a
long prompt gains nothing by it and would need the memory of all groups at once."""


def passes(groups: Sequence[Group], parameters: int) -> list[range]:
    """Which groups go through the model together: neighbours, as many as may share a pass; at least one."""
    made: list[range] = []
    for number in range(len(groups)):
        begin = made[-1].start if made else 0
        together = groups[begin : number + 1]
        rows = sum(len(group.answers) for group in together)
        width = max(len(group.prompt) + max(map(len, group.answers)) for group in together)
        if made and rows * width * parameters <= PASS_WORK:
            made[-1] = range(begin, number + 1)
        else:
            made.append(range(number, number + 1))
    return made


def rounds(groups: Sequence[Group], parameters: int) -> list[list[range]]:
    """`passes`, one after the other; where one of a small model would do, two of about the same length at once."""
    made = passes(groups, parameters)
    if len(made) > 1 or len(groups) < 2 or parameters >= SMALL:
        return [[each] for each in made]
    lengths = [len(group.prompt) + sum(map(len, group.answers)) for group in groups]
    cut = min(range(1, len(groups)), key=lambda at: max(sum(lengths[:at]), sum(lengths[at:])))
    return [[range(cut), range(cut, len(groups))]]


LONGEST = 2048
"""Up to so many tokens a group has one mask over all of them; a longer one goes through transformers."""


Seed = tuple[str | int, ...]
Loss = Callable[[list[Tensor]], Tensor]
"""A scalar made of log-probabilities (G, T) of some groups."""


Part = tuple[Sequence[Group], Seed, Loss]


class Reading(ABC):
    """Log-probabilities of groups' answers under an adapter's values, and the gradient by these."""

    @abstractmethod
    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        """(G, T) of each group, fp32, zero where an answer has no token, without a gradient. `flat` (P,) are the
        adapter's values; without them it is the base model that is asked. `seed` is where dropout's random numbers
        start from."""

    @abstractmethod
    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        """The gradient (P,) of what `loss` makes of the groups' log-probabilities, by the adapter's values; and it."""

    def gradients(self, parts: Sequence[Part], flat: Tensor) -> list[tuple[Tensor, float]]:
        """`gradient` of several parts. Two may be worked out at once, each `loss` in a thread of its own."""
        return [self.gradient(groups, flat, seed, loss) for groups, seed, loss in parts]


def reading_of(slot: Slot, groups: Sequence[Group]) -> Reading:
    """The quickest way to read these groups."""
    adapted = slot.adapted
    if adapted is None or slot.settings.lora_dropout or adapted.lean.embedding.dtype != torch.float32:
        return GeneralReading(slot)
    longest = max(len(group.prompt) + sum(map(len, group.answers)) for group in groups)
    reach = max(len(group.prompt) + max(map(len, group.answers)) for group in groups)
    if longest > LONGEST or not adapted.lean.reaches(reach):
        return GeneralReading(slot)
    return LeanReading(slot)


class GeneralReading(Reading):
    """Through transformers' own forward, with PEFT's layers."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        slot = self._slot
        with slot.turn, torch.no_grad():
            if flat is not None:
                return self._adapted(groups, flat, seed)
            with slot.reference():
                return answers_logprobs(slot.model, groups)

    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        with self._slot.turn:
            made = loss(self._adapted(groups, flat, seed))
            return self._slot.gradient(made), float(made.detach())

    def _adapted(self, groups: Sequence[Group], flat: Tensor, seed: Seed) -> list[Tensor]:
        self._slot.install(flat)
        with self._slot.dropping(*seed):
            return answers_logprobs(self._slot.model, groups)


class LeanReading(Reading):
    """Through the lean pass. All tokens stand in one line: of each group the prompt, then the answers, each of which
    sees the prompt and itself."""

    def __init__(self, slot: Slot) -> None:
        assert slot.adapted
        self._lean: Lean = slot.adapted.lean
        self._scale = slot.settings.lora_alpha / slot.settings.lora_rank
        self._shapes = [shape for _, _, shape in slot.slices]
        self._sizes = [where.stop - where.start for _, where, _ in slot.slices]
        self._pairs = slot.adapted.pairs
        self._crew = slot.crew

    def logprobs(self, groups: Sequence[Group], flat: Tensor | None, seed: Seed = ()) -> list[Tensor]:
        with torch.no_grad():
            return self._read(groups, flat)

    def gradient(self, groups: Sequence[Group], flat: Tensor, seed: Seed, loss: Loss) -> tuple[Tensor, float]:
        leaf = flat.detach().requires_grad_()
        made = loss(self._read(groups, leaf))
        return torch.autograd.grad(made, leaf)[0], float(made.detach())

    def gradients(self, parts: Sequence[Part], flat: Tensor) -> list[tuple[Tensor, float]]:
        works = [partial(self.gradient, groups, flat, seed, loss) for groups, seed, loss in parts]
        return list(self._crew.both(*works)) if len(works) == 2 else [work() for work in works]

    def _read(self, groups: Sequence[Group], flat: Tensor | None) -> list[Tensor]:
        named: list[Tensor] | None = None
        if flat is not None:
            named = [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]
        line = Line(groups, self._lean.device)
        logits = self._logits(line, named)
        found = -functional.cross_entropy(logits, line.targets, reduction="none")
        answers = iter(found.split([len(answer) for group in groups for answer in group.answers]))
        return [pad_sequence([next(answers) for _ in group.answers], batch_first=True) for group in groups]

    def _logits(self, line: Line, named: list[Tensor] | None) -> Tensor:
        """(M, V) over the temperatures, where a token of an answer is to be told."""
        lean = self._lean
        cos, sin = (table[line.positions, None] for table in lean.angles(line.length))
        x = lean.embed(line.ids)
        for number, layer in enumerate(lean.layers):
            q, k, v = self._linear(layer.qkv, (number, 0), lean.normed(x, layer.before_attention), named)
            both = torch.cat([q, k], dim=1).view(len(x), -1, lean.head_dim)
            queries, keys = lean.turned(layer, both, cos, sin).split([lean.heads, lean.kv_heads], dim=1)
            seen = self._attend(line, queries, keys, v.view(len(x), -1, lean.head_dim))
            if number == len(lean.layers) - 1:  # what follows is done for each token alone
                x, seen = x[line.wanted], seen[line.wanted]
            (out,) = self._linear(layer.out, (number, 1), seen, named)
            x = x + out
            gate, up = self._linear(layer.gate_up, (number, 2), lean.normed(x, layer.before_mlp), named)
            (down,) = self._linear(layer.down, (number, 3), lean.activation(gate) * up, named)
            x = x + down
        return functional.linear(lean.normed(x, lean.norm), lean.head) / line.temperatures

    def _attend(self, line: Line, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(N, heads D) from (N, heads, D), group by group."""
        lean = self._lean
        seen = []
        for span, mask in line.spans:
            q, k, v = (each[span].transpose(0, 1)[None] for each in (queries, keys, values))
            if lean.heads != lean.kv_heads:
                k, v = (each.repeat_interleave(lean.heads // lean.kv_heads, dim=1) for each in (k, v))
            found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=lean.scale)
            seen.append(found[0].transpose(0, 1).reshape(span.stop - span.start, -1))
        return torch.cat(seen)

    def _linear(
        self, base: Linear, place: tuple[int, int], x: Tensor, named: list[Tensor] | None
    ) -> tuple[Tensor, ...]:
        """What each of the layers that read x (N, in) makes of it, with the adapter."""
        parts = functional.linear(x, base.weight, base.bias).split(
            [rows.stop - rows.start for _, rows in base.parts], dim=1
        )
        pairs = self._pairs[place]
        if named is None or not any(pairs):
            return tuple(parts)
        downs = [named[pair[0]] for pair in pairs if pair]
        narrow = functional.linear(x, torch.cat(downs) if len(downs) > 1 else downs[0])
        narrows = iter(narrow.split([len(down) for down in downs], dim=1))
        return tuple(
            torch.addmm(part, next(narrows), named[pair[1]].T, alpha=self._scale) if pair else part
            for part, pair in zip(parts, pairs, strict=True)
        )


class Line:
    """The tokens of some groups in one line, where each stands in its text, and what is to be told of which."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        targets: list[int] = []
        temperatures: list[float] = []
        self.spans: list[tuple[slice, Tensor]] = []
        """Where each group stands, and which of its tokens (T, T) see which."""
        for group in groups:
            begin, prompt = len(ids), len(group.prompt)
            owners = [-1] * prompt
            ids += group.prompt
            positions += range(prompt)
            for number, answer in enumerate(group.answers):
                wanted += [begin + prompt - 1, *range(len(ids), len(ids) + len(answer) - 1)]
                targets += answer
                temperatures += [group.temperature] * len(answer)
                ids += answer[:-1]  # the last one tells nothing more
                positions += range(prompt, prompt + len(answer) - 1)
                owners += [number] * (len(answer) - 1)
            place, owner = torch.tensor(positions[begin:], device=device), torch.tensor(owners, device=device)
            same = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
            self.spans.append((slice(begin, len(ids)), same & (place[None, :] <= place[:, None])))
        self.length = max(positions) + 1
        self.ids = torch.tensor(ids, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.wanted = torch.tensor(wanted, device=device)
        self.targets = torch.tensor(targets, device=device)
        self.temperatures = torch.tensor(temperatures, device=device)[:, None]
