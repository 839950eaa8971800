"""The pages of chat: the rooms, one room with its thread, and what is done there without a script."""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request, UploadFile
from markupsafe import Markup
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import TrellisError
from ....params import Sampling
from ....studio.chat.imports import Imported, import_rooms
from ....studio.chat.message import Message
from ....studio.chat.room import CHAT, MOST_MODELS, Room
from ....studio.studio import Studio
from ....text_rules import PROMPT_LIMIT
from ...access import MAX_FILE
from ...api.rooms import OfRoom
from ...api.steering import Name, OfStudio
from ...error_responses import status_of
from ...rate_limits import expensive
from ...render import render_of
from ..steering.workbench import Sent

router = APIRouter(include_in_schema=False)

SHOWN = 60
"""Rooms in the list before a person asks for all, or searches."""

LAST_MESSAGES = 200
"""Messages of a branch that a page shows before a person asks for all."""


@dataclass(frozen=True)
class Turn:
    """One place in the thread: a message, or several answers side by side. `others` are its branches."""

    message: dict[str, Any]
    columns: list[dict[str, Any]]
    others: list[str]
    place: int
    unanswered: bool
    first: bool
    """Whether it answers a prompt that stands alone, as those that a session learns from do."""
    cut: frozenset[str] = frozenset()
    """The answers that can go on."""
    teaches: str = ""
    """The session that is the likeliest to learn from it; empty where none is likelier than others."""


class SendForm(Sent):
    text: str = ""
    """As long as a body may be: a message that is too long comes back with the reason, and is not lost."""
    models: list[Annotated[str, Field(max_length=300)]] = Field([], max_length=MOST_MODELS)


class MessageForm(Sent):
    message: str = Field(max_length=100)


class EditForm(MessageForm):
    text: str


class AgainForm(MessageForm):
    model: str = Field("", max_length=300)


class RateForm(MessageForm):
    rating: int


class TeachForm(MessageForm):
    session: str = Field(max_length=100)


class RenameForm(Sent):
    title: Name


class SettingsForm(Sent):
    system: str = Field("", max_length=20_000)
    temperature: str = Field("", max_length=20)
    top_p: str = Field("", max_length=20)
    min_p: str = Field("", max_length=20)
    max_new_tokens: str = Field("", max_length=20)

    def sampling(self) -> dict[str, Any]:
        given = {name: getattr(self, name).strip() for name in ("temperature", "top_p", "min_p", "max_new_tokens")}
        return {name: value for name, value in given.items() if value}


class ArchiveForm(Sent):
    archived: bool


