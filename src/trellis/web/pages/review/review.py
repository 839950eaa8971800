"""Looking back on a session and taking its result away: narrative, figures, journal, exports; two nodes compared."""

from __future__ import annotations

import asyncio
import re
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from markupsafe import Markup
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse, Response

from ....errors import TrellisError
from ....markdown import to_html
from ....studio.jobs import timestamp
from ....studio.review import CHOICE_FORMATS, describe_choice, journal_markdown, write_narrative
from ....studio.steering import Node, Session, drift_of, step_name
from ....studio.studio import Studio
from ...api.steering import SessionDep, StudioDep
from ...error_responses import status_of
from ...rate_limits import enforce_rate_limit
from ...render import get_renderer
from ..steering.options_form import flatten_config, group_fields
from ..steering.tree_layout import Chart, make_chart
from ..steering.workbench import ActionForm

router = APIRouter(include_in_schema=False)

NARRATIVE_STEPS = 60
JOURNAL_STEPS = 20
"""Steps of the journal that the page shows; the download has all."""


class ExportForm(ActionForm):
    kind: Literal["adapter", "merged"]
    name: str = Field("", max_length=100)
    node: str = Field("", max_length=100)


class CompareForm(ActionForm):
    left: str = Field(max_length=100)
    right: str = Field(max_length=100)
    prompts: str = Field("", max_length=200_000)


@router.get("/steer/{session}/review")
async def review(request: Request, session: SessionDep, studio: StudioDep) -> HTMLResponse:
    return await render_review_page(request, session, studio)


async def render_review_page(
    request: Request,
    session: Session,
    studio: Studio,
    error: TrellisError | None = None,
    form: ExportForm | None = None,
) -> HTMLResponse:
    await session.work.open_prompts()
    narrative = await write_narrative(studio.store, session, NARRATIVE_STEPS)
    text = await journal_markdown(studio.store, session, last=JOURNAL_STEPS)
    shown = await asyncio.to_thread(to_html, text)
    config = flatten_config(session.config.model_dump(mode="json"))
    return await asyncio.to_thread(
        get_renderer(request).html_response,
        "review/page.html",
        status_of(error) if error else 200,
        place="steer",
        state=session.state(),
        started=timestamp(session.created),
        story=narrative,
        charts=make_charts(session),
        journal=Markup(shown),  # noqa: S704 - sanitised by to_html
        journal_cut=max(0, len(session.tree.path(session.tree.head_id)) - 1 - JOURNAL_STEPS),
        formats=CHOICE_FORMATS,
        groups=group_fields(config),
        error=error.as_json() if error else None,
        sent=form,
        suggested=re.sub(r"[^A-Za-z0-9._-]+", "-", session.name).strip("-._")[:60] or "model",
        request_id=secrets.token_hex(12),
        **await exports_context(session, studio),
    )


async def exports_context(session: Session, studio: Studio) -> dict[str, Any]:
    jobs = [
        job for job in await studio.jobs.list() if job["kind"] == "export" and job["about"]["session"] == session.id
    ]
    done = [export for export in await studio.exports.list_exports() if export["session"] == session.id]
    return {
        "working": [job for job in jobs if job["state"] in ("queued", "running")],
        "failed": [job for job in jobs[:3] if job["state"] == "failed"],
        "exports": done,
    }


def make_charts(session: Session) -> list[Chart]:
    """The figures along the branch to the head."""
    path = session.tree.path(session.tree.head_id)
    made = [(node.step, node.metrics) for node in path if node.metrics]
    return [
        make_chart("Weight change from base", "%", [(0, 0.0), *((step, 100 * m.drift) for step, m in made)]),
        make_chart("Pick probability after learning", "%", [(step, 100 * m.share_after) for step, m in made]),
        make_chart("Loss", "", [(step, m.loss) for step, m in made]),
        make_chart("KL vs. base", " nats", [(step, m.kl) for step, m in made]),
    ]


@router.get("/steer/{session}/exports")
async def exports(request: Request, session: SessionDep, studio: StudioDep) -> HTMLResponse:
    """The list of exports, for a page that is open."""
    values = await exports_context(session, studio)
    return get_renderer(request).html_response("review/_exports.html", state=session.state(), **values)


