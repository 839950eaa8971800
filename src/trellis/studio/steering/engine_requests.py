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
    AdapterCreated,
    Assess,
    Assessed,
    Chat,
    Choice,
    CreateAdapter,
    Delta,
    Event,
    Learn,
    Learned,
    Lesson,
    Offer,
    Offered,
    Progress,
    Prompt,
    QueuePosition,
    Retrain,
)
from ...params import Adapter, Learning, ModelOptions, Sampling, SessionConfig
from ...safetensors_files import all_finite
from ...store import steering as rows
from ...store.store import Store
from ...workers.worker import UNLOADED, Worker
from ..models.models import Models
from ..models.template_options import template_error, thinking_kwargs
from .choice_logs import ChoiceLogs
from .foresight import Foresight
from .offer import parse_options
from .tree import Node, Retraining, Tree, child_id_for_choice, choices_to_replay, offer_seed

OnOptionText = Callable[[int, str], None]
"""Told of text that an option grew by: its index, the text."""


class EngineRequests:
    """A session's side of the wire. `loading` is told how a load comes along, and None when it has ended; `queued`
    the place in the engine's queue in the same way."""

    def __init__(
        self,
        store: Store,
        models: Models,
        weights: Blobs,
        logs: ChoiceLogs,
        config: SessionConfig,
        tree: Tree,
        on_load_progress: Callable[[Progress | None], None],
        on_notice: Callable[[str], None],
        on_queue_position: Callable[[int | None], None],
    ) -> None:
        self._store = store
        self._models = models
        self._weights = weights
        self._logs = logs
        self._config = config
        self._model_options = config.extract(ModelOptions)
        self._tree = tree
        self._on_load_progress = on_load_progress
        self._on_notice = on_notice
        self._on_queue_position = on_queue_position
        self._owner = tree.root.session
        self._verified_on: Worker | None = None
        self.unadapted_layers: tuple[str, ...] = ()
        """Layers that cannot get an adapter, each with the reason, as the engine said when it was last asked."""
        self._unsaved_weights: dict[str, Worker] = {}
        """Weights that were learned and not written yet, and who has them."""
        self._foresight = Foresight(self._owner)
        self._unload_count = models.unload_count(self._model_options)

    def allow_loading(self) -> None:
        """A person wants something: a model that was unloaded by hand may be loaded again."""
        self._unload_count = self._models.unload_count(self._model_options)

    @property
    def was_unloaded_by_user(self) -> bool:
        """Whether its model was unloaded by hand since a person last wanted something, and is not back."""
        is_unloaded = self._models.state(self._model_options) != "loaded"
        return is_unloaded and self._models.unload_count(self._model_options) != self._unload_count

    async def load_engine(self) -> Worker:
        """The loaded engine, loading it if need be."""
        if self._models.state(self._model_options) == "loaded":
            return await self._models.engine(self._model_options, lambda progress: None)
        if self.was_unloaded_by_user:
            raise UNLOADED
        self._on_load_progress(Progress(stage="connecting", fraction=0.0, message="Starting"))
        try:
            return await self._models.engine(self._model_options, self._on_load_progress)
        finally:
            self._on_load_progress(None)

    async def _verified_engine(self) -> Worker:
        """The engine, after making sure that it holds the base model that this session grew on."""
        worker = await self.load_engine()
        if self._verified_on is not worker:
            initial_weights = await self.init_adapter()
            if initial_weights != self._tree.root.weights:
                raise Conflict(
                    f"The files of the model “{self._config.model}” are not the ones this session was grown on.",
                    code="model_changed",
                    next_step="Put the original files back (config.json and the weights) and resume, or start a new "
                    "session.",
                )
            self._verified_on = worker
        return worker

    @property
    def is_model_verified(self) -> bool:
        """Whether the engine at hand is known to hold the base model that this session grew on."""
        return self._verified_on is not None and self._verified_on.is_alive

    async def verify_model(self) -> None:
        """Load the model and compare it with the one that this session grew on. Raises Conflict for another one."""
        await self._verified_engine()

    async def init_adapter(self) -> str:
        """Make the weights that the session starts from, if they are not there. Returns their id."""
        worker = await self.load_engine()
        self._require_usable_template()
        root = self._tree.root.weights
        request = CreateAdapter(adapter=self._config.extract(Adapter), seed=self._config.seed, root=root)
        planted = await worker.ask(request, owner=self._owner)
        assert isinstance(planted, AdapterCreated)
        self.unadapted_layers = planted.left_out
        return planted.weights

    def _require_usable_template(self) -> None:
        """Raises Invalid where the model's chat template cannot do what the session's options ask of it."""
        loaded = self._models.loaded_info(self._model_options)
        if loaded and (problem := template_error(self._config, loaded)):
            raise problem

    async def learn(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Learn from what was said of an offer at a node, or take what was learned ahead. Raises WeightsMissing.

        The weights are then in the engine's memory; `keep` has them written.
        """
        request = await self._learn_request(parent, offer, choice)
        worker = await self._verified_engine()
        ahead = await self._foresight.claim(request, child_id_for_choice(parent, offer, choice))
        learned = await self._wait_for_result(ahead.follow() if ahead else worker.stream(request, 0, self._owner))
        assert isinstance(learned, Learned)
        self._unsaved_weights[learned.weights] = worker
        return learned

    def learned_ahead(self, node: str) -> Learned | None:
        """What was learned ahead for a node that may come to be, where that is done. What leads elsewhere gives way."""
        for _, event, worker in self._foresight.finished_results(node):
            if isinstance(event, Learned) and worker.is_alive:
                self._foresight.cancel_except({node})
                self._unsaved_weights[event.weights] = worker
                return event
        return None

    def generated_ahead(self, node: Node, prompt: str) -> Offered | None:
        """What was drawn ahead of the first offer at a node, where that is done."""
        wanted_request = self._offer_request(node, 0, prompt)
        for request, event, _ in self._foresight.finished_results(node.id):
            if isinstance(event, Offered) and request == wanted_request:
                return event
        return None

    async def save_weights(self, node: Node) -> None:
        """Have the weights of a node written that are in the engine's memory alone; made again where they are gone."""
        assert node.parent is not None
        assert node.answered is not None
        assert node.choice is not None
        assert not isinstance(node.choice, Retraining)
        await self._ask_to_learn(
            await self._learn_request(self._tree.nodes[node.parent], node.answered, node.choice, keep=True)
        )
        self._unsaved_weights.pop(node.weights, None)

    async def _ask_to_learn(self, request: Learn) -> Learned:
        worker = await self._verified_engine()
        learned = await worker.ask(request, owner=self._owner)
        assert isinstance(learned, Learned)
        return learned

    async def learn_ahead(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Work out what a choice would lead to, after everything that somebody waits for. Raises WeightsMissing."""
        request = await self._learn_request(parent, offer, choice)
        worker = await self._verified_engine()
        learned = await self._foresight.begin(worker, request, child_id_for_choice(parent, offer, choice))
        assert isinstance(learned, Learned)
        return learned

    def cancel_foresight_except(self, nodes: Collection[str]) -> None:
        """Give up what was begun ahead and leads to none of these nodes."""
        self._foresight.cancel_except(nodes)

    async def generate_ahead(self, node: Node, prompt: str) -> None:
        """Draw what would be offered first at a node that may come to be. Raises WeightsMissing, or Invalid for a
        prompt that does not fit."""
        worker = await self._verified_engine()
        await self._foresight.begin(worker, self._offer_request(node, 0, prompt), node.id)

    async def generate_options(self, node: Node, number: int, prompt: str, on_text: OnOptionText) -> Offered:
        """The options of an offer at a node, or what was drawn of them ahead. Raises as `draw_ahead` does."""
        request = self._offer_request(node, number, prompt)
        worker = await self._verified_engine()
        ahead = await self._foresight.claim(request, node.id)
        is_finished = ahead is not None and ahead.is_finished  # all of it is there, and grows at once

        def on_event(event: Event) -> None:
            if isinstance(event, Delta) and not is_finished:
                for index, delta in event.texts.items():
                    on_text(index, delta)

        after_learning = number == 0 and node.has_learned
        events = ahead.follow() if ahead else worker.stream(request, 0, self._owner, after_learning)
        offered = await self._wait_for_result(events, on_event)
        assert isinstance(offered, Offered)
        if is_finished:
            for index, option in enumerate(offered.options):
                on_text(index, option.text)
        return offered

    async def _wait_for_result(
        self, events: AsyncGenerator[Event, None], on_event: Callable[[Event], None] = lambda event: None
    ) -> Event:
        """The result of what a person waits for; its place in the queue is told while it has one."""
        is_queued = False
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, QueuePosition):
                        self._on_queue_position(event.place)
                    elif is_queued:
                        self._on_queue_position(None)
                    is_queued = isinstance(event, QueuePosition)
                    on_event(event)
        finally:
            if is_queued:
                self._on_queue_position(None)
        return event

    async def chat(self, request: Chat, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation. Raises WeightsMissing before anything is said."""
        worker = await self._verified_engine()
        async with aclosing(worker.stream(request, owner=owner)) as events:
            async for event in events:
                yield event

    async def close(self) -> None:
        """Give up what was begun ahead."""
        await self._foresight.close()

    async def generate(
        self,
        text: str,
        weights: str,
        sampling: Sampling,
        count: int,
        seed: int,
        priority: int = 0,
    ) -> Offered:
        """Plain draws of answers to a prompt from any weights. Raises as `draw_ahead` does."""
        worker = await self._verified_engine()
        request = Offer(
            weights=weights, prompt=self.make_prompt(text), sampling=sampling, group_size=count, seed=seed,
            context_length=self._config.context_length,
        )  # fmt: skip
        offered = await worker.ask(request, priority, self._owner)
        assert isinstance(offered, Offered)
        return offered

    def _offer_request(self, node: Node, number: int, prompt: str) -> Offer:
        """The request for the options at a node, built from the log alone."""
        config = self._config
        return Offer(
            weights=node.weights, prompt=self.make_prompt(prompt), sampling=config.extract(Sampling),
            group_size=config.group_size, openings=config.openings if node.choice == "none" else 1,
            seed=offer_seed(config, node, number, prompt), context_length=config.context_length,
        )  # fmt: skip

    async def _learn_request(self, parent: Node, offer: str, choice: Choice, keep: bool = False) -> Learn:
        """The request for one choice, rebuilt from the log alone: asked twice, it has the same name twice."""
        replay_choices = choices_to_replay(self._config, self._tree.path(parent.id))
        offer_rows = await self._store.read(
            rows.get_offers, [offer, *(node.answered for node, _ in replay_choices if node.answered)]
        )
        replay = []
        for node, number in replay_choices:
            if isinstance(node.choice, Retraining):
                replay += await asyncio.to_thread(self._logs.read, node.choice.fitted, [number])
            elif node.choice is not None:
                replay.append(self._lesson(offer_rows[node.answered or ""], node.choice))
        return Learn(
            weights=parent.weights, lesson=self._lesson(offer_rows[offer], choice), replay=tuple(replay),
            learning=self._config.extract(Learning), context_length=self._config.context_length, keep=keep,
        )  # fmt: skip

    async def lessons(self, nodes: Sequence[Node]) -> list[Lesson]:
        """All that was said at nodes, in their order; of one that was fitted to a log, the whole log."""
        offer_rows = await self._store.read(rows.get_offers, [node.answered for node in nodes if node.answered])

        def read() -> list[Lesson]:
            lessons: list[Lesson] = []
            for node in nodes:
                if isinstance(node.choice, Retraining):
                    lessons += self._logs.read(node.choice.fitted, range(node.choice.lessons))
                elif node.has_learned and node.choice is not None:
                    lessons.append(self._lesson(offer_rows[node.answered or ""], node.choice))
            return lessons

        return await asyncio.to_thread(read)  # hundreds of choices take longer than the event loop may be held

    async def retrain(
        self, parent: Node, retraining: Retraining, on_progress: Callable[[Progress], None], priority: int = 2
    ) -> Learned:
        """Learn from a whole log at a node, after everybody who waits for an answer. Raises WeightsMissing."""
        worker = await self._verified_engine()
        request = Retrain(
            weights=parent.weights, log=retraining.fitted, path=str(self._logs.path(retraining.fitted)),
            learning=self._config.extract(Learning), epochs=retraining.epochs, seed=self._config.seed,
            context_length=self._config.context_length,
        )  # fmt: skip
        async with aclosing(worker.stream(request, priority)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
        assert isinstance(event, Learned)
        return event

    async def assess(self, weights: str, nodes: Sequence[Node]) -> Assessed:
        """With how many of the choices at nodes some weights agree; nobody waits for it."""
        lessons = await self.lessons(nodes)
        worker = await self._verified_engine()
        request = Assess(
            weights=weights, lessons=tuple(lessons), learning=self._config.extract(Learning),
            context_length=self._config.context_length,
        )  # fmt: skip
        assessed = await worker.ask(request, 1, self._owner)
        assert isinstance(assessed, Assessed)
        return assessed

    def _lesson(self, offer: dict[str, Any], choice: Choice) -> Lesson:
        options = parse_options(offer)
        assert options is not None
        return Lesson(
            prompt=self.make_prompt(offer["prompt"]),
            options=options,
            choice=choice,
            temperature=self._config.temperature,
        )

    def make_prompt(self, text: str) -> Prompt:
        """A prompt as the session's options have it put to the model."""
        config = self._config
        return Prompt(
            text=config.prompt_prefix + text + config.prompt_suffix, system=config.system_prompt,
            template=config.chat_template, opening="<think>\n" if config.append_think else "",
            template_kwargs=thinking_kwargs(config),
        )  # fmt: skip

    def is_on_disk(self, weights: str) -> bool:
        """Whether weights are on disk, as far as can be seen without reading them."""
        return weights in self._weights

    def discard_if_damaged(self, weights: str) -> bool:
        """Discard weights on disk whose adapter is torn or holds values that are no numbers. Returns whether it did.

        Reads the whole file: for a thread.
        """
        if all_finite(self._weights.path(weights) / "adapter_model.safetensors"):
            return False
        self._weights.discard(weights)
        return True

    def is_available(self, weights: str) -> bool:
        """Whether weights are on disk, or were made by an engine that still runs and has not written them yet."""
        worker = self._unsaved_weights.get(weights)
        return (worker is not None and worker.is_alive) or weights in self._weights

    @property
    def unsaved_nodes(self) -> list[Node]:
        """The nodes whose weights are in the engine's memory alone."""
        nodes = (
            self._tree.first_with_weights(weights) for weights in self._unsaved_weights if weights not in self._weights
        )
        return [node for node in nodes if node is not None]

    async def recompute(self, missing: WeightsMissing) -> None:
        """Work out weights that are not on disk from the log of choices, from the nearest that are."""
        wanted_node = self._tree.first_with_weights(missing.weights)
        if wanted_node is None:
            raise missing
        self.allow_loading()
        try:
            for _ in self._tree.nodes:
                chain = await asyncio.to_thread(self._nodes_to_recompute, wanted_node)
                try:
                    for finished, node in enumerate(chain):
                        message = f"Working out step {node.step} again: {finished + 1} of {len(chain)}"
                        self._on_load_progress(
                            Progress(stage="regrowing", fraction=finished / len(chain), message=message)
                        )
                        await self._recompute_node(node)
                    return
                except WeightsMissing as also:  # what looked whole was not, and has been put out of sight
                    missing = also
            raise missing
        finally:
            self._on_load_progress(None)

    def _nodes_to_recompute(self, node: Node) -> list[Node]:
        """The nodes whose weights must be made for this one's, in order; always at least itself."""
        chain = [node]
        while chain[-1].parent is not None:
            parent_node = self._tree.first_with_weights(self._tree.nodes[chain[-1].parent].weights)
            if parent_node is None or parent_node.weights in self._weights:
                break
            chain.append(parent_node)
        return chain[::-1]

    async def _recompute_node(self, node: Node) -> None:
        if node.parent is None:
            self._verified_on = None
            recomputed_weights = await self.init_adapter()
        else:
            parent = self._tree.nodes[node.parent]
            if isinstance(node.choice, Retraining):
                learned = await self.retrain(parent, node.choice, self._on_load_progress, priority=0)  # somebody waits
            else:
                assert node.answered is not None
                assert node.choice is not None
                learned = await self._ask_to_learn(
                    await self._learn_request(parent, node.answered, node.choice, keep=True)
                )
            recomputed_weights = learned.weights
            if node.metrics and recomputed_weights == node.weights and learned.metrics.drift != node.metrics.drift:
                self._on_notice(
                    f"Step {node.step} was worked out again and came out slightly different on this device: drift "
                    f"{learned.metrics.drift:.6%} instead of {node.metrics.drift:.6%}."
                )
        if recomputed_weights != node.weights:
            raise Conflict(
                f"The weights of step {node.step} are not on disk, and the log of choices leads to others.",
                code="weights_changed",
                next_step="Go to a step whose weights are on disk; a new branch can be grown from there.",
            )
