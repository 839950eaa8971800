"""Export the choices of a session: a readable journal in Markdown, and JSONL in common formats."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ...errors import Invalid, shorten
from ...messages import Choice, Option, Ranking, Written
from ...store import blind_test as blind_rows
from ...store import steering as rows
from ...store.store import Store
from ..jobs import timestamp
from ..steering import Node, Retraining, Session, node_row, parse_options
from .win_rate import distinct_names, win_rate_json, win_rate_sentence

CHOICE_FORMATS = ("raw", "trl-preference", "trl-unpaired", "openai-dpo")
LETTERS = "ABCDEFGH"
RETRAINING_PHRASES = {"refit": "retrained on", "import": "imported", "replay": "replayed"}


async def journal_markdown(store: Store, session: Session, last: int | None = None) -> str:
    """Return the journal of the branch to the head: prompts, options, choices and metrics.

    `last` limits it to the last steps.
    """
    path = session.tree.path(session.tree.head_id)
    path = [path[0], *path[1:][-last:]] if last else path
    offers = await store.read(rows.get_offers, [node.answered for node in path if node.answered])
    lines = [
        f"# {_inline(session.name)}",
        "",
        f"Model `{session.config.model}`. Started {timestamp(session.created)[:16].replace('T', ' ')} UTC. "
        f"Steps on this branch: {session.tree.head.step}. Nodes in the tree: {len(session.tree.nodes)}.",
        "",
    ]
    for node in path[1:]:
        offer = offers.get(node.answered or "")
        name_suffix = f" ({_inline(node.name)})" if node.name else ""
        lines += [f"## Step {node.step}: {describe_choice(node.choice)}{name_suffix}", ""]
        lines += [_quote(offer["prompt"]), ""] if offer else []
        chosen_indexes = _chosen_indexes(node.choice)
        for index, option in enumerate(parse_options(offer) or () if offer else ()):
            mark = " **(chosen)**" if index in chosen_indexes else ""
            lines += [f"**{LETTERS[index]}**{mark}", "", _quote(option.text), ""]
        if isinstance(node.choice, Written):
            lines += ["**Your answer**", "", _quote(node.choice.written), ""]
        if node.metrics:
            metrics = node.metrics
            lines += [
                f"Probability of the pick {metrics.share_before:.1%} → {metrics.share_after:.1%}, "
                f"loss {metrics.loss:.3f}, KL {metrics.kl:.4f}, drift {metrics.drift:.2%}, "
                f"{metrics.inner_steps} optimizer steps.",
                "",
            ]
    return "\n".join([*lines, *await _blind_test_lines(store, session)])


async def _blind_test_lines(store: Store, session: Session) -> list[str]:
    """Return the lines of finished blind tests, oldest first."""
    trials = [trial for trial in await store.read(blind_rows.list_trials, session.id) if trial["state"] == "done"]
    lines = ["## Blind tests", ""] if trials else []
    for trial in reversed(trials):
        rounds = await store.read(blind_rows.get_rounds, trial["id"])
        result = win_rate_json([each["verdict"] for each in rounds if each["verdict"]])
        left, right = distinct_names(*(node_summary(session.node(trial[side])) for side in ("left", "right")))
        lines += [f"- {timestamp(trial['created'])[:10]}, {left} vs. {right}: {win_rate_sentence(result, left, right)}"]
    return [*lines, ""] if lines else []


async def export_choices(store: Store, session: Session, layout: str) -> Iterator[str]:
    """Yield every choice of the session as a line of JSON. Raise Invalid for an unknown layout.

    Layouts: our own log; TRL's preference and unpaired preference types (conversational); OpenAI's preference
    fine-tuning format. Skips teach nothing and appear in our own log only.
    """
    if layout not in CHOICE_FORMATS:
        raise Invalid(
            f"format: unknown format “{shorten(layout)}”.",
            field="format",
            next_step=f"Use one of: {', '.join(CHOICE_FORMATS)}.",
        )
    nodes = [node for node in session.tree.nodes.values() if node.answered]
    offers = await store.read(rows.get_offers, [node.answered for node in nodes if node.answered])
    return (
        json.dumps(line, ensure_ascii=False) + "\n"
        for node in nodes
        for line in _choice_lines(session, node, offers[node.answered or ""], layout)
    )


def describe_choice(choice: Choice | Retraining | None) -> str:
    """Describe a choice in a few words."""
    match choice:
        case None:
            return "base model"
        case "none":
            return "none of these"
        case "skip":
            return "skipped"
        case int():
            return f"chose {LETTERS[choice]}"
        case Ranking():
            return "ranked " + " › ".join(LETTERS[index] for index in choice.ranking)
        case Written():
            return "wrote an answer"
        case Retraining():
            return f"{RETRAINING_PHRASES[choice.kind]} {choice.lessons} choice{'s' if choice.lessons != 1 else ''}"
        case _:
            return "chose " + ", ".join(LETTERS[index] for index in choice)


def node_summary(node: Node) -> dict[str, Any]:
    """Return a node as comparisons show it."""
    return {"node": node.id, "step": node.step, "what": node.name or describe_choice(node.choice)}


def _choice_lines(session: Session, node: Node, offer: dict[str, Any], layout: str) -> Iterator[dict[str, Any]]:
    options = parse_options(offer) or ()
    prompt_messages = (
        [{"role": "system", "content": session.config.system_prompt}] if session.config.system_prompt else []
    )
    prompt_messages = [*prompt_messages, {"role": "user", "content": offer["prompt"]}]
    if layout == "raw":
        yield {
            "node": node.id, "parent": node.parent, "step": node.step, "prompt": offer["prompt"],
            "options": [option.text for option in options], "finish": [option.finish for option in options],
            "choice": node_row(node)["choice"], "system": session.config.system_prompt,
            "metrics": node.metrics.model_dump() if node.metrics else None, "created": timestamp(node.created),
        }  # fmt: skip
    elif layout == "trl-unpaired":
        for text, label in _labelled_answers(options, node.choice):
            yield {"prompt": prompt_messages, "completion": [_assistant_message(text)], "label": label}
    else:
        for better, worse in _preference_pairs(options, node.choice):
            if layout == "trl-preference":
                yield {
                    "prompt": prompt_messages,
                    "chosen": [_assistant_message(better)],
                    "rejected": [_assistant_message(worse)],
                }
            else:
                yield {
                    "input": {"messages": prompt_messages, "tools": [], "parallel_tool_calls": True},
                    "preferred_output": [_assistant_message(better)],
                    "non_preferred_output": [_assistant_message(worse)],
                }


def _assistant_message(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _chosen_indexes(choice: Choice | Retraining | None) -> list[int]:
    match choice:
        case int():
            return [choice]
        case Ranking():
            return [choice.ranking[0]]
        case tuple():
            return list(choice)
        case _:
            return []


def _labelled_answers(options: tuple[Option, ...], choice: Choice | Retraining | None) -> Iterator[tuple[str, bool]]:
    if choice is None or choice == "skip":
        return
    written = [choice.written] if isinstance(choice, Written) else []
    good_texts = {*written, *(options[index].text for index in _chosen_indexes(choice))}
    for text in dict.fromkeys([*(option.text for option in options), *written]):  # duplicates are one answer
        yield text, text in good_texts


def _preference_pairs(options: tuple[Option, ...], choice: Choice | Retraining | None) -> Iterator[tuple[str, str]]:
    """Yield the distinct (better, worse) pairs that a choice implies; refusals and skips imply none. An answer is
    never worse than a duplicate of itself."""
    if isinstance(choice, Written):
        better = [choice.written]
    else:
        chosen_indexes = list(choice.ranking) if isinstance(choice, Ranking) else _chosen_indexes(choice)
        better = list(dict.fromkeys(options[index].text for index in chosen_indexes))
    unchosen = [text for text in dict.fromkeys(option.text for option in options) if text not in better]
    for rank, text in enumerate(better):
        ranked_lower = better[rank + 1 :] if isinstance(choice, Ranking) else []
        yield from ((text, worse) for worse in [*ranked_lower, *unchosen])


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def _inline(text: str) -> str:
    return " ".join(text.split())
