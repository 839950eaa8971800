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
ROLES: dict[str, Role] = {
    "user": "user", "human": "user", "prompter": "user", "[inst]": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "[/inst]": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
INSIDE = ("messages", "conversations", "conversation", "turns")
"""Keys under which an object holds its list of messages."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said. `whole` is False when it held more than text, such as a picture or a tool call."""

    role: Role
    text: str
    whole: bool = True


@dataclass(frozen=True, slots=True)
class _Marks:
    """How one chat format marks who speaks. Plain words count only where both sides speak."""

    mark: re.Pattern[str]
    ends: tuple[str, ...] = ()
    plain: bool = False


FORMATS = (
    _Marks(re.compile(r"(?:\A|\n\n)(Human|Assistant|System):[ \n]?"), plain=True),  # Anthropic HH
    _Marks(re.compile(r"### ?(Human|Assistant|System):\s?"), plain=True),  # Guanaco
    _Marks(re.compile(r"<\|im_start\|>(\w+)(?:\n|\Z)"), ("<|im_end|>",)),  # ChatML
    _Marks(re.compile(r"(?:<\|begin_of_text\|>)?<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*"), ("<|eot_id|>",)),
    _Marks(re.compile(r"(?:<bos>)?<start_of_turn>(\w+)(?:\n|\Z)"), ("<end_of_turn>",)),  # Gemma
    _Marks(re.compile(r"<\|(system|user|assistant)\|>\s*"), ("</s>", "<|end|>", "<|endoftext|>")),  # Zephyr, Phi-3
    _Marks(re.compile(r"(?:<s>\s*)?(\[/?INST\])"), ("</s>",)),  # Llama 2
)
BEGINNINGS = frozenset("[{a<#HAS")
"""Characters with which a conversation as text can begin: most texts are told from one by these alone."""
_SYSTEM_INSIDE = re.compile(r"\s*<<SYS>>\s*(.*?)\s*<</SYS>>\s*", re.DOTALL)
_LIST_OF_MESSAGES = re.compile(
    r"(?:array\()?\[\s*\{\s*(['\"])(?:" + "|".join((*ROLE_KEYS, *TEXT_KEYS)) + r")\1\s*:", re.IGNORECASE
)


class NotJSON(ValueError):
    """Text that is a list of messages by its look, and cannot be parsed as one."""


def turns_of(value: Any) -> list[Turn] | None:
    """The turns of a conversation in any of its shapes; None for what is no conversation. Raises NotJSON."""
    if isinstance(value, str):
        return _turns_in_text(value)
    if isinstance(value, Mapping):
        if _is_message(value):
            return [_turn(value)]
        lists = [value[key] for key in INSIDE if isinstance(value.get(key), (list, tuple))]
        return turns_of(lists[0]) if len(lists) == 1 else None
    if not value or not isinstance(value, (list, tuple)):
        return None
    messages = all(isinstance(each, Mapping) and _is_message(each) for each in value)
    return [_turn(each) for each in value] if messages else None


def _is_message(value: Mapping[str, Any]) -> bool:
    return any(isinstance(value.get(key), str) for key in ROLE_KEYS) and any(
        key in value for key in (*TEXT_KEYS, "tool_calls")
    )


def _turn(message: Mapping[str, Any]) -> Turn:
    role = next(str(message[key]) for key in ROLE_KEYS if isinstance(message.get(key), str))
    text, whole = _content(next((message[key] for key in TEXT_KEYS if message.get(key) is not None), None))
    return Turn(ROLES.get(role.strip().lower(), "other"), text, whole and not message.get("tool_calls"))


def _content(content: Any) -> tuple[str, bool]:
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


def _turns_in_text(text: str) -> list[Turn] | None:
    stripped = text.strip()
    if stripped[:1] not in BEGINNINGS:
        return None
    if stripped[0] in "[{" or stripped.startswith("array("):
        return _turns_in_json(stripped)
    for form in FORMATS:
        if form.mark.match(stripped):
            speakers = {ROLES.get(mark[1].lower()) for mark in form.mark.finditer(stripped)}
            if not form.plain or speakers >= {"user", "assistant"}:
                return _split(stripped, form)
    return None


def _turns_in_json(text: str) -> list[Turn] | None:
    """Messages as JSON, or as Python prints them (pandas writes a list into a CSV file like this)."""
    try:
        return turns_of(_not_text(json.loads(text)))
    except (ValueError, RecursionError):
        pass
    if text.startswith("[INST]"):
        return _split(text, FORMATS[-1])
    if not _LIST_OF_MESSAGES.match(text):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turns = turns_of(_not_text(ast.literal_eval(text)))
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        turns = None
    if turns is None:
        raise NotJSON(text[:80])
    return turns


def _not_text(value: Any) -> Any:
    return None if isinstance(value, str) else value


def _split(text: str, form: _Marks) -> list[Turn]:
    """Text at its marks. An empty last turn of the assistant, which asks for an answer, is left out."""
    found = list(form.mark.finditer(text))
    turns: list[Turn] = []
    for mark, following in zip(found, [*found[1:], None], strict=True):
        body = text[mark.end() : following.start() if following else len(text)]
        for end in form.ends:
            body = body.replace(end, "")
        if inside := _SYSTEM_INSIDE.match(body):
            turns.append(Turn("system", inside[1]))
            body = body[inside.end() :]
        turns.append(Turn(ROLES.get(mark[1].lower(), "other"), body.strip()))
    if turns and turns[-1] == Turn("assistant", ""):
        turns.pop()
    return turns
