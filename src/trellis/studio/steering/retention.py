"""Decide which weights of a session stay on disk, and prune the others."""

from __future__ import annotations

import asyncio
from collections import Counter

from ...blobs import Blobs
from ...options import SessionConfig
from ...store import steering as rows
from ...store.store import Store
from .state import SessionState
from .tree import Retraining, Tree


def retained_weights(tree: Tree, config: SessionConfig) -> set[str]:
    """The weights to keep: the root's, those of the last `max_undos` steps to the head, of every step that is a
    multiple of `checkpoint_interval` on any branch, of what was fitted to a whole log (it takes long to make again),
    and of every node that a person gave a name.

    All others can be worked out again from these, with fewer than `checkpoint_interval` steps each.
    """
    retained = {tree.root.weights}
    recent_weights: list[str] = []
    for node in reversed(tree.path(tree.head_id)):
        if node.weights not in recent_weights:
            recent_weights.append(node.weights)
        if len(recent_weights) > config.max_undos:
            break
    retained.update(recent_weights)
    for node in tree.nodes.values():
        is_checkpoint = node.has_learned and node.step % config.checkpoint_interval == 0
        if node.name or is_checkpoint or isinstance(node.choice, Retraining):
            retained.add(node.weights)
    return retained


def prunable_weights(tree: Tree, config: SessionConfig) -> set[str]:
    """Return the weights that may be deleted."""
    return {node.weights for node in tree.nodes.values() if node.weights} - retained_weights(tree, config)


class RetainedWeights:
    """Prunes a session's weights."""

    def __init__(self, store: Store, weights: Blobs, state: SessionState) -> None:
        self._store = store
        self._weights = weights
        self._state = state
        self.pinned: Counter[str] = Counter()
        """Number of current holders of each set of weights."""

    async def prune(self) -> None:
        """Prune weights that need not stay and that no other session names."""
        prunable_now = prunable_weights(self._state.tree, self._state.config) - set(+self.pinned)
        prunable_on_disk = [weights for weights in prunable_now if weights in self._weights]
        if prunable_on_disk:
            used_elsewhere = await self._store.read(rows.weights_in_other_sessions, self._state.id, prunable_on_disk)
            for weights in set(prunable_on_disk) - used_elsewhere:
                await asyncio.to_thread(self._weights.discard, weights)
