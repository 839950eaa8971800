"""Somebody who answers, whoever that is: a model here, a step of a session, a model elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from ...messages import Chat, Event, Progress

OnProgress = Callable[[Progress], None]


class ChatTarget(ABC):
    """Somebody who answers. `name` finds them again, `label` is for people."""

    name: str
    label: str
    supports_pictures = False
    """Whether pictures can be shown to them."""

    @property
    def exact_name(self) -> str:
        """The name of who would answer now: of a session as it stands, the step that it stands at."""
        return self.name

    @abstractmethod
    def answer(self, request: Chat, owner: str, on_progress: OnProgress) -> AsyncGenerator[Event, None]:
        """Answer a conversation: how loading goes is followed, then the events of a Chat come."""
