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

from ..blobs import Blobs
from ..errors import Conflict, EngineDied, EngineStopped, NotFound, TrellisError, WeightsMissing, shorten
from ..messages import CHOICE, Chat, Choice, Event, Learned, Lesson, Metrics, Offered, Progress, Prompt, Spoke
from ..params import ModelOptions, Sampling, SessionConfig
from ..store import steering as rows
from ..store.store import Store
from .choices import including_equals, require_fits
from .datasets import Datasets, Prompts
from .growth import Growth
from .guesses import Guess, likely
from .hub import Hub
from .keeping import prunable
from .lessons import Logs
from .models import Models
from .shown import Shown, first_words
from .speed import tokens_per_second
from .tasks import Work, side_by_side, to_its_end
from .templates import thinking_kwargs
from .tree import Fitted, Node, Tree, child_id, drift_of, led_to, node_json, node_row, offer_id

log = logging.getLogger(__name__)
R = TypeVar("R")

ASSESSED = 10
"""So many last choices of a branch are looked at to say whether the model still agrees with them."""

BREATH = 0.12
"""Seconds after something was shown in which nothing is begun that nobody waits for: a browser on the same computer
has its processor to draw it."""

SOON = 4
"""So many of the likeliest choices are worked out before figures that nobody waits for."""

CONTROL = Sampling(temperature=0.0, top_p=1.0, min_p=0.0, max_new_tokens=96)
"""How the control prompt is answered: the likeliest words, so that only the weights make a difference."""

Foreseen = tuple[Guess, bool]
"""A choice that may be made, and whether the options are worked out that would follow it."""


