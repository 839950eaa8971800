"""Files of prompts in every format that is read: what comes out, what is refused, and that nothing is read whole."""

from __future__ import annotations

import csv
import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid
from trellis.options import Dataset
from trellis.reader.__main__ import prepare, preview
from trellis.reader.columns import extract_from_value, extract_prompt, find_prompt_column
from trellis.reader.decoding import LocalFile
from trellis.reader.files import open_local_source, read_records

QUESTIONS = ["Why?", "What is rain?", "Ärger, 東京 and 🌱?"]


def write(folder: Path, kind: str) -> Path:
    file = folder / f"prompts.{kind}"
    table = [{"id": number, "question": question, "answer": "x"} for number, question in enumerate(QUESTIONS)]
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in table) + "\n\n")
    elif kind == "json":
        file.write_text(json.dumps(table))
    elif kind in ("csv", "tsv"):
        with file.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.DictWriter(out, ["id", "question", "answer"], delimiter="\t" if kind == "tsv" else ";")
            writer.writeheader()
            writer.writerows(table)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pylist(table), file)
    else:
        file.write_text("\n".join(QUESTIONS))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "txt"])
def test_each_format_gives_its_prompts(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, kind)
    found = preview(Dataset(source="file", id=file.name), file, 3)
    assert found["samples"] == QUESTIONS
    assert found["column"] == ("text" if kind == "txt" else "question")
    into = tmp_path / "into"
    into.mkdir()
    assert prepare(Dataset(source="file", id=file.name), file, into)["total"] == 3
    assert [json.loads(line) for line in (into / "prompts.jsonl").read_text().splitlines()] == QUESTIONS
    assert (into / "offsets.u64").stat().st_size == 3 * 8


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (" Why? ", "Why?"),
        ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}], "Why?"),
        ([{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "Why?"),
        ([{"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image"}]}], "Why?"),
        (["Why?", "So."], "Why?"),
        ([], ""),
        (None, ""),
        (7, "7"),
        (0.5, "0.5"),
        (float("nan"), ""),
        (True, ""),
        (b"Why?", "Why?"),
        (b"\xff\xfe", ""),
        ({"text": "Why?", "lang": "en"}, "Why?"),
        ({"role": "user", "content": "Why?"}, "Why?"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "Why?"),
        ([{"role": "assistant", "content": "So."}], ""),
    ],
)
def test_a_prompt_is_found_in_the_usual_shapes(value: Any, asked: str) -> None:
    assert extract_from_value(value).text == asked


def test_an_instruction_has_what_it_is_about_beside_it() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert extract_prompt(row, "instruction").text == "Translate.\n\nHund"


def test_the_surest_name_wins() -> None:
    assert find_prompt_column("", [{"text": "a", "Prompt": "b"}]) == "Prompt"
    assert find_prompt_column("", [{"text": "a", "prompt": ""}]) == "text"
    assert find_prompt_column("", [{"zebra": "a", "n": 1}]) == "zebra"


@pytest.mark.parametrize("wanted", ["nope", "n", "n.nope"])
def test_a_wrong_column_lists_what_there_is(wanted: str) -> None:
    with pytest.raises(Invalid, match="“text”, “n”") as raised:
        find_prompt_column(wanted, [{"text": "a", "n": True}])
    assert raised.value.field == "dataset.column"


def test_columns_without_a_usual_name_are_listed() -> None:
    with pytest.raises(Invalid, match="“zebra”, “yak”"):
        find_prompt_column("", [{"zebra": "a", "yak": "b"}])


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("Why?\n")
    return root


@pytest.mark.parametrize(
    ("names", "wanted", "split", "files"),
    [
        (["train.txt", "test.txt"], "", "train", 1),
        (["train-00000-of-00002.txt", "train-00001-of-00002.txt"], "", "train", 2),
        (["train/a.txt", "dev/b.txt"], "validation", "validation", 1),
        (["a.txt", "b.txt"], "", "all", 2),
    ],
)
def test_a_folder_has_the_splits_that_its_names_tell(
    tmp_path: Path, names: list[str], wanted: str, split: str, files: int
) -> None:
    source = open_local_source(folder_of(tmp_path, *names), wanted)
    assert (source.split, len(source.files)) == (split, files)


