"""A model of an external provider as a chat target: the request in the server's terms, its answer as events."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ...errors import Invalid, TrellisError, shorten
from ...markdown_blocks import THINK_CLOSE, THINK_OPEN
from ...messages import AnswerDone, Chat, Event, PromptRead, TextDelta, Turn
from ...options import Sampling
from .openai_completions import AnswerAssembler, EventStream, NotACompletion, error_message, parse_deltas
from .provider_client import ProviderClient, ProviderError, not_openai_api_error, redact
from .target import ChatTarget, OnProgress

if TYPE_CHECKING:
    import httpx

MAX_ANSWER_CHARACTERS = 200_000
"""Characters of one answer."""

OptionNames = dict[tuple[str, str], dict[str, str]]
"""How a model's server names an option (empty: it does not accept it), by server and model."""

OPTIONAL_KEYS = frozenset({"stream_options", "seed", "continue_final_message", "add_generation_prompt"})
"""Options that requests can do without."""

NEUTRAL_VALUES: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0, "min_tokens": 0,
}  # fmt: skip
"""Values at which a sampling option has no effect."""


class ProviderTarget(ChatTarget):
    """A model of an external provider."""

    def __init__(self, client: ProviderClient, option_names: OptionNames, row: dict[str, Any], model: str) -> None:
        self._client, self._option_names, self._row, self._model = client, option_names, row, model
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
                    if answer.length > MAX_ANSWER_CHARACTERS:  # servers may ignore max_tokens
                        answer.finish = "length"
                        break
            except (NotACompletion, RecursionError):
                raise not_openai_api_error(self._row["name"]) from None
        if not answer.finish and not tokens and not answer.is_tool_call:
            raise not_openai_api_error(self._row["name"])
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
        """Open a response, leaving out options that the server does not accept and that were not set. These are
        remembered. Raise TrellisError, which names an option that was set."""
        body = _request_body(self._model, request)
        known_names = self._option_names.setdefault((self._row["id"], self._model), {})
        changes = dict(known_names)
        while True:
            sent_body = {changes.get(name, name): value for name, value in body.items() if changes.get(name, name)}
            try:
                async with self._client.open_response(
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


def _request_body(model: str, request: Chat) -> dict[str, Any]:
    """Return the body of a request: all sampling options, under the names that servers use. Raise Invalid for what
    no server accepts."""
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
    if request.turns[-1].role == "assistant":  # vLLM starts a new answer unless told to continue
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    turns = [(turn, strip_thought(turn.text) if turn.role == "assistant" else turn.text) for turn in request.turns]
    messages = [
        {"role": turn.role, "content": _message_content(turn, text)} for turn, text in turns if text or turn.pictures
    ]
    return body | {"messages": messages}


def strip_thought(text: str) -> str:
    """Return an answer without its leading thought, which servers do not expect back."""
    if not text.lstrip().startswith(THINK_OPEN):
        return text
    return text.partition(THINK_CLOSE)[2].lstrip()


def _sampling_default(name: str) -> Any:
    row = Sampling.model_fields.get(name)
    return row.default if row else None


def refused_option(response_text: str, sent_body: dict[str, Any], body: dict[str, Any]) -> str | None:
    """Return the option that a server's error is about, under our name; None for other errors."""
    with suppress(ValueError, RecursionError):
        error = json.loads(response_text).get("error") if response_text.lstrip().startswith("{") else None
        parameter = error.get("param") if isinstance(error, dict) else None
        if isinstance(parameter, str) and parameter in sent_body and parameter in body:
            return parameter if parameter not in ("model", "messages", "prompt", "stream") else None
    options = [name for name in body if name not in ("model", "messages", "prompt", "stream")]
    found = [(place.start(), name) for name in options if (place := re.search(rf"(?<!\w){name}(?!\w)", response_text))]
    return min(found)[1] if found else None


def _message_content(turn: Turn, text: str) -> str | list[dict[str, Any]]:
    """Return the content of a message, with its pictures."""
    if not turn.pictures:
        return text
    pictures = [{"type": "image_url", "image_url": {"url": picture}} for picture in turn.pictures]
    return [*([{"type": "text", "text": text}] if text else []), *pictures]


def _parse_count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**9 else 0


def _answer_error(name: str, error: str, secret: str) -> TrellisError:
    return TrellisError(
        f"The server “{shorten(name)}” returned an error: {shorten(redact(secret, error), 200)}", code="remote_error",
        next_step="Try again, or check that server's log.",
    )  # fmt: skip
