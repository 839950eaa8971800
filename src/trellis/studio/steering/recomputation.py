"""Recompute weights that are not on disk, from the log of choices."""

from __future__ import annotations

import asyncio

from ...blobs import Blobs
from ...errors import Conflict, WeightsMissing
from ...messages import Progress  # fmt: skip
from .engine_requests import EngineRequests
from .state import SessionState
from .tree import Node, Retraining


class Recomputation:
    """Recomputes a session's weights from the nearest ones on disk."""

    def __init__(self, weights: Blobs, engine: EngineRequests, state: SessionState) -> None:
        self._weights = weights
        self._engine = engine
        self._state = state

    async def run(self, missing: WeightsMissing) -> None:
        """Recompute weights from the log of choices, starting at the nearest ones on disk."""
        wanted_node = self._state.tree.first_with_weights(missing.weights)
        if wanted_node is None:
            raise missing
        self._engine.allow_loading()
        try:
            for _ in self._state.tree.nodes:
                chain = await asyncio.to_thread(self._nodes_to_recompute, wanted_node)
                try:
                    for finished, node in enumerate(chain):
                        message = f"Recomputing step {node.step}: {finished + 1} of {len(chain)}"
                        self._state.on_load_progress(
                            Progress(stage="regrowing", fraction=finished / len(chain), message=message)
                        )
                        await self._recompute_node(node)
                    return
                except WeightsMissing as also:  # the folder was damaged, and has been discarded
                    missing = also
            raise missing
        finally:
            self._state.on_load_progress(None)

    def _nodes_to_recompute(self, node: Node) -> list[Node]:
        """Return the nodes to recompute, in order, the given one last."""
        chain = [node]
        while chain[-1].parent is not None:
            parent_node = self._state.tree.first_with_weights(self._state.tree.nodes[chain[-1].parent].weights)
            if parent_node is None or parent_node.weights in self._weights:
                break
            chain.append(parent_node)
        return chain[::-1]

    async def _recompute_node(self, node: Node) -> None:
        if node.parent is None:
            self._engine.forget_verification()
            recomputed_weights = await self._engine.init_adapter()
        else:
            if isinstance(node.choice, Retraining):
                parent = self._state.tree.nodes[node.parent]
                learned = await self._engine.retrain(
                    parent, node.choice, self._state.on_load_progress, priority=0
                )  # somebody is waiting
            else:
                learned = await self._engine.learn_again(node)
            recomputed_weights = learned.weights
            if node.metrics and recomputed_weights == node.weights and learned.metrics.drift != node.metrics.drift:
                self._state.publish_notice(
                    f"Step {node.step} was recomputed and differs slightly on this device: weight change "
                    f"{learned.metrics.drift:.6%} instead of {node.metrics.drift:.6%}."
                )
        if recomputed_weights != node.weights:
            raise Conflict(
                f"The weights of step {node.step} are not on disk, and recomputing them gives different ones.",
                code="weights_changed",
                next_step="Go to a step whose weights are on disk. You can branch from there.",
            )
