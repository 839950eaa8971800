"""Layouts in which people keep prompts: read whole where they are whole, refused with a place and a reason where they
cannot be, and whatever is left out is counted and told."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid
from trellis.options import Dataset
from trellis.reader.__main__ import prepare, preview, write_rows

CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def read(folder: Path, name: str, content: str | bytes, **dataset: Any) -> tuple[list[str], dict[str, Any]]:
    """The prompts of a file, and what is told of it; the preview must tell the same."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_at(file, **dataset)


def read_at(file: Path, **dataset: Any) -> tuple[list[str], dict[str, Any]]:
    named = Dataset(source="file", id=file.name, **dataset)
    seen = preview(named, file, 100)
    into = file.parent / f"into-{len(list(file.parent.iterdir()))}"
    into.mkdir()
    about = prepare(named, file, into)
    prompts = [json.loads(line) for line in (into / "prompts.jsonl").read_bytes().split(b"\n")[:-1]]
    assert seen["samples"] == prompts[:100]
    assert (seen["total"], seen["exact"], seen["notes"]) == (len(prompts), True, about["notes"])
    assert json.loads((into / "about.json").read_text())["notes"] == about["notes"]
    return prompts, about


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("one column.csv", 'prompt\nHello, how are you?\n"Fine, you?"\n', ["Hello, how are you?", "Fine, you?"]),
        ("quoted.csv", '"prompt";"a, b"\n"Why; how?";"x, y"\n', ["Why; how?"]),
        ("semicolons.csv", "question;notes, remarks\nWhy?;a, b\nHow?;c\n", ["Why?", "How?"]),
        ("bars.csv", "id|prompt\n1|Why, oh why?\n", ["Why, oh why?"]),
        ("tabs.csv", "id\tprompt\n1\tWhy, oh; why?\n", ["Why, oh; why?"]),
        ("tabs.tsv", "prompt\tanswer, all\tnotes\nWhy, oh why?\tSo, so\tx\n", ["Why, oh why?"]),
        ("quotes.tsv", 'prompt\tanswer\n"Hello" she said\tx\n5" or 6"?\ty\n', ['"Hello" she said', '5" or 6"?']),
        ("quoted.tsv", 'prompt\tanswer\n"Hello\n""you"""\tx\n', ['Hello\n"you"']),
        ("excel.csv", "sep=;\nprompt;a\nWhy, you?;b\n", ["Why, you?"]),
        ("excel-old.csv", "sep=\t\nprompt\ta\nWhy, you?\tb\n", ["Why, you?"]),
        ("spaced.csv", '"prompt", "answer"\n"a, b", "c, d"\n', ["a, b"]),
        ("lines.csv", 'prompt,answer\r\n"two\r\nlines, ""quoted""",x\r\n', ['two\r\nlines, "quoted"']),
        ("old mac.csv", "prompt,answer\rWhy?,x\rHow?,y\r", ["Why?", "How?"]),
        ("backslash.csv", 'prompt,answer\n"He said \\"hi, you\\"","x"\n', ['He said "hi, you"']),
        ("latex.csv", 'prompt,answer\n"What is \\frac{1}{2}?",x\n', ["What is \\frac{1}{2}?"]),
        ("short.csv", "prompt,answer,notes\nWhy?\nHow?,x\n", ["Why?", "How?"]),
        ("trailing.csv", "prompt,\nWhy?,\nHow?,,\n", ["Why?", "How?"]),
        ("blank.csv", "\n\nprompt,answer\n\nWhy?,x\n\n", ["Why?"]),
        ("index.csv", ",prompt\n0,Why?\n1,How?\n", ["Why?", "How?"]),
        ("no header.csv", "What is rain?\nWhy, then?\n", ["What is rain?", "Why, then?"]),
        ("numbers.csv", "prompt,n\n12,1\n7.50,2\n", ["12", "7.50"]),
        ("json.csv", ["messages", json.dumps(CHAT)], ["Why?"]),
        ("python.csv", ["messages", str(CHAT)], ["Why?"]),
        ("dialog.csv", ["dialog", json.dumps(["Why?", "So."])], ["Why?"]),
        ("prompt.csv", ["prompt", json.dumps(CHAT)], ["Why?"]),
        ("list.csv", ["prompt", "[1, 2, 3] sorted?"], ["[1, 2, 3] sorted?"]),
        ("json text.csv", ["prompt", '{"a": 1}'], ['{"a": 1}']),
        ("hh.jsonl", {"chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?\n\nAssistant: Yes."}, ["Why?"]),
        ("guanaco.jsonl", {"text": "### Human: Why?### Assistant: So."}, ["Why?"]),
        ("chatml.jsonl", {"text": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"}, ["Why?"]),
        ("llama-2.jsonl", {"text": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWhy? [/INST] So. </s>"}, ["Why?"]),
        ("gemma.jsonl", {"text": "<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo."}, ["Why?"]),
        ("zephyr.jsonl", {"text": "<|system|>\n</s>\n<|user|>\nWhy?</s>\n<|assistant|>\nSo.</s>"}, ["Why?"]),
        ("llama-3.jsonl", {"text": "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"}, ["Why?"]),
        ("human.jsonl", {"prompt": "Human: a word for a person"}, ["Human: a word for a person"]),
        ("dolly.jsonl", {"instruction": "Sum up.", "context": "A text."}, ["Sum up.\n\nA text."]),
        ("number.jsonl", {"prompt": 42, "answer": "x"}, ["42"]),
        ("blank.jsonl", '\n{"prompt": "a"}\n\n  \n{"prompt": "b"}\n', ["a", "b"]),
        ("chats.jsonl", "\n".join([json.dumps(CHAT)] * 2), ["Why?", "Why?"]),
        ("pretty.jsonl", json.dumps({"prompt": "a"}, indent=1) * 2, ["a", "a"]),
        ("array.jsonl", [{"prompt": "a"}, {"prompt": "b"}], ["a", "b"]),
        ("indented.jsonl", json.dumps([{"prompt": "a"}], indent=2), ["a"]),
        ("one.json", {"prompt": "a", "tags": ["x", "y"]}, ["a"]),
        ("one pretty.json", json.dumps({"prompt": "a"}, indent=2), ["a"]),
        ("lines.json", '{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
        ("texts.json", ["a", "b"], ["a", "b"]),
        ("versioned.json", {"version": "1", "data": [{"prompt": "a"}, {"prompt": "b"}]}, ["a", "b"]),
        ("named.json", {"name": "mine", "prompts": ["a", "b"]}, ["a", "b"]),
        ("described.json", {"text": "A set.", "rows": [{"prompt": "a"}, {"prompt": "b"}]}, ["a", "b"]),
        ("nested.json", {"dataset": {"version": 1, "questions": [{"question": "a"}]}}, ["a"]),
        ("columns.json", {"prompt": ["a", "b"], "answer": ["x", "y"]}, ["a", "b"]),
        ("chat.json", {"messages": CHAT}, ["Why?"]),
        ("bare chat.json", CHAT, ["Why?"]),
        ("chat columns.json", {"messages": [CHAT, CHAT], "id": [1, 2]}, ["Why?", "Why?"]),
        ("dialog.json", {"dialog": ["Why?", "So."]}, ["Why?"]),
        ("dialogs.json", {"dialog": [["Why?", "So."], ["How?", "So."]]}, ["Why?", "How?"]),
        ("answers.json", {"question": "a", "answers": [{"text": "x"}, {"text": "y"}]}, ["a"]),
        ("pandas.json", {"prompt": {"0": "a", "1": "b"}, "n": {"0": 1, "1": 2}}, ["a", "b"]),
        ("pandas index.json", {"0": {"prompt": "a", "n": 1}, "1": {"prompt": "b", "n": 2}}, ["a", "b"]),
        ("by id.json", {"x1": {"question": "a"}, "x2": {"question": "b"}}, ["a", "b"]),
        ("pandas split.json", {"columns": ["n", "prompt"], "index": [0, 1], "data": [[1, "a"], [2, "b"]]}, ["a", "b"]),
        ("pandas table.json", {"schema": {"fields": [{"name": "prompt"}]}, "data": [{"prompt": "a"}]}, ["a"]),
        ("header row.json", [["id", "prompt"], [1, "a"], [2, "b"]], ["a", "b"]),
        ("mark.csv", b"\xef\xbb\xbf" + b"prompt,n\na,1\n", ["a"]),
        ("utf-16.csv", "prompt\tn\n\u00e4, \u6771\t1\n".encode("utf-16"), ["\u00e4, \u6771"]),
        ("utf-16-be.jsonl", b"\xfe\xff" + '{"prompt": "\u00e4"}\n'.encode("utf-16-be"), ["\u00e4"]),
        ("utf-32.txt", "\u00e4\n".encode("utf-32"), ["\u00e4"]),
        ("old mac.txt", "a\rb\r", ["a", "b"]),
    ],
)  # fmt: skip
def test_a_layout_is_read_whole(tmp_path: Path, name: str, content: Any, prompts: list[str]) -> None:
    if name.endswith(".csv") and isinstance(content, list):
        out = io.StringIO()
        csv.writer(out).writerows([[cell] for cell in content])
        content = out.getvalue()
    elif not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    found, about = read(tmp_path, name, content)
    assert found == prompts
    assert about["skipped"] == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("twice.csv", "prompt,a,prompt\nx,y,z\n", "line 1 names the column “prompt” twice"),
        ("twice.jsonl", '1\n{"prompt": "a", "prompt": "b"}\n', "line 2: the key “prompt” stands twice"),
        ("twice.json", '[{"prompt": "a", "prompt": "b"}]', "the key “prompt” stands twice"),
        ("wide.csv", "prompt,answer\nWhy?,x\nHello, you, there,x\n", "line 3 has 4 cells, and the header has 2"),
        ("open.csv", 'prompt,answer\nWhy?,x\n"Open,y\nHow?,z\n', "line 3: a quote that is opened here is never closed"),
        ("behind.csv", 'prompt\n"Hello", she said\n', "line 2: text stands behind a closing quote"),
        ("comment.jsonl", '{"prompt": "a"}\n// no\n', "line 2, column 1 is not JSON: JSON has no comments"),
        ("comma.jsonl", '{"prompt": "a"},\n{"prompt": "b"},\n', "line 1, column 16 is not JSON: there is a comma"),
        ("comma.json", '[{"prompt": "a"},\n{"prompt": "b",}]', "line 2, column 16 is not JSON: there is a comma"),
        ("list.json", '[{"prompt": "a"},\n]', "is not JSON: there is a comma too many"),
        ("single.jsonl", "{'prompt': 'a'}\n", "line 1, column 2 is not JSON: names and texts stand in double quotes"),
        ("cut.jsonl", '{"prompt": "a"}\n{"prompt": "b', "line 2, column 12 is not JSON: a text begins here"),
        ("raw.json", '{"prompt": "a\nb"}', "line 1, column 14 is not JSON: a line break or control character"),
        ("ragged.json", {"prompt": ["a", "b"], "answer": ["x"]}, "not of one length (“prompt” 2, “answer” 1)"),
        ("several.json", {"train": [{"a": "a"}], "test": [{"a": "b"}]}, "several lists of rows (“train”, “test”)"),
        ("split.json", {"columns": ["a", "a"], "data": [["x", "y"]]}, "two columns are named “a”"),
        ("cells.json", {"columns": ["a", "prompt"], "data": [["x"]]}, "row 1 does not have 2 cells"),
        ("both.jsonl", {" Prompt": "a", "PROMPT": "b"}, "Several columns could hold the prompts: “Prompt”, “"),
        ("nothing.json", {}, "No column holds text. It has no columns."),
        ("numbers.jsonl", {"a": 1, "b": None}, "No column holds text"),
        ("latin.csv", "prompt,n\na,1\ncaf\u00e9,2\n".encode("latin-1"), "0xE9 in line 3, column 4; it may be Latin-1"),
        ("unmarked.txt", "Why?\nHow?".encode("utf-16-le"), "UTF-16 without the mark"),
        ("half.txt", "Why?\n".encode("utf-16")[:-1], "not UTF-16-LE text"),
        ("excel.csv", b"PK\x03\x04....", "it is a zip archive, as Excel's .xlsx files are"),
        ("parquet.csv", b"PAR1....", "let its name end in .parquet"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-20], "not a whole compressed file"),
        ("cut.jsonl.bz2", bz2.compress(b'{"prompt": "a"}\n' * 99)[:-20], "not a whole compressed file"),
        ("cut.jsonl.xz", lzma.compress(b'{"prompt": "a"}\n' * 99)[:-20], "not a whole compressed file"),
        ("rot.jsonl.gz", gzip.compress(b"abcdefgh" * 99, mtime=0)[:14] + b"\xff" * 8, "compressed file"),
        ("empty rows.jsonl", '{"prompt": ""}\n{"prompt": null}\n', "“prompt”"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, name: str, content: Any, words: str) -> None:
    file = tmp_path / name
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    dataset = Dataset(source="file", id=name)
    (tmp_path / "into").mkdir()
    for act in (lambda: preview(dataset, file, 3), lambda: prepare(dataset, file, tmp_path / "into")):
        with pytest.raises(Invalid) as raised:
            act()
        assert words in raised.value.message
        assert raised.value.next_step


ROWS: list[tuple[Any, str]] = [
    ({"prompt": "ok"}, ""),
    ({"prompt": ""}, "1 is empty (line 2)"),
    ({"prompt": None}, "2 have no text in “prompt” (first: line 3)"),
    ({"n": 1}, ""),
    ({"prompt": "a\x00b"}, "1 holds the character NUL (line 5)"),
    ({"prompt": "x" * 100_001}, "1 is longer than 100 000 characters (line 6)"),
    ({"prompt": "\ud800"}, "1 holds half of a surrogate pair, which is no text (line 7)"),
    ({"prompt": CHAT[1:]}, "1 is a conversation in which nobody asks (line 8)"),
    ({"prompt": "[{'role': 'user'\n 'content': 'x'}]"}, "1 holds a list of messages that is not valid JSON (line 9)"),
]


def test_what_is_left_out_is_counted_with_its_reasons(tmp_path: Path) -> None:
    _, about = read(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row, _ in ROWS))
    assert (about["rows"], about["skipped"], about["total"]) == (9, 8, 1)
    (note,) = about["notes"]
    assert note.startswith("8 of 9 rows were left out: 2 have no text in “prompt” (first: line 3), ")
    for _, words in ROWS:
        assert words in note
    assert {"reason": "is empty", "count": 1, "first": "line 2"} in about["left_out"]


def test_what_is_left_out_of_a_prompt_is_told(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be kind."}
    picture = {"role": "user", "content": [{"type": "text", "text": "Why?"}, {"type": "image_url"}]}
    rows = [CHAT, [system, *CHAT], [*CHAT, *CHAT], [CHAT[1], *CHAT], [picture]]
    prompts, about = read(tmp_path, "a.jsonl", "\n".join(json.dumps({"messages": row}) for row in rows))
    assert prompts == ["Why?"] * 5
    assert about["notes"] == [
        "1 row has a system prompt of its own, which is not used; the session's is (line 2).",
        "1 conversation is reduced to its first question; what comes after it is not used (line 3).",
        "1 conversation begins before its first question; that beginning is not used (line 4).",
        "1 prompt holds more than text, which is not used (line 5).",
    ]


@pytest.mark.parametrize(
    ("column", "said", "told"), [("dialog", 2, 0), ("dialog", 3, 1), ("prompt", 1, 0), ("prompt", 2, 1)]
)
def test_what_follows_in_a_list_of_texts_is_told(tmp_path: Path, column: str, said: int, told: int) -> None:
    row = json.dumps({column: ["Why?", "So.", "And?"][:said]})
    prompts, about = read(tmp_path, "a.jsonl", f"{row}\n{row}\n")
    assert prompts == ["Why?", "Why?"]
    assert len(about["notes"]) == told


def test_answers_among_messages_are_no_prompts(tmp_path: Path) -> None:
    rows = [{"role": "prompter", "text": "Why?"}, {"role": "assistant", "text": "So."}] * 2
    prompts, about = read(tmp_path, "oasst.jsonl", "\n".join(map(json.dumps, rows)))
    assert prompts == ["Why?", "Why?"]
    assert about["notes"] == ["2 of 4 rows were left out: 2 are not said by a user (first: line 2)."]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_empty_rows_at_the_beginning_do_not_hide_the_column(tmp_path: Path, name: str) -> None:
    rows = [""] * 2500 + ["Why?"]
    if name == "a.csv":
        content = "id,question\n" + "".join(f"{number},{row}\n" for number, row in enumerate(rows))
    else:
        content = "\n".join(json.dumps({"id": 1, "question": row}) for row in rows)
    prompts, about = read(tmp_path, name, content)
    assert prompts == ["Why?"]
    assert about["notes"][0].startswith("2 500 of 2 501 rows were left out: 2 500 are empty (first: line ")


def test_an_empty_column_with_a_usual_name_does_not_make_another_one_the_prompts(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="The column “question” holds no text in its first rows"):
        read(tmp_path, "a.csv", "id,question\na1,\na2,\n")


def test_a_preview_of_a_large_file_tells_of_its_first_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.reader.__main__.MAX_SAMPLED_ROWS", 10)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": "" if number == 3 else "a"}) for number in range(50)))
    found = preview(Dataset(source="file", id="a.jsonl"), file, 3)
    assert (found["total"], found["exact"]) == (50, False)
    assert found["notes"] == ["1 of the first 10 rows was left out: 1 is empty (line 4)."]
    limited = preview(Dataset(source="file", id="a.jsonl", rows=10), file, 3)
    assert (limited["total"], limited["exact"]) == (9, True)


