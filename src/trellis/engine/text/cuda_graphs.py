"""One step of a growing group as a CUDA graph: from a token of every row to the next one, with nothing asked of the
processor in between.

It knows the lean pass and tensors of fixed shapes; not prompts, text or learning. A graph is captured once for a shape
and used again for other weights, prompts and temperatures, whose values are put in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...params import Sampling
from .fast_forward import Cache, Layer, Lean
from .sampling import drawn_from, is_greedy

STEPS = 4
"""So many steps are run for each time that the processor waits for their tokens."""

ROUND = 64
"""Rooms are rounded up to this, so that prompts of like length share a graph."""

KEPT = 4
"""So many graphs are kept, those that were used last; each holds the keys and values of its shape."""

Drawn = list[tuple[list[int], list[float]]]
"""Some steps: of each, a token for every row and its log-probability."""


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for: rows, room for positions and draws, and which filters it has."""

    rows: int
    room: int
    draws: int
    nucleus: bool
    greedy: bool


class Stepper:
    """The tensors that a step reads and writes, all in place. `step` may be captured, or run as it is."""

    def __init__(self, lean: Lean, layers: Sequence[Layer], shape: Shape) -> None:
        self._lean, self._layers, self.shape = lean, layers, shape
        device = lean.device
        self.cache = Cache.empty(lean, shape.rows, shape.room)
        for each in (*self.cache.keys, *self.cache.values):
            each.zero_()  # what is masked must still be a number
        self.angles = [table[: shape.room].clone() for table in lean.angles(shape.room)]
        self.places = torch.arange(shape.room, device=device)
        self.ids = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.chances = torch.zeros(shape.draws, shape.rows, device=device)
        self.temperature, self.min_p, self.top_p = (torch.ones((), device=device) for _ in range(3))
        self.tokens = torch.zeros(shape.draws, shape.rows, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape.draws, shape.rows, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, cache: Cache, sampling: Sampling, uniforms: Tensor, drawn: Tensor) -> None:
        """Take over rows that have grown so far, with a token (R,) of each that is still to be fed."""
        for mine, theirs in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
            for here, there in zip(mine, theirs, strict=True):
                here[:, :, : cache.length] = there[:, :, : cache.length]
        self.ids.copy_(drawn)
        self.position.fill_(cache.length)
        self.count.zero_()
        self.chances[: len(uniforms)] = uniforms
        self.temperature.fill_(1.0 if is_greedy(sampling) else sampling.temperature)
        self.min_p.fill_(sampling.min_p)
        self.top_p.fill_(sampling.top_p)

    def step(self) -> None:
        lean, rows = self._lean, self.shape.rows
        cos, sin = (table.index_select(0, self.position)[None] for table in self.angles)
        hidden = (self.places > self.position)[None, None, None]
        x = lean.embed(self.ids)
        for layer, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            q, k, v = lean.heads_of(layer, x, rows, 1, cos[:, None], sin[:, None])
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            grouped = q.reshape(rows, lean.kv_heads, -1, lean.head_dim)
            scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * lean.scale
            shares = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1).to(values.dtype)
            seen = torch.matmul(shares, values).view(rows, lean.heads, 1, lean.head_dim)
            x = lean.after_attention(layer, x, seen)
        logits = lean.logits(functional.rms_norm(x, x.shape[-1:], lean.norm, lean.eps)).float() / self.temperature
        if self.shape.greedy:
            drawn = logits.argmax(dim=-1)
            logprobs = torch.log_softmax(logits, dim=-1).gather(-1, drawn[:, None])[:, 0]
        else:
            top_p = self.top_p if self.shape.nucleus else 1.0
            drawn, logprobs = drawn_from(logits, self.min_p, top_p, self.chances.index_select(0, self.count)[0])
        self.tokens.index_copy_(0, self.count, drawn[None])
        self.logprobs.index_copy_(0, self.count, logprobs[None])
        self.ids.copy_(drawn)
        self.position.add_(1)
        self.count.add_(1)

    def capture(self) -> None:
        """Record a step. What it runs meanwhile is undone by `begin`."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()


class Graphs:
    """The steppers over one adapter's layers. One that is at work is nobody else's: several offers may be under way."""

    def __init__(self, lean: Lean, layers: Sequence[Layer]) -> None:
        self._lean, self._layers = lean, layers
        self._free: list[Stepper] = []

    def draws(
        self, install: Callable[[], object], cache: Cache, sampling: Sampling, uniforms: Tensor, drawn: Tensor
    ) -> Iterator[Drawn]:
        """Draw a token for each row of `uniforms` (S, R), from rows that have grown so far and tokens (R,) that are
        not fed yet. `install` puts the right weights into the layers; it is called before each few steps."""
        if not len(uniforms):
            return
        draws = -(-len(uniforms) // ROUND) * ROUND
        room = -(-(cache.length + draws) // ROUND) * ROUND
        shape = Shape(len(drawn), room, draws, sampling.top_p < 1, is_greedy(sampling))
        stepper = self._take(shape)
        try:
            with torch.inference_mode():
                stepper.begin(cache, sampling, uniforms, drawn)
            for begin in range(0, len(uniforms), STEPS):
                end = min(begin + STEPS, len(uniforms))
                install()
                with torch.inference_mode():
                    stepper.run(end - begin)
                tokens, logprobs = stepper.tokens[begin:end].tolist(), stepper.logprobs[begin:end].tolist()
                yield list(zip(tokens, logprobs, strict=True))
        finally:
            self._free.append(stepper)
            del self._free[:-KEPT]

    def _take(self, shape: Shape) -> Stepper:
        for place, stepper in enumerate(self._free):
            if stepper.shape == shape:
                return self._free.pop(place)
        with torch.inference_mode():
            stepper = Stepper(self._lean, self._layers, shape)
            if self._lean.device.type == "cuda":
                stepper.capture()
        return stepper
