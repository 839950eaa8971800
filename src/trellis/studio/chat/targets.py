"""Who can be talked to: every model, every session's head and every step of its tree, and models elsewhere.

Names are what `/v1/models` lists: `demo`, `session:<name or id>`, `session:<name or id>@<step, name or id>`,
`remote:<server>/<model>`. It does not know rooms.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from ...errors import Invalid, NotFound, TrellisError, shorten
from ...messages import Chat, Event
from ...params import ModelOptions
from ..models.catalog import UNREADABLE_CONFIG
from ..models.models import Models
from ..steering.session import Session
from ..steering.sessions import Steering
from ..steering.tree import Node
from .attachments import PICTURE, kind_of
from .providers import Remotes
from .target import Follow, Speaker


class Base(Speaker):
    """A model as it is."""

    def __init__(self, models: Models, options: ModelOptions) -> None:
        self._models, self._options = models, options
        self.name = self.label = options.model

    async def answer(self, request: Chat, owner: str, follow: Follow) -> AsyncGenerator[Event, None]:
        worker = await self._models.engine(self._options, follow, fetches=False)
        async with aclosing(worker.stream(request, owner=owner)) as events:
            async for event in events:
                yield event


class Version(Speaker):
    """A step of a session; its head, as it stands when it is asked, where none is named."""

    def __init__(self, models: Models, session: Session, node: Node | None, label: str) -> None:
        self._models, self._session, self._node = models, session, node
        self.name = f"session:{session.id}" + (f"@{node.id}" if node else "")
        self.label = label

    @property
    def exactly(self) -> str:
        node = self._node or self._session.tree.head
        return f"session:{self._session.id}@{node.id}" if node.weights else self.name

    async def answer(self, request: Chat, owner: str, follow: Follow) -> AsyncGenerator[Event, None]:
        await self._models.engine(self._session.config.part(ModelOptions), follow, fetches=False)
        node = self._node or self._session.tree.head
        async with aclosing(self._session.chat(request, node, owner)) as events:
            async for event in events:
                yield event


class Speakers:
    """Finds who is named, and lists all."""

    def __init__(self, models: Models, steering: Steering, remotes: Remotes) -> None:
        self._models, self._steering, self._remotes = models, steering, remotes

    async def find(self, name: str) -> Speaker:
        """Raises NotFound for a name that nobody has: only who is here can be talked to, the hub is not asked."""
        if name.startswith("session:"):
            return await self._version(name)
        if name.startswith("remote:"):
            if (remote := await self._remotes.find(name)) is None:
                raise self._nobody(name)
            return remote
        try:
            entry = await self._models.catalog.find(name, field="model")
        except TrellisError as error:
            raise self._nobody(name) from error
        if entry.problem:
            raise entry.problem
        options = self._models.options_of(entry.id)
        if entry.repository and self._models.state(options) == "unloaded":
            revision = await self._models.catalog.revision_here(entry.repository)
            if revision is None:
                raise self._nobody(name)
            options = options.model_copy(update={"revision": revision})
        return Base(self._models, options)

    async def everybody(self) -> list[dict[str, Any]]:
        """Everybody, as {name, label, kind, ready, sees}: models first, then sessions, the last used one first."""
        found: list[dict[str, Any]] = []
        for entry in await self._models.catalog.all():
            if entry.problem or entry.architecture == UNREADABLE_CONFIG:
                continue
            ready = self._models.state(self._models.options_of(entry.id)) == "loaded"
            found.append({"name": entry.id, "label": entry.id, "kind": "model", "ready": ready, "sees": False})
        for session in await self._steering.sessions():
            found.append({
                "name": f"session:{session['id']}", "label": f"{session['name']}, {_step(session['step'])}",
                "kind": "session", "ready": session["status"] != "asleep", "session": session["name"],
                "model": session["model"], "sees": False,
            })  # fmt: skip
        for server in await self._remotes.all():
            for model in server["models"]:
                label = f"{model} at {server['name']}"
                name = f"remote:{server['name']}/{model}"
                found.append({"name": name, "label": label, "kind": "remote", "ready": True, "sees": server["sees"]})
        return found

    async def versions(self, session_id: str) -> list[dict[str, Any]]:
        """The steps of a session as {name, label, head, newest}, the newest first; the head is where it stands."""
        session = await self._steering.session(session_id)
        labels = await session.labels()
        nodes = sorted(session.tree.nodes.values(), key=lambda node: node.created, reverse=True)
        grown = [node for node in nodes if node.weights]
        return [
            {
                "name": f"session:{session.id}@{node.id}", "label": f"{session.name}, {_named(node, labels)}",
                "head": node is session.tree.head, "newest": node is grown[0],
            }
            for node in grown
        ]  # fmt: skip

    async def require_seeing(self, names: Sequence[str]) -> None:
        """Raises Invalid where one of some cannot be shown pictures."""
        for name in names:
            speaker = await self.find(name)
            if not speaker.sees:
                raise Invalid(
                    f"“{shorten(speaker.label)}” can't read images.", field="files", code="cannot_see",
                    next_step="Remove the image, or choose a vision model.",
                )  # fmt: skip

    async def require_sight(self, names: Sequence[str], data: bytes) -> None:
        """Raises Invalid where a file is a picture, and one of some cannot be shown it."""
        if kind_of(data) == PICTURE:
            await self.require_seeing(names)

    async def label(self, name: str) -> str:
        """What somebody is called on a page; the name itself when there is nobody of that name any more."""
        try:
            return (await self.find(name)).label
        except TrellisError:
            return name

    async def _version(self, name: str) -> Speaker:
        called, _, place = name.removeprefix("session:").rpartition("@")
        whole = name.removeprefix("session:")
        known = {each for row in await self._steering.sessions() for each in (row["id"], row["name"])}
        if not called or whole in known:  # a name may have an @ in it
            called, place = whole, ""
        session = await self._session(called, name)
        if not place:
            return Version(self._models, session, None, session.name)
        node = _node_of(session, place)
        if node is None or not node.weights:
            raise NotFound(
                f"The session “{shorten(session.name)}” has no step “{shorten(place)}”.",
                field="model",
                next_step=f"Its steps are 0 to {max(each.step for each in session.tree.nodes.values())}.",
            )
        return Version(self._models, session, node, f"{session.name}, {_named(node, {})}")

    async def _session(self, called: str, name: str) -> Session:
        for row in await self._steering.sessions():
            if called in (row["id"], row["name"]):
                return await self._steering.session(row["id"])
        raise self._nobody(name)

    def _nobody(self, name: str) -> NotFound:
        return NotFound(
            f"There is no model “{shorten(name)}”.",
            code="model_not_found",
            field="model",
            next_step="Choose another model; /v1/models lists them all.",
        )


def _node_of(session: Session, place: str) -> Node | None:
    """A step by its id, its own name or its number: on the branch of the head first, else the newest."""
    tree = session.tree
    if place in tree.nodes:
        return tree.nodes[place]
    branch = tree.path(tree.head_id)[::-1]
    others = sorted(tree.nodes.values(), key=lambda node: node.created, reverse=True)
    return next((node for node in (*branch, *others) if place in (node.name, str(node.step))), None)


def _named(node: Node, labels: dict[str, str]) -> str:
    if node.parent is None:
        return "Base model"
    label = node.name or labels.get(node.id, "").strip()
    return f"{_step(node.step)}: {label}" if label else _step(node.step)


def _step(number: int) -> str:
    return f"step {number}" if number else "Base model"
