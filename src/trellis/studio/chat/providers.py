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

from ...errors import Invalid, TrellisError, shorten
from ...markdown_blocks import THINK_CLOSE, THINK_OPEN
from ...messages import AnswerDone, Chat, Event, PromptRead, TextDelta, Turn
from ...options import Sampling
from ...store import providers as rows
from ...store.store import Store
from ..egress import CheckedUrl, check_url, host_and_port, parse_url, resolve_url
from .local_servers import LocalServers
from .openai_completions import (
    MAX_BODY_BYTES,
    AnswerAssembler,
    EventStream,
    NotACompletion,
    error_message,
    parse_deltas,
)
from .target import ChatTarget, OnProgress

if TYPE_CHECKING:
    import httpx

CONNECT_SECONDS, READ_SECONDS = 10.0, 120.0
MAX_ANSWER_CHARACTERS = 200_000
"""Characters of one answer."""

MAX_MODELS = 500


class Providers:
    """All servers that were added. `own` may have private addresses, and so may those that `permitted` names."""

    def __init__(self, store: Store, own_servers: Collection[str], local_servers: LocalServers) -> None:
        self._store, self._own_servers, self._local_servers = store, own_servers, local_servers
        self._client: httpx.AsyncClient | None = None
        self._client_lock = asyncio.Lock()
        self.option_names: dict[tuple[str, str], dict[str, str]] = {}
        """What models on servers call an option, or (empty) that they do not take it, by server and model."""

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def list_providers(self) -> list[dict[str, Any]]:
        return [_provider_json(row) for row in await self._store.read(rows.list_providers)]

    async def add(
        self, name: str, url: str, secret: str, models: list[str], supports_pictures: bool, allow_private: bool = False
    ) -> dict[str, Any]:
        """Add a server. Its models are asked for where none are named. Raises what is wrong with it. With `permit`, it
        may have a private address from now on: whoever calls has made sure that a person at this computer said so."""
        if "/" in name:
            raise Invalid(
                f"name: can't contain “/”, got “{shorten(name)}”.", field="name", next_step="Choose another name."
            )
        if unprintable := next((each for each in (name, *models) if not each.isprintable()), None):
            raise Invalid(
                f"name: “{shorten(unprintable)}” contains invisible characters.",
                field="name",
                next_step="Type it by hand.",
            )
        url = url.strip().rstrip("/")
        parse_url(url)
        if not all(32 < ord(letter) < 127 for letter in secret):
            raise Invalid("key: contains invalid characters.", field="key", next_step="Paste only the key.")
        with self._local_servers.permit_temporarily(
            await resolve_url(url) if allow_private else None
        ) as private_server:
            url, model_names = (url, models) if models else await self._discover_models(url, secret)
            await self._require_allowed(url)
            row = {
                "id": f"o{secrets.token_hex(8)}", "name": name, "url": url, "secret": secret, "models": model_names,
                "sees": int(supports_pictures), "created": time.time(),
            }  # fmt: skip
            if private_server:
                await asyncio.to_thread(self._local_servers.save, private_server)
            await self._store.write(rows.save_provider, row)
        return _provider_json(row)

    async def delete(self, provider_id: str) -> None:
        """Forget a server, and that it may have a private address where no other one is at the same place."""
        await self._store.write(rows.delete_provider, provider_id)
        remaining_servers = {host_and_port(row["url"]) for row in await self._store.read(rows.list_providers)}
        await asyncio.to_thread(self._local_servers.retain_only, remaining_servers)

    async def _require_allowed(self, url: str) -> None:
        """Raises Refused. A server that is away may be added; it is looked up again whenever it is asked."""
        try:
            await check_url(url, self._own_servers, self._local_servers.is_permitted)
        except TrellisError as error:
            if error.code != "network":
                raise

    async def _discover_models(self, url: str, secret: str) -> tuple[str, list[str]]:
        """The models of a server, and the address at which it has the API: as it was typed, or under /v1."""
        try:
            return url, await self._list_models(url, secret)
        except TrellisError as error:
            if error.code not in ("remote_error", "redirected") or urlsplit(url).path:
                raise
            try:
                return f"{url}/v1", await self._list_models(f"{url}/v1", secret)
            except TrellisError as second:
                raise second if second.code == "wrong_key" else error from None

    async def find(self, name: str) -> ChatTarget | None:
        """Who is called `remote:<server>/<model>`."""
        server, _, model = name.removeprefix("remote:").partition("/")
        row = await self._store.read(rows.provider_by_name, server)
        return ProviderTarget(self, row, model) if row and model else None

    async def _list_models(self, url: str, secret: str) -> list[str]:
        async with self.open_response("GET", url, "/models", secret) as response:
            body = await _read_body(response)
        try:
            data = json.loads(body)["data"]
            ids = [each["id"] for each in data]
            names = [each for each in ids if isinstance(each, str) and 0 < len(each) <= 200 and each.isprintable()]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _not_openai_api_error(url) from None
        if not names:
            raise Invalid(
                f"The server at “{shorten(url)}” lists no models.", field="models", next_step="Enter its model names."
            )
        return sorted(names)[:MAX_MODELS]

    async def _get_client(self) -> httpx.AsyncClient:
        """The one client, made in a thread: what it trusts takes a tenth of a second to read. It keeps no connection,
        so that none is used for another name at the same address."""
        async with self._client_lock:
            if self._client is None:
                self._client = await asyncio.to_thread(_new_client)
            return self._client

    @asynccontextmanager
    async def open_response(
        self, method: str, url: str, path: str, secret: str, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """A response whose status is good, not read yet. The address is looked up and checked now, and no other is
        used; a redirect is not followed. Raises TrellisError."""
        import httpx  # only who talks to a server elsewhere needs it

        checked_url = await check_url(url, self._own_servers, self._local_servers.is_permitted)
        headers = {
            "host": checked_url.host_header,
            "accept": "application/json, text/event-stream",
            "accept-encoding": "identity",
        }
        if secret:
            headers["authorization"] = f"Bearer {secret}"
        try:
            client = await self._get_client()
            async with client.stream(
                method, checked_url.url + path, headers=headers, json=body,
                extensions={"sni_hostname": checked_url.host} if checked_url.scheme == "https" else {},
            ) as response:  # fmt: skip
                if response.status_code not in (200, 201):
                    response_text = (await _read_body(response, 4000)).decode("utf-8", "replace")
                    raise _status_error(checked_url, response.status_code, response_text, secret)
                yield response
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TrellisError(
                f"The server “{shorten(checked_url.host_header)}” {_describe_failure(error)}.", code="network",
                field="url",
                next_step="Check that it is running and that its address is right.",
            ) from None  # fmt: skip


def _describe_failure(error: Exception) -> str:
    import httpx

    match error:
        case httpx.ConnectTimeout():
            return f"didn't respond within {CONNECT_SECONDS:.0f} seconds"
        case httpx.ConnectError():
            return "can't be reached: nothing is listening at its address and port"
        case httpx.TimeoutException():
            return f"sent nothing for {READ_SECONDS:.0f} seconds"
        case httpx.RemoteProtocolError() | httpx.ReadError():
            return "closed the connection in the middle of its answer"
    return f"can't be reached ({type(error).__name__})"


def _new_client() -> httpx.AsyncClient:
    import httpx

    timeout = httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=False, trust_env=False)


