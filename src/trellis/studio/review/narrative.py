"""The history of a branch in sentences: each choice, what it did, and where it led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...messages import Ranking, Written
from ...store import steering as rows
from ...store.store import Store
from ..steering import Node, Retraining, Session, answer_preview, drift_of
from .journal import LETTERS

RETRAINING_SENTENCES = {
    "refit": "Retrained from scratch on {} of this branch",
    "import": "Trained on {} that were imported",
    "replay": "Trained on {} made with another model",
}


@dataclass(frozen=True)
class Narrative:
    """`steps` has (step, sentence, node id) for each choice of the branch except the first `left_out`; `ending` is
    sentences."""

    steps: list[tuple[int, str, str]]
    ending: list[str]
    left_out: int = 0


async def write_narrative(store: Store, session: Session, last: int) -> Narrative:
    """Return the story of the branch to the head: its `last` steps one by one, then the counts."""
    tree = session.tree
    path = tree.path(tree.head_id)
    narrated_nodes = path[1:][-last:]
    offers = await store.read(rows.get_offers, [node.answered for node in narrated_nodes if node.answered])
    steps = [(node.step, _step_sentence(node, offers.get(node.answered or "")), node.id) for node in narrated_nodes]
    return Narrative(steps, _ending_sentences(session, path), len(path) - 1 - len(narrated_nodes))


def _step_sentence(node: Node, offer: dict[str, Any] | None) -> str:
    prompt_part = f"“{_shorten_line(str(offer['prompt']))}”: " if offer else ""
    preview = answer_preview(node, offer, 80)
    answer_part = f": “{preview}”" if preview else ""
    chance = "Chance of your pick"
    match node.choice:
        case "skip":
            return f"{prompt_part}skipped."
        case "none":
            choice_part = "you chose none of these"
        case Retraining():
            name = f" You named this step “{node.name}”." if node.name else ""
            epochs = _count(node.choice.epochs, "epoch")
            sentence = RETRAINING_SENTENCES[node.choice.kind].format(_count(node.choice.lessons, "choice"))
            return f"{sentence}, {epochs}.{name}"
        case Written():
            choice_part = f"you wrote the answer{answer_part}"
        case int():
            choice_part = f"you chose {LETTERS[node.choice]}{answer_part}"
        case Ranking():
            order = " › ".join(_option_letters(node.choice.ranking, offer))
            began = f"; the best begins “{preview}”" if preview else ""
            choice_part = f"you ranked {order}, best first{began}"
        case tuple():
            *others, last = _option_letters(node.choice, offer)
            if others:
                began = f"; the first begins “{preview}”" if preview else ""
                choice_part = f"you picked {', '.join(others)} and {last}{began}"
                chance = "Chance of your picks"
            else:
                choice_part = f"you chose {last}, drawn {len(node.choice)} times{answer_part}"
        case _:
            choice_part = "Base model"
    effect = ""
    if node.metrics and node.metrics.share_before:
        times = node.metrics.share_after / node.metrics.share_before
        if node.choice == "none":
            effect = " Such answers are now less likely." if times >= 1.05 else " Little effect."
        else:
            change = f"{times:.1f}×" if times >= 1.05 else "little change"
            effect = f" {chance}: {node.metrics.share_before:.0%} → {node.metrics.share_after:.0%} ({change})."
    name = f" You named this step “{node.name}”." if node.name else ""
    return f"{prompt_part}{choice_part}.{effect}{name}"


def _option_letters(indexes: Sequence[int], offer: dict[str, Any] | None) -> list[str]:
    """The letters of the options that were named, those that are the same once."""
    options = (offer or {}).get("options") or []
    texts = {index: (options[index]["text"], options[index]["finish"]) if options else index for index in indexes}
    first = {text: index for index, text in reversed(texts.items())}
    return [LETTERS[index] for index, text in texts.items() if first[text] == index]


def _ending_sentences(session: Session, path: list[Node]) -> list[str]:
    tree = session.tree
    learned = [node for node in path if node.has_learned]
    none = sum(node.choice == "none" for node in path)
    written = sum(isinstance(node.choice, Written) for node in path)
    skipped = sum(node.choice == "skip" for node in path)
    other_count = len(tree.nodes) - len(path)
    counts = [f"{_count(len(learned), 'choice')} on this branch"]
    counts += [f"{none} of them “none of these”"] if none else []
    counts += [f"{written} written by hand"] if written else []
    counts += [f"{_count(skipped, 'prompt')} skipped"] if skipped else []
    ending = [", ".join(counts) + "."]
    ending.append(f"The weights have moved {drift_of(tree.head, tree):.2%} from the base model.")
    if other_count:
        ending.append(f"{_count(other_count, 'step')} on other branches.")
    return ending


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def _shorten_line(text: str, limit: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