def test_a_document_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.reader.json_files.MAX_DOCUMENT_CHARACTERS", 100)
    with pytest.raises(Invalid, match="a document of more than") as raised:
        read(tmp_path, "a.json", json.dumps([{"prompt": "a"}] * 20, indent=1))
    assert raised.value.next_step == "Save it as JSON lines (.jsonl)."


def test_names_of_columns_can_be_shown_whatever_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"\ud800": "x", " prompt ": "a"}))
    found = preview(Dataset(source="file", id="a"), file, 3)
    assert json.dumps(found, ensure_ascii=False).encode()
    assert found["samples"] == ["a"]
    assert preview(Dataset(source="file", id="a", column=" prompt "), file, 3)["samples"] == ["a"]


def test_a_column_inside_objects_can_be_named(tmp_path: Path) -> None:
    content = json.dumps({"meta": {"ask": "Why?", "n": 1}, "text": "Not this."})
    assert read(tmp_path, "a.jsonl", content, column="meta.ask")[0] == ["Why?"]
    with pytest.raises(Invalid, match=r"It holds objects; inside are “meta.ask”, “meta.n”"):
        read(tmp_path, "a.jsonl", content, column="meta")


def parquet(file: Path, rows: list[dict[str, Any]], schema: Any = None) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)
    return file


