"""Conversations as data sets keep them: lists of messages, the same as JSON text, or one string with speaker marks.

It only parses. Which turn is a prompt and which an answer is for the caller to decide.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "other"]
ROLE_BY_NAME: dict[str, Role] = {
    "user": "user", "human": "user", "prompter": "user", "[inst]": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "[/inst]": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
MESSAGE_LIST_KEYS = ("messages", "conversations", "conversation", "turns")
"""Keys under which an object holds its list of messages."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn. `whole` is False if it held more than text, such as a picture or a tool call."""

    role: Role
    text: str
    is_text_only: bool = True


@dataclass(frozen=True, slots=True)
class _ChatFormat:
    """How one chat format marks roles. Plain words count only if both roles occur."""

    turn_marker: re.Pattern[str]
    end_markers: tuple[str, ...] = ()
    needs_both_roles: bool = False


CHAT_FORMATS = (
    _ChatFormat(re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ \n]?"), needs_both_roles=True),  # Anthropic HH
    _ChatFormat(re.compile(r"### ?(Human|Assistant|System):\s?"), needs_both_roles=True),  # Guanaco
    _ChatFormat(re.compile(r"<\|im_start\|>(\w+)(?:\n|\Z)"), ("<|im_end|>",)),  # ChatML
    _ChatFormat(
        re.compile(r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*"), ("<|eot_id|>",)
    ),
    _ChatFormat(re.compile(r"(?:<bos>)?<start_of_turn>(\w+)(?:\n|\Z)"), ("<end_of_turn>",)),  # Gemma
    _ChatFormat(re.compile(r"<\|(system|user|assistant)\|>\s*"), ("</s>", "<|end|>", "<|endoftext|>")),  # Zephyr, Phi-3
    _ChatFormat(re.compile(r"(?:<s>\s*)?(\[/?INST\])"), ("</s>",)),  # Llama 2
)
FIRST_CHARACTERS = frozenset("[{a<#HAS")
"""First characters of conversations as text; most other texts are ruled out by these alone."""
_LLAMA_SYSTEM_PROMPT = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
_LIST_OF_MESSAGES = re.compile(
    r"(?:array\()?\[\s*\{\s*(['\"])(?:" + "|".join((*ROLE_KEYS, *TEXT_KEYS)) + r")\1\s*:", re.IGNORECASE
)


class NotJSON(ValueError):
    """Text that is a list of messages by its look, and cannot be parsed as one."""


def parse_turns(value: Any) -> list[Turn] | None:
    """Return the turns of a conversation in any known shape; None for anything else. Raise NotJSON."""
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, Mapping):
        if _is_message(value):
            return [_parse_message(value)]
        lists = [value[key] for key in MESSAGE_LIST_KEYS if isinstance(value.get(key), (list, tuple))]
        return parse_turns(lists[0]) if len(lists) == 1 else None
    if not value or not isinstance(value, (list, tuple)):
        return None
    messages = all(isinstance(each, Mapping) and _is_message(each) for each in value)
    return [_parse_message(each) for each in value] if messages else None


def _is_message(value: Mapping[str, Any]) -> bool:
    return any(isinstance(value.get(key), str) for key in ROLE_KEYS) and any(
        key in value for key in (*TEXT_KEYS, "tool_calls")
    )


def _parse_message(message: Mapping[str, Any]) -> Turn:
    role = next(str(message[key]) for key in ROLE_KEYS if isinstance(message.get(key), str))
    text, whole = _parse_content(next((message[key] for key in TEXT_KEYS if message.get(key) is not None), None))
    return Turn(ROLE_BY_NAME.get(role.strip().lower(), "other"), text, whole and not message.get("tool_calls"))


def _parse_content(content: Any) -> tuple[str, bool]:
    """The text of a message, and whether that is all it holds."""
    if isinstance(content, str):
        return content, True
    if not isinstance(content, (list, tuple)):
        return "", content is None
    texts, whole = [], True
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if isinstance(text, str):
            texts.append(text)
        else:
            whole = False
    return "\n".join(text for text in texts if text), whole


def _parse_text(text: str) -> list[Turn] | None:
    stripped = text.strip()
    if stripped[:1] not in FIRST_CHARACTERS:
        return None
    if stripped[0] in "[{" or stripped.startswith("array("):
        return _parse_json(stripped)
    for chat_format in CHAT_FORMATS:
        if chat_format.turn_marker.match(stripped):
            roles = {ROLE_BY_NAME.get(mark[1].lower()) for mark in chat_format.turn_marker.finditer(stripped)}
            if not chat_format.needs_both_roles or roles >= {"user", "assistant"}:
                return _split_at_markers(stripped, chat_format)
    return None


def _parse_json(text: str) -> list[Turn] | None:
    """Messages as JSON, or as Python prints them (pandas writes a list into a CSV file like this)."""
    try:
        return parse_turns(_none_if_text(json.loads(text)))
    except (ValueError, RecursionError):
        pass
    if text.startswith("[INST]"):
        return _split_at_markers(text, CHAT_FORMATS[-1])
    if not _LIST_OF_MESSAGES.match(text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turns = parse_turns(_none_if_text(ast.literal_eval(text)))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        turns = None
    if turns is None:
        raise NotJSON(text[:80])
    return turns


def _none_if_text(value: Any) -> Any:
    return None if isinstance(value, str) else value


def _split_at_markers(text: str, chat_format: _ChatFormat) -> list[Turn]:
    """Text at its marks. An empty last turn of the assistant, which asks for an answer, is left out."""
    found = list(chat_format.turn_marker.finditer(text))
    turns: list[Turn] = []
    for mark, following in zip(found, [*found[1:], None], strict=True):
        body = text[mark.end() : following.start() if following else len(text)]
        for end in chat_format.end_markers:
            body = body.replace(end, "")
        if inside := _LLAMA_SYSTEM_PROMPT.match(body):
            turns.append(Turn("system", inside[1]))
            body = body[inside.end() :]
        turns.append(Turn(ROLE_BY_NAME.get(mark[1].lower(), "other"), body.strip()))
    if turns and turns[-1] == Turn("assistant", ""):
        turns.pop()
    return turns
