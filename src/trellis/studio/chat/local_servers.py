"""Servers in a private network that a person at this computer has permitted, remembered in the save folder.

It does not know who asked: the web side makes sure of that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import TrellisError, shorten
from ..egress import Address, Found, is_public


class LocalServers:
    """Servers with private addresses that a person at this computer has permitted, kept in a file: `host:port` with the
    addresses that it had then, so that a name which leads elsewhere later is not followed there."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[str, list[str]] | None = None
        self._tried: dict[str, list[str]] = {}

    def permits(self, server: str, address: Address) -> bool:
        """Whether a server may have a private address."""
        return any(str(address) in known.get(server, ()) for known in (self._read(), self._tried))

    @contextmanager
    def trial(self, found: Found | None) -> Iterator[Found | None]:
        """Permit a server within this alone. Gives back what to keep, where it has a private address."""
        if found is None or all(map(is_public, found.addresses)):
            yield None
            return
        self._tried = {**self._tried, found.server: [str(each) for each in found.addresses]}
        try:
            yield found
        finally:
            self._tried = {name: value for name, value in self._tried.items() if name != found.server}

    def keep(self, found: Found) -> None:
        """Remember a permission."""
        self._write({**self._read(), found.server: [str(each) for each in found.addresses]})

    def keep_only(self, servers: Collection[str]) -> None:
        """Forget the permissions of all other servers."""
        left = {name: value for name, value in self._read().items() if name in servers}
        if left != self._read():
            self._write(left)

    def _read(self) -> dict[str, list[str]]:
        if self._known is None:
            try:
                data = json.loads(self._file.read_text("utf-8"))
            except (OSError, ValueError):
                data = {}
            pairs = data.items() if isinstance(data, dict) else ()
            self._known = {name: list(map(str, value)) for name, value in pairs if isinstance(value, list)}
        return self._known

    def _write(self, known: dict[str, list[str]]) -> None:
        """Raises TrellisError where it cannot be written down."""
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(json.dumps(known, indent=1), "utf-8")
            os.replace(draft, self._file)
        except OSError as error:
            raise TrellisError(
                f"The permission couldn't be saved to “{shorten(self._file)}”: {error.strerror}.", code="disk",
                next_step="Free some space on that disk and add the server again.",
            ) from None  # fmt: skip
        self._known = known
