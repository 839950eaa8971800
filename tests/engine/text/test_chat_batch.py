"""Many conversations in one batch: each is answered as if it were alone, and none is in another's way."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import make_model
from trellis.blobs import Blobs
from trellis.engine.handlers import TextEngine
from trellis.engine.text import chat_batch
from trellis.engine.text.kv_cache import (
    FastSequenceCache,
    GenericSequenceCache,
    SequenceCache,
    common_prefix_length,
    sequence_cache_for,
)
from trellis.engine.text.weights_store import Weights
from trellis.errors import WeightsMissing
from trellis.messages import (  # fmt: skip
    AnswerDone,
    Cancelled,
    Chat,
    CreateAdapter,
    Failed,
    Learn,
    Lesson,
    Load,
    Option,
    Prompt,
    PromptRead,
    QueuePosition,
    TextDelta,
    Turn,
)
from trellis.options import Adapter, Learning, Sampling

pytestmark = pytest.mark.engine

GREEDY = Sampling(temperature=0.0, min_p=0.0, max_new_tokens=12)
WORDS = ["Tell me about the sea.", "Bread", "東京 and 🌱 are words too, are they not? Say so.", "The sea is wide. " * 9]


def run(steps: Iterator[Any]) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Room:
    """An engine with some weights, and conversations in it that are stepped by hand."""

    def __init__(self, model: Path, blobs: Path, general: bool = False) -> None:
        self.engine = TextEngine(Blobs(blobs))
        run(self.engine.load(Load(path=str(model))))
        loaded = self.engine.loaded
        self.weights = ["", *(self.grown(Adapter(lora_rank=rank), seed) for rank, seed in ((4, 1), (4, 2), (2, 3)))]
        if general:
            self.engine._sequence_cache = GenericSequenceCache(loaded.slots, self.engine.weights)
        self.chats = self.engine._chat_batch

    def grown(self, adapter: Adapter, seed: int) -> str:
        """Weights that say something of their own."""
        planted = run(self.engine.create_adapter(CreateAdapter(adapter=adapter, seed=seed))).weights
        slot, found = self.engine.weights(planted)
        flat = torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(seed)) * 0.5
        made = Weights(f"w{seed:032x}", slot.settings, flat, found.first, found.second, 1)
        self.engine._weights_store.add(slot, made, None, save=True)
        return made.id

    def run(self, *wanted: Chat, owners: str = "") -> dict[int, list[Any]]:
        """All events of some conversations that come at once, by their number."""
        told: dict[int, list[Any]] = {number: [] for number in range(1, len(wanted) + 1)}
        for number, request in enumerate(wanted, start=1):
            self.chats.join(number, owners[number - 1] if owners else "", request)
        while self.chats.has_work:
            for number, event, _ in self.chats.step():
                told[number].append(event)
        return told

    def generated(self, request: Chat) -> str:
        """What transformers' own `generate` makes of it."""
        loaded = self.engine.loaded
        tokens = loaded.prepare_chat(request).tokens
        slot, found = self.engine.weights(request.weights or self.weights[1])
        slot.install(found.flat)
        ids = torch.tensor([tokens])
        options = {"max_new_tokens": request.sampling.max_new_tokens, "do_sample": False, "pad_token_id": 0}
        if request.weights:
            found_ids: Tensor = slot.model.generate(input_ids=ids, **options)
        else:
            with slot.without_adapter():
                found_ids = slot.model.generate(input_ids=ids, **options)
        return str(loaded.tokenizer.decode(found_ids[0, len(tokens) :], skip_special_tokens=True))


