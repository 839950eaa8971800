"""What was left out of a source of prompts, counted: why, how often, and where first. It does not decide what is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def number(value: int) -> str:
    """A number as the pages show it, with its thousands apart."""
    return f"{value:,}".replace(",", " ")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something was left out, as it is said of one row and of several."""

    one: str
    many: str

    def of(self, count: int) -> str:
        return self.one if count == 1 else self.many


@dataclass
class Tally:
    """Rows that were read, those that gave no prompt, and prompts that are not all that their row held."""

    rows: int = 0
    left_out: dict[Reason, tuple[int, str]] = field(default_factory=dict)
    shortened: dict[Reason, tuple[int, str]] = field(default_factory=dict)

    def leave_out(self, reason: Reason, place: str) -> None:
        _count(self.left_out, reason, place)

    def shorten(self, reason: Reason, place: str) -> None:
        _count(self.shortened, reason, place)

    @property
    def skipped(self) -> int:
        return sum(count for count, _ in self.left_out.values())

    def as_json(self) -> dict[str, Any]:
        reasons = [
            {"reason": reason.of(count), "count": count, "first": place}
            for reason, count, place in _most_first(self.left_out)
        ]
        return {"rows": self.rows, "skipped": self.skipped, "left_out": reasons}

    def sentences(self, whole: bool = True) -> list[str]:
        """What a person is told; nothing where nothing was left out. `whole` says whether these are all rows."""
        said = []
        if skipped := self.skipped:
            of = f"{'' if whole else 'the first '}{number(self.rows)} row{'' if self.rows == 1 else 's'}"
            verb = "was" if skipped == 1 else "were"
            why = ", ".join(
                f"{number(count)} {reason.of(count)} ({'' if count == 1 else 'first: '}{place})"
                for reason, count, place in _most_first(self.left_out)
            )
            said.append(f"{number(skipped)} of {of} {verb} left out: {why}.")
        among = "" if whole else f"Among the first {number(self.rows)} rows, "
        said += [
            f"{among}{number(count)} {reason.of(count)} ({'' if count == 1 else 'first: '}{place})."
            for reason, count, place in _most_first(self.shortened)
        ]
        return said


def _most_first(counts: dict[Reason, tuple[int, str]]) -> list[tuple[Reason, int, str]]:
    return sorted(((reason, *found) for reason, found in counts.items()), key=lambda each: -each[1])


def _count(counts: dict[Reason, tuple[int, str]], reason: Reason, place: str) -> None:
    count, first = counts.get(reason, (0, place))
    counts[reason] = (count + 1, first)
