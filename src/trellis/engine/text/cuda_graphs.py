"""One decode step of a group as a CUDA graph: from a token of every row to the next one, without synchronizing with the
CPU.

It knows the fast forward pass and tensors of fixed shapes; not prompts, text or learning. A graph is captured once per
shape and reused for other weights, prompts and temperatures, whose values are copied in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...options import Sampling
from .fast_forward import FastForward, KVCache
from .fused_layers import FusedLayer
from .sampling import is_greedy, sample_scaled

STEPS_PER_SYNC = 4
"""Decode steps per synchronization with the CPU."""

CAPACITY_MULTIPLE = 64
"""Capacities are rounded up to this, so that prompts of similar length share a graph."""

MAX_GRAPHS = 4
"""How many graphs are kept, least recently used first out; each holds a KV cache of its shape."""

SampledSteps = list[tuple[list[int], list[float]]]
"""For each of some steps: a token per row, and its log-probability."""


@dataclass(frozen=True)
class GraphShape:
    """What a graph is captured for: rows, KV cache capacity, number of steps, and filters."""

    rows: int
    capacity: int
    steps: int
    nucleus: bool
    greedy: bool


class CapturedStep:
    """The tensors a step reads and writes, all in place. `step` may be captured or run directly."""

    def __init__(self, fast_forward: FastForward, layers: Sequence[FusedLayer], shape: GraphShape) -> None:
        self._fast_forward, self._layers, self.shape = fast_forward, layers, shape
        device = fast_forward.device
        self.cache = KVCache.empty(fast_forward, shape.rows, shape.capacity)
        for each in (*self.cache.keys, *self.cache.values):
            each.zero_()  # masked values must be finite
        self.rotary_tables = [table[: shape.capacity].clone() for table in fast_forward.rotary_tables(shape.capacity)]
        self.positions = torch.arange(shape.capacity, device=device)
        self.ids = torch.zeros(shape.rows, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.step_index = torch.zeros(1, dtype=torch.long, device=device)
        self.uniforms = torch.zeros(shape.steps, shape.rows, device=device)
        self.temperature, self.min_p, self.top_p = (torch.ones((), device=device) for _ in range(3))
        self.tokens = torch.zeros(shape.steps, shape.rows, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape.steps, shape.rows, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, cache: KVCache, sampling: Sampling, uniforms: Tensor, pending: Tensor) -> None:
        """Copy the rows generated so far, with a token (R,) of each that is not read yet."""
        for mine, theirs in ((self.cache.keys, cache.keys), (self.cache.values, cache.values)):
            for here, there in zip(mine, theirs, strict=True):
                here[:, :, : cache.length] = there[:, :, : cache.length]
        self.ids.copy_(pending)
        self.position.fill_(cache.length)
        self.step_index.zero_()
        self.uniforms[: len(uniforms)] = uniforms
        self.temperature.fill_(1.0 if is_greedy(sampling) else sampling.temperature)
        self.min_p.fill_(sampling.min_p)
        self.top_p.fill_(sampling.top_p)

    def step(self) -> None:
        fast_forward, rows = self._fast_forward, self.shape.rows
        cos, sin = (table.index_select(0, self.position)[None] for table in self.rotary_tables)
        is_masked = (self.positions > self.position)[None, None, None]
        x = fast_forward.embed(self.ids)
        for layer, keys, values in zip(self._layers, self.cache.keys, self.cache.values, strict=True):
            q, k, v = fast_forward.project_qkv(layer, x, rows, 1, cos[:, None], sin[:, None])
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            grouped = q.reshape(rows, fast_forward.kv_heads, -1, fast_forward.head_dim)
            scores = torch.matmul(grouped, keys.transpose(-1, -2)).float() * fast_forward.scale
            attention = torch.softmax(scores.masked_fill(is_masked, float("-inf")), dim=-1).to(values.dtype)
            attended = torch.matmul(attention, values).view(rows, fast_forward.heads, 1, fast_forward.head_dim)
            x = fast_forward.finish_layer(layer, x, attended)
        logits = (
            fast_forward.logits(functional.rms_norm(x, x.shape[-1:], fast_forward.norm, fast_forward.norm_eps)).float()
            / self.temperature
        )
        if self.shape.greedy:
            tokens = logits.argmax(dim=-1)
            logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None])[:, 0]
        else:
            top_p = self.top_p if self.shape.nucleus else 1.0
            tokens, logprobs = sample_scaled(
                logits, self.min_p, top_p, self.uniforms.index_select(0, self.step_index)[0]
            )
        self.tokens.index_copy_(0, self.step_index, tokens[None])
        self.logprobs.index_copy_(0, self.step_index, logprobs[None])
        self.ids.copy_(tokens)
        self.position.add_(1)
        self.step_index.add_(1)

    def capture(self) -> None:
        """Capture a step. Its side effects are undone by `load`."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.graph is None:
                self.step()
            else:
                self.graph.replay()


class StepGraphs:
    """Captured steps over one adapter's layers. One in use is not shared: several offers may run at once."""

    def __init__(self, fast_forward: FastForward, layers: Sequence[FusedLayer]) -> None:
        self._fast_forward, self._layers = fast_forward, layers
        self._free: list[CapturedStep] = []

    def sample_steps(
        self, install: Callable[[], object], cache: KVCache, sampling: Sampling, uniforms: Tensor, pending: Tensor
    ) -> Iterator[SampledSteps]:
        """Sample a token for each row of `uniforms` (S, R), after the rows in `cache` and tokens (R,) that are not read
        yet. `install` puts the right weights into the layers; it is called every few steps."""
        if not len(uniforms):
            return
        steps = -(-len(uniforms) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        capacity = -(-(cache.length + steps) // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE
        shape = GraphShape(len(pending), capacity, steps, sampling.top_p < 1, is_greedy(sampling))
        graph_step = self._take(shape)
        try:
            with torch.inference_mode():
                graph_step.load(cache, sampling, uniforms, pending)
            for begin in range(0, len(uniforms), STEPS_PER_SYNC):
                end = min(begin + STEPS_PER_SYNC, len(uniforms))
                install()
                with torch.inference_mode():
                    graph_step.run(end - begin)
                tokens, logprobs = graph_step.tokens[begin:end].tolist(), graph_step.logprobs[begin:end].tolist()
                yield list(zip(tokens, logprobs, strict=True))
        finally:
            self._free.append(graph_step)
            del self._free[:-MAX_GRAPHS]

    def _take(self, shape: GraphShape) -> CapturedStep:
        for place, stepper in enumerate(self._free):
            if stepper.shape == shape:
                return self._free.pop(place)
        with torch.inference_mode():
            stepper = CapturedStep(self._fast_forward, self._layers, shape)
            if self._fast_forward.device.type == "cuda":
                stepper.capture()
        return stepper