def said(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def asks(text: str, weights: str = "", **more: Any) -> Chat:
    values = {"turns": (Turn(role="user", text=text),), "weights": weights, "sampling": GREEDY, "seed": 1}
    return Chat(**(values | more))


@pytest.fixture(scope="module", params=["lean", "general"])
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("chats")
    return Room(make_model(folder / "model", "llama"), folder / "weights", general=request.param == "general")


def test_each_is_answered_as_generate_would_whoever_else_is_there(room: Room) -> None:
    wanted = [asks(text, weights) for text in WORDS for weights in room.weights]
    together = room.run(*wanted)
    for number, request in enumerate(wanted, start=1):
        assert said(together[number]) == room.generated(request), request
        assert isinstance(together[number][-1], AnswerDone)
    assert len({said(events) for events in together.values()}) > len(wanted) // 2, "the weights make a difference"


def test_the_lean_batch_is_what_a_small_model_gets(room: Room) -> None:
    loaded = room.engine.loaded
    made = sequence_cache_for(loaded.slots, loaded.fast_forward, room.engine.weights, 1000)
    assert isinstance(made, FastSequenceCache)


@settings(max_examples=15)
@given(chance=st.integers(0, 2**32).map(random.Random))
def test_coming_and_going_changes_nobody_elses_words(room: Room, chance: random.Random) -> None:
    wanted = [asks(text, weights) for text in WORDS[:3] for weights in room.weights[:3]]
    alone = [said(room.run(request)[1]) for request in wanted]
    order = chance.sample(range(len(wanted)), len(wanted))
    leaves = chance.sample(order, 3)
    told: dict[int, list[Any]] = {number: [] for number in order}
    coming = list(order)
    while coming or room.chats.has_work:
        for _ in range(chance.randint(0, 2)):
            if coming:
                room.chats.join(coming[0], str(coming[0] % 2), wanted[coming.pop(0)])
        for number, event, _ in room.chats.step():
            told[number].append(event)
            if number in leaves and len(told[number]) == 4:
                room.chats.leave(number)
    for number in order:
        words = said(told[number])
        if isinstance(told[number][-1], Cancelled):
            assert number in leaves
            assert alone[number].startswith(words)
        else:
            assert words == alone[number]


def test_what_was_read_before_is_not_read_again(room: Room) -> None:
    first = asks("Slowly, in a warm kitchen, bread keeps its own time.", room.weights[1])
    events = room.run(first)[1]
    turns = (*first.turns, Turn(role="assistant", text=said(events)), Turn(role="user", text="More."))
    then = room.run(asks("", room.weights[1], turns=turns))[1]
    heard = [event for event in then if isinstance(event, PromptRead)]
    before = next(event for event in events if isinstance(event, PromptRead))
    assert heard[0].warm >= before.prompt_tokens, "an answer that is cut short may be other tokens when it is read"
    assert said(then) == room.generated(asks("", room.weights[1], turns=turns))
    other = room.run(asks("", room.weights[2], turns=turns))[1]
    assert next(event for event in other if isinstance(event, PromptRead)).warm <= 1, (
        "other weights read for themselves"
    )


def test_the_same_seed_draws_the_same_words(room: Room) -> None:
    drawn = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=12)
    first, again, other = (said(room.run(asks("Bread", sampling=drawn, seed=seed))[1]) for seed in (5, 5, 6))
    assert first == again != other


def test_a_long_message_is_read_between_the_words_of_others(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_batch, "PREFILL_TOKENS", 8)
    room.chats.join(1, "a", asks("Bread"))
    room.chats.step()
    room.chats.join(2, "b", asks("Bread rises slowly, as it does. " * 9, room.weights[3]))
    order: list[tuple[int, str]] = []
    while room.chats.has_work:
        order += [(number, event.type) for number, event, _ in room.chats.step()]
    reads = [place for place, each in enumerate(order) if each == (2, "heard")]
    words = [place for place, each in enumerate(order) if each[0] == 1 and each[1] == "spoke"]
    assert len(reads) > 5
    assert any(reads[0] < place < reads[-1] for place in words)


def test_a_full_batch_lets_wait_and_says_the_place(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_batch, "MAX_SLOTS", 2)
    monkeypatch.setattr(chat_batch, "PREPARE_SECONDS", 60.0)  # all of them come in one step, on a slow machine too
    told = room.run(*(asks(WORDS[0]) for _ in range(5)), owners="aaaab")
    queued = {number: [event.place for event in told[number] if isinstance(event, QueuePosition)] for number in told}
    assert queued == {1: [], 5: [], 2: [1], 3: [2, 1], 4: [3, 2, 1]}, "who has nothing in the batch comes before"


