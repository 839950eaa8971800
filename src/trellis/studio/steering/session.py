"""One steering session while the studio runs: its state, and the parts that change it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

from ...blobs import Blobs
from ...errors import TrellisError
from ...options import ModelOptions
from ...store.store import Store
from ..datasets import Datasets
from ..hub import Hub
from ..models import Models
from .background_work import BackgroundWork
from .choice_logs import ChoiceLogs
from .commands import Commands
from .engine_requests import EngineRequests
from .missing_work import MissingWork
from .node_access import NodeAccess
from .recomputation import Recomputation
from .request_builder import RequestBuilder
from .retention import RetainedWeights
from .state import SessionState
from .transitions import Transitions
from .tree import Node

log = logging.getLogger(__name__)


class Session(SessionState):
    """A person's run of steering one model: `commands` change it, `work` follows, `nodes` give access to its nodes."""

    def __init__(
        self,
        store: Store,
        hub: Hub,
        models: Models,
        datasets: Datasets,
        weights: Blobs,
        logs: ChoiceLogs,
        row: dict[str, Any],
        nodes: Iterable[Node],
        offer: dict[str, Any] | None,
        intent: dict[str, Any] | None,
        is_foresight_enabled: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(hub, models, row, nodes, offer, intent)
        self.requests = RequestBuilder(store, logs, self.config, self.tree)
        self._engine = EngineRequests(models, weights, self.requests, self)
        recomputation = Recomputation(weights, self._engine, self)
        self._retained_weights = RetainedWeights(store, weights, self)
        transitions = Transitions(store, self)
        self._background = BackgroundWork(
            store, models, self._engine, self._retained_weights, self, transitions, is_foresight_enabled
        )
        self.work = MissingWork(
            store, models, datasets, self._engine, recomputation, self._retained_weights, self, transitions,
            self._background,
        )  # fmt: skip
        self.commands = Commands(store, self._engine, self, transitions, self.work)
        self.nodes = NodeAccess(
            store, self._engine, recomputation, self._retained_weights, self, transitions, self.work
        )
        self._preload_task: asyncio.Task[None] | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nobody watches the session and no work is running."""
        has_pinned_weights = bool(+self._retained_weights.pinned)
        return not self.work.is_running and not has_pinned_weights and not self.lock.locked() and self.watchers == 0

    def on_engine_changed(self, options: ModelOptions) -> None:
        """Publish that the engine of a model started or ended, and continue if it was loaded."""
        if options == self.model_options:
            state = self._models.state(options)
            self.publish("engine", {"state": state})
            if state == "loaded" and self.watchers:
                self.work.wake()

    def preload_model(self) -> None:
        """Start loading the model, since somebody opened the session. Never waits."""
        if self._models.state(self.model_options) == "unloaded" and not self.is_closed and not self.error:
            self._preload_task = asyncio.create_task(self._preload_model())

    async def _preload_model(self) -> None:
        try:
            await self._models.load(self.model_options)
        except TrellisError as error:
            log.warning("could not load ahead: %s", error.message)

    def add_watcher(self) -> None:
        """Count one more watcher."""
        self.watchers += 1
        self.work.wake()

    def remove_watcher(self) -> None:
        """Count one watcher less."""
        self.watchers -= 1

    async def close(self, reason: str | None = None) -> None:
        """Stop the work. With a reason, publish it as the last event."""
        self.is_closed = True
        await self.work.close()
        await self._engine.close()
        if reason:
            self._hub.publish(self.topic, "done", {"reason": reason})
        self._hub.close_topic(self.topic)
