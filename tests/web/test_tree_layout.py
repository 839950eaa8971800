"""The drawing of a session's tree."""

from __future__ import annotations

from trellis.studio.steering.tree import Node, Tree
from trellis.web.pages.steering.tree_layout import LANE_WIDTH, MARGIN, ROW_HEIGHT, TreeLayout, layout_tree


def node(name: str, parent: str | None, step: int, created: float) -> Node:
    return Node(
        id=name, session="s1", parent=parent, step=step, weights="w", position=step, answered=None,
        choice="none" if parent else None, metrics=None, control=None, shown=None, forward=None, created=created,
    )  # fmt: skip


def tree_of(head: str, *lines: str) -> Tree:
    """A tree from lines of names, each a node and its descendants in the order in which they were made."""
    nodes: dict[str, Node] = {}
    for line in lines:
        first, *rest = line.split()
        parent = nodes.setdefault(first, node(first, None, 0, 0))
        for name in rest:
            parent = nodes[name] = node(name, parent.id, parent.step + 1, len(nodes))
    return Tree(nodes.values(), head)


def shown(layout: TreeLayout) -> list[tuple[str, int]]:
    """(name, lane) of each node from the top."""
    assert [each.y for each in layout.nodes] == [ROW_HEIGHT // 2 + ROW_HEIGHT * row for row in range(len(layout.nodes))]
    return [(each.node.id, (each.x - MARGIN) // LANE_WIDTH) for each in layout.nodes]


def test_a_path_without_branches_is_one_line_with_the_newest_at_the_top() -> None:
    layout = layout_tree(tree_of("b", "root a b c"))
    assert shown(layout) == [("c", 0), ("b", 0), ("a", 0), ("root", 0)]
    assert [each.node.id for each in layout.nodes if each.on_path] == ["b", "a", "root"]
    assert [each.node.id for each in layout.nodes if each.is_head] == ["b"]


def test_five_branches_stand_each_in_one_piece_and_take_no_more_room_than_one() -> None:
    tree = tree_of("e2", "root a1 a2", "root b1 b2", "root c1 c2", "root d1 d2", "root e1 e2")
    layout = layout_tree(tree)
    branches = [(name, 1) for letter in "dcba" for name in (f"{letter}2", f"{letter}1")]
    assert shown(layout) == [("e2", 0), ("e1", 0), *branches, ("root", 0)]
    assert layout.width == layout_tree(tree_of("b1", "root a1", "root b1")).width


def test_a_branch_of_a_branch_stands_beside_it_and_below_what_continues() -> None:
    layout = layout_tree(tree_of("a3", "root a1", "root b1 b2", "b1 c1", "a1 a2 a3"))
    assert shown(layout) == [("a3", 0), ("a2", 0), ("a1", 0), ("c1", 1), ("b2", 2), ("b1", 1), ("root", 0)]


def test_a_stem_leaves_its_parents_lane_just_below_the_child() -> None:
    layout = layout_tree(tree_of("c1", "root a1", "root b1", "root c1"))
    assert shown(layout) == [("c1", 0), ("b1", 1), ("a1", 1), ("root", 0)]
    lines = {edge.path for edge in layout.edges}
    assert f"M13 {ROW_HEIGHT * 7 // 2}V{ROW_HEIGHT // 2}" in lines
    assert any(line.startswith(f"M13 {ROW_HEIGHT * 7 // 2}V{ROW_HEIGHT * 5 // 2}C") for line in lines)  # to b1, past a1
    assert layout.edges[-1].on_path


def test_a_long_tree_hides_what_is_far_from_the_head_and_draws_the_rest_connected() -> None:
    tree = tree_of("n5", "root " + " ".join(f"n{number}" for number in range(1000)))
    layout = layout_tree(tree, 30)
    assert layout.hidden_count == 1001 - len(layout.nodes)
    assert {"root", "n5", "n999"} <= {each.node.id for each in layout.nodes}
    assert len(layout.edges) == len(layout.nodes) - 1
    assert len(layout_tree(tree).nodes) == 1001
