"""Blind tests: two nodes answer the same prompts, and a person judges the answers without knowing whose they are.

Answers are generated a few rounds ahead. Rounds and verdicts are in the store; the result is revealed only when all
planned rounds are judged or the person ends the test.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from typing import Any, Literal

from ...errors import Conflict, Invalid, NotFound, TrellisError, shorten
from ...messages import derived_seed
from ...options import Sampling
from ...store import blind_test as rows
from ...store.store import Store
from ..jobs import key_reused_error, timestamp
from ..steering import Session, Sessions
from .journal import node_summary
from .win_rate import win_rate_json

log = logging.getLogger(__name__)

ROUNDS_AHEAD = 3
"""How many rounds are generated ahead of the person."""

MAX_ROUNDS, DEFAULT_ROUNDS = 200, 20
Judgement = Literal["first", "second", "tie"]


class BlindTests:
    """All blind tests. Viewing one starts generating its next rounds."""

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
        """Start a test of two nodes. Raise NotFound, or Invalid for nodes with equal weights."""
        async with self._start_lock:  # concurrent requests of the same id start one test
            if request and (known := await self._store.read(rows.trial_by_request, request)):
                if known["session"] != session_id:
                    raise key_reused_error("a blind test in another session")
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
                "right: both steps have the same weights, so their answers would not differ.",
                field="right",
                next_step="Choose another step.",
            )
        if not 1 <= planned <= MAX_ROUNDS:
            raise Invalid(
                f"rounds: must be 1 to {MAX_ROUNDS}, got “{planned}”.",
                field="rounds",
                next_step=f"Enter a number from 1 to {MAX_ROUNDS}.",
            )
        unused_position = (
            max(node.position for node in session.tree.nodes.values()) + 1
        )  # prompts that no branch has been steered on
        trial_id = f"b{secrets.token_hex(8)}"
        trial = {
            "id": trial_id, "session": session_id, "request": request, "left": left, "right": right,
            "planned": planned, "position": unused_position, "state": "open",
            "prompts": [prompt.strip() for prompt in prompts if prompt.strip()], "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_trial, trial)
        return trial_id

    async def list_trials(self, session_id: str) -> list[dict[str, Any]]:
        """Return the tests of a session, newest first."""
        session = await self._steering.session(session_id)
        trials_json = []
        for trial in await self._store.read(rows.list_trials, session_id):
            trial_json = _trial_json(session, trial, await self._store.read(rows.get_rounds, trial["id"]), None)
            if trial_json["result"]:
                del trial_json["result"]["rounds"]
            trials_json.append(trial_json)
        return trials_json

    async def state(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Return a test with the round to judge or its result, and continue generating. Raise NotFound."""
        session, trial = await self._find(session_id, trial_id)
        rounds = await self._store.read(rows.get_rounds, trial_id)
        if trial["state"] == "open":
            self._continue_generating(session, trial)
        return _trial_json(session, trial, rounds, self._errors.get(trial_id))

    async def judge(self, session_id: str, trial_id: str, number: int, judgement: Judgement) -> dict[str, Any]:
        """Store which answer of a round is better. Raise Conflict for any other than the current round."""
        session, trial = await self._find(session_id, trial_id)
        rounds = await self._store.read(rows.get_rounds, trial_id)
        current = next((each for each in rounds if each["number"] == number), None)
        if current is not None:
            other = "right" if current["first"] == "left" else "left"
            verdict = {"first": current["first"], "second": other, "tie": "tie"}[judgement]
            is_recorded = await self._store.write(rows.record_verdict, trial_id, number, verdict)
            if is_recorded or current["verdict"] == verdict:  # the same verdict twice is one
                return await self.state(session_id, trial_id)
        raise Conflict(
            f"Round {number} is not the current round.",
            code="stale_round",
            next_step="Vote on the current round.",
            details={"trial": _trial_json(session, trial, rounds, None)},
        )

    async def undo_verdict(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Remove the last verdict. Raise Conflict where there is none, or the test has ended."""
        await self._find(session_id, trial_id)
        if not await self._store.write(rows.undo_verdict, trial_id):
            raise Conflict(
                "There is no vote to undo.",
                code="nothing_to_undo",
                next_step="A finished blind test can't be changed. Start a new one.",
            )
        return await self.state(session_id, trial_id)

    async def end(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """End a test, revealing the result so far."""
        await self._find(session_id, trial_id)
        await self._store.write(rows.end_trial, trial_id)
        self._errors.pop(trial_id, None)
        if task := self._generating.get(trial_id):
            task.cancel()
        return await self.state(session_id, trial_id)

    async def retry(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Generate again after an error."""
        self._errors.pop(trial_id, None)
        return await self.state(session_id, trial_id)

    async def _find(self, session_id: str, trial_id: str) -> tuple[Session, dict[str, Any]]:
        session = await self._steering.session(session_id)
        trial = await self._store.read(rows.get_trial, trial_id)
        if trial is None or trial["session"] != session_id:
            raise NotFound(
                f"Blind test “{shorten(trial_id)}” not found in this session.",
                next_step="The session's Blind test page lists its tests.",
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
        """Generate answers until enough rounds wait to be judged, or all planned ones exist."""
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
                "Something went wrong while generating the answers.",
                code="internal",
                next_step=f"Try again. Error ID {trial['id']} (see the log).",
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
        first = ("left", "right")[secrets.randbelow(2)]  # random, not from a seed that could be recomputed
        row = {
            "trial": trial["id"], "number": number, "prompt": prompt, "first": first, "left": texts["left"],
            "right": texts["right"], "verdict": "same" if is_same else None, "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_round, row)


def _trial_json(
    session: Session, trial: dict[str, Any], rounds: list[dict[str, Any]], error: TrellisError | None
) -> dict[str, Any]:
    """Return a test as JSON. Which node answered, and who leads, is shown only when it has ended."""
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
