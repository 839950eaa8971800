"""The corpus: the same from the same seed, every voice and kind in it, and no seam of a pattern showing."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter

from trellis.demo.text.corpus import KINDS, Speech, ask, conversations, small_talk, topics
from trellis.demo.text.voices import VOICES

TALKS = list(conversations(4000, seed=3))
ANSWERS = [answer for talk in TALKS for answer in talk.answers]


def test_the_same_seed_writes_the_same_corpus() -> None:
    assert list(conversations(4000, seed=3)) == TALKS
    assert list(conversations(50, seed=4)) != TALKS[:50]


def test_every_voice_has_its_share_whatever_the_kind_of_question() -> None:
    for kind in KINDS:
        voices = Counter(talk.voice for talk in TALKS if talk.kind == kind)
        assert set(voices) == set(VOICES), kind
    voices = Counter(talk.voice for talk in TALKS)
    assert all(0.05 < voices[voice] / len(TALKS) < 0.25 for voice in VOICES)


def test_no_pattern_shows_through() -> None:
    assert [answer for answer in ANSWERS if re.search(r"[{}\[\]|~+]|NAME|  |\.\.|,\.|\?\.|!\.", answer)] == []


def test_answers_begin_with_a_capital_and_end_with_a_stop() -> None:
    assert [answer for answer in ANSWERS if not re.fullmatch(r"[A-Z'].*[.!?\"]", answer, re.DOTALL)] == []


def test_verbs_articles_and_pronouns_agree() -> None:
    wrong = re.compile(
        r"\b(?:they is|it are|they was|a [aeio]\w+|an [bcdfgjklmnpqrstvwxyz]\w+|(\w+) \1)\b", re.IGNORECASE
    )
    allowed = re.compile(r"a (?:one|once|euro\w*)\b|had had", re.IGNORECASE)
    plain = [answer for talk in TALKS if talk.voice != "pirate" for answer in talk.answers]
    assert [
        (answer, found[0]) for answer in plain if (found := wrong.search(answer)) and not allowed.match(found[0])
    ] == []


def test_every_topic_can_be_asked_in_every_way_and_answered_in_every_voice() -> None:
    rng = random.Random(0)
    for sheet in topics():
        for kind in KINDS:
            for voice in VOICES:
                assert Speech(ask(sheet, kind, rng), voice, rng).answer()


def test_there_are_sixty_topics_with_names_of_their_own() -> None:
    names = [sheet.name for sheet in topics()]
    assert len(set(names)) == len(names) >= 60
    prompts = [prompt for sheet in small_talk() for prompt in sheet.asked]
    assert len(set(prompts)) == len(prompts)


def test_some_prompts_are_typed_and_some_conversations_go_on() -> None:
    prompts = [message["content"] for talk in TALKS for message in talk.messages if message["role"] == "user"]
    assert 0.1 < sum(prompt == prompt.lower() for prompt in prompts) / len(prompts) < 0.4
    assert 0.05 < sum(len(talk.answers) > 1 for talk in TALKS) / len(TALKS) < 0.4
    assert 0.05 < sum(talk.messages[0]["role"] == "system" for talk in TALKS) / len(TALKS) < 0.2


def test_corpus_voices_and_prompts_do_without_torch() -> None:
    code = "import sys, trellis.demo.text.corpus, trellis.demo.text.prompts; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
