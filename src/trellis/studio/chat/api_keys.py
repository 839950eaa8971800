"""API keys: shown once, stored as hashes, revocable at any time."""

from __future__ import annotations

import hashlib
import secrets
import time
from typing import Any

from ...errors import Conflict, NotFound, shorten
from ...store import api_keys as rows
from ...store.store import Store
from ..jobs import timestamp

KEY_PREFIX = "trellis-"
MAX_KEYS = 200

LAST_USED_INTERVAL_SECONDS = 60.0
"""How often the time of last use is stored."""


class ApiKeys:
    """The API keys of `/v1`. A key is 256 random bits, so a plain hash is enough."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last_used: dict[str, float] = {}

    async def create(self, name: str) -> tuple[dict[str, Any], str]:
        """Return a new key as JSON, and its secret, which is not stored. Raise Conflict when there are too many."""
        if len(await self._store.read(rows.list_keys)) >= MAX_KEYS:
            raise Conflict(f"There are already {MAX_KEYS} API keys.", code="too_many", next_step="Revoke some first.")
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        row = {
            "hash": _hash(secret), "id": f"k{secrets.token_hex(8)}", "name": name,
            "start": secret[: len(KEY_PREFIX) + 4],
            "created": time.time(), "used": None,
        }  # fmt: skip
        await self._store.write(rows.add_key, row)
        return _key_json(row), secret

    async def list_keys(self) -> list[dict[str, Any]]:
        return [_key_json(row) for row in await self._store.read(rows.list_keys)]

    async def revoke(self, key_id: str) -> None:
        """Raise NotFound."""
        if not await self._store.write(rows.delete_key, key_id):
            raise NotFound(
                f"There is no API key “{shorten(key_id)}”.", next_step="The page “API keys & providers” lists them."
            )

    async def find_key_id(self, secret: str) -> str | None:
        """Return the id of a key; None for an unknown one."""
        if not secret.startswith(KEY_PREFIX):
            return None
        row = await self._store.read(rows.key_by_hash, _hash(secret))  # not cached: revoking takes effect at once
        if row is None:
            return None
        key = str(row["id"])
        now = time.time()
        if now - self._last_used.get(key, 0.0) > LAST_USED_INTERVAL_SECONDS:
            self._last_used[key] = now
            await self._store.write(rows.set_key_used, key, now)
        return key


def _key_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"], "name": row["name"], "start": row["start"], "created": timestamp(row["created"]),
        "used": timestamp(row["used"]) if row["used"] else None,
    }  # fmt: skip


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