def test_one_that_is_larger_than_the_room_is_answered_alone(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.engine, "_chat_cache_bytes", 1)
    told = room.run(asks(WORDS[0]), asks(WORDS[1]))
    assert all(isinstance(events[-1], AnswerDone) for events in told.values())
    assert any(isinstance(event, QueuePosition) for event in told[2])


def test_stopping_takes_one_step(room: Room) -> None:
    room.chats.join(1, "", asks(WORDS[0]))
    room.chats.step()
    room.chats.leave(1)
    assert room.chats.step() == [(1, Cancelled(), True)]
    assert not room.chats.has_work


def test_what_is_wrong_with_one_is_said_to_it_alone(room: Room) -> None:
    told = room.run(asks("x " * 3000), asks(WORDS[0]), asks(WORDS[0], "w" + "0" * 32))
    assert isinstance(told[1][-1], Failed)
    assert told[1][-1].code == "prompt_too_long"
    assert isinstance(told[2][-1], AnswerDone)
    assert isinstance(told[3][-1], Failed)
    assert told[3][-1].code == WeightsMissing("w").code


def test_the_oldest_turns_are_left_out_where_that_is_wanted(room: Room) -> None:
    turns = [Turn(role="system", text="Be kind.")]
    for number in range(60):
        turns += [Turn(role="user", text=f"Number {number}, the sea."), Turn(role="assistant", text="Wide.")]
    turns.append(Turn(role="user", text="And now?"))
    events = room.run(asks("", turns=tuple(turns), trims=True))[1]
    heard = next(event for event in events if isinstance(event, PromptRead))
    assert heard.left_out > 0
    assert heard.left_out % 2 == 0
    assert heard.prompt_tokens + GREEDY.max_new_tokens <= heard.context_length
    kept = [turns[0], *turns[1 + heard.left_out :]]
    assert said(events) == room.generated(asks("", turns=tuple(kept)))
    fewer = [turns[0], *turns[heard.left_out - 1 :]]
    loaded = room.engine.loaded
    limit = heard.context_length - GREEDY.max_new_tokens
    assert len(loaded.prepare_chat(asks("", turns=tuple(fewer))).tokens) > limit, "no more than need be"


def test_the_answer_ends_with_the_context(room: Room) -> None:
    long = asks("The sea is wide. " * 68, sampling=GREEDY.model_copy(update={"max_new_tokens": 8192}))
    events = room.run(long)[1]
    assert isinstance(events[-1], AnswerDone)
    heard = next(event for event in events if isinstance(event, PromptRead))
    if events[-1].finish == "length":
        assert events[-1].tokens + heard.prompt_tokens == heard.context_length


def test_a_last_word_of_the_model_is_gone_on_with(room: Room) -> None:
    whole = said(room.run(asks(WORDS[0]))[1])
    turns = (Turn(role="user", text=WORDS[0]), Turn(role="assistant", text=whole[:9]))
    tokens = room.engine.loaded.prepare_chat(asks("", turns=turns)).tokens
    assert room.engine.loaded.tokenizer.decode(tokens).endswith("<|assistant|>" + whole[:9])


def test_tokens_are_told_with_their_log_probabilities(room: Room) -> None:
    events = room.run(asks(WORDS[0], top=3))[1]
    drawn = [token for event in events if isinstance(event, TextDelta) for token in event.drawn]
    answered = events[-1]
    assert isinstance(answered, AnswerDone)
    assert len(drawn) == answered.tokens
    for token in drawn:
        assert len(token.top) == 3
        assert token.top[0][2] == pytest.approx(token.logprob), "greedy takes the likeliest"
        assert math.exp(token.logprob) <= 1
        assert bytes(token.bytes).decode("utf-8", "replace") == token.text or "\ufffd" in token.text


def drawn_tokens(room: Room, *wanted: Chat) -> list[list[int]]:
    """The tokens of each answer that come from conversations side by side."""
    found: dict[int, list[int]] = {number: [] for number in range(1, len(wanted) + 1)}

    def note(logits: Tensor, seats: list[Any], ends: frozenset[int] = frozenset()) -> list[int | None]:
        tokens = original(logits, seats, ends)
        for seat, token in zip(seats, tokens, strict=True):
            assert token is not None
            found[seat.number].append(token)
        return tokens

    original, chat_batch.sample_each = chat_batch.sample_each, note
    try:
        room.run(*wanted)
    finally:
        chat_batch.sample_each = original
    return list(found.values())