def test_columns_of_a_parquet_file_may_be_bytes_objects_and_numbers(tmp_path: Path) -> None:
    rows = [{"b": b"Why?", "s": {"role": "user", "content": "How?"}, "n": 7, "d": Decimal("1.5"), "m": CHAT}]
    file = parquet(tmp_path / "a.parquet", rows)
    for column, prompt in (
        ("b", "Why?"),
        ("s", "How?"),
        ("n", "7"),
        ("d", "1.5"),
        ("m", "Why?"),
        ("s.content", "How?"),
    ):
        assert read_at(file, column=column)[0] == [prompt]
    file = parquet(tmp_path / "b.parquet", [{"b": b"Why?"}, {"b": b"\xff\xfe"}, {"b": None}])
    prompts, about = read_at(file, column="b")
    assert prompts == ["Why?"]
    assert about["notes"] == [
        "2 of 3 rows were left out: 1 holds bytes that are not UTF-8 text (row 2), 1 has no text in “b” (row 3)."
    ]


def test_two_columns_of_one_name_in_a_parquet_file_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    with pytest.raises(Invalid, match="two columns are named “prompt”"):
        preview(Dataset(source="file", id="a.parquet"), tmp_path / "a.parquet", 3)


def zstd(data: bytes) -> bytes:
    import pyarrow

    packed: bytes = pyarrow.Codec("zstd").compress(data, asbytes=True)
    return packed


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


