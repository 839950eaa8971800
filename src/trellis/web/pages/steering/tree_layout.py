"""The layout of a session's tree, and of its charts: rows, lanes and points, numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ....studio.steering import Node, Tree

ROW_HEIGHT, LANE_WIDTH, MARGIN = 34, 18, 13
"""Pixels: height of a row, width of a lane, distance of the first lane from the edge."""


@dataclass(frozen=True)
class NodePosition:
    node: Node
    x: int
    y: int
    on_path: bool
    is_head: bool


@dataclass(frozen=True)
class EdgePath:
    path: str
    on_path: bool


@dataclass(frozen=True)
class TreeLayout:
    """Nodes from top to bottom, where the root is, and the edges between them."""

    nodes: list[NodePosition]
    edges: list[EdgePath]
    width: int
    height: int
    hidden_count: int = 0


def layout_tree(tree: Tree, max_nodes: int | None = None) -> TreeLayout:
    """Lay out a tree: children above their parent, the newest node at the top.

    Of a node's children, the one with the newest descendant continues in its lane. The others are branches: each is
    drawn in one piece between the two, one lane to the right, so that the width follows how deep branches are nested
    and not how many there are.

    Of a tree with more than `max_nodes` nodes, show the newest, those around the head, the root, those with a name and
    those with several children. A node then stands above its nearest ancestor that is shown.
    """
    order = sorted(tree.nodes.values(), key=lambda node: (-node.created, -node.step))
    total = len(order)
    if max_nodes is not None and total > max_nodes:
        order = _select_nodes(tree, order, max_nodes)
    children: dict[str, list[Node]] = {node.id: [] for node in order}
    newest = {node.id: rank for rank, node in enumerate(order)}  # 0 is the newest
    for node in order:  # children come before their parents
        parent = node.parent
        while parent is not None and parent not in children:
            parent = tree.nodes[parent].parent
        if parent is not None:
            children[parent].append(node)
            newest[parent] = min(newest[parent], newest[node.id])
    path = {node.id for node in tree.path(tree.head_id)}
    nodes: list[NodePosition] = []
    edges: list[EdgePath] = []
    widest = 0
    waiting: list[tuple[Node, int, tuple[int, int] | None]] = [(tree.root, 0, None)]
    while waiting:
        node, lane, below = waiting.pop()
        position = (MARGIN + lane * LANE_WIDTH, (len(order) - len(nodes)) * ROW_HEIGHT - ROW_HEIGHT // 2)
        nodes.append(NodePosition(node, *position, node.id in path, node.id == tree.head_id))
        if below:
            edges.append(EdgePath(_edge_path(below, position), node.id in path))
        widest = max(widest, lane)
        branches = sorted(children[node.id], key=lambda child: newest[child.id])
        waiting += [(child, lane + (place > 0), position) for place, child in enumerate(branches)]
    edges.sort(key=lambda stem: stem.on_path)  # the path to the head is drawn over the others
    return TreeLayout(nodes[::-1], edges, 2 * MARGIN + widest * LANE_WIDTH, len(order) * ROW_HEIGHT, total - len(order))


def _select_nodes(tree: Tree, order: list[Node], max_nodes: int) -> list[Node]:
    """Return the nodes to show, in order: at most twice `max_nodes`."""
    wanted = [node.id for node in reversed(tree.path(tree.head_id))][: max_nodes // 3]
    wanted += [node.id for node in order if node.name][: max_nodes // 3]
    wanted += [node.id for node in order if len(tree.children(node.id)) > 1][: max_nodes // 3]
    wanted += [tree.root.id, *(node.id for node in order[: max_nodes // 2])]
    shown = set(wanted)
    return [node for node in order if node.id in shown]


def _edge_path(parent: tuple[int, int], child: tuple[int, int]) -> str:
    """A line up the parent's lane, and into the child's just below it."""
    (x0, y0), (x1, y1) = parent, child
    if x0 == x1:
        return f"M{x0} {y0}V{y1}"
    middle = y1 + ROW_HEIGHT // 2
    return f"M{x0} {y0}V{y1 + ROW_HEIGHT}C{x0} {middle} {x1} {middle} {x1} {y1}"


def polyline_points(values: list[float], width: int, height: int) -> str:
    """The points of a polyline through values from 0 to their maximum (at least 1 %), left to right."""
    if len(values) < 2:
        return ""
    top = max(*values, 0.01)
    step = width / (len(values) - 1)
    return " ".join(f"{i * step:.1f},{height - 2 - value / top * (height - 4):.1f}" for i, value in enumerate(values))


@dataclass(frozen=True)
class Tick:
    """A label on an axis, and its position in per cent of the length."""

    percent: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A curve with its axes, in a box of 100 by 100: `line` for a polyline, marks on both axes (the values' from the
    bottom), and each drawn point with its step and value."""

    title: str
    unit: str
    latest: str
    line: str = ""
    value_ticks: tuple[Tick, ...] = ()
    step_ticks: tuple[Tick, ...] = ()
    points: tuple[tuple[int, str, float, float], ...] = ()
    """(step, value as it is read, per cent from the left, per cent from the top)"""

    @property
    def description(self) -> str:
        """A description of the curve for screen readers."""
        first, last = self.points[0], self.points[-1]
        return f"{self.title}: {first[1]}{self.unit} at step {first[0]}, {last[1]}{self.unit} at step {last[0]}"


def make_chart(title: str, unit: str, values: list[tuple[int, float]], max_points: int = 400) -> Chart:
    """Return a chart of (step, value) pairs with at most `max_points` points, the last one included."""
    if len(values) < 2:
        return Chart(title, unit, f"{values[0][1]:.3g}" if values else "–")
    stride = -(-len(values) // max_points)
    kept = [*values[::stride][:-1], values[-1]] if stride > 1 else values
    ticks = axis_ticks(min(0.0, *(value for _, value in values)), max(0.0, *(value for _, value in values)))
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
        value_ticks=tuple(Tick(round(100 * (tick - low) / (high - low), 2), f"{tick:.6g}") for tick in ticks),
        step_ticks=tuple(Tick(round(100 * (step - first) / (last - first), 2), str(step)) for step in marked),
        points=points,
    )  # fmt: skip


def axis_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers from at or below `low` to at or above `high`, evenly apart."""
    span = high - low
    if span < 1e-12:  # a curve that never left the axis
        return [low, low + 1.0]
    size = 10.0 ** math.floor(math.log10(span / 2))
    step = next(step for step in (size, 2 * size, 5 * size, 10 * size) if span / step <= 4)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(start, max(end, start + 1) + 1)]