@router.post("/steer/{session}/exports")
async def export(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[ExportForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    name = form.name.strip()
    if form.kind == "merged" and not name.endswith("merged"):  # so that both buttons work one after the other
        name = f"{name}-merged"[:100]
    try:
        await studio.exports.start(session.id, form.kind, name, form.node or None, form.request)
    except TrellisError as error:
        if "hx-request" in request.headers:
            raise
        return await render_review_page(request, session, studio, error, form)
    if "hx-request" in request.headers:
        return await exports(request, session, studio)
    return RedirectResponse(f"/steer/{session.id}/review#exports", 303)


@router.post("/steer/{session}/exports/{name}/delete")
async def delete_export(request: Request, session: SessionDep, studio: StudioDep, name: str) -> Response:
    await studio.exports.delete(name)
    if "hx-request" in request.headers:
        return await exports(request, session, studio)
    return RedirectResponse(f"/steer/{session.id}/review#exports", 303)


@router.post("/steer/{session}/jobs/{job}/cancel")
async def cancel_job(request: Request, session: SessionDep, studio: StudioDep, job: str) -> Response:
    await studio.jobs.cancel(job)
    if "hx-request" in request.headers:
        return await exports(request, session, studio)
    return RedirectResponse(f"/steer/{session.id}/review#exports", 303)


@router.post("/steer/{session}/again")
async def start_over(
    request: Request, session: SessionDep, studio: StudioDep, form: Annotated[ActionForm, Form()]
) -> Response:
    """Start over: a new session with the same settings. The old one stays."""
    await enforce_rate_limit(request)
    new = await studio.steering.create(None, session.config.model_dump(mode="json"), form.request)
    return RedirectResponse(f"/steer/{new.id}", 303)


@router.get("/steer/{session}/compare")
async def compare_page(
    request: Request,
    session: SessionDep,
    studio: StudioDep,
    left: Annotated[str, Query(max_length=100)] = "",
    right: Annotated[str, Query(max_length=100)] = "",
    job: Annotated[str, Query(max_length=100)] = "",
) -> HTMLResponse:
    """Choose two nodes and prompts; then both answers to each, side by side."""
    await session.work.open_prompts()
    running = await studio.jobs.get(job) if job else None
    if running and running["about"].get("session") != session.id:
        running = None
    about = running["about"] if running else {}
    tree, labels = session.tree, await session.nodes.labels()
    lines = about.get("prompts") or await studio.comparisons.default_prompts(session.id)
    return get_renderer(request).html_response(
        "review/compare.html",
        place="steer",
        state=session.state(),
        nodes=[(node.id, node_label(node, labels), drift_of(node, tree)) for node in comparable_nodes(session)],
        left=about.get("left") or left or tree.root.id,
        right=about.get("right") or right or tree.head_id,
        prompts="\n".join(" ".join(line.split()) for line in lines),
        job=running,
        request_id=secrets.token_hex(12),
    )


def comparable_nodes(session: Session) -> list[Node]:
    """The nodes a person may compare: all that learned something, the newest first, and the base."""
    nodes = [node for node in session.tree.nodes.values() if node.has_learned or node.parent is None or node.name]
    return sorted(nodes, key=lambda node: (-node.step, -node.created))


def node_label(node: Node, labels: dict[str, str]) -> str:
    what = node.name if node.parent is None else labels[node.id] or describe_choice(node.choice)
    return f"{step_name(node.step)}: {what}" if what else step_name(node.step)


@router.post("/steer/{session}/compare")
async def compare(
    session: SessionDep, studio: StudioDep, request: Request, form: Annotated[CompareForm, Form()]
) -> Response:
    await enforce_rate_limit(request)
    prompts = [line for line in form.prompts.splitlines() if line.strip()]
    job = await studio.comparisons.start(session.id, form.left, form.right, prompts, form.request)
    return RedirectResponse(f"/steer/{session.id}/compare?job={job.id}", 303)