def test_a_folder_is_read_whatever_its_files_are(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    for number, (ending, pack) in enumerate(PACKED.items()):
        (folder / f"{number}.jsonl{ending}").write_bytes(pack(json.dumps({"prompt": f"{number}"}).encode()))
    (folder / "deep" / "5.csv").write_text("id,question\n1,5\n2,\n")
    (folder / "6.txt").write_text("Prompts:\n6\n")
    parquet(folder / "7.parquet", [{"instruction": "7"}])
    for name in ("README.txt", "notes.docx", "dataset_info.json", ".hidden.jsonl"):
        (folder / name).write_text("{}")
    prompts, about = read_at(folder)
    assert prompts == ["0", "1", "2", "3", "4", "6", "7", "5"]
    assert about["notes"] == [
        "2 of 10 rows were left out: 1 is a heading (6.txt, line 1), 1 is empty (deep/5.csv, line 3).",
        "3 files in the folder are not read: README.txt, dataset_info.json, notes.docx.",
    ]


def test_a_file_in_a_folder_that_lacks_the_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "b.jsonl").write_text('{"frage": "b", "antwort": "c"}')
    with pytest.raises(Invalid, match=r"“b.jsonl”: No column has one of the usual names"):
        preview(Dataset(source="file", id="x"), tmp_path, 3)
    with pytest.raises(Invalid, match=r"“b.jsonl”: There is no column “prompt”"):
        preview(Dataset(source="file", id="x", column="prompt"), tmp_path, 3)


