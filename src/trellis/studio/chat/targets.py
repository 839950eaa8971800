"""Find and list chat targets: models, the head and the steps of every session, models of external providers.

Names are those of `/v1/models`: `demo`, `session:<name or id>`, `session:<name or id>@<step, name or id>`,
`remote:<server>/<model>`. It does not know rooms.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ...errors import Invalid, NotFound, TrellisError, shorten
from ...messages import Chat, Event
from ...options import ModelOptions
from ..models import UNREADABLE_CONFIG, Models
from ..steering import Node, Session, Sessions
from .attachments import PICTURE, detect_kind
from .providers import Providers
from .target import ChatTarget, OnProgress


class ModelTarget(ChatTarget):
    """A base model."""

    def __init__(self, models: Models, options: ModelOptions) -> None:
        self._models, self._options = models, options
        self.name = self.label = options.model

    async def answer(self, request: Chat, owner: str, on_progress: OnProgress) -> AsyncGenerator[Event, None]:
        worker = await self._models.engine(self._options, on_progress, allow_download=False)
        async with aclosing(worker.stream(request, owner=owner)) as events:
            async for event in events:
                yield event


class SessionTarget(ChatTarget):
    """A step of a session; without one, its head at the time of each answer."""

    def __init__(self, models: Models, session: Session, node: Node | None, label: str) -> None:
        self._models, self._session, self._node = models, session, node
        self.name = f"session:{session.id}" + (f"@{node.id}" if node else "")
        self.label = label

    @property
    def exact_name(self) -> str:
        node = self._node or self._session.tree.head
        return f"session:{self._session.id}@{node.id}" if node.weights else self.name

    async def answer(self, request: Chat, owner: str, on_progress: OnProgress) -> AsyncGenerator[Event, None]:
        await self._models.engine(self._session.config.extract(ModelOptions), on_progress, allow_download=False)
        node = self._node or self._session.tree.head
        async with aclosing(self._session.nodes.chat(request, node, owner)) as events:
            async for event in events:
                yield event


class ChatTargets:
    """Finds targets by name, and lists them."""

    def __init__(self, models: Models, steering: Sessions, providers: Providers) -> None:
        self._models, self._steering, self._providers = models, steering, providers

    async def find(self, name: str) -> ChatTarget:
        """Return a target. Raise NotFound; models that are not downloaded are not found."""
        if name.startswith("session:"):
            return await self._find_version(name)
        if name.startswith("remote:"):
            if (provider_target := await self._providers.find(name)) is None:
                raise self._not_found(name)
            return provider_target
        try:
            entry = await self._models.catalog.find(name, field="model")
        except TrellisError as error:
            raise self._not_found(name) from error
        if entry.problem:
            raise entry.problem
        options = self._models.current_options(entry.id)
        if entry.repository and self._models.state(options) == "unloaded":
            revision = await self._models.catalog.downloaded_revision(entry.repository)
            if revision is None:
                raise self._not_found(name)
            options = options.model_copy(update={"revision": revision})
        return ModelTarget(self._models, options)

    async def list_targets(self) -> list[dict[str, Any]]:
        """Return all targets as {name, label, kind, ready, sees}: models first, then sessions, last used first."""
        targets: list[dict[str, Any]] = []
        for entry in await self._models.catalog.list_models():
            if entry.problem or entry.architecture == UNREADABLE_CONFIG:
                continue
            is_ready = self._models.state(self._models.current_options(entry.id)) == "loaded"
            targets.append({"name": entry.id, "label": entry.id, "kind": "model", "ready": is_ready, "sees": False})
        for session in await self._steering.list_sessions():
            targets.append({
                "name": f"session:{session['id']}", "label": f"{session['name']}, {_step(session['step'])}",
                "kind": "session", "ready": session["status"] != "asleep", "session": session["name"],
                "model": session["model"], "sees": False,
            })  # fmt: skip
        for server in await self._providers.list_providers():
            for model in server["models"]:
                label = f"{model} at {server['name']}"
                name = f"remote:{server['name']}/{model}"
                targets.append({"name": name, "label": label, "kind": "remote", "ready": True, "sees": server["sees"]})
        return targets

    async def list_versions(self, session_id: str) -> list[dict[str, Any]]:
        """Return the steps of a session as {name, label, head, newest}, newest first. `head` marks the present one."""
        session = await self._steering.session(session_id)
        labels = await session.nodes.labels()
        nodes = sorted(session.tree.nodes.values(), key=lambda node: node.created, reverse=True)
        nodes_with_weights = [node for node in nodes if node.weights]
        return [
            {
                "name": f"session:{session.id}@{node.id}", "label": f"{session.name}, {_step_label(node, labels)}",
                "head": node is session.tree.head, "newest": node is nodes_with_weights[0],
            }
            for node in nodes_with_weights
        ]  # fmt: skip

    async def require_picture_support(self, names: Sequence[str]) -> None:
        """Raise Invalid where one of the targets does not accept pictures."""
        for name in names:
            target = await self.find(name)
            if not target.supports_pictures:
                raise Invalid(
                    f"“{shorten(target.label)}” can't read images.", field="files", code="cannot_see",
                    next_step="Remove the image, or choose a vision model.",
                )  # fmt: skip

    async def require_picture_support_for(self, names: Sequence[str], data: bytes) -> None:
        """Raise Invalid where a file is a picture that one of the targets does not accept."""
        if detect_kind(data) == PICTURE:
            await self.require_picture_support(names)

    async def label_of(self, name: str) -> str:
        """Return the label of a target; its name when it no longer exists."""
        try:
            return (await self.find(name)).label
        except TrellisError:
            return name

    async def _find_version(self, name: str) -> ChatTarget:
        session_name, _, step_name = name.removeprefix("session:").rpartition("@")
        full_name = name.removeprefix("session:")
        known_names = {each for row in await self._steering.list_sessions() for each in (row["id"], row["name"])}
        if not session_name or full_name in known_names:  # session names may contain “@”
            session_name, step_name = full_name, ""
        session = await self._find_session(session_name, name)
        if not step_name:
            return SessionTarget(self._models, session, None, session.name)
        node = _find_node(session, step_name)
        if node is None or not node.weights:
            raise NotFound(
                f"The session “{shorten(session.name)}” has no step “{shorten(step_name)}”.",
                field="model",
                next_step=f"Its steps are 0 to {max(each.step for each in session.tree.nodes.values())}.",
            )
        return SessionTarget(self._models, session, node, f"{session.name}, {_step_label(node, {})}")

    async def _find_session(self, session_name: str, name: str) -> Session:
        for row in await self._steering.list_sessions():
            if session_name in (row["id"], row["name"]):
                return await self._steering.session(row["id"])
        raise self._not_found(name)

    def _not_found(self, name: str) -> NotFound:
        return NotFound(
            f"There is no model “{shorten(name)}”.",
            code="model_not_found",
            field="model",
            next_step="Choose another model; /v1/models lists them all.",
        )


def _find_node(session: Session, step_name: str) -> Node | None:
    """Find a step by id, name or number: on the branch of the head first, else the newest."""
    tree = session.tree
    if step_name in tree.nodes:
        return tree.nodes[step_name]
    branch = tree.path(tree.head_id)[::-1]
    others = sorted(tree.nodes.values(), key=lambda node: node.created, reverse=True)
    return next((node for node in (*branch, *others) if step_name in (node.name, str(node.step))), None)


def _step_label(node: Node, labels: dict[str, str]) -> str:
    if node.parent is None:
        return "Base model"
    label = node.name or labels.get(node.id, "").strip()
    return f"{_step(node.step)}: {label}" if label else _step(node.step)


def _step(number: int) -> str:
    return f"step {number}" if number else "Base model"
