"""The work of a session that is missing, done by a single task.

The task looks at the state and does the most urgent thing that is missing, again and again. A crash, an unloaded model
and an undo in mid-stream therefore all continue the same way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from ...errors import EngineDied, EngineStopped, TrellisError, WeightsMissing
from ...messages import CHOICE
from ...store import steering as rows
from ...store.store import Store
from ..datasets import Datasets
from ..models import Models
from ..tasks import AsyncWork
from .background_work import BackgroundWork
from .engine_requests import EngineRequests
from .recomputation import Recomputation
from .retention import RetainedWeights
from .state import SessionState
from .transitions import Transitions
from .tree import node_row

log = logging.getLogger(__name__)
R = TypeVar("R")


class WorkInterrupted(Exception):
    """The current work is no longer wanted."""


class MissingWork:
    """Prepares prompts and weights, learns, generates options, and then works in the background."""

    def __init__(
        self,
        store: Store,
        models: Models,
        datasets: Datasets,
        engine: EngineRequests,
        recomputation: Recomputation,
        retained_weights: RetainedWeights,
        state: SessionState,
        transitions: Transitions,
        background: BackgroundWork,
    ) -> None:
        self._store = store
        self._models = models
        self._datasets = datasets
        self._engine = engine
        self._recomputation = recomputation
        self._retained_weights = retained_weights
        self._state = state
        self._transitions = transitions
        self._background = background
        self._task: asyncio.Task[None] | None = None
        self._current_work: asyncio.Task[Any] | None = None

    def wake(self) -> None:
        """Start the task if it is not running. Never waits."""
        if not self._state.is_closed and not self.is_running:
            self._task = asyncio.create_task(self._run(), name=f"session {self._state.id}")

    async def close(self) -> None:
        """Cancel the task."""
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])

    @property
    def is_running(self) -> bool:
        """Whether the task is running."""
        return self._task is not None and not self._task.done()

    def restart(self) -> None:
        """Cancel the current work and start again, after a command changed what is missing."""
        if self._current_work and not self._current_work.done():
            self._current_work.cancel()
        self._engine.allow_loading()
        self.wake()

    async def _run(self) -> None:
        engine_deaths = 0
        missing_weights: WeightsMissing | None = None
        while not self._state.is_closed:
            async with self._state.lock:
                step = self._next_work()
            if step is None:
                return
            try:
                if missing_weights:
                    await self._run_interruptible(self._recomputation.run(missing_weights))
                    missing_weights = None
                else:
                    await step()
                engine_deaths = 0
            except WorkInterrupted:
                missing_weights = None
                continue
            except WeightsMissing as missing:
                if missing_weights:
                    self._state.fail(missing)
                missing_weights = missing
            except EngineDied as error:
                engine_deaths += 1
                if engine_deaths > 2:
                    self._state.fail(error)
                else:
                    self._state.publish_notice(f"{error.message} Restarting it; nothing is lost.")
            except TrellisError as error:
                self._state.fail(error)
            except Exception:
                log.exception("session %s failed", self._state.id)
                self._state.fail(_internal_error(self._state.id))

    def _next_work(self) -> AsyncWork | None:
        """Return the most urgent piece of work; None when the next move is a person's."""
        if self._state.error or self._state.is_closed:
            return None
        if self._state.prompts is None:
            return self._prepare_prompts
        if not self._state.tree.root.weights:
            return self._init_adapter
        if not self._engine.is_available(self._state.tree.head.weights):
            return self._recompute_head
        if self._state.intent:
            return self._learn
        if self._state.offer is None:
            return self._begin_offer
        if self._state.offer.options is None:
            return self._generate_options
        if self._needs_model_check():
            return self._check_model
        if self._background.next_works():
            return self._run_background_work
        return None

    def _needs_model_check(self) -> bool:
        """Whether the model is to be compared with the one that the session grew on, so that another one is refused
        before a choice is made that could not be learned from."""
        if self._engine.is_model_verified or self._engine.was_unloaded_by_user:
            return False
        return self._state.is_resume_requested or (
            self._state.watchers > 0 and self._models.state(self._state.model_options) == "loaded"
        )

    async def _check_model(self) -> None:
        await self._run_interruptible(self._engine.verify_model())
        self._state.is_resume_requested = False

    async def _run_background_work(self) -> None:
        """Run background work concurrently, as far as the engine can. A command interrupts it."""
        self._background.cancel_unlikely_foresight()
        try:
            await self._run_interruptible(self._background.run())
        except EngineStopped:  # nobody is waiting for background work
            log.info("session %s: its model was unloaded while background work was running", self._state.id)

    async def open_prompts(self) -> None:
        """Open the prompts if they have been prepared before."""
        if self._state.prepared_prompts is not None and self._state.prompts is None:
            try:
                self._state.prompts = await self._datasets.open(
                    self._state.prepared_prompts, self._state.config.dataset, self._state.config.seed
                )
            except (OSError, ValueError):
                log.warning("session %s: its prompts are gone and must be read again", self._state.id)

    async def _prepare_prompts(self) -> None:
        """Open the prompts; prepare them from their source first if necessary."""
        config = self._state.config
        await self.open_prompts()
        if self._state.prompts is not None:
            return
        try:
            prepared = await self._run_interruptible(
                self._datasets.prepare(config.dataset, self._state.on_load_progress)
            )
        finally:
            self._state.on_load_progress(None)
        async with self._state.lock:
            await self._store.write(rows.set_prepared_prompts, self._state.id, prepared)
            self._state.prepared_prompts = prepared
            self._state.prompts = await self._datasets.open(prepared, config.dataset, config.seed)
            self._state.publish("state", self._state.state())

    async def _recompute_head(self) -> None:
        """Recompute the head's weights, which were pruned."""
        head = self._state.tree.head
        await self._run_interruptible(self._recomputation.run(WeightsMissing(head.weights)))
        await self._retained_weights.prune()

    async def _init_adapter(self) -> None:
        root = self._state.tree.root
        initial_weights = await self._run_interruptible(self._engine.init_adapter())
        if unadapted_layers := self._state.unadapted_layers:
            self._state.publish_notice(f"Layers without an adapter: {', '.join(unadapted_layers)}.")
        async with self._state.lock:
            await self._store.write(rows.set_weights, root.id, initial_weights)
            self._state.tree.update(root.id, weights=initial_weights)
            self._state.publish("state", self._state.state())

    async def _learn(self) -> None:
        intent = self._state.intent
        assert intent is not None
        body = intent["body"]
        parent = self._state.tree.nodes[body["node"]]
        choice = CHOICE.validate_python(body["choice"])
        learned = await self._run_interruptible(self._engine.learn(parent, body["offer"], choice))
        async with self._state.lock:
            if self._state.intent is not intent:
                return
            node = self._transitions.make_child(parent, body["offer"], choice, learned)
            node_changes = {parent.id: {"forward": node.id, "shown": body["offer"]}}
            await self._store.write(rows.commit_node, node_row(node), node_changes, intent, None)
            self._transitions.enter_node(node, node_changes)

    async def _begin_offer(self) -> None:
        assert self._state.prompts is not None
        async with self._state.lock:
            if self._state.offer is None:
                prompt = await asyncio.to_thread(self._state.prompts.at, self._state.tree.head.position)
                await self._transitions.new_offer(prompt, None)

    async def _generate_options(self) -> None:
        """Generate the options of the current offer from the start: the same seed gives the same text."""
        shown, head = self._state.offer, self._state.tree.head
        assert shown is not None
        if any(shown.texts):
            shown.texts = [""] * self._state.config.group_size
            self._state.publish_offer_started(shown)
        offered = await self._run_interruptible(
            self._engine.generate_options(head, shown.number, shown.prompt, self._state.on_option_text)
        )
        async with self._state.lock:
            if self._state.offer is not shown:
                return
            options = [option.model_dump(mode="json") for option in offered.options]
            await self._store.write(rows.set_options, shown.id, options)
            shown.options = offered.options
            shown.texts = [option.text for option in offered.options]
            self._transitions.record_speed(offered)
            self._state.publish("offer_ready", {"offer": shown.id, "options": shown.options_json()})
            if offered.overflowed:
                letters = " and ".join(chr(ord("A") + index) for index in offered.overflowed)
                self._state.publish_notice(
                    f"Truncated after a numeric overflow: {letters}. If it happens again, go back to an earlier step."
                )

    async def _run_interruptible(self, work: Coroutine[Any, Any, R]) -> R:
        """Run work that a command may interrupt. Raise WorkInterrupted when one did."""
        work_task = asyncio.create_task(work)
        self._current_work = work_task
        try:
            return await work_task
        except asyncio.CancelledError:
            work_task.cancel()
            current = asyncio.current_task()
            if current and current.cancelling():
                raise
            raise WorkInterrupted from None


def _internal_error(session: str) -> TrellisError:
    return TrellisError(
        "Something went wrong in this session.",
        code="internal",
        next_step=f"Resume it. Error ID {session} (see the log).",
    )
