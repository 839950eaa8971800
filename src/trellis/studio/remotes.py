"""Models elsewhere: any server that speaks the OpenAI API, by its address and key.

Keys are kept in the database and sent to their server alone: never to a page, a log or an export.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import Invalid, TrellisError, shorten
from ..messages import Answered, Chat, Event, Heard, Spoke, Turn
from ..store import remotes as rows
from ..store.store import Store
from .outgoing import Place, checked, parsed
from .speaker import Follow, Speaker

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0
LINE, WHOLE = 1_000_000, 4_000_000
"""Bytes of one line and of one answer that are taken."""

LONGEST = 200_000
"""Characters of one answer."""

MOST_MODELS = 500


class Remotes:
    """All servers that were added. `own` may have private addresses."""

    def __init__(self, store: Store, own: Collection[str]) -> None:
        self._store, self._own = store, own
        self._client: httpx.AsyncClient | None = None
        self._making = asyncio.Lock()

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def all(self) -> list[dict[str, Any]]:
        return [_as_json(row) for row in await self._store.read(rows.list_remotes)]

    async def add(self, name: str, url: str, secret: str, models: list[str], sees: bool) -> dict[str, Any]:
        """Add a server. Its models are asked for where none are named. Raises what is wrong with it."""
        if "/" in name:
            raise Invalid(
                f"name: must have no “/”, got “{shorten(name)}”.", field="name", next_step="Call it otherwise."
            )
        if odd := next((each for each in (name, *models) if not each.isprintable()), None):
            raise Invalid(
                f"name: “{shorten(odd)}” has letters that cannot be seen.", field="name", next_step="Type it."
            )
        parsed(url)
        if not all(32 < ord(letter) < 127 for letter in secret):
            raise Invalid("key: has letters that no key has.", field="key", next_step="Paste the key alone.")
        found = models or await self._models(url, secret)
        row = {
            "id": f"o{secrets.token_hex(8)}", "name": name, "url": url.strip().rstrip("/"), "secret": secret,
            "models": found, "sees": int(sees), "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.put_remote, row)
        return _as_json(row)

    async def delete(self, remote_id: str) -> None:
        await self._store.write(rows.delete_remote, remote_id)

    async def find(self, name: str) -> Speaker | None:
        """Who is called `remote:<server>/<model>`."""
        server, _, model = name.removeprefix("remote:").partition("/")
        row = await self._store.read(rows.remote_by_name, server)
        return Remote(self, row, model) if row and model else None

    async def _models(self, url: str, secret: str) -> list[str]:
        async with self.asked("GET", url, "/models", secret) as response:
            body = await _read(response)
        try:
            data = json.loads(body)["data"]
            names = [each["id"] for each in data if isinstance(each["id"], str) and 0 < len(each["id"]) <= 200]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _strange(url) from None
        if not names:
            raise Invalid(
                f"The server at “{shorten(url)}” lists no models.", field="models", next_step="Name its models by hand."
            )
        return sorted(names)[:MOST_MODELS]

    async def _ready(self) -> httpx.AsyncClient:
        """The one client, made in a thread: what it trusts takes a tenth of a second to read. It keeps no connection,
        so that none is used for another name at the same address."""
        async with self._making:
            if self._client is None:
                self._client = await asyncio.to_thread(_new_client)
            return self._client

    @asynccontextmanager
    async def asked(
        self, method: str, url: str, path: str, secret: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A response whose status is good, not read yet. The address is looked up and checked now, and no other is
        used; a redirect is not followed. Raises TrellisError."""
        import httpx  # only who talks to a server elsewhere needs it

        place = await checked(url, self._own)
        headers = {"host": place.name, "accept": "application/json, text/event-stream", "accept-encoding": "identity"}
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        try:
            client = await self._ready()
            async with client.stream(
                method, place.url + path, headers=headers, json=body,
                extensions={"sni_hostname": place.host} if place.scheme == "https" else {},
            ) as response:  # fmt: skip
                if response.status_code != 200:
                    said = (await _read(response, 4000)).decode("utf-8", "replace")
                    raise _refusal(place, response.status_code, said.replace(secret, "…") if secret else said)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrellisError(
                f"The server “{shorten(place.name)}” could not be talked to: {type(error).__name__}.", code="network",
                field="url", next_step="Check that it runs, and its address.",
            ) from None  # fmt: skip


def _new_client() -> httpx.AsyncClient:
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=False)


