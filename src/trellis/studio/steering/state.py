"""What one session is while the studio runs, and what its watchers are told of it. It does not know who changes it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from ...errors import Conflict, NotFound, TrellisError, shorten
from ...messages import Metrics, Progress
from ...options import ModelOptions, SessionConfig
from ..datasets import Prompts
from ..hub import Hub
from ..models import Models
from .offer import ShownOffer
from .tree import Node, Tree, drift_of


class SessionState:
    """The tree, the offer on the screen, the choice being learned from, and the progress of the work."""

    def __init__(
        self,
        hub: Hub,
        models: Models,
        row: dict[str, Any],
        nodes: Iterable[Node],
        offer: dict[str, Any] | None,
        intent: dict[str, Any] | None,
    ) -> None:
        self._hub = hub
        self._models = models
        self.id: str = row["id"]
        self.name: str = row["name"]
        self.created: float = row["created"]
        self.config = SessionConfig.model_validate(row["config"])
        self.model_options = self.config.extract(ModelOptions)
        self.prepared_prompts: str | None = row["prompts"]
        self.prompts: Prompts | None = None
        self.tree = Tree(nodes, row["head"])
        self.offer = ShownOffer.from_row(offer, self.config.group_size) if offer else None
        self.intent = intent
        self.error: TrellisError | None = None
        self.load_progress: Progress | None = None
        self.queue_position: int | None = None
        """The position in the engine's queue while it works for others: 1 is next."""
        self.tokens_per_second: float | None = None
        self.unadapted_layers: tuple[str, ...] = ()
        """Layers that cannot get an adapter, each with the reason, as the engine last reported."""
        self.lock = asyncio.Lock()
        """Held while a command or a piece of work writes to the store and changes this state."""
        self.last_used = time.monotonic()
        self.watchers = 0
        self.is_resume_requested = False
        """Whether a person asked to resume: the model is then loaded and verified before they choose."""
        self.is_closed = False

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
        """Whether a choice is being learned; other commands are refused meanwhile."""
        return self.intent is not None and self.error is None

    def state(self) -> dict[str, Any]:
        """Return the whole state as the API shows it."""
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
            "layers_left_out": list(self.unadapted_layers),
            "engine": self._models.state(self.model_options),
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

    def node(self, node_id: str) -> Node:
        """Return a node. Raise NotFound."""
        if node_id not in self.tree.nodes:
            raise NotFound(
                f"Node “{shorten(node_id)}” not found in this session.",
                field="node",
                next_step="See the session's tree.",
            )
        return self.tree.nodes[node_id]

    def on_load_progress(self, progress: Progress | None) -> None:
        """Publish the progress of loading; None when it has ended."""
        self.load_progress = progress
        if progress:
            self.publish("load_progress", progress.model_dump(exclude={"type"}))
        else:
            self.publish("state", self.state())

    def on_queue_position(self, position: int | None) -> None:
        """Publish the place in the engine's queue; None when it is this session's turn."""
        self.queue_position = position
        self.publish("queued", {"place": position})

    def publish_notice(self, message: str) -> None:
        """Publish a message that needs no action."""
        self.publish("notice", {"message": message})

    def on_option_text(self, index: int, text: str) -> None:
        assert self.offer is not None
        self.offer.texts[index] += text
        self.publish("option_delta", {"offer": self.offer.id, "index": index, "text": text})

    def publish(self, name: str, data: dict[str, Any]) -> None:
        if not self.is_closed:
            self._hub.publish(self.topic, name, data)

    def publish_head(self) -> None:
        head = self.tree.head
        data = {"node": head.id, "step": head.step, "position": self._prompt_index()}
        self.publish("head_moved", data | self._undo_redo_flags())

    def publish_offer(self, offer: ShownOffer) -> None:
        self.publish_offer_started(offer)
        if offer.options:
            self.publish("offer_ready", {"offer": offer.id, "options": offer.options_json()})

    def publish_offer_started(self, offer: ShownOffer) -> None:
        shown = offer.as_json()
        data = {"offer": shown["id"], "node": shown["node"], "prompt": shown["prompt"], "options": shown["options"]}
        self.publish("offer_started", data)

    def _undo_redo_flags(self) -> dict[str, bool]:
        is_free = not self.is_busy
        return {
            "can_undo": is_free and self.tree.undo_target is not None,
            "can_redo": is_free and self.tree.redo_target is not None,
        }

    def _prompt_index(self) -> int:
        """Return the index of the head's prompt in the current round, from 0."""
        return self.tree.head.position % self.prompts.total if self.prompts else self.tree.head.position

    def fail(self, error: TrellisError) -> None:
        self.error = error
        self.publish("failed", {"error": error.as_json()} | self._undo_redo_flags())

    def require_open(self) -> None:
        if self.is_closed:
            raise NotFound("This session was deleted.", next_step="Start a new one.")

    def require_not_busy(self) -> None:
        self.require_open()
        if self.is_busy:
            raise self.conflict("Still learning from the last choice.", "busy", "Try again in a few seconds.")

    def require_initialized(self, node: Node) -> None:
        """Raise Conflict for a node that has no weights yet, which is the root of a session that is starting."""
        if not node.weights:
            raise self.conflict("The session isn't ready yet.", "offer_not_ready", "Wait for the first answers.")

    def conflict(self, message: str, code: str, next_step: str) -> Conflict:
        return Conflict(message, code=code, next_step=next_step, details={"state": self.state()})
