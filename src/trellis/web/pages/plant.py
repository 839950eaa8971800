"""Where the nodes of a tree stand when it is drawn like a plant: rows and lanes, numbers only."""

from __future__ import annotations

import math
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
    hidden: int = 0


def grow(tree: Tree, most: int | None = None) -> Plant:
    """Lay a tree out: a child stands above its parent, each branch in a lane of its own, the newest at the top.

    Of a tree with more than `most` nodes the long stretches are left out: what stays are the newest, those around
    the head, the root, and all that have a name or where branches part. A node stands above its nearest ancestor.
    """
    order = sorted(tree.nodes.values(), key=lambda node: (-node.created, -node.step))
    total = len(order)
    if most is not None and total > most:
        order = _worth_showing(tree, order, most)
    rows = {node.id: row for row, node in enumerate(order)}
    lanes = _lanes(tree)
    path = {node.id for node in tree.path(tree.head_id)}
    at = {node.id: (EDGE + lanes[node.id] * LANE, ROW // 2 + rows[node.id] * ROW) for node in order}
    leaves = [Leaf(node, *at[node.id], node.id in path, node.id == tree.head_id) for node in order]
    stems = []
    for node in order:
        parent = node.parent
        while parent is not None and parent not in at:
            parent = tree.nodes[parent].parent
        if parent is not None:
            stems.append(Stem(_stem(at[parent], at[node.id]), node.id in path))
    stems.sort(key=lambda stem: stem.on_path)  # the way to the head is drawn over the others
    widest = max(lanes[node.id] for node in order)
    return Plant(leaves, stems, 2 * EDGE + widest * LANE, len(order) * ROW, total - len(order))


def _worth_showing(tree: Tree, order: list[Node], most: int) -> list[Node]:
    """The nodes to show, in their order: never more than twice `most`."""
    wanted = [node.id for node in reversed(tree.path(tree.head_id))][: most // 3]
    wanted += [node.id for node in order if node.name][: most // 3]
    wanted += [node.id for node in order if len(tree.children(node.id)) > 1][: most // 3]
    wanted += [tree.root.id, *(node.id for node in order[: most // 2])]
    shown = set(wanted)
    return [node for node in order if node.id in shown]


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


@dataclass(frozen=True)
class Mark:
    """A label on an axis, and where it stands: per cent of the way along it."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A curve with its axes, in a box of 100 by 100: `line` for a polyline, marks on both axes (the values' from the
    bottom), and each drawn point with its step and value."""

    title: str
    unit: str
    latest: str
    line: str = ""
    values: tuple[Mark, ...] = ()
    steps: tuple[Mark, ...] = ()
    points: tuple[tuple[int, str, float, float], ...] = ()
    """(step, value as it is read, per cent from the left, per cent from the top)"""

    @property
    def told(self) -> str:
        """The curve in words."""
        first, last = self.points[0], self.points[-1]
        return f"{self.title}: {first[1]}{self.unit} at step {first[0]}, {last[1]}{self.unit} at step {last[0]}"


def chart(title: str, unit: str, values: list[tuple[int, float]], most: int = 400) -> Chart:
    """A chart of (step, value) pairs; at most `most` points are drawn, the last among them."""
    if len(values) < 2:
        return Chart(title, unit, f"{values[0][1]:.3g}" if values else "–")
    stride = -(-len(values) // most)
    kept = [*values[::stride][:-1], values[-1]] if stride > 1 else values
    ticks = ticks_over(min(0.0, *(value for _, value in values)), max(0.0, *(value for _, value in values)))
    low, high = ticks[0], ticks[-1]
    first, last = values[0][0], max(values[-1][0], values[0][0] + 1)
    points = tuple(
        (
            step, f"{value:.3g}", round(100 * (step - first) / (last - first), 2),
            round(100 - 100 * (value - low) / (high - low), 2),
        )
        for step, value in kept
    )  # fmt: skip
    marked = [first, (first + last) // 2, last] if (last - first) % 2 == 0 else [first, last]
    return Chart(
        title, unit, f"{values[-1][1]:.3g}",
        line=" ".join(f"{x},{y}" for _, _, x, y in points),
        values=tuple(Mark(round(100 * (tick - low) / (high - low), 2), f"{tick:.6g}") for tick in ticks),
        steps=tuple(Mark(round(100 * (step - first) / (last - first), 2), str(step)) for step in marked),
        points=points,
    )  # fmt: skip


def ticks_over(low: float, high: float) -> list[float]:
    """Two to six round numbers from at or below `low` to at or above `high`, evenly apart."""
    span = high - low
    if span < 1e-12:  # a curve that never left the axis
        return [low, low + 1.0]
    size = 10.0 ** math.floor(math.log10(span / 2))
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if span / step <= 4)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(start, max(end, start + 1) + 1)]
