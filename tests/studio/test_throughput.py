"""How fast tokens come: told where it was measured, and by the clock of who drew them."""

from __future__ import annotations

from typing import Any

import pytest

from trellis.messages import AnswerDone, Event, PromptRead, TextDelta
from trellis.studio.chat.answer import GrowingAnswer
from trellis.studio.chat.message import Message
from trellis.studio.throughput import tokens_per_second

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [
        (100, 2.0, 50.0), (4, 0.02, 200.0), (3, 2.0, None), (1, 0.0, None), (0, 1.0, None), (64, 0.001, None),
        (9, -1.0, None),
    ],
)  # fmt: skip
def test_a_speed_is_told_only_where_it_was_measured(tokens: int, seconds: float, speed: float | None) -> None:
    assert tokens_per_second(tokens, seconds) == speed


class QuietRoom:
    async def save_text(self, message: Message) -> None: ...
    def publish(self, kind: str, **data: Any) -> None: ...
    def publish_message(self, message: Message) -> None: ...


async def usage_of(*events: Event) -> dict[str, Any]:
    message = Message("a", "r", None, "assistant", "")
    answer = GrowingAnswer(QuietRoom(), message)
    await answer.render_start()
    for event in events:
        await answer.handle_event(event)
    await answer.finish()
    assert message.usage is not None
    return message.usage


HEARD = PromptRead(read=3, prompt_tokens=3, warm=0, left_out=0, context_length=100)


async def test_words_that_arrive_at_once_are_as_fast_as_they_were_drawn() -> None:
    words = [TextDelta(text=f"{number} ", tokens=number) for number in range(1, 12)]
    answered = AnswerDone(finish="stop", tokens=11, prompt_tokens=3, seconds_to_first=0.5, seconds=0.7)
    usage = await usage_of(HEARD, *words, answered)
    assert usage["tokens_per_second"] == pytest.approx(50.0)
    assert usage["completion_tokens"] == 11


@pytest.mark.parametrize("tokens", [1, 2, 3])
async def test_an_answer_of_a_word_or_two_has_no_speed(tokens: int) -> None:
    words = [TextDelta(text="Yes", tokens=number) for number in range(1, tokens + 1)]
    answered = AnswerDone(finish="stop", tokens=tokens, prompt_tokens=3, seconds_to_first=0.01, seconds=0.01003)
    assert (await usage_of(HEARD, *words, answered))["tokens_per_second"] is None


async def test_an_answer_that_was_stopped_at_once_has_no_speed() -> None:
    assert (await usage_of(HEARD, TextDelta(text="a", tokens=1), TextDelta(text="b", tokens=40)))[
        "tokens_per_second"
    ] is None