class ProviderTarget(ChatTarget):
    """A model on a server elsewhere."""

    def __init__(self, providers: Providers, row: dict[str, Any], model: str) -> None:
        self._providers, self._row, self._model = providers, row, model
        self.name = f"remote:{row['name']}/{model}"
        self.label = f"{model} at {row['name']}"
        self.supports_pictures = bool(row["sees"])

    async def answer(self, request: Chat, owner: str, on_progress: OnProgress) -> AsyncGenerator[Event, None]:
        path = "/chat/completions" if request.turns else "/completions"
        is_continuation = bool(request.turns) and request.turns[-1].role == "assistant"
        answer = AnswerAssembler(request.turns[-1].text if is_continuation else "")
        started = time.monotonic()
        first_token_seconds, tokens, is_prompt_reported = 0.0, 0, False
        async with self._open_response(path, request) as response:
            stream = EventStream(response.aiter_bytes())
            try:
                async for data in stream:
                    if (error := error_message(data)) is not None:
                        raise _answer_error(self._row["name"], error, self._row["secret"])
                    if isinstance(usage := data.get("usage"), dict):
                        tokens = _parse_count(usage.get("completion_tokens")) or tokens
                        if prompt := _parse_count(usage.get("prompt_tokens")):
                            is_prompt_reported = True
                            yield PromptRead(read=prompt, prompt_tokens=prompt, warm=0, left_out=0, context_length=0)
                    for delta in parse_deltas(data):
                        if text := answer.add(delta):
                            tokens += 1
                            first_token_seconds = first_token_seconds or time.monotonic() - started
                            yield TextDelta(text=text, tokens=tokens)
                    if answer.length > MAX_ANSWER_CHARACTERS:  # whatever was asked for
                        answer.finish = "length"
                        break
            except (NotACompletion, RecursionError):
                raise _not_openai_api_error(self._row["name"]) from None
        if not answer.finish and not tokens and not answer.is_tool_call:
            raise _not_openai_api_error(self._row["name"])
        if closing_text := answer.closing_text():
            yield TextDelta(text=closing_text, tokens=tokens)
        if not is_prompt_reported:
            yield PromptRead(read=0, prompt_tokens=0, warm=0, left_out=0, context_length=0)
        answer.require_complete(self._model, self._row["name"], stream.is_done)
        yield AnswerDone(
            finish="length" if answer.finish == "length" else "stop", tokens=tokens, prompt_tokens=0,
            seconds_to_first=first_token_seconds, seconds=time.monotonic() - started,
        )  # fmt: skip

    @asynccontextmanager
    async def _open_response(self, path: str, request: Chat) -> AsyncIterator[httpx.Response]:
        """A response that is good so far. What a server does not know and nobody asked for is left out, and remembered.
        Raises TrellisError, which names an option that the server does not take."""
        body = _request_body(self._model, request)
        known_names = self._providers.option_names.setdefault((self._row["id"], self._model), {})
        changes = dict(known_names)
        while True:
            sent_body = {changes.get(name, name): value for name, value in body.items() if changes.get(name, name)}
            try:
                async with self._providers.open_response(
                    "POST", self._row["url"], path, self._row["secret"], sent_body
                ) as response:
                    known_names.update(changes)
                    yield response
                    return
            except ProviderError as error:
                name = refused_option(error.response_text, sent_body, body)
                if name is None or name in changes:
                    raise
                if name == "max_tokens":
                    changes[name] = "max_completion_tokens"
                elif name in OPTIONAL_KEYS or body[name] in (NEUTRAL_VALUES.get(name), _sampling_default(name)):
                    changes[name] = ""
                else:
                    raise Invalid(
                        f"The server “{shorten(self._row['name'])}” rejected “{name}” with the value "
                        f"{shorten(body[name])}: {shorten(error.response_text, 200)}",
                        field=name, code="option_refused",
                        next_step="Clear that parameter in the chat's settings, or choose another model.",
                    ) from None  # fmt: skip


