"""Blind comparison: two nodes answer the same prompts; a person says which answer is better, not knowing whose it is.

Answers are drawn a few rounds ahead. What each round was and how it was judged is in the store; the result is told
when all planned rounds are judged, or when the person ends it, and not before.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, Literal

from ...errors import Conflict, Invalid, NotFound, TrellisError, shorten
from ...messages import derived_seed
from ...params import Sampling
from ...store import blind_test as rows
from ...store.store import Store
from ..jobs import timestamp
from ..steering.session import Session
from ..steering.sessions import Sessions
from .journal import node_summary
from .win_rate import win_rate_json

log = logging.getLogger(__name__)

ROUNDS_AHEAD = 3
"""Rounds that are drawn before they are needed."""

MAX_ROUNDS, DEFAULT_ROUNDS = 200, 20
KEY_REUSED = Conflict(
    "This Idempotency-Key was used for another action: a comparison in another session.",
    code="key_reused",
    next_step="Send a key of its own with each action.",
)
Judgement = Literal["first", "second", "tie"]


class BlindTests:
    """All blind comparisons. Those that somebody looks at are drawn ahead."""

    def __init__(self, store: Store, steering: Sessions) -> None:
        self._store = store
        self._steering = steering
        self._generating: dict[str, asyncio.Task[None]] = {}
        self._errors: dict[str, TrellisError] = {}
        self._start_lock = asyncio.Lock()

    async def close(self) -> None:
        for task in self._generating.values():
            task.cancel()
        await asyncio.gather(*self._generating.values(), return_exceptions=True)

    async def start(
        self, session_id: str, left: str, right: str, planned: int = DEFAULT_ROUNDS, prompts: list[str] | None = None,
        request: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Begin one between two nodes. Raises NotFound, or Invalid for nodes that are the same."""
        async with self._start_lock:  # one request makes one comparison
            if request and (known := await self._store.read(rows.trial_by_request, request)):
                if known["session"] != session_id:
                    raise KEY_REUSED
                return await self.state(session_id, known["id"])
            trial_id = await self._start(session_id, left, right, planned, prompts or [], request)
        return await self.state(session_id, trial_id)

    async def _start(
        self, session_id: str, left: str, right: str, planned: int, prompts: list[str], request: str | None
    ) -> str:
        session = await self._steering.session(session_id)
        left_node, right_node = session.node(left), session.node(right)
        if left_node.weights == right_node.weights:
            raise Invalid(
                "right: both steps have the same weights, so there is nothing to tell apart.",
                field="right",
                next_step="Choose another step.",
            )
        if not 1 <= planned <= MAX_ROUNDS:
            raise Invalid(
                f"rounds: must be 1 to {MAX_ROUNDS}, got “{planned}”.", field="rounds", next_step="Choose a number."
            )
        unused_position = max(node.position for node in session.tree.nodes.values()) + 1  # no branch was steered on it
        trial_id = f"b{secrets.token_hex(8)}"
        trial = {
            "id": trial_id, "session": session_id, "request": request, "left": left, "right": right,
            "planned": planned, "position": unused_position, "state": "open",
            "prompts": [prompt.strip() for prompt in prompts if prompt.strip()], "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_trial, trial)
        return trial_id

    async def list_trials(self, session_id: str) -> list[dict[str, Any]]:
        """The comparisons of a session, the newest first."""
        session = await self._steering.session(session_id)
        trials_json = []
        for trial in await self._store.read(rows.list_trials, session_id):
            trial_json = _trial_json(session, trial, await self._store.read(rows.get_rounds, trial["id"]), None)
            if trial_json["result"]:
                del trial_json["result"]["rounds"]
            trials_json.append(trial_json)
        return trials_json

    async def state(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """How a comparison stands: the round to judge, or the result. Goes on drawing. Raises NotFound."""
        session, trial = await self._find(session_id, trial_id)
        rounds = await self._store.read(rows.get_rounds, trial_id)
        if trial["state"] == "open":
            self._continue_generating(session, trial)
        return _trial_json(session, trial, rounds, self._errors.get(trial_id))

    async def judge(self, session_id: str, trial_id: str, number: int, judgement: Judgement) -> dict[str, Any]:
        """Say which answer of a round is better. Raises Conflict for a round that is not the one to judge."""
        session, trial = await self._find(session_id, trial_id)
        rounds = await self._store.read(rows.get_rounds, trial_id)
        current = next((each for each in rounds if each["number"] == number), None)
        if current is not None:
            other = "right" if current["first"] == "left" else "left"
            verdict = {"first": current["first"], "second": other, "tie": "tie"}[judgement]
            is_recorded = await self._store.write(rows.record_verdict, trial_id, number, verdict)
            if is_recorded or current["verdict"] == verdict:  # said twice is said once
                return await self.state(session_id, trial_id)
        raise Conflict(
            f"Round {number} is not the one to judge.",
            code="stale_round",
            next_step="Look at the current round.",
            details={"trial": _trial_json(session, trial, rounds, None)},
        )

    async def undo_verdict(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Judge the last round again. Raises Conflict where nothing was said, or when it has ended."""
        await self._find(session_id, trial_id)
        if not await self._store.write(rows.undo_verdict, trial_id):
            raise Conflict(
                "There is no verdict to take back.",
                code="nothing_to_undo",
                next_step="A comparison that has ended stays as it is; judge a round, or start another one.",
            )
        return await self.state(session_id, trial_id)

    async def end(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Stop and tell the result of what was judged so far."""
        await self._find(session_id, trial_id)
        await self._store.write(rows.end_trial, trial_id)
        self._errors.pop(trial_id, None)
        if task := self._generating.get(trial_id):
            task.cancel()
        return await self.state(session_id, trial_id)

    async def retry(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Draw again after something went wrong."""
        self._errors.pop(trial_id, None)
        return await self.state(session_id, trial_id)

    async def _find(self, session_id: str, trial_id: str) -> tuple[Session, dict[str, Any]]:
        session = await self._steering.session(session_id)
        trial = await self._store.read(rows.get_trial, trial_id)
        if trial is None or trial["session"] != session_id:
            raise NotFound(
                f"There is no comparison “{shorten(trial_id)}” in this session.",
                next_step="Its comparisons are listed on its blind page.",
            )
        return session, trial

    def _continue_generating(self, session: Session, trial: dict[str, Any]) -> None:
        task = self._generating.get(trial["id"])
        if (task is None or task.done()) and trial["id"] not in self._errors:
            task = asyncio.create_task(self._generate_rounds(session, trial))
            self._generating[trial["id"]] = task
            task.add_done_callback(lambda done: self._forget_task(trial["id"], done))

    def _forget_task(self, trial_id: str, task: asyncio.Task[None]) -> None:
        if self._generating.get(trial_id) is task:
            del self._generating[trial_id]

    async def _generate_rounds(self, session: Session, trial: dict[str, Any]) -> None:
        """Draw answers until enough rounds wait to be judged, or all that are planned are there."""
        try:
            await session.nodes.wait_until_initialized()
            await session.work.open_prompts()
            while True:
                current = await self._store.read(rows.get_trial, trial["id"])
                rounds = await self._store.read(rows.get_rounds, trial["id"])
                unjudged_count = sum(each["verdict"] is None for each in rounds)
                if current is None or current["state"] != "open":
                    return
                if len(rounds) >= trial["planned"] or unjudged_count >= ROUNDS_AHEAD:
                    return
                await self._generate_round(session, trial, len(rounds))
        except TrellisError as error:
            self._errors[trial["id"]] = error
        except Exception:
            log.exception("blind comparison %s failed", trial["id"])
            self._errors[trial["id"]] = TrellisError(
                "The answers could not be drawn, for a reason that the studio does not know.",
                code="internal",
                next_step=f"The studio's log has the details, under {trial['id']}.",
            )

    async def _generate_round(self, session: Session, trial: dict[str, Any], number: int) -> None:
        prompts = trial["prompts"]
        if prompts:
            prompt = prompts[number % len(prompts)]
        elif session.prompts:
            prompt = await asyncio.to_thread(session.prompts.at, trial["position"] + number)
        else:
            prompt = session.config.control_prompt or "Tell me about yourself."
        sampling = session.config.extract(Sampling)
        texts = {}
        for side in ("left", "right"):
            seed = derived_seed("blind", trial["id"], number, side)
            (texts[side],) = await session.nodes.sample(prompt, trial[side], 1, sampling, seed)
        is_same = texts["left"] == texts["right"]
        first = ("left", "right")[secrets.randbelow(2)]  # not from a seed that others could work out
        row = {
            "trial": trial["id"], "number": number, "prompt": prompt, "first": first, "left": texts["left"],
            "right": texts["right"], "verdict": "same" if is_same else None, "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_round, row)


def _trial_json(
    session: Session, trial: dict[str, Any], rounds: list[dict[str, Any]], error: TrellisError | None
) -> dict[str, Any]:
    """What may be told of a comparison: whose answer is whose, and who is ahead, only when it has ended."""
    current = next((each for each in rounds if each["verdict"] is None), None)
    verdicts = [each["verdict"] for each in rounds if each["verdict"] is not None]
    has_ended = trial["state"] == "done"
    trial_json: dict[str, Any] = {
        "id": trial["id"],
        "session": trial["session"],
        "state": trial["state"],
        "planned": trial["planned"],
        "judged": len(verdicts),
        "left": node_summary(session.node(trial["left"])),
        "right": node_summary(session.node(trial["right"])),
        "created": timestamp(trial["created"]),
        "can_undo": not has_ended and any(verdict != "same" for verdict in verdicts),
        "round": None,
        "result": None,
        "error": error.as_json() if error else None,
    }
    if not has_ended and current:
        other = "right" if current["first"] == "left" else "left"
        trial_json["round"] = {
            "number": current["number"],
            "prompt": current["prompt"],
            "answers": [current[current["first"]], current[other]],
        }
    if has_ended:
        trial_json["result"] = win_rate_json(verdicts) | {
            "rounds": [
                {name: each[name] for name in ("number", "prompt", "left", "right", "verdict")}
                for each in rounds
                if each["verdict"] is not None
            ]
        }
    return trial_json
