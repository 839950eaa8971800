"""Every way a load can fail, provoked for real: the true server, the true engine, files, rights, memory and disks that
are really broken. Each has its code, the value in words, and a way out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.quantized import change_config
from tests.server import Server, new_session, read_events, wait_failed, wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]

AS_ANYONE = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")
"""Started like this even root obeys the rights of files."""


def within() -> tuple[str, ...]:
    return AS_ANYONE if os.geteuid() == 0 and shutil.which("setpriv") else ()


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    save = tmp_path_factory.mktemp("save")
    models = save / "models"
    for name in ("cut", "strange", "coded", "closed", "empty", "bits", "whole", "bert", "awq", "short"):
        shutil.copytree(tiny_llama, models / name)
    weights = models / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    config = json.loads((tiny_llama / "config.json").read_text())
    (models / "strange" / "config.json").write_text(json.dumps(config | {"model_type": "nobody_knows"}))
    coded = config | {"model_type": "homegrown", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    (models / "coded" / "config.json").write_text(json.dumps(coded))
    (models / "coded" / "evil.py").write_text("open('/tmp/trellis-ran-it', 'w')")
    (models / "closed" / "model.safetensors").chmod(0)
    (models / "empty" / "model.safetensors").unlink()
    change_config(models / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    change_config(models / "awq", quantization_config={"quant_method": "awq", "bits": 4})
    change_config(models / "short", max_position_embeddings=64)
    server = Server(save, fake=False, command_prefix=within(), TRELLIS_RATE_LIMIT="0")
    yield server
    (models / "closed" / "model.safetensors").chmod(0o644)
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


def failure(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The error that a load ends with."""
    answer = client.post("/api/models/load", json=body)
    if answer.status_code != 202:
        error: dict[str, Any] = answer.json()["error"]
        return error
    with client.stream("GET", f"/api/jobs/{answer.json()['id']}/events", timeout=60) as response:
        last = [(name, data) for _, name, data in read_events(response)][-1]
    assert last[0] == "failed", last
    found: dict[str, Any] = last[1]["error"]
    return found


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("cut", "corrupt_file", "“model.safetensors” is not a complete safetensors file"),
        ("strange", "unsupported_architecture", "nobody_knows"),
        ("coded", "remote_code_refused", "its own Python code"),
        ("empty", "not_found", "has no *.safetensors"),
        ("closed", "permission_denied", "No permission to read"),
        ("bert", "unsupported_architecture", "BERT encoder"),
        ("awq", "unsupported_quantization", "AWQ"),
    ],
)
def test_what_is_wrong_with_a_folder_is_told_apart(server: Server, model: str, code: str, message: str) -> None:
    with server.client() as client:
        error = failure(client, model=model)
        (told,) = client.post("/api/steering/check", json={"config": {"model": model}}).json()["errors"]
    assert told == {"field": "config.model", "message": f"{error['message']} {error['next_step']}"}
    assert (error["code"], message in error["message"]) == (code, True), error
    assert error["next_step"]
    assert f"`{code}`" in (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert not Path("/tmp/trellis-ran-it").exists()


def test_answers_that_leave_no_room_in_a_model_are_refused_with_a_length_that_works(server: Server) -> None:
    with server.client() as client:
        config = {"model": "short", "max_new_tokens": 96, "control_prompt": ""}
        answer = client.post("/api/steering/sessions", json={"config": config})
        assert answer.status_code == 422
        assert answer.json()["error"]["field"] == "config.max_new_tokens"
        assert answer.json()["error"]["next_step"] == "Set max new tokens to 32 or less."
        made = client.post("/api/steering/sessions", json={"config": config | {"max_new_tokens": 32}}).json()
        state = wait_ready(client, made["id"], 60)
        assert len(state["offer"]["options"]) == 4
        client.delete(f"/api/steering/sessions/{made['id']}")


def test_a_failed_load_leaves_no_engine_and_a_session_says_why(server: Server) -> None:
    with server.client() as client:
        failure(client, model="cut")
        made = client.post("/api/steering/sessions", json={"config": {"model": "cut"}}).json()
        state = wait_failed(client, made["id"])
        assert state["error"]["code"] == "corrupt_file"
        assert "Copy or download" in state["error"]["next_step"]
        good = Path(server.save_dir / "models" / "whole" / "model.safetensors").read_bytes()
        (server.save_dir / "models" / "cut" / "model.safetensors").write_bytes(good)
        client.post(f"/api/steering/sessions/{made['id']}/resume")
        wait_ready(client, made["id"], 60)
        client.post("/api/models/cut/unload")


def test_a_device_that_is_not_there_is_told(server: Server) -> None:
    with server.client() as client:
        error = failure(client, model="whole", device="mps")
    assert (error["code"], error["field"]) == ("not_found", "device")


def test_several_models_load_at_once_each_with_its_own_progress(server: Server) -> None:
    with server.client() as client:
        jobs = [
            client.post("/api/models/load", json={"model": "whole", "precision": precision}).json()["id"]
            for precision in ("32-bit", "16-bit")
        ]
        assert len(set(jobs)) == 2
        for job in jobs:
            with client.stream("GET", f"/api/jobs/{job}/events", timeout=60) as response:
                *moves, last = [(name, data) for _, name, data in read_events(response)]
            assert last[0] == "done"
            assert all(name == "progress" for name, _ in moves)
        found = {model["id"]: model for model in client.get("/api/models").json()}["whole"]
        assert sorted(engine["precision"] for engine in found["engines"]) == ["bfloat16", "float32"]
        client.post("/api/models/whole/unload")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of about 60 million random weights: 240 MB in 32 bits."""
    from tests.tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("large") / "large", hidden=1024, layers=6)


def test_a_load_that_cannot_fit_is_refused_with_the_figures(large: Path, tmp_path: Path) -> None:
    server = Server(tmp_path, fake=True, TRELLIS_MODEL_DIRS=str(large.parent), TRELLIS_ENGINE_MEMORY_GB="0.62")
    try:
        with server.client() as client:
            error = failure(client, model="large")
            assert error["code"] == "out_of_memory"
            assert "needs about 0.7 GB in 32-bit; 0.6 GB are free" in error["message"]
            assert error["next_step"].startswith("Load it in")
            check = client.post("/api/steering/check", json={"config": {"model": "large", "lora_rank": 64}}).json()
            assert not check["memory"]["fits"]
            assert check["memory"]["needed"]["total"] > check["memory"]["free"]
            assert server.engine_pids() == []
    finally:
        server.stop()


async def run_out_of_memory(large: Path, tmp_path: Path) -> Any:
    from trellis.messages import Load
    from trellis.workers.processes import ProcessSpawner
    from trellis.workers.worker import Worker

    spawn = ProcessSpawner(tmp_path / "w", tmp_path / "logs", memory_limit=700_000_000)
    worker = await Worker.start(spawn)
    try:
        return await worker.ask(Load(path=str(large)))
    finally:
        await worker.stop()
        spawn.close()


@pytest.mark.anyio
async def test_an_engine_that_runs_out_of_memory_says_so(large: Path, tmp_path: Path) -> None:
    from trellis.errors import EngineError

    with pytest.raises(EngineError) as raised:
        await run_out_of_memory(large, tmp_path)
    assert raised.value.code == "out_of_memory", raised.value.message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", place]).returncode:
        pytest.skip("a small file system can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_loses_no_choice_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    server = Server(small_disk, fake=False)
    try:
        with server.client() as client:
            state = new_session(client, control_prompt="", max_new_tokens=8)
            filler = small_disk / "filler"
            free = shutil.disk_usage(small_disk).free
            filler.write_bytes(b"x" * (free - 400_000))
            url = f"/api/steering/sessions/{state['id']}"
            said = client.post(f"{url}/choose", json={"offer": state["offer"]["id"], "choice": 0})
            assert said.status_code == 202, said.text
            state = wait_failed(client, state["id"])
            assert state["error"]["code"] == "disk_full", state["error"]
            assert "Free up disk space" in state["error"]["next_step"]
            filler.unlink()
            client.post(f"{url}/resume")
            assert wait_ready(client, state["id"], 60)["head"]["step"] == 1
            large = {"kind": "prompts", "name": "a", "files": [{"path": "a.txt", "bytes": 10**9}]}
            refused = client.post("/api/uploads", json=large)
            assert refused.status_code == 507
            assert refused.json()["error"]["code"] == "disk_full"
            job = client.post(f"{url}/exports", json={"kind": "merged", "name": "m"}).json()
            with client.stream("GET", f"/api/jobs/{job['id']}/events", timeout=60) as response:
                last = [(name, data) for _, name, data in read_events(response)][-1]
            assert last[0] == "failed"
            assert last[1]["error"]["code"] == "disk_full"
            assert "export the adapter" in last[1]["error"]["next_step"]
    finally:
        server.stop()
    assert "Traceback" not in server.output, server.output


def test_a_disk_so_full_that_nothing_can_be_noted_answers_in_words(small_disk: Path) -> None:
    server = Server(small_disk)
    try:
        with server.client() as client:
            state = new_session(client, control_prompt="")
            (small_disk / "filler").write_bytes(b"x" * shutil.disk_usage(small_disk).free)
            answer = httpx.Response(202)
            for number in range(200):
                url = f"/api/steering/sessions/{state['id']}"
                answer = client.patch(url, json={"name": f"{number} " + "x" * 150})
                if answer.status_code >= 400:
                    break
            assert answer.status_code == 507, answer.text
            assert answer.json()["error"]["code"] == "disk_full"
            (small_disk / "filler").unlink()
            assert client.patch(url, json={"name": "again"}).status_code == 200
    finally:
        server.stop()
