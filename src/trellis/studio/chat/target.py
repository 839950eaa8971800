"""The interface of everything that can answer in chat: a model, a step of a session, an external model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from ...messages import Chat, Event, Progress

OnProgress = Callable[[Progress], None]


class ChatTarget(ABC):
    """Something that answers a conversation. `name` identifies it, `label` is for people."""

    name: str
    label: str
    supports_pictures = False
    """Whether it accepts pictures."""

    @property
    def exact_name(self) -> str:
        """The name of what would answer now: for a session, its present step."""
        return self.name

    @abstractmethod
    def answer(self, request: Chat, owner: str, on_progress: OnProgress) -> AsyncGenerator[Event, None]:
        """Answer a conversation: report loading to `on_progress`, then yield the events of a Chat."""
