"""Somebody who answers, whoever that is: a model here, a step of a session, a model elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from ...messages import Chat, Event, Progress

Follow = Callable[[Progress], None]


class Speaker(ABC):
    """Somebody who answers. `name` finds them again, `label` is for people."""

    name: str
    label: str
    sees = False
    """Whether pictures can be shown to them."""

    @property
    def exactly(self) -> str:
        """The name of who would answer now: of a session as it stands, the step that it stands at."""
        return self.name

    @abstractmethod
    def answer(self, request: Chat, owner: str, follow: Follow) -> AsyncGenerator[Event, None]:
        """Answer a conversation: how loading goes is followed, then the events of a Chat come."""
