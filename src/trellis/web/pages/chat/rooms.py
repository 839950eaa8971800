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
from ....options import Sampling
from ....studio.chat import DEFAULT_SAMPLING, MAX_MODELS, ImportResult, Message, Room, import_rooms
from ....studio.studio import Studio
from ....text_rules import PROMPT_LIMIT
from ...access import MAX_FILE
from ...api.rooms import RoomDep
from ...api.steering import Name, StudioDep
from ...error_responses import status_of
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from ..steering.workbench import ActionForm

router = APIRouter(include_in_schema=False)

ROOMS_SHOWN = 60
"""Rooms in the list before a person asks for all, or searches."""

MESSAGES_SHOWN = 200
"""Messages of a branch that a page shows before a person asks for all."""


@dataclass(frozen=True)
class ThreadTurn:
    """One place in the thread: a message, or several answers side by side, with its branches."""

    message: dict[str, Any]
    columns: list[dict[str, Any]]
    branches: list[str]
    branch_index: int
    is_unanswered: bool
    answers_standalone_prompt: bool
    """Whether it answers a first prompt, as lessons of a session must."""
    can_continue: frozenset[str] = frozenset()
    """Ids of answers that can be continued."""
    likely_session: str = ""
    """The session that is the likeliest to learn from it; empty where none is likelier than others."""


class SendForm(ActionForm):
    text: str = ""
    """As long as a body may be: a message that is too long comes back with the reason, and is not lost."""
    models: list[Annotated[str, Field(max_length=300)]] = Field([], max_length=MAX_MODELS)


class MessageForm(ActionForm):
    message: str = Field(max_length=100)


class EditForm(MessageForm):
    text: str


class RegenerateForm(MessageForm):
    model: str = Field("", max_length=300)


class RateForm(MessageForm):
    rating: int


class TeachForm(MessageForm):
    session: str = Field(max_length=100)


class RenameForm(ActionForm):
    title: Name


class SettingsForm(ActionForm):
    system: str = Field("", max_length=20_000)
    temperature: str = Field("", max_length=20)
    top_p: str = Field("", max_length=20)
    min_p: str = Field("", max_length=20)
    max_new_tokens: str = Field("", max_length=20)

    def sampling(self) -> dict[str, Any]:
        given = {name: getattr(self, name).strip() for name in ("temperature", "top_p", "min_p", "max_new_tokens")}
        return {name: value for name, value in given.items() if value}


class ArchiveForm(ActionForm):
    archived: bool


