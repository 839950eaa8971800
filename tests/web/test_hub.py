"""Models and datasets from a hub, through the real server and the real engine; the hub is one on this computer that
speaks the hub's protocol, breaks off, hangs and refuses."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.hub import COMMIT, FakeHub
from tests.quantized import change_config
from tests.server import Server, new_session, read_events, wait_ready

pytestmark = [pytest.mark.engine, pytest.mark.slow]


BESIDE = (
    "additional_chat_templates/tool_use.jinja", "tekken.json", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "spiece.model", "vocab.bpe", "NOTICE", "LICENSE.txt", "USE_POLICY.md", "README.md",
)  # fmt: skip
LEFT_THERE = ("onnx/model.onnx", "original/params.json", "pytorch_model.bin", "notes.pdf")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    from tests.tiny import make_llama, make_model

    root = tmp_path_factory.mktemp("hub")
    tiny = make_llama(root / "models" / "org" / "tiny", hidden=128)
    for name in (*BESIDE, *LEFT_THERE):
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_text(f'"{name}"')
    make_llama(root / "models" / "org" / "broken", hidden=256)
    make_model(root / "models" / "org" / "slow", "gpt2")
    make_model(root / "models" / "org" / "gated", "gpt2")
    pickled = root / "models" / "org" / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    change_config(make_model(root / "models" / "org" / "bert", "gpt2"), model_type="bert",
                  architectures=["BertForMaskedLM"])  # fmt: skip
    change_config(make_llama(root / "models" / "org" / "awq"), quantization_config={"quant_method": "awq", "bits": 4})
    adapter = root / "models" / "org" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    data = root / "datasets" / "org" / "qa" / "data"
    data.mkdir(parents=True)
    rows = [json.dumps({"question": f"Question {number}?", "answer": "x"}) for number in range(60)]
    (data / "train.jsonl").write_text("\n".join(rows))
    (data / "test.jsonl").write_text(rows[0])
    (root / "datasets" / "org" / "scripted").mkdir()
    (root / "datasets" / "org" / "scripted" / "scripted.py").write_text("raise SystemExit(1)")
    hub = FakeHub(root)
    hub.gated.add("org/gated")
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def server(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("save"), fake=False, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret", TRELLIS_HUB_TIMEOUT="3",
        TRELLIS_RATE_LIMIT="0",
    )  # fmt: skip
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output
    assert "hf_secret" not in server.output


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def load(client: httpx.Client, **body: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The job of a load when it has ended, and all its progress."""
    answer = client.post("/api/models/load", json=body)
    assert answer.status_code == 202, answer.text
    seen = []
    with client.stream("GET", f"/api/jobs/{answer.json()['id']}/events", timeout=60) as response:
        for _, name, data in read_events(response):
            if name != "progress":
                break
            seen.append(data)
    return client.get(f"/api/jobs/{answer.json()['id']}").json(), seen


