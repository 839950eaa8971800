"""A studio in which every list has an entry of every state that an entry can have, over the fake engine."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from tests.conftest import ready, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import LoadFailed
from trellis.options import ModelOptions
from trellis.settings import Settings
from trellis.store import blind_test as blind_rows
from trellis.store import jobs as job_rows
from trellis.store import rooms as room_rows
from trellis.store.store import Store, migrate
from trellis.studio.chat.message import Message
from trellis.studio.jobs import Job
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio
from trellis.web.app import create_app
from trellis.workers.worker import Spawn

LONG_WORD = "unbroken" * 20
"""A word that no line of a narrow page holds."""
ERROR = {
    "code": "corrupt_file",
    "message": f"“{LONG_WORD}.safetensors” is not a whole file: it ends at 5000 of 86400 bytes.",
    "field": None, "next_step": "Copy the model again, then load it once more.",
}  # fmt: skip
PROGRESS = {
    "stage": "downloading", "fraction": 0.4, "message": f"Downloading {LONG_WORD}", "bytes": 40, "total_bytes": 100,
    "rate": 10.0, "seconds_left": 6.0,
}  # fmt: skip


class StatefulEngine(FakeEngine):
    """Refuses the model “broken”, and reads the model “slow” until `go_on` is set."""

    may_continue = threading.Event()

    def load(self, request: Any) -> Any:
        if Path(request.path).name == "broken" or request.repository:
            yield None
            raise LoadFailed(str(ERROR["message"]), code="corrupt_file", next_step=str(ERROR["next_step"]))
        while Path(request.path).name == "slow" and not self.may_continue.is_set():
            time.sleep(0.01)
            yield None
        return (yield from super().load(request))


def make_spawner(folder: Path) -> Spawn:
    return thread_spawner(lambda: StatefulEngine(Blobs(folder / "weights")))


@dataclass
class States:
    """What was made: the session that has everything, and all pages that show something."""

    session: str
    failed_session: str
    fresh_session: str
    pages: dict[str, str]


def make_models(folder: Path, tiny: Path) -> None:
    """Folders of models; one was fetched from the hub before."""
    for name in ("slow", "broken", "whole", f"named-{'x' * 60}"):
        shutil.copytree(tiny, folder / "models" / name)
    (folder / "models" / "torn").mkdir()
    (folder / "models" / "torn" / "config.json").write_text("{")
    fetched = folder / "hub" / "org--fetched"
    shutil.copytree(tiny, fetched)
    about = {"repository": "org/fetched", "revision": "main", "commit": "c" * 40, "folder": str(fetched)}
    (folder / "hub" / "complete").mkdir()
    (folder / "hub" / "complete" / "org--fetched@main.json").write_text(json.dumps(about))


async def make_states(studio: Studio) -> States:
    """Everything that may stand in a list. Jobs that run go on until they are cancelled."""
    session = await studio.steering.create("Everything", {"control_prompt": "Who are you?"})
    await ready(session)
    await session.commands.replace_prompt("Please repeat yourself.", "equal options")
    for number, choice in enumerate((0, "none", (1, 3), 2)):
        shown = (await ready(session))["offer"]["id"]
        await session.commands.choose(shown, choice, f"click {number}")  # type: ignore[arg-type]
    await ready(session)
    await session.commands.undo("undo once")
    await ready(session)
    await session.commands.name_node(session.tree.head_id, f"A name {LONG_WORD}")
    fresh = await studio.steering.create(f"Fresh {LONG_WORD}", {})
    await ready(fresh)
    failed = await studio.steering.create("Cannot be loaded", {"model": "broken"})
    await until(lambda: failed.error)
    loading = await studio.steering.create("Still loading", {"model": "slow"})
    await until(lambda: loading.status == "loading")

    await _make_loads(studio)
    await _make_jobs(studio, session)
    exported = await studio.exports.start(session.id, "adapter", "an-adapter")
    await _wait_done(exported)
    fitted = await studio.retraining.retrain(session.id, session.tree.head_id)
    await _wait_done(fitted)
    compared = await studio.comparisons.start(
        session.id, session.tree.root.id, session.tree.head_id, ["Why?", LONG_WORD]
    )
    await _wait_done(compared)
    trials = await _make_trials(studio, session)
    rooms = await _make_rooms(studio)
    await _make_connections(studio)
    steering = f"/steer/{session.id}"
    jobs = await studio.jobs.list()
    comparisons = {job["state"]: f"{steering}/compare?job={job['id']}" for job in jobs if job["kind"] == "compare"}
    pages = {
        "start": "/", "search without a hit": "/?q=nothing+like+it", "new": "/new", "clone": f"/new?clone={session.id}",
        "steering": steering, "fresh": f"/steer/{fresh.id}", "failed": f"/steer/{failed.id}",
        "loading": f"/steer/{loading.id}", "tree": f"{steering}?view=tree", "figures": f"{steering}?view=figures",
        "review": f"{steering}/review", "fresh review": f"/steer/{fresh.id}/review",
        "failed review": f"/steer/{failed.id}/review",
        "compare": f"{steering}/compare", "log": f"{steering}/log", "fresh log": f"/steer/{fresh.id}/log",
        "blind": f"{steering}/blind", "fresh blind": f"/steer/{fresh.id}/blind", "models": "/models",
        "connections": "/connections", "error": "/steer/nope", "chat": "/chat", "archived": "/chat?archived=true",
    }  # fmt: skip
    pages |= {f"comparison {state}": path for state, path in comparisons.items()}
    pages |= {f"trial {state}": f"{steering}/blind/{trial}" for state, trial in trials.items()}
    pages |= {f"room {number}": f"/chat/{room}" for number, room in enumerate(rooms)}
    return States(session.id, failed.id, fresh.id, pages)


async def _wait_done(job: Job) -> None:
    if job.task:
        await asyncio.wait([job.task])
    assert job.row["state"] == "done", job.row["error"]


async def _make_loads(studio: Studio) -> None:
    """Models loading, failed (here and on the hub), and loaded."""
    await studio.models.load(ModelOptions(model="slow"))
    for model in ("org/never-there", f"org/{'n' * 90}"):
        job = await studio.models.load(ModelOptions(model=model, revision="v1.0", precision="8-bit"))
        await until(lambda job=job: job.row["state"] == "failed")  # type: ignore[misc]


async def _make_jobs(studio: Studio, session: Session) -> None:
    """A job of each kind of a session in each state; those that run wait until they are cancelled."""
    head, root = session.tree.head_id, session.tree.root.id
    fitted = {"fitted": "f1", "kind": "refit", "lessons": 3, "teaching": 2, "epochs": 2, "source": head}
    fit = {
        "session": session.id,
        "origin": session.id,
        "parent": root,
        "what": LONG_WORD,
        "fitted": fitted,
        "notes": [LONG_WORD],
    }
    bodies: dict[str, dict[str, Any]] = {
        "export": {"session": session.id, "kind": "merged", "name": LONG_WORD, "node": head},
        "refit": fit,
        "import": fit | {"fitted": fitted | {"kind": "import"}},
        "replay": fit | {"fitted": fitted | {"kind": "replay"}},
        "compare": {"session": session.id, "left": root, "right": head, "prompts": ["Why?"]},
    }
    for kind, body in bodies.items():
        for state in ("failed", "cancelled"):
            row = {
                "id": f"j{secrets.token_hex(8)}", "request": None, "kind": kind, "body": body, "state": state,
                "progress": PROGRESS, "result": None, "error": ERROR if state == "failed" else None,
                "created": time.time(),
            }  # fmt: skip
            await studio.store.write(job_rows.add_job, row)

        async def work(job: Job) -> dict[str, Any]:
            job.row["progress"] = PROGRESS
            await asyncio.Event().wait()
            return {}

        await studio.jobs.start(kind, body, work)


async def _make_trials(studio: Studio, session: Session) -> dict[str, str]:
    """Blind comparisons: waiting, with a round to judge, in trouble, ended with verdicts and without."""
    left, right = session.tree.root.id, session.tree.head_id
    ids = {}
    for state in ("waiting", "judged", "ended", "ended at once"):
        trial = await studio.blind_tests.start(session.id, left, right, planned=3, prompts=[f"Why {LONG_WORD}?"])
        ids[state] = trial["id"]

    async def wait_drawn(trial: str) -> dict[str, Any]:
        while not (current := await studio.blind_tests.state(session.id, trial))["round"]:
            await asyncio.sleep(0.01)
        return current

    for state in ("judged", "ended"):
        current = await wait_drawn(ids[state])
        await studio.blind_tests.judge(session.id, ids[state], current["round"]["number"], "first")
        await wait_drawn(ids[state])
    for state in ("ended", "ended at once"):
        await studio.blind_tests.end(session.id, ids[state])
    row = {
        "id": "bstuck", "session": session.id, "request": None, "left": left, "right": right, "planned": 3,
        "position": 0, "prompts": [], "state": "open", "created": time.time(),
    }  # fmt: skip
    await studio.store.write(blind_rows.add_trial, row)
    studio.blind_tests._errors["bstuck"] = LoadFailed(str(ERROR["message"]), next_step=str(ERROR["next_step"]))
    ids["in trouble"] = "bstuck"
    return ids


async def _make_rooms(studio: Studio) -> list[str]:
    """Rooms with an answer of every state, one with columns, one that is archived, one that is empty."""
    usage = {
        "prompt_tokens": 3, "completion_tokens": 1, "time_to_first_token_ms": 12.0, "engine_to_first_token_ms": None,
        "tokens_per_second": None, "context_used": 4, "context_length": 100, "warm_tokens": 0, "left_out": 2,
    }  # fmt: skip
    found = []
    for columns in (False, True):
        room = await studio.rooms.create(title=f"{'Side by side' if columns else 'Every state'} {LONG_WORD}")
        parent, messages = None, []
        states = ("done", "stopped", "interrupted", "failed")
        for number, state in enumerate(states):
            if not columns or number == 0:
                asked = Message(f"q{room.id}{number}", room.id, parent, "user", f"Why {LONG_WORD}?", created=number)
                messages.append(asked)
            answer = Message(
                f"a{room.id}{number}", room.id, asked.id, "assistant",
                f"Because {LONG_WORD}.\n\n```python\n{LONG_WORD}\n```",
                model="demo", group="g" if columns else None, state=state, created=number + 0.5,
                finish="length" if state == "done" else None, usage=usage if state == "done" else None,
                error=ERROR if state == "failed" else None, rating=number - 1 if number < 3 else 0,
            )  # fmt: skip
            messages.append(answer)
            parent = answer.id
        changes = {"head": messages[-1].id}
        await studio.store.write(room_rows.add_messages, room.id, [each.to_row() for each in messages], changes)
        found.append(room.id)
    archived = await studio.rooms.create(title="Put away")
    await studio.store.write(room_rows.update_room, archived.id, {"archived": 1})
    found.append((await studio.rooms.create()).id)
    for room_id in found[:2]:
        studio.rooms._rooms.pop(room_id)  # so that it is read again, with its messages
    return found


async def _make_connections(studio: Studio) -> None:
    await studio.api_keys.create("never used")
    _, secret = await studio.api_keys.create(f"used {LONG_WORD}"[:200])
    await studio.api_keys.find_key_id(secret)
    await studio.providers.add("bare", "https://example.org/v1", "", ["one"], False)
    await studio.providers.add("all", f"https://example.org/{LONG_WORD}", "sk-x", ["one", LONG_WORD], True)


class StatesServer:
    """The studio with all states behind a real port, in a thread of the test, so that what runs goes on running."""

    def __init__(self, folder: Path, tiny: Path, **settings: Any) -> None:
        make_models(folder, tiny)
        chosen = Settings(save_dir=folder, **settings)
        migrate(chosen.database)
        StatefulEngine.may_continue.clear()
        self._studio = Studio(Store(chosen.database), make_spawner(folder), chosen)
        app = create_app(self._studio, chosen)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="websockets-sansio"))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> StatesServer:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        assert self._loop is not None
        self.states = asyncio.run_coroutine_threadsafe(make_states(self._studio), self._loop).result(120)
        return self

    def __exit__(self, *_: object) -> None:
        StatefulEngine.may_continue.set()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._studio.hub.close)
        self._server.should_exit = True
        self._thread.join(20)
        self._socket.close()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve([self._socket])

        asyncio.run(serve())
