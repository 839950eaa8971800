"""Uploads: piece by piece, gone on with where they broke off, whole or not at all; what is not taken is named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trellis.errors import Conflict, Invalid, NotFound
from trellis.studio.uploads import Uploads

pytestmark = pytest.mark.anyio


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return make(tmp_path)


def make(root: Path, limit: int = 10_000) -> Uploads:
    return Uploads(root / "uploads", root / "prompts", root / "models", limit)


async def test_a_file_comes_in_pieces_and_is_seen_when_it_is_whole(uploads: Uploads, tmp_path: Path) -> None:
    state = await uploads.begin("prompts", "mine", [("mine.txt", 7)])
    state = await uploads.append(state["id"], 0, 0, b"Why?\n")
    assert state["files"][0]["received"] == 5
    assert not (tmp_path / "prompts").exists()
    state = await uploads.append(state["id"], 0, 5, b"So")
    assert (state["state"], state["result"]) == ("done", "mine.txt")
    assert (tmp_path / "prompts" / "mine.txt").read_bytes() == b"Why?\nSo"
    assert [file.suffix for file in (tmp_path / "uploads").iterdir()] == [".done"]
    assert await uploads.state(state["id"]) == state, "an answer that was lost is given again"
    assert await uploads.append(state["id"], 0, 5, b"So") == state


async def test_it_goes_on_after_a_restart_where_it_broke_off(tmp_path: Path) -> None:
    first = await make(tmp_path).begin("model", "m", [("config.json", 2), ("model.safetensors", 4)])
    await make(tmp_path).append(first["id"], 0, 0, b"{}")
    await make(tmp_path).append(first["id"], 1, 0, b"ab")
    again = await make(tmp_path).begin("model", "m", [("config.json", 2), ("model.safetensors", 4)])
    assert again["id"] == first["id"]
    assert [file["received"] for file in again["files"]] == [2, 2]
    done = await make(tmp_path).append(first["id"], 1, 2, b"cd")
    assert done["state"] == "done"
    assert (tmp_path / "models" / "m" / "model.safetensors").read_bytes() == b"abcd"


async def test_a_piece_in_the_wrong_place_is_answered_with_what_is_here(uploads: Uploads) -> None:
    state = await uploads.begin("prompts", "a", [("a.txt", 4)])
    await uploads.append(state["id"], 0, 0, b"ab")
    with pytest.raises(Conflict) as raised:
        await uploads.append(state["id"], 0, 0, b"ab")
    assert raised.value.code == "wrong_offset"
    assert raised.value.details["upload"]["files"][0]["received"] == 2
    with pytest.raises(Invalid, match="ends at 7"):
        await uploads.append(state["id"], 0, 2, b"cdefg")


@pytest.mark.parametrize(
    ("kind", "name", "files", "field"),
    [
        ("prompts", "../up", [("a.txt", 1)], "name"),
        ("prompts", "a", [("../a.txt", 1)], "files.0.path"),
        ("prompts", "a", [("a.exe", 1)], "files.0.path"),
        ("prompts", "a", [("a.txt", 1), ("b.txt", 1)], "files"),
        ("prompts", "a", [("a.txt", 10_001)], "files"),
        ("prompts", "a", [], "files"),
        ("model", "m", [("config.json", 1), ("pytorch_model.bin", 1)], "files.1.path"),
        ("model", "m", [("config.json", 1), ("modeling.py", 1)], "files.1.path"),
        ("model", "m", [("config.json", 1), ("deep/model.safetensors", 1)], "files.1.path"),
        ("model", "m", [("model.safetensors", 1)], "files"),
        ("model", "My Model (v2)", [("config.json", 1)], "name"),
        ("model", "demo", [("config.json", 1)], "name"),
        ("model", "m", [("config.json", 1), ("config.json", 1)], "files"),
        ("model", ".hidden", [("config.json", 1)], "name"),
        ("model", "a\x00b", [("config.json", 1)], "name"),
    ],
)
async def test_what_is_not_taken_is_named(
    uploads: Uploads, tmp_path: Path, kind: str, name: str, files: list[tuple[str, int]], field: str
) -> None:
    with pytest.raises(Invalid) as raised:
        await uploads.begin(kind, name, files)  # type: ignore[arg-type]
    assert field in {entry["field"] for entry in raised.value.fields}
    assert not (tmp_path / "uploads").exists()


async def test_a_name_that_is_taken_is_refused(uploads: Uploads, tmp_path: Path) -> None:
    (tmp_path / "models" / "m").mkdir(parents=True)
    with pytest.raises(Conflict, match="“m” already"):
        await uploads.begin("model", "m", [("config.json", 1)])


async def test_an_upload_can_be_given_up(uploads: Uploads, tmp_path: Path) -> None:
    state = await uploads.begin("prompts", "a", [("a.txt", 4)])
    await uploads.cancel(state["id"])
    assert list((tmp_path / "uploads").iterdir()) == []
    for unknown in (state["id"], "u" + "0" * 32, "../x", ""):
        with pytest.raises(NotFound):
            await uploads.state(unknown)


async def test_a_disk_without_room_is_told_about_before(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr("trellis.studio.uploads.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(Conflict) as raised:
        await uploads.begin("prompts", "a", [("a.txt", 4)])
    assert raised.value.code == "disk_full"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(data=st.binary(min_size=1, max_size=500), seed=st.integers(0, 1000))
async def test_any_pattern_of_lost_answers_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, seed: int
) -> None:
    root, dice = tmp_path_factory.mktemp("any"), random.Random(seed)
    uploads = make(root)
    state = await uploads.begin("prompts", "a", [("a.txt", len(data))])
    while state["state"] != "done":
        at = state["files"][0]["received"]
        piece = data[at : at + dice.randint(1, 100)]
        answer = await uploads.append(state["id"], 0, at, piece)
        if answer["state"] == "done" or dice.random() < 0.5:
            state = answer
        else:  # the answer was lost: the client sends again, and is told where to go on
            with pytest.raises(Conflict) as raised:
                await uploads.append(state["id"], 0, at, piece)
            state = raised.value.details["upload"]
    assert (root / "prompts" / "a.txt").read_bytes() == data


async def test_what_came_meanwhile_is_not_written_over(uploads: Uploads, tmp_path: Path) -> None:
    one = await uploads.begin("prompts", "p", [("p.txt", 1)])
    two = await uploads.begin("prompts", "p", [("p.txt", 2)])
    await uploads.append(two["id"], 0, 0, b"22")
    with pytest.raises(Conflict, match="was added during the upload"):
        await uploads.append(one["id"], 0, 0, b"1")
    assert (tmp_path / "prompts" / "p.txt").read_bytes() == b"22"


async def test_files_are_told_apart_by_more_than_names_and_sizes(uploads: Uploads) -> None:
    files = [("config.json", 2), ("model.safetensors", 4)]
    one = await uploads.begin("model", "m", files, "monday")
    assert (await uploads.begin("model", "m", files[::-1], "monday"))["id"] == one["id"]
    assert (await uploads.begin("model", "m", files, "tuesday"))["id"] != one["id"]
    assert [file["path"] for file in one["files"]] == ["config.json", "model.safetensors"]


async def test_a_crash_between_the_last_moves_loses_nothing(uploads: Uploads, tmp_path: Path) -> None:
    state = await uploads.begin("model", "m", [("config.json", 2), ("model.safetensors", 4)])
    await uploads.append(state["id"], 0, 0, b"{}")
    place = tmp_path / "uploads" / state["id"]
    (place / "whole").mkdir()
    (place / "0").rename(place / "whole" / "config.json")
    again = await make(tmp_path).begin("model", "m", [("config.json", 2), ("model.safetensors", 4)])
    assert [file["received"] for file in again["files"]] == [2, 0]
    done = await make(tmp_path).append(state["id"], 1, 0, b"abcd")
    assert done["state"] == "done"
    assert {file.name for file in (tmp_path / "models" / "m").iterdir()} == {"config.json", "model.safetensors"}


async def test_an_upload_begins_while_another_one_ends(uploads: Uploads, tmp_path: Path) -> None:
    state = await uploads.begin("prompts", "ends", [("ends.txt", 4)])
    # As the other one's file is seen in its folder, and gone when it is looked at.
    (tmp_path / "uploads" / state["id"] / "0").symlink_to(tmp_path / "moved away")
    assert (await uploads.begin("prompts", "begins", [("begins.txt", 4)]))["state"] == "open"