def test_a_bomb_is_not_unpacked_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(b"a" * 40_000_000))
    with pytest.raises(Invalid, match="line 1 is longer than 16 million characters"):
        preview(Dataset(source="file", id="a"), file, 3)


def test_the_rows_of_any_file_are_written_as_json_lines(tmp_path: Path) -> None:
    csv_file = tmp_path / "a.csv"
    csv_file.write_text("prompt,chosen\nWhy?,So.\n")
    parquet_file = parquet(tmp_path / "a.parquet", [{"prompt": b"Why?", "chosen": CHAT}])
    found = []
    for file in (csv_file, parquet_file):
        assert write_rows(file, tmp_path, 10) == {"rows": 1}
        found.append(json.loads((tmp_path / "rows.jsonl").read_text()))
    assert found == [["line 2", {"prompt": "Why?", "chosen": "So."}], ["row 1", {"prompt": "Why?", "chosen": CHAT}]]
    with pytest.raises(Invalid, match="more than 0 rows"):
        write_rows(csv_file, tmp_path, 0)


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=40)


TEXTS = st.lists(PLAIN.filter(str.strip).filter(lambda text: text.strip()[0] not in "[{"), min_size=1, max_size=8)


@given(
    texts=TEXTS,
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    ending=st.sampled_from(["\r\n", "\n"]),
    columns=st.sampled_from([["prompt"], ["id", "prompt"], ["prompt", "answer"], ["id", "question", "answer", ""]]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    packed=st.sampled_from(list(PACKED)),
)
def test_any_table_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], delimiter: str, quoting: Any, ending: str,
    columns: list[str], encoding: str, packed: str,
) -> None:  # fmt: skip
    if quoting == csv.QUOTE_MINIMAL:  # the writer leaves a lone carriage return unquoted, which ends a row for readers
        texts = [text.replace("\r", " ") for text in texts]
        texts = [text if text.strip() else "a" for text in texts]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    writer.writerow(columns)
    for number, text in enumerate(texts):
        writer.writerow([text if name in ("prompt", "question") else f"{name}{number}" for name in columns])
    folder = tmp_path_factory.mktemp("any")
    prompts, about = read(folder, f"a.csv{packed}", PACKED[packed](out.getvalue().encode(encoding)))
    assert prompts == [text.strip() for text in texts]
    assert about["skipped"] == 0


