"""The prompts of a source, row by row, and a tally of what was left out. It does not know where rows come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from ..errors import Invalid
from .columns import column_of, is_surest, prompt_in
from .json_files import Record
from .skipped import Tally

LOOKED_AT, LOOKED_AT_MOST = 20, 20_000
"""Rows that are looked at to find the column: more than the first where none of these has a prompt."""


class Prompts:
    """Reads `parts`: the name of each file (empty where there is only one) and its rows. Files without a column that is
    named may each have another one."""

    def __init__(
        self, parts: Iterable[tuple[str, Iterator[Record]]], wanted: str, looked_at: int = LOOKED_AT_MOST
    ) -> None:
        self._parts = parts
        self._wanted = wanted
        self._looked_at = looked_at
        self.tally = Tally()
        self.column = ""
        self.columns: list[str] = []
        self.done = 0
        """Stored bytes that were read of the file at hand."""
        self.whole = False
        """Whether all rows have been read."""

    def read(self, most: int | None = None) -> Iterator[str | None]:
        """The prompt of each of the first `most` rows; None for one that is left out. Raises Invalid."""
        for name, rows in self._parts:
            begin = self._begin(name, rows)
            column = self._column_of(name, begin)
            for row in itertools.chain(begin, rows):
                if most is not None and self.tally.rows >= most:
                    return
                yield self._prompt_in(name, column, row)
        self.whole = True

    def _begin(self, name: str, rows: Iterator[Record]) -> list[Record]:
        """The first rows, and so many more as it takes to find a column."""
        begin = list(itertools.islice(rows, LOOKED_AT))
        while begin and len(begin) < self._looked_at and not self._is_found(begin):
            more = list(itertools.islice(rows, len(begin)))
            if not more:
                break
            begin += more
        return begin

    def _is_found(self, begin: list[Record]) -> bool:
        rows = [record.row for record in begin if not record.problem]
        try:
            column = column_of(self._wanted, rows)
        except Invalid:
            return False
        return bool(self._wanted) or is_surest(column, rows)

    def _column_of(self, name: str, begin: list[Record]) -> str:
        rows = [record.row for record in begin if not record.problem]
        if not rows:
            return ""
        try:
            column = column_of(self._wanted, rows)
        except Invalid as error:
            if not name:
                raise
            raise Invalid(f"“{name}”: {error.message}", next_step=error.next_step, field=error.field) from None
        self.column = self.column or column
        self.columns = list(dict.fromkeys([*self.columns, *(column for row in rows for column in row)]))
        return column

    def _prompt_in(self, name: str, column: str, record: Record) -> str | None:
        place = f"{name}, {record.place}" if name else record.place
        self.tally.rows += 1
        self.done = record.done
        if record.problem:
            self.tally.leave_out(record.problem, place)
            return None
        asked = prompt_in(record.row, column)
        if asked.problem:
            self.tally.leave_out(asked.problem, place)
            return None
        for reason in asked.shortened:
            self.tally.shorten(reason, place)
        return asked.text
