"""What a person can do in a session. A command notes what is wanted, in one short transaction; the work follows."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from typing import Any

from ...errors import shorten
from ...messages import CHOICE, Choice, Learned
from ...store import steering as rows
from ...store.store import Store
from ..tasks import run_to_completion
from .choices import require_valid_choice, with_equal_options
from .engine_requests import EngineRequests
from .missing_work import MissingWork
from .state import SessionState
from .transitions import Transitions
from .tree import Node, child_id, child_id_for_choice, node_row


class Commands:
    """The commands of one session. The same request id twice is one action."""

    def __init__(
        self, store: Store, engine: EngineRequests, state: SessionState, transitions: Transitions, work: MissingWork
    ) -> None:
        self._store = store
        self._engine = engine
        self._state = state
        self._transitions = transitions
        self._work = work

    @run_to_completion
    async def choose(self, offer: str, choice: Choice, request: str) -> None:
        """Learn from a choice. Raise Conflict for an offer that is not the current one, or is still being generated."""
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            shown = self._state.offer
            if shown is None or shown.id != offer:
                raise self._state.conflict(
                    f"These answers are out of date (offer “{shorten(offer)}”).",
                    "stale_offer",
                    "Choose from the current answers.",
                )
            if shown.options is None:
                raise self._state.conflict(
                    "The answers are still being generated.", "offer_not_ready", "Choose when all answers are complete."
                )
            require_valid_choice(choice, len(shown.options))
            known_node = self._state.tree.nodes.get(child_id_for_choice(self._state.tree.head, shown.id, choice))
            if known_node is None:
                choice = with_equal_options(choice, shown.options)
            choice_json = CHOICE.dump_python(choice, mode="json")
            child_node_id = child_id(self._state.tree.head, shown.id, choice_json)
            known_node = known_node or self._state.tree.nodes.get(child_node_id)
            body = {"offer": shown.id, "node": self._state.tree.head_id, "choice": choice_json}
            learned = self._engine.learned_ahead(child_node_id) if known_node is None else None
            if known_node is not None or learned is not None or choice == "skip":
                await self._step_immediately(
                    known_node, choice, learned, self._transitions.intent(request, "choose", body, "done")
                )
                return
            intent = self._transitions.intent(request, "choose", body, "open")
            await self._store.write(rows.replace_intent, intent, self._transitions.failed_request)
            self._transitions.remember_request(intent)
            self._state.intent, self._state.error = intent, None
            self._state.publish("learning", {"offer": shown.id, "choice": choice_json})
            self._work.restart()

    @run_to_completion
    async def skip(self, request: str) -> None:
        """Move on to the next prompt without learning, also while an offer is being generated."""
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            if self._state.offer is None:
                raise self._state.conflict("Nothing to skip yet.", "offer_not_ready", "Wait for the first answers.")
            known_node = self._state.tree.nodes.get(child_id(self._state.tree.head, self._state.offer.id, "skip"))
            body = {"offer": self._state.offer.id, "node": self._state.tree.head_id, "choice": "skip"}
            await self._step_immediately(
                known_node, "skip", None, self._transitions.intent(request, "skip", body, "done")
            )

    @run_to_completion
    async def undo(self, request: str) -> None:
        """Move the head to its parent and show the answered offer again. Nothing is deleted."""
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            target = self._state.tree.undo_target
            if target is None:
                raise self._state.conflict("Nothing to undo.", "nothing_to_undo", "Choose an answer.")
            left_node = self._state.tree.head
            shown = left_node.answered or target.shown  # a retrained node answers no offer
            node_changes = {target.id: {"forward": left_node.id, "shown": shown}}
            await self._transitions.move_head(
                target, shown, node_changes, self._transitions.intent(request, "undo", {"from": left_node.id}, "done")
            )
            self._work.restart()

    @run_to_completion
    async def redo(self, request: str) -> None:
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            target = self._state.tree.redo_target
            if target is None:
                raise self._state.conflict("Nothing to redo.", "nothing_to_redo", "Choose an answer.")
            intent = self._transitions.intent(request, "redo", {"from": self._state.tree.head_id}, "done")
            await self._transitions.move_head(target, target.shown, {}, intent)
            self._work.restart()

    @run_to_completion
    async def go_to(self, node: str, request: str) -> None:
        """Move the head to any node and show its offer again. Raise NotFound."""
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            target = self._state.node(node)
            path = self._state.tree.path(target.id)
            node_changes = {
                upper.id: {"forward": lower.id} for upper, lower in pairwise(path) if upper.forward != lower.id
            }
            intent = self._transitions.intent(request, "goto", {"from": self._state.tree.head_id, "to": node}, "done")
            await self._transitions.move_head(target, target.shown, node_changes, intent)
            self._work.restart()

    @run_to_completion
    async def replace_prompt(self, text: str, request: str) -> None:
        """Replace the current prompt and generate a new offer."""
        async with self._state.lock:
            if await self._transitions.is_known_request(request):
                return
            self._state.require_not_busy()
            self._state.require_initialized(self._state.tree.root)
            body = {"node": self._state.tree.head_id, "text": text}
            await self._transitions.new_offer(text, self._transitions.intent(request, "prompt", body, "done"))
            self._state.intent, self._state.error = None, None
            self._work.restart()

    @run_to_completion
    async def resume(self) -> None:
        """Try again after a failure, or continue after the model was unloaded."""
        async with self._state.lock:
            self._engine.allow_loading()
            self._state.is_resume_requested = True
            if self._state.error:
                self._state.error = None
                self._state.publish("state", self._state.state())
            self._work.wake()

    @run_to_completion
    async def rename(self, name: str) -> None:
        async with self._state.lock:
            self._state.require_open()
            await self._store.write(rows.rename_session, self._state.id, name, time.time())
            self._state.name = name
            self._state.publish("state", self._state.state())

    @run_to_completion
    async def name_node(self, node: str, name: str) -> None:
        """Name a node, or remove its name. Weights of named nodes stay on disk."""
        async with self._state.lock:
            self._state.require_open()
            found = self._state.node(node)
            await self._store.write(rows.set_node_name, found.id, name or None)
            self._state.tree.update(found.id, name=name or None)
            self._state.publish("node_named", {"node": found.id, "name": name})

    async def _step_immediately(
        self, known_node: Node | None, choice: Choice, learned: Learned | None, intent: dict[str, Any]
    ) -> None:
        """A step for which nothing has to be learned any more: a skip, a choice that was made here before, or one that
        was worked out ahead; with the options that follow, where they are there as well."""
        head, offer = self._state.tree.head, self._state.offer
        assert offer is not None
        node_changes = {head.id: {"shown": offer.id}}
        if known_node is not None:
            node_changes[head.id]["forward"] = known_node.id
            await self._transitions.move_head(known_node, known_node.shown, node_changes, intent)
            self._work.restart()
            return
        node = self._transitions.make_child(head, offer.id, choice, learned)
        node_changes[head.id]["forward"] = node.id
        row = await self._pregenerated_offer_row(node)
        await self._store.write(
            rows.commit_node, node_row(node), node_changes, intent, self._transitions.failed_request, row
        )
        self._transitions.remember_request(intent)
        self._transitions.enter_node(node, node_changes)
        if row:
            self._transitions.show_offer(row)
        self._work.restart()

    async def _pregenerated_offer_row(self, node: Node) -> dict[str, Any] | None:
        """Return the row of the first offer at a new node, if foresight has generated it."""
        if self._state.prompts is None:
            return None
        try:
            prompt = await asyncio.to_thread(self._state.prompts.at, node.position)
        except (OSError, ValueError):  # reported when the offer is started
            return None
        offered = self._engine.generated_ahead(node, prompt)
        if offered is None:
            return None
        self._transitions.record_speed(offered)
        options = [option.model_dump(mode="json") for option in offered.options]
        return self._transitions.offer_row(node, 0, prompt) | {"options": options}