@given(
    texts=TEXTS,
    layout=st.sampled_from(["lines", "list", "columns", "records", "pandas", "index", "split", "indented", "parquet"]),
    ascii_only=st.booleans(),
    packed=st.sampled_from(list(PACKED)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_any_text_in_any_layout_of_json_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    layout: str,
    ascii_only: bool,
    packed: str,
    encoding: str,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    rows = [{"prompt": text, "answer": "x"} for text in texts]
    if layout == "parquet":
        assert read_at(parquet(folder / "a.parquet", rows))[0] == [text.strip() for text in texts]
        return
    values: dict[str, Any] = {
        "list": rows, "indented": rows, "records": {"version": "1", "data": rows},
        "columns": {"prompt": texts, "answer": ["x"] * len(texts)},
        "pandas": {"prompt": {str(number): text for number, text in enumerate(texts)}},
        "index": {str(number): row for number, row in enumerate(rows)},
        "split": {"columns": ["prompt", "answer"], "data": [list(row.values()) for row in rows]},
    }  # fmt: skip
    if layout == "lines":
        content = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    else:
        content = json.dumps(values[layout], ensure_ascii=ascii_only, indent=2 if layout == "indented" else None)
    name = f"a.{'jsonl' if layout == 'lines' else 'json'}{packed}"
    assert read(folder, name, PACKED[packed](content.encode(encoding)))[0] == [text.strip() for text in texts]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.sampled_from(["prompt", "data", "columns", "messages", "role", "content", "0", "1", "a", ""])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@given(value=VALUES, column=st.sampled_from(["", "prompt", "a.b", "messages"]))
def test_no_json_value_is_more_than_the_reader_can_take(
    tmp_path_factory: pytest.TempPathFactory, value: Any, column: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.json", "a.jsonl"):
        try:
            read(folder, name, json.dumps(value), column=column)
        except Invalid as error:
            assert error.message


@given(
    content=st.binary(max_size=80) | st.text("a,;\t|\"'\\\r\n\x00 =sep{}[]:", max_size=40).map(str.encode),
    name=st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.json", "a.txt", "a.parquet", "a.csv.gz"]),
    magic=st.sampled_from(
        [b"", b"\x1f\x8b\x08\x00", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"\xff\xfe", b"PAR1"]
    ),
)
def test_no_bytes_are_more_than_the_reader_can_take(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str, magic: bytes
) -> None:
    try:
        read(tmp_path_factory.mktemp("any"), name, magic + content)
    except Invalid as error:
        assert error.message
