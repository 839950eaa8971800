"""Rooms and messages, who can answer them, and external providers."""

from .api_keys import KEY_PREFIX, ApiKeys
from .attachments import Attachments
from .exports import EXPORT_FORMATS, export_room
from .imports import ImportResult, import_rooms
from .local_servers import LocalServers
from .message import Message
from .providers import Providers
from .room import MAX_MODELS, Room
from .room_state import DEFAULT_SAMPLING
from .rooms import Rooms
from .target import ChatTarget
from .targets import ChatTargets

__all__ = [
    "DEFAULT_SAMPLING", "EXPORT_FORMATS", "KEY_PREFIX", "MAX_MODELS", "ApiKeys", "Attachments", "ChatTarget",
    "ChatTargets", "ImportResult", "LocalServers", "Message", "Providers", "Room", "Rooms", "export_room",
    "import_rooms",
]  # fmt: skip
