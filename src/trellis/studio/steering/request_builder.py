"""Build the engine requests of one session from its log alone: built twice, a request makes the same id."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ...messages import Choice, Learn, Lesson, Offer, Prompt, Retrain
from ...options import Learning, Sampling, SessionConfig
from ...store import steering as rows
from ...store.store import Store
from ..models import thinking_kwargs
from .choice_logs import ChoiceLogs
from .offer import parse_options
from .tree import Node, Retraining, Tree, choices_to_replay, offer_seed


class RequestBuilder:
    """Builds prompts, lessons and requests. It knows neither the engine nor the current offer."""

    def __init__(self, store: Store, logs: ChoiceLogs, config: SessionConfig, tree: Tree) -> None:
        self._store = store
        self._logs = logs
        self._config = config
        self._tree = tree

    def offer(self, node: Node, number: int, prompt: str) -> Offer:
        """Return the request for the options at a node."""
        config = self._config
        return Offer(
            weights=node.weights, prompt=self.prompt(prompt), sampling=config.extract(Sampling),
            group_size=config.group_size, openings=config.openings if node.choice == "none" else 1,
            seed=offer_seed(config, node, number, prompt), context_length=config.context_length,
        )  # fmt: skip

    async def learn(self, parent: Node, offer: str, choice: Choice, keep: bool = False) -> Learn:
        """Return the request to learn from a choice, with replayed earlier ones."""
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

    def fit(self, parent: Node, retraining: Retraining) -> Retrain:
        """Return the request to train on a whole log from a node."""
        return Retrain(
            weights=parent.weights, log=retraining.fitted, path=str(self._logs.path(retraining.fitted)),
            learning=self._config.extract(Learning), epochs=retraining.epochs, seed=self._config.seed,
            context_length=self._config.context_length,
        )  # fmt: skip

    async def lessons(self, nodes: Sequence[Node]) -> list[Lesson]:
        """Return the lessons of nodes in order; for a retrained node, its whole log."""
        offer_rows = await self._store.read(rows.get_offers, [node.answered for node in nodes if node.answered])

        def read() -> list[Lesson]:
            lessons: list[Lesson] = []
            for node in nodes:
                if isinstance(node.choice, Retraining):
                    lessons += self._logs.read(node.choice.fitted, range(node.choice.lessons))
                elif node.has_learned and node.choice is not None:
                    lessons.append(self._lesson(offer_rows[node.answered or ""], node.choice))
            return lessons

        return await asyncio.to_thread(read)  # hundreds of choices would block the event loop

    def _lesson(self, offer: dict[str, Any], choice: Choice) -> Lesson:
        options = parse_options(offer)
        assert options is not None
        return Lesson(
            prompt=self.prompt(offer["prompt"]), options=options, choice=choice, temperature=self._config.temperature
        )

    def prompt(self, text: str) -> Prompt:
        """Return a prompt as the session's options format it."""
        config = self._config
        return Prompt(
            text=config.prompt_prefix + text + config.prompt_suffix, system=config.system_prompt,
            template=config.chat_template, opening="<think>\n" if config.append_think else "",
            template_kwargs=thinking_kwargs(config),
        )  # fmt: skip
