"""Models elsewhere: any server that speaks the OpenAI API, by its address and key.

Keys are kept in the database and sent to their server alone: never to a page, a log or an export.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import Invalid, TrellisError, shorten
from ..markdown_blocks import THINK, THOUGHT
from ..messages import Answered, Chat, Event, Heard, Spoke, Turn
from ..params import Sampling
from ..store import remotes as rows
from ..store.store import Store
from .completions import WHOLE, Answer, NotACompletion, Stream, error_of, pieces_of
from .local_servers import LocalServers
from .outgoing import Place, checked, parsed, resolved, server_of
from .speaker import Follow, Speaker

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0
LONGEST = 200_000
"""Characters of one answer."""

MOST_MODELS = 500


class Remotes:
    """All servers that were added. `own` may have private addresses, and so may those that `permitted` names."""

    def __init__(self, store: Store, own: Collection[str], permitted: LocalServers) -> None:
        self._store, self._own, self._permitted = store, own, permitted
        self._client: httpx.AsyncClient | None = None
        self._making = asyncio.Lock()
        self.adapted: dict[tuple[str, str], dict[str, str]] = {}
        """What models on servers call an option, or (empty) that they do not take it, by server and model."""

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def all(self) -> list[dict[str, Any]]:
        return [_as_json(row) for row in await self._store.read(rows.list_remotes)]

    async def add(
        self, name: str, url: str, secret: str, models: list[str], sees: bool, permit: bool = False
    ) -> dict[str, Any]:
        """Add a server. Its models are asked for where none are named. Raises what is wrong with it. With `permit`, it
        may have a private address from now on: whoever calls has made sure that a person at this computer said so."""
        if "/" in name:
            raise Invalid(
                f"name: must have no “/”, got “{shorten(name)}”.", field="name", next_step="Choose another name."
            )
        if odd := next((each for each in (name, *models) if not each.isprintable()), None):
            raise Invalid(
                f"name: “{shorten(odd)}” has letters that cannot be seen.", field="name", next_step="Type it."
            )
        url = url.strip().rstrip("/")
        parsed(url)
        if not all(32 < ord(letter) < 127 for letter in secret):
            raise Invalid("key: contains invalid characters.", field="key", next_step="Paste only the key.")
        with self._permitted.trial(await resolved(url) if permit else None) as private:
            url, found = (url, models) if models else await self._found(url, secret)
            await self._require_allowed(url)
            row = {
                "id": f"o{secrets.token_hex(8)}", "name": name, "url": url, "secret": secret, "models": found,
                "sees": int(sees), "created": time.time(),
            }  # fmt: skip
            if private:
                await asyncio.to_thread(self._permitted.keep, private)
            await self._store.write(rows.put_remote, row)
        return _as_json(row)

    async def delete(self, remote_id: str) -> None:
        """Forget a server, and that it may have a private address where no other one is at the same place."""
        await self._store.write(rows.delete_remote, remote_id)
        left = {server_of(row["url"]) for row in await self._store.read(rows.list_remotes)}
        await asyncio.to_thread(self._permitted.keep_only, left)

    async def _require_allowed(self, url: str) -> None:
        """Raises Refused. A server that is away may be added; it is looked up again whenever it is asked."""
        try:
            await checked(url, self._own, self._permitted.permits)
        except TrellisError as error:
            if error.code != "network":
                raise

    async def _found(self, url: str, secret: str) -> tuple[str, list[str]]:
        """The models of a server, and the address at which it has the API: as it was typed, or under /v1."""
        try:
            return url, await self._models(url, secret)
        except TrellisError as error:
            if error.code not in ("remote_error", "redirected") or urlsplit(url).path:
                raise
            try:
                return f"{url}/v1", await self._models(f"{url}/v1", secret)
            except TrellisError as second:
                raise second if second.code == "wrong_key" else error from None

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
            ids = [each["id"] for each in data]
            names = [each for each in ids if isinstance(each, str) and 0 < len(each) <= 200 and each.isprintable()]
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

        place = await checked(url, self._own, self._permitted.permits)
        headers = {"host": place.name, "accept": "application/json, text/event-stream", "accept-encoding": "identity"}
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        try:
            client = await self._ready()
            async with client.stream(
                method, place.url + path, headers=headers, json=body,
                extensions={"sni_hostname": place.host} if place.scheme == "https" else {},
            ) as response:  # fmt: skip
                if response.status_code not in (200, 201):
                    said = (await _read(response, 4000)).decode("utf-8", "replace")
                    raise _refusal(place, response.status_code, said, secret)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrellisError(
                f"The server “{shorten(place.name)}” {_what_failed(error)}.", code="network", field="url",
                next_step="Check that it runs, and its address.",
            ) from None  # fmt: skip


def _what_failed(error: Exception) -> str:
    import httpx

    match error:
        case httpx.ConnectTimeout():
            return f"did not answer within {CONNECT_SECONDS:.0f} seconds"
        case httpx.ConnectError():
            return "could not be reached: nothing answers at its address and port"
        case httpx.TimeoutException():
            return f"said nothing for {READ_SECONDS:.0f} seconds"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "ended the connection in the middle of its answer"
    return f"could not be talked to ({type(error).__name__})"


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
        path = "/chat/completions" if request.turns else "/completions"
        goes_on = bool(request.turns) and request.turns[-1].role == "assistant"
        answer = Answer(request.turns[-1].text if goes_on else "")
        started = time.monotonic()
        first, tokens, told = 0.0, 0, False
        async with self._asked(path, request) as response:
            stream = Stream(response.aiter_bytes())
            try:
                async for data in stream:
                    if (error := error_of(data)) is not None:
                        raise _said_no(self._row["name"], error, self._row["secret"])
                    if isinstance(usage := data.get("usage"), dict):
                        tokens = _count(usage.get("completion_tokens")) or tokens
                        if prompt := _count(usage.get("prompt_tokens")):
                            told = True
                            yield Heard(read=prompt, prompt_tokens=prompt, warm=0, left_out=0, context_length=0)
                    for piece in pieces_of(data):
                        if text := answer.take(piece):
                            tokens += 1
                            first = first or time.monotonic() - started
                            yield Spoke(text=text, tokens=tokens)
                    if answer.length > LONGEST:  # whatever was asked for
                        answer.finish = "length"
                        break
            except (NotACompletion, RecursionError):
                raise _strange(self._row["name"]) from None
        if not answer.finish and not tokens and not answer.wants_tool:
            raise _strange(self._row["name"])
        if rest := answer.rest():
            yield Spoke(text=rest, tokens=tokens)
        if not told:
            yield Heard(read=0, prompt_tokens=0, warm=0, left_out=0, context_length=0)
        answer.require_good_end(self._model, self._row["name"], stream.ended)
        yield Answered(
            finish="length" if answer.finish == "length" else "stop", tokens=tokens, prompt_tokens=0,
            seconds_to_first=first, seconds=time.monotonic() - started,
        )  # fmt: skip

    @asynccontextmanager
    async def _asked(self, path: str, request: Chat) -> AsyncIterator[httpx.Response]:
        """A response that is good so far. What a server does not know and nobody asked for is left out, and remembered.
        Raises TrellisError, which names an option that the server does not take."""
        body = _body(self._model, request)
        known = self._remotes.adapted.setdefault((self._row["id"], self._model), {})
        changes = dict(known)
        while True:
            sent = {changes.get(name, name): value for name, value in body.items() if changes.get(name, name)}
            try:
                async with self._remotes.asked("POST", self._row["url"], path, self._row["secret"], sent) as response:
                    known.update(changes)
                    yield response
                    return
            except RefusedByServer as error:
                name = refused_option(error.said, sent, body)
                if name is None or name in changes:
                    raise
                if name == "max_tokens":
                    changes[name] = "max_completion_tokens"
                elif name in EXTRAS or body[name] in (NEUTRAL.get(name), _default(name)):
                    changes[name] = ""
                else:
                    raise Invalid(
                        f"The server “{shorten(self._row['name'])}” does not take “{name}”, which is "
                        f"{shorten(body[name])} here: {shorten(error.said, 200)}",
                        field=name, code="option_refused",
                        next_step="Empty that option in the settings of the room, or ask another model.",
                    ) from None  # fmt: skip


EXTRAS = frozenset({"stream_options", "seed", "continue_final_message", "add_generation_prompt"})
"""What is asked for to know more, to repeat or to go on, and can be done without."""

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0, "min_tokens": 0,
}  # fmt: skip
"""Values at which an option of sampling changes nothing."""


def _body(model: str, request: Chat) -> dict[str, Any]:
    """What a server is asked. All options of sampling are sent, under the names that servers have for them. Raises
    Invalid for what no server can be asked."""
    if request.top is not None:
        raise Invalid(
            "logprobs: the tokens of models on other servers are not told.", field="logprobs",
            code="unsupported_parameter", next_step="Leave it out.",
        )  # fmt: skip
    sampling = {name: value for name, value in request.sampling.model_dump().items() if value is not None}
    sampling["max_tokens"] = sampling.pop("max_new_tokens")
    of_chats = {name: getattr(request, name) for name in ("top_k", "repetition_penalty", "min_tokens")}
    sampling |= {name: value for name, value in of_chats.items() if value != NEUTRAL[name]}
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}} | sampling
    body["seed"] = request.seed % 2**31
    if request.stop:
        body["stop"] = list(request.stop)
    if request.template_kwargs:
        body["chat_template_kwargs"] = dict(request.template_kwargs)
    if not request.turns:
        return body | {"prompt": request.text}
    if request.turns[-1].role == "assistant":  # vLLM goes on with an answer only if it is told so
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    turns = [(turn, without_thought(turn.text) if turn.role == "assistant" else turn.text) for turn in request.turns]
    kept = [{"role": turn.role, "content": _content(turn, text)} for turn, text in turns if text or turn.pictures]
    return body | {"messages": kept}


def without_thought(text: str) -> str:
    """An answer without what was thought before it, which servers do not want back."""
    if not text.lstrip().startswith(THINK):
        return text
    return text.partition(THOUGHT)[2].lstrip()


def _default(name: str) -> Any:
    row = Sampling.model_fields.get(name)
    return row.default if row else None


def refused_option(said: str, sent: dict[str, Any], body: dict[str, Any]) -> str | None:
    """The option that a server's refusal is about, by the name that we have for it; None where it is about none."""
    with suppress(ValueError, RecursionError):
        error = json.loads(said).get("error") if said.lstrip().startswith("{") else None
        named = error.get("param") if isinstance(error, dict) else None
        if isinstance(named, str) and named in sent and named in body:
            return named if named not in ("model", "messages", "prompt", "stream") else None
    options = [name for name in body if name not in ("model", "messages", "prompt", "stream")]
    found = [(place.start(), name) for name in options if (place := re.search(rf"(?<!\w){name}(?!\w)", said))]
    return min(found)[1] if found else None


