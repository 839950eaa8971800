"""All sessions, by id: create, find, wake, rename, delete."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from ...blobs import Blobs
from ...errors import Invalid, NotFound, TrellisError, shorten
from ...messages import derived_seed
from ...model_checks import answer_length_problem
from ...model_files import Problem
from ...options import ModelOptions, Sampling, SessionConfig, default_learning_rate, invalid_from
from ...store import steering as rows
from ...store.store import Store
from ..datasets import Datasets
from ..hub import Hub, HubEvent
from ..jobs import timestamp
from ..models import ModelEntry, Models, template_error, template_error_from_files
from .choice_logs import ChoiceLogs
from .session import Session
from .tree import Node, Tree, choice_json, drift_of, node_from_row, node_row, root_id

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0

SESSION_NAMES = (
    "Clematis", "Wisteria", "Jasmine", "Sweet pea", "Hop", "Honeysuckle", "Morning glory", "Runner bean", "Ivy",
    "Passionflower", "Nasturtium", "Climbing rose", "Grapevine", "Cucumber", "Bittersweet", "Trumpet vine",
)  # fmt: skip
"""Names for new sessions: plants that grow on a trellis."""


class Sessions:
    """All sessions. Those in use are in memory, all of them are in the store."""

    def __init__(
        self, store: Store, hub: Hub, models: Models, datasets: Datasets, weights: Blobs, logs: ChoiceLogs,
        is_foresight_enabled: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`is_foresight_enabled` tells whether sessions may compute results ahead of time."""
        self._is_foresight_enabled = is_foresight_enabled
        self._store = store
        self._datasets = datasets
        self._weights = weights
        self._logs = logs
        self._hub = hub
        self._models = models
        self._sessions: dict[str, Session] = {}
        models.on_changed = self._on_engine_changed
        self._open_lock = asyncio.Lock()
        self._create_lock = asyncio.Lock()

    async def open(self) -> None:
        """Take up choices that were acknowledged and not learned from when the studio last stopped, and delete the logs
        that no node was fitted to: of deleted sessions, of fits that failed. No fit is running yet."""
        for log_id in await asyncio.to_thread(self._logs.list_ids):
            if not await self._store.read(rows.is_log_used, log_id):
                await asyncio.to_thread(self._logs.discard, log_id)
        for session_id in await self._store.read(rows.sessions_with_open_intents):
            try:
                (await self.session(session_id)).work.wake()
            except Exception:  # one session that cannot be read must not keep the others from opening
                log.exception("session %s could not be taken up", session_id)

    def _on_engine_changed(self, options: ModelOptions) -> None:
        """Tell the sessions of a model that it was loaded or unloaded."""
        for session in self._sessions.values():
            session.on_engine_changed(options)

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions.values()))

    async def create(self, name: str | None, config: Mapping[str, Any], request: str | None = None) -> Session:
        """Create a session from a partial configuration. Raise Invalid, or NotFound for an unknown model."""
        if request and (known_id := await self._store.read(rows.session_by_request, request)):
            return await self.session(known_id)
        parsed = await self._validated_config(config)
        async with self._create_lock:  # names are given one after another, and one request makes one session
            if request and (known_id := await self._store.read(rows.session_by_request, request)):
                return await self.session(known_id)
            return await self._create(name, parsed, request)

    async def _validated_config(self, config: Mapping[str, Any]) -> SessionConfig:
        """Return a complete configuration whose model and prompts exist. Raise Invalid or NotFound."""
        parsed = SessionConfig.parse(config)
        entry = await self._models.catalog.find(parsed.model, field="config.model")
        if parsed.remote_code and not entry.repository:
            raise Invalid(
                "config.remote_code: only a Hugging Face model pinned to a commit may run its own code.",
                field="config.remote_code",
                next_step="Turn it off.",
            )
        if template_problem := await self._template_error(entry, parsed):
            raise template_problem
        if problem := self._answer_length_problem(entry, parsed):
            raise Invalid(
                f"config.{problem.field}: {problem.message}", next_step=problem.next_step,
                field=f"config.{problem.field}",
            )  # fmt: skip
        if parsed.dataset.source != "demo":
            await self._datasets.preview(parsed.dataset)
        if parsed.learning_rate is None:
            parsed = parsed.model_copy(update={"learning_rate": default_learning_rate(entry.parameters)})
        return parsed

    @staticmethod
    def _answer_length_problem(entry: ModelEntry, config: SessionConfig) -> Problem | None:
        return answer_length_problem(entry.shape.positions, config.max_new_tokens)

    async def _create(self, name: str | None, parsed: SessionConfig, request: str | None) -> Session:
        now = time.time()
        session_id = f"s{secrets.token_hex(8)}"
        root = Node(
            id=root_id(session_id), session=session_id, parent=None, step=0, weights="", position=0, answered=None,
            choice=None, metrics=None, control=None, shown=None, forward=None, created=now,
        )  # fmt: skip
        row = {
            "id": session_id, "request": request, "name": name or await self._unused_name(),
            "config": parsed.model_dump(mode="json"), "head": root.id, "offer": None,
            "prompts": "" if parsed.dataset.source == "demo" else None,
            "created": now, "updated": now,
        }  # fmt: skip
        await self._store.write(rows.add_session, row, node_row(root))
        session = self._make_session(row, [root], None, None)
        await session.work.open_prompts()
        self._sessions[session_id] = session
        session.work.wake()
        return session

    async def check_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is wrong with a partial configuration and the memory its model would need. Nothing is loaded."""
        errors: list[dict[str, str]] = []
        try:
            parsed = SessionConfig.parse(config)
        except Invalid as error:
            errors, parsed = error.fields, SessionConfig.from_valid_fields(config)
        memory = None
        try:
            entry = await self._models.catalog.find(parsed.model, field="config.model")
            memory = await asyncio.to_thread(self._models.estimate_fit, entry, parsed)
            if template_problem := await self._template_error(entry, parsed):
                errors = [*errors, *template_problem.fields]
            problems = [await self._models.find_problem(entry, parsed), self._answer_length_problem(entry, parsed)]
            errors = [*errors, *({"field": f"config.{each.field}", "message": each.full_text()} for each in problems
                                 if each)]  # fmt: skip
        except NotFound as error:
            errors = [*errors, {"field": "config.model", "message": error.message}]
        return {"errors": errors, "memory": memory}

    async def _template_error(self, entry: ModelEntry, config: SessionConfig) -> Invalid | None:
        """Return why the model's chat template cannot do what the options need, as far as is known."""
        if loaded := self._models.loaded_info(config.extract(ModelOptions)):
            return template_error(config, loaded)

        def check_files() -> Invalid | None:
            folder = (
                self._models.catalog.downloaded_folder(entry.repository, config.revision)
                if entry.repository
                else entry.path
            )
            return template_error_from_files(config, folder) if folder else None

        return await asyncio.to_thread(check_files)

    async def session(self, session_id: str) -> Session:
        """Return a session. Raise NotFound."""
        if session_id in self._sessions:
            self._sessions[session_id].last_used = time.monotonic()
            return self._sessions[session_id]
        async with self._open_lock:
            if session_id not in self._sessions:
                session_rows = await self._store.read(rows.get_session, session_id)
                if session_rows is None:
                    raise NotFound(
                        f"There is no session “{shorten(session_id)}”.",
                        next_step="See the home page for your sessions.",
                    )
                await self._close_idle_sessions()
                opened = self._session_from_rows(*session_rows)
                await opened.work.open_prompts()
                self._sessions[session_id] = opened
        session = self._sessions[session_id]
        session.last_used = time.monotonic()
        return session

    def _session_from_rows(
        self, row: rows.Row, nodes: list[rows.Row], offer: rows.Row | None, intent: rows.Row | None
    ) -> Session:
        try:
            return self._make_session(row, map(node_from_row, nodes), offer, intent)
        except ValidationError as error:
            problem = invalid_from(error, prefix="config")
            raise TrellisError(
                f"This version can't read the session “{shorten(row['name'])}”: {problem.message}",
                code="session_unreadable",
                next_step="Open it with the version that wrote it. Nothing was changed.",
            ) from None

    def _make_session(
        self, row: rows.Row, nodes: Iterable[Node], offer: rows.Row | None, intent: rows.Row | None
    ) -> Session:
        return Session(
            self._store, self._hub, self._models, self._datasets, self._weights, self._logs, row, nodes, offer, intent,
            self._is_foresight_enabled,
        )  # fmt: skip

    async def _close_idle_sessions(self) -> None:
        """Drop sessions from memory that nobody has used for a while."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if session.is_idle and now - session.last_used > IDLE_SECONDS:
                del self._sessions[session.id]
                await session.close()

    async def list_sessions(self) -> list[dict[str, Any]]:
        """Return all sessions, last used first."""
        session_rows = await self._store.read(rows.list_sessions)
        return [
            {
                "id": row["id"],
                "name": row["name"],
                "model": row["config"]["model"],
                "step": row["step"] or 0,
                "created": timestamp(row["created"]),
                "updated": timestamp(row["updated"]),
                "status": self._sessions[row["id"]].status if row["id"] in self._sessions else "asleep",
            }
            for row in session_rows
        ]

    async def delete(self, session_id: str) -> None:
        """Delete a session, its log, and the weights that no other session names. Raise NotFound."""
        session = await self.session(session_id)
        await session.close("deleted")
        try:
            await self._store.write(rows.delete_session, session_id)
        finally:
            self._sessions.pop(session_id, None)  # if deletion failed, it is read from the store again
        own_weights = {node.weights for node in session.tree.nodes.values() if node.weights}
        for unused in own_weights - await self._store.read(rows.all_weights):
            await asyncio.to_thread(self._weights.discard, unused)
        if session.prepared_prompts and not await self._store.read(rows.are_prompts_used, session.prepared_prompts):
            await self._datasets.discard(session.prepared_prompts)

    async def events(self, session_id: str, after: str | None) -> AsyncIterator[HubEvent]:
        """Yield the events of a session after an event id, or a state snapshot first if there is none."""
        session = await self.session(session_id)
        session.add_watcher()
        try:
            async for event in self._hub.subscribe(session.topic, after, lambda: ("state", session.state())):
                yield event
        finally:
            session.remove_watcher()

    async def sample(
        self, session_id: str, prompt: str, node: str | None, n: int, sampling: Mapping[str, Any], seed_key: str = ""
    ) -> list[str]:
        """Return answers sampled at any node (default: the head), without moving the head.

        With `seed_key`, the seed follows from it instead of from the node, so that only the weights differ.
        """
        session = await self.session(session_id)
        config = SessionConfig.parse(session.config.model_dump(mode="json") | dict(sampling))
        seed = derived_seed("sample", config.seed, seed_key or node or session.tree.head_id, prompt)
        return await session.nodes.sample(prompt, node, n, config.extract(Sampling), seed)

    async def tree_json(self, session_id: str) -> dict[str, Any]:
        session = await self.session(session_id)
        # A copy, in a thread: the session continues meanwhile, and hundreds of nodes take a while.
        return await asyncio.to_thread(_tree_json, Tree(session.tree.nodes.values(), session.tree.head_id))

    async def _unused_name(self) -> str:
        taken = {row["name"] for row in await self._store.read(rows.list_sessions)}
        for number in range(1, len(taken) + 2):
            for name in SESSION_NAMES:
                candidate = name if number == 1 else f"{name} {number}"
                if candidate not in taken:
                    return candidate
        raise AssertionError("more names than sessions")


def _tree_json(tree: Tree) -> dict[str, Any]:
    return {
        "nodes": [
            {
                "id": node.id,
                "parent": node.parent,
                "step": node.step,
                "choice": choice_json(node),
                "drift": drift_of(node, tree),
                "metrics": node.metrics.model_dump() if node.metrics else None,
                "name": node.name,
                "created": timestamp(node.created),
            }
            for node in tree.nodes.values()
        ],
        "head": tree.head_id,
    }
