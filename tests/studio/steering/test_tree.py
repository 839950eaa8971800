"""Laws of the tree: whatever a person does, nothing is lost and every move has a way back."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from trellis.options import Dataset, SessionConfig
from trellis.studio.datasets.datasets import Prompts
from trellis.studio.datasets.shuffling import shuffled_index
from trellis.studio.steering.tree import Node, Tree, child_id, choices_to_replay, offer_id, offer_seed, root_id
from trellis.web.pages.steering.tree_layout import layout_tree, polyline_points


def node(name: str, parent: Node | None, choice: int | str | None = 0) -> Node:
    return Node(
        id=name, session="s", parent=parent.id if parent else None,
        step=parent.step + (choice != "skip") if parent else 0, weights=f"w{name}",
        position=parent.position + 1 if parent else 0, answered=f"o{name}" if parent else None,
        choice=choice if parent else None, metrics=None, control=None, shown=None, forward=None,
        created=float(parent.created + 1) if parent else 0.0,
    )  # type: ignore[arg-type]  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Any tree: each node hangs on one that was there before."""
    nodes = [node("n0", None)]
    for number in range(1, draw(st.integers(1, 30))):
        parent = nodes[draw(st.integers(0, len(nodes) - 1))]
        nodes.append(node(f"n{number}", parent, draw(st.sampled_from([0, 1, "none", "skip"]))))
    return Tree(nodes, nodes[draw(st.integers(0, len(nodes) - 1))].id)


@given(trees())
def test_a_path_leads_from_the_root_along_children(tree: Tree) -> None:
    path = tree.path(tree.head_id)
    assert path[0] is tree.root
    assert path[-1] is tree.head
    for upper, lower in pairwise(path):
        assert lower in tree.children(upper.id)


@given(trees())
def test_undo_and_redo_are_each_others_inverse(tree: Tree) -> None:
    start = tree.head_id
    steps = 0
    while (target := tree.undo_target) is not None:
        tree.update(target.id, forward=tree.head_id)
        tree.head_id = target.id
        steps += 1
    for _ in range(steps):
        assert tree.redo_target is not None
        tree.head_id = tree.redo_target.id
    assert tree.head_id == start


@given(trees())
def test_a_drawn_plant_has_every_node_in_a_place_of_its_own_above_its_parent(tree: Tree) -> None:
    plant = layout_tree(tree)
    places = {leaf.node.id: (leaf.x, leaf.y) for leaf in plant.nodes}
    assert set(places) == set(tree.nodes)
    assert len({y for _, y in places.values()}) == len(places)
    for leaf in plant.nodes:
        assert 0 < leaf.x < plant.width
        assert 0 < leaf.y < plant.height
        if leaf.node.parent:
            assert places[leaf.node.parent][1] > leaf.y
    assert len(plant.edges) == len(tree.nodes) - 1
    assert sum(leaf.is_head for leaf in plant.nodes) == 1


@given(trees())
def test_no_edge_runs_through_another_node(tree: Tree) -> None:
    """An edge stays in its parent's lane until it is just below the child."""
    placed = {each.node.id: each for each in layout_tree(tree).nodes}
    for child in placed.values():
        if child.node.parent is not None:
            parent = placed[child.node.parent]
            between = [each for each in placed.values() if child.y < each.y < parent.y]
            assert parent.x not in {each.x for each in between}


@given(trees(), st.integers(0, 8))
def test_replay_draws_earlier_choices_of_this_branch_the_same_each_time(tree: Tree, count: int) -> None:
    config = SessionConfig(replay=count)
    path = tree.path(tree.head_id)
    drawn = choices_to_replay(config, path)
    assert choices_to_replay(config, path) == drawn
    fit = [(step, 0) for step in path if step.has_learned and step.choice != "none"]
    assert all(earlier in fit for earlier in drawn)
    assert len(drawn) == len(set(drawn)) == min(count, len(fit))


@given(st.integers(0, 10**6), st.integers(1, 200), st.integers(0, 5))
def test_every_prompt_comes_once_in_each_round(seed: int, total: int, round_number: int) -> None:
    prompts = Prompts(range(total), Dataset(), seed)  # type: ignore[arg-type]
    start = round_number * total
    assert sorted(prompts.at(start + place) for place in range(total)) == list(range(total))  # type: ignore[type-var]


@given(st.integers(0, 2**63), st.integers(1, 3000))
def test_a_permutation_takes_every_place_once(seed: int, total: int) -> None:
    assert sorted(shuffled_index(place, total, seed) for place in range(total)) == list(range(total))


def test_a_million_prompts_are_shuffled_without_a_list() -> None:
    places = [shuffled_index(place, 1_000_000, 7) for place in range(1000)]
    assert len(set(places)) == 1000
    assert min(places) < 10_000
    assert max(places) > 990_000


def test_unshuffled_prompts_keep_their_order() -> None:
    prompts = Prompts(["a", "b", "c"], Dataset(shuffle=False), 5)
    assert [prompts.at(place) for place in range(5)] == ["a", "b", "c", "a", "b"]


def test_names_follow_from_what_they_name() -> None:
    config, root = SessionConfig(seed=1), node("n0", None)
    assert root_id("a") != root_id("b")
    assert child_id(root, "o", 0) != child_id(root, "o", 1) != child_id(root, "p", 1)
    assert offer_id(root, 0, "x") != offer_id(root, 1, "x")
    seeds = {offer_seed(config, root, number, prompt) for number in range(3) for prompt in ("x", "y")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_owe_nothing_to_global_state() -> None:
    config, root = SessionConfig(seed=1), node("n0", None)
    random.seed(1)
    first = offer_seed(config, root, 0, "x"), shuffled_index(7, 50, 1)
    random.seed(2)
    assert (offer_seed(config, root, 0, "x"), shuffled_index(7, 50, 1)) == first


def test_a_curve_needs_two_points_and_stays_in_its_box() -> None:
    assert polyline_points([0.5], 200, 40) == ""
    points = [tuple(map(float, point.split(","))) for point in polyline_points([0.0, 0.3, 0.1], 200, 40).split()]
    assert [x for x, _ in points] == [0.0, 100.0, 200.0]
    assert all(0 <= y <= 40 for _, y in points)