def test_a_model_comes_from_the_hub_with_true_figures_and_is_steered(client: httpx.Client, hub: FakeHub) -> None:
    job, seen = load(client, model="org/tiny")
    assert job["state"] == "done", job["error"]
    stages = list(dict.fromkeys(step["stage"] for step in seen))
    assert stages[-7:] == ["initializing", "downloading", "reading", "parsing", "placing", "warming_up", "ready"]
    loading = [step for step in seen if step["stage"] == "downloading"]
    tiny = hub.root / "models" / "org" / "tiny"
    wanted = [file for file in tiny.rglob("*") if file.is_file() and str(file.relative_to(tiny)) not in LEFT_THERE]
    assert loading[-1]["total_bytes"] == sum(file.stat().st_size for file in wanted)
    assert [step["fraction"] for step in seen] == sorted(step["fraction"] for step in seen)
    found = {model["id"]: model for model in client.get("/api/models").json()}["org/tiny"]
    assert (found["source"], found["state"]) == ("hub", "loaded")
    assert found["size"] > 100_000
    state = new_session(client, model="org/tiny", control_prompt="", max_new_tokens=12, context_length=256)
    client.post(f"/api/steering/sessions/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 1})
    assert wait_ready(client, state["id"])["head"]["step"] == 1
    assert hub.tokens == {"hf_secret"}


def test_what_a_tokenizer_or_a_merged_model_needs_beside_the_weights_is_fetched(
    client: httpx.Client, server: Server
) -> None:
    load(client, model="org/tiny")
    (folder,) = [file.parent for file in server.save_dir.rglob("tekken.json")]
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there >= set(BESIDE)
    assert not there & set(LEFT_THERE)


def test_what_was_fetched_is_not_fetched_again_and_needs_no_hub(client: httpx.Client, hub: FakeHub) -> None:
    load(client, model="org/tiny")
    client.post("/api/models/org/tiny/unload")
    sent = dict(hub.bytes_sent)
    hub.hang = True
    try:
        job, seen = load(client, model="org/tiny")
    finally:
        hub.hang = False
    assert job["state"] == "done", job["error"]
    assert "downloading" not in {step["stage"] for step in seen}
    client.post("/api/models/org/tiny/unload")
    pinned, _ = load(client, model="org/tiny", revision=COMMIT)
    assert pinned["state"] == "done", pinned["error"]
    assert hub.bytes_sent == sent


def test_a_download_that_breaks_off_goes_on_where_it_was(client: httpx.Client, hub: FakeHub) -> None:
    from trellis.engine.hub_download import CHUNK_BYTES

    size = (hub.root / "models" / "org" / "broken" / "model.safetensors").stat().st_size
    hub.bytes_sent.pop("model.safetensors", None)
    hub.disconnect_after = size // 2
    try:
        job, _ = load(client, model="org/broken")
    finally:
        hub.disconnect_after = None
    assert size > 4 * CHUNK_BYTES
    assert job["state"] == "failed"
    assert job["error"]["code"] in ("network", "timeout")
    assert "partial download is kept" in job["error"]["next_step"]
    job, _ = load(client, model="org/broken")
    assert job["state"] == "done", job["error"]
    assert size <= hub.bytes_sent["model.safetensors"] < size + CHUNK_BYTES, "bytes that had arrived were fetched again"


def test_a_download_can_be_cancelled_and_gives_its_memory_back(
    client: httpx.Client, hub: FakeHub, server: Server
) -> None:
    hub.seconds_per_chunk = 0.3
    try:
        job = client.post("/api/models/load", json={"model": "org/slow"}).json()["id"]
        deadline = time.monotonic() + 30
        while client.get(f"/api/jobs/{job}").json()["progress"]["stage"] != "downloading":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        engines = len(server.engine_pids())
        ended = client.post(f"/api/jobs/{job}/cancel").json()
    finally:
        hub.seconds_per_chunk = 0.0
    assert ended["state"] == "cancelled"
    assert ended["result"]["memory_before"] > 100_000_000
    assert ended["result"]["memory_after"] == 0
    assert len(server.engine_pids()) == engines - 1


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"model": "org/nothing"}, "not_found", "no model “org/nothing” on Hugging Face"),
        ({"model": "org/tiny", "revision": "v9"}, "not_found", "no revision “v9”"),
        ({"model": "org/gated"}, "permission_denied", "don't have access to “org/gated”"),
        ({"model": "org/pickled"}, "not_found", "no safetensors files"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(
    client: httpx.Client, body: dict[str, str], code: str, message: str
) -> None:
    job, _ = load(client, **body)
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    assert message in job["error"]["message"]
    assert job["error"]["next_step"]
    assert "hf_secret" not in json.dumps(job)


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("org/bert", "unsupported_architecture", "BERT encoder"),
        ("org/awq", "unsupported_quantization", "AWQ"),
        ("org/adapter", "unsupported_format", "“org/base”"),
    ],
)
def test_no_weights_are_fetched_of_a_model_that_cannot_be_loaded(
    client: httpx.Client, hub: FakeHub, model: str, code: str, message: str
) -> None:
    job, _ = load(client, model=model)
    assert (job["state"], job["error"]["code"]) == ("failed", code), job["error"]
    assert message in job["error"]["message"]
    assert not [asked for asked in hub.requests if model in asked and asked.endswith(".safetensors")]
    assert [asked for asked in hub.requests if model in asked and asked.endswith(".json")]


def test_a_hub_that_hangs_is_given_up(client: httpx.Client, hub: FakeHub) -> None:
    hub.hang = True
    try:
        job, _ = load(client, model="org/other")
    finally:
        hub.hang = False
    assert (job["state"], job["error"]["code"]) == ("failed", "timeout")
    assert "TRELLIS_HUB_TIMEOUT" in job["error"]["next_step"]


@pytest.mark.parametrize("name", ["../secrets", "org/../x", "a/b/c", "/etc/passwd", "org/na me", "org//x", "a\x00b"])
def test_no_name_of_a_model_leads_elsewhere(client: httpx.Client, name: str) -> None:
    assert client.post("/api/models/load", json={"model": name}).status_code in (404, 422)


def test_a_dataset_on_the_hub_is_previewed_and_steered_on(client: httpx.Client) -> None:
    dataset = {"source": "hub", "id": "org/qa"}
    found = client.post("/api/steering/preview", json={"dataset": dataset}).json()
    assert found["samples"] == ["Question 0?", "Question 1?", "Question 2?"]
    assert (found["column"], found["split"], found["splits"]) == ("question", "train", ["train", "test"])
    state = new_session(client, dataset=dataset | {"rows": 50}, control_prompt="")
    assert state["dataset"] == {"source": "hub", "position": 0, "total": 50, "notes": []}
    assert state["offer"]["prompt"].startswith("Question ")


