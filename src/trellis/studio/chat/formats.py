"""Read exported conversations: our JSON, Markdown, open-webui, ChatGPT, Claude, LM Studio, lists of messages.

Pure: text comes in, conversations go out. It does not know rooms.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

ROOM_FORMAT = "trellis-room-1"
MESSAGE_HEADING = re.compile(r"^## (User|Assistant)(?: \((.*)\))?[ \t]*$", re.MULTILINE)

LIST_KEYS = ("conversations", "chats", "rooms", "data")
"""Keys that may hold a list of conversations."""

ROLE_ALIASES = {"human": "user", "prompter": "user", "developer": "system", "ai": "assistant", "bot": "assistant",
         "gpt": "assistant", "model": "assistant", "chatgpt": "assistant"}  # fmt: skip
"""Role names of other programs."""


class Unreadable(Exception):
    """A file or conversation that cannot be read; the message says why."""


@dataclass
class ImportedMessage:
    """One message of a file. `content` may be text or a list of parts; a `parent` that is not text becomes None."""

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
    """Names of its attachments."""

    def __post_init__(self) -> None:
        self.parent = self.parent if isinstance(self.parent, str) else None


@dataclass
class Conversation:
    """One conversation of a file. Empty messages of a foreign one may be left out."""

    title: str
    messages: list[ImportedMessage]
    head: Any
    system: Any = ""
    models: Any = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    is_foreign: bool = True


def split_conversations(body: bytes) -> list[tuple[str, Any]]:
    """Split a file into (title, unparsed conversation) pairs. Raise Unreadable."""
    text = _decode(body)
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
        return [(f"line {number}", _parse_line(line)) for number, line in enumerate(lines, 1)]
    if isinstance(data, dict) and not _find_parser(data):
        data = next((data[name] for name in LIST_KEYS if isinstance(data.get(name), list)), data)
    conversations = data if isinstance(data, list) else [data]
    if conversations and all(isinstance(each, dict) and "role" in each and "content" in each for each in conversations):
        conversations = [{"messages": conversations}]  # one conversation in the format of the OpenAI API
    return [(_find_title(each) or f"number {number}", each) for number, each in enumerate(conversations, 1)]


def _decode(body: bytes) -> str:
    if body.startswith(b"PK\x03\x04"):
        raise Unreadable("it is a ZIP archive; unpack it and choose the file “conversations.json”")
    try:
        return body.decode("utf-16" if body[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("it isn't UTF-8 text") from None


def _parse_line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"it isn't valid JSON ({error})")


def _find_title(data: Any) -> str:
    if not isinstance(data, dict):
        return ""
    chat = data["chat"] if isinstance(data.get("chat"), dict) else {}
    title = data.get("title") or chat.get("title") or data.get("name")
    return title if isinstance(title, str) else ""


def parse_conversation(data: Any) -> Conversation:
    """Raises Unreadable."""
    if isinstance(data, Unreadable):
        raise data
    if isinstance(data, str):
        return parse_markdown(data)
    parse = _find_parser(data)
    if parse is None:
        raise Unreadable("its format isn't supported")
    return parse(data)


def _find_parser(data: Any) -> Callable[[dict[str, Any]], Conversation] | None:
    """Return the parser for a conversation; None for an unknown format."""
    if not isinstance(data, dict):
        return None
    if data.get("format") == ROOM_FORMAT:
        return _parse_trellis
    if isinstance(data.get("mapping"), dict):
        return _parse_chatgpt
    if isinstance(data.get("chat_messages"), list):
        return _parse_claude
    chat = data.get("chat", data)
    if isinstance(chat, dict) and isinstance(chat.get("history"), dict):
        return _parse_open_webui
    messages = chat.get("messages") if isinstance(chat, dict) else None
    if isinstance(messages, list):
        is_lm_studio = any(isinstance(each, dict) and isinstance(each.get("versions"), list) for each in messages)
        return _parse_lm_studio if is_lm_studio else _parse_messages
    return None


def _parse_trellis(data: dict[str, Any]) -> Conversation:
    messages = [
        ImportedMessage(each.get("id"), each.get("parent"), each.get("role"), each.get("text"), each.get("model"),
             parse_time(each.get("created")), each.get("group"), each.get("rating"), each.get("usage"),
             each.get("finish"))
        for each in _require_messages(data.get("messages"))
    ]  # fmt: skip
    sampling = data["sampling"] if isinstance(data.get("sampling"), dict) else {}
    return Conversation(
        _find_title(data), messages, data.get("head"), data.get("system"), data.get("models"), sampling, False
    )


def _parse_open_webui(data: dict[str, Any]) -> Conversation:
    chat = data.get("chat", data)
    history = chat["history"]
    message_map = history.get("messages")
    if not isinstance(message_map, dict):
        raise Unreadable("its history has no messages")
    messages = [
        ImportedMessage(each.get("id"), each.get("parentId"), each.get("role"), each.get("content"), each.get("model"),
             parse_time(each.get("timestamp")), files=_file_names(each.get("files")))
        for each in _require_messages(list(message_map.values()))
    ]  # fmt: skip
    return Conversation(_find_title(data), messages, history.get("currentId"), chat.get("system"), chat.get("models"))


def _parse_messages(data: dict[str, Any]) -> Conversation:
    """Parse a list of messages without branches."""
    chat = data.get("chat", data)
    messages = [
        ImportedMessage(str(index), str(index - 1) if index else None, each.get("role", each.get("sender",
        each.get("from"))),
             _first_value(each, "content", "text", "value"), each.get("model"),
             parse_time(_first_value(each, "timestamp", "created_at", "created")), files=_file_names(each.get("files")))
        for index, each in enumerate(_require_messages(chat.get("messages")))
    ]  # fmt: skip
    models = chat.get("models") or [chat.get("model")]
    return Conversation(_find_title(data), messages, str(len(messages) - 1), chat.get("system"), models)


def _parse_claude(data: dict[str, Any]) -> Conversation:
    messages: list[ImportedMessage] = []
    ids = {uuid for each in _dicts(data["chat_messages"]) if isinstance(uuid := each.get("uuid"), str)}
    for index, each in enumerate(_require_messages(data["chat_messages"])):
        parent_id = each.get("parent_message_uuid")
        parent = (
            parent_id
            if isinstance(parent_id, str) and parent_id in ids
            else messages[-1].id
            if messages and parent_id is None
            else None
        )
        files = _file_names(each.get("attachments")) + _file_names(each.get("files"))
        messages.append(ImportedMessage(each.get("uuid") or str(index), parent, each.get("sender"),
        _first_value(each, "content", "text"),
                         created=parse_time(each.get("created_at")), files=files))  # fmt: skip
    head = data.get("current_leaf_message_uuid") or (messages[-1].id if messages else None)
    return Conversation(_find_title(data), messages, head)


def _parse_chatgpt(data: dict[str, Any]) -> Conversation:
    messages: list[ImportedMessage] = []
    for name, node in data["mapping"].items():
        message = node.get("message") if isinstance(node, dict) else None
        message = message if isinstance(message, dict) else {}
        author = message["author"] if isinstance(message.get("author"), dict) else {}
        metadata = message["metadata"] if isinstance(message.get("metadata"), dict) else {}
        content = message["content"] if isinstance(message.get("content"), dict) else {}
        role: Any = author.get("role") if message else "node"
        recipient = message.get("recipient")
        if role == "assistant" and (recipient not in (None, "all") or content.get("content_type") == "code"):
            role = "tool call"
        if metadata.get("is_visually_hidden_from_conversation"):
            role = "hidden"
        parent = node.get("parent") if isinstance(node, dict) else None
        messages.append(ImportedMessage(name, parent, role, _chatgpt_content(content), metadata.get("model_slug"),
                         parse_time(message.get("create_time")),
                         files=_file_names(metadata.get("attachments"))))  # fmt: skip
    return Conversation(_find_title(data), messages, data.get("current_node"), models=[data.get("default_model_slug")])


def _chatgpt_content(content: dict[str, Any]) -> Any:
    """Return the parts of a message, whichever of its many kinds it is."""
    if isinstance(content.get("parts"), list):
        return content["parts"]
    if isinstance(content.get("thoughts"), list):
        thoughts = [_first_value(each, "content", "summary") for each in _dicts(content["thoughts"])]
        return [{"type": "thinking", "thinking": "\n\n".join(each for each in thoughts if isinstance(each, str))}]
    return _first_value(content, "text", "result") if content.get("content_type") != "reasoning_recap" else ""


def _parse_lm_studio(data: dict[str, Any]) -> Conversation:
    messages: list[ImportedMessage] = []
    parent: str | None = None
    for index, each in enumerate(_require_messages(data["messages"])):
        versions = _dicts(each.get("versions"))
        chosen = each.get("currentlySelected")
        chosen = chosen if isinstance(chosen, int) and 0 <= chosen < len(versions) else 0
        for number, version in enumerate(versions):
            sender = version["senderInfo"] if isinstance(version.get("senderInfo"), dict) else {}
            content = version.get("content")
            if isinstance(version.get("steps"), list):
                content = [part for step in _dicts(version["steps"]) for part in _lm_studio_step_parts(step)]
            messages.append(
                ImportedMessage(f"{index}.{number}", parent, version.get("role"), content, sender.get("senderName"))
            )
        if versions:
            parent = f"{index}.{chosen}"
    return Conversation(_find_title(data), messages, parent, data.get("systemPrompt"))


def _lm_studio_step_parts(step: dict[str, Any]) -> list[Any]:
    style = step["style"] if isinstance(step.get("style"), dict) else {}
    parts = step["content"] if isinstance(step.get("content"), list) else []
    if style.get("type") != "thinking":
        return parts
    return [{"type": "thinking", "thinking": each.get("text", "")} for each in _dicts(parts)]


def parse_markdown(text: str) -> Conversation:
    """Raises Unreadable."""
    headings = list(MESSAGE_HEADING.finditer(text))
    if not headings:
        raise Unreadable("it has no heading “## User”")
    messages = []
    for index, heading in enumerate(headings):
        end = headings[index + 1].start() if index + 1 < len(headings) else len(text)
        messages.append(ImportedMessage(str(index), str(index - 1) if index else None, heading[1].lower(),
                         text[heading.end() : end].strip(), heading[2]))  # fmt: skip
    preamble = text[: headings[0].start()].strip().splitlines()
    title = preamble[0].lstrip("# ") if preamble and preamble[0].startswith("# ") else ""
    system = "\n".join(line.removeprefix("> ").removeprefix(">") for line in preamble if line.startswith(">"))
    models = [each.model for each in messages if each.model]
    return Conversation(title, messages, str(len(messages) - 1), system, models, is_foreign=False)


# ── What a message says ────────────────────────────────────────────────────────────────────────────

TEXT_PART_TYPES = ("text", "input_text", "output_text", "markdown", "audio_transcription")


@dataclass
class Content:
    """The text of a message, and the kinds of its other parts."""

    text: str
    left_out: list[str] = field(default_factory=list)


def parse_content(value: Any) -> Content:
    """Parse text or a list of parts: thoughts go in front, between tags; a picture leaves a mark. Raise Unreadable."""
    if value is None or isinstance(value, str):
        return Content(value or "")
    if isinstance(value, dict):
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list):
        raise Unreadable("isn't text or a list of parts")
    content, thoughts, texts = Content(""), [], []
    for part in value:
        kind, text = _parse_part(part)
        if kind == "text":
            texts.append(text)
        elif kind == "thought":
            thoughts.append(text)
        else:
            content.left_out.append(kind)
            if kind == "picture":
                texts.append("[picture]")
    content.text = _join_lines(texts)
    if thought := "\n\n".join(filter(None, thoughts)):
        content.text = f"<think>\n{thought}\n</think>\n\n{content.text}"
    return content


def _join_lines(texts: list[str]) -> str:
    """Join non-empty parts with line breaks."""
    return "\n".join(text for text in texts if text)


def _parse_part(part: Any) -> tuple[str, str]:
    if isinstance(part, str):
        return "text", part
    if not isinstance(part, dict):
        raise Unreadable("has a part that isn't text or an object")
    kind = str(part.get("type") or part.get("content_type") or "text")
    if kind in ("thinking", "reasoning", "thoughts"):
        thought = _first_value(part, "thinking", "text", "content")
        return "thought", thought if isinstance(thought, str) else ""
    if "image" in kind or "picture" in kind:
        return "picture", ""
    text = _first_value(part, "text", "content")
    if kind in TEXT_PART_TYPES and isinstance(text, str):
        return "text", text
    return kind.replace("_", " ")[:40], ""


def _first_value(data: dict[str, Any], *names: str) -> Any:
    """Return the first non-empty value, else the first present one."""
    return next((data[name] for name in names if data.get(name)), next((data[n] for n in names if n in data), None))


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _require_messages(value: Any) -> list[dict[str, Any]]:
    """Raise Unreadable for anything but a list of objects."""
    if not isinstance(value, list):
        raise Unreadable("it has no list of messages")
    for index, each in enumerate(value):
        if not isinstance(each, dict):
            raise Unreadable(f"message {index + 1} is not an object")
    return value


def _file_names(files: Any) -> list[str]:
    return list(_iterate_file_names(files))


def _iterate_file_names(files: Any) -> Iterator[str]:
    for each in _dicts(files):
        name = _first_value(each, "name", "file_name", "filename")
        yield name if isinstance(name, str) else "a picture" if each.get("type") == "image" else "a file"


def parse_time(value: Any) -> float | None:
    """Parse a number or an ISO date as seconds since 1970; None where it is neither, or far off."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e14:
        return float(value) / (1000 if value > 1e11 else 1)
    try:
        seconds = datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except (ValueError, OverflowError):
        return None
    return seconds if 0 < seconds < 1e11 else None
