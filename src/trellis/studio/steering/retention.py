"""Which weights of a session stay on disk, so that it stays bounded. Pure: it decides, and deletes nothing."""

from __future__ import annotations

from ...params import SessionConfig
from .tree import Fitted, Tree


def kept(tree: Tree, config: SessionConfig) -> set[str]:
    """The weights to keep: the root's, those of the last `max_undos` steps to the head, of every step that is a
    multiple of `checkpoint_interval` on any branch, of what was fitted to a whole log (it takes long to make again),
    and of every node that a person gave a name.

    All others can be worked out again from these, with fewer than `checkpoint_interval` steps each.
    """
    keep = {tree.root.weights}
    recent: list[str] = []
    for node in reversed(tree.path(tree.head_id)):
        if node.weights not in recent:
            recent.append(node.weights)
        if len(recent) > config.max_undos:
            break
    keep.update(recent)
    for node in tree.nodes.values():
        checkpoint = node.learned and node.step % config.checkpoint_interval == 0
        if node.name or checkpoint or isinstance(node.choice, Fitted):
            keep.add(node.weights)
    return keep


def prunable(tree: Tree, config: SessionConfig) -> set[str]:
    """The weights that need not stay."""
    return {node.weights for node in tree.nodes.values() if node.weights} - kept(tree, config)
