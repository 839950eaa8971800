"""The prompts that are shipped: enough of them, no text twice, and the file as the corpus writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trellis.demo.text.corpus import topics, write_prompts
from trellis.demo.text.prompts import PROMPTS_FILE, load_prompts


def test_there_are_enough_prompts_and_none_is_in_both_splits() -> None:
    steer, held_out = load_prompts("steer"), load_prompts("held_out")
    assert len(steer) + len(held_out) >= 300
    assert 50 <= len(held_out) <= 80
    assert len(set(steer) | set(held_out)) == len(steer) + len(held_out)


def test_held_out_prompts_are_varied() -> None:
    held_out = load_prompts("held_out")
    assert sum(any(sheet.name in prompt for prompt in held_out) for sheet in topics()) >= 25
    assert len({prompt.split()[0] for prompt in held_out}) >= 10


def test_the_file_is_what_the_corpus_writes(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    assert (tmp_path / "prompts.jsonl").read_bytes() == PROMPTS_FILE.read_bytes()


def test_a_split_that_does_not_exist_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="no split 'test'"):
        load_prompts("test")
