"""Steering as the studio offers it: sessions by id, made, found, woken, renamed, deleted."""

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
from ...model_checks import too_few_positions
from ...model_files import Problem
from ...params import ModelOptions, Sampling, SessionConfig, default_learning_rate, invalid_from
from ...store import steering as rows
from ...store.store import Store
from ..datasets.datasets import Datasets
from ..hub import Hub, HubEvent
from ..jobs import timestamp
from ..models.catalog import ModelEntry
from ..models.models import Models
from ..models.template_options import template_trouble, template_trouble_in
from .choice_logs import Logs
from .session import Session
from .tree import Node, Tree, drift_of, node_from, node_row, root_id, said

log = logging.getLogger(__name__)

IDLE_SECONDS = 600.0

NAMES = (
    "Clematis", "Wisteria", "Jasmine", "Sweet pea", "Hop", "Honeysuckle", "Morning glory", "Runner bean", "Ivy",
    "Passionflower", "Nasturtium", "Climbing rose", "Grapevine", "Cucumber", "Bittersweet", "Trumpet vine",
)  # fmt: skip
"""New sessions are named after what grows on a trellis."""


class Steering:
    """All sessions. One that was asked for stays in memory; every one is in the store."""

    def __init__(
        self, store: Store, hub: Hub, models: Models, datasets: Datasets, weights: Blobs, logs: Logs,
        foresees: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """`foresees`: whether sessions may work out what a choice would lead to while a person reads."""
        self._foresees = foresees
        self._store = store
        self._datasets = datasets
        self._weights = weights
        self._logs = logs
        self._hub = hub
        self._models = models
        self._sessions: dict[str, Session] = {}
        models.changed = self._engine_changed
        self._opening = asyncio.Lock()
        self._creating = asyncio.Lock()

    async def open(self) -> None:
        """Take up choices that were acknowledged and not learned from when the studio last stopped, and delete the logs
        that no node was fitted to: of deleted sessions, of fits that failed. No fit is running yet."""
        for log_id in await asyncio.to_thread(self._logs.all):
            if not await self._store.read(rows.log_is_used, log_id):
                await asyncio.to_thread(self._logs.discard, log_id)
        for session_id in await self._store.read(rows.sessions_with_open_intents):
            try:
                (await self.session(session_id)).wake()
            except Exception:  # one session that cannot be read must not keep the others from opening
                log.exception("session %s could not be taken up", session_id)

    def _engine_changed(self, options: ModelOptions) -> None:
        """A model was loaded or let go: the sessions on it say so on their pages."""
        for session in self._sessions.values():
            session.engine_changed(options)

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions.values()))

    async def create(self, name: str | None, config: Mapping[str, Any], request: str | None = None) -> Session:
        """A new session from a partial configuration. Raises Invalid, or NotFound for an unknown model."""
        if request and (known := await self._store.read(rows.session_by_request, request)):
            return await self.session(known)
        parsed = await self._checked(config)
        async with self._creating:  # names are given one after another, and one request makes one session
            if request and (known := await self._store.read(rows.session_by_request, request)):
                return await self.session(known)
            return await self._create(name, parsed, request)

    async def _checked(self, config: Mapping[str, Any]) -> SessionConfig:
        """A whole configuration whose model and prompts are there. Raises Invalid or NotFound."""
        parsed = SessionConfig.parse(config)
        entry = await self._models.catalog.find(parsed.model, field="config.model")
        if parsed.remote_code and not entry.repository:
            raise Invalid(
                "config.remote_code: only a Hugging Face model pinned to a commit may run its own code.",
                field="config.remote_code",
                next_step="Turn it off.",
            )
        if trouble := await self._template_trouble(entry, parsed):
            raise trouble
        if problem := self._too_few_positions(entry, parsed):
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
    def _too_few_positions(entry: ModelEntry, config: SessionConfig) -> Problem | None:
        return too_few_positions(entry.shape.positions, config.max_new_tokens)

    async def _create(self, name: str | None, parsed: SessionConfig, request: str | None) -> Session:
        now = time.time()
        session_id = f"s{secrets.token_hex(8)}"
        root = Node(
            id=root_id(session_id), session=session_id, parent=None, step=0, weights="", position=0, answered=None,
            choice=None, metrics=None, control=None, shown=None, forward=None, created=now,
        )  # fmt: skip
        row = {
            "id": session_id, "request": request, "name": name or await self._free_name(),
            "config": parsed.model_dump(mode="json"), "head": root.id, "offer": None,
            "prompts": "" if parsed.dataset.source == "demo" else None,
            "created": now, "updated": now,
        }  # fmt: skip
        await self._store.write(rows.add_session, row, node_row(root))
        session = self._session(row, [root], None, None)
        await session.open_prompts()
        self._sessions[session_id] = session
        session.wake()
        return session

    async def check(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What is wrong with a partial configuration, and what its model would take: nothing is loaded or changed."""
        errors: list[dict[str, str]] = []
        try:
            parsed = SessionConfig.parse(config)
        except Invalid as error:
            errors, parsed = error.fields, SessionConfig.as_far_as_valid(config)
        memory = None
        try:
            entry = await self._models.catalog.find(parsed.model, field="config.model")
            memory = await asyncio.to_thread(self._models.fits, entry, parsed)
            if trouble := await self._template_trouble(entry, parsed):
                errors = [*errors, *trouble.fields]
            problems = [await self._models.problem(entry, parsed), self._too_few_positions(entry, parsed)]
            errors = [*errors, *({"field": f"config.{each.field}", "message": each.sentences()} for each in problems
                                 if each)]  # fmt: skip
        except NotFound as error:
            errors = [*errors, {"field": "config.model", "message": error.message}]
        return {"errors": errors, "memory": memory}

    async def _template_trouble(self, entry: ModelEntry, config: SessionConfig) -> Invalid | None:
        """What the model's chat template cannot do of what the options ask, as far as it is known."""
        if loaded := self._models.loaded(config.part(ModelOptions)):
            return template_trouble(config, loaded)

        def look() -> Invalid | None:
            known = self._models.catalog.fetched(entry.repository, config.revision) if entry.repository else entry.path
            return template_trouble_in(config, known) if known else None

        return await asyncio.to_thread(look)

    async def session(self, session_id: str) -> Session:
        """A session by its id. Raises NotFound."""
        if session_id in self._sessions:
            self._sessions[session_id].used = time.monotonic()
            return self._sessions[session_id]
        async with self._opening:
            if session_id not in self._sessions:
                found = await self._store.read(rows.get_session, session_id)
                if found is None:
                    raise NotFound(
                        f"There is no session “{shorten(session_id)}”.",
                        next_step="See the home page for your sessions.",
                    )
                await self._let_idle_ones_go()
                read = self._read(*found)
                await read.open_prompts()
                self._sessions[session_id] = read
        session = self._sessions[session_id]
        session.used = time.monotonic()
        return session

    def _read(self, row: rows.Row, nodes: list[rows.Row], offer: rows.Row | None, intent: rows.Row | None) -> Session:
        try:
            return self._session(row, map(node_from, nodes), offer, intent)
        except ValidationError as error:
            problem = invalid_from(error, prefix="config")
            raise TrellisError(
                f"This version can't read the session “{shorten(row['name'])}”: {problem.message}",
                code="session_unreadable",
                next_step="Open it with the version that wrote it. Nothing was changed.",
            ) from None

    def _session(
        self, row: rows.Row, nodes: Iterable[Node], offer: rows.Row | None, intent: rows.Row | None
    ) -> Session:
        return Session(
            self._store, self._hub, self._models, self._datasets, self._weights, self._logs, row, nodes, offer, intent,
            self._foresees,
        )  # fmt: skip

    async def _let_idle_ones_go(self) -> None:
        """Sessions that nobody has used for a while leave memory; the store has all of them."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            if session.idle and now - session.used > IDLE_SECONDS:
                del self._sessions[session.id]
                await session.close()

    async def sessions(self) -> list[dict[str, Any]]:
        """All sessions, the one that was last used first."""
        found = await self._store.read(rows.list_sessions)
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
            for row in found
        ]

    async def delete(self, session_id: str) -> None:
        """Forget a session, its log, and the weights that no other session names. Raises NotFound."""
        session = await self.session(session_id)
        await session.close("deleted")
        try:
            await self._store.write(rows.delete_session, session_id)
        finally:
            self._sessions.pop(session_id, None)  # if it could not be deleted, it is read again from the store
        own = {node.weights for node in session.tree.nodes.values() if node.weights}
        for unused in own - await self._store.read(rows.all_weights):
            await asyncio.to_thread(self._weights.discard, unused)
        if session.prepared and not await self._store.read(rows.prompts_are_used, session.prepared):
            await self._datasets.discard(session.prepared)

    async def events(self, session_id: str, after: str | None) -> AsyncIterator[HubEvent]:
        """What happens in a session, from an event id on; the whole state first where there is none."""
        session = await self.session(session_id)
        session.look()
        try:
            async for event in self._hub.subscribe(session.topic, after, lambda: ("state", session.state())):
                yield event
        finally:
            session.look_away()

    async def sample(
        self, session_id: str, prompt: str, node: str | None, n: int, sampling: Mapping[str, Any], key: str = ""
    ) -> list[str]:
        """Answers from any node (the head, where none is named) without moving the session.

        With a `key`, the random numbers follow from it instead of from the node: what differs is the weights alone.
        """
        session = await self.session(session_id)
        config = SessionConfig.parse(session.config.model_dump(mode="json") | dict(sampling))
        seed = derived_seed("sample", config.seed, key or node or session.tree.head_id, prompt)
        return await session.sample(prompt, node, n, config.part(Sampling), seed)

    async def tree(self, session_id: str) -> dict[str, Any]:
        session = await self.session(session_id)
        # From a copy, in a thread: a session goes on growing, and hundreds of nodes take a while.
        return await asyncio.to_thread(_tree_json, Tree(session.tree.nodes.values(), session.tree.head_id))

    async def _free_name(self) -> str:
        taken = {row["name"] for row in await self._store.read(rows.list_sessions)}
        for number in range(1, len(taken) + 2):
            for name in NAMES:
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
                "choice": said(node),
                "drift": drift_of(node, tree),
                "metrics": node.metrics.model_dump() if node.metrics else None,
                "name": node.name,
                "created": timestamp(node.created),
            }
            for node in tree.nodes.values()
        ],
        "head": tree.head_id,
    }
