"""The offer on the screen, complete or still being generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import shorten
from ...messages import Option, Ranking, Written
from .choices import equal_options
from .tree import Node


@dataclass
class ShownOffer:
    """An offer on the screen. `options` is None while it is being generated; `texts` grow meanwhile."""

    id: str
    node: str
    number: int
    prompt: str
    texts: list[str]
    options: tuple[Option, ...] | None

    @classmethod
    def from_row(cls, row: dict[str, Any], size: int) -> ShownOffer:
        options = parse_options(row)
        texts = [option.text for option in options] if options else [""] * size
        return cls(row["id"], row["node"], row["number"], row["prompt"], texts, options)

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "node": self.node,
            "prompt": self.prompt,
            "options": self.options_json(),
            "status": "ready" if self.options else "streaming",
        }

    def options_json(self) -> list[dict[str, Any]]:
        if self.options is None:
            return [{"index": index, "text": text, "finish": None} for index, text in enumerate(self.texts)]
        return [
            {
                "index": index,
                "text": option.text,
                "finish": option.finish,
                "tokens": len(option.tokens),
                "logprob": round(option.logprob, 4),
                "equal": list(equal),
            }
            for index, (option, equal) in enumerate(zip(self.options, equal_options(self.options), strict=True))
        ]


def parse_options(row: dict[str, Any]) -> tuple[Option, ...] | None:
    """Return the options of an offer's row; None while it is incomplete."""
    if row["options"] is None:
        return None
    return tuple(Option.model_validate(option) for option in row["options"])


def answer_preview(node: Node, offer: dict[str, Any] | None, limit: int = 42) -> str:
    """Return the first words of the chosen answer; empty if there is none."""
    options: list[dict[str, Any]] = (offer or {}).get("options") or []  # as stored: hundreds are read at once
    match node.choice:
        case Written():
            text = node.choice.written
        case int() if options:
            text = options[node.choice]["text"]
        case Ranking() if options:
            text = options[node.choice.ranking[0]]["text"]
        case (int() as index, *_) if options:
            text = options[index]["text"]
        case _:
            return ""
    return shorten(text, limit)