class RefusedByServer(TrellisError):
    """A server answered with an error of its own. `said` is what it said."""

    def __init__(self, message: str, said: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.said = said


def _content(turn: Turn, text: str) -> str | list[dict[str, Any]]:
    """What one side said, with pictures where there are some."""
    if not turn.pictures:
        return text
    pictures = [{"type": "image_url", "image_url": {"url": picture}} for picture in turn.pictures]
    return [*([{"type": "text", "text": text}] if text else []), *pictures]


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else 0


async def _read(response: httpx.Response, most: int = WHOLE) -> bytes:
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > most:
            return bytes(body[:most])
    return bytes(body)


def _refusal(place: Place, status: int, said: str, secret: str) -> TrellisError:
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
    try:
        data = json.loads(said)
        words = _without(secret, error_of(data) or "") if isinstance(data, dict) else ""
    except (ValueError, RecursionError):
        words = ""
    said = _without(secret, said)
    next_step = "Try again, or look into that server's log."
    if status == 404:
        next_step = "Check the address (most servers have the API under /v1), and the name of the model."
    elif status == 429:
        next_step = "Wait a moment, or look into your account there."
    return RefusedByServer(
        f"The server “{shorten(place.name)}” answered {status}: {shorten(words or said or 'nothing', 200)}", said,
        code="remote_error", next_step=next_step,
    )  # fmt: skip


def _without(secret: str, text: str) -> str:
    return text.replace(secret, "…") if secret else text


def _said_no(name: str, error: str, secret: str) -> TrellisError:
    return TrellisError(
        f"The server “{shorten(name)}” could not answer: {shorten(_without(secret, error), 200)}", code="remote_error",
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
