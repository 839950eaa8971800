"""The lineage of a session as a person would tell it: how it began, what each choice was, and where it led."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...messages import Ranking, Written
from ...store import steering as rows
from ...store.store import Store
from ..jobs import timestamp
from ..steering.offer import answer_preview
from ..steering.session import Session
from ..steering.tree import Node, Retraining, drift_of
from .journal import LETTERS

RETRAINING_SENTENCES = {
    "refit": "A new adapter learned all of the branch's",
    "import": "It learned from a file of",
    "replay": "It learned another model's",
}


@dataclass(frozen=True)
class Narrative:
    """`opening` and `ending` are sentences; `steps` has (step, sentence, node id) for each choice on the way, but for
    the first `left_out`."""

    opening: list[str]
    steps: list[tuple[int, str, str]]
    ending: list[str]
    left_out: int = 0


async def write_narrative(store: Store, session: Session, last: int) -> Narrative:
    """The story of the branch to the head, its last steps one by one, and a word on what was left aside."""
    tree = session.tree
    path = tree.path(tree.head_id)
    narrated_nodes = path[1:][-last:]
    offers = await store.read(rows.get_offers, [node.answered for node in narrated_nodes if node.answered])
    model = "the demo model" if session.config.model == "demo" else f"“{session.config.model}”"
    opening = [f"It began on {timestamp(session.created)[:16].replace('T', ' at ')} UTC with {model}."]
    if session.config.system_prompt:
        opening.append("Before every prompt it was told how to behave, by a system prompt.")
    steps = [(node.step, _step_sentence(node, offers.get(node.answered or "")), node.id) for node in narrated_nodes]
    return Narrative(opening, steps, _ending_sentences(session, path), len(path) - 1 - len(narrated_nodes))


def _step_sentence(node: Node, offer: dict[str, Any] | None) -> str:
    prompt_part = f"Asked “{_shorten_line(str(offer['prompt']))}”, " if offer else ""
    preview = answer_preview(node, offer, 80)
    answer_part = f": “{preview}”" if preview else ""
    became = "It became"
    match node.choice:
        case "skip":
            return f"{prompt_part}you moved on without choosing."
        case "none":
            choice_part = "you took none of the answers"
        case Retraining():
            name = f" You named this step “{node.name}”." if node.name else ""
            passes = f"{node.choice.epochs} pass{'es' if node.choice.epochs != 1 else ''}"
            return f"{RETRAINING_SENTENCES[node.choice.kind]} {node.choice.lessons} choices at once, in {passes}.{name}"
        case Written():
            choice_part = f"you wrote the answer yourself{answer_part}"
        case int():
            choice_part = f"you chose {LETTERS[node.choice]}{answer_part}"
        case Ranking():
            order = " › ".join(_option_letters(node.choice.ranking, offer))
            began = f"; the first begins “{preview}”" if preview else ""
            choice_part = f"you ranked the answers {order}, the best first{began}"
        case tuple():
            *others, last = _option_letters(node.choice, offer)
            if others:
                began = f"; the first begins “{preview}”" if preview else ""
                choice_part = f"you called {', '.join(others)} and {last} good{began}"
                became = "Together they became"
            else:
                choice_part = f"you chose {last}, which was offered {len(node.choice)} times{answer_part}"
        case _:
            choice_part = "it began"
    effect = ""
    if node.metrics and node.metrics.share_before:
        times = node.metrics.share_after / node.metrics.share_before
        if node.choice == "none":
            effect = " Answers like these became less likely." if times >= 1.05 else " That changed little."
        elif times >= 1.05:
            effect = f" {became} {times:.1f} times as likely a choice."
        else:
            effect = " It stayed about as likely a choice."
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
    counts = [f"{len(learned)} choice{'s' if len(learned) != 1 else ''} led here"]
    counts += [f"{none} of them “none of these”"] if none else []
    counts += [f"{written} written by hand"] if written else []
    counts += [f"{skipped} prompt{'s' if skipped != 1 else ''} skipped"] if skipped else []
    ending = [", ".join(counts) + "."]
    ending.append(f"The weights have moved {100 * drift_of(tree.head, tree):.2f} % from the base model.")
    if other_count:
        ending.append(
            f"{other_count} other step{'s' if other_count != 1 else ''} "
            f"stand{'s' if other_count == 1 else ''} on other branches."
        )
    return ending


def _shorten_line(text: str, limit: int = 90) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