@router.get("/chat")
async def page(
    request: Request,
    studio: StudioDep,
    q: Annotated[str, Query(max_length=200)] = "",
    archived: bool = False,
    all: bool = False,
    model: Annotated[str, Query(max_length=300)] = "",
    current: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Begin a room, or find one. The list alone when a script asks."""
    if "hx-request" in request.headers:
        return get_renderer(request).html_response(
            "chat/_rooms.html", current=current, **await room_list_context(studio, q, archived, all)
        )
    return await render_start_page(request, studio, q=q, archived=archived, all=all, model=model)


async def render_start_page(
    request: Request,
    studio: Studio,
    *,
    q: str = "",
    archived: bool = False,
    all: bool = False,
    model: str = "",
    text: str = "",
    error: TrellisError | None = None,
    imported: ImportResult | None = None,
) -> HTMLResponse:
    speakers = await studio.chat_targets.list_targets()
    listed = not model or model in {each["name"] for each in speakers}
    return get_renderer(request).html_response(
        "chat/start.html",
        status_of(error) if error else 200,
        place="chat",
        current="",
        text=text,
        chosen=[model or "demo"],
        speakers=speakers,
        known=[] if listed else [(model, await studio.chat_targets.label_of(model))],
        most=MAX_MODELS,
        longest=PROMPT_LIMIT,
        error=error.as_json() if error else None,
        imported=imported,
        done=done_before(request),
        request_id=secrets.token_hex(12),
        **await room_list_context(studio, q, archived, all),
    )


async def room_list_context(studio: Studio, q: str = "", archived: bool = False, all: bool = False) -> dict[str, Any]:
    found = await studio.rooms.search(q, archived)
    shown = found if all or q else found[:ROOMS_SHOWN]
    return {"rooms": shown, "total": len(found), "q": q, "archived": archived}


@router.post("/chat")
async def create_room(request: Request, studio: StudioDep, form: Annotated[SendForm, Form()]) -> Response:
    """Create a room, with a first message if one was sent."""
    await enforce_rate_limit(request)
    try:
        room = await studio.rooms.create(models=[each for each in form.models if each], request=form.request)
        if form.text.strip():
            await room.send(form.text, f"{form.request}-first")
    except TrellisError as error:
        model = form.models[0] if form.models else ""
        return await render_start_page(request, studio, model=model, text=form.text, error=error)
    return RedirectResponse(f"/chat/{room.id}", 303)


@router.post("/chat/import", max_body_size=MAX_FILE)
async def import_chats(request: Request, studio: StudioDep, file: UploadFile) -> Response:
    """Rooms from a file."""
    await enforce_rate_limit(request)
    try:
        imported = await import_rooms(studio.rooms, await file.read())
    except TrellisError as error:
        return await render_start_page(request, studio, error=error)
    if len(imported.rooms) == 1 and not imported.left_out and not imported.notes:
        return RedirectResponse(f"/chat/{imported.rooms[0].id}", 303)
    return await render_start_page(request, studio, imported=imported)


@router.get("/chat/{room}")
async def room_page(request: Request, room: RoomDep, studio: StudioDep, all: bool = False) -> HTMLResponse:
    """A room: its thread, and where to write."""
    return await render_room(request, room, studio, all)


async def render_room(
    request: Request, room: Room, studio: Studio, all: bool = False, error: TrellisError | None = None, text: str = ""
) -> HTMLResponse:
    turns, after, earlier = await load_thread(room, all)
    speakers = await studio.chat_targets.list_targets()
    names = {each["name"] for each in speakers}
    known = [(name, await studio.chat_targets.label_of(name)) for name in room.models if name not in names]
    return await asyncio.to_thread(
        get_renderer(request).html_response,
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
        most=MAX_MODELS,
        longest=PROMPT_LIMIT,
        done=done_before(request),
        fields=sampling_fields(room.sampling),
        text=text,
        error=error.as_json() if error else None,
        request_id=secrets.token_hex(12),
        **await room_list_context(studio),
    )


def done_before(request: Request) -> str:
    """Return the action that led to this page, as a key of `_notice.html`."""
    return request.query_params.get("done", "")


def sampling_fields(sampling: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of sampling as a form shows them."""
    found = []
    for name, row in Sampling.model_fields.items():
        found.append({
            "name": name, "title": row.title, "help": row.description, "value": sampling.get(name, ""),
            "default": getattr(DEFAULT_SAMPLING, name),
        })  # fmt: skip
    return found


async def load_thread(room: Room, all: bool = False) -> tuple[list[ThreadTurn], int, int]:
    """The branch that is looked at, the last event before it was, and how many earlier messages are not shown."""
    path = room.path(room.head)
    shown = path if all else path[-MESSAGES_SHOWN:]
    columns = {message.id: parallel_answers(room, message) for message in shown}
    wanted = {each.id: each for message in shown for each in columns[message.id]}
    message_views, after = await room.rendered_messages(list(wanted.values()))
    by_id = {each["id"]: message_context(each) for each in message_views}
    continuable = frozenset([each.id for each in wanted.values() if await room.can_continue(each)])
    turns = [make_turn(room, message, by_id, columns[message.id], continuable) for message in shown]
    return turns, after, len(path) - len(shown)


async def list_sessions(studio: Studio) -> list[dict[str, Any]]:
    """The sessions that may learn from an answer."""
    return [each for each in await studio.chat_targets.list_targets() if each["kind"] == "session"]


def parallel_answers(room: Room, message: Message) -> list[Message]:
    """The answers that were asked for together with one; itself alone where it was not."""
    if message.group is None:
        return [message]
    return [each for each in room.children(message.parent) if each.group == message.group]


def message_context(message: dict[str, Any]) -> dict[str, Any]:
    """A message as a template shows it: whole blocks as HTML, what comes after them as text."""
    return (
        message
        | {
            "html": Markup(message["html"]),  # noqa: S704 - sanitised when it was rendered
            "tail": message["text"][message["shown"] :],
        }
    )


def make_turn(
    room: Room, message: Message, by_id: dict[str, dict[str, Any]], columns: list[Message], continuable: frozenset[str]
) -> ThreadTurn:
    """Return a turn with its branches; in a comparison, the answer on the current branch stands for all."""
    branches: list[str] = []
    seen: set[str] = set()
    for each in room.children(message.parent):
        if each.group is None or each is message or (each.group not in seen and each.group != message.group):
            branches.append(each.id)
        seen.add(each.group or "")
    return ThreadTurn(
        by_id[message.id], [by_id[each.id] for each in columns] if len(columns) > 1 else [], branches,
        branches.index(message.id), not room.children(message.id), answers_standalone_prompt(room, message),
        continuable,
        likeliest_session(room, message),
    )  # fmt: skip


def likeliest_session(room: Room, message: Message) -> str:
    """The id of the session that answered, or one beside it, or that is chosen in the room."""
    answers = [message, *room.children(message.parent)[::-1]]
    names = [*(each.model for each in answers if each.model), *room.models]
    return next((name.removeprefix("session:").split("@")[0] for name in names if name.startswith("session:")), "")


def answers_standalone_prompt(room: Room, message: Message) -> bool:
    prompt = room.messages.get(message.parent or "")
    return prompt is not None and prompt.parent is None and not prompt.files and not room.system


@router.get("/chat/{room}/thread")
async def thread(request: Request, room: RoomDep, studio: StudioDep, all: bool = False) -> HTMLResponse:
    """The thread alone, for a page that is open."""
    sessions = await list_sessions(studio)
    turns, after, earlier = await load_thread(room, all)
    page = get_renderer(request).html_response
    return await asyncio.to_thread(
        page, "chat/_thread.html", room=room.as_json(), turns=turns, after=after, earlier=earlier, sessions=sessions
    )


@router.get("/chat/{room}/messages/{message}")
async def one_message(request: Request, room: RoomDep, studio: StudioDep, message: str) -> HTMLResponse:
    """Render one turn of the thread: a message and the answers beside it."""
    found = room.message(message)
    columns = parallel_answers(room, found)
    sessions = await list_sessions(studio)
    if len(columns) > 1:  # of a comparison, the answer that is on the branch
        on_branch = {each.id for each in room.path(room.head)}
        found = next((each for each in columns if each.id in on_branch), columns[0])
    message_views, after = await room.rendered_messages(columns)
    continuable = frozenset([each.id for each in columns if await room.can_continue(each)])
    turn = make_turn(room, found, {each["id"]: message_context(each) for each in message_views}, columns, continuable)
    return get_renderer(request).html_response(
        "chat/_turn.html", room=room.as_json(), turn=turn, after=after, sessions=sessions
    )


def action_response(request: Request, room: Room) -> Response:
    """Answer an action: 204 for a script, which follows the socket; a redirect for a plain form."""
    if "hx-request" in request.headers:
        return Response(status_code=204)
    return RedirectResponse(f"/chat/{room.id}#end", 303)


@router.post("/chat/{room}/send")
async def send(request: Request, room: RoomDep, studio: StudioDep, form: Annotated[SendForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    try:
        await room.send(form.text, form.request, models=[each for each in form.models if each])
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await render_room(request, room, studio, error=error, text=form.text)
    return action_response(request, room)


@router.post("/chat/{room}/stop")
async def stop(request: Request, room: RoomDep) -> Response:
    await room.stop()
    return action_response(request, room)


@router.post("/chat/{room}/edit")
async def edit(request: Request, room: RoomDep, form: Annotated[EditForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    await room.edit(form.message, form.text, form.request)
    return action_response(request, room)


@router.post("/chat/{room}/again")
async def regenerate(request: Request, room: RoomDep, form: Annotated[RegenerateForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    await room.regenerate(form.message, form.request, form.model or None)
    return action_response(request, room)


@router.post("/chat/{room}/go-on")
async def continue_answer(request: Request, room: RoomDep, form: Annotated[MessageForm, Form()]) -> Response:
    await enforce_rate_limit(request)
    await room.continue_answer(form.message)
    return action_response(request, room)


@router.post("/chat/{room}/choose")
async def choose(request: Request, room: RoomDep, form: Annotated[MessageForm, Form()]) -> Response:
    await room.select_branch(form.message)
    return action_response(request, room)


@router.post("/chat/{room}/rate")
async def rate(request: Request, room: RoomDep, form: Annotated[RateForm, Form()]) -> Response:
    await room.rate(form.message, form.rating)
    return action_response(request, room)


@router.post("/chat/{room}/teach")
async def teach(request: Request, room: RoomDep, studio: StudioDep, form: Annotated[TeachForm, Form()]) -> Response:
    """Train a session on an answer. A script gets the address of the result, a form is redirected to it."""
    await enforce_rate_limit(request)
    prompt, options, choice = studio.rooms.choice_from_answer(room, form.message)
    what = f"an answer in “{room.title}”"
    await studio.retraining.learn_from_chat(form.session, prompt, options, choice, what, form.request)
    if "hx-request" in request.headers:
        name = (await studio.steering.session(form.session)).name
        event = {"trellis:taught": {"message": form.message, "session": name, "url": f"/steer/{form.session}/log#fits"}}
        return Response(status_code=204, headers={"hx-trigger": json.dumps(event)})
    return RedirectResponse(f"/steer/{form.session}/log#fits", 303)


@router.post("/chat/{room}/rename")
async def rename(request: Request, room: RoomDep, form: Annotated[RenameForm, Form()]) -> Response:
    await room.update_settings(title=form.title.strip())
    return action_response(request, room)


@router.post("/chat/{room}/settings")
async def settings(
    request: Request, room: RoomDep, studio: StudioDep, form: Annotated[SettingsForm, Form()]
) -> Response:
    try:
        await room.update_settings(system=form.system, sampling=form.sampling())
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await render_room(request, room, studio, error=error)
    return action_response(request, room)


@router.post("/chat/{room}/archive")
async def archive(room: RoomDep, form: Annotated[ArchiveForm, Form()]) -> Response:
    await room.update_settings(archived=form.archived)
    return RedirectResponse("/chat?done=archived" if form.archived else f"/chat/{room.id}?done=unarchived", 303)


@router.post("/chat/{room}/delete")
async def delete(room: str, studio: StudioDep) -> Response:
    await studio.rooms.delete(room)
    return RedirectResponse("/chat?done=deleted", 303)
