"""Count the skipped rows of a source of prompts: why, how often, and where first. It does not decide what to skip."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def format_number(value: int) -> str:
    """A number as the pages show it, with its thousands apart."""
    return f"{value:,}".replace(",", " ")


@dataclass(frozen=True, slots=True)
class Reason:
    """Reasons for skipping, for one row and for several."""

    singular: str
    plural: str

    def text_for(self, count: int) -> str:
        return self.singular if count == 1 else self.plural


@dataclass
class SkipReport:
    """Rows that were read, those that gave no prompt, and prompts that are not all that their row held."""

    rows: int = 0
    skip_reasons: dict[Reason, tuple[int, str]] = field(default_factory=dict)
    shorten_reasons: dict[Reason, tuple[int, str]] = field(default_factory=dict)

    def add_skipped(self, reason: Reason, place: str) -> None:
        _increment(self.skip_reasons, reason, place)

    def add_shortened(self, reason: Reason, place: str) -> None:
        _increment(self.shorten_reasons, reason, place)

    @property
    def skipped(self) -> int:
        return sum(count for count, _ in self.skip_reasons.values())

    def as_json(self) -> dict[str, Any]:
        reasons = [
            {"reason": reason.text_for(count), "count": count, "first": place}
            for reason, count, place in _by_frequency(self.skip_reasons)
        ]
        return {"rows": self.rows, "skipped": self.skipped, "left_out": reasons}

    def sentences(self, is_complete: bool = True) -> list[str]:
        """Return sentences for a person; none if nothing was skipped. `is_complete`: these are all rows."""
        found = []
        if skipped := self.skipped:
            of = f"{'' if is_complete else 'the first '}{format_number(self.rows)} row{'' if self.rows == 1 else 's'}"
            verb = "was" if skipped == 1 else "were"
            why = ", ".join(
                f"{format_number(count)} {reason.text_for(count)} ({'' if count == 1 else 'first: '}{place})"
                for reason, count, place in _by_frequency(self.skip_reasons)
            )
            found.append(f"{format_number(skipped)} of {of} {verb} left out: {why}.")
        among = "" if is_complete else f"Among the first {format_number(self.rows)} rows, "
        found += [
            f"{among}{format_number(count)} {reason.text_for(count)} ({'' if count == 1 else 'first: '}{place})."
            for reason, count, place in _by_frequency(self.shorten_reasons)
        ]
        return found


def _by_frequency(counts: dict[Reason, tuple[int, str]]) -> list[tuple[Reason, int, str]]:
    return sorted(((reason, *found) for reason, found in counts.items()), key=lambda each: -each[1])


def _increment(counts: dict[Reason, tuple[int, str]], reason: Reason, place: str) -> None:
    count, first = counts.get(reason, (0, place))
    counts[reason] = (count + 1, first)
