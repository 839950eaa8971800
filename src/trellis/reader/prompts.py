"""The prompts of a source, row by row, and a tally of what was left out. It does not know where rows come from."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from ..errors import Invalid
from .columns import extract_prompt, find_prompt_column, is_likeliest_column
from .json_files import Record
from .skipped import SkipReport

INITIAL_ROWS, MAX_SAMPLED_ROWS = 20, 20_000
"""Rows that are looked at to find the column: more than the first where none of these has a prompt."""


class PromptReader:
    """Reads the prompts of `files`: each is a name (empty if there is only one) and its rows. If no column is named,
    each file may have another one."""

    def __init__(
        self, files: Iterable[tuple[str, Iterator[Record]]], requested_column: str, max_sampled: int = MAX_SAMPLED_ROWS
    ) -> None:
        self._files = files
        self._requested_column = requested_column
        self._max_sampled = max_sampled
        self.skip_report = SkipReport()
        self.column = ""
        self.columns: list[str] = []
        self.bytes_read = 0
        """Stored bytes read of the current file."""
        self.is_complete = False
        """Whether all rows have been read."""

    def read(self, limit: int | None = None) -> Iterator[str | None]:
        """Yield the prompt of each of the first `limit` rows; None for a skipped one. Raise Invalid."""
        for name, rows in self._files:
            first = self._first_records(name, rows)
            column = self._choose_column(name, first)
            for row in itertools.chain(first, rows):
                if limit is not None and self.skip_report.rows >= limit:
                    return
                yield self._extract(name, column, row)
        self.is_complete = True

    def _first_records(self, name: str, rows: Iterator[Record]) -> list[Record]:
        """Return the first rows, and as many more as are needed to find a column."""
        first = list(itertools.islice(rows, INITIAL_ROWS))
        while first and len(first) < self._max_sampled and not self._has_column(first):
            more = list(itertools.islice(rows, len(first)))
            if not more:
                break
            first += more
        return first

    def _has_column(self, first: list[Record]) -> bool:
        rows = [record.row for record in first if not record.problem]
        try:
            column = find_prompt_column(self._requested_column, rows)
        except Invalid:
            return False
        return bool(self._requested_column) or is_likeliest_column(column, rows)

    def _choose_column(self, name: str, first: list[Record]) -> str:
        rows = [record.row for record in first if not record.problem]
        if not rows:
            return ""
        try:
            column = find_prompt_column(self._requested_column, rows)
        except Invalid as error:
            if not name:
                raise
            raise Invalid(f"“{name}”: {error.message}", next_step=error.next_step, field=error.field) from None
        self.column = self.column or column
        self.columns = list(dict.fromkeys([*self.columns, *(column for row in rows for column in row)]))
        return column

    def _extract(self, name: str, column: str, record: Record) -> str | None:
        place = f"{name}, {record.location}" if name else record.location
        self.skip_report.rows += 1
        self.bytes_read = record.bytes_read
        if record.problem:
            self.skip_report.add_skipped(record.problem, place)
            return None
        prompt = extract_prompt(record.row, column)
        if prompt.problem:
            self.skip_report.add_skipped(prompt.problem, place)
            return None
        for reason in prompt.shortened:
            self.skip_report.add_shortened(reason, place)
        return prompt.text
