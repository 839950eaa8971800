"""Taking the result away, with the real engine through the real server: what plain PEFT and transformers make of it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server, new_session, wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]
API = "/api/steering/sessions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.tiny import make_llama

    save = tmp_path_factory.mktemp("save")
    make_llama(save / "models" / "tiny")
    make_llama(save / "models" / "larger", hidden=512, layers=6)
    server = Server(save, fake=False, TRELLIS_RATE_LIMIT="0")
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def session(server: Server) -> str:
    with server.client() as client:
        state = new_session(client, model="tiny", control_prompt="", max_new_tokens=12, context_length=256, max_undos=1,
                            checkpoint_interval=100, learning_rate=0.01, seed=1)  # fmt: skip
        for choice in (0, 2, 1, 3):
            said = {"offer": state["offer"]["id"], "choice": choice}
            client.post(f"{API}/{state['id']}/choose", json=said)
            state = wait_ready(client, state["id"])
        return str(state["id"])


def ended(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while True:
        now: dict[str, Any] = client.get(f"/api/jobs/{job['id']}").json()
        if now["state"] in ("done", "failed", "cancelled"):
            return now
        assert time.monotonic() < deadline
        time.sleep(0.05)


def export(client: httpx.Client, session: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"{API}/{session}/exports", json=body)
    assert answer.status_code == 202, answer.text
    return ended(client, answer.json())


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_plain_peft_loads_the_adapter_of_any_step(client: httpx.Client, server: Server, session: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = server.save_dir / "models" / "tiny"
    nodes = client.get(f"{API}/{session}/tree").json()["nodes"]
    found = []
    for number in (4, 2):  # the head, and a step whose weights were pruned
        job = export(client, session, kind="adapter", name=f"adapter-{number}", node=nodes[number]["id"])
        assert job["state"] == "done", job["error"]
        assert job["result"]["checks"]["same_as_in_the_session"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), job["result"]["path"])
        assert model.peft_config["default"].base_model_name_or_path == str(base)
        found.append(logits(model.eval()))
    plain = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    assert not torch.equal(found[0], plain)
    assert not torch.equal(found[0], found[1])


def test_a_merged_model_is_written_proved_and_loads_by_itself(
    client: httpx.Client, server: Server, session: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = export(client, session, kind="adapter", name="beside")["result"]["path"]
    job = export(client, session, kind="merged", name="merged")
    assert job["state"] == "done", job["error"]
    checks = job["result"]["checks"]
    assert checks["mean_difference"] < 1e-4
    assert checks["tokens"] > 100
    assert checks["agreement"] > 0.99
    path = Path(job["result"]["path"])
    merged = AutoModelForCausalLM.from_pretrained(path).eval()
    base = AutoModelForCausalLM.from_pretrained(server.save_dir / "models" / "tiny")
    both = PeftModel.from_pretrained(base, adapter).eval()
    assert torch.allclose(logits(merged), logits(both), atol=1e-4)
    assert AutoTokenizer.from_pretrained(path).chat_template
    card = (path / "README.md").read_text()
    assert "4 choices between" in card
    assert "library_name: transformers" in card


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_rotten_adapter_is_made_again_before_it_is_exported(
    client: httpx.Client, server: Server, session: str, kind: str
) -> None:
    nodes = client.get(f"{API}/{session}/tree").json()["nodes"]
    whole = Path(export(client, session, kind="adapter", name=f"whole before {kind}")["result"]["path"])
    weights = next(
        folder for folder in (server.save_dir / "weights").iterdir()
        if (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()
    )  # fmt: skip
    file = weights / "adapter_model.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-4] + b"\xff\xff\xff\xff")
    job = export(client, session, kind=kind, name=f"mended {kind}", node=nodes[4]["id"])
    assert job["state"] == "done", job["error"]
    assert file.read_bytes() == kept
    if kind == "adapter":
        assert (Path(job["result"]["path"]) / "adapter_model.safetensors").read_bytes() == kept


def test_the_card_says_that_it_was_grown_in_few_bits(client: httpx.Client) -> None:
    state = new_session(
        client, model="tiny", precision="4-bit", control_prompt="", max_new_tokens=4, context_length=256
    )
    job = export(client, state["id"], kind="merged", name="few bits")
    assert job["state"] == "done", job["error"]
    card = (Path(job["result"]["path"]) / "README.md").read_text()
    assert "base model in 4-bit" in card
    assert "Saved in float32" in card


def test_a_zip_holds_all_of_it(client: httpx.Client, session: str) -> None:
    job = export(client, session, kind="adapter", name="zipped one")
    with client.stream("GET", "/api/exports/zipped%20one/zip") as answer:
        assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''zipped%20one.zip"
        data = answer.read()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        sizes = {info.filename.split("/")[1]: info.file_size for info in archive.infolist()}
    assert sizes.items() >= job["result"]["files"].items()
    assert "adapter_model.safetensors" in sizes


def test_a_merge_can_be_cancelled_and_leaves_nothing(client: httpx.Client, server: Server) -> None:
    state = new_session(client, model="larger", control_prompt="", max_new_tokens=4, context_length=256)
    before = set(server.engine_pids())
    job = client.post(f"{API}/{state['id']}/exports", json={"kind": "merged", "name": "given-up"}).json()
    deadline = time.monotonic() + 60
    while client.get(f"/api/jobs/{job['id']}").json()["progress"]["stage"] not in ("merging", "writing", "checking"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert client.post(f"/api/jobs/{job['id']}/cancel").status_code in (202, 409)
    assert ended(client, job)["state"] == "cancelled"
    assert set(server.engine_pids()) <= before
    assert [file.name for file in (server.save_dir / "exports").iterdir() if "given-up" in file.name] == []
    assert [file.name for file in (server.save_dir / "exports").iterdir() if file.name.startswith(".")] == []


def test_a_name_that_is_taken_or_leads_elsewhere_is_refused(client: httpx.Client, session: str) -> None:
    export(client, session, kind="adapter", name="taken")
    answer = client.post(f"{API}/{session}/exports", json={"kind": "adapter", "name": "taken"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "exists")
    for name in ("../up", "/etc/x", "a/b", ".hidden", "a\x00b", "a ", "x" * 101, ""):
        answer = client.post(f"{API}/{session}/exports", json={"kind": "adapter", "name": name})
        assert answer.status_code == 422, name
        assert answer.json()["error"]["field"] == "name"
    for name in ("..%2fweights", "%2e%2e", "nothing", ".."):
        assert client.get(f"/api/exports/{name}/zip").status_code in (404, 422)


def test_the_same_request_is_one_export(client: httpx.Client, session: str) -> None:
    body, key = {"kind": "adapter", "name": "once"}, {"Idempotency-Key": "export once"}
    first = client.post(f"{API}/{session}/exports", json=body, headers=key).json()
    ended(client, first)
    assert client.post(f"{API}/{session}/exports", json=body, headers=key).json()["id"] == first["id"]


def test_exports_are_listed_and_deleted_and_outlive_their_session(client: httpx.Client) -> None:
    state = new_session(client, model="tiny", control_prompt="", max_new_tokens=4, context_length=256)
    export(client, state["id"], kind="adapter", name="kept")
    client.delete(f"{API}/{state['id']}")
    assert "kept" in {each["name"] for each in client.get("/api/exports").json()}
    assert client.delete("/api/exports/kept").status_code == 204
    assert client.get("/api/exports/kept").status_code == 404