FREE = Sampling(temperature=2.0, min_p=0.0, max_new_tokens=30)


def test_top_k_draws_from_the_likeliest_alone(room: Room) -> None:
    greedy, one, free = drawn_tokens(
        room, asks(WORDS[0], sampling=GREEDY), asks(WORDS[0], sampling=FREE.model_copy(update={"max_new_tokens": 12}),
                                                    top_k=1), asks(WORDS[0], sampling=FREE),
    )  # fmt: skip
    assert one == greedy
    assert free[:12] != greedy
    for seed in range(6):
        events = room.run(asks(WORDS[1], sampling=FREE, top_k=3, seed=seed, top=3))[1]
        for entry in (entry for event in events if isinstance(event, TextDelta) for entry in event.drawn):
            assert any(entry.logprob == pytest.approx(value, abs=1e-5) for _, _, value in entry.top)


def test_a_repetition_penalty_is_that_of_transformers(room: Room) -> None:
    loaded = room.engine.loaded
    for penalty in (1.5, 0.7):
        requests = [asks(text, weights, repetition_penalty=penalty) for text in WORDS for weights in room.weights[1:3]]
        together = drawn_tokens(room, *requests, asks(WORDS[0]))
        for request, tokens in zip(requests, together, strict=False):
            slot, found = room.engine.weights(request.weights)
            slot.install(found.flat)
            prompt = loaded.prepare_chat(request).tokens
            theirs = slot.model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0,
                repetition_penalty=penalty, eos_token_id=sorted(loaded.end_tokens),
            )  # fmt: skip
            assert tokens == theirs[0, len(prompt) :].tolist()
        assert together[-1] == drawn_tokens(room, asks(WORDS[0]))[0], "who asked for none has none"


def test_an_answer_does_not_end_before_the_least_number_of_tokens(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.engine.loaded, "end_tokens", frozenset(range(0, 400, 2)))
    for seed in range(5):
        short, long = drawn_tokens(
            room, asks(WORDS[0], sampling=FREE, seed=seed), asks(WORDS[0], sampling=FREE, seed=seed, min_tokens=9)
        )
        assert len(long) >= 10, "nine, and the end"
        assert all(token % 2 for token in long[:9])
        assert len(short) < 10 or seed
    events = room.run(asks(WORDS[0], sampling=FREE, min_tokens=9, stop=tuple("abcdefghijklmnoprstuvwxyz ")))[1]
    assert events[-1].tokens >= 9, "nor at a stop string"


