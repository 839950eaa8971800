"""The JSON API of models."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.responses import Response

from ...options import ModelOptions
from ...studio.jobs import job_json
from ..rate_limits import enforce_rate_limit
from .steering import RequestIdDep, StudioDep

router = APIRouter(prefix="/api/models", tags=["models"])


class LoadModel(ModelOptions):
    """A model, and how to load it. `context_length` is used by the memory estimate only."""

    model: str = Field(min_length=1, max_length=200)
    context_length: int | None = Field(None, ge=64, le=131_072)

    def options(self) -> ModelOptions:
        return ModelOptions.model_validate({name: getattr(self, name) for name in ModelOptions.model_fields})


@router.get("")
async def models(studio: StudioDep) -> list[dict[str, Any]]:
    """Known models: id, kind, source, size, state, memory estimate, and the engines that hold each."""
    return await studio.models.list_models()


@router.post("/load", status_code=202, dependencies=[Depends(enforce_rate_limit)])
async def load(body: LoadModel, studio: StudioDep, request: RequestIdDep) -> dict[str, Any]:
    """Start loading a model. For a loaded one, return the job that loaded it."""
    return job_json((await studio.models.load(body.options(), request)).row)


@router.post("/{model:path}/unload", status_code=202)
async def unload(model: Annotated[str, Field(max_length=200)], studio: StudioDep) -> dict[str, str]:
    """Unload a model: stop all its engines."""
    await studio.models.unload(model)
    return {"model": model, "state": "unloaded"}


@router.delete("/{model:path}", status_code=204)
async def delete(model: Annotated[str, Field(max_length=200)], studio: StudioDep) -> Response:
    """Delete the files of a model that was uploaded, put here, or downloaded."""
    await studio.models.delete(model)
    return Response(status_code=204)
