"""The disk stays bounded: what is kept, what is worked out again, and that nobody's weights are taken away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import open_studio, ready, until
from trellis.messages import Metrics
from trellis.options import SessionConfig
from trellis.studio.steering.retention import prunable_weights, retained_weights
from trellis.studio.steering.session import Session
from trellis.studio.steering.tree import Node, Tree
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio

METRICS = Metrics(loss=1, kl=0, share_before=0.2, share_after=0.6, drift=0.01, inner_steps=4, seconds=0.1)


def node(name: str, parent: Node | None, choice: Any = 0) -> Node:
    learned = choice not in (None, "skip")
    return Node(
        id=name, session="s", parent=parent.id if parent else None, step=(parent.step if parent else 0) + learned,
        weights=f"w{name}" if learned or parent is None else parent.weights, position=0, answered="o", choice=choice,
        metrics=METRICS if learned else None, control=None, shown=None, forward=None, created=float(len(name)),
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 60), st.sampled_from([0, "none", "skip"])), max_size=60), st.data())
def test_from_any_node_few_steps_lead_to_what_is_kept(moves: list[tuple[int, Any]], data: st.DataObject) -> None:
    config = SessionConfig(max_undos=data.draw(st.integers(1, 9)), checkpoint_interval=data.draw(st.integers(1, 9)))
    nodes = [node("0", None, None)]
    for number, (at, choice) in enumerate(moves, 1):
        nodes.append(node(str(number), nodes[at % len(nodes)], choice))
    tree = Tree(nodes, data.draw(st.sampled_from(nodes)).id)
    keep = retained_weights(tree, config)
    assert keep | prunable_weights(tree, config) == {each.weights for each in nodes}
    assert not keep & prunable_weights(tree, config)
    assert {tree.root.weights, tree.head.weights} <= keep
    for each in nodes:
        steps = {
            one.weights for one in reversed(tree.path(each.id)) if one.step > each.step - config.checkpoint_interval
        }
        assert each.step < config.checkpoint_interval or steps & keep, "going back costs fewer steps than the interval"


def test_a_step_with_a_name_is_kept() -> None:
    nodes = [node("0", None, None)]
    for number in range(1, 20):
        nodes.append(node(str(number), nodes[-1]))
    tree = Tree(nodes, "19")
    config = SessionConfig(max_undos=1, checkpoint_interval=1000)
    assert "w7" in prunable_weights(tree, config)
    tree.update("7", name="The good one")
    assert "w7" not in prunable_weights(tree, config)


async def choose(session: Session, count: int) -> None:
    for number in range(count):
        offer = (await ready(session))["offer"]["id"]
        await session.commands.choose(offer, number % 4, f"r{session.tree.head.step}-{number}")
        await until(lambda offer=offer: session.status == "ready" and session.offer and session.offer.id != offer)
    await until(lambda: not session.work.is_running)  # weights are written behind the click


KEEP = {"max_undos": 2, "checkpoint_interval": 4, "control_prompt": ""}


def on_disk(root: Path) -> set[str]:
    return {folder.name for folder in (root / "weights").iterdir() if not folder.name.startswith(".")}


async def test_old_weights_go_and_come_back_with_progress(tmp_path: Path, studio: Studio) -> None:
    session = await studio.steering.create(None, KEEP)
    await choose(session, 11)
    path = session.tree.path(session.tree.head_id)
    held = {each.weights for each in path if each.weights in on_disk(tmp_path)}
    assert held == {path[step].weights for step in (0, 4, 8, 9, 10, 11)}
    texts = session.offer and session.offer.texts
    target = path[7]
    told: list[str] = []
    watching = studio.hub.subscribe(session.topic, studio.hub.last_event_id(session.topic), lambda: ("state", {}))
    await session.commands.go_to(target.id, "back")
    await until(lambda: session.status == "ready" and target.weights in on_disk(tmp_path))
    async for event in watching:
        if event.name == "load_progress":
            told.append(event.data["message"])
        if len(told) == 3:
            break
    assert told == [f"Recomputing step {step}: {step - 4} of 3" for step in (5, 6, 7)]
    await until(lambda: path[10].weights not in on_disk(tmp_path))  # the window of kept steps moves with the head
    await session.commands.go_to(path[-1].id, "forth")
    assert (await ready(session))["head"]["step"] == 11
    assert session.offer is not None
    assert session.offer.texts == texts


async def test_weights_that_another_session_names_stay(tmp_path: Path, studio: Studio) -> None:
    one = await studio.steering.create(None, KEEP | {"max_undos": 100})
    two = await studio.steering.create(None, KEEP)
    for session in (one, two):
        await choose(session, 7)
    shared = [each.weights for each in one.tree.path(one.tree.head_id)]
    assert shared == [each.weights for each in two.tree.path(two.tree.head_id)]
    assert set(shared) <= on_disk(tmp_path)


async def test_a_pruned_step_can_be_asked_and_compared(tmp_path: Path, studio: Studio) -> None:
    session = await studio.steering.create(None, KEEP)
    await choose(session, 7)
    path = session.tree.path(session.tree.head_id)
    assert path[2].weights not in on_disk(tmp_path)
    assert await studio.steering.sample(session.id, "What is rain?", path[2].id, 1, {})
    job = await studio.comparisons.start(session.id, path[1].id, path[3].id, ["Why?", "What is rain?"])
    await until(lambda: job.row["state"] == "done")
    assert [one["prompt"] for one in job.row["result"]["rounds"]] == ["Why?", "What is rain?"]
    assert job.row["result"]["left"]["step"] == 1


async def test_the_same_node_compared_with_itself_says_the_same(studio: Studio) -> None:
    session = await studio.steering.create(None, KEEP)
    await choose(session, 1)
    head = session.tree.head_id
    job = await studio.comparisons.start(session.id, head, head, ["Why?"])
    await until(lambda: job.row["state"] == "done")
    (one,) = job.row["result"]["rounds"]
    assert one["left"] == one["right"]


@pytest.mark.slow
async def test_a_session_of_many_steps_stays_bounded_on_disk_and_on_the_page(tmp_path: Path, fake_spawn: Spawn) -> None:
    from trellis.web.pages.steering.tree_layout import layout_tree

    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {"control_prompt": "", "max_new_tokens": 2, "inner_steps": 1})
        await choose(session, 150)
        assert len(on_disk(tmp_path)) <= 1 + 32 + 150 // 8 + 1
        plant = layout_tree(session.tree, 60)
        assert len(plant.nodes) + plant.hidden_count == 151
        assert len(plant.nodes) <= 120
        assert plant.nodes[0].is_head
        assert plant.nodes[-1].node.parent is None
        assert len(plant.edges) == len(plant.nodes) - 1


async def test_weights_that_are_being_taken_away_are_not_pruned(tmp_path: Path, studio: Studio) -> None:
    session = await studio.steering.create(None, KEEP)
    await choose(session, 7)
    old = session.tree.path(session.tree.head_id)[2]
    assert old.weights not in on_disk(tmp_path)
    async with session.nodes.hold_weights(old):
        assert old.weights in on_disk(tmp_path)
        await choose(session, 2)
        assert old.weights in on_disk(tmp_path)
    await choose(session, 1)
    assert old.weights not in on_disk(tmp_path)


async def test_a_model_unloaded_by_hand_comes_back_when_a_person_asks(studio: Studio) -> None:
    session = await studio.steering.create(None, KEEP)
    await choose(session, 1)
    await studio.models.unload("demo")
    assert await studio.steering.sample(session.id, "Why?", None, 1, {})
