"""The JSON API of rooms: made, read, said into, changed, taken away, brought in. The socket at /ws/chat/{room} is the
live way."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import AfterValidator, Field
from starlette.responses import Response

from ...studio.chat.exports import FORMATS, written
from ...studio.chat.imports import import_rooms
from ...studio.chat.room import MOST_MODELS, Room
from ...studio.jobs import as_json
from ...studio.studio import Studio
from ...text_rules import PROMPT_LIMIT, storable
from ..access import MAX_FILE
from ..downloads import attachment, slug
from ..rate_limits import expensive
from .steering import Body, Name, OfStudio, RequestId, studio_of

router = APIRouter(prefix="/api/rooms", tags=["chat"])

ModelName = Annotated[str, Field(min_length=1, max_length=300)]
System = Annotated[str, Field(max_length=20_000), AfterValidator(storable)]


class NewRoom(Body):
    title: Name | None = None
    models: list[ModelName] = Field([], max_length=MOST_MODELS)
    system: System = ""
    sampling: dict[str, float | int] = Field({})


class Change(Body):
    title: Name | None = None
    models: list[ModelName] | None = Field(None, min_length=1, max_length=MOST_MODELS)
    system: System | None = None
    sampling: dict[str, float | int] | None = None
    archived: bool | None = None


class NewMessage(Body):
    text: Annotated[str, Field(max_length=PROMPT_LIMIT), AfterValidator(storable)]
    parent: str | None = Field(None, max_length=100)
    models: list[ModelName] = Field([], max_length=MOST_MODELS)
    sampling: dict[str, float | int] | None = None
    attachments: list[Annotated[str, Field(max_length=100)]] = Field([], max_length=20)


class Teach(Body):
    message: str = Field(max_length=100)
    session: str = Field(max_length=100)


class NewPrompt(Body):
    name: Name
    text: Annotated[str, Field(min_length=1, max_length=20_000), AfterValidator(storable)]


async def room_of(room: str, studio: Annotated[Studio, Depends(studio_of)]) -> Room:
    return await studio.rooms.room(room)


OfRoom = Annotated[Room, Depends(room_of)]


@router.get("")
async def rooms(
    studio: OfStudio, q: Annotated[str, Query(max_length=200)] = "", archived: bool = False
) -> list[dict[str, Any]]:
    """Rooms in whose title or text all words of `q` occur, the last used first."""
    return await studio.rooms.found(q, archived)


@router.post("", status_code=201, dependencies=[Depends(expensive)])
async def create(body: NewRoom, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    room = await studio.rooms.create(
        title=body.title or "", models=body.models, system=body.system, sampling=body.sampling, request=request
    )
    return room.as_json()


@router.get("/speakers")
async def speakers(studio: OfStudio) -> list[dict[str, Any]]:
    """Everybody who can be talked to: models and sessions."""
    return await studio.speakers.everybody()


@router.get("/speakers/{session}/versions")
async def versions(session: str, studio: OfStudio) -> list[dict[str, Any]]:
    """The steps of a session that can be talked to, the newest first."""
    return await studio.speakers.versions(session)


@router.get("/prompts")
async def prompts(studio: OfStudio) -> list[dict[str, Any]]:
    """The prompt library."""
    return await studio.rooms.prompts()


@router.put("/prompts")
async def keep_prompt(body: NewPrompt, studio: OfStudio) -> list[dict[str, Any]]:
    """Keep a prompt in the library, in place of the one of that name."""
    await studio.rooms.keep_prompt(body.name.strip(), body.text)
    return await studio.rooms.prompts()


@router.delete("/prompts/{prompt}", status_code=204)
async def drop_prompt(prompt: str, studio: OfStudio) -> Response:
    await studio.rooms.drop_prompt(prompt)
    return Response(status_code=204)


@router.post("/import", status_code=201, dependencies=[Depends(expensive)], max_body_size=MAX_FILE)
async def take_in(request: Request, studio: OfStudio) -> dict[str, Any]:
    """Rooms from a body: our JSON, Markdown, or what other programs export. Every conversation that can be read becomes
    one of `rooms`; `left_out` names those that cannot, `notes` what of others could not be kept."""
    return (await import_rooms(studio.rooms, await request.body())).as_json()


@router.post("/new/files", dependencies=[Depends(expensive)], max_body_size=MAX_FILE)
async def check_file(
    request: Request,
    studio: OfStudio,
    name: Annotated[str, Query(min_length=1, max_length=300)],
    model: Annotated[list[ModelName], Query(max_length=MOST_MODELS)] = [],  # noqa: B006
) -> dict[str, Any]:
    """What the body would be as a file of a room that is not there yet; it is not kept. Refuses as adding it does."""
    data = await request.body()
    await studio.speakers.require_sight(model, data)
    read = await studio.attachments.read(name, data)
    return {each: read[each] for each in ("name", "kind", "bytes")} | {"characters": len(read["text"])}


@router.get("/{room}")
async def state(room: OfRoom) -> dict[str, Any]:
    """A room with all its messages."""
    messages, last = await room.view(list(room.messages.values()))
    return room.as_json() | {"messages": messages, "last": last}


@router.patch("/{room}")
async def change(body: Change, room: OfRoom) -> dict[str, Any]:
    await room.change(
        title=body.title, system=body.system, models=body.models, sampling=body.sampling, archived=body.archived
    )
    return room.as_json()


@router.delete("/{room}", status_code=204)
async def delete(room: str, studio: OfStudio) -> Response:
    await studio.rooms.delete(room)
    return Response(status_code=204)


@router.post("/{room}/messages", status_code=202, dependencies=[Depends(expensive)])
async def send(body: NewMessage, room: OfRoom, request: RequestId) -> dict[str, Any]:
    """Say something; it is answered as the events of the socket tell."""
    message = await room.send(
        body.text, request, parent=body.parent, models=body.models, sampling=body.sampling, files=body.attachments
    )
    return {"request": request, "message": message.id}


@router.post("/{room}/files", status_code=201, dependencies=[Depends(expensive)], max_body_size=MAX_FILE)
async def add_file(
    request: Request,
    room: OfRoom,
    studio: OfStudio,
    name: Annotated[str, Query(min_length=1, max_length=300)],
    model: Annotated[list[ModelName], Query(max_length=MOST_MODELS)] = [],  # noqa: B006
) -> dict[str, Any]:
    """Add the body as a file, which a message may then name: text, code, a PDF, or a picture for a model that sees.
    Where `model` names who is to answer, a picture that one of them cannot see is refused."""
    data = await request.body()
    await studio.speakers.require_sight(model, data)
    return await studio.attachments.add(room.id, name, data)


@router.get("/{room}/files/{file}")
async def get_file(room: OfRoom, studio: OfStudio, file: str) -> Response:
    """A file as it was sent, as a download."""
    about = await room.file(file)
    headers = attachment(about["name"]) | {"content-security-policy": "sandbox"}
    return Response(await studio.attachments.content(file), media_type="application/octet-stream", headers=headers)


@router.post("/{room}/teach", status_code=202, dependencies=[Depends(expensive)])
async def teach(body: Teach, room: OfRoom, studio: OfStudio, request: RequestId) -> dict[str, Any]:
    """Have a session learn from what was said of an answer: a job whose result is a step of its tree."""
    prompt, options, choice = studio.rooms.said_of(room, body.message)
    what = f"an answer in “{room.title}”"
    return as_json((await studio.fits.teach(body.session, prompt, options, choice, what, request)).row)


@router.post("/{room}/stop", status_code=202)
async def stop(room: OfRoom) -> dict[str, Any]:
    """Stop all answers that grow."""
    await room.stop()
    return room.as_json()


@router.get("/{room}/export")
async def export(room: OfRoom, format: Literal["json", "markdown", "open-webui"] = "json") -> Response:
    """A room to take away: all of it, the branch that is looked at as Markdown, or as open-webui reads it."""
    kind, ending = FORMATS[format]
    name = f"{slug(room.title, 'chat')}.{ending}"
    text = await asyncio.to_thread(written, room, format)  # of thousands of messages, longer than the loop may be held
    return Response(text, media_type=kind, headers=attachment(name))
