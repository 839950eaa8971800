"""Where the nodes of a tree stand when it is drawn like a plant: rows and lanes, numbers only."""

from __future__ import annotations

from dataclasses import dataclass

from ...studio.tree import Node, Tree

ROW, LANE, EDGE = 34, 18, 13
"""Pixels: height of a row, width of a lane, distance of the first lane from the edge."""


@dataclass(frozen=True)
class Leaf:
    node: Node
    x: int
    y: int
    on_path: bool
    is_head: bool


@dataclass(frozen=True)
class Stem:
    path: str
    on_path: bool


@dataclass(frozen=True)
class Plant:
    """Leaves from the newest (top) to the root (bottom), and the stems between them."""

    leaves: list[Leaf]
    stems: list[Stem]
    width: int
    height: int


def grow(tree: Tree) -> Plant:
    """Lay a tree out: a child stands above its parent, each branch in a lane of its own, the newest at the top."""
    order = sorted(tree.nodes.values(), key=lambda node: (-node.created, -node.step))
    rows = {node.id: row for row, node in enumerate(order)}
    lanes = _lanes(tree)
    path = {node.id for node in tree.path(tree.head_id)}
    at = {node.id: (EDGE + lanes[node.id] * LANE, ROW // 2 + rows[node.id] * ROW) for node in order}
    leaves = [Leaf(node, *at[node.id], node.id in path, node.id == tree.head_id) for node in order]
    stems = [Stem(_stem(at[node.parent], at[node.id]), node.id in path) for node in order if node.parent is not None]
    stems.sort(key=lambda stem: stem.on_path)  # the way to the head is drawn over the others
    return Plant(leaves, stems, 2 * EDGE + max(lanes.values()) * LANE, len(order) * ROW)


def _lanes(tree: Tree) -> dict[str, int]:
    """The first child goes on in its parent's lane, each other one opens the next lane that was never used."""
    lanes: dict[str, int] = {}
    used = 0
    waiting = [(tree.root.id, 0)]
    while waiting:
        node_id, lane = waiting.pop()
        lanes[node_id] = lane
        children = tree.children(node_id)
        for child in children[1:]:
            used += 1
            waiting.append((child.id, used))
        if children:
            waiting.append((children[0].id, lane))
    return lanes


def _stem(parent: tuple[int, int], child: tuple[int, int]) -> str:
    (x0, y0), (x1, y1) = parent, child
    if x0 == x1:
        return f"M{x0} {y0}V{y1}"
    bend = y0 - ROW
    return f"M{x0} {y0}C{x0} {y0 - ROW // 2} {x1} {y0 - ROW // 2} {x1} {bend}V{y1}"


def curve(values: list[float], width: int, height: int) -> str:
    """The points of a polyline through values from 0 to their maximum (at least 1 %), left to right."""
    if len(values) < 2:
        return ""
    top = max(*values, 0.01)
    step = width / (len(values) - 1)
    return " ".join(f"{i * step:.1f},{height - 2 - value / top * (height - 4):.1f}" for i, value in enumerate(values))