def test_files_on_the_hub_are_parsed_as_local_ones(client: httpx.Client, hub: FakeHub) -> None:
    data = hub.root / "datasets" / "org" / "tables"
    for name, content in {
        "commas/train.csv": b"prompt\nHello, how are you?\nFine, and you?\n",
        "semicolons/train.csv": b'"prompt";"a, b"\n"Why; how?";"x, y"\n"";"x"\n',
        "packed/train.jsonl.gz": gzip.compress(b'{"prompt": "Why?"}\n{"prompt": ""}\n'),
        "document/train.json": json.dumps({"version": "1", "data": [{"prompt": "Why?"}]}).encode(),
        "twice/train.csv": b"prompt,prompt\na,b\n",
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(content)
    subsets = ("commas", "semicolons", "packed", "document", "twice")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*\n" for name in subsets)
    (data / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def found(subset: str) -> Any:
        body = {"dataset": {"source": "hub", "id": "org/tables", "subset": subset}}
        return client.post("/api/steering/preview", json=body).json()

    assert found("commas")["samples"] == ["Hello, how are you?", "Fine, and you?"]
    assert found("semicolons")["samples"] == ["Why; how?"]
    assert found("semicolons")["notes"] == ["1 of 2 rows was left out: 1 is empty (line 3)."]
    assert found("packed")["samples"] == ["Why?"]
    assert (found("packed")["total"], found("packed")["skipped"]) == (1, 1)
    assert found("document")["samples"] == ["Why?"]
    assert "names the column “prompt” twice" in found("twice")["error"]["message"]


def test_pictures_in_a_dataset_on_the_hub_do_not_stand_in_the_way(client: httpx.Client, hub: FakeHub) -> None:
    import datasets
    import pyarrow.parquet

    rows = [{"image": {"bytes": b"no picture", "path": None}, "meta": {"ask": "Why?"}, "raw": b"How?", "text": ""}]
    rows += [{"image": None, "meta": {"ask": ""}, "raw": b"\xff", "text": ""}]
    kind = datasets.Value
    features = datasets.Features(
        {"image": datasets.Image(), "meta": {"ask": kind("string")}, "raw": kind("binary"), "text": kind("string")}
    )
    table = pyarrow.Table.from_pylist(rows, features.arrow_schema)
    data = hub.root / "datasets" / "org" / "pictures" / "data"
    data.mkdir(parents=True)
    pyarrow.parquet.write_table(table, data / "train.parquet")

    def found(column: str) -> Any:
        body = {"dataset": {"source": "hub", "id": "org/pictures", "column": column}}
        return client.post("/api/steering/preview", json=body).json()

    assert found("meta.ask")["samples"] == ["Why?"]
    assert found("meta.ask")["notes"] == ["1 of 2 rows was left out: 1 is empty (row 2)."]
    assert found("raw")["samples"] == ["How?"]
    assert "“text” holds no text" in found("text")["error"]["message"]


@pytest.mark.parametrize(
    ("dataset", "field", "message"),
    [
        ({"id": "org/qa", "split": "dev"}, "config.dataset.split", "The splits are “train”, “test”."),
        ({"id": "org/qa", "subset": "big"}, "config.dataset.subset", "The subsets are “default”."),
        ({"id": "org/qa", "column": "nope"}, "config.dataset.column", "“question”, “answer”"),
        ({"id": "org/none"}, "config.dataset.id", "no dataset “org/none”"),
        ({"id": "org/scripted"}, "config.dataset.id", "needs a script of its own, which is not run"),
    ],
)
def test_a_wrong_name_in_a_dataset_lists_what_there_is(
    client: httpx.Client, dataset: dict[str, str], field: str, message: str
) -> None:
    answer = client.post("/api/steering/sessions", json={"config": {"dataset": {"source": "hub"} | dataset}})
    assert answer.status_code in (404, 422), answer.text
    assert answer.json()["error"]["field"] == field
    assert message in answer.json()["error"]["message"]


def test_files_of_a_model_can_be_deleted(client: httpx.Client) -> None:
    load(client, model="org/broken")
    assert client.delete("/api/models/org/broken").status_code == 409
    client.post("/api/models/org/broken/unload")
    assert client.delete("/api/models/org/broken").status_code == 204
    assert "org/broken" not in {model["id"] for model in client.get("/api/models").json()}
    assert client.delete("/api/models/demo").status_code == 409
