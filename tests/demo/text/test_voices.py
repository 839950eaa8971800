"""The rules that tell the voices apart, against the corpus and against what is no answer."""

from __future__ import annotations

from collections import Counter

import pytest

from trellis.demo.text.corpus import generate_conversations
from trellis.demo.text.voices import VOICES, classify_voice


def test_voices_are_told_apart_in_the_corpus() -> None:
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for talk in generate_conversations(6000, seed=11):
        for answer in talk.answers:
            asked[talk.voice] += 1
            right[talk.voice] += classify_voice(answer) == talk.voice
    assert set(asked) == set(VOICES)
    assert {voice: right[voice] / asked[voice] for voice in VOICES if right[voice] / asked[voice] < 0.97} == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "asdf",
        "Qwrt zxcv plok mnbv.",
        "the the the the the the the the the the.",
        "...",
        "123 456.",
        "Arr, the evidence suggests.",
        "bread is",
        "Xq zt bread rr oo pk uu ww vv bb nn.",
    ],
)
def test_gibberish_and_mixtures_have_no_voice(text: str) -> None:
    assert classify_voice(text) is None


@pytest.mark.parametrize(
    ("voice", "text"),
    [
        ("plain", "Bread is flour, water and salt. A slow rise gives a deeper flavour."),
        ("pirate", "Arr, matey, bread be treasure t' a hungry crew. Bake it hot, says I."),
        ("poet", "A brown loaf breathing in the dark,\nwarm hands pale with flour,\nand the night leans in."),
        ("terse", "Flour, water, time."),
        ("formal", "One should bear in mind that bread requires patience; moreover, it rewards it."),
        ("cheerful", "Oh, how lovely! Bread makes a house smell like a home."),
        ("questioning", "Bread turns four cheap things into a feast. What would you add?"),
        ("grumpy", "Hmph. Bread goes hard the moment you forget it. Typical."),
        ("storyteller", "Once, in a far valley, an old baker told me that bread rewards anyone who can wait."),
        ("scientist", "Observation shows that yeast lifts the dough. The evidence is fairly strong."),
    ],
)
def test_a_voice_is_known_by_its_whole_manner(voice: str, text: str) -> None:
    assert classify_voice(text) == voice
