"""The bodies of requests to `/v1`, as OpenAI's clients send them, and what they ask of a chat target.

What is not supported is refused by its name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from ..errors import Invalid, shorten
from ..messages import Chat, Turn, derived_seed
from ..options import Sampling
from ..text_rules import require_storable

MAX_TEXT_LENGTH = 1_500_000
MAX_ANSWER_TOKENS = 8192
"""The most tokens of one answer, and the default."""

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False), "modalities": (["text"],), "response_format": ({"type": "text"},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({}, []), "echo": (False,), "suffix": ("",),
    "store": (False,), "service_tier": ("auto", "default"), "stop_token_ids": ([],), "bad_words": ([],),
    "use_beam_search": (False,), "length_penalty": (1,), "ignore_eos": (False,), "skip_special_tokens": (True,),
    "best_of": (1,), "include_stop_str_in_output": (False,), "add_generation_prompt": (True,),
    "web_search_options": ({},),
}  # fmt: skip
"""Unsupported fields, with the values that ask for nothing."""

IGNORED_FIELDS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
"""Fields that do not affect the answer."""

IGNORED_MESSAGE_FIELDS = {"name", "reasoning", "reasoning_content"}
"""Fields that clients keep beside the text. Earlier thoughts are not shown to a model again."""

MessageText = Annotated[str, Field(max_length=MAX_TEXT_LENGTH), AfterValidator(require_storable)]
StopString = Annotated[str, Field(min_length=1, max_length=200)]


TemplateVariables = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=100)], StrictBool | StrictInt | StrictFloat | MessageText],
    Field(max_length=50),
]
"""Plain values by name, for the chat template."""


class ContentPart(BaseModel):
    type: str = Field(max_length=40)
    text: MessageText = ""


class ChatMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: MessageText | Annotated[list[ContentPart], Field(max_length=500, fail_fast=True)] | None = None

    def to_turn(self, index: int) -> Turn:
        """Raise Invalid for content other than text."""
        _reject_unsupported_fields(
            self.model_extra, IGNORED_MESSAGE_FIELDS, {"annotations": ([],), "tool_calls": ([],)},
                       f"messages.{index}.")  # fmt: skip
        role: Literal["system", "user", "assistant"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, list):
            return Turn(role=role, text=self.content or "")
        for part in self.content:
            if part.type != "text":
                raise Invalid(
                    f"messages.{index}.content: “{shorten(part.type)}” is not supported; only text is.",
                    field=f"messages.{index}.content", code="unsupported_value", next_step="Send only text.",
                )  # fmt: skip
        return Turn(role=role, text="".join(part.text for part in self.content))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")
    include_usage: bool = False
    include_obfuscation: bool = False
    """Padding against eavesdroppers; accepted and ignored."""


class BaseCompletionRequest(BaseModel):
    """The fields that both endpoints share."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str = Field(min_length=1, max_length=300)
    n: int | None = Field(1, ge=1, le=16)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    temperature: float | None = Field(1.0, ge=0, le=5)
    top_p: float | None = Field(1.0, ge=0, le=1)
    min_p: float | None = Field(0.0, ge=0, lt=1)
    top_k: int | None = Field(0, ge=-1, le=10_000_000)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=10)
    min_tokens: int | None = Field(0, ge=0, le=MAX_ANSWER_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)

    @property
    def answer_token_limit(self) -> int | None:
        return self.max_tokens

    def to_chat(self, seed: int, index: int, **fields: Any) -> Chat:
        """Return the request for the answer at `index` among `n`. Its seed is derived by hash, so that answers of
        neighbouring seeds have nothing in common."""
        return Chat(
            sampling=self.sampling(), seed=derived_seed("answer", seed, index), stop=self.stop_strings(),
            top_k=max(self.top_k or 0, 0), repetition_penalty=self.repetition_penalty or 1.0,
            min_tokens=self.min_tokens or 0, **fields,
        )  # fmt: skip

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=max(1.0 if self.top_p is None else self.top_p, 1e-6),
            min_p=self.min_p or 0.0,
            max_new_tokens=min(self.answer_token_limit or MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS),
        )

    def stop_strings(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def reject_unsupported(self) -> None:
        """Raise Invalid for what would otherwise be ignored."""
        _reject_unsupported_fields(self.model_extra, IGNORED_FIELDS, NEUTRAL_VALUES)
        if self.stream_options:
            _reject_unsupported_fields(self.stream_options.model_extra, set(), {}, "stream_options.")
        longest = min(self.answer_token_limit or MAX_ANSWER_TOKENS, MAX_ANSWER_TOKENS)
        if (self.min_tokens or 0) > longest:
            raise Invalid(
                f"min_tokens: {self.min_tokens} is more than the limit of {longest} tokens.",
                field="min_tokens", code="invalid_value", next_step="Lower it, or raise max_tokens.",
            )  # fmt: skip


def _reject_unsupported_fields(
    extra: dict[str, Any] | None, ignored: set[str], neutral: Mapping[str, tuple[Any, ...]], prefix: str = ""
) -> None:
    """Raise Invalid, which names the first field that is not supported. Null asks for nothing."""
    for name, value in (extra or {}).items():
        if value is None or name in ignored or any(value == each for each in neutral.get(name, ())):
            continue
        known = name in neutral
        raise Invalid(
            f"{prefix}{shorten(name)}: {'this is not supported here' if known else 'there is no such parameter here'}, "
            f"got “{shorten(value)}”.",
            field=f"{prefix}{shorten(name)}", code="unsupported_parameter", next_step="Leave it out.",
        )  # fmt: skip


class ChatCompletionRequest(BaseCompletionRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=5000, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, le=10_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    chat_template_kwargs: TemplateVariables | None = None

    @property
    def answer_token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(BaseCompletionRequest):
    prompt: (
        MessageText
        | Annotated[list[MessageText | int | list[int]], Field(min_length=1, max_length=10_000, fail_fast=True)]
    ) = ""
    max_tokens: int | None = Field(16, ge=1, le=10_000_000)
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=16)

    def prompts(self) -> list[str]:
        """Raise Invalid for token ids."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        found = [text for text in texts if isinstance(text, str)]
        if len(found) < len(texts) or len(found) > 64:
            what = "token ids are not supported, only text" if len(found) < len(texts) else "at most 64 prompts"
            raise Invalid(f"prompt: {what}.", field="prompt", code="unsupported_value", next_step="Send text.")
        return found
