"""Compare the answers of two nodes side by side: a job that any page can follow."""

from __future__ import annotations

from typing import Any

from ...errors import Invalid
from ...messages import Progress
from ..jobs import Job, Jobs
from ..steering import Sessions, step_name
from .journal import node_summary

MAX_PROMPTS = 12


class Comparisons:
    """Starts and returns comparisons."""

    def __init__(self, jobs: Jobs, steering: Sessions) -> None:
        self._jobs = jobs
        self._steering = steering

    async def start(
        self, session_id: str, left: str, right: str, prompts: list[str], request: str | None = None
    ) -> Job:
        """Answer each prompt from both nodes with the same seed. Raise NotFound, or Invalid."""
        session = await self._steering.session(session_id)
        session.node(left), session.node(right)
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise Invalid(
                f"prompts: must be 1 to {MAX_PROMPTS}, got {len(prompts)}.",
                field="prompts",
                next_step="Enter one prompt per line.",
            )
        known_job = await self._jobs.find_row_by_request(request, "compare") if request else None
        if known_job and known_job["body"]["session"] == session_id:
            prompts = known_job["body"]["prompts"]  # a repeated request: the default prompts may have changed since
        body = {"session": session_id, "left": left, "right": right, "prompts": prompts}
        return await self._jobs.start("compare", body, lambda job: self._run(job, body), request)

    async def default_prompts(self, session_id: str, count: int = 3) -> list[str]:
        """Return the default prompts: the control prompt and the next ones."""
        session = await self._steering.session(session_id)
        prompts = [session.config.control_prompt] if session.config.control_prompt else []
        if session.prompts:
            position = session.tree.head.position
            prompts += [session.prompts.at(position + step) for step in range(1, count + 1)]
        return list(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts))[:count]

    async def _run(self, job: Job, body: dict[str, Any]) -> dict[str, Any]:
        session = await self._steering.session(body["session"])
        rounds: list[dict[str, str]] = []
        total = 2 * len(body["prompts"])
        for prompt in body["prompts"]:
            pair: dict[str, str] = {"prompt": prompt}
            for side in ("left", "right"):
                finished = 2 * len(rounds) + (side == "right")
                step = session.node(body[side]).step
                message = f"{step_name(step)}: prompt {len(rounds) + 1} of {len(body['prompts'])}"
                job.report_progress(Progress(stage="checking", fraction=finished / total, message=message))
                seed = {"seed": session.config.seed}
                (pair[side],) = await self._steering.sample(session.id, prompt, body[side], 1, seed, seed_key="compare")
            rounds.append(pair)
        nodes = {side: session.node(body[side]) for side in ("left", "right")}
        return {side: node_summary(node) for side, node in nodes.items()} | {"rounds": rounds}
