"""The JSON API of rooms. The WebSocket at /ws/chat/{room} does the same live."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import AfterValidator, Field
from starlette.responses import Response

from ...studio.chat import EXPORT_FORMATS, MAX_MODELS, Room, export_room, import_rooms
from ...studio.jobs import job_json
from ...studio.studio import Studio
from ...text_rules import PROMPT_LIMIT, require_storable
from ..access import MAX_FILE
from ..downloads import attachment, slug
from ..rate_limits import enforce_rate_limit
from .steering import Name, RequestBody, RequestIdDep, StudioDep, get_studio

router = APIRouter(prefix="/api/rooms", tags=["chat"])

ModelName = Annotated[str, Field(min_length=1, max_length=300)]
SystemPrompt = Annotated[str, Field(max_length=20_000), AfterValidator(require_storable)]


class NewRoom(RequestBody):
    title: Name | None = None
    models: list[ModelName] = Field([], max_length=MAX_MODELS)
    system: SystemPrompt = ""
    sampling: dict[str, float | int] = Field({})


class RoomChange(RequestBody):
    title: Name | None = None
    models: list[ModelName] | None = Field(None, min_length=1, max_length=MAX_MODELS)
    system: SystemPrompt | None = None
    sampling: dict[str, float | int] | None = None
    archived: bool | None = None


class NewMessage(RequestBody):
    text: Annotated[str, Field(max_length=PROMPT_LIMIT), AfterValidator(require_storable)]
    parent: str | None = Field(None, max_length=100)
    models: list[ModelName] = Field([], max_length=MAX_MODELS)
    sampling: dict[str, float | int] | None = None
    attachments: list[Annotated[str, Field(max_length=100)]] = Field([], max_length=20)


class Teach(RequestBody):
    message: str = Field(max_length=100)
    session: str = Field(max_length=100)


class NewPrompt(RequestBody):
    name: Name
    text: Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(require_storable)]


async def get_room(room: str, studio: Annotated[Studio, Depends(get_studio)]) -> Room:
    return await studio.rooms.room(room)


RoomDep = Annotated[Room, Depends(get_room)]


@router.get("")
async def rooms(
    studio: StudioDep, q: Annotated[str, Query(max_length=200)] = "", archived: bool = False
) -> list[dict[str, Any]]:
    """Rooms whose title or text contains all words of `q`, last used first."""
    return await studio.rooms.search(q, archived)


@router.post("", status_code=201, dependencies=[Depends(enforce_rate_limit)])
async def create(body: NewRoom, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    room = await studio.rooms.create(
        title=body.title or "", models=body.models, system=body.system, sampling=body.sampling, request=request
    )
    return room.as_json()


@router.get("/speakers")
async def chat_targets(studio: StudioDep) -> list[dict[str, Any]]:
    """All chat targets: models, sessions and external models."""
    return await studio.chat_targets.list_targets()


@router.get("/speakers/{session}/versions")
async def versions(session: str, studio: StudioDep) -> list[dict[str, Any]]:
    """The steps of a session that can answer, newest first."""
    return await studio.chat_targets.list_versions(session)


@router.get("/prompts")
async def prompts(studio: StudioDep) -> list[dict[str, Any]]:
    """The prompt library."""
    return await studio.rooms.list_prompts()


@router.put("/prompts")
async def save_prompt(body: NewPrompt, studio: StudioDep) -> list[dict[str, Any]]:
    """Save a prompt in the library, replacing the one of that name."""
    await studio.rooms.save_prompt(body.name.strip(), body.text)
    return await studio.rooms.list_prompts()


@router.delete("/prompts/{prompt}", status_code=204)
async def delete_prompt(prompt: str, studio: StudioDep) -> Response:
    await studio.rooms.delete_prompt(prompt)
    return Response(status_code=204)


@router.post("/import", status_code=201, dependencies=[Depends(enforce_rate_limit)], max_body_size=MAX_FILE)
async def import_chats(request: Request, studio: StudioDep) -> dict[str, Any]:
    """Import the body: our JSON, Markdown, or what other programs export. Every readable conversation becomes one of
    `rooms`; `left_out` names the others, `notes` what could not be kept."""
    return (await import_rooms(studio.rooms, await request.body())).as_json()


@router.post("/new/files", dependencies=[Depends(enforce_rate_limit)], max_body_size=MAX_FILE)
async def check_file(
    request: Request,
    studio: StudioDep,
    name: Annotated[str, Query(min_length=1, max_length=300)],
    model: Annotated[list[ModelName], Query(max_length=MAX_MODELS)] = [],  # noqa: B006
) -> dict[str, Any]:
    """Check the body as an attachment before its room exists; it is not stored. Errors are those of adding it."""
    data = await request.body()
    await studio.chat_targets.require_picture_support_for(model, data)
    read = await studio.attachments.read(name, data)
    return {each: read[each] for each in ("name", "kind", "bytes")} | {"characters": len(read["text"])}


@router.get("/{room}")
async def state(room: RoomDep) -> dict[str, Any]:
    """A room with all its messages."""
    messages, last = await room.rendered_messages(list(room.messages.values()))
    return room.as_json() | {"messages": messages, "last": last}


@router.patch("/{room}")
async def change(body: RoomChange, room: RoomDep) -> dict[str, Any]:
    await room.update_settings(
        title=body.title, system=body.system, models=body.models, sampling=body.sampling, archived=body.archived
    )
    return room.as_json()


@router.delete("/{room}", status_code=204)
async def delete(room: str, studio: StudioDep) -> Response:
    await studio.rooms.delete(room)
    return Response(status_code=204)


@router.post("/{room}/messages", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def send(body: NewMessage, room: RoomDep, request: RequestIdDep) -> dict[str, Any]:
    """Send a message. It is answered in the events of the socket."""
    message = await room.send(
        body.text, request, parent=body.parent, models=body.models, sampling=body.sampling, files=body.attachments
    )
    return {"request": request, "message": message.id}


@router.post("/{room}/files", status_code=201, dependencies=[Depends(enforce_rate_limit)], max_body_size=MAX_FILE)
async def add_file(
    request: Request,
    room: RoomDep,
    studio: StudioDep,
    name: Annotated[str, Query(min_length=1, max_length=300)],
    model: Annotated[list[ModelName], Query(max_length=MAX_MODELS)] = [],  # noqa: B006
) -> dict[str, Any]:
    """Add the body as an attachment that a message may name: text, code, a PDF or a picture. A picture is refused
    where one of the targets in `model` does not accept it."""
    data = await request.body()
    await studio.chat_targets.require_picture_support_for(model, data)
    return await studio.attachments.add(room.id, name, data)


@router.get("/{room}/files/{file}")
async def get_file(room: RoomDep, studio: StudioDep, file: str) -> Response:
    """Download an attachment."""
    (about,) = await studio.attachments.find(room.id, [file], "file")
    headers = attachment(about["name"]) | {"content-security-policy": "sandbox"}
    return Response(await studio.attachments.read_content(file), media_type="application/octet-stream", headers=headers)


@router.post("/{room}/teach", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def teach(body: Teach, room: RoomDep, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Train a session on the ratings of an answer: a job whose result is a step of its tree."""
    prompt, options, choice = studio.rooms.choice_from_answer(room, body.message)
    what = f"an answer in “{room.title}”"
    return job_json((await studio.retraining.learn_from_chat(body.session, prompt, options, choice, what, request)).row)


@router.post("/{room}/stop", status_code=202)
async def stop(room: RoomDep) -> dict[str, Any]:
    """Stop all answers in progress."""
    await room.stop()
    return room.as_json()


@router.get("/{room}/export")
async def export(room: RoomDep, format: Literal["json", "markdown", "open-webui"] = "json") -> Response:
    """Export a room: everything as JSON, the selected branch as Markdown, or open-webui's format."""
    kind, ending = EXPORT_FORMATS[format]
    name = f"{slug(room.title, 'chat')}.{ending}"
    text = await asyncio.to_thread(
        export_room, room, format
    )  # a thread: thousands of messages would block the event loop
    return Response(text, media_type=kind, headers=attachment(name))
