"""Send the requests of one session to its engine, or take results that foresight has computed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing

from ...blobs import Blobs
from ...errors import Conflict
from ...messages import (  # fmt: skip
    AdapterCreated,
    Assess,
    Assessed,
    Chat,
    Choice,
    CreateAdapter,
    Delta,
    Event,
    Learned,
    Offer,
    Offered,
    Progress,
    QueuePosition,
)
from ...options import Adapter, Learning, Sampling
from ...safetensors_files import all_finite
from ...workers.worker import UNLOADED, Worker
from ..models import Models, template_error
from .foresight import Foresight
from .request_builder import RequestBuilder
from .state import SessionState
from .tree import Node, Retraining, child_id_for_choice

OnOptionText = Callable[[int, str], None]
"""Called with new text of an option: its index, the text."""


class EngineRequests:
    """Runs a session's requests on an engine with the base model that the session started from."""

    def __init__(self, models: Models, weights: Blobs, builder: RequestBuilder, state: SessionState) -> None:
        self._models = models
        self._weights = weights
        self._builder = builder
        self._state = state
        self._verified_on: Worker | None = None
        self._unsaved_weights: dict[str, Worker] = {}
        """Learned weights that are not saved yet, each with the engine that holds them."""
        self._foresight = Foresight(state.id)
        self._unload_count = models.unload_count(state.model_options)

    def allow_loading(self) -> None:
        """Allow a model that a person unloaded to be loaded again, since a person wants something."""
        self._unload_count = self._models.unload_count(self._state.model_options)

    @property
    def was_unloaded_by_user(self) -> bool:
        """Whether a person unloaded the model since the last command, and it is still unloaded."""
        is_unloaded = self._models.state(self._state.model_options) != "loaded"
        return is_unloaded and self._models.unload_count(self._state.model_options) != self._unload_count

    async def load_engine(self) -> Worker:
        """Return the engine, loading the model if necessary."""
        if self._models.state(self._state.model_options) == "loaded":
            return await self._models.engine(self._state.model_options, lambda progress: None)
        if self.was_unloaded_by_user:
            raise UNLOADED
        self._state.on_load_progress(Progress(stage="connecting", fraction=0.0, message="Starting the engine"))
        try:
            return await self._models.engine(self._state.model_options, self._state.on_load_progress)
        finally:
            self._state.on_load_progress(None)

    async def _verified_engine(self) -> Worker:
        """Return the engine, verified to hold the base model that this session started from."""
        worker = await self.load_engine()
        if self._verified_on is not worker:
            initial_weights = await self.init_adapter()
            if initial_weights != self._state.tree.root.weights:
                raise Conflict(
                    f"The files of the model “{self._state.config.model}” are not the ones this session was grown on.",
                    code="model_changed",
                    next_step="Restore the original files (config.json and the weights) and try again, or start a new "
                    "session.",
                )
            self._verified_on = worker
        return worker

    @property
    def is_model_verified(self) -> bool:
        """Whether the running engine has been verified to hold this session's base model."""
        return self._verified_on is not None and self._verified_on.is_alive

    async def verify_model(self) -> None:
        """Load the model and verify it. Raise Conflict if it is not this session's base model."""
        await self._verified_engine()

    async def init_adapter(self) -> str:
        """Create the initial adapter if it does not exist. Return the id of its weights."""
        worker = await self.load_engine()
        self._require_usable_template()
        root = self._state.tree.root.weights
        request = CreateAdapter(adapter=self._state.config.extract(Adapter), seed=self._state.config.seed, root=root)
        planted = await worker.ask(request, owner=self._state.id)
        assert isinstance(planted, AdapterCreated)
        self._state.unadapted_layers = planted.left_out
        return planted.weights

    def _require_usable_template(self) -> None:
        """Raise Invalid if the model's chat template cannot do what the session's options need."""
        loaded = self._models.loaded_info(self._state.model_options)
        if loaded and (problem := template_error(self._state.config, loaded)):
            raise problem

    async def learn(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Learn from a choice at a node, or take what foresight has learned. Raise WeightsMissing.

        The weights are then in the engine's memory; `save_weights` writes them to disk.
        """
        request = await self._builder.learn(parent, offer, choice)
        worker = await self._verified_engine()
        ahead = await self._foresight.claim(request, child_id_for_choice(parent, offer, choice))
        learned = await self._wait_for_result(ahead.follow() if ahead else worker.stream(request, 0, self._state.id))
        assert isinstance(learned, Learned)
        self._unsaved_weights[learned.weights] = worker
        return learned

    def learned_ahead(self, node: str) -> Learned | None:
        """Return what foresight has learned for a node, if complete, and cancel foresight for other nodes."""
        for _, event, worker in self._foresight.finished_results(node):
            if isinstance(event, Learned) and worker.is_alive:
                self._foresight.cancel_except({node})
                self._unsaved_weights[event.weights] = worker
                return event
        return None

    def generated_ahead(self, node: Node, prompt: str) -> Offered | None:
        """Return the first offer at a node that foresight has generated, if complete."""
        wanted_request = self._builder.offer(node, 0, prompt)
        for request, event, _ in self._foresight.finished_results(node.id):
            if isinstance(event, Offered) and request == wanted_request:
                return event
        return None

    async def save_weights(self, node: Node) -> None:
        """Save weights of a node that are only in the engine's memory, recomputing them if they are gone."""
        await self.learn_again(node)
        self._unsaved_weights.pop(node.weights, None)

    async def learn_again(self, node: Node) -> Learned:
        """Learn again from the choice that led to a node, and save the weights. Raise WeightsMissing."""
        assert node.parent is not None
        assert node.answered is not None
        assert node.choice is not None
        assert not isinstance(node.choice, Retraining)
        request = await self._builder.learn(self._state.tree.nodes[node.parent], node.answered, node.choice, keep=True)
        worker = await self._verified_engine()
        learned = await worker.ask(request, owner=self._state.id)
        assert isinstance(learned, Learned)
        return learned

    def forget_verification(self) -> None:
        """Verify the model again before the next request."""
        self._verified_on = None

    async def learn_ahead(self, parent: Node, offer: str, choice: Choice) -> Learned:
        """Learn from a choice ahead of time, at low priority. Raise WeightsMissing."""
        request = await self._builder.learn(parent, offer, choice)
        worker = await self._verified_engine()
        learned = await self._foresight.begin(worker, request, child_id_for_choice(parent, offer, choice))
        assert isinstance(learned, Learned)
        return learned

    def cancel_foresight_except(self, nodes: Collection[str]) -> None:
        """Cancel foresight that leads to none of these nodes."""
        self._foresight.cancel_except(nodes)

    async def generate_ahead(self, node: Node, prompt: str) -> None:
        """Draw what would be offered first at a node that may come to be. Raises WeightsMissing, or Invalid for a
        prompt that does not fit."""
        worker = await self._verified_engine()
        await self._foresight.begin(worker, self._builder.offer(node, 0, prompt), node.id)

    async def generate_options(self, node: Node, number: int, prompt: str, on_text: OnOptionText) -> Offered:
        """Generate the options of an offer at a node, or take them from foresight. Raise as `generate_ahead` does."""
        request = self._builder.offer(node, number, prompt)
        worker = await self._verified_engine()
        ahead = await self._foresight.claim(request, node.id)
        is_finished = ahead is not None and ahead.is_finished  # complete: all text is published at once

        def on_event(event: Event) -> None:
            if isinstance(event, Delta) and not is_finished:
                for index, delta in event.texts.items():
                    on_text(index, delta)

        after_learning = number == 0 and node.has_learned
        events = ahead.follow() if ahead else worker.stream(request, 0, self._state.id, after_learning)
        offered = await self._wait_for_result(events, on_event)
        assert isinstance(offered, Offered)
        if is_finished:
            for index, option in enumerate(offered.options):
                on_text(index, option.text)
        return offered

    async def _wait_for_result(
        self, events: AsyncGenerator[Event, None], on_event: Callable[[Event], None] = lambda event: None
    ) -> Event:
        """Return the result of a request that a person waits for, publishing its place in the queue meanwhile."""
        is_queued = False
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, QueuePosition):
                        self._state.on_queue_position(event.place)
                    elif is_queued:
                        self._state.on_queue_position(None)
                    is_queued = isinstance(event, QueuePosition)
                    on_event(event)
        finally:
            if is_queued:
                self._state.on_queue_position(None)
        return event

    async def chat(self, request: Chat, owner: str) -> AsyncGenerator[Event, None]:
        """Answer a conversation. Raise WeightsMissing before the first text."""
        worker = await self._verified_engine()
        async with aclosing(worker.stream(request, owner=owner)) as events:
            async for event in events:
                yield event

    async def close(self) -> None:
        """Cancel all foresight."""
        await self._foresight.close()

    async def generate(
        self, text: str, weights: str, sampling: Sampling, count: int, seed: int, priority: int = 0
    ) -> Offered:
        """Sample answers to a prompt with any weights. Raise as `generate_ahead` does."""
        worker = await self._verified_engine()
        request = Offer(
            weights=weights, prompt=self._builder.prompt(text), sampling=sampling, group_size=count, seed=seed,
            context_length=self._state.config.context_length,
        )  # fmt: skip
        offered = await worker.ask(request, priority, self._state.id)
        assert isinstance(offered, Offered)
        return offered

    async def retrain(
        self, parent: Node, retraining: Retraining, on_progress: Callable[[Progress], None], priority: int = 2
    ) -> Learned:
        """Train on a whole log from a node, at low priority. Raise WeightsMissing."""
        worker = await self._verified_engine()
        request = self._builder.fit(parent, retraining)
        async with aclosing(worker.stream(request, priority)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    on_progress(event)
        assert isinstance(event, Learned)
        return event

    async def assess(self, weights: str, nodes: Sequence[Node]) -> Assessed:
        """Return with how many of the choices at nodes some weights agree."""
        lessons = await self._builder.lessons(nodes)
        worker = await self._verified_engine()
        request = Assess(
            weights=weights, lessons=tuple(lessons), learning=self._state.config.extract(Learning),
            context_length=self._state.config.context_length,
        )  # fmt: skip
        assessed = await worker.ask(request, 1, self._state.id)
        assert isinstance(assessed, Assessed)
        return assessed

    def is_on_disk(self, weights: str) -> bool:
        """Whether the folder of weights is on disk. Its files are not read."""
        return weights in self._weights

    def discard_if_damaged(self, weights: str) -> bool:
        """Discard weights whose adapter file is incomplete or not finite. Return whether it did.

        Reads the whole file: for a thread.
        """
        if all_finite(self._weights.path(weights) / "adapter_model.safetensors"):
            return False
        self._weights.discard(weights)
        return True

    def is_available(self, weights: str) -> bool:
        """Whether weights are on disk, or in the memory of a running engine."""
        worker = self._unsaved_weights.get(weights)
        return (worker is not None and worker.is_alive) or weights in self._weights

    @property
    def unsaved_nodes(self) -> list[Node]:
        """Nodes whose weights are only in the engine's memory."""
        nodes = (
            self._state.tree.first_with_weights(weights)
            for weights in self._unsaved_weights
            if weights not in self._weights
        )
        return [node for node in nodes if node is not None]
