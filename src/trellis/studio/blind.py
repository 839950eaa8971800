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

from ..errors import Conflict, Invalid, NotFound, TrellisError, shorten
from ..messages import derived_seed
from ..params import Sampling
from ..store import blind as rows
from ..store.store import Store
from .jobs import timestamp
from .journal import place_of
from .session import Session
from .steering import Steering
from .verdicts import result_json

log = logging.getLogger(__name__)

AHEAD = 3
"""Rounds that are drawn before they are needed."""

MOST_ROUNDS, USUAL_ROUNDS = 200, 20
KEY_REUSED = Conflict(
    "This Idempotency-Key was used for another action: a comparison in another session.",
    code="key_reused",
    next_step="Send a key of its own with each action.",
)
Said = Literal["first", "second", "tie"]


class Blind:
    """All blind comparisons. Those that somebody looks at are drawn ahead."""

    def __init__(self, store: Store, steering: Steering) -> None:
        self._store = store
        self._steering = steering
        self._drawing: dict[str, asyncio.Task[None]] = {}
        self._troubles: dict[str, TrellisError] = {}
        self._starting = asyncio.Lock()

    async def close(self) -> None:
        for task in self._drawing.values():
            task.cancel()
        await asyncio.gather(*self._drawing.values(), return_exceptions=True)

    async def start(
        self, session_id: str, left: str, right: str, planned: int = USUAL_ROUNDS, prompts: list[str] | None = None,
        request: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Begin one between two nodes. Raises NotFound, or Invalid for nodes that are the same."""
        async with self._starting:  # one request makes one comparison
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
        one, other = session.node(left), session.node(right)
        if one.weights == other.weights:
            raise Invalid(
                "right: both steps have the same weights, so there is nothing to tell apart.",
                field="right",
                next_step="Choose another step.",
            )
        if not 1 <= planned <= MOST_ROUNDS:
            raise Invalid(
                f"rounds: must be 1 to {MOST_ROUNDS}, got “{planned}”.", field="rounds", next_step="Choose a number."
            )
        unused = max(node.position for node in session.tree.nodes.values()) + 1  # no branch was steered on it
        trial_id = f"b{secrets.token_hex(8)}"
        trial = {
            "id": trial_id, "session": session_id, "request": request, "left": left, "right": right,
            "planned": planned, "position": unused, "state": "open",
            "prompts": [prompt.strip() for prompt in prompts if prompt.strip()], "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_trial, trial)
        return trial_id

    async def all(self, session_id: str) -> list[dict[str, Any]]:
        """The comparisons of a session, the newest first."""
        session = await self._steering.session(session_id)
        told = []
        for trial in await self._store.read(rows.list_trials, session_id):
            found = _as_json(session, trial, await self._store.read(rows.get_rounds, trial["id"]), None)
            if found["result"]:
                del found["result"]["rounds"]
            told.append(found)
        return told

    async def state(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """How a comparison stands: the round to judge, or the result. Goes on drawing. Raises NotFound."""
        session, trial = await self._find(session_id, trial_id)
        found = await self._store.read(rows.get_rounds, trial_id)
        if trial["state"] == "open":
            self._draw_on(session, trial)
        return _as_json(session, trial, found, self._troubles.get(trial_id))

    async def judge(self, session_id: str, trial_id: str, number: int, said: Said) -> dict[str, Any]:
        """Say which answer of a round is better. Raises Conflict for a round that is not the one to judge."""
        session, trial = await self._find(session_id, trial_id)
        found = await self._store.read(rows.get_rounds, trial_id)
        current = next((each for each in found if each["number"] == number), None)
        if current is not None:
            other = "right" if current["first"] == "left" else "left"
            verdict = {"first": current["first"], "second": other, "tie": "tie"}[said]
            taken = await self._store.write(rows.judge, trial_id, number, verdict)
            if taken or current["verdict"] == verdict:  # said twice is said once
                return await self.state(session_id, trial_id)
        raise Conflict(
            f"Round {number} is not the one to judge.",
            code="stale_round",
            next_step="Look at the current round.",
            details={"trial": _as_json(session, trial, found, None)},
        )

    async def take_back(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Judge the last round again. Raises Conflict where nothing was said, or when it has ended."""
        await self._find(session_id, trial_id)
        if not await self._store.write(rows.take_back, trial_id):
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
        self._troubles.pop(trial_id, None)
        if task := self._drawing.get(trial_id):
            task.cancel()
        return await self.state(session_id, trial_id)

    async def retry(self, session_id: str, trial_id: str) -> dict[str, Any]:
        """Draw again after something went wrong."""
        self._troubles.pop(trial_id, None)
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

    def _draw_on(self, session: Session, trial: dict[str, Any]) -> None:
        task = self._drawing.get(trial["id"])
        if (task is None or task.done()) and trial["id"] not in self._troubles:
            task = asyncio.create_task(self._draw(session, trial))
            self._drawing[trial["id"]] = task
            task.add_done_callback(lambda done: self._forget(trial["id"], done))

    def _forget(self, trial_id: str, task: asyncio.Task[None]) -> None:
        if self._drawing.get(trial_id) is task:
            del self._drawing[trial_id]

    async def _draw(self, session: Session, trial: dict[str, Any]) -> None:
        """Draw answers until enough rounds wait to be judged, or all that are planned are there."""
        try:
            await session.planted()
            await session.open_prompts()
            while True:
                current = await self._store.read(rows.get_trial, trial["id"])
                found = await self._store.read(rows.get_rounds, trial["id"])
                waiting = sum(each["verdict"] is None for each in found)
                if current is None or current["state"] != "open":
                    return
                if len(found) >= trial["planned"] or waiting >= AHEAD:
                    return
                await self._draw_round(session, trial, len(found))
        except TrellisError as error:
            self._troubles[trial["id"]] = error
        except Exception:
            log.exception("blind comparison %s failed", trial["id"])
            self._troubles[trial["id"]] = TrellisError(
                "Something went wrong while generating the answers.",
                code="internal",
                next_step=f"Try again. Error ID {trial['id']} (see the log).",
            )

    async def _draw_round(self, session: Session, trial: dict[str, Any], number: int) -> None:
        prompts = trial["prompts"]
        if prompts:
            prompt = prompts[number % len(prompts)]
        elif session.prompts:
            prompt = await asyncio.to_thread(session.prompts.at, trial["position"] + number)
        else:
            prompt = session.config.control_prompt or "Tell me about yourself."
        sampling = session.config.part(Sampling)
        texts = {}
        for side in ("left", "right"):
            seed = derived_seed("blind", trial["id"], number, side)
            (texts[side],) = await session.sample(prompt, trial[side], 1, sampling, seed)
        same = texts["left"] == texts["right"]
        first = ("left", "right")[secrets.randbelow(2)]  # not from a seed that others could work out
        row = {
            "trial": trial["id"], "number": number, "prompt": prompt, "first": first, "left": texts["left"],
            "right": texts["right"], "verdict": "same" if same else None, "created": time.time(),
        }  # fmt: skip
        await self._store.write(rows.add_round, row)


def _as_json(
    session: Session, trial: dict[str, Any], found: list[dict[str, Any]], trouble: TrellisError | None
) -> dict[str, Any]:
    """What may be told of a comparison: whose answer is whose, and who is ahead, only when it has ended."""
    current = next((each for each in found if each["verdict"] is None), None)
    verdicts = [each["verdict"] for each in found if each["verdict"] is not None]
    ended = trial["state"] == "done"
    told: dict[str, Any] = {
        "id": trial["id"],
        "session": trial["session"],
        "state": trial["state"],
        "planned": trial["planned"],
        "judged": len(verdicts),
        "left": place_of(session.node(trial["left"])),
        "right": place_of(session.node(trial["right"])),
        "created": timestamp(trial["created"]),
        "can_undo": not ended and any(verdict != "same" for verdict in verdicts),
        "round": None,
        "result": None,
        "error": trouble.as_json() if trouble else None,
    }
    if not ended and current:
        other = "right" if current["first"] == "left" else "left"
        told["round"] = {
            "number": current["number"],
            "prompt": current["prompt"],
            "answers": [current[current["first"]], current[other]],
        }
    if ended:
        told["result"] = result_json(verdicts) | {
            "rounds": [
                {name: each[name] for name in ("number", "prompt", "left", "right", "verdict")}
                for each in found
                if each["verdict"] is not None
            ]
        }
    return told
