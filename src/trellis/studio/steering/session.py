"""One steering session while the studio runs: its tree, the offer on its screen, and the work that is missing.

Commands only note what the person wants, in one short transaction. A single task then does whatever is
missing (plant, learn, offer, control), so that a crash, an unloaded model or an undo in mid-stream all
continue the same way: look again, do what is missing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

from ...blobs import Blobs
from ...errors import Conflict, EngineDied, EngineStopped, NotFound, TrellisError, WeightsMissing, shorten
from ...messages import CHOICE, Chat, Choice, Event, Learned, Lesson, Metrics, Offered, Progress, Prompt, TextDelta
from ...options import ModelOptions, Sampling, SessionConfig
from ...store import steering as rows
from ...store.store import Store
from ..datasets.datasets import Datasets, Prompts
from ..hub import Hub
from ..models.models import Models
from ..models.template_options import thinking_kwargs
from ..tasks import AsyncWork, run_concurrently, run_to_completion
from ..throughput import tokens_per_second
from .choice_logs import ChoiceLogs
from .choices import require_valid_choice, with_equal_options
from .engine_requests import EngineRequests
from .likely_choices import LikelyChoice, likely_choices
from .offer import ShownOffer, answer_preview
from .retention import prunable_weights
from .tree import Node, Retraining, Tree, child_id, child_id_for_choice, drift_of, node_json, node_row, offer_id

log = logging.getLogger(__name__)
R = TypeVar("R")

ASSESSED_CHOICES = 10
"""So many last choices of a branch are looked at to say whether the model still agrees with them."""

BACKGROUND_DELAY_SECONDS = 0.12
"""Seconds after something was shown in which nothing is begun that nobody waits for: a browser on the same computer
has its processor to draw it."""

PRIORITY_FORESIGHT_STEPS = 4
"""So many of the likeliest choices are worked out before figures that nobody waits for."""

CONTROL_SAMPLING = Sampling(temperature=0.0, top_p=1.0, min_p=0.0, max_new_tokens=96)
"""How the control prompt is answered: the likeliest words, so that only the weights make a difference."""

ForesightStep = tuple[LikelyChoice, bool]
"""A choice that may be made, and whether the options are worked out that would follow it."""


class WorkInterrupted(Exception):
    """The work in hand is no longer wanted."""


class Session:
    """A person's run of steering one model."""

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
        self._store = store
        self._hub = hub
        self._models = models
        self._datasets = datasets
        self._weights = weights
        self.id: str = row["id"]
        self.name: str = row["name"]
        self.created: float = row["created"]
        self.config = SessionConfig.model_validate(row["config"])
        self._model_options = self.config.extract(ModelOptions)
        self.prepared_prompts: str | None = row["prompts"]
        self.prompts: Prompts | None = None
        self.tree = Tree(nodes, row["head"])
        self.offer = ShownOffer.from_row(offer, self.config.group_size) if offer else None
        self.intent = intent
        self.error: TrellisError | None = None
        self.load_progress: Progress | None = None
        self.queue_position: int | None = None
        """The place in the engine's queue, while others are worked for: 1 is next."""
        self.tokens_per_second: float | None = None
        self._engine_requests = EngineRequests(
            store,
            models,
            weights,
            logs,
            self.config,
            self.tree,
            self._on_load_progress,
            self._publish_notice,
            self._on_queue_position,
        )
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._current_work: asyncio.Task[Any] | None = None
        self._labels: dict[str, str] = {}
        self._pinned_weights: Counter[str] = Counter()
        self._failed_assessments: set[str] = set()
        self._preload_task: asyncio.Task[None] | None = None
        self._is_resume_requested = False
        """Whether a person wants to go on: the model is then loaded and compared before they choose."""
        self.last_used = time.monotonic()
        self.watchers = 0
        self.is_foresight_enabled = is_foresight_enabled
        self._finished_foresight: set[ForesightStep] = set()
        self._foresight_offer_id = ""
        self._known_requests: set[str] | None = None
        """The ids of all requests that were taken, once they are known."""
        self._is_closed = False

    # ── What a person sees ─────────────────────────────────────────────────────────────────────────

    @property
    def topic(self) -> str:
        return f"steering/{self.id}"

    @property
    def status(self) -> str:
        if self.error:
            return "failed"
        if self.load_progress:
            return "loading"
        if self.intent:
            return "learning"
        if self.offer and self.offer.options:
            return "ready"
        return "offering" if self.tree.root.weights else "loading"

    @property
    def is_busy(self) -> bool:
        """While a choice is learned from, nothing else can be asked for."""
        return self.intent is not None and self.error is None

    def state(self) -> dict[str, Any]:
        """The whole state, as API.md gives it."""
        head = self.tree.head
        original, current = self.tree.root.control, head.control
        return {
            "id": self.id,
            "name": self.name,
            "config": self.config.model_dump(mode="json"),
            "status": self.status,
            "error": self.error.as_json() if self.error else None,
            "head": {"node": head.id, "step": head.step, "drift": drift_of(head, self.tree)},
            "offer": self.offer.as_json() if self.offer else None,
            "learning": self.intent["body"] if self.is_busy and self.intent else None,
            **self._undo_redo_flags(),
            "dataset": {
                "source": self.config.dataset.source,
                "position": self._prompt_index(),
                "total": self.prompts.total if self.prompts else None,
                "notes": self.prompts.notes if self.prompts else [],
            },
            "control": (
                {"prompt": self.config.control_prompt, "original": original, "current": current}
                if self.config.control_prompt
                else None
            ),
            "figures": self.current_metrics(),
            "layers_left_out": list(self._engine_requests.unadapted_layers),
            "engine": self._models.state(self._model_options),
            "load": self.load_progress.model_dump(exclude={"type"}) if self.load_progress else None,
            "queue": self.queue_position,
        }

    def current_metrics(self) -> dict[str, Any]:
        head = self.tree.head
        last_learned = next((node for node in reversed(self.tree.path(head.id)) if node.metrics), None)
        metrics = (
            last_learned.metrics.model_dump()
            if last_learned and last_learned.metrics
            else dict.fromkeys(Metrics.model_fields)
        )
        return {
            **metrics,
            "step": head.step,
            "drift": drift_of(head, self.tree),
            "tokens_per_second": self.tokens_per_second,
        }

    # ── What a person says ─────────────────────────────────────────────────────────────────────────

    @run_to_completion
    async def choose(self, offer: str, choice: Choice, request: str) -> None:
        """Learn from a choice. Raises Conflict for an offer that is not on the screen or not whole yet."""
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            shown = self.offer
            if shown is None or shown.id != offer:
                raise self._conflict(
                    f"These answers are out of date (offer “{shorten(offer)}”).",
                    "stale_offer",
                    "Choose from the current answers.",
                )
            if shown.options is None:
                raise self._conflict(
                    "The answers are still being generated.",
                    "offer_not_ready",
                    "Choose when all answers are complete.",
                )
            require_valid_choice(choice, len(shown.options))
            known_node = self.tree.nodes.get(child_id_for_choice(self.tree.head, shown.id, choice))
            if known_node is None:
                choice = with_equal_options(choice, shown.options)
            choice_json = CHOICE.dump_python(choice, mode="json")
            child_node_id = child_id(self.tree.head, shown.id, choice_json)
            known_node = known_node or self.tree.nodes.get(child_node_id)
            body = {"offer": shown.id, "node": self.tree.head_id, "choice": choice_json}
            learned = self._engine_requests.learned_ahead(child_node_id) if known_node is None else None
            if known_node is not None or learned is not None or choice == "skip":
                await self._step_immediately(
                    known_node, choice, learned, self._make_intent(request, "choose", body, "done")
                )
                return
            intent = self._make_intent(request, "choose", body, "open")
            await self._store.write(rows.replace_intent, intent, self._failed_request)
            self._remember_request(intent)
            self.intent, self.error = intent, None
            self._publish("learning", {"offer": shown.id, "choice": choice_json})
            self._restart_work()

    @run_to_completion
    async def skip(self, request: str) -> None:
        """Move on to the next prompt without learning; also from an offer that is not whole yet."""
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            if self.offer is None:
                raise self._conflict("Nothing to skip yet.", "offer_not_ready", "Wait for the first answers.")
            known_node = self.tree.nodes.get(child_id(self.tree.head, self.offer.id, "skip"))
            body = {"offer": self.offer.id, "node": self.tree.head_id, "choice": "skip"}
            await self._step_immediately(known_node, "skip", None, self._make_intent(request, "skip", body, "done"))

    @run_to_completion
    async def undo(self, request: str) -> None:
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            target = self.tree.undo_target
            if target is None:
                raise self._conflict("Nothing to undo.", "nothing_to_undo", "Choose an answer.")
            left_node = self.tree.head
            shown = left_node.answered or target.shown  # what was fitted to a log answered no offer
            node_changes = {target.id: {"forward": left_node.id, "shown": shown}}
            await self._move_head(
                target, shown, node_changes, self._make_intent(request, "undo", {"from": left_node.id}, "done")
            )

    @run_to_completion
    async def redo(self, request: str) -> None:
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            target = self.tree.redo_target
            if target is None:
                raise self._conflict("Nothing to redo.", "nothing_to_redo", "Choose an answer.")
            intent = self._make_intent(request, "redo", {"from": self.tree.head_id}, "done")
            await self._move_head(target, target.shown, {}, intent)

    @run_to_completion
    async def go_to(self, node: str, request: str) -> None:
        """Stand at any node; the options that were shown there come back. Raises NotFound."""
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            target = self.node(node)
            path = self.tree.path(target.id)
            node_changes = {
                upper.id: {"forward": lower.id} for upper, lower in pairwise(path) if upper.forward != lower.id
            }
            intent = self._make_intent(request, "goto", {"from": self.tree.head_id, "to": node}, "done")
            await self._move_head(target, target.shown, node_changes, intent)

    @run_to_completion
    async def replace_prompt(self, text: str, request: str) -> None:
        """Replace the current prompt and offer again."""
        async with self._lock:
            if await self._is_known_request(request):
                return
            self._require_not_busy()
            if not self.tree.root.weights:
                raise self._conflict("The session isn't ready yet.", "offer_not_ready", "Wait for the first answers.")
            body = {"node": self.tree.head_id, "text": text}
            await self._new_offer(text, self._make_intent(request, "prompt", body, "done"))
            self.intent, self.error = None, None
            self._restart_work()

    @run_to_completion
    async def resume(self) -> None:
        """Try again after a failure, or go on after the model was unloaded."""
        async with self._lock:
            self._engine_requests.allow_loading()
            self._is_resume_requested = True
            if self.error:
                self.error = None
                self._publish("state", self.state())
            self.wake()

    @run_to_completion
    async def rename(self, name: str) -> None:
        async with self._lock:
            self._require_open()
            await self._store.write(rows.rename_session, self.id, name, time.time())
            self.name = name
            self._publish("state", self.state())

    @run_to_completion
    async def name_node(self, node: str, name: str) -> None:
        """Give a node a name of its own, or take it away; the weights of a node with a name stay on disk."""
        async with self._lock:
            self._require_open()
            found = self.node(node)
            await self._store.write(rows.set_node_name, found.id, name or None)
            self.tree.update(found.id, name=name or None)
            self._publish("node_named", {"node": found.id, "name": name})

    @asynccontextmanager
    async def hold_weights(self, node: Node, verify: bool = False) -> AsyncIterator[None]:
        """Have the weights of a node on disk, and keep them there until the block ends.

        `checked` for who reads the files without an engine, which would notice damaged ones: they are made again first.
        """
        self._pinned_weights[node.weights] += 1
        try:
            is_damaged = verify and await asyncio.to_thread(self._engine_requests.discard_if_damaged, node.weights)
            if is_damaged or not self._engine_requests.is_on_disk(node.weights):
                await self._engine_requests.recompute(WeightsMissing(node.weights))
            yield
        finally:
            self._pinned_weights[node.weights] -= 1

    async def open_prompts(self) -> None:
        """Have the prompts at hand, if they were made ready before."""
        if self.prepared_prompts is not None and self.prompts is None:
            try:
                self.prompts = await self._datasets.open(self.prepared_prompts, self.config.dataset, self.config.seed)
            except (OSError, ValueError):
                log.warning("session %s: its prompts are gone and must be read again", self.id)

    async def chat(self, request: Chat, node: Node, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation from any node, without moving the session. Weights that are gone are made again."""
        if not node.weights:
            raise self._conflict("The session isn't ready yet.", "offer_not_ready", "Wait for the first answers.")
        self.last_used = time.monotonic()
        self._engine_requests.allow_loading()
        self._pinned_weights[node.weights] += 1
        variables = thinking_kwargs(self.config) | request.template_kwargs
        request = request.model_copy(
            update={"weights": node.weights, "template": self.config.chat_template, "template_kwargs": variables}
        )
        try:
            if not self._engine_requests.is_available(node.weights):
                await self._engine_requests.recompute(WeightsMissing(node.weights))
            has_spoken = False
            try:
                async with aclosing(self._engine_requests.chat(request, owner)) as events:
                    async for event in events:
                        has_spoken = has_spoken or isinstance(event, TextDelta)
                        yield event
            except WeightsMissing as missing:  # what looked whole was not
                if has_spoken or missing.weights != node.weights:
                    raise
                await self._engine_requests.recompute(missing)
                async with aclosing(self._engine_requests.chat(request, owner)) as events:
                    async for event in events:
                        yield event
        finally:
            self._pinned_weights[node.weights] -= 1

    async def sample(self, prompt: str, node: str | None, n: int, sampling: Sampling, seed: int) -> list[str]:
        """Answers from any node without moving the session."""
        start_node = self.node(node) if node else self.tree.head
        if not start_node.weights:
            raise self._conflict("The session isn't ready yet.", "offer_not_ready", "Wait for the first answers.")
        self._engine_requests.allow_loading()
        async with self.hold_weights(start_node):
            try:
                offered = await self._engine_requests.generate(prompt, start_node.weights, sampling, n, seed)
            except WeightsMissing as missing:  # what looked whole was not
                await self._engine_requests.recompute(missing)
                offered = await self._engine_requests.generate(prompt, start_node.weights, sampling, n, seed)
        return [option.text for option in offered.options]

    async def wait_until_initialized(self) -> None:
        """Wait until the model is there and the session has weights to begin with. Raises what stands in the way."""
        self._engine_requests.allow_loading()
        while not self.tree.root.weights:
            self._require_open()
            if self.error:
                raise self.error
            self.wake()
            await asyncio.sleep(0.1)

    def make_prompt(self, text: str) -> Prompt:
        """A prompt as the session's options have it put to the model."""
        return self._engine_requests.make_prompt(text)

    async def lessons(self, node: Node) -> list[Lesson]:
        """All that was said on the way to a node, skips left out."""
        return await self._engine_requests.lessons(self.tree.path(node.id))

    async def retrain(self, parent: Node, retraining: Retraining, on_progress: Callable[[Progress], None]) -> Learned:
        """Learn from a whole log at a node, without moving the session; the node is added by `graft`."""
        self._engine_requests.allow_loading()
        try:
            return await self._engine_requests.retrain(parent, retraining, on_progress)
        except WeightsMissing as missing:  # what looked whole was not
            await self._engine_requests.recompute(missing)
            return await self._engine_requests.retrain(parent, retraining, on_progress)

    async def add_retrained_node(self, parent: Node, retraining: Retraining, learned: Learned) -> Node:
        """Add a node that was made beside the session's own steps. The head stays where it is, but for a session that
        was made to hold this node and in which nothing was said yet: it then stands there."""
        return await asyncio.shield(asyncio.ensure_future(self._add_retrained_node(parent, retraining, learned)))

    async def _add_retrained_node(self, parent: Node, retraining: Retraining, learned: Learned) -> Node:
        async with self._lock:
            self._require_open()
            retraining_json = retraining.model_dump(mode="json")
            node_id = child_id(parent, retraining.fitted, retraining_json)
            if node_id not in self.tree.nodes:
                node = Node(
                    id=node_id, session=self.id, parent=parent.id, step=parent.step + 1, weights=learned.weights,
                    position=self.tree.head.position, answered=None, choice=retraining, metrics=learned.metrics,
                    control=None, shown=None, forward=None, created=time.time(),
                )  # fmt: skip
                await self._store.write(rows.add_node, node_row(node))
                self.tree.add(node)
                self._publish("node_fitted", node_json(node, self.tree))
            node = self.tree.nodes[node_id]
            if retraining.kind == "replay" and len(self.tree.nodes) == 2 and not self.intent:
                node_changes = {parent.id: {"forward": node.id}}
                intent = self._make_intent(f"goto-{node.id}", "goto", {"from": parent.id, "to": node.id}, "done")
                await self._move_head(node, None, node_changes, intent)
            return node

    async def labels(self) -> dict[str, str]:
        """A few words for each node: how the answer began that led to it."""
        missing = [node for node in self.tree.nodes.values() if node.id not in self._labels]
        found = await self._store.read(rows.get_offers, [node.answered for node in missing if node.answered])
        for node in missing:
            self._labels[node.id] = answer_preview(node, found.get(node.answered or ""))
        return self._labels | {node.id: node.name for node in self.tree.nodes.values() if node.name}

    def preload_model(self) -> None:
        """Somebody looks at the session: have its model ready before they choose. Never waits."""
        if self._models.state(self._model_options) == "unloaded" and not self._is_closed and not self.error:
            self._preload_task = asyncio.create_task(self._preload_model())

    async def _preload_model(self) -> None:
        try:
            await self._models.load(self._model_options)
        except TrellisError as error:
            log.warning("could not load ahead: %s", error.message)

    def node(self, node_id: str) -> Node:
        """Raises NotFound."""
        if node_id not in self.tree.nodes:
            raise NotFound(
                f"Node “{shorten(node_id)}” not found in this session.",
                field="node",
                next_step="See the session's tree.",
            )
        return self.tree.nodes[node_id]

    def on_engine_changed(self, options: ModelOptions) -> None:
        """The engine of a model was started or ended."""
        if options == self._model_options:
            state = self._models.state(options)
            self._publish("engine", {"state": state})
            if state == "loaded" and self.watchers:
                self.wake()

    @property
    def is_idle(self) -> bool:
        """Whether nobody watches it and nothing is being done."""
        is_working = self._task is not None and not self._task.done()
        has_pinned_weights = bool(+self._pinned_weights)
        return not is_working and not has_pinned_weights and not self._lock.locked() and self.watchers == 0

    def wake(self) -> None:
        """Do what is missing, if anything is. Never waits."""
        if not self._is_closed and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name=f"session {self.id}")

    async def close(self, reason: str | None = None) -> None:
        """Stop working. With a reason, say goodbye to those who watch."""
        self._is_closed = True
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._engine_requests.close()
        if reason:
            self._hub.publish(self.topic, "done", {"reason": reason})
        self._hub.close_topic(self.topic)

    # ── Moving ─────────────────────────────────────────────────────────────────────────────────────

    async def _step_immediately(
        self, known_node: Node | None, choice: Choice, learned: Learned | None, intent: dict[str, Any]
    ) -> None:
        """A step for which nothing has to be learned any more: a skip, a choice that was made here before, or one that
        was worked out ahead; with the options that follow, where they are there as well."""
        head, offer = self.tree.head, self.offer
        assert offer is not None
        node_changes = {head.id: {"shown": offer.id}}
        if known_node is not None:
            node_changes[head.id]["forward"] = known_node.id
            await self._move_head(known_node, known_node.shown, node_changes, intent)
            return
        node = self._make_child(head, offer.id, choice, learned)
        node_changes[head.id]["forward"] = node.id
        row = await self._pregenerated_offer_row(node)
        await self._store.write(rows.commit_node, node_row(node), node_changes, intent, self._failed_request, row)
        self._remember_request(intent)
        self._enter_node(node, node_changes)
        if row:
            self._show_offer(row)
        self._restart_work()

    async def _pregenerated_offer_row(self, node: Node) -> dict[str, Any] | None:
        """The first offer at a new node, if its options are there."""
        if self.prompts is None:
            return None
        try:
            prompt = await asyncio.to_thread(self.prompts.at, node.position)
        except (OSError, ValueError):  # told of when the offer is begun
            return None
        offered = self._engine_requests.generated_ahead(node, prompt)
        if offered is None:
            return None
        self._record_speed(offered)
        options = [option.model_dump(mode="json") for option in offered.options]
        return self._offer_row(node, 0, prompt) | {"options": options}

    def _offer_row(self, node: Node, number: int, prompt: str) -> dict[str, Any]:
        return {
            "id": offer_id(node, number, prompt), "session": self.id, "node": node.id, "number": number,
            "prompt": prompt, "options": None, "created": time.time(),
        }  # fmt: skip

    def _show_offer(self, row: dict[str, Any]) -> None:
        """Put an offer that is in the store on the screen."""
        self.tree.update(row["node"], shown=row["id"])
        self.offer = ShownOffer.from_row(row, self.config.group_size)
        self._publish_offer(self.offer)

    def _record_speed(self, offered: Offered) -> None:
        tokens = sum(len(option.tokens) for option in offered.options)
        self.tokens_per_second = tokens_per_second(tokens, offered.seconds)

    async def _move_head(
        self, target: Node, offer: str | None, node_changes: dict[str, dict[str, Any]], intent: dict[str, Any]
    ) -> None:
        """Move the head and bring back what was shown there."""
        row = await self._store.write(rows.commit_move, target.id, offer, node_changes, intent, self._failed_request)
        self._remember_request(intent)
        for node_id, changes in node_changes.items():
            self.tree.update(node_id, **changes)
        self.tree.head_id = target.id
        self.offer = ShownOffer.from_row(row, self.config.group_size) if row else None
        self.intent, self.error = None, None
        self._publish_head()
        if self.offer:
            self._publish_offer(self.offer)
        self._restart_work()

    def _enter_node(self, node: Node, node_changes: dict[str, dict[str, Any]]) -> None:
        """Take a committed node into memory and tell everyone."""
        self.tree.add(node)
        for node_id, changes in node_changes.items():
            self.tree.update(node_id, **changes)
        self.tree.head_id = node.id
        self.offer, self.intent, self.error = None, None, None
        self._publish("node_added", node_json(node, self.tree))
        self._publish_head()

    # ── The work that is missing ───────────────────────────────────────────────────────────────────

    def _restart_work(self) -> None:
        """What was wanted has changed: drop work that no longer matters, and do what is missing."""
        if self._current_work and not self._current_work.done():
            self._current_work.cancel()
        self._engine_requests.allow_loading()
        self.wake()

    async def _run(self) -> None:
        engine_deaths = 0
        missing_weights: WeightsMissing | None = None
        while not self._is_closed:
            async with self._lock:
                step = self._next_work()
            if step is None:
                return
            try:
                if missing_weights:
                    await self._run_interruptible(self._engine_requests.recompute(missing_weights))
                    missing_weights = None
                else:
                    await step()
                engine_deaths = 0
            except WorkInterrupted:
                missing_weights = None
                continue
            except WeightsMissing as missing:
                if missing_weights:
                    self._fail(missing)
                missing_weights = missing
            except EngineDied as error:
                engine_deaths += 1
                if engine_deaths > 2:
                    self._fail(error)
                else:
                    self._publish_notice(f"{error.message} Restarting it; nothing is lost.")
            except TrellisError as error:
                self._fail(error)
            except Exception:
                log.exception("session %s failed", self.id)
                self._fail(_internal_error(self.id))

    def _next_work(self) -> AsyncWork | None:
        """The next piece of work, most urgent first; None when a person has to say something."""
        if self.error or self._is_closed:
            return None
        if self.prompts is None:
            return self._prepare_prompts
        if not self.tree.root.weights:
            return self._init_adapter
        if not self._engine_requests.is_available(self.tree.head.weights):
            return self._recompute_head
        if self.intent:
            return self._learn
        if self.offer is None:
            return self._begin_offer
        if self.offer.options is None:
            return self._generate_options
        if self._needs_model_check():
            return self._check_model
        if self._background_work():
            return self._run_background_work
        return None

    def _needs_model_check(self) -> bool:
        """Whether the model is to be compared with the one that the session grew on, so that another one is refused
        before a choice is made that could not be learned from."""
        if self._engine_requests.is_model_verified or self._engine_requests.was_unloaded_by_user:
            return False
        return self._is_resume_requested or (self.watchers > 0 and self._models.state(self._model_options) == "loaded")

    async def _check_model(self) -> None:
        await self._run_interruptible(self._engine_requests.verify_model())
        self._is_resume_requested = False

    def _background_work(self) -> list[AsyncWork]:
        """What is done while the options are read, the most useful first."""
        works: list[AsyncWork] = []
        if self._engine_requests.was_unloaded_by_user:
            return works
        works += [partial(self._save_weights, node) for node in self._engine_requests.unsaved_nodes]
        if self.config.control_prompt:
            control_nodes = {node.id: node for node in (self.tree.root, self.tree.head)}.values()
            works += [partial(self._answer_control_prompt, node) for node in control_nodes if node.control is None]
        foresight_works = [partial(self._foresee, self.tree.head, step) for step in self._foresight_steps()]
        return [
            *works,
            *foresight_works[:PRIORITY_FORESIGHT_STEPS],
            *([self._assess] if self._nodes_to_assess() else []),
            *foresight_works[PRIORITY_FORESIGHT_STEPS:],
        ]

    async def _run_background_work(self) -> None:
        """As much of it at once as the engine can; a command cuts it short."""
        if self.offer and self._foresight_steps():
            self._engine_requests.cancel_foresight_except(
                {child_id_for_choice(self.tree.head, self.offer.id, guess) for guess in self._likely_choices()}
            )

        async def run_after_delay() -> None:
            await asyncio.sleep(BACKGROUND_DELAY_SECONDS)
            await run_concurrently(self._background_work(), self._models.concurrency(self._model_options))

        try:
            await self._run_interruptible(run_after_delay())
        except EngineStopped:  # nobody waits for any of it
            log.info("session %s: its model was unloaded while it was at work behind the options", self.id)

    async def _prepare_prompts(self) -> None:
        """Have the prompts at hand, made ready from where they come from if they are not."""
        config = self.config
        await self.open_prompts()
        if self.prompts is not None:
            return
        try:
            prepared = await self._run_interruptible(self._datasets.prepare(config.dataset, self._on_load_progress))
        finally:
            self._on_load_progress(None)
        async with self._lock:
            await self._store.write(rows.set_prepared_prompts, self.id, prepared)
            self.prepared_prompts = prepared
            self.prompts = await self._datasets.open(prepared, config.dataset, config.seed)
            self._publish("state", self.state())

    async def _recompute_head(self) -> None:
        """Work out the head's weights again, which were pruned."""
        head = self.tree.head
        await self._run_interruptible(self._engine_requests.recompute(WeightsMissing(head.weights)))
        await self._prune_weights()

    async def _prune_weights(self) -> None:
        """Delete the weights that need not stay on disk and that no other session names."""
        prunable_now = prunable_weights(self.tree, self.config) - set(+self._pinned_weights)
        prunable_on_disk = [weights for weights in prunable_now if weights in self._weights]
        if prunable_on_disk:
            used_elsewhere = await self._store.read(rows.weights_in_other_sessions, self.id, prunable_on_disk)
            for weights in set(prunable_on_disk) - used_elsewhere:
                await asyncio.to_thread(self._weights.discard, weights)

    async def _init_adapter(self) -> None:
        root = self.tree.root
        initial_weights = await self._run_interruptible(self._engine_requests.init_adapter())
        if unadapted_layers := self._engine_requests.unadapted_layers:
            self._publish_notice(f"Layers without an adapter: {', '.join(unadapted_layers)}.")
        async with self._lock:
            await self._store.write(rows.set_weights, root.id, initial_weights)
            self.tree.update(root.id, weights=initial_weights)
            self._publish("state", self.state())

    async def _learn(self) -> None:
        intent = self.intent
        assert intent is not None
        body = intent["body"]
        parent = self.tree.nodes[body["node"]]
        choice = CHOICE.validate_python(body["choice"])
        learned = await self._run_interruptible(self._engine_requests.learn(parent, body["offer"], choice))
        async with self._lock:
            if self.intent is not intent:
                return
            node = self._make_child(parent, body["offer"], choice, learned)
            node_changes = {parent.id: {"forward": node.id, "shown": body["offer"]}}
            await self._store.write(rows.commit_node, node_row(node), node_changes, intent, None)
            self._enter_node(node, node_changes)

    def _make_child(self, parent: Node, offer: str, choice: Choice, learned: Learned | None) -> Node:
        """The node that a choice leads to; one that teaches nothing has the weights of its parent."""
        return Node(
            id=child_id_for_choice(parent, offer, choice), session=self.id, parent=parent.id,
            step=parent.step + (learned is not None), weights=learned.weights if learned else parent.weights,
            position=parent.position + 1, answered=offer, choice=choice, metrics=learned.metrics if learned else None,
            control=None if learned else parent.control, shown=None, forward=None, created=time.time(),
        )  # fmt: skip

    async def _save_weights(self, node: Node) -> None:
        """Write weights that are in the engine's memory alone: behind the click, while its options are being read."""
        await self._engine_requests.save_weights(node)
        await self._prune_weights()

    async def _begin_offer(self) -> None:
        assert self.prompts is not None
        async with self._lock:
            if self.offer is None:
                prompt = await asyncio.to_thread(self.prompts.at, self.tree.head.position)
                await self._new_offer(prompt, None)

    async def _new_offer(self, prompt: str, intent: dict[str, Any] | None) -> None:
        """Put a new offer on the screen, empty as yet, and close the intent that asked for it. The lock is held."""
        head = self.tree.head
        number = await self._store.read(rows.count_offers, head.id)
        row = self._offer_row(head, number, prompt)
        await self._store.write(rows.commit_offer, row, intent, self._failed_request)
        self._remember_request(intent)
        self._show_offer(row)

    async def _generate_options(self) -> None:
        """Draw the options of the offer on the screen, from its beginning: the same seed gives the same text."""
        shown, head = self.offer, self.tree.head
        assert shown is not None
        if any(shown.texts):
            shown.texts = [""] * self.config.group_size
            self._publish("offer_started", self._offer_event(shown))
        offered = await self._run_interruptible(
            self._engine_requests.generate_options(head, shown.number, shown.prompt, self._on_option_text)
        )
        async with self._lock:
            if self.offer is not shown:
                return
            options = [option.model_dump(mode="json") for option in offered.options]
            await self._store.write(rows.set_options, shown.id, options)
            shown.options = offered.options
            shown.texts = [option.text for option in offered.options]
            self._record_speed(offered)
            self._publish("offer_ready", {"offer": shown.id, "options": shown.options_json()})
            if offered.overflowed:
                letters = " and ".join(chr(ord("A") + index) for index in offered.overflowed)
                self._publish_notice(
                    f"Truncated after a numeric overflow: {letters}. If it happens again, go back to an earlier step."
                )

    async def _answer_control_prompt(self, node: Node) -> None:
        """Answer the control prompt at the head (and, once, at the root), when nobody waits for anything else."""
        try:
            offered = await self._engine_requests.generate(
                self.config.control_prompt, node.weights, CONTROL_SAMPLING, 1, 0, priority=1
            )
            answer = offered.options[0].text
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a control prompt that cannot be answered must not stop the session
            answer = error.message
        async with self._lock:
            await self._store.write(rows.set_control, node.id, answer)
            self.tree.update(node.id, control=answer)
            self._publish("control", {"node": node.id, "answer": answer})

    def _nodes_to_assess(self) -> list[Node]:
        """The last choices of the branch, where the head does not say yet how many of them it agrees with."""
        head = self.tree.head
        if head.metrics is None or head.metrics.agreed is not None or head.id in self._failed_assessments:
            return []
        chosen_nodes = [
            node for node in self.tree.path(head.id) if node.has_learned and not isinstance(node.choice, Retraining)
        ]
        return chosen_nodes[-ASSESSED_CHOICES:]

    async def _assess(self) -> None:
        """Say with how many of the last choices the model still agrees, when nobody waits for anything else."""
        node, nodes = self.tree.head, self._nodes_to_assess()
        assert node.metrics is not None
        try:
            assessed = await self._engine_requests.assess(node.weights, nodes)
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a figure that cannot be had must not stop the session
            log.warning("session %s: could not assess %s: %s", self.id, node.id, error.message)
            self._failed_assessments.add(node.id)
            return
        async with self._lock:
            metrics = node.metrics.model_copy(update={"agreed": assessed.agreed, "agreed_of": assessed.of})
            await self._store.write(rows.set_metrics, node.id, metrics.model_dump())
            self.tree.update(node.id, metrics=metrics)
            self._publish("assessed", {"node": node.id, "agreed": assessed.agreed, "of": assessed.of})

    def _foresight_steps(self) -> list[ForesightStep]:
        """What to work out next while somebody looks: choices, and whether the options are drawn that would follow.

        The likeliest one to its end, then the weights of all others: whoever chooses one of these has the first words
        at once, and sees the rest being drawn.
        """
        if not (
            self.watchers
            and self.is_foresight_enabled()
            and self.offer
            and self._models.state(self._model_options) == "loaded"
        ):
            return []
        if self._foresight_offer_id != self.offer.id:
            self._foresight_offer_id, self._finished_foresight = self.offer.id, set()
        first, *others = self._likely_choices()
        order = [(first, True), *((choice, with_options) for with_options in (False, True) for choice in others)]
        return [step for step in order if step not in self._finished_foresight]

    def _likely_choices(self) -> list[LikelyChoice]:
        assert self.offer is not None
        earlier_choices = [node.choice for node in self.tree.path(self.tree.head_id) if node.answered]
        return likely_choices(earlier_choices, self.offer.options or ())

    async def _foresee(self, head: Node, step: ForesightStep) -> None:
        """Work out what a choice would lead to, weights and options: a click then finds them made."""
        offer, (choice, with_options) = self.offer, step
        if offer is None or not self.watchers:
            return
        try:
            learned = await self._engine_requests.learn_ahead(head, offer.id, choice) if choice != "skip" else None
            child = self._make_child(head, offer.id, choice, learned)
            if with_options and child.id not in self.tree.nodes and self.prompts is not None:
                prompt = await asyncio.to_thread(self.prompts.at, child.position)
                await self._engine_requests.generate_ahead(child, prompt)
        except TrellisError as error:  # what nobody asked for must not stop the session
            log.info("session %s: could not foresee %s: %s", self.id, choice, error.message)
        self._finished_foresight.add(step)

    def add_watcher(self) -> None:
        """Somebody looks at the session from now on."""
        self.watchers += 1
        self.wake()

    def remove_watcher(self) -> None:
        """One less looks at it."""
        self.watchers -= 1

    async def _run_interruptible(self, work: Coroutine[Any, Any, R]) -> R:
        """Run work that a command may cut short; raises Interrupted when one did."""
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

    @property
    def _failed_request(self) -> str | None:
        """The request of an intent that failed: the next action takes its place."""
        return self.intent["request"] if self.intent else None

    # ── Small things ───────────────────────────────────────────────────────────────────────────────

    def _on_load_progress(self, progress: Progress | None) -> None:
        """While the model loads, the session says so."""
        self.load_progress = progress
        if progress:
            self._publish("load_progress", progress.model_dump(exclude={"type"}))
        else:
            self._publish("state", self.state())

    def _on_queue_position(self, position: int | None) -> None:
        """While the engine works for others, the session says which place it has."""
        self.queue_position = position
        self._publish("queued", {"place": position})

    def _publish_notice(self, message: str) -> None:
        """Something that a person should know of and need do nothing about."""
        self._publish("notice", {"message": message})

    def _on_option_text(self, index: int, text: str) -> None:
        assert self.offer is not None
        self.offer.texts[index] += text
        self._publish("option_delta", {"offer": self.offer.id, "index": index, "text": text})

    def _undo_redo_flags(self) -> dict[str, bool]:
        is_free = not self.is_busy
        return {
            "can_undo": is_free and self.tree.undo_target is not None,
            "can_redo": is_free and self.tree.redo_target is not None,
        }

    def _prompt_index(self) -> int:
        """Which prompt of the round stands at the head, counted from 0."""
        return self.tree.head.position % self.prompts.total if self.prompts else self.tree.head.position

    def _publish(self, name: str, data: dict[str, Any]) -> None:
        if not self._is_closed:
            self._hub.publish(self.topic, name, data)

    def _publish_head(self) -> None:
        head = self.tree.head
        data = {"node": head.id, "step": head.step, "position": self._prompt_index()}
        self._publish("head_moved", data | self._undo_redo_flags())

    def _publish_offer(self, offer: ShownOffer) -> None:
        self._publish("offer_started", self._offer_event(offer))
        if offer.options:
            self._publish("offer_ready", {"offer": offer.id, "options": offer.options_json()})

    def _offer_event(self, offer: ShownOffer) -> dict[str, Any]:
        shown = offer.as_json()
        return {
            "offer": shown["id"],
            "node": shown["node"],
            "prompt": shown["prompt"],
            "options": shown["options"],
        }

    def _fail(self, error: TrellisError) -> None:
        self.error = error
        self._publish("failed", {"error": error.as_json()} | self._undo_redo_flags())

    async def _is_known_request(self, request: str) -> bool:
        """Whether a request was taken before: then it is the same action."""
        if self._known_requests is None:
            self._known_requests = await self._store.read(rows.get_request_ids, self.id)
        return request in self._known_requests

    def _remember_request(self, intent: dict[str, Any] | None) -> None:
        if intent and self._known_requests is not None:
            self._known_requests.add(intent["request"])

    def _make_intent(self, request: str, kind: str, body: dict[str, Any], state: str) -> dict[str, Any]:
        return {"session": self.id, "request": request, "kind": kind, "body": body, "state": state,
                "created": time.time()}  # fmt: skip

    def _require_open(self) -> None:
        if self._is_closed:
            raise NotFound("This session was deleted.", next_step="Start a new one.")

    def _require_not_busy(self) -> None:
        self._require_open()
        if self.is_busy:
            raise self._conflict(
                "Still learning from the last choice.",
                "busy",
                "Try again in a few seconds.",
            )

    def _conflict(self, message: str, code: str, next_step: str) -> Conflict:
        return Conflict(message, code=code, next_step=next_step, details={"state": self.state()})


def _internal_error(session: str) -> TrellisError:
    return TrellisError(
        "Something went wrong in this session.",
        code="internal",
        next_step=f"Resume it. Error ID {session} (see the log).",
    )
