"""Loading, unloading, cancelling and the jobs that tell of it."""

from __future__ import annotations

import json
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import Conflict, LoadFailed, NotFound
from trellis.messages import Chat, Progress, Turn
from trellis.options import ModelOptions, Sampling
from trellis.studio.jobs import job_json
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio


async def follow(studio: Studio, job: str) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, event.data) async for event in studio.jobs.events(job, None)]


async def test_a_job_that_has_said_nothing_yet_has_a_whole_progress(studio: Studio) -> None:
    job = await studio.models.load(ModelOptions(model="demo"))
    waiting = job_json(job.row | {"progress": None})["progress"]
    assert set(waiting) == set(Progress.model_fields) - {"type"}
    assert (waiting["fraction"], waiting["bytes"]) == (0.0, None)


async def test_a_load_is_a_job_that_ends_ready(studio: Studio) -> None:
    job = await studio.models.load(ModelOptions(model="demo"))
    events = await follow(studio, job.id)
    assert events[-1][0] == "done"
    stages = [data["stage"] for name, data in events if name == "progress"]
    assert stages[-1] == "ready"
    assert (await studio.jobs.get(job.id))["state"] == "done"
    (demo,) = await studio.models.list_models()
    assert (demo["id"], demo["state"], demo["kind"]) == ("demo", "loaded", "text")
    assert demo["parameters"] > 1_000_000
    assert demo["size"] > 1_000_000
    assert await follow(studio, job.id) == [events[-1]]


async def test_loading_what_is_loaded_is_the_same_job(studio: Studio) -> None:
    first = await studio.models.load(ModelOptions(model="demo"))
    assert (await studio.models.load(ModelOptions(model="demo"))).id == first.id
    await follow(studio, first.id)
    assert (await studio.models.load(ModelOptions(model="demo"))).id == first.id


async def test_unloading_ends_the_engine(studio: Studio) -> None:
    worker = await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)
    await studio.models.unload("demo")
    assert not worker.is_alive
    assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
    with pytest.raises(Conflict, match="not loaded"):
        await studio.models.unload("demo")
    assert (await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)).is_alive


class Slow(FakeEngine):
    def load(self, request: Any) -> Any:
        for step in range(2000):
            time.sleep(0.002)
            yield Progress(stage="reading", fraction=step / 2000, message="Slowly")
        return (yield from super().load(request))


