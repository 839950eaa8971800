"""Work done while a person reads the options: save weights, compute metrics, foresee likely choices."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from ...errors import EngineDied, EngineStopped, TrellisError, WeightsMissing
from ...options import Sampling
from ...store import steering as rows
from ...store.store import Store
from ..models import Models
from ..tasks import AsyncWork, run_concurrently
from .engine_requests import EngineRequests
from .likely_choices import LikelyChoice, likely_choices
from .retention import RetainedWeights
from .state import SessionState
from .transitions import Transitions
from .tree import Node, Retraining, child_id_for_choice

log = logging.getLogger(__name__)

ASSESSED_CHOICES = 10
"""Number of last choices of a branch that the agreement metric looks at."""

BACKGROUND_DELAY_SECONDS = 0.12
"""Seconds after something was shown in which nothing is begun that nobody waits for: a browser on the same computer
has its processor to draw it."""

PRIORITY_FORESIGHT_STEPS = 4
"""Number of likely choices that are foreseen before metrics are computed."""

CONTROL_SAMPLING = Sampling(temperature=0.0, top_p=1.0, min_p=0.0, max_new_tokens=96)
"""Greedy, so that only the weights make a difference to the control answer."""

ForesightStep = tuple[LikelyChoice, bool]
"""A likely choice, and whether the options that would follow it are generated as well."""


class BackgroundWork:
    """Work that nobody is waiting for. A failure leaves the session as it was."""

    def __init__(
        self,
        store: Store,
        models: Models,
        engine: EngineRequests,
        retained_weights: RetainedWeights,
        state: SessionState,
        transitions: Transitions,
        is_foresight_enabled: Callable[[], bool],
    ) -> None:
        self._store = store
        self._models = models
        self._engine = engine
        self._retained_weights = retained_weights
        self._state = state
        self._transitions = transitions
        self._is_foresight_enabled = is_foresight_enabled
        self._failed_assessments: set[str] = set()
        self._finished_foresight: set[ForesightStep] = set()
        self._foresight_offer_id = ""

    def next_works(self) -> list[AsyncWork]:
        """Return the pieces of work to do now, the most useful first."""
        works: list[AsyncWork] = []
        if self._engine.was_unloaded_by_user:
            return works
        works += [partial(self._save_weights, node) for node in self._engine.unsaved_nodes]
        if self._state.config.control_prompt:
            control_nodes = {node.id: node for node in (self._state.tree.root, self._state.tree.head)}.values()
            works += [partial(self._answer_control_prompt, node) for node in control_nodes if node.control is None]
        foresight_works = [partial(self._foresee, self._state.tree.head, step) for step in self.foresight_steps()]
        return [
            *works,
            *foresight_works[:PRIORITY_FORESIGHT_STEPS],
            *([self._assess] if self._nodes_to_assess() else []),
            *foresight_works[PRIORITY_FORESIGHT_STEPS:],
        ]

    async def run(self) -> None:
        """Run the pieces concurrently, as far as the engine can."""
        await asyncio.sleep(BACKGROUND_DELAY_SECONDS)
        await run_concurrently(self.next_works(), self._models.concurrency(self._state.model_options))

    def cancel_unlikely_foresight(self) -> None:
        """Cancel foresight for choices that are no longer likely."""
        if self._state.offer and self.foresight_steps():
            self._engine.cancel_foresight_except(
                {
                    child_id_for_choice(self._state.tree.head, self._state.offer.id, choice)
                    for choice in self.likely_choices()
                }
            )

    async def _save_weights(self, node: Node) -> None:
        """Save weights that are only in the engine's memory."""
        await self._engine.save_weights(node)
        await self._retained_weights.prune()

    async def _answer_control_prompt(self, node: Node) -> None:
        """Answer the control prompt at a node: the head, and once the root."""
        try:
            offered = await self._engine.generate(
                self._state.config.control_prompt, node.weights, CONTROL_SAMPLING, 1, 0, priority=1
            )
            answer = offered.options[0].text
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a control prompt that cannot be answered must not stop the session
            answer = error.message
        async with self._state.lock:
            await self._store.write(rows.set_control, node.id, answer)
            self._state.tree.update(node.id, control=answer)
            self._state.publish("control", {"node": node.id, "answer": answer})

    def _nodes_to_assess(self) -> list[Node]:
        """Return the last choices of the branch, or nothing if the head has been assessed."""
        head = self._state.tree.head
        if head.metrics is None or head.metrics.agreed is not None or head.id in self._failed_assessments:
            return []
        chosen_nodes = [
            node
            for node in self._state.tree.path(head.id)
            if node.has_learned and not isinstance(node.choice, Retraining)
        ]
        return chosen_nodes[-ASSESSED_CHOICES:]

    async def _assess(self) -> None:
        """Store with how many of the last choices the head's weights agree."""
        node, nodes = self._state.tree.head, self._nodes_to_assess()
        assert node.metrics is not None
        try:
            assessed = await self._engine.assess(node.weights, nodes)
        except (EngineDied, EngineStopped, WeightsMissing):
            raise
        except TrellisError as error:  # a metric that cannot be computed must not stop the session
            log.warning("session %s: could not assess %s: %s", self._state.id, node.id, error.message)
            self._failed_assessments.add(node.id)
            return
        async with self._state.lock:
            metrics = node.metrics.model_copy(update={"agreed": assessed.agreed, "agreed_of": assessed.of})
            await self._store.write(rows.set_metrics, node.id, metrics.model_dump())
            self._state.tree.update(node.id, metrics=metrics)
            self._state.publish("assessed", {"node": node.id, "agreed": assessed.agreed, "of": assessed.of})

    def foresight_steps(self) -> list[ForesightStep]:
        """Return the next foresight steps, while somebody watches.

        The likeliest one to its end, then the weights of all others: whoever chooses one of these has the first words
        at once, and sees the rest being drawn.
        """
        if not (
            self._state.watchers
            and self._is_foresight_enabled()
            and self._state.offer
            and self._models.state(self._state.model_options) == "loaded"
        ):
            return []
        if self._foresight_offer_id != self._state.offer.id:
            self._foresight_offer_id, self._finished_foresight = self._state.offer.id, set()
        first, *others = self.likely_choices()
        order = [(first, True), *((choice, with_options) for with_options in (False, True) for choice in others)]
        return [step for step in order if step not in self._finished_foresight]

    def likely_choices(self) -> list[LikelyChoice]:
        assert self._state.offer is not None
        earlier_choices = [node.choice for node in self._state.tree.path(self._state.tree.head_id) if node.answered]
        return likely_choices(earlier_choices, self._state.offer.options or ())

    async def _foresee(self, head: Node, step: ForesightStep) -> None:
        """Compute the weights, and perhaps the options, that a choice would lead to."""
        offer, (choice, with_options) = self._state.offer, step
        if offer is None or not self._state.watchers:
            return
        try:
            learned = await self._engine.learn_ahead(head, offer.id, choice) if choice != "skip" else None
            child = self._transitions.make_child(head, offer.id, choice, learned)
            if with_options and child.id not in self._state.tree.nodes and self._state.prompts is not None:
                prompt = await asyncio.to_thread(self._state.prompts.at, child.position)
                await self._engine.generate_ahead(child, prompt)
        except TrellisError as error:  # foresight must not stop the session
            log.info("session %s: could not foresee %s: %s", self._state.id, choice, error.message)
        self._finished_foresight.add(step)