class Remote(Speaker):
    """A model on a server elsewhere."""

    def __init__(self, remotes: Remotes, row: dict[str, Any], model: str) -> None:
        self._remotes, self._row, self._model = remotes, row, model
        self.name = f"remote:{row['name']}/{model}"
        self.label = f"{model} at {row['name']}"
        self.sees = bool(row["sees"])

    async def answer(self, request: Chat, owner: str, follow: Follow) -> AsyncGenerator[Event, None]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._model, "stream": True, "stream_options": {"include_usage": True},
            "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens,
        }  # fmt: skip
        if request.stop:
            body["stop"] = list(request.stop)
        if request.turns:
            body["messages"] = [{"role": turn.role, "content": _content(turn)} for turn in request.turns]
        else:
            body["prompt"] = request.text
        path = "/chat/completions" if request.turns else "/completions"
        started = time.monotonic()
        first, tokens, length, finish, told, whole = 0.0, 0, 0, "", False, Whole()
        async with self._remotes.asked("POST", self._row["url"], path, self._row["secret"], body) as response:
            async for data in _events(response):
                if "error" in data:
                    raise _said_no(self._row["name"], data["error"], self._row["secret"])
                if isinstance(usage := data.get("usage"), dict):
                    tokens = _count(usage.get("completion_tokens")) or tokens
                    if prompt := _count(usage.get("prompt_tokens")):
                        told = True
                        yield Heard(read=prompt, prompt_tokens=prompt, warm=0, left_out=0, context_length=0)
                for text, ended in _grown(data):
                    finish = ended or finish
                    if text := whole.of(text):
                        length += len(text)
                        tokens += 1
                        first = first or time.monotonic() - started
                        yield Spoke(text=text, tokens=tokens)
                if length > LONGEST:  # whatever was asked for
                    finish = "length"
                    break
        if not finish and not tokens:
            raise _strange(self._row["name"])
        if not told:
            yield Heard(read=0, prompt_tokens=0, warm=0, left_out=0, context_length=0)
        yield Answered(
            finish="length" if finish == "length" else "stop", tokens=tokens, prompt_tokens=0, seconds_to_first=first,
            seconds=time.monotonic() - started,
        )  # fmt: skip


class Whole:
    """Text that came in pieces, without what no text may hold. Half a character waits for its other half."""

    def __init__(self) -> None:
        self._half = ""

    def of(self, piece: str) -> str:
        text, self._half = self._half + piece.replace("\x00", ""), ""
        if text and "\ud800" <= text[-1] <= "\udbff":
            text, self._half = text[:-1], text[-1]
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _content(turn: Turn) -> str | list[dict[str, Any]]:
    """What one side said, with pictures where there are some."""
    if not turn.pictures:
        return turn.text
    pictures = [{"type": "image_url", "image_url": {"url": picture}} for picture in turn.pictures]
    return [{"type": "text", "text": turn.text}, *pictures]


def _grown(data: dict[str, Any]) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    choices = data.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            delta = next((choice[name] for name in ("delta", "message") if isinstance(choice.get(name), dict)), choice)
            text = delta.get("content", delta.get("text")) if isinstance(delta, dict) else None
            ended = choice.get("finish_reason")
            found.append((text if isinstance(text, str) else "", ended if isinstance(ended, str) else None))
    return found


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else 0


async def _read(response: httpx.Response, most: int = WHOLE) -> bytes:
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > most:
            return body[:most]
    return body


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to the last. Bounded in each line and in all."""
    if "json" in response.headers.get("content-type", "") and "stream" not in response.headers["content-type"]:
        with suppress(ValueError, RecursionError):  # one that does not stream says all of it at once
            data = json.loads(await _read(response))
            if isinstance(data, dict):
                yield data
        return
    line, whole = b"", 0
    async for piece in response.aiter_bytes():
        whole += len(piece)
        *lines, line = (line + piece).split(b"\n")
        if len(line) > LINE or whole > 20 * WHOLE:
            raise _strange(str(response.url.host))
        for each in lines:
            name, _, value = each.rstrip(b"\r").partition(b":")
            if name != b"data" or not value.strip():
                continue
            if value.strip() == b"[DONE]":
                return
            try:
                data = json.loads(value)
            except (ValueError, RecursionError):
                raise _strange(str(response.url.host)) from None
            if isinstance(data, dict):
                yield data


def _refusal(place: Place, status: int, said: str) -> TrellisError:
    if 300 <= status < 400:
        return TrellisError(
            f"The server “{shorten(place.name)}” points to another address, which is not followed.", code="redirected",
            field="url", next_step="Add that address itself.",
        )  # fmt: skip
    if status in (401, 403):
        return TrellisError(
            f"The server “{shorten(place.name)}” does not take the key.", code="wrong_key", field="key",
            next_step="Check the key, and add the server again.",
        )  # fmt: skip
    return TrellisError(
        f"The server “{shorten(place.name)}” answered {status}: {shorten(said, 200)}", code="remote_error",
        next_step="Try again, or look into that server's log.",
    )  # fmt: skip


def _said_no(name: str, error: Any, secret: str) -> TrellisError:
    said = error.get("message") if isinstance(error, dict) else error
    text = str(said).replace(secret, "…") if secret else str(said)
    return TrellisError(
        f"The server “{shorten(name)}” could not answer: {shorten(text, 200)}", code="remote_error",
        next_step="Try again, or look into that server's log.",
    )  # fmt: skip


def _strange(where: str) -> TrellisError:
    return TrellisError(
        f"The server at “{shorten(where)}” does not speak the OpenAI API.", code="remote_error", field="url",
        next_step="Check the address; most servers have it under /v1.",
    )  # fmt: skip


def _as_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"], "name": row["name"], "url": row["url"], "has_key": bool(row["secret"]),
        "models": row["models"], "sees": bool(row["sees"]),
    }  # fmt: skip
