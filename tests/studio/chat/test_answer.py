"""An answer while it grows: what is shown at its end is what the whole text shows, whatever was shown on the way."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_markdown import CORPUS, TEXTS, visible
from trellis.markdown import text_to_html
from trellis.messages import AnswerDone, TextDelta
from trellis.studio.chat.answer import GrowingAnswer
from trellis.studio.chat.message import Message

pytestmark = pytest.mark.anyio


class Shown:
    """A room that notes what a page would show of the one answer in it, by the rules of static/chat/room.js."""

    def __init__(self, text: str, chance: random.Random) -> None:
        self._text, self._chance = text, chance
        self.html, self.shown, self.told = "", 0, 0

    async def generate_answer(self, message: Message, answering: GrowingAnswer) -> None:
        at = 0
        while at < len(self._text):
            size = self._chance.randint(1, 12)
            await answering.handle_event(TextDelta(text=self._text[at : at + size], tokens=1))
            at += size
        await answering.handle_event(
            AnswerDone(finish="stop", tokens=1, prompt_tokens=1, seconds_to_first=0, seconds=0)
        )

    async def save_text(self, message: Message) -> None:
        pass

    def publish(self, kind: str, **data: Any) -> None:
        if kind == "block":
            assert data["shown"] > self.shown
            self.html, self.shown = self.html + data["html"], data["shown"]

    def publish_message(self, message: Message) -> None:
        self.html, self.shown = message.html or "", message.rendered_length
        self.told += 1


async def grown(text: str, chance: random.Random) -> tuple[Shown, Message]:
    message = Message("m", "r", None, "assistant", "", state="growing", html="")
    room = Shown(text, chance)
    answering = GrowingAnswer(room, message)
    await answering.run()
    await answering.finish()
    assert message.text == text
    assert message.rendered_length == len(text) == room.shown
    assert message.html == room.html
    return room, message


@given(TEXTS, st.randoms(use_true_random=False))
async def test_the_end_of_an_answer_is_shown_as_its_whole_text(text: str, chance: random.Random) -> None:
    _, message = await grown(text, chance)
    assert visible(message.html or "") == visible(text_to_html(text))


@pytest.mark.parametrize("name", CORPUS)
async def test_what_models_write_ends_as_the_whole(name: str) -> None:
    room, message = await grown(CORPUS[name], random.Random(1))
    assert visible(message.html or "") == visible(text_to_html(CORPUS[name]))
    assert room.told <= 1


async def test_a_thought_that_the_template_opened_is_folded_as_soon_as_it_ends() -> None:
    text = "Let me see.\n\n- one\n\nSo.\n</think>\n\nThe *answer*.\n\nMore."
    room, message = await grown(text, random.Random(2))
    assert room.told == 1
    assert message.html == text_to_html(text)
    assert (message.html or "").startswith("<details")


def test_a_speed_is_told_only_where_it_was_measured() -> None:
    answering = GrowingAnswer(Shown("", random.Random(1)), Message("m", "r", None, "assistant", ""))
    answering._first_token_time, answering._last_token_time, answering._tokens_at_first, answering._tokens = (
        1.0,
        1.0001,
        1,
        6,
    )
    assert answering._usage()["tokens_per_second"] is None
    answering._last_token_time = 2.0
    assert answering._usage()["tokens_per_second"] == 5.0