OPTIONAL_KEYS = frozenset({"stream_options", "seed", "continue_final_message", "add_generation_prompt"})
"""What is asked for to know more, to repeat or to go on, and can be done without."""

NEUTRAL_VALUES: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0, "min_tokens": 0,
}  # fmt: skip
"""Values at which an option of sampling changes nothing."""


def _request_body(model: str, request: Chat) -> dict[str, Any]:
    """What a server is asked. All options of sampling are sent, under the names that servers have for them. Raises
    Invalid for what no server can be asked."""
    if request.top is not None:
        raise Invalid(
            "logprobs: not available for models of external providers.", field="logprobs",
            code="unsupported_parameter", next_step="Leave it out.",
        )  # fmt: skip
    sampling = {name: value for name, value in request.sampling.model_dump().items() if value is not None}
    sampling["max_tokens"] = sampling.pop("max_new_tokens")
    chat_options = {name: getattr(request, name) for name in ("top_k", "repetition_penalty", "min_tokens")}
    sampling |= {name: value for name, value in chat_options.items() if value != NEUTRAL_VALUES[name]}
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
    turns = [(turn, strip_thought(turn.text) if turn.role == "assistant" else turn.text) for turn in request.turns]
    messages = [
        {"role": turn.role, "content": _message_content(turn, text)} for turn, text in turns if text or turn.pictures
    ]
    return body | {"messages": messages}


