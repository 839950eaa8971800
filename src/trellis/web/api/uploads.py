"""The JSON API of uploads: sent in pieces, resumable."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import Response

from ...errors import Invalid
from ...studio.uploads import CHUNK_BYTES, MAX_FILES
from ..rate_limits import enforce_rate_limit
from .steering import RequestBody, StudioDep

router = APIRouter(prefix="/api/uploads", tags=["uploads"])


class File(RequestBody):
    path: str = Field(min_length=1, max_length=200)
    bytes: int = Field(ge=0, le=10**13)


class NewUpload(RequestBody):
    kind: Literal["prompts", "model"]
    name: str = Field(min_length=1, max_length=200)
    files: list[File] = Field(min_length=1, max_length=MAX_FILES)
    mark: str = Field("", max_length=20_000, description="Tells these files from others of the same names and sizes.")


@router.post("", dependencies=[Depends(enforce_rate_limit)])
async def begin(body: NewUpload, studio: StudioDep) -> dict[str, Any]:
    """Begin an upload. The same names and sizes again resume it; the answer has what was received."""
    return await studio.uploads.begin(body.kind, body.name, [(file.path, file.bytes) for file in body.files], body.mark)


@router.get("/{upload}")
async def state(upload: str, studio: StudioDep) -> dict[str, Any]:
    return await studio.uploads.state(upload)


@router.put("/{upload}/files/{number}")
async def append(
    upload: str, number: int, request: Request, studio: StudioDep, offset: Annotated[int, Query(ge=0, le=10**13)]
) -> dict[str, Any]:
    """Append the body, at most a megabyte, to a file that has `offset` bytes so far. A wrong offset answers 409 with
    the right one."""
    chunk = await request.body()
    if not 0 < len(chunk) <= CHUNK_BYTES:
        raise Invalid(
            f"A piece must have 1 to {CHUNK_BYTES} bytes, got “{len(chunk)}”.",
            field="",
            next_step="Send smaller pieces.",
        )
    return await studio.uploads.append(upload, number, offset, chunk)


@router.delete("/{upload}", status_code=204)
async def cancel(upload: str, studio: StudioDep) -> Response:
    """Cancel an upload, and delete what was received."""
    await studio.uploads.cancel(upload)
    return Response(status_code=204)
