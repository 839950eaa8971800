"""Conversations as programs export them: our JSON, Markdown, open-webui, ChatGPT, Claude, LM Studio, plain messages.

Pure: a file's text comes in, conversations go out. It does not know rooms, and what becomes of a conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

MARK = "trellis-room-1"
HEADING = re.compile(r"^## (User|Assistant)(?: \((.*)\))?[ \t]*$", re.MULTILINE)

WRAPPERS = ("conversations", "chats", "rooms", "data")
"""Names under which a file may hold a list of conversations."""

ROLES = {"human": "user", "prompter": "user", "developer": "system", "ai": "assistant", "bot": "assistant",
         "gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}  # fmt: skip
"""What other programs call a role."""


class Unreadable(Exception):
    """Why a file, or one conversation of it, cannot be read."""


@dataclass
class Said:
    """One message as a file has it: `content` may be text, or a list of parts. A `parent` that is no text is none."""

    id: Any
    parent: Any
    role: Any
    content: Any
    model: Any = None
    created: float | None = None
    group: Any = None
    rating: Any = None
    usage: Any = None
    finish: Any = None
    files: list[str] = field(default_factory=list)
    """Names of files that went with it."""

    def __post_init__(self) -> None:
        self.parent = self.parent if isinstance(self.parent, str) else None


@dataclass
class Conversation:
    """One conversation as a file has it. Of a foreign one, steps in which nothing was said may be left out."""

    title: str
    messages: list[Said]
    head: Any
    system: Any = ""
    models: Any = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    foreign: bool = True


def conversations_in(body: bytes) -> list[tuple[str, Any]]:
    """The conversations of a file, each with what to call it, not read yet. Raises Unreadable."""
    text = _decoded(body)
    if text.lstrip()[:1] not in ("{", "["):
        return [("", text)]
    try:
        data = json.loads(text)
    except RecursionError:
        raise Unreadable("it is nested too deeply") from None
    except ValueError as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or not all(line.lstrip().startswith("{") for line in lines):
            raise Unreadable(f"it isn't valid JSON ({error})") from None
        return [(f"line {number}", _line(line)) for number, line in enumerate(lines, 1)]
    if isinstance(data, dict) and not _kind_of(data):
        data = next((data[name] for name in WRAPPERS if isinstance(data.get(name), list)), data)
    found = data if isinstance(data, list) else [data]
    if found and all(isinstance(each, dict) and "role" in each and "content" in each for each in found):
        found = [{"messages": found}]  # one conversation, as the OpenAI API takes it
    return [(_title_of(each) or f"number {number}", each) for number, each in enumerate(found, 1)]


def _decoded(body: bytes) -> str:
    if body.startswith(b"PK\x03\x04"):
        raise Unreadable("it is a ZIP archive; unpack it and choose the file “conversations.json”")
    try:
        return body.decode("utf-16" if body[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("it isn't UTF-8 text") from None


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"it isn't valid JSON ({error})")


def _title_of(data: Any) -> str:
    if not isinstance(data, dict):
        return ""
    inside = data["chat"] if isinstance(data.get("chat"), dict) else {}
    title = data.get("title") or inside.get("title") or data.get("name")
    return title if isinstance(title, str) else ""


def conversation_from(data: Any) -> Conversation:
    """Raises Unreadable."""
    if isinstance(data, Unreadable):
        raise data
    if isinstance(data, str):
        return from_markdown(data)
    read = _kind_of(data)
    if read is None:
        raise Unreadable("its format isn't supported")
    return read(data)


def _kind_of(data: Any) -> Callable[[dict[str, Any]], Conversation] | None:
    """The function that reads a conversation; None where none does."""
    if not isinstance(data, dict):
        return None
    if data.get("format") == MARK:
        return _from_ours
    if isinstance(data.get("mapping"), dict):
        return _from_chatgpt
    if isinstance(data.get("chat_messages"), list):
        return _from_claude
    chat = data.get("chat", data)
    if isinstance(chat, dict) and isinstance(chat.get("history"), dict):
        return _from_open_webui
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if isinstance(messages, list):
        is_lm_studio = any(isinstance(each, dict) and isinstance(each.get("versions"), list) for each in messages)
        return _from_lm_studio if is_lm_studio else _from_messages
    return None


def _from_ours(data: dict[str, Any]) -> Conversation:
    said = [
        Said(each.get("id"), each.get("parent"), each.get("role"), each.get("text"), each.get("model"),
             time_of(each.get("created")), each.get("group"), each.get("rating"), each.get("usage"),
             each.get("finish"))
        for each in _messages(data.get("messages"))
    ]  # fmt: skip
    sampling = data["sampling"] if isinstance(data.get("sampling"), dict) else {}
    return Conversation(
        _title_of(data), said, data.get("head"), data.get("system"), data.get("models"), sampling, False
    )


def _from_open_webui(data: dict[str, Any]) -> Conversation:
    chat = data.get("chat", data)
    history = chat["history"]
    found = history.get("messages")
    if not isinstance(found, dict):
        raise Unreadable("its history has no messages")
    said = [
        Said(each.get("id"), each.get("parentId"), each.get("role"), each.get("content"), each.get("model"),
             time_of(each.get("timestamp")), files=_names_of(each.get("files")))
        for each in _messages(list(found.values()))
    ]  # fmt: skip
    return Conversation(_title_of(data), said, history.get("currentId"), chat.get("system"), chat.get("models"))


def _from_messages(data: dict[str, Any]) -> Conversation:
    """A list of messages, one after the other."""
    chat = data.get("chat", data)
    said = [
        Said(str(place), str(place - 1) if place else None, each.get("role", each.get("sender", each.get("from"))),
             _first_of(each, "content", "text", "value"), each.get("model"),
             time_of(_first_of(each, "timestamp", "created_at", "created")), files=_names_of(each.get("files")))
        for place, each in enumerate(_messages(chat.get("messages")))
    ]  # fmt: skip
    models = chat.get("models") or [chat.get("model")]
    return Conversation(_title_of(data), said, str(len(said) - 1), chat.get("system"), models)


def _from_claude(data: dict[str, Any]) -> Conversation:
    said: list[Said] = []
    ids = {uuid for each in _dicts(data["chat_messages"]) if isinstance(uuid := each.get("uuid"), str)}
    for place, each in enumerate(_messages(data["chat_messages"])):
        above = each.get("parent_message_uuid")
        parent = above if isinstance(above, str) and above in ids else said[-1].id if said and above is None else None
        files = _names_of(each.get("attachments")) + _names_of(each.get("files"))
        said.append(Said(each.get("uuid") or str(place), parent, each.get("sender"), _first_of(each, "content", "text"),
                         created=time_of(each.get("created_at")), files=files))  # fmt: skip
    head = data.get("current_leaf_message_uuid") or (said[-1].id if said else None)
    return Conversation(_title_of(data), said, head)


def _from_chatgpt(data: dict[str, Any]) -> Conversation:
    said: list[Said] = []
    for name, node in data["mapping"].items():
        message = node.get("message") if isinstance(node, dict) else None
        message = message if isinstance(message, dict) else {}
        author = message["author"] if isinstance(message.get("author"), dict) else {}
        about = message["metadata"] if isinstance(message.get("metadata"), dict) else {}
        content = message["content"] if isinstance(message.get("content"), dict) else {}
        role: Any = author.get("role") if message else "node"
        recipient = message.get("recipient")
        if role == "assistant" and (recipient not in (None, "all") or content.get("content_type") == "code"):
            role = "tool call"
        if about.get("is_visually_hidden_from_conversation"):
            role = "hidden"
        parent = node.get("parent") if isinstance(node, dict) else None
        said.append(Said(name, parent, role, _content_of_chatgpt(content), about.get("model_slug"),
                         time_of(message.get("create_time")), files=_names_of(about.get("attachments"))))  # fmt: skip
    return Conversation(_title_of(data), said, data.get("current_node"), models=[data.get("default_model_slug")])


def _content_of_chatgpt(content: dict[str, Any]) -> Any:
    """The parts of a message, of which there are many kinds."""
    if isinstance(content.get("parts"), list):
        return content["parts"]
    if isinstance(content.get("thoughts"), list):
        thoughts = [_first_of(each, "content", "summary") for each in _dicts(content["thoughts"])]
        return [{"type": "thinking", "thinking": "\n\n".join(each for each in thoughts if isinstance(each, str))}]
    return _first_of(content, "text", "result") if content.get("content_type") != "reasoning_recap" else ""


def _from_lm_studio(data: dict[str, Any]) -> Conversation:
    said: list[Said] = []
    parent: str | None = None
    for place, each in enumerate(_messages(data["messages"])):
        versions = _dicts(each.get("versions"))
        chosen = each.get("currentlySelected")
        chosen = chosen if isinstance(chosen, int) and 0 <= chosen < len(versions) else 0
        for number, version in enumerate(versions):
            sender = version["senderInfo"] if isinstance(version.get("senderInfo"), dict) else {}
            content = version.get("content")
            if isinstance(version.get("steps"), list):
                content = [part for step in _dicts(version["steps"]) for part in _parts_of_step(step)]
            said.append(Said(f"{place}.{number}", parent, version.get("role"), content, sender.get("senderName")))
        if versions:
            parent = f"{place}.{chosen}"
    return Conversation(_title_of(data), said, parent, data.get("systemPrompt"))


def _parts_of_step(step: dict[str, Any]) -> list[Any]:
    style = step["style"] if isinstance(step.get("style"), dict) else {}
    parts = step["content"] if isinstance(step.get("content"), list) else []
    if style.get("type") != "thinking":
        return parts
    return [{"type": "thinking", "thinking": each.get("text", "")} for each in _dicts(parts)]


def from_markdown(text: str) -> Conversation:
    """Raises Unreadable."""
    found = list(HEADING.finditer(text))
    if not found:
        raise Unreadable("it has no heading “## User”")
    said = []
    for place, heading in enumerate(found):
        end = found[place + 1].start() if place + 1 < len(found) else len(text)
        said.append(Said(str(place), str(place - 1) if place else None, heading[1].lower(),
                         text[heading.end() : end].strip(), heading[2]))  # fmt: skip
    before = text[: found[0].start()].strip().splitlines()
    title = before[0].lstrip("# ") if before and before[0].startswith("# ") else ""
    system = "\n".join(line.removeprefix("> ").removeprefix(">") for line in before if line.startswith(">"))
    models = [each.model for each in said if each.model]
    return Conversation(title, said, str(len(said) - 1), system, models, foreign=False)


# ── What a message says ────────────────────────────────────────────────────────────────────────────

TEXTS = ("text", "input_text", "output_text", "markdown", "audio_transcription")


@dataclass
class Content:
    """The text of a message; what else was in it, by its kind."""

    text: str
    left_out: list[str] = field(default_factory=list)


def content_of(value: Any) -> Content:
    """Text, or a list of parts, as text: thoughts between tags in front, and a mark where a picture was. Raises
    Unreadable for what is neither."""
    if value is None or isinstance(value, str):
        return Content(value or "")
    if isinstance(value, dict):
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list):
        raise Unreadable("isn't text or a list of parts")
    found, thoughts, said = Content(""), [], []
    for part in value:
        kind, text = _part(part)
        if kind == "text":
            said.append(text)
        elif kind == "thought":
            thoughts.append(text)
        else:
            found.left_out.append(kind)
            if kind == "picture":
                said.append("[picture]")
    found.text = _joined(said)
    if thought := "\n\n".join(filter(None, thoughts)):
        found.text = f"<think>\n{thought}\n</think>\n\n{found.text}"
    return found


def _joined(texts: list[str]) -> str:
    """Parts one after the other, each on a line of its own where they are more than one."""
    return "\n".join(text for text in texts if text)


def _part(part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise Unreadable("has a part that isn't text or an object")
    kind = str(part.get("type") or part.get("content_type") or "text")
    if kind in ("thinking", "reasoning", "thoughts"):
        thought = _first_of(part, "thinking", "text", "content")
        return "thought", thought if isinstance(thought, str) else ""
    if "image" in kind or "picture" in kind:
        return "picture", ""
    text = _first_of(part, "text", "content")
    if kind in TEXTS and isinstance(text, str):
        return "text", text
    return kind.replace("_", " ")[:40], ""


def _first_of(data: dict[str, Any], *names: str) -> Any:
    """The first value that is there and not empty; else the first that is there."""
    return next((data[name] for name in names if data.get(name)), next((data[n] for n in names if n in data), None))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _messages(value: Any) -> list[dict[str, Any]]:
    """Raises Unreadable for what is no list of objects."""
    if not isinstance(value, list):
        raise Unreadable("it has no list of messages")
    for place, each in enumerate(value):
        if not isinstance(each, dict):
            raise Unreadable(f"message {place + 1} is not an object")
    return value


def _names_of(files: Any) -> list[str]:
    return list(_iterate_names(files))


def _iterate_names(files: Any) -> Iterator[str]:
    for each in _dicts(files):
        name = _first_of(each, "name", "file_name", "filename")
        yield name if isinstance(name, str) else "a picture" if each.get("type") == "image" else "a file"


def time_of(value: Any) -> float | None:
    """Seconds since 1970 of a number or an ISO date; None for what is neither, or far away."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e14:
        return float(value) / (1000 if value > 1e11 else 1)
    try:
        found = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except (ValueError, OverflowError):
        return None
    return found if 0 < found < 1e11 else None