class Interrupted(Exception):
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
        logs: Logs,
        row: dict[str, Any],
        nodes: Iterable[Node],
        offer: dict[str, Any] | None,
        intent: dict[str, Any] | None,
        foresees: Callable[[], bool] = lambda: False,
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
        self._model = self.config.part(ModelOptions)
        self.prepared: str | None = row["prompts"]
        self.prompts: Prompts | None = None
        self.tree = Tree(nodes, row["head"])
        self.offer = Shown.from_row(offer, self.config.group_size) if offer else None
        self.intent = intent
        self.error: TrellisError | None = None
        self.loading: Progress | None = None
        self.queue: int | None = None
        """The place in the engine's queue, while others are worked for: 1 is next."""
        self.tokens_per_second: float | None = None
        self._growth = Growth(
            store, models, weights, logs, self.config, self.tree, self._loading_moves, self._notice, self._queue_moves
        )
        self._lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._stream: asyncio.Task[Any] | None = None
        self._labels: dict[str, str] = {}
        self._pins: Counter[str] = Counter()
        self._not_assessed: set[str] = set()
        self._warming: asyncio.Task[None] | None = None
        self._resumed = False
        """Whether a person wants to go on: the model is then loaded and compared before they choose."""
        self.used = time.monotonic()
        self.watched = 0
        self.foresees = foresees
        self._foreseen: set[Foreseen] = set()
        self._foreseen_of = ""
        self._requests: set[str] | None = None
        """The ids of all requests that were taken, once they are known."""
        self._closed = False

    # ── What a person sees ─────────────────────────────────────────────────────────────────────────

    @property
    def topic(self) -> str:
        return f"steering/{self.id}"

    @property
    def status(self) -> str:
        if self.error:
            return "failed"
        if self.loading:
            return "loading"
        if self.intent:
            return "learning"
        if self.offer and self.offer.options:
            return "ready"
        return "offering" if self.tree.root.weights else "loading"

    @property
    def busy(self) -> bool:
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
            "learning": self.intent["body"] if self.busy and self.intent else None,
            **self._can(),
            "dataset": {
                "source": self.config.dataset.source,
                "position": self._position(),
                "total": self.prompts.total if self.prompts else None,
                "notes": self.prompts.notes if self.prompts else [],
            },
            "control": (
                {"prompt": self.config.control_prompt, "original": original, "current": current}
                if self.config.control_prompt
                else None
            ),
            "figures": self.figures(),
            "layers_left_out": list(self._growth.left_out),
            "engine": self._models.state(self._model),
            "load": self.loading.model_dump(exclude={"type"}) if self.loading else None,
            "queue": self.queue,
        }

    def figures(self) -> dict[str, Any]:
        head = self.tree.head
        made = next((node for node in reversed(self.tree.path(head.id)) if node.metrics), None)
        measured = made.metrics.model_dump() if made and made.metrics else dict.fromkeys(Metrics.model_fields)
        return {
            **measured,
            "step": head.step,
            "drift": drift_of(head, self.tree),
            "tokens_per_second": self.tokens_per_second,
        }

    # ── What a person says ─────────────────────────────────────────────────────────────────────────

    @to_its_end
    async def choose(self, offer: str, choice: Choice, request: str) -> None:
        """Learn from a choice. Raises Conflict for an offer that is not on the screen or not whole yet."""
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            shown = self.offer
            if shown is None or shown.id != offer:
                raise self._conflict(
                    f"The offer “{shorten(offer)}” is not the one on the screen.",
                    "stale_offer",
                    "Look at the current options and choose again.",
                )
            if shown.options is None:
                raise self._conflict(
                    "The options are still being written.",
                    "offer_not_ready",
                    "Choose when all options are whole.",
                )
            require_fits(choice, len(shown.options))
            known = self.tree.nodes.get(led_to(self.tree.head, shown.id, choice))
            if known is None:
                choice = including_equals(choice, shown.options)
            said = CHOICE.dump_python(choice, mode="json")
            leads_to = child_id(self.tree.head, shown.id, said)
            known = known or self.tree.nodes.get(leads_to)
            body = {"offer": shown.id, "node": self.tree.head_id, "choice": said}
            learned = self._growth.made(leads_to) if known is None else None
            if known is not None or learned is not None or choice == "skip":
                await self._step_at_once(known, choice, learned, self._intent(request, "choose", body, "done"))
                return
            intent = self._intent(request, "choose", body, "open")
            await self._store.write(rows.replace_intent, intent, self._given_up)
            self._taken(intent)
            self.intent, self.error = intent, None
            self._publish("learning", {"offer": shown.id, "choice": said})
            self._kick()

    @to_its_end
    async def skip(self, request: str) -> None:
        """Move on to the next prompt without learning; also from an offer that is not whole yet."""
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            if self.offer is None:
                raise self._conflict("There is nothing to skip yet.", "offer_not_ready", "Wait for the first options.")
            known = self.tree.nodes.get(child_id(self.tree.head, self.offer.id, "skip"))
            body = {"offer": self.offer.id, "node": self.tree.head_id, "choice": "skip"}
            await self._step_at_once(known, "skip", None, self._intent(request, "skip", body, "done"))

    @to_its_end
    async def undo(self, request: str) -> None:
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            target = self.tree.undo
            if target is None:
                raise self._conflict("This is the beginning; nothing to undo.", "nothing_to_undo", "Choose an answer.")
            left = self.tree.head
            shown = left.answered or target.shown  # what was fitted to a log answered no offer
            notes = {target.id: {"forward": left.id, "shown": shown}}
            await self._go(target, shown, notes, self._intent(request, "undo", {"from": left.id}, "done"))

    @to_its_end
    async def redo(self, request: str) -> None:
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            target = self.tree.redo
            if target is None:
                raise self._conflict("There is nothing to redo.", "nothing_to_redo", "Choose an answer.")
            intent = self._intent(request, "redo", {"from": self.tree.head_id}, "done")
            await self._go(target, target.shown, {}, intent)

    @to_its_end
    async def goto(self, node: str, request: str) -> None:
        """Stand at any node; the options that were shown there come back. Raises NotFound."""
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            target = self.node(node)
            path = self.tree.path(target.id)
            notes = {upper.id: {"forward": lower.id} for upper, lower in pairwise(path) if upper.forward != lower.id}
            intent = self._intent(request, "goto", {"from": self.tree.head_id, "to": node}, "done")
            await self._go(target, target.shown, notes, intent)

    @to_its_end
    async def prompt(self, text: str, request: str) -> None:
        """Replace the current prompt and offer again."""
        async with self._lock:
            if await self._known(request):
                return
            self._require_free()
            if not self.tree.root.weights:
                raise self._conflict("The session is not ready yet.", "offer_not_ready", "Wait for the first options.")
            body = {"node": self.tree.head_id, "text": text}
            await self._new_offer(text, self._intent(request, "prompt", body, "done"))
            self.intent, self.error = None, None
            self._kick()

    @to_its_end
    async def resume(self) -> None:
        """Try again after a failure, or go on after the model was unloaded."""
        async with self._lock:
            self._growth.welcome()
            self._resumed = True
            if self.error:
                self.error = None
                self._publish("state", self.state())
            self.wake()

    @to_its_end
    async def rename(self, name: str) -> None:
        async with self._lock:
            self._require_open()
            await self._store.write(rows.rename_session, self.id, name, time.time())
            self.name = name
            self._publish("state", self.state())

    @to_its_end
    async def name_node(self, node: str, name: str) -> None:
        """Give a node a name of its own, or take it away; the weights of a node with a name stay on disk."""
        async with self._lock:
            self._require_open()
            found = self.node(node)
            await self._store.write(rows.name_node, found.id, name or None)
            self.tree.note(found.id, name=name or None)
            self._publish("node_named", {"node": found.id, "name": name})

    @asynccontextmanager
    async def holding(self, node: Node, checked: bool = False) -> AsyncIterator[None]:
        """Have the weights of a node on disk, and keep them there until the block ends.

        `checked` for who reads the files without an engine, which would notice damaged ones: they are made again first.
        """
        self._pins[node.weights] += 1
        try:
            damaged = checked and await asyncio.to_thread(self._growth.drop_if_damaged, node.weights)
            if damaged or not self._growth.has(node.weights):
                await self._growth.regrow(WeightsMissing(node.weights))
            yield
        finally:
            self._pins[node.weights] -= 1

    async def open_prompts(self) -> None:
        """Have the prompts at hand, if they were made ready before."""
        if self.prepared is not None and self.prompts is None:
            try:
                self.prompts = await self._datasets.open(self.prepared, self.config.dataset, self.config.seed)
            except (OSError, ValueError):
                log.warning("session %s: its prompts are gone and must be read again", self.id)

    async def chat(self, request: Chat, node: Node, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation from any node, without moving the session. Weights that are gone are made again."""
        if not node.weights:
            raise self._conflict("The session is not ready yet.", "offer_not_ready", "Wait for the first options.")
        self.used = time.monotonic()
        self._growth.welcome()
        self._pins[node.weights] += 1
        variables = thinking_kwargs(self.config) | request.template_kwargs
        request = request.model_copy(
            update={"weights": node.weights, "template": self.config.chat_template, "template_kwargs": variables}
        )
        try:
            if not self._growth.at_hand(node.weights):
                await self._growth.regrow(WeightsMissing(node.weights))
            spoken = False
            try:
                async with aclosing(self._growth.chat(request, owner)) as events:
                    async for event in events:
                        spoken = spoken or isinstance(event, Spoke)
                        yield event
            except WeightsMissing as missing:  # what looked whole was not
                if spoken or missing.weights != node.weights:
                    raise
                await self._growth.regrow(missing)
                async with aclosing(self._growth.chat(request, owner)) as events:
                    async for event in events:
                        yield event
        finally:
            self._pins[node.weights] -= 1

    async def sample(self, prompt: str, node: str | None, n: int, sampling: Sampling, seed: int) -> list[str]:
        """Answers from any node without moving the session."""
        place = self.node(node) if node else self.tree.head
        if not place.weights:
            raise self._conflict("The session is not ready yet.", "offer_not_ready", "Wait for the first options.")
        self._growth.welcome()
        async with self.holding(place):
            try:
                offered = await self._growth.offer(prompt, place.weights, sampling, n, seed)
            except WeightsMissing as missing:  # what looked whole was not
                await self._growth.regrow(missing)
                offered = await self._growth.offer(prompt, place.weights, sampling, n, seed)
        return [option.text for option in offered.options]

    async def planted(self) -> None:
        """Wait until the model is there and the session has weights to begin with. Raises what stands in the way."""
        self._growth.welcome()
        while not self.tree.root.weights:
            self._require_open()
            if self.error:
                raise self.error
            self.wake()
            await asyncio.sleep(0.1)

    def prompt_of(self, text: str) -> Prompt:
        """A prompt as the session's options have it put to the model."""
        return self._growth.prompt(text)

    async def lessons(self, node: Node) -> list[Lesson]:
        """All that was said on the way to a node, skips left out."""
        return await self._growth.lessons(self.tree.path(node.id))

    async def fit(self, parent: Node, fitted: Fitted, told: Callable[[Progress], None]) -> Learned:
        """Learn from a whole log at a node, without moving the session; the node is added by `graft`."""
        self._growth.welcome()
        try:
            return await self._growth.fit(parent, fitted, told)
        except WeightsMissing as missing:  # what looked whole was not
            await self._growth.regrow(missing)
            return await self._growth.fit(parent, fitted, told)

    async def graft(self, parent: Node, fitted: Fitted, learned: Learned) -> Node:
        """Add a node that was made beside the session's own steps. The head stays where it is, but for a session that
        was made to hold this node and in which nothing was said yet: it then stands there."""
        return await asyncio.shield(asyncio.ensure_future(self._graft(parent, fitted, learned)))

    async def _graft(self, parent: Node, fitted: Fitted, learned: Learned) -> Node:
        async with self._lock:
            self._require_open()
            said = fitted.model_dump(mode="json")
            node_id = child_id(parent, fitted.fitted, said)
            if node_id not in self.tree.nodes:
                node = Node(
                    id=node_id, session=self.id, parent=parent.id, step=parent.step + 1, weights=learned.weights,
                    position=self.tree.head.position, answered=None, choice=fitted, metrics=learned.metrics,
                    control=None, shown=None, forward=None, created=time.time(),
                )  # fmt: skip
                await self._store.write(rows.add_node, node_row(node))
                self.tree.add(node)
                self._publish("node_fitted", node_json(node, self.tree))
            node = self.tree.nodes[node_id]
            if fitted.kind == "replay" and len(self.tree.nodes) == 2 and not self.intent:
                notes = {parent.id: {"forward": node.id}}
                intent = self._intent(f"goto-{node.id}", "goto", {"from": parent.id, "to": node.id}, "done")
                await self._go(node, None, notes, intent)
            return node

    async def labels(self) -> dict[str, str]:
        """A few words for each node: how the answer began that led to it."""
        missing = [node for node in self.tree.nodes.values() if node.id not in self._labels]
        found = await self._store.read(rows.get_offers, [node.answered for node in missing if node.answered])
        for node in missing:
            self._labels[node.id] = first_words(node, found.get(node.answered or ""))
        return self._labels | {node.id: node.name for node in self.tree.nodes.values() if node.name}

    def warm(self) -> None:
        """Somebody looks at the session: have its model ready before they choose. Never waits."""
        if self._models.state(self._model) == "unloaded" and not self._closed and not self.error:
            self._warming = asyncio.create_task(self._load_ahead())

    async def _load_ahead(self) -> None:
        try:
            await self._models.load(self._model)
        except TrellisError as error:
            log.warning("could not load ahead: %s", error.message)

    def node(self, node_id: str) -> Node:
        """Raises NotFound."""
        if node_id not in self.tree.nodes:
            raise NotFound(
                f"There is no node “{shorten(node_id)}” in this session.",
                field="node",
                next_step="The nodes are listed in the session's tree.",
            )
        return self.tree.nodes[node_id]

    def engine_changed(self, options: ModelOptions) -> None:
        """The engine of a model was started or ended."""
        if options == self._model:
            state = self._models.state(options)
            self._publish("engine", {"state": state})
            if state == "loaded" and self.watched:
                self.wake()

    @property
    def idle(self) -> bool:
        """Whether nobody watches it and nothing is being done."""
        working = self._task is not None and not self._task.done()
        held = bool(+self._pins)
        return not working and not held and not self._lock.locked() and self.watched == 0

    def wake(self) -> None:
        """Do what is missing, if anything is. Never waits."""
        if not self._closed and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run(), name=f"session {self.id}")

    async def close(self, reason: str | None = None) -> None:
        """Stop working. With a reason, say goodbye to those who watch."""
        self._closed = True
        if self._task:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._growth.close()
        if reason:
            self._hub.publish(self.topic, "done", {"reason": reason})
        self._hub.end(self.topic)

    # ── Moving ─────────────────────────────────────────────────────────────────────────────────────

    async def _step_at_once(
        self, known: Node | None, choice: Choice, learned: Learned | None, intent: dict[str, Any]
    ) -> None:
        """A step for which nothing has to be learned any more: a skip, a choice that was made here before, or one that
        was worked out ahead; with the options that follow, where they are there as well."""
        head, offer = self.tree.head, self.offer
        assert offer is not None
        notes = {head.id: {"shown": offer.id}}
        if known is not None:
            notes[head.id]["forward"] = known.id
            await self._go(known, known.shown, notes, intent)
            return
        node = self._child(head, offer.id, choice, learned)
        notes[head.id]["forward"] = node.id
        row = await self._drawn_ahead(node)
        await self._store.write(rows.commit_node, node_row(node), notes, intent, self._given_up, row)
        self._taken(intent)
        self._arrive(node, notes)
        if row:
            self._show(row)
        self._kick()

    async def _drawn_ahead(self, node: Node) -> dict[str, Any] | None:
        """The first offer at a new node, if its options are there."""
        if self.prompts is None:
            return None
        try:
            prompt = await asyncio.to_thread(self.prompts.at, node.position)
        except (OSError, ValueError):  # told of when the offer is begun
            return None
        offered = self._growth.drawn(node, prompt)
        if offered is None:
            return None
        self._note_speed(offered)
        options = [option.model_dump(mode="json") for option in offered.options]
        return self._offer_row(node, 0, prompt) | {"options": options}

    def _offer_row(self, node: Node, number: int, prompt: str) -> dict[str, Any]:
        return {
            "id": offer_id(node, number, prompt), "session": self.id, "node": node.id, "number": number,
            "prompt": prompt, "options": None, "created": time.time(),
        }  # fmt: skip

    def _show(self, row: dict[str, Any]) -> None:
        """Put an offer that is in the store on the screen."""
        self.tree.note(row["node"], shown=row["id"])
        self.offer = Shown.from_row(row, self.config.group_size)
        self._publish_offer(self.offer)

    def _note_speed(self, offered: Offered) -> None:
        tokens = sum(len(option.tokens) for option in offered.options)
        self.tokens_per_second = tokens_per_second(tokens, offered.seconds)

    async def _go(
        self, target: Node, offer: str | None, notes: dict[str, dict[str, Any]], intent: dict[str, Any]
    ) -> None:
        """Move the head and bring back what was shown there."""
        row = await self._store.write(rows.commit_move, target.id, offer, notes, intent, self._given_up)
        self._taken(intent)
        for node_id, changes in notes.items():
            self.tree.note(node_id, **changes)
        self.tree.head_id = target.id
        self.offer = Shown.from_row(row, self.config.group_size) if row else None
        self.intent, self.error = None, None
        self._publish_head()
        if self.offer:
            self._publish_offer(self.offer)
        self._kick()

    def _arrive(self, node: Node, notes: dict[str, dict[str, Any]]) -> None:
        """Take a committed node into memory and tell everyone."""
        self.tree.add(node)
        for node_id, changes in notes.items():
            self.tree.note(node_id, **changes)
        self.tree.head_id = node.id
        self.offer, self.intent, self.error = None, None, None
        self._publish("node_added", node_json(node, self.tree))
        self._publish_head()

    # ── The work that is missing ───────────────────────────────────────────────────────────────────

    def _kick(self) -> None:
        """What was wanted has changed: drop work that no longer matters, and do what is missing."""
        if self._stream and not self._stream.done():
            self._stream.cancel()
        self._growth.welcome()
        self.wake()

    async def _run(self) -> None:
        deaths = 0
        lost: WeightsMissing | None = None
        while not self._closed:
            async with self._lock:
                step = self._missing()
            if step is None:
                return
            try:
                if lost:
                    await self._interruptible(self._growth.regrow(lost))
                    lost = None
                else:
                    await step()
                deaths = 0
            except Interrupted:
                lost = None
                continue
            except WeightsMissing as missing:
                if lost:
                    self._fail(missing)
                lost = missing
            except EngineDied as error:
                deaths += 1
                if deaths > 2:
                    self._fail(error)
                else:
                    self._notice(f"{error.message} It is started again; nothing is lost.")
            except TrellisError as error:
                self._fail(error)
            except Exception:
                log.exception("session %s failed", self.id)
                self._fail(_unknown(self.id))

    def _missing(self) -> Work | None:
        """The next piece of work, most urgent first; None when a person has to say something."""
        if self.error or self._closed:
            return None
        if self.prompts is None:
            return self._prepare
        if not self.tree.root.weights:
            return self._plant
        if not self._growth.at_hand(self.tree.head.weights):
            return self._fetch
        if self.intent:
            return self._learn
        if self.offer is None:
            return self._begin_offer
        if self.offer.options is None:
            return self._draw
        if self._to_compare():
            return self._compare
        if self._behind():
            return self._work_behind
        return None

    def _to_compare(self) -> bool:
        """Whether the model is to be compared with the one that the session grew on, so that another one is refused
        before a choice is made that could not be learned from."""
        if self._growth.compared or self._growth.dismissed:
            return False
        return self._resumed or (self.watched > 0 and self._models.state(self._model) == "loaded")

    async def _compare(self) -> None:
        await self._interruptible(self._growth.compare())
        self._resumed = False

    def _behind(self) -> list[Work]:
        """What is done while the options are read, the most useful first."""
        works: list[Work] = []
        if self._growth.dismissed:
            return works
        works += [partial(self._keep, node) for node in self._growth.unwritten]
        if self.config.control_prompt:
            places = {node.id: node for node in (self.tree.root, self.tree.head)}.values()
            works += [partial(self._control, node) for node in places if node.control is None]
        foreseeing = [partial(self._foresee, self.tree.head, step) for step in self._to_foresee()]
        return [*works, *foreseeing[:SOON], *([self._assess] if self._to_assess() else []), *foreseeing[SOON:]]

    async def _work_behind(self) -> None:
        """As much of it at once as the engine can; a command cuts it short."""
        if self.offer and self._to_foresee():
            self._growth.foresee_only({led_to(self.tree.head, self.offer.id, guess) for guess in self._likely()})

        async def work() -> None:
            await asyncio.sleep(BREATH)
            await side_by_side(self._behind(), self._models.lanes(self._model))

        try:
            await self._interruptible(work())
        except EngineStopped:  # nobody waits for any of it
            log.info("session %s: its model was unloaded while it was at work behind the options", self.id)

    async def _prepare(self) -> None:
        """Have the prompts at hand, made ready from where they come from if they are not."""
        config = self.config
        await self.open_prompts()
        if self.prompts is not None:
            return
        try:
            prepared = await self._interruptible(self._datasets.prepare(config.dataset, self._loading_moves))
        finally:
            self._loading_moves(None)
        async with self._lock:
            await self._store.write(rows.set_prompts, self.id, prepared)
            self.prepared = prepared
            self.prompts = await self._datasets.open(prepared, config.dataset, config.seed)
            self._publish("state", self.state())

    async def _fetch(self) -> None:
        """Work out the head's weights again, which were pruned."""
        head = self.tree.head
        await self._interruptible(self._growth.regrow(WeightsMissing(head.weights)))
        await self._prune()

    async def _prune(self) -> None:
        """Delete the weights that need not stay on disk and that no other session names."""
        prunable_now = prunable(self.tree, self.config) - set(+self._pins)
        spare = [weights for weights in prunable_now if weights in self._weights]
        if spare:
            others = await self._store.read(rows.weights_of_others, self.id, spare)
            for weights in set(spare) - others:
                await asyncio.to_thread(self._weights.discard, weights)

    async def _plant(self) -> None:
        root = self.tree.root
        planted = await self._interruptible(self._growth.plant())
        if left_out := self._growth.left_out:
            self._notice(f"Some layers of this model get no adapter: {', '.join(left_out)}.")
        async with self._lock:
            await self._store.write(rows.set_weights, root.id, planted)
            self.tree.note(root.id, weights=planted)
            self._publish("state", self.state())

    async def _learn(self) -> None:
        intent = self.intent
        assert intent is not None
        body = intent["body"]
        parent = self.tree.nodes[body["node"]]
        choice = CHOICE.validate_python(body["choice"])
        learned = await self._interruptible(self._growth.learn(parent, body["offer"], choice))
        async with self._lock:
            if self.intent is not intent:
                return
            node = self._child(parent, body["offer"], choice, learned)
            notes = {parent.id: {"forward": node.id, "shown": body["offer"]}}
            await self._store.write(rows.commit_node, node_row(node), notes, intent, None)
            self._arrive(node, notes)

    def _child(self, parent: Node, offer: str, choice: Choice, learned: Learned | None) -> Node:
        """The node that a choice leads to; one that teaches nothing has the weights of its parent."""
        return Node(
            id=led_to(parent, offer, choice), session=self.id, parent=parent.id,
            step=parent.step + (learned is not None), weights=learned.weights if learned else parent.weights,
            position=parent.position + 1, answered=offer, choice=choice, metrics=learned.metrics if learned else None,
            control=None if learned else parent.control, shown=None, forward=None, created=time.time(),
        )  # fmt: skip

    async def _keep(self, node: Node) -> None:
        """Write weights that are in the engine's memory alone: behind the click, while its options are being read."""
        await self._growth.keep(node)
        await self._prune()

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
        await self._store.write(rows.commit_offer, row, intent, self._given_up)
        self._taken(intent)
        self._show(row)

    async def _draw(self) -> None:
        """Draw the options of the offer on the screen, from its beginning: the same seed gives the same text."""
        shown, head = self.offer, self.tree.head
        assert shown is not None
        if any(shown.texts):
            shown.texts = [""] * self.config.group_size
            self._publish("offer_started", self._offer_event(shown))
        offered = await self._interruptible(self._growth.draw(head, shown.number, shown.prompt, self._option_grows))
        async with self._lock:
            if self.offer is not shown:
                return
            options = [option.model_dump(mode="json") for option in offered.options]
            await self._store.write(rows.set_options, shown.id, options)
            shown.options = offered.options
            shown.texts = [option.text for option in offered.options]
            self._note_speed(offered)
            self._publish("offer_ready", {"offer": shown.id, "options": shown.options_json()})
            if offered.overflowed:
                letters = " and ".join(chr(ord("A") + index) for index in offered.overflowed)
                self._notice(
                    f"{letters}: cut short, because the model's numbers overflowed there. If it happens again, go back "
                    "to an earlier step."
                )

    async def _control(self, node: Node) -> None:
        """Answer the control prompt at the head (and, once, at the root), when nobody waits for anything else."""
        try:
            offered = await self._growth.offer(self.config.control_prompt, node.weights, CONTROL, 1, 0, priority=1)
            answer = offered.options[0].text
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a control prompt that cannot be answered must not stop the session
            answer = error.message
        async with self._lock:
            await self._store.write(rows.set_control, node.id, answer)
            self.tree.note(node.id, control=answer)
            self._publish("control", {"node": node.id, "answer": answer})

    def _to_assess(self) -> list[Node]:
        """The last choices of the branch, where the head does not say yet how many of them it agrees with."""
        head = self.tree.head
        if head.metrics is None or head.metrics.agreed is not None or head.id in self._not_assessed:
            return []
        said = [node for node in self.tree.path(head.id) if node.learned and not isinstance(node.choice, Fitted)]
        return said[-ASSESSED:]

    async def _assess(self) -> None:
        """Say with how many of the last choices the model still agrees, when nobody waits for anything else."""
        node, nodes = self.tree.head, self._to_assess()
        assert node.metrics is not None
        try:
            found = await self._growth.assess(node.weights, nodes)
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a figure that cannot be had must not stop the session
            log.warning("session %s: could not assess %s: %s", self.id, node.id, error.message)
            self._not_assessed.add(node.id)
            return
        async with self._lock:
            metrics = node.metrics.model_copy(update={"agreed": found.agreed, "agreed_of": found.of})
            await self._store.write(rows.set_metrics, node.id, metrics.model_dump())
            self.tree.note(node.id, metrics=metrics)
            self._publish("assessed", {"node": node.id, "agreed": found.agreed, "of": found.of})

    def _to_foresee(self) -> list[Foreseen]:
        """What to work out next while somebody looks: choices, and whether the options are drawn that would follow.

        The likeliest one to its end, then the weights of all others: whoever chooses one of these has the first words
        at once, and sees the rest being drawn.
        """
        if not (self.watched and self.foresees() and self.offer and self._models.state(self._model) == "loaded"):
            return []
        if self._foreseen_of != self.offer.id:
            self._foreseen_of, self._foreseen = self.offer.id, set()
        first, *others = self._likely()
        order = [(first, True), *((choice, drawn) for drawn in (False, True) for choice in others)]
        return [step for step in order if step not in self._foreseen]

    def _likely(self) -> list[Guess]:
        assert self.offer is not None
        said = [node.choice for node in self.tree.path(self.tree.head_id) if node.answered]
        return likely(said, self.offer.options or ())

    async def _foresee(self, head: Node, step: Foreseen) -> None:
        """Work out what a choice would lead to, weights and options: a click then finds them made."""
        offer, (choice, drawn) = self.offer, step
        if offer is None or not self.watched:
            return
        try:
            learned = await self._growth.learn_ahead(head, offer.id, choice) if choice != "skip" else None
            child = self._child(head, offer.id, choice, learned)
            if drawn and child.id not in self.tree.nodes and self.prompts is not None:
                prompt = await asyncio.to_thread(self.prompts.at, child.position)
                await self._growth.draw_ahead(child, prompt)
        except TrellisError as error:  # what nobody asked for must not stop the session
            log.info("session %s: could not foresee %s: %s", self.id, choice, error.message)
        self._foreseen.add(step)

    def look(self) -> None:
        """Somebody looks at the session from now on."""
        self.watched += 1
        self.wake()

    def look_away(self) -> None:
        """One less looks at it."""
        self.watched -= 1

    async def _interruptible(self, work: Coroutine[Any, Any, R]) -> R:
        """Run work that a command may cut short; raises Interrupted when one did."""
        stream = asyncio.create_task(work)
        self._stream = stream
        try:
            return await stream
        except asyncio.CancelledError:
            stream.cancel()
            current = asyncio.current_task()
            if current and current.cancelling():
                raise
            raise Interrupted from None

    @property
    def _given_up(self) -> str | None:
        """The request of an intent that failed: the next action takes its place."""
        return self.intent["request"] if self.intent else None

    # ── Small things ───────────────────────────────────────────────────────────────────────────────

    def _loading_moves(self, progress: Progress | None) -> None:
        """While the model loads, the session says so."""
        self.loading = progress
        if progress:
            self._publish("load_progress", progress.model_dump(exclude={"type"}))
        else:
            self._publish("state", self.state())

    def _queue_moves(self, place: int | None) -> None:
        """While the engine works for others, the session says which place it has."""
        self.queue = place
        self._publish("queued", {"place": place})

    def _notice(self, message: str) -> None:
        """Something that a person should know of and need do nothing about."""
        self._publish("notice", {"message": message})

    def _option_grows(self, index: int, text: str) -> None:
        assert self.offer is not None
        self.offer.texts[index] += text
        self._publish("option_delta", {"offer": self.offer.id, "index": index, "text": text})

    def _can(self) -> dict[str, bool]:
        free = not self.busy
        return {"can_undo": free and self.tree.undo is not None, "can_redo": free and self.tree.redo is not None}

    def _position(self) -> int:
        """Which prompt of the round stands at the head, counted from 0."""
        return self.tree.head.position % self.prompts.total if self.prompts else self.tree.head.position

    def _publish(self, name: str, data: dict[str, Any]) -> None:
        if not self._closed:
            self._hub.publish(self.topic, name, data)

    def _publish_head(self) -> None:
        head = self.tree.head
        data = {"node": head.id, "step": head.step, "position": self._position()}
        self._publish("head_moved", data | self._can())

    def _publish_offer(self, offer: Shown) -> None:
        self._publish("offer_started", self._offer_event(offer))
        if offer.options:
            self._publish("offer_ready", {"offer": offer.id, "options": offer.options_json()})

    def _offer_event(self, offer: Shown) -> dict[str, Any]:
        shown = offer.as_json()
        return {
            "offer": shown["id"],
            "node": shown["node"],
            "prompt": shown["prompt"],
            "options": shown["options"],
        }

    def _fail(self, error: TrellisError) -> None:
        self.error = error
        self._publish("failed", {"error": error.as_json()} | self._can())

    async def _known(self, request: str) -> bool:
        """Whether a request was taken before: then it is the same action."""
        if self._requests is None:
            self._requests = await self._store.read(rows.get_requests, self.id)
        return request in self._requests

    def _taken(self, intent: dict[str, Any] | None) -> None:
        if intent and self._requests is not None:
            self._requests.add(intent["request"])

    def _intent(self, request: str, kind: str, body: dict[str, Any], state: str) -> dict[str, Any]:
        return {"session": self.id, "request": request, "kind": kind, "body": body, "state": state,
                "created": time.time()}  # fmt: skip

    def _require_open(self) -> None:
        if self._closed:
            raise NotFound("This session was deleted.", next_step="Start another one.")

    def _require_free(self) -> None:
        self._require_open()
        if self.busy:
            raise self._conflict(
                "The model is still learning from the last choice.",
                "busy",
                "Wait for it to finish; it takes seconds.",
            )

    def _conflict(self, message: str, code: str, next_step: str) -> Conflict:
        return Conflict(message, code=code, next_step=next_step, details={"state": self.state()})


def _unknown(session: str) -> TrellisError:
    return TrellisError(
        "Something went wrong in this session.",
        code="internal",
        next_step=f"Resume it. Error ID {session} (see the log).",
    )
