"""What one session asks of its engine: plant, learn, offer, and weights worked out again from the log of choices.

Every request is built from the log alone, so that asked twice it has the same name twice. It does not know
what is on the screen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Any

from ...blobs import Blobs
from ...errors import Conflict, WeightsMissing
from ...messages import (  # fmt: skip
    Assess,
    Assessed,
    Chat,
    Choice,
    Delta,
    Event,
    Fit,
    Learn,
    Learned,
    Lesson,
    Offer,
    Offered,
    Plant,
    Planted,
    Progress,
    Prompt,
    Queued,
)
from ...params import Adapter, Learning, ModelOptions, Sampling, SessionConfig
from ...safetensors_files import all_finite
from ...store import steering as rows
from ...store.store import Store
from ...workers.worker import UNLOADED, Worker
from ..models.models import Models
from ..models.template_options import template_trouble, thinking_kwargs
from .choice_logs import Logs
from .foresight import Foresight
from .offer import options_from
from .tree import Fitted, Node, Tree, led_to, offer_seed, replayed

Grown = Callable[[int, str], None]
"""Told of text that an option grew by: its index, the text."""


class Growth:
    """A session's side of the wire. `loading` is told how a load comes along, and None when it has ended; `queued`
    the place in the engine's queue in the same way."""

    def __init__(
        self,
        store: Store,
        models: Models,
        weights: Blobs,
        logs: Logs,
        config: SessionConfig,
        tree: Tree,
        loading: Callable[[Progress | None], None],
        notice: Callable[[str], None],
        queued: Callable[[int | None], None],
    ) -> None:
        self._store = store
        self._models = models
        self._weights = weights
        self._logs = logs
        self._config = config
        self._model = config.part(ModelOptions)
        self._tree = tree
        self._loading = loading
        self._notice = notice
        self._queued = queued
        self._owner = tree.root.session
        self._planted_on: Worker | None = None
        self.left_out: tuple[str, ...] = ()
        """Layers that cannot get an adapter, each with the reason, as the engine said when it was last asked."""
        self._in_memory: dict[str, Worker] = {}
        """Weights that were learned and not written yet, and who has them."""
        self._foresight = Foresight(self._owner)
        self._dismissals = models.dismissals(self._model)

    def welcome(self) -> None:
        """A person wants something: a model that was unloaded by hand may be loaded again."""
        self._dismissals = self._models.dismissals(self._model)

    @property
    def dismissed(self) -> bool:
        """Whether its model was unloaded by hand since a person last wanted something, and is not back."""
        gone = self._models.state(self._model) != "loaded"
        return gone and self._models.dismissals(self._model) != self._dismissals

    async def engine(self) -> Worker:
        """The loaded engine, loading it if need be."""
        if self._models.state(self._model) == "loaded":
            return await self._models.engine(self._model, lambda progress: None)
        if self.dismissed:
            raise UNLOADED
        self._loading(Progress(stage="connecting", fraction=0.0, message="Starting the engine"))
        try:
            return await self._models.engine(self._model, self._loading)
        finally:
            self._loading(None)

    async def _planted(self) -> Worker:
        """The engine, after making sure that it holds the base model that this session grew on."""
        worker = await self.engine()
        if self._planted_on is not worker:
            planted = await self.plant()
            if planted != self._tree.root.weights:
                raise Conflict(
                    f"The files of “{self._config.model}” have changed since this session started.",
                    code="model_changed",
                    next_step="Restore the original files (config.json and the weights) and try again, or start a new "
                    "session.",
                )
            self._planted_on = worker
        return worker

    @property
    def compared(self) -> bool:
        """Whether the engine at hand is known to hold the base model that this session grew on."""
        return self._planted_on is not None and self._planted_on.alive

    async def compare(self) -> None:
        """Load the model and compare it with the one that this session grew on. Raises Conflict for another one."""
        await self._planted()

    async def plant(self) -> str:
        """Make the weights that the session starts from, if they are not there. Returns their id."""
        worker = await self.engine()
        self._require_template()
        root = self._tree.root.weights
        request = Plant(adapter=self._config.part(Adapter), seed=self._config.seed, root=root)
        planted = await worker.ask(request, owner=self._owner)
        assert isinstance(planted, Planted)
        self.left_out = planted.left_out
        return planted.weights

    def _require_template(self) -> None:
        """Raises Invalid where the model's chat template cannot do what the session's options ask of it."""
        loaded = self._models.loaded(self._model)
        if loaded and (trouble := template_trouble(self._config, loaded)):
            raise trouble

    async def learn(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Learn from what was said of an offer at a node, or take what was learned ahead. Raises WeightsMissing.

        The weights are then in the engine's memory; `keep` has them written.
        """
        request = await self._learn(parent, offer, choice)
        worker = await self._planted()
        ahead = await self._foresight.take(request, led_to(parent, offer, choice))
        learned = await self._waited_for(ahead.follow() if ahead else worker.stream(request, 0, self._owner))
        assert isinstance(learned, Learned)
        self._in_memory[learned.weights] = worker
        return learned

    def made(self, node: str) -> Learned | None:
        """What was learned ahead for a node that may come to be, where that is done. What leads elsewhere gives way."""
        for _, event, worker in self._foresight.whole(node):
            if isinstance(event, Learned) and worker.alive:
                self._foresight.only({node})
                self._in_memory[event.weights] = worker
                return event
        return None

    def drawn(self, node: Node, prompt: str) -> Offered | None:
        """What was drawn ahead of the first offer at a node, where that is done."""
        wanted = self._draw(node, 0, prompt)
        for request, event, _ in self._foresight.whole(node.id):
            if isinstance(event, Offered) and request == wanted:
                return event
        return None

    async def keep(self, node: Node) -> None:
        """Have the weights of a node written that are in the engine's memory alone; made again where they are gone."""
        assert node.parent is not None
        assert node.answered is not None
        assert node.choice is not None
        assert not isinstance(node.choice, Fitted)
        await self._learned(await self._learn(self._tree.nodes[node.parent], node.answered, node.choice, keep=True))
        self._in_memory.pop(node.weights, None)

    async def _learned(self, request: Learn) -> Learned:
        worker = await self._planted()
        learned = await worker.ask(request, owner=self._owner)
        assert isinstance(learned, Learned)
        return learned

    async def learn_ahead(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Work out what a choice would lead to, after everything that somebody waits for. Raises WeightsMissing."""
        request = await self._learn(parent, offer, choice)
        worker = await self._planted()
        learned = await self._foresight.begin(worker, request, led_to(parent, offer, choice))
        assert isinstance(learned, Learned)
        return learned

    def foresee_only(self, nodes: Collection[str]) -> None:
        """Give up what was begun ahead and leads to none of these nodes."""
        self._foresight.only(nodes)

    async def draw_ahead(self, node: Node, prompt: str) -> None:
        """Draw what would be offered first at a node that may come to be. Raises WeightsMissing, or Invalid for a
        prompt that does not fit."""
        worker = await self._planted()
        await self._foresight.begin(worker, self._draw(node, 0, prompt), node.id)

    async def draw(self, node: Node, number: int, prompt: str, grown: Grown) -> Offered:
        """The options of an offer at a node, or what was drawn of them ahead. Raises as `draw_ahead` does."""
        request = self._draw(node, number, prompt)
        worker = await self._planted()
        ahead = await self._foresight.take(request, node.id)
        made = ahead is not None and ahead.finished  # all of it is there, and grows at once

        def told(event: Event) -> None:
            if isinstance(event, Delta) and not made:
                for index, more in event.texts.items():
                    grown(index, more)

        after_learning = number == 0 and node.learned
        events = ahead.follow() if ahead else worker.stream(request, 0, self._owner, after_learning)
        offered = await self._waited_for(events, told)
        assert isinstance(offered, Offered)
        if made:
            for index, option in enumerate(offered.options):
                grown(index, option.text)
        return offered

    async def _waited_for(
        self, events: AsyncGenerator[Event, None], told: Callable[[Event], None] = lambda event: None
    ) -> Event:
        """The result of what a person waits for; its place in the queue is told while it has one."""
        waiting = False
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Queued):
                        self._queued(event.place)
                    elif waiting:
                        self._queued(None)
                    waiting = isinstance(event, Queued)
                    told(event)
        finally:
            if waiting:
                self._queued(None)
        return event

    async def chat(self, request: Chat, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation. Raises WeightsMissing before anything is said."""
        worker = await self._planted()
        async with aclosing(worker.stream(request, owner=owner)) as events:
            async for event in events:
                yield event

    async def close(self) -> None:
        """Give up what was begun ahead."""
        await self._foresight.close()

    async def offer(
        self,
        text: str,
        weights: str,
        sampling: Sampling,
        size: int,
        seed: int,
        priority: int = 0,
    ) -> Offered:
        """Plain draws of answers to a prompt from any weights. Raises as `draw_ahead` does."""
        worker = await self._planted()
        request = Offer(
            weights=weights, prompt=self.prompt(text), sampling=sampling, group_size=size, seed=seed,
            context_length=self._config.context_length,
        )  # fmt: skip
        offered = await worker.ask(request, priority, self._owner)
        assert isinstance(offered, Offered)
        return offered

    def _draw(self, node: Node, number: int, prompt: str) -> Offer:
        """The request for the options at a node, built from the log alone."""
        config = self._config
        return Offer(
            weights=node.weights, prompt=self.prompt(prompt), sampling=config.part(Sampling),
            group_size=config.group_size, openings=config.openings if node.choice == "none" else 1,
            seed=offer_seed(config, node, number, prompt), context_length=config.context_length,
        )  # fmt: skip

    async def _learn(self, parent: Node, offer: str, choice: Choice, keep: bool = False) -> Learn:
        """The request for one choice, rebuilt from the log alone: asked twice, it has the same name twice."""
        earlier = replayed(self._config, self._tree.path(parent.id))
        found = await self._store.read(
            rows.get_offers, [offer, *(node.answered for node, _ in earlier if node.answered)]
        )
        replay = []
        for node, number in earlier:
            if isinstance(node.choice, Fitted):
                replay += await asyncio.to_thread(self._logs.read, node.choice.fitted, [number])
            elif node.choice is not None:
                replay.append(self._lesson(found[node.answered or ""], node.choice))
        return Learn(
            weights=parent.weights, lesson=self._lesson(found[offer], choice), replay=tuple(replay),
            learning=self._config.part(Learning), context_length=self._config.context_length, keep=keep,
        )  # fmt: skip

    async def lessons(self, nodes: Sequence[Node]) -> list[Lesson]:
        """All that was said at nodes, in their order; of one that was fitted to a log, the whole log."""
        found = await self._store.read(rows.get_offers, [node.answered for node in nodes if node.answered])

        def read() -> list[Lesson]:
            lessons: list[Lesson] = []
            for node in nodes:
                if isinstance(node.choice, Fitted):
                    lessons += self._logs.read(node.choice.fitted, range(node.choice.lessons))
                elif node.learned and node.choice is not None:
                    lessons.append(self._lesson(found[node.answered or ""], node.choice))
            return lessons

        return await asyncio.to_thread(read)  # hundreds of choices take longer than the event loop may be held

    async def fit(self, parent: Node, fitted: Fitted, told: Callable[[Progress], None], priority: int = 2) -> Learned:
        """Learn from a whole log at a node, after everybody who waits for an answer. Raises WeightsMissing."""
        worker = await self._planted()
        request = Fit(
            weights=parent.weights, log=fitted.fitted, path=str(self._logs.path(fitted.fitted)),
            learning=self._config.part(Learning), epochs=fitted.epochs, seed=self._config.seed,
            context_length=self._config.context_length,
        )  # fmt: skip
        async with aclosing(worker.stream(request, priority)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    told(event)
        assert isinstance(event, Learned)
        return event

    async def assess(self, weights: str, nodes: Sequence[Node]) -> Assessed:
        """With how many of the choices at nodes some weights agree; nobody waits for it."""
        lessons = await self.lessons(nodes)
        worker = await self._planted()
        request = Assess(
            weights=weights, lessons=tuple(lessons), learning=self._config.part(Learning),
            context_length=self._config.context_length,
        )  # fmt: skip
        assessed = await worker.ask(request, 1, self._owner)
        assert isinstance(assessed, Assessed)
        return assessed

    def _lesson(self, offer: dict[str, Any], choice: Choice) -> Lesson:
        options = options_from(offer)
        assert options is not None
        return Lesson(
            prompt=self.prompt(offer["prompt"]),
            options=options,
            choice=choice,
            temperature=self._config.temperature,
        )

    def prompt(self, text: str) -> Prompt:
        """A prompt as the session's options have it put to the model."""
        config = self._config
        return Prompt(
            text=config.prompt_prefix + text + config.prompt_suffix, system=config.system_prompt,
            template=config.chat_template, opening="<think>\n" if config.append_think else "",
            template_kwargs=thinking_kwargs(config),
        )  # fmt: skip

    def has(self, weights: str) -> bool:
        """Whether weights are on disk, as far as can be seen without reading them."""
        return weights in self._weights

    def drop_if_damaged(self, weights: str) -> bool:
        """Discard weights on disk whose adapter is torn or holds values that are no numbers. Returns whether it did.

        Reads the whole file: for a thread.
        """
        if all_finite(self._weights.path(weights) / "adapter_model.safetensors"):
            return False
        self._weights.discard(weights)
        return True

    def at_hand(self, weights: str) -> bool:
        """Whether weights are on disk, or were made by an engine that still runs and has not written them yet."""
        worker = self._in_memory.get(weights)
        return (worker is not None and worker.alive) or weights in self._weights

    @property
    def unwritten(self) -> list[Node]:
        """The nodes whose weights are in the engine's memory alone."""
        nodes = (self._tree.with_weights(weights) for weights in self._in_memory if weights not in self._weights)
        return [node for node in nodes if node is not None]

    async def regrow(self, missing: WeightsMissing) -> None:
        """Work out weights that are not on disk from the log of choices, from the nearest that are."""
        wanted = self._tree.with_weights(missing.weights)
        if wanted is None:
            raise missing
        self.welcome()
        try:
            for _ in self._tree.nodes:
                chain = await asyncio.to_thread(self._chain, wanted)
                try:
                    for done, node in enumerate(chain):
                        message = f"Recomputing step {node.step}: {done + 1} of {len(chain)}"
                        self._loading(Progress(stage="regrowing", fraction=done / len(chain), message=message))
                        await self._make_again(node)
                    return
                except WeightsMissing as also:  # what looked whole was not, and has been put out of sight
                    missing = also
            raise missing
        finally:
            self._loading(None)

    def _chain(self, node: Node) -> list[Node]:
        """The nodes whose weights must be made for this one's, in order; always at least itself."""
        chain = [node]
        while chain[-1].parent is not None:
            maker = self._tree.with_weights(self._tree.nodes[chain[-1].parent].weights)
            if maker is None or maker.weights in self._weights:
                break
            chain.append(maker)
        return chain[::-1]

    async def _make_again(self, node: Node) -> None:
        if node.parent is None:
            self._planted_on = None
            made = await self.plant()
        else:
            parent = self._tree.nodes[node.parent]
            if isinstance(node.choice, Fitted):
                learned = await self.fit(parent, node.choice, self._loading, priority=0)  # somebody waits
            else:
                assert node.answered is not None
                assert node.choice is not None
                learned = await self._learned(await self._learn(parent, node.answered, node.choice, keep=True))
            made = learned.weights
            if node.metrics and made == node.weights and learned.metrics.drift != node.metrics.drift:
                self._notice(
                    f"Step {node.step} was recomputed and differs slightly on this device: weight change "
                    f"{learned.metrics.drift:.6%} instead of {node.metrics.drift:.6%}."
                )
        if made != node.weights:
            raise Conflict(
                f"The weights of step {node.step} are not on disk, and recomputing them gives different ones.",
                code="weights_changed",
                next_step="Go to a step whose weights are on disk. You can branch from there.",
            )