def test_a_failed_step_is_said_to_all_and_the_next_one_goes_on(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError

    lines: SequenceCache = room.engine._get_sequence_cache()
    room.chats.join(1, "", asks(WORDS[0]))
    room.chats.join(2, "", asks(WORDS[1]))
    room.chats.step()
    room.chats.step()
    with monkeypatch.context() as broken:
        broken.setattr(lines, "decode", fail)
        with pytest.raises(ZeroDivisionError):
            room.chats.step()
        room.chats.join(3, "", asks(WORDS[1]))
    assert room.chats.abort() == [1, 2, 3]
    assert not room.chats.has_work
    assert said(room.run(asks(WORDS[0]))[1]) == room.generated(asks(WORDS[0]))


def test_a_model_without_a_template_is_spoken_to_in_lines(tmp_path: Path) -> None:
    room = Room(make_model(tmp_path / "model", "gpt2", template=None), tmp_path / "weights")
    prepared = room.engine.loaded.prepare_chat(asks("Hello."))
    assert room.engine.loaded.tokenizer.decode(prepared.tokens) == "User: Hello.\n\nAssistant:"
    assert prepared.stop == ("\n\nUser: ",)
    assert isinstance(room.run(asks("Hello."))[1][-1], AnswerDone)


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_what_two_texts_begin_with(one: list[int], other: list[int]) -> None:
    alike = common_prefix_length(one, other)
    assert one[:alike] == other[:alike]
    assert alike in (len(one), len(other)) or one[alike] != other[alike]


@pytest.mark.parametrize("turns", [
    (Turn(role="assistant", text="hi"),), (Turn(role="assistant", text=""),), (Turn(role="system", text="Be kind."),),
    (Turn(role="user", text=""),), (Turn(role="user", text="a"), Turn(role="user", text="b")),
])  # fmt: skip
def test_an_odd_conversation_is_in_nobodys_way(room: Room, turns: tuple[Turn, ...]) -> None:
    told = room.run(asks(WORDS[0]), asks("", turns=turns), asks(WORDS[1]))
    assert [isinstance(told[number][-1], AnswerDone) for number in (1, 3)] == [True, True]
    assert isinstance(told[2][-1], AnswerDone | Failed)


def test_a_template_that_fails_in_its_own_way_is_said_to_one_alone(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Chat) -> Any:
        raise ZeroDivisionError

    room.chats.join(1, "", asks(WORDS[0]))
    room.chats.step()
    with monkeypatch.context() as broken:
        broken.setattr(room.engine.loaded, "prepare_chat", fail)
        room.chats.join(2, "", asks(WORDS[1]))
        told = room.chats.step()
    assert [(number, event.code) for number, event, last in told if last] == [(2, "engine_bug")]
    rest = [number for _ in range(40) if room.chats.has_work for number, _, last in room.chats.step() if last]
    assert rest == [1]


def test_what_cannot_be_read_costs_the_others_nothing(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError

    alone = said(room.run(asks(WORDS[0]))[1])
    room.chats.join(1, "", asks(WORDS[0]))
    events = [event for _, event, _ in room.chats.step()]
    lines = room.engine._get_sequence_cache()
    with monkeypatch.context() as broken:
        broken.setattr(lines, "start", fail)
        room.chats.join(2, "", asks(WORDS[1]))
        told = room.chats.step()
    assert [(number, event.code) for number, event, last in told if last] == [(2, "out_of_memory")]
    events += [event for number, event, _ in told if number == 1]
    while room.chats.has_work:
        events += [event for _, event, _ in room.chats.step()]
    assert said(events) == alone


def test_leaving_before_being_taken_in_is_heard(room: Room) -> None:
    room.chats.join(1, "", asks(WORDS[0]))
    room.chats.leave(1)
    room.chats.leave(7)
    assert room.chats.step() == [(1, Cancelled(), True)]
    assert not room.chats.has_work


@pytest.mark.parametrize("temperature", [1e-38, 1e-5, 5.0])
def test_no_temperature_is_too_cold_or_too_hot(room: Room, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, min_p=0.0, max_new_tokens=6)
    other = sampling.model_copy(update={"top_p": 0.5})
    told = room.run(asks(WORDS[0], sampling=sampling), asks(WORDS[0], sampling=other))
    assert all(isinstance(events[-1], AnswerDone) for events in told.values())
    if temperature < 1e-3:
        greedy = GREEDY.model_copy(update={"max_new_tokens": 6})
        assert said(told[1]) == said(room.run(asks(WORDS[0], sampling=greedy))[1])


def test_many_adapters_come_and_go(room: Room) -> None:
    weights = [room.grown(Adapter(lora_rank=1 + seed % 5), seed) for seed in range(20, 34)]
    for group in (weights[:3], weights[3:12], weights[:1], weights[10:], weights):
        wanted = [asks(WORDS[1], each) for each in group]
        told = room.run(*wanted, asks(WORDS[1]))
        for number, request in enumerate(wanted, start=1):
            assert said(told[number]) == room.generated(request)


def test_talking_leaves_nothing_in_the_way_of_learning(room: Room) -> None:
    planted = run(room.engine.create_adapter(CreateAdapter(adapter=Adapter(lora_rank=4), seed=77))).weights
    room.engine._weights_store._cache.clear()  # what is talked to is read from disk
    room.run(asks(WORDS[0], planted))
    options = (Option(text="a", tokens=(5, 6), finish="stop"), Option(text="b", tokens=(7, 8), finish="stop"))
    lesson = Lesson(prompt=Prompt(text="Bread"), options=options, choice=0, temperature=1.0)
    request = Learn(weights=planted, lesson=lesson, learning=Learning(learning_rate=1e-2), context_length=256)
    assert run(room.engine.learn(request)).metrics.drift > 0