def strip_thought(text: str) -> str:
    """An answer without what was thought before it, which servers do not want back."""
    if not text.lstrip().startswith(THINK_OPEN):
        return text
    return text.partition(THINK_CLOSE)[2].lstrip()


def _sampling_default(name: str) -> Any:
    row = Sampling.model_fields.get(name)
    return row.default if row else None


def refused_option(response_text: str, sent_body: dict[str, Any], body: dict[str, Any]) -> str | None:
    """The option that a server's refusal is about, by the name that we have for it; None where it is about none."""
    with suppress(ValueError, RecursionError):
        error = json.loads(response_text).get("error") if response_text.lstrip().startswith("{") else None
        parameter = error.get("param") if isinstance(error, dict) else None
        if isinstance(parameter, str) and parameter in sent_body and parameter in body:
            return parameter if parameter not in ("model", "messages", "prompt", "stream") else None
    options = [name for name in body if name not in ("model", "messages", "prompt", "stream")]
    found = [(place.start(), name) for name in options if (place := re.search(rf"(?<!\w){name}(?!\w)", response_text))]
    return min(found)[1] if found else None


class ProviderError(TrellisError):
    """A server answered with an error of its own. `said` is what it said."""

    def __init__(self, message: str, response_text: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.response_text = response_text


def _message_content(turn: Turn, text: str) -> str | list[dict[str, Any]]:
    """What one side said, with pictures where there are some."""
    if not turn.pictures:
        return text
    pictures = [{"type": "image_url", "image_url": {"url": picture}} for picture in turn.pictures]
    return [*([{"type": "text", "text": text}] if text else []), *pictures]


def _parse_count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else 0


async def _read_body(response: httpx.Response, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > max_bytes:
            return bytes(body[:max_bytes])
    return bytes(body)


def _status_error(checked_url: CheckedUrl, status: int, response_text: str, secret: str) -> TrellisError:
    if 300 <= status < 400:
        return TrellisError(
            f"The server “{shorten(checked_url.host_header)}” redirects to another address; redirects are "
            "not followed.",
            code="redirected", field="url", next_step="Add that address instead.",
        )  # fmt: skip
    if status in (401, 403):
        return TrellisError(
            f"The server “{shorten(checked_url.host_header)}” rejected the key.", code="wrong_key", field="key",
            next_step="Check the key, and add the server again.",
        )  # fmt: skip
    try:
        data = json.loads(response_text)
        server_message = _redact(secret, error_message(data) or "") if isinstance(data, dict) else ""
    except (ValueError, RecursionError):
        server_message = ""
    response_text = _redact(secret, response_text)
    next_step = "Try again, or check that server's log."
    if status == 404:
        next_step = "Check the address (it usually ends in /v1) and the model name."
    elif status == 429:
        next_step = "Wait a moment, or check your account there."
    return ProviderError(
        f"The server “{shorten(checked_url.host_header)}” answered {status}: "
        f"{shorten(server_message or response_text or 'nothing', 200)}",
        response_text,
        code="remote_error", next_step=next_step,
    )  # fmt: skip


def _redact(secret: str, text: str) -> str:
    return text.replace(secret, "…") if secret else text


def _answer_error(name: str, error: str, secret: str) -> TrellisError:
    return TrellisError(
        f"The server “{shorten(name)}” returned an error: {shorten(_redact(secret, error), 200)}", code="remote_error",
        next_step="Try again, or check that server's log.",
    )  # fmt: skip


def _not_openai_api_error(where: str) -> TrellisError:
    return TrellisError(
        f"The server at “{shorten(where)}” doesn't offer an OpenAI-compatible API.", code="remote_error", field="url",
        next_step="Check the address; it usually ends in /v1.",
    )  # fmt: skip


def _provider_json(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"], "name": row["name"], "url": row["url"], "has_key": bool(row["secret"]),
        "models": row["models"], "sees": bool(row["sees"]),
    }  # fmt: skip
