"""The history of a branch in sentences: each choice, what it did, and where it led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...messages import Ranking, Written
from ...store import steering as rows
from ...store.store import Store
from ..steering.offer import first_words
from ..steering.session import Session
from ..steering.tree import Fitted, Node, drift_of
from .journal import LETTERS

LEARNED = {
    "refit": "Retrained from scratch on {} of this branch",
    "import": "Trained on {} that were imported",
    "replay": "Trained on {} made with another model",
}


@dataclass(frozen=True)
class Story:
    """`steps` has (step, sentence, node id) for each choice of the branch except the first `left_out`; `ending` is
    sentences."""

    steps: list[tuple[int, str, str]]
    ending: list[str]
    left_out: int = 0


async def tell(store: Store, session: Session, last: int) -> Story:
    """Return the story of the branch to the head: its `last` steps one by one, then the counts."""
    tree = session.tree
    path = tree.path(tree.head_id)
    told = path[1:][-last:]
    offers = await store.read(rows.get_offers, [node.answered for node in told if node.answered])
    steps = [(node.step, _sentence(node, offers.get(node.answered or "")), node.id) for node in told]
    return Story(steps, _ending(session, path), len(path) - 1 - len(told))


def _sentence(node: Node, offer: dict[str, Any] | None) -> str:
    asked = f"“{_short(str(offer['prompt']))}”: " if offer else ""
    words = first_words(node, offer, 80)
    said = f": “{words}”" if words else ""
    chance = "Chance of your pick"
    match node.choice:
        case "skip":
            return f"{asked}skipped."
        case "none":
            what = "you chose none of these"
        case Fitted():
            name = f" You named this step “{node.name}”." if node.name else ""
            epochs = _count(node.choice.epochs, "epoch")
            return f"{LEARNED[node.choice.kind].format(_count(node.choice.lessons, 'choice'))}, {epochs}.{name}"
        case Written():
            what = f"you wrote the answer{said}"
        case int():
            what = f"you chose {LETTERS[node.choice]}{said}"
        case Ranking():
            order = " › ".join(_letters(node.choice.ranking, offer))
            began = f"; the best begins “{words}”" if words else ""
            what = f"you ranked {order}, best first{began}"
        case tuple():
            *others, last = _letters(node.choice, offer)
            if others:
                began = f"; the first begins “{words}”" if words else ""
                what = f"you picked {', '.join(others)} and {last}{began}"
                chance = "Chance of your picks"
            else:
                what = f"you chose {last}, drawn {len(node.choice)} times{said}"
        case _:
            what = "Base model"
    effect = ""
    if node.metrics and node.metrics.share_before:
        times = node.metrics.share_after / node.metrics.share_before
        if node.choice == "none":
            effect = " Such answers are now less likely." if times >= 1.05 else " Little effect."
        else:
            change = f"{times:.1f}×" if times >= 1.05 else "little change"
            effect = f" {chance}: {node.metrics.share_before:.0%} → {node.metrics.share_after:.0%} ({change})."
    name = f" You named this step “{node.name}”." if node.name else ""
    return f"{asked}{what}.{effect}{name}"


def _letters(named: Sequence[int], offer: dict[str, Any] | None) -> list[str]:
    """The letters of the options that were named, those that are the same once."""
    options = (offer or {}).get("options") or []
    texts = {index: (options[index]["text"], options[index]["finish"]) if options else index for index in named}
    first = {text: index for index, text in reversed(texts.items())}
    return [LETTERS[index] for index, text in texts.items() if first[text] == index]


def _ending(session: Session, path: list[Node]) -> list[str]:
    tree = session.tree
    learned = [node for node in path if node.learned]
    none = sum(node.choice == "none" for node in path)
    written = sum(isinstance(node.choice, Written) for node in path)
    skipped = sum(node.choice == "skip" for node in path)
    aside = len(tree.nodes) - len(path)
    counts = [f"{_count(len(learned), 'choice')} on this branch"]
    counts += [f"{none} of them “none of these”"] if none else []
    counts += [f"{written} written by hand"] if written else []
    counts += [f"{_count(skipped, 'prompt')} skipped"] if skipped else []
    ending = [", ".join(counts) + "."]
    ending.append(f"The weights have moved {drift_of(tree.head, tree):.2%} from the base model.")
    if aside:
        ending.append(f"{_count(aside, 'step')} on other branches.")
    return ending


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _short(text: str, limit: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
