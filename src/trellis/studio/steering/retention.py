"""Which weights of a session stay on disk, so that it stays bounded. Pure: it decides, and deletes nothing."""

from __future__ import annotations

from ...options import SessionConfig
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
    """The weights that need not stay."""
    return {node.weights for node in tree.nodes.values() if node.weights} - retained_weights(tree, config)