async def test_a_load_can_be_cancelled(tmp_path: Path) -> None:
    spawn = thread_spawner(lambda: Slow(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        job = await studio.models.load(ModelOptions(model="demo"))
        await until(lambda: job.row["progress"] and job.row["progress"]["stage"] == "reading")
        assert (await studio.jobs.cancel(job.id))["state"] == "cancelled"
        assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
        assert (await follow(studio, job.id))[-1][0] == "cancelled"
        with pytest.raises(Conflict, match="already ended"):
            await studio.jobs.cancel(job.id)


async def test_a_load_that_fails_says_why_and_can_be_tried_again(tmp_path: Path) -> None:
    class Broken(FakeEngine):
        broken = True

        def load(self, request: Any) -> Any:
            yield None
            if Broken.broken:
                raise LoadFailed("The file is torn.", code="corrupt_file", next_step="Copy it again.")
            return (yield from super().load(request))

    spawn = thread_spawner(lambda: Broken(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        job = await studio.models.load(ModelOptions(model="demo"))
        assert (await follow(studio, job.id))[-1][1]["error"]["code"] == "corrupt_file"
        session = await studio.steering.create(None, {})
        await until(lambda: session.error)
        assert session.state()["error"]["message"] == "The file is torn."
        Broken.broken = False
        await session.commands.resume()
        await until(lambda: session.status == "ready")


async def test_jobs_that_a_crash_cut_off_are_not_shown_as_running(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        from trellis.store import jobs as rows

        row = {"id": "j1", "request": None, "kind": "load", "body": {}, "state": "running", "progress": None,
               "result": None, "error": None, "created": 0.0}  # fmt: skip
        await studio.store.write(rows.add_job, row)
    async with open_studio(tmp_path, fake_spawn) as studio:
        job = await studio.jobs.get("j1")
        assert (job["state"], job["error"]["code"]) == ("failed", "interrupted")
        assert [job["id"] for job in await studio.jobs.list()] == ["j1"]


async def test_unknown_jobs_and_models_are_refused(studio: Studio) -> None:
    with pytest.raises(NotFound, match="Job “nope” not found"):
        await studio.jobs.get("nope")
    with pytest.raises(NotFound, match=r"no model “\.\./secrets”"):
        await studio.models.load(ModelOptions(model="../secrets"))


async def test_folders_in_the_models_folder_are_models(tmp_path: Path, studio: Studio) -> None:
    good = tmp_path / "models" / "mine"
    good.mkdir(parents=True)
    (good / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    header = json.dumps({"a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}}).encode()
    (good / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(60))
    bad = {
        "torn": ("{", struct.pack("<Q", 2**60)), "list": ("[1]", struct.pack("<Q", 2) + b"[]"), "short": ("{}", b"abc"),
        "odd": ('{"architectures": []}', struct.pack("<Q", 9) + b'{"a": 5}\n'),
        "deep": ("[" * 100_000, struct.pack("<Q", 100_000) + b"[" * 100_000),
    }  # fmt: skip
    for name, (config, weights) in bad.items():
        (tmp_path / "models" / name).mkdir()
        (tmp_path / "models" / name / "config.json").write_text(config)
        (tmp_path / "models" / name / "model.safetensors").write_bytes(weights)
    (tmp_path / "models" / "gone").mkdir()
    (tmp_path / "models" / "gone" / "config.json").write_text("{}")
    (tmp_path / "models" / "gone" / "model.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "models" / "no config").mkdir()
    found = {model["id"]: model for model in await studio.models.list_models()}
    assert set(found) == {"demo", "mine", "gone", *bad}
    assert (await studio.models.catalog.find("gone")).parameters == 0
    assert (found["mine"]["parameters"], found["mine"]["architecture"]) == (15, "LlamaForCausalLM")
    assert found["torn"]["parameters"] == 0


async def test_a_repeated_request_to_load_is_one_job(studio: Studio, tmp_path: Path) -> None:
    first = await studio.models.load(ModelOptions(model="demo"), "once")
    await follow(studio, first.id)
    await studio.models.unload("demo")
    again = await studio.models.load(ModelOptions(model="demo"), "once")
    assert job_json(again.row)["id"] == first.id
    (tmp_path / "models" / "other").mkdir(parents=True)
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "models" / "other" / file).write_text("{}")
    with pytest.raises(Conflict, match="used for another action"):
        await studio.models.load(ModelOptions(model="other"), "once")
    assert studio.models.state(ModelOptions(model="other")) == "unloaded"


async def test_an_engine_that_cannot_be_started_once_can_be_started_again(tmp_path: Path, fake_spawn: Spawn) -> None:
    failing = [OSError("out of processes")]

    def spawn(sock: socket.socket) -> Any:
        if failing:
            raise failing.pop()
        return fake_spawn(sock)

    async with open_studio(tmp_path, spawn) as studio:
        job = await studio.models.load(ModelOptions(model="demo"))
        events = await follow(studio, job.id)
        assert "out of processes" in events[-1][1]["error"]["message"]
        assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
        assert (await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)).is_alive


async def test_a_load_that_is_cancelled_while_its_engine_starts_leaves_nothing(
    tmp_path: Path, fake_spawn: Spawn
) -> None:
    started: list[Any] = []

    def spawn(sock: socket.socket) -> Any:
        time.sleep(0.2)
        started.append(fake_spawn(sock))
        return started[-1]

    async with open_studio(tmp_path, spawn) as studio:
        job = await studio.models.load(ModelOptions(model="demo"))
        await studio.models.unload("demo")
        assert (await studio.jobs.get(job.id))["state"] == "cancelled"
        assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
        await until(lambda: started and started[0][0].wait(0) == 0)
        assert (await studio.models.engine(ModelOptions(model="demo"), lambda progress: None)).is_alive


async def test_a_model_that_is_unloaded_under_a_session_stays_unloaded_until_it_is_resumed(tmp_path: Path) -> None:
    class Slow(FakeEngine):
        def offer(self, request: Any) -> Any:
            for _ in range(100):
                time.sleep(0.005)
                yield None
            return (yield from super().offer(request))

    spawn = thread_spawner(lambda: Slow(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        session = await studio.steering.create(None, {})
        await until(lambda: session.status == "offering" and session.offer)
        await studio.models.unload("demo")
        await until(lambda: session.error)
        assert session.state()["error"]["code"] == "unloaded"
        assert studio.models.state(ModelOptions(model="demo")) == "unloaded"
        await session.commands.resume()
        await until(lambda: session.status == "ready")


async def test_a_model_that_nobody_uses_is_unloaded_and_comes_back_by_itself(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn, idle_minutes=0.4 / 60) as studio:
        session = await studio.steering.create(None, {"control_prompt": ""})
        await until(lambda: session.status == "ready")
        await until(lambda: studio.models.state(ModelOptions()) == "unloaded")
        assert session.status == "ready", "the session stays as it was"
        assert session.offer is not None
        await session.commands.choose(session.offer.id, 0, "r1")
        await until(lambda: session.status == "ready" and session.tree.head.step == 1)


async def test_the_same_model_in_another_precision_has_an_engine_of_its_own(studio: Studio) -> None:
    one = await studio.models.engine(ModelOptions(), lambda progress: None)
    two = await studio.models.engine(ModelOptions(precision="16-bit"), lambda progress: None)
    assert one is not two
    (demo,) = await studio.models.list_models()
    assert [engine["state"] for engine in demo["engines"]] == ["loaded", "loaded"]
    await studio.models.unload("demo")
    assert not one.is_alive
    assert not two.is_alive


@pytest.mark.parametrize(
    "shape", ["[1e400]", "[10000000000000000000000000000000000000000]", "[1048576, 1048576, 1048576]"]
)
async def test_a_header_that_lies_of_its_size_hides_nothing_else(tmp_path: Path, fake_spawn: Spawn, shape: str) -> None:
    folder = tmp_path / "models" / "liar"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    header = f'{{"a.weight": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}}}'.encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    async with open_studio(tmp_path, fake_spawn) as studio:
        found = {model["id"]: model for model in await studio.models.list_models()}
        assert set(found) == {"demo", "liar"}
        assert found["liar"]["parameters"] == 0
        assert (await studio.steering.check_config({"model": "liar"}))["memory"]["known"] is False


async def test_a_pipe_that_is_called_like_a_file_is_not_waited_for(tmp_path: Path, fake_spawn: Spawn) -> None:
    import os

    folder = tmp_path / "models" / "pipe"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    os.mkfifo(folder / "model.safetensors")
    async with open_studio(tmp_path, fake_spawn) as studio:
        assert {model["id"] for model in await studio.models.list_models()} == {"demo", "pipe"}


async def test_one_key_sent_twice_at_once_is_one_job(studio: Studio) -> None:
    import asyncio

    session = await studio.steering.create(None, {})
    await until(lambda: session.status == "ready")
    starts = [studio.exports.start(session.id, "adapter", "one", None, "the same key") for _ in range(5)]
    jobs = await asyncio.gather(*starts, return_exceptions=True)
    assert len({job.id for job in jobs}) == 1  # type: ignore[union-attr]


# ── What is in the folder of models ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("name", "files", "reason"), [
    ("plain", ["config.json", "model.safetensors"], None),
    ("with spaces (and more) + é", ["config.json", "a.safetensors"], None),
    ("adapter", ["adapter_config.json", "adapter_model.safetensors"], "contains an adapter"),
    ("adapter-of-config", ["config.json", "adapter_config.json", "adapter_model.bin"], "contains an adapter"),
    ("gguf", ["model.Q4_K_M.gguf", "README.md"], "contains a GGUF file"),
    ("gguf-too", ["config.json", "model.gguf"], "contains a GGUF file"),
    ("pickle", ["config.json", "pytorch_model.bin"], "can run code"),
    ("original", ["params.json", "consolidated.00.pth", "config.json"], "can run code"),
    ("pictures", ["model_index.json"], "diffusion pipeline"),
    ("no-weights", ["config.json", "tokenizer.json"], "has no *.safetensors"),
    ("no-config", ["model.safetensors", "tokenizer.json"], "has no config.json"),
    ("session:mine", ["config.json", "model.safetensors"], "invalid name for a model"),
    (" spaced ", ["config.json", "model.safetensors"], "invalid name for a model"),
])  # fmt: skip
async def test_whatever_is_meant_to_be_a_model_is_listed_with_why_it_is_none(
    tmp_path: Path, fake_spawn: Spawn, name: str, files: list[str], reason: str | None
) -> None:
    folder = tmp_path / "models" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("{}")
    async with open_studio(tmp_path, fake_spawn) as studio:
        found = {model["id"]: model for model in await studio.models.list_models()}
        assert set(found) == {"demo", name}
        problem = found[name]["problem"]
        speakers = {each["name"] for each in await studio.chat_targets.list_targets()}
        if reason is None:
            assert problem is None
            assert name in await studio.models.catalog.list_names()
            assert name in speakers
            await studio.models.engine(ModelOptions(model=name), lambda progress: None)
            return
        assert reason in problem["message"]
        assert problem["next_step"]
        assert name not in await studio.models.catalog.list_names()
        assert name not in speakers
        for asked in (studio.models.load(ModelOptions(model=name)), studio.chat_targets.find(name)):
            with pytest.raises((LoadFailed, NotFound)):
                await asked


async def test_folders_of_something_else_are_not_models(tmp_path: Path, fake_spawn: Spawn) -> None:
    for name in (".hidden", "prompts", "empty"):
        (tmp_path / "models" / name).mkdir(parents=True)
    (tmp_path / "models" / ".hidden" / "config.json").write_text("{}")
    (tmp_path / "models" / "prompts" / "a.jsonl").write_text("{}")
    (tmp_path / "models" / "notes.txt").write_text("x")
    (tmp_path / "models" / "loose.gguf").write_text("x")
    async with open_studio(tmp_path, fake_spawn) as studio:
        assert {model["id"] for model in await studio.models.list_models()} == {"demo", "loose.gguf"}
        await studio.models.delete("loose.gguf")
        assert sorted(file.name for file in (tmp_path / "models").iterdir()) == [
            ".hidden",
            "empty",
            "notes.txt",
            "prompts",
        ]


async def test_who_is_talked_to_is_never_fetched(tmp_path: Path, fake_spawn: Spawn) -> None:
    loads: list[Any] = []

    class Noting(FakeEngine):
        def load(self, request: Any) -> Any:
            loads.append(request)
            return (yield from super().load(request))

    fetched = tmp_path / "fetched"
    fetched.mkdir()
    spawn = thread_spawner(lambda: Noting(Blobs(tmp_path / "weights")))
    async with open_studio(tmp_path, spawn) as studio:
        for name in ("org/name", "org/other"):
            with pytest.raises(NotFound) as refused:
                await studio.chat_targets.find(name)
            assert refused.value.code == "model_not_found"
        complete = studio.models.catalog._downloads_folder / "complete"
        complete.mkdir(parents=True)
        about = {"repository": "org/name", "commit": "c" * 40, "revision": "v1", "folder": str(fetched)}
        (complete / f"org--name@{'c' * 40}.json").write_text(json.dumps(about))
        assert await studio.models.catalog.downloaded_revision("org/name") == "v1"
        speaker = await studio.chat_targets.find("org/name")
        asked = Chat(turns=(Turn(role="user", text="Hello"),), sampling=Sampling(), seed=1)
        assert [event async for event in speaker.answer(asked, "me", lambda progress: None)]
        assert [(load.repository, load.revision, load.fetches) for load in loads] == [("org/name", "v1", False)]
        about |= {"commit": "d" * 40, "revision": "main"}
        (complete / f"org--name@{'d' * 40}.json").write_text(json.dumps(about))
        assert await studio.models.catalog.downloaded_revision("org/name") == ""
