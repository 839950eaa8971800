"""Use any node of a session without moving its head: chat, sample, retrain, hold weights on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

from ...errors import WeightsMissing
from ...messages import Chat, Event, Learned, Progress, TextDelta
from ...options import Sampling
from ...store import steering as rows
from ...store.store import Store
from ..models import thinking_kwargs
from .engine_requests import EngineRequests
from .missing_work import MissingWork
from .offer import answer_preview
from .recomputation import Recomputation
from .retention import RetainedWeights
from .state import SessionState
from .transitions import Transitions
from .tree import Node, Retraining, child_id, node_json, node_row


class NodeAccess:
    """The nodes of one session, for other features. Missing weights are recomputed first."""

    def __init__(
        self,
        store: Store,
        engine: EngineRequests,
        recomputation: Recomputation,
        retained_weights: RetainedWeights,
        state: SessionState,
        transitions: Transitions,
        work: MissingWork,
    ) -> None:
        self._store = store
        self._engine = engine
        self._recomputation = recomputation
        self._retained_weights = retained_weights
        self._state = state
        self._transitions = transitions
        self._work = work
        self._labels: dict[str, str] = {}

    @asynccontextmanager
    async def hold_weights(self, node: Node, verify: bool = False) -> AsyncIterator[None]:
        """Keep the weights of a node on disk until the block ends, recomputed if necessary.

        With `verify`, damaged files are recomputed first; an engine would notice them, other readers would not.
        """
        self._retained_weights.pinned[node.weights] += 1
        try:
            is_damaged = verify and await asyncio.to_thread(self._engine.discard_if_damaged, node.weights)
            if is_damaged or not self._engine.is_on_disk(node.weights):
                await self._recomputation.run(WeightsMissing(node.weights))
            yield
        finally:
            self._retained_weights.pinned[node.weights] -= 1

    async def chat(self, request: Chat, node: Node, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation with the weights of a node."""
        self._state.require_initialized(node)
        self._state.last_used = time.monotonic()
        self._engine.allow_loading()
        self._retained_weights.pinned[node.weights] += 1
        variables = thinking_kwargs(self._state.config) | request.template_kwargs
        request = request.model_copy(
            update={"weights": node.weights, "template": self._state.config.chat_template, "template_kwargs": variables}
        )
        try:
            if not self._engine.is_available(node.weights):
                await self._recomputation.run(WeightsMissing(node.weights))
            has_spoken = False
            try:
                async with aclosing(self._engine.chat(request, owner)) as events:
                    async for event in events:
                        has_spoken = has_spoken or isinstance(event, TextDelta)
                        yield event
            except WeightsMissing as missing:  # the folder was damaged
                if has_spoken or missing.weights != node.weights:
                    raise
                await self._recomputation.run(missing)
                async with aclosing(self._engine.chat(request, owner)) as events:
                    async for event in events:
                        yield event
        finally:
            self._retained_weights.pinned[node.weights] -= 1

    async def sample(self, prompt: str, node: str | None, n: int, sampling: Sampling, seed: int) -> list[str]:
        """Return answers to a prompt, sampled with the weights of a node."""
        start_node = self._state.node(node) if node else self._state.tree.head
        self._state.require_initialized(start_node)
        self._engine.allow_loading()
        async with self.hold_weights(start_node):
            try:
                offered = await self._engine.generate(prompt, start_node.weights, sampling, n, seed)
            except WeightsMissing as missing:  # the folder was damaged
                await self._recomputation.run(missing)
                offered = await self._engine.generate(prompt, start_node.weights, sampling, n, seed)
        return [option.text for option in offered.options]

    async def wait_until_initialized(self) -> None:
        """Wait until the model is loaded and the session has its initial weights. Raise the error that prevents it."""
        self._engine.allow_loading()
        while not self._state.tree.root.weights:
            self._state.require_open()
            if self._state.error:
                raise self._state.error
            self._work.wake()
            await asyncio.sleep(0.1)

    async def retrain(self, parent: Node, retraining: Retraining, on_progress: Callable[[Progress], None]) -> Learned:
        """Train on a whole log from a node. `add_retrained_node` adds the result to the tree."""
        self._engine.allow_loading()
        try:
            return await self._engine.retrain(parent, retraining, on_progress)
        except WeightsMissing as missing:  # the folder was damaged
            await self._recomputation.run(missing)
            return await self._engine.retrain(parent, retraining, on_progress)

    async def add_retrained_node(self, parent: Node, retraining: Retraining, learned: Learned) -> Node:
        """Add a node that was made beside the session's own steps. The head stays where it is, but for a session that
        was made to hold this node and in which nothing was said yet: it then stands there."""
        return await asyncio.shield(asyncio.ensure_future(self._add_retrained_node(parent, retraining, learned)))

    async def _add_retrained_node(self, parent: Node, retraining: Retraining, learned: Learned) -> Node:
        async with self._state.lock:
            self._state.require_open()
            retraining_json = retraining.model_dump(mode="json")
            node_id = child_id(parent, retraining.fitted, retraining_json)
            if node_id not in self._state.tree.nodes:
                node = Node(
                    id=node_id, session=self._state.id, parent=parent.id, step=parent.step + 1, weights=learned.weights,
                    position=self._state.tree.head.position, answered=None, choice=retraining, metrics=learned.metrics,
                    control=None, shown=None, forward=None, created=time.time(),
                )  # fmt: skip
                await self._store.write(rows.add_node, node_row(node))
                self._state.tree.add(node)
                self._state.publish("node_fitted", node_json(node, self._state.tree))
            node = self._state.tree.nodes[node_id]
            if retraining.kind == "replay" and len(self._state.tree.nodes) == 2 and not self._state.intent:
                node_changes = {parent.id: {"forward": node.id}}
                intent = self._transitions.intent(f"goto-{node.id}", "goto", {"from": parent.id, "to": node.id}, "done")
                await self._transitions.move_head(node, None, node_changes, intent)
                self._work.restart()
            return node

    async def labels(self) -> dict[str, str]:
        """Return a label for each node: its name, or the first words of the answer that led to it."""
        missing = [node for node in self._state.tree.nodes.values() if node.id not in self._labels]
        found = await self._store.read(rows.get_offers, [node.answered for node in missing if node.answered])
        for node in missing:
            self._labels[node.id] = answer_preview(node, found.get(node.answered or ""))
        return self._labels | {node.id: node.name for node in self._state.tree.nodes.values() if node.name}
