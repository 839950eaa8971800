"""The JSON API of exports: what was taken away, as folders on the server and as zips."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path
from starlette.responses import Response, StreamingResponse

from ...studio.review.exports import zipped
from .steering import OfStudio

router = APIRouter(prefix="/api/exports", tags=["exports"])

Name = Annotated[str, Path(max_length=200)]


@router.get("")
async def exports(studio: OfStudio) -> list[dict[str, Any]]:
    return await studio.exports.all()


@router.get("/{name}")
async def export(name: Name, studio: OfStudio) -> dict[str, Any]:
    return await studio.exports.get(name)


@router.get("/{name}/zip", response_class=StreamingResponse)
async def download(name: Name, studio: OfStudio) -> StreamingResponse:
    """All files of an export as a zip, made while it is sent."""
    files = await studio.exports.files(name)
    disposition = f"attachment; filename*=UTF-8''{quote(name)}.zip"
    return StreamingResponse(zipped(files), media_type="application/zip", headers={"content-disposition": disposition})


@router.delete("/{name}", status_code=204)
async def delete(name: Name, studio: OfStudio) -> Response:
    await studio.exports.delete(name)
    return Response(status_code=204)