def test_a_wrong_split_lists_what_there_is(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.txt", "test.txt")
    with pytest.raises(Invalid, match=r"no split “dev”\. The splits are “test”, “train”") as raised:
        open_local_source(tmp_path, "dev")
    assert raised.value.field == "dataset.split"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{nope\n', "line 2, column 2 is not JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("a.json", b"[1, 2", "line 1, column 6 is not JSON: it ends too early"),
        ("a.parquet", b"PAR1 and nothing", "not a whole Parquet file"),
        ("a.txt", b"caf\xe9", "not UTF-8 text, first the byte 0xE9 in line 1, column 4; it may be Latin-1"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.txt", b"\n\n", "no prompts"),
        ("a.jsonl", b"", "no prompts"),
        ("a.exe", b"MZ", "no format"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(Invalid, match=what):
        preview(Dataset(source="file", id=name), file, 3)


def test_a_line_without_an_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trellis.reader import decoding

    monkeypatch.setattr(decoding, "LINE_LIMIT", 1000)
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * 5000)
    with pytest.raises(Invalid, match="line 1 is longer"):
        list(read_records(open_local_source(file, "").files[0]))


def test_a_link_that_leads_out_of_a_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    inside = folder_of(tmp_path / "in", "a.txt")
    (inside / "b.txt").symlink_to(tmp_path / "secret.txt")
    assert [file.name for file in open_local_source(inside, "").files] == ["a.txt"]


def test_what_cannot_be_a_prompt_is_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [
        {"prompt": "ok"},
        {"prompt": ""},
        {"prompt": "a\x00b"},
        {"prompt": "x" * 100_001},
        {"prompt": None},
        {"n": 1},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"prompt": "\\ud800"}\n')
    into = tmp_path / "into"
    into.mkdir()
    made = prepare(Dataset(source="file", id=file.name), file, into)
    assert (made["total"], made["skipped"]) == (1, 6)


def test_only_the_first_rows_are_taken(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(str(number) for number in range(500)))
    into = tmp_path / "into"
    into.mkdir()
    assert prepare(Dataset(source="file", id=file.name, rows=30), file, into)["total"] == 30
    assert preview(Dataset(source="file", id=file.name, rows=30), file, 3)["total"] == 30


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=40).filter(str.strip), min_size=1
    )
)
def test_any_text_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    file, into = folder / "a.jsonl", folder / "into"
    into.mkdir()
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    prepare(Dataset(source="file", id=file.name), file, into)
    lines = (into / "prompts.jsonl").read_bytes().split(b"\n")[:-1]
    assert [json.loads(line) for line in lines] == [text.strip() for text in texts]


def test_rows_are_counted_without_reading_them(tmp_path: Path) -> None:
    assert open_local_source(write(tmp_path, "parquet"), "").count_rows() == (3, True)
    assert open_local_source(write(tmp_path, "txt"), "").count_rows() == (3, True)
    assert open_local_source(write(tmp_path, "csv"), "").count_rows()[0] == 3


def test_a_small_file_does_not_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.reader.__main__.MAX_PROMPT_BYTES", 1_000_000)
    file = tmp_path / "bomb.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps({"prompt": "a" * 90_000}) + "\n").encode() * 1000))
    assert file.stat().st_size < 200_000
    with pytest.raises(Invalid, match="which is the most"):
        prepare(Dataset(source="file", id=file.name), file, tmp_path)
    assert (tmp_path / "prompts.jsonl").stat().st_size < 1_200_000
    assert prepare(Dataset(source="file", id=file.name, rows=5), file, tmp_path)["total"] == 5


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_table_of_very_many_columns_is_read_at_once(kind: str, tmp_path: Path) -> None:
    names = ["prompt", *map(str, range(200_000))]
    file = tmp_path / f"wide.{kind}"
    rows = [names, ["Why?"] * len(names)]
    file.write_text(json.dumps(rows) if kind == "json" else "\n".join(",".join(row) for row in rows))
    started = time.process_time()
    (record,) = read_records(LocalFile(file, file.name))
    assert record.row["prompt"] == "Why?"
    assert time.process_time() - started < 10


def test_names_of_files_that_are_no_text_are_told_as_text(tmp_path: Path) -> None:
    for name in (b"a\xff.jsonl", b"b\xff.dat"):
        (tmp_path / os.fsdecode(name)).write_text('{"prompt": "Why?"}\n')
    source = open_local_source(tmp_path, "")
    assert ([file.name for file in source.files], source.ignored_files) == (["a?.jsonl"], ["b?.dat"])
