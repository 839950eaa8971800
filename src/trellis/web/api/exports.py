"""The JSON API of exports, as folders on the server and as zips."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Path
from starlette.responses import Response, StreamingResponse

from ...studio.review import stream_zip
from .steering import StudioDep

router = APIRouter(prefix="/api/exports", tags=["exports"])

ExportName = Annotated[str, Path(max_length=200)]


@router.get("")
async def exports(studio: StudioDep) -> list[dict[str, Any]]:
    return await studio.exports.list_exports()


@router.get("/{name}")
async def export(name: ExportName, studio: StudioDep) -> dict[str, Any]:
    return await studio.exports.get(name)


@router.get("/{name}/zip", response_class=StreamingResponse)
async def download(name: ExportName, studio: StudioDep) -> StreamingResponse:
    """Download all files of an export as a zip, made while it is sent."""
    files = await studio.exports.files(name)
    disposition = f"attachment; filename*=UTF-8''{quote(name)}.zip"
    return StreamingResponse(
        stream_zip(files), media_type="application/zip", headers={"content-disposition": disposition}
    )


@router.delete("/{name}", status_code=204)
async def delete(name: ExportName, studio: StudioDep) -> Response:
    await studio.exports.delete(name)
    return Response(status_code=204)
