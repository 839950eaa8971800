"""Prompts made ready: an order that survives everything, folders that are not left, a million rows at once."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from tests.conftest import open_studio, ready, until
from trellis.errors import Invalid, TrellisError
from trellis.messages import Progress
from trellis.options import Dataset
from trellis.studio.datasets.datasets import resolve_inside
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio


def put(folder: Path, name: str = "mine.jsonl", count: int = 40) -> Path:
    file = folder / "prompts" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"prompt": f"Question {number}?"}) + "\n" for number in range(count)))
    return file


FILE = {"source": "file", "id": "mine.jsonl"}


async def test_a_session_is_steered_on_a_file(tmp_path: Path, studio: Studio) -> None:
    put(tmp_path)
    session = await studio.steering.create(None, {"dataset": FILE, "control_prompt": ""})
    state = await ready(session)
    assert state["offer"]["prompt"].startswith("Question ")
    assert state["dataset"] == {"source": "file", "position": 0, "total": 40, "notes": []}


async def test_a_session_tells_what_was_left_out_of_its_prompts(tmp_path: Path, fake_spawn: Spawn) -> None:
    file = put(tmp_path, count=0)
    file.write_text(
        '{"prompt": "Why?"}\n{"prompt": ""}\n{"prompt": " "}\n{"n": 1}\n{"prompt": "How?"}\n{"prompt": ""}\n'
    )
    told = ["4 of 6 rows were left out: 3 are empty (first: line 2), 1 has no text in “prompt” (line 4)."]
    async with open_studio(tmp_path, fake_spawn) as studio:
        found = await studio.datasets.preview(Dataset(source="file", id="mine.jsonl"))
        assert (found["notes"], found["total"], found["skipped"]) == (told, 2, 4)
        session = await studio.steering.create(None, {"dataset": FILE, "control_prompt": ""})
        assert (await ready(session))["dataset"]["notes"] == told
        place = tmp_path / "prepared" / str(session.prepared_prompts)
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        again.work.wake()
        assert (await ready(again))["dataset"]["notes"] == told
    (place / "about.json").write_text(json.dumps({"total": 2, "skipped": 4}))
    async with open_studio(tmp_path, fake_spawn) as studio:
        older = await studio.steering.session(session.id)
        older.work.wake()
        assert (await ready(older))["dataset"]["notes"] == [
            "4 rows were left out, which had no text that can be a prompt."
        ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.zst", "a.txt.xz", "A.JSONL.GZ"])
async def test_compressed_files_are_listed_and_can_be_uploaded(tmp_path: Path, studio: Studio, name: str) -> None:
    put(tmp_path, name)
    (tmp_path / "prompts" / "a.tar.gz").write_bytes(b"x")
    assert [entry["name"] for entry in await studio.datasets.list_files()] == [name]
    assert (await studio.uploads.begin("prompts", f"b{name}", [(f"b{name}", 1)]))["state"]
    with pytest.raises(Invalid, match=r"must end in \.jsonl"):
        await studio.uploads.begin("prompts", "a.tar.gz", [("a.tar.gz", 1)])


async def test_rows_of_any_file_are_read_by_the_reader_and_leave_nothing(tmp_path: Path, studio: Studio) -> None:
    file = put(tmp_path, count=3)
    async with studio.datasets.rows(file, 10) as rows:
        assert [json.loads(line) for line in rows.read_text().splitlines()] == [
            [f"line {number + 1}", {"prompt": f"Question {number}?"}] for number in range(3)
        ]
    assert list((tmp_path / "prepared").iterdir()) == []
    with pytest.raises(Invalid, match="more than 2 rows"):
        async with studio.datasets.rows(file, 2):
            pass
    assert list((tmp_path / "prepared").iterdir()) == []


async def test_the_order_survives_a_restart_and_the_loss_of_the_file(tmp_path: Path, fake_spawn: Spawn) -> None:
    file = put(tmp_path)
    asked: list[str] = []
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {"dataset": FILE, "control_prompt": "", "seed": 7})
        for _ in range(3):
            asked.append((await ready(session))["offer"]["prompt"])
            await session.commands.skip(f"s{len(asked)}")
    file.write_text('{"prompt": "Something else?"}\n')
    file.unlink()
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        again.work.wake()
        for step in range(3):
            asked.append((await ready(again))["offer"]["prompt"])
            await again.commands.skip(f"t{step}")
        assert again.prompts is not None
        assert asked == [again.prompts.at(place) for place in range(6)]
        assert len(set(asked)) == 6


async def test_prompts_that_are_gone_are_read_again(tmp_path: Path, fake_spawn: Spawn) -> None:
    put(tmp_path)
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {"dataset": FILE})
        await ready(session)
        assert session.prepared_prompts
        await studio.datasets.discard(session.prepared_prompts)
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        again.work.wake()
        await again.commands.resume()
        await ready(again)
        await again.commands.skip("s1")
        assert (await ready(again))["dataset"]["total"] == 40


async def test_deleting_the_last_session_frees_its_prompts(tmp_path: Path, studio: Studio) -> None:
    put(tmp_path)
    one = await studio.steering.create(None, {"dataset": FILE})
    two = await studio.steering.create(None, {"dataset": FILE | {"shuffle": False}})
    await ready(one)
    await ready(two)
    assert one.prepared_prompts == two.prepared_prompts, "the same prompts are made ready once"
    place = tmp_path / "prepared" / str(one.prepared_prompts)
    await studio.steering.delete(one.id)
    assert place.is_dir()
    await studio.steering.delete(two.id)
    assert not place.exists()


@pytest.mark.parametrize(
    ("dataset", "field", "what"),
    [
        ({"source": "file", "id": "nope.jsonl"}, "config.dataset.id", "There are: mine.jsonl"),
        ({"source": "file", "id": "mine.jsonl", "column": "nope"}, "config.dataset.column", "“prompt”"),
        ({"source": "file", "id": "mine.jsonl", "split": "dev"}, "config.dataset.split", "“all”"),
        ({"source": "file", "id": ""}, "config.dataset.id", "is empty"),
        ({"source": "hub", "id": "../../etc"}, "config.dataset.id", "not the name of a Hugging Face dataset"),
        ({"source": "hub", "id": "json"}, "config.dataset.id", "not the name of a Hugging Face dataset"),
        ({"source": "hub", "id": "secret"}, "config.dataset.id", "not the name of a Hugging Face dataset"),
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_loaded(
    tmp_path: Path, studio: Studio, dataset: dict[str, str], field: str, what: str
) -> None:
    put(tmp_path)
    with pytest.raises(Invalid) as raised:
        await studio.steering.create(None, {"dataset": dataset})
    assert what in str(raised.value.fields) + raised.value.message
    assert field in {raised.value.field, *(entry["field"] for entry in raised.value.fields)}
    assert await studio.steering.list_sessions() == []
    assert await studio.jobs.list() == []


@pytest.mark.parametrize(
    "name",
    ["../secret.txt", "/etc/passwd", "a/../../secret.txt", "link.txt", "a\x00b", "", ".", "..", "C:\\x", "x" * 500],
)
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / "prompts"
    (root / "a").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert resolve_inside(root, name) is None


async def test_another_folder_that_is_named_may_be_read(tmp_path: Path, fake_spawn: Spawn) -> None:
    file = put(tmp_path / "elsewhere", "deep/down.txt", 5)
    async with open_studio(tmp_path / "save", fake_spawn, data_dirs=str(file.parent.parent)) as studio:
        names = {entry["name"] for entry in await studio.datasets.list_files()}
        assert names == {"deep", "deep/down.txt"}
        assert (await studio.datasets.preview(Dataset(source="file", id="deep")))["total"] == 5


async def test_a_million_prompts_preview_in_the_first_rows(tmp_path: Path, studio: Studio) -> None:
    put(tmp_path, "million.jsonl", 1_000_000)
    begun = time.monotonic()
    found = await studio.datasets.preview(Dataset(source="file", id="million.jsonl"))
    assert found["samples"] == ["Question 0?", "Question 1?", "Question 2?"]
    assert found["total"] == 1_000_000
    assert time.monotonic() - begun < 20, "it must not read all rows; bench/scale.py measures how long it takes"


async def test_preparing_can_be_cancelled_and_leaves_nothing_behind(tmp_path: Path, studio: Studio) -> None:
    put(tmp_path, "large.jsonl", 400_000)
    told: list[Progress] = []
    work = asyncio.create_task(studio.datasets.prepare(Dataset(source="file", id="large.jsonl"), told.append))
    await until(lambda: len(told) > 1)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert list((tmp_path / "prepared").iterdir()) == []
    assert 0 < told[-1].fraction < 1


async def test_a_reader_that_dies_is_told_about(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path)
    monkeypatch.setattr("trellis.workers.reader.sys.executable", "/bin/false")
    with pytest.raises(TrellisError, match="ended without an answer"):
        await studio.datasets.preview(Dataset(source="file", id="mine.jsonl"))


@pytest.mark.slow
async def test_a_folder_beside_the_studio_is_not_taken_for_a_dataset_on_the_hub(
    tmp_path: Path, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "secret").mkdir(parents=True)
    (tmp_path / "org" / "secret" / "data.jsonl").write_text('{"prompt": "the secret"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TrellisError) as raised:
        await studio.datasets.preview(Dataset(source="hub", id="org/secret"))
    assert raised.value.code in ("network", "not_found", "timeout")


async def test_long_prompts_preview_in_part_and_those_of_megabytes_are_counted(tmp_path: Path, studio: Studio) -> None:
    file = tmp_path / "prompts" / "huge.jsonl"
    file.parent.mkdir()
    huge = "".join(json.dumps({"prompt": "x" * 9_000_000}) + "\n" for _ in range(3))
    file.write_text(json.dumps({"prompt": "x" * 100_000}) + "\n" + huge)
    found = await studio.datasets.preview(Dataset(source="file", id="huge.jsonl"))
    assert [len(sample) for sample in found["samples"]] == [2001]
    told = "left out: 3 are longer than 100 000 characters (first: line "
    assert told in found["notes"][0]
    file.write_text(huge)
    with pytest.raises(Invalid, match="There are no prompts in it") as raised:
        await studio.datasets.preview(Dataset(source="file", id="huge.jsonl"))
    assert told in raised.value.message


@pytest.mark.parametrize("damage", [b"", b"1234567"])
async def test_damaged_offsets_are_read_again(tmp_path: Path, fake_spawn: Spawn, damage: bytes) -> None:
    put(tmp_path)
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create(None, {"dataset": FILE})
        await ready(session)
        place = tmp_path / "prepared" / str(session.prepared_prompts)
    (place / "offsets.u64").write_bytes(damage)
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.steering.session(session.id)
        assert again.prompts is None
        studio_discards = studio.datasets.discard(str(session.prepared_prompts))
        await studio_discards
        again.work.wake()
        await until(lambda: again.prompts is not None)


async def test_a_file_whose_name_is_no_text_is_not_listed(studio: Studio) -> None:
    studio.datasets.folder.mkdir(parents=True, exist_ok=True)
    for name in (b"odd\xff.jsonl", b"plain.jsonl"):
        (studio.datasets.folder / os.fsdecode(name)).write_text('{"prompt": "Why?"}\n')
    assert [entry["name"] for entry in await studio.datasets.list_files()] == ["plain.jsonl"]