@router.get("/chat")
async def page(
    request: Request,
    studio: OfStudio,
    q: Annotated[str, Query(max_length=200)] = "",
    archived: bool = False,
    all: bool = False,
    model: Annotated[str, Query(max_length=300)] = "",
    current: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Begin a room, or find one. The list alone when a script asks."""
    if "hx-request" in request.headers:
        return render_of(request).page("chat/_rooms.html", current=current, **await rooms_of(studio, q, archived, all))
    return await start_page(request, studio, q=q, archived=archived, all=all, model=model)


async def start_page(
    request: Request,
    studio: Studio,
    *,
    q: str = "",
    archived: bool = False,
    all: bool = False,
    model: str = "",
    text: str = "",
    error: TrellisError | None = None,
    imported: Imported | None = None,
) -> HTMLResponse:
    speakers = await studio.speakers.everybody()
    listed = not model or model in {each["name"] for each in speakers}
    return render_of(request).page(
        "chat/start.html",
        status_of(error) if error else 200,
        place="chat",
        current="",
        text=text,
        chosen=[model or "demo"],
        speakers=speakers,
        known=[] if listed else [(model, await studio.speakers.label(model))],
        most=MOST_MODELS,
        longest=PROMPT_LIMIT,
        error=error.as_json() if error else None,
        imported=imported,
        done=done_before(request),
        request_id=secrets.token_hex(12),
        **await rooms_of(studio, q, archived, all),
    )


async def rooms_of(studio: Studio, q: str = "", archived: bool = False, all: bool = False) -> dict[str, Any]:
    found = await studio.rooms.found(q, archived)
    shown = found if all or q else found[:SHOWN]
    return {"rooms": shown, "total": len(found), "q": q, "archived": archived}


@router.post("/chat")
async def begin(request: Request, studio: OfStudio, form: Annotated[SendForm, Form()]) -> Response:
    """A new room, with its first message where there is one."""
    await expensive(request)
    try:
        room = await studio.rooms.create(models=[each for each in form.models if each], request=form.request)
        if form.text.strip():
            await room.send(form.text, f"{form.request}-first")
    except TrellisError as error:
        model = form.models[0] if form.models else ""
        return await start_page(request, studio, model=model, text=form.text, error=error)
    return RedirectResponse(f"/chat/{room.id}", 303)


@router.post("/chat/import", max_body_size=MAX_FILE)
async def take_in(request: Request, studio: OfStudio, file: UploadFile) -> Response:
    """Rooms from a file."""
    await expensive(request)
    try:
        imported = await import_rooms(studio.rooms, await file.read())
    except TrellisError as error:
        return await start_page(request, studio, error=error)
    if len(imported.rooms) == 1 and not imported.left_out and not imported.notes:
        return RedirectResponse(f"/chat/{imported.rooms[0].id}", 303)
    return await start_page(request, studio, imported=imported)


@router.get("/chat/{room}")
async def room_page(request: Request, room: OfRoom, studio: OfStudio, all: bool = False) -> HTMLResponse:
    """A room: its thread, and where to write."""
    return await show_room(request, room, studio, all)


async def show_room(
    request: Request, room: Room, studio: Studio, all: bool = False, error: TrellisError | None = None, text: str = ""
) -> HTMLResponse:
    turns, after, earlier = await thread_of(room, all)
    speakers = await studio.speakers.everybody()
    names = {each["name"] for each in speakers}
    known = [(name, await studio.speakers.label(name)) for name in room.models if name not in names]
    return await asyncio.to_thread(
        render_of(request).page,
        "chat/room.html",
        status_of(error) if error else 200,
        place="chat",
        current=room.id,
        room=room.as_json(),
        turns=turns,
        after=after,
        earlier=earlier,
        speakers=speakers,
        sessions=[each for each in speakers if each["kind"] == "session"],
        known=known,
        chosen=room.models,
        most=MOST_MODELS,
        longest=PROMPT_LIMIT,
        done=done_before(request),
        fields=fields_of(room.sampling),
        text=text,
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
        **await rooms_of(studio),
    )


def done_before(request: Request) -> str:
    """What the action did that led to this page: a word of `_notice.html`."""
    return request.query_params.get("done", "")


def fields_of(sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of sampling as a form shows them."""
    found = []
    for name, row in Sampling.model_fields.items():
        found.append({
            "name": name, "title": row.title, "help": row.description, "value": sampling.get(name, ""),
            "default": getattr(CHAT, name),
        })  # fmt: skip
    return found


async def thread_of(room: Room, all: bool = False) -> tuple[list[Turn], int, int]:
    """The branch that is looked at, the last event before it was, and how many earlier messages are not shown."""
    path = room.path(room.head)
    shown = path if all else path[-LAST_MESSAGES:]
    columns = {message.id: beside(room, message) for message in shown}
    wanted = {each.id: each for message in shown for each in columns[message.id]}
    told, after = await room.view(list(wanted.values()))
    by_id = {each["id"]: shown_as(each) for each in told}
    cut = frozenset([each.id for each in wanted.values() if await room.can_go_on(each)])
    turns = [turn_of(room, message, by_id, columns[message.id], cut) for message in shown]
    return turns, after, len(path) - len(shown)


async def sessions_of(studio: Studio) -> list[dict[str, Any]]:
    """The sessions that may learn from an answer."""
    return [each for each in await studio.speakers.everybody() if each["kind"] == "session"]


def beside(room: Room, message: Message) -> list[Message]:
    """The answers that were asked for together with one; itself alone where it was not."""
    if message.group is None:
        return [message]
    return [each for each in room.children(message.parent) if each.group == message.group]


def shown_as(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a template shows it: whole blocks as HTML, what comes after them as text."""
    return (
        message
        | {
            "html": Markup(message["html"]),  # noqa: S704 - sanitised when it was rendered
            "tail": message["text"][message["shown"] :],
        }
    )


def turn_of(
    room: Room, message: Message, by_id: dict[str, dict[str, Any]], columns: list[Message], cut: frozenset[str]
) -> Turn:
    """Branches are told apart by what stands side by side: of a comparison, the answer that is on the branch."""
    others: list[str] = []
    seen: set[str] = set()
    for each in room.children(message.parent):
        if each.group is None or each is message or (each.group not in seen and each.group != message.group):
            others.append(each.id)
        seen.add(each.group or "")
    return Turn(
        by_id[message.id], [by_id[each.id] for each in columns] if len(columns) > 1 else [], others,
        others.index(message.id), not room.children(message.id), is_first(room, message), cut,
        likeliest_session(room, message),
    )  # fmt: skip


def likeliest_session(room: Room, message: Message) -> str:
    """The id of the session that answered, or one beside it, or that is chosen in the room."""
    answers = [message, *room.children(message.parent)[::-1]]
    names = [*(each.model for each in answers if each.model), *room.models]
    return next((name.removeprefix("session:").split("@")[0] for name in names if name.startswith("session:")), "")


def is_first(room: Room, message: Message) -> bool:
    asked = room.messages.get(message.parent or "")
    return asked is not None and asked.parent is None and not asked.files and not room.system


@router.get("/chat/{room}/thread")
async def thread(request: Request, room: OfRoom, studio: OfStudio, all: bool = False) -> HTMLResponse:
    """The thread alone, for a page that is open."""
    sessions = await sessions_of(studio)
    turns, after, earlier = await thread_of(room, all)
    page = render_of(request).page
    return await asyncio.to_thread(
        page, "chat/_thread.html", room=room.as_json(), turns=turns, after=after, earlier=earlier, sessions=sessions
    )


@router.get("/chat/{room}/messages/{message}")
async def one_message(request: Request, room: OfRoom, studio: OfStudio, message: str) -> HTMLResponse:
    """One place in the thread: a message, with what stands beside it."""
    found = room.message(message)
    columns = beside(room, found)
    sessions = await sessions_of(studio)
    if len(columns) > 1:  # of a comparison, the answer that is on the branch
        on_branch = {each.id for each in room.path(room.head)}
        found = next((each for each in columns if each.id in on_branch), columns[0])
    told, after = await room.view(columns)
    cut = frozenset([each.id for each in columns if await room.can_go_on(each)])
    turn = turn_of(room, found, {each["id"]: shown_as(each) for each in told}, columns, cut)
    return render_of(request).page("chat/_turn.html", room=room.as_json(), turn=turn, after=after, sessions=sessions)


def answered(request: Request, room: Room) -> Response:
    """After an action: nothing for a script (the socket tells), back to the room for a plain form."""
    if "hx-request" in request.headers:
        return Response(status_code=204)
    return RedirectResponse(f"/chat/{room.id}#end", 303)


@router.post("/chat/{room}/send")
async def send(request: Request, room: OfRoom, studio: OfStudio, form: Annotated[SendForm, Form()]) -> Response:
    await expensive(request)
    try:
        await room.send(form.text, form.request, models=[each for each in form.models if each])
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await show_room(request, room, studio, error=error, text=form.text)
    return answered(request, room)


@router.post("/chat/{room}/stop")
async def stop(request: Request, room: OfRoom) -> Response:
    await room.stop()
    return answered(request, room)


@router.post("/chat/{room}/edit")
async def edit(request: Request, room: OfRoom, form: Annotated[EditForm, Form()]) -> Response:
    await expensive(request)
    await room.edit(form.message, form.text, form.request)
    return answered(request, room)


@router.post("/chat/{room}/again")
async def again(request: Request, room: OfRoom, form: Annotated[AgainForm, Form()]) -> Response:
    await expensive(request)
    await room.regenerate(form.message, form.request, form.model or None)
    return answered(request, room)


@router.post("/chat/{room}/go-on")
async def go_on(request: Request, room: OfRoom, form: Annotated[MessageForm, Form()]) -> Response:
    await expensive(request)
    await room.go_on(form.message)
    return answered(request, room)


@router.post("/chat/{room}/choose")
async def choose(request: Request, room: OfRoom, form: Annotated[MessageForm, Form()]) -> Response:
    await room.choose(form.message)
    return answered(request, room)


@router.post("/chat/{room}/rate")
async def rate(request: Request, room: OfRoom, form: Annotated[RateForm, Form()]) -> Response:
    await room.rate(form.message, form.rating)
    return answered(request, room)


@router.post("/chat/{room}/teach")
async def teach(request: Request, room: OfRoom, studio: OfStudio, form: Annotated[TeachForm, Form()]) -> Response:
    """Have a session learn from an answer. A script is told where that can be looked at; a form goes there."""
    await expensive(request)
    prompt, options, choice = studio.rooms.said_of(room, form.message)
    what = f"an answer in “{room.title}”"
    await studio.fits.teach(form.session, prompt, options, choice, what, form.request)
    if "hx-request" in request.headers:
        name = (await studio.steering.session(form.session)).name
        event = {"trellis:taught": {"message": form.message, "session": name, "url": f"/steer/{form.session}/log#fits"}}
        return Response(status_code=204, headers={"hx-trigger": json.dumps(event)})
    return RedirectResponse(f"/steer/{form.session}/log#fits", 303)


@router.post("/chat/{room}/rename")
async def rename(request: Request, room: OfRoom, form: Annotated[RenameForm, Form()]) -> Response:
    await room.change(title=form.title.strip())
    return answered(request, room)


@router.post("/chat/{room}/settings")
async def settings(request: Request, room: OfRoom, studio: OfStudio, form: Annotated[SettingsForm, Form()]) -> Response:
    try:
        await room.change(system=form.system, sampling=form.sampling())
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await show_room(request, room, studio, error=error)
    return answered(request, room)


@router.post("/chat/{room}/archive")
async def archive(room: OfRoom, form: Annotated[ArchiveForm, Form()]) -> Response:
    await room.change(archived=form.archived)
    return RedirectResponse("/chat?done=archived" if form.archived else f"/chat/{room.id}?done=unarchived", 303)


@router.post("/chat/{room}/delete")
async def delete(room: str, studio: OfStudio) -> Response:
    await studio.rooms.delete(room)
    return RedirectResponse("/chat?done=deleted", 303)
