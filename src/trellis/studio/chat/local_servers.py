"""Local servers: private addresses that a person at this computer has permitted, kept in the save folder.

It does not know who asked: the web side makes sure of that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import TrellisError, shorten
from ..egress import Address, ResolvedUrl, is_public


class LocalServers:
    """Permitted servers with private addresses, in a file: `host:port` with its addresses at the time, so that a
    name that points elsewhere later is refused."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._permitted: dict[str, list[str]] | None = None
        self._temporarily_permitted: dict[str, list[str]] = {}

    def is_permitted(self, server: str, address: Address) -> bool:
        """Return whether a server may have a private address."""
        return any(str(address) in known.get(server, ()) for known in (self._read(), self._temporarily_permitted))

    @contextmanager
    def permit_temporarily(self, resolved: ResolvedUrl | None) -> Iterator[ResolvedUrl | None]:
        """Permit a server within the block. Yield what `save` should keep; None for a public address."""
        if resolved is None or all(map(is_public, resolved.addresses)):
            yield None
            return
        self._temporarily_permitted = {
            **self._temporarily_permitted,
            resolved.server: [str(each) for each in resolved.addresses],
        }
        try:
            yield resolved
        finally:
            self._temporarily_permitted = {
                name: value for name, value in self._temporarily_permitted.items() if name != resolved.server
            }

    def save(self, resolved: ResolvedUrl) -> None:
        """Store a permission."""
        self._write({**self._read(), resolved.server: [str(each) for each in resolved.addresses]})

    def retain_only(self, servers: Collection[str]) -> None:
        """Delete the permissions of all other servers."""
        retained = {name: value for name, value in self._read().items() if name in servers}
        if retained != self._read():
            self._write(retained)

    def _read(self) -> dict[str, list[str]]:
        if self._permitted is None:
            try:
                data = json.loads(self._file.read_text("utf-8"))
            except (OSError, ValueError):
                data = {}
            pairs = data.items() if isinstance(data, dict) else ()
            self._permitted = {name: list(map(str, value)) for name, value in pairs if isinstance(value, list)}
        return self._permitted

    def _write(self, permitted: dict[str, list[str]]) -> None:
        """Raise TrellisError where the file cannot be written."""
        draft = self._file.with_suffix(".new")
        try:
            draft.write_text(json.dumps(permitted, indent=1), "utf-8")
            os.replace(draft, self._file)
        except OSError as error:
            raise TrellisError(
                f"The permission couldn't be saved to “{shorten(self._file)}”: {error.strerror}.", code="disk",
                next_step="Free some space on that disk and add the server again.",
            ) from None  # fmt: skip
        self._permitted = permitted
