"""The tree of a session: nodes that are only added, a head that moves. Pure: no store, no engine, no clock."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pydantic import TypeAdapter

from ...messages import CHOICE, Choice, Message, Metrics, derived_seed, recipe_id
from ...options import SessionConfig

RetrainingKind = Literal["refit", "import", "replay"]


class Retraining(Message):
    """How a node came about that learned from a whole log instead of from one choice.

    `fitted` names the log; its first `teaching` lessons are the ones that are not refusals. `source` is the node or
    the file that the log was taken from.
    """

    fitted: str
    kind: RetrainingKind
    lessons: int
    teaching: int
    epochs: int
    source: str = ""


NODE_CHOICE: TypeAdapter[Choice | Retraining] = TypeAdapter(Choice | Retraining)


@dataclass(frozen=True)
class Node:
    """A state that was reached: its weights, and the prompt that comes next.

    `answered` is the offer and `choice` what was said of it to get here from the parent. `shown` is the
    offer that was last on the screen here, `forward` the child that redo goes to.
    """

    id: str
    session: str
    parent: str | None
    step: int
    weights: str
    position: int
    answered: str | None
    choice: Choice | Retraining | None
    metrics: Metrics | None
    control: str | None
    shown: str | None
    forward: str | None
    created: float
    name: str | None = None

    @property
    def has_learned(self) -> bool:
        """Whether the step to this node made weights; a skip does not."""
        return self.choice is not None and self.choice != "skip"


class Tree:
    """All nodes of one session, and its head."""

    def __init__(self, nodes: Iterable[Node], head: str) -> None:
        self.nodes: dict[str, Node] = {}
        self._children: dict[str | None, list[str]] = {}
        for node in nodes:
            self.add(node)
        self.head_id = head

    @property
    def head(self) -> Node:
        return self.nodes[self.head_id]

    @property
    def root(self) -> Node:
        return self.nodes[self._children[None][0]]

    @property
    def undo_target(self) -> Node | None:
        """The node that undo leads to."""
        return self.nodes[self.head.parent] if self.head.parent else None

    @property
    def redo_target(self) -> Node | None:
        """The node that redo leads to: the child that was last the head."""
        return self.nodes[self.head.forward] if self.head.forward else None

    def add(self, node: Node) -> None:
        """Add a node."""
        if node.id not in self.nodes:
            self._children.setdefault(node.parent, []).append(node.id)
        self.nodes[node.id] = node

    def update(self, node_id: str, **changes: Any) -> Node:
        """Replace fields of a node."""
        node = replace(self.nodes[node_id], **changes)
        self.nodes[node_id] = node
        return node

    def children(self, node_id: str) -> list[Node]:
        """Oldest first."""
        return [self.nodes[child] for child in self._children.get(node_id, [])]

    def path(self, node_id: str) -> list[Node]:
        """Return the nodes from the root to a node, both included."""
        path = []
        current_id: str | None = node_id
        while current_id is not None:
            path.append(self.nodes[current_id])
            current_id = self.nodes[current_id].parent
        return path[::-1]

    def first_with_weights(self, weights: str) -> Node | None:
        """Return the first node that made these weights."""
        return next((node for node in self.nodes.values() if node.weights == weights), None)


def choice_json(node: Node) -> Any:
    """Return the choice of a node as JSON."""
    return None if node.choice is None else NODE_CHOICE.dump_python(node.choice, mode="json")


def node_row(node: Node) -> dict[str, Any]:
    row = asdict(node)
    row["choice"] = choice_json(node)
    row["metrics"] = node.metrics.model_dump() if node.metrics else None
    return row


def node_from_row(row: dict[str, Any]) -> Node:
    choice = None if row["choice"] is None else NODE_CHOICE.validate_python(row["choice"])
    metrics = None if row["metrics"] is None else Metrics.model_validate(row["metrics"])
    return Node(**(row | {"choice": choice, "metrics": metrics}))


def node_json(node: Node, tree: Tree) -> dict[str, Any]:
    """Return a node as the event `node_added` has it."""
    return {
        "node": node.id,
        "parent": node.parent,
        "step": node.step,
        "weights": node.weights,
        "choice": choice_json(node),
        "metrics": node.metrics.model_dump() if node.metrics else None,
        "drift": drift_of(node, tree),
        "name": node.name,
    }


def drift_of(node: Node, tree: Tree) -> float:
    """Return the drift of a node's weights; a skip has its parent's, the root has none."""
    while node.metrics is None and node.parent is not None:
        node = tree.nodes[node.parent]
    return node.metrics.drift if node.metrics else 0.0


def step_name(step: int) -> str:
    return f"Step {step}" if step else "Base model"


def root_id(session: str) -> str:
    return recipe_id("n", [session, "root"])


def child_id(parent: Node, offer: str, choice: Any) -> str:
    """Return the id of the node that a choice leads to: the same choice of the same offer is the same node."""
    return recipe_id("n", [parent.id, offer, choice])


def child_id_for_choice(parent: Node, offer: str, choice: Choice) -> str:
    """Return the id of the node that a choice leads to, whether it exists or not."""
    return child_id(parent, offer, CHOICE.dump_python(choice, mode="json"))


def offer_id(node: Node, number: int, prompt: str) -> str:
    return recipe_id("o", [node.id, number, prompt])


def offer_seed(config: SessionConfig, node: Node, number: int, prompt: str) -> int:
    """Return an offer's seed, from the session's seed, the weights, the prompt and the number of offers."""
    return derived_seed("offer", config.seed, node.weights, prompt, number)


def choices_to_replay(config: SessionConfig, path: list[Node]) -> list[tuple[Node, int]]:
    """Which earlier choices of a branch are learned again beside the next one: drawn from the log, not from the clock.

    `path` ends in the node whose weights are learned from. Each is a node and the number of a lesson of the log that
    it was fitted to, 0 for a choice of its own. The same path draws the same choices. What was refused as a whole is
    not learned again: repeated, it only wears the model down.
    """
    earlier = [
        (node, number)
        for node in path
        if node.has_learned and node.choice != "none"
        for number in range(node.choice.teaching if isinstance(node.choice, Retraining) else 1)
    ]
    count = min(config.replay, len(earlier))
    return random.Random(derived_seed("replay", config.seed, path[-1].weights)).sample(earlier, count)
