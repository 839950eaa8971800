"""Tokens on their way through a whole engine: told with their own bytes, continued where a text stands before them,
never drawn from padding; and one conversation whose numbers overflowed, alone in its trouble."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.text.test_chat_batch import GREEDY, WORDS, Room, asks, run, said
from tests.tiny import make_model
from trellis.engine.text import chat_batch, chat_slots
from trellis.engine.text.cuda_graphs import StepGraphs
from trellis.engine.text.decoding import decode_group
from trellis.engine.text.group_forward import FastGroupForward, GenericGroupForward, GroupForward
from trellis.engine.text.kv_cache import GenericSequenceCache
from trellis.engine.text.sampling import sample, sample_scaled
from trellis.engine.text.weights_store import Weights
from trellis.errors import EngineError, TrellisError
from trellis.messages import (  # fmt: skip
    AnswerDone,
    Assess,
    Chat,
    CreateAdapter,
    Failed,
    Learn,
    Lesson,
    Offer,
    Option,
    Prompt,
    SampledToken,
    TextDelta,
    Turn,
)
from trellis.options import Adapter, Learning, Sampling

pytestmark = pytest.mark.engine

DRAWN = Sampling(temperature=1.5, min_p=0.0, max_new_tokens=24)
PADDING = 600


@pytest.fixture(scope="module", params=["byte-level", "llama", "gemma", "unigram", "wordpiece"])
def spelled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("spelled")
    return Room(make_model(folder / "model", "llama", tokenizer_kind=request.param), folder / "weights")


@pytest.fixture(scope="module", params=["lean", "general"])
def room(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    folder = tmp_path_factory.mktemp("tokens")
    return Room(make_model(folder / "model", "llama"), folder / "weights", general=request.param == "general")


@pytest.fixture(scope="module", params=["lean", "general"])
def padded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Room:
    """A model with far more rows in its embedding than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("padded")
    model = make_model(folder / "model", "llama", padding=PADDING)
    return Room(model, folder / "weights", general=request.param == "general")


def entries(events: list[Any]) -> list[SampledToken]:
    return [entry for event in events if isinstance(event, TextDelta) for entry in event.drawn]


def forwards(room: Room, weights: str) -> list[GroupForward]:
    """Each way in which a group of answers is drawn."""
    slot, found = room.engine.weights(weights)
    assert slot.adapted_layers
    graphs = StepGraphs(slot.adapted_layers.fast_forward, slot.adapted_layers.layers)
    return [
        GenericGroupForward(slot, found.flat),
        FastGroupForward(slot, found.flat),
        FastGroupForward(slot, found.flat, graphs),
    ]


# ── What is told ───────────────────────────────────────────────────────────────────────────────────


def test_tokens_joined_are_the_answer_for_every_kind_of_tokenizer(spelled: Room) -> None:
    wanted = [asks(text, sampling=DRAWN, seed=seed, top=4) for seed, text in enumerate(WORDS * 3)]
    for events in spelled.run(*wanted).values():
        told = entries(events)
        assert "".join(entry.text for entry in told) == said(events)
        assert b"".join(bytes(entry.bytes) for entry in told).decode("utf-8", "replace") == said(events)
        for event in events:
            if isinstance(event, TextDelta):
                assert "".join(entry.text for entry in event.drawn) == event.text
        for entry in told:
            assert len({text for text, _, _ in entry.top}) > 1, "alternatives can be told apart"


def test_a_text_is_continued_with_its_spaces_for_every_kind_of_tokenizer(spelled: Room) -> None:
    loaded = spelled.engine.loaded
    for text in ("The sea", "Bread rises"):
        request = Chat(text=text, sampling=DRAWN, seed=1)
        prompt = loaded.prepare_chat(request).tokens
        events = spelled.run(request.model_copy(update={"top": 0}))[1]
        answered = events[-1]
        assert isinstance(answered, AnswerDone)
        decoded = [str(loaded.tokenizer.decode(prompt, skip_special_tokens=True)), said(events)]
        tokens = spelled_tokens(spelled, request)
        whole = loaded.tokenizer.decode(
            [*prompt, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if "\ufffd" not in whole:
            assert "".join(decoded) == whole


def spelled_tokens(room: Room, request: Chat) -> list[int]:
    """The tokens of an answer, drawn again."""
    found: list[int] = []

    def note(logits: Tensor, seats: list[Any], ends: frozenset[int] = frozenset()) -> list[int | None]:
        tokens = original(logits, seats, ends)
        found.extend(token for token in tokens if token is not None and token not in ends)
        return tokens

    original, chat_batch.sample_each = chat_batch.sample_each, note
    try:
        room.run(request)
    finally:
        chat_batch.sample_each = original
    return found


def test_an_offer_after_an_opening_is_the_text_of_all_its_tokens(spelled: Room) -> None:
    loaded, weights = spelled.engine.loaded, spelled.weights[1]
    prompt = Prompt(text="Bread", opening="The sea")
    request = Offer(weights=weights, prompt=prompt, sampling=DRAWN, group_size=3, seed=1, context_length=256)
    options = run(spelled.engine.offer(request)).options
    before = loaded.tokenize_prompt(prompt, 1, 256)
    known = loaded.tokenizer.decode(before, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    for option in options:
        tokens = [token for token in option.tokens if token not in loaded.end_tokens]
        whole = loaded.tokenizer.decode(
            [*before, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if "\ufffd" not in whole:
            assert known + option.text == whole


def test_what_is_cut_by_a_stop_string_and_the_end_are_not_told(room: Room) -> None:
    whole = room.run(asks(WORDS[0], sampling=DRAWN, seed=9, top=2))[1]
    text = said(whole)
    stop = text[len(text) // 2 :][:2]
    events = room.run(asks(WORDS[0], sampling=DRAWN, seed=9, top=2, stop=(stop,)))[1]
    assert said(events) == text[: text.index(stop)]
    assert "".join(entry.text for entry in entries(events)) == said(events)
    end = min(room.engine.loaded.end_tokens)
    assert all(entry.text != room.engine.loaded.tokenizer.decode([end]) for entry in entries(whole))


# ── Padding ────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_that_no_token_belongs_to_is_never_drawn(padded: Room) -> None:
    size = len(padded.engine.loaded.tokenizer)
    greedy = DRAWN.model_copy(update={"temperature": 0.0})
    hot = DRAWN.model_copy(update={"temperature": 5.0, "max_new_tokens": 40})
    for weights in padded.weights[1:]:
        for forward in forwards(padded, weights):
            for sampling in (hot, greedy, hot.model_copy(update={"top_p": 0.95})):
                for openings in (1, 3):
                    group = list(decode_group(forward, padded.engine.loaded.tokenizer, [5, 6, 7], frozenset(), sampling,
                                              3, 1, openings))[-1]  # fmt: skip
                    assert all(0 <= token < size for option in group for token in option.tokens)
    for sampling in (hot, greedy):
        wanted = [asks(WORDS[0], weights, sampling=sampling, top=20) for weights in padded.weights]
        for request in wanted:
            assert all(token < size for token in spelled_tokens(padded, request))
        for events in padded.run(*wanted).values():
            assert all(len(entry.top) == 20 for entry in entries(events))
            assert all("None" not in text for entry in entries(events) for text, _, _ in entry.top)


def test_a_model_without_padding_draws_as_before(room: Room) -> None:
    loaded = room.engine.loaded
    assert loaded.slots.unused_rows is None
    assert loaded.fast_forward is not None
    assert loaded.fast_forward.unused_rows is None


# ── Numbers that are none ──────────────────────────────────────────────────────────────────────────

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0], [1.0, 1.0, 0.0, float("-inf")]])
BAD = [torch.full((4,), float("nan")), torch.tensor([0.0, float("inf"), 0.0, 0.0]), torch.full((4,), -float("inf")),
       torch.tensor([0.0, float("nan"), 0.0, 9.0])]  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5, min_p=0.3), Sampling(min_p=0.0), Sampling(temperature=3),
])  # fmt: skip
def test_a_row_that_is_no_number_is_told_and_changes_no_other(bad: Tensor, sampling: Sampling) -> None:
    chances = torch.tensor([0.1, 0.999, 0.6])
    plain, scores = sample(LOGITS, sampling, chances)
    mixed = torch.stack([LOGITS[0], bad, LOGITS[2]])
    drawn, found = sample(mixed, sampling, chances)
    assert bool(found[1].isnan())
    assert 0 <= int(drawn[1]) < 4
    assert [drawn[0], drawn[2]] == [plain[0], plain[2]]
    assert torch.equal(found[[0, 2]], scores[[0, 2]])


def test_filters_as_tensors_tell_it_as_well() -> None:
    drawn, scores = sample_scaled(torch.stack(BAD), torch.tensor(0.1), torch.tensor(0.9), torch.full((4,), 0.5))
    assert bool(scores.isnan().all())
    assert bool(((drawn >= 0) & (drawn < 4)).all())


def poisoned(room: Room, seed: int, value: float) -> str:
    """Weights so large that what the model makes with them are no numbers."""
    planted = run(room.engine.create_adapter(CreateAdapter(adapter=Adapter(lora_rank=4), seed=seed))).weights
    slot, found = room.engine.weights(planted)
    flat = torch.randn(slot.flat.shape, generator=torch.Generator().manual_seed(seed))
    flat[::7] = value
    made = Weights(f"w{seed:032x}", slot.settings, flat, found.first, found.second, 1)
    room.engine._weights_store.add(slot, made, None, save=False)
    return made.id


@pytest.mark.parametrize("value", [1e38, 1e25])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_one_conversation_without_numbers_ends_alone(room: Room, value: float, sampling: Sampling) -> None:
    bad = poisoned(room, 901, value)
    good = [asks(text, weights, sampling=sampling) for text in WORDS for weights in room.weights[:2]]
    alone = [said(room.run(request)[1]) for request in good]
    told = room.run(*good[:3], asks(WORDS[0], bad, sampling=sampling, top=3), *good[3:])
    failed = told.pop(4)[-1]
    assert isinstance(failed, Failed)
    assert failed.code == "not_finite"
    assert "no number" in failed.message
    assert [said(events) for events in told.values()] == alone
    assert all(isinstance(events[-1], AnswerDone) for events in told.values())


def in_the_midst(
    room: Room, monkeypatch: pytest.MonkeyPatch, number: int, after: int, how: Callable[[], Tensor]
) -> Any:
    """Have one row overflow after some tokens, as one with a rare text would: in its keys and values too."""
    lines = room.engine._get_sequence_cache()
    grow = lines.decode

    def broken(grown: Any, ids: Any) -> Tensor:
        logits = grow(grown, ids).clone()
        for row, line in enumerate(grown):
            seat = next(seat for seat in room.chats._slots if seat.sequence is line)
            if seat.number == number and seat.answer_tokens == after:
                logits[row] = how()
                cache = getattr(lines, "_cache", None)
                if cache is not None:
                    with torch.inference_mode():
                        for each in (*cache.keys, *cache.values):
                            each[lines._sequences.index(line)] = float("nan")  # type: ignore[attr-defined]
        return logits

    monkeypatch.setattr(lines, "decode", broken)


def test_what_overflows_in_mid_answer_leaves_nothing_behind(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [asks(WORDS[at % 3], room.weights[at % 3], sampling=DRAWN, seed=at) for at in range(5)]
    alone = [said(room.run(request)[1]) for request in wanted]
    size = len(room.engine.loaded.tokenizer)
    with monkeypatch.context() as broken:
        in_the_midst(room, broken, 2, 3, lambda: torch.full((size,), float("nan")))
        told = room.run(*wanted)
    assert isinstance(told[2][-1], Failed)
    assert told[2][-1].code == "not_finite"
    assert alone[1].startswith(said(told[2]))
    for number in (1, 3, 4, 5):
        assert said(told[number]) == alone[number - 1]
    again = room.run(*wanted)
    assert [said(events) for events in again.values()] == alone, "nothing of it was kept warm or in its row"


def test_what_cannot_go_on_is_said_to_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its weights were lost meanwhile."""
    room = Room(make_model(tmp_path / "model", "gpt2"), tmp_path / "weights", general=True)
    lines = room.engine._get_sequence_cache()
    assert isinstance(lines, GenericSequenceCache)
    alone = [said(room.run(asks(WORDS[at], sampling=DRAWN))[1]) for at in (0, 2)]
    read = lines.prefill

    def broken(line: Any, tokens: Any) -> Tensor:
        if line.weights == room.weights[1] and len(tokens) == 1 and len(line.tokens) > 8:
            raise MemoryError
        return read(line, tokens)

    monkeypatch.setattr(lines, "prefill", broken)
    told = room.run(asks(WORDS[0], sampling=DRAWN), asks(WORDS[1], room.weights[1]), asks(WORDS[2], sampling=DRAWN))
    assert isinstance(told[2][-1], Failed)
    assert told[2][-1].code == "out_of_memory"
    assert [said(told[1]), said(told[3])] == alone


def test_where_memory_runs_out_the_one_that_takes_most_ends(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [asks(WORDS[0], sampling=DRAWN), asks("The sea is wide. " * 20), asks(WORDS[1], sampling=DRAWN)]
    alone = [said(room.run(request)[1]) for request in wanted]
    lines = room.engine._get_sequence_cache()
    grow = lines.decode

    def tight(grown: Any, ids: Any) -> Tensor:
        if any(len(line.tokens) > 60 for line in grown):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
        return grow(grown, ids)

    with monkeypatch.context() as small:
        small.setattr(lines, "decode", tight)
        told = room.run(*wanted)
    assert isinstance(told[2][-1], Failed)
    assert told[2][-1].code == "out_of_memory"
    assert [said(told[1]), said(told[3])] == [alone[0], alone[2]]


def test_what_cannot_be_kept_warm_is_let_go(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(room.engine._get_sequence_cache(), "_keep_prefix", fail, raising=False)
    told = room.run(asks(WORDS[0]), asks(WORDS[1]))
    assert all(isinstance(events[-1], AnswerDone) for events in told.values())


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_option_without_numbers_ends_and_the_others_go_on(
    room: Room, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = forwards(room, room.weights[1])[which]
    tokenizer = room.engine.loaded.tokenizer
    plain = [option.tokens for option in list(decode_group(forward, tokenizer, [5, 6], frozenset(), DRAWN, 3, 1))[-1]]
    rows = type(forward.rows([5, 6], 1, 30))
    draws = rows.sample_steps

    def broken(self: Any, *arguments: Any) -> Any:
        step = 0
        for steps in draws(self, *arguments):
            found = []
            for tokens, scores in steps:
                step += 1
                found.append((tokens, [scores[0], float("nan") if step > 5 else scores[1], scores[2]]))
            yield found

    monkeypatch.setattr(rows, "sample_steps", broken)
    group = list(decode_group(forward, tokenizer, [5, 6], frozenset(), DRAWN, 3, 1))[-1]
    assert [option.tokens for option in group] == [plain[0], plain[1][:5], plain[2]]
    assert [option.overflowed for option in group] == [False, True, False]


@pytest.mark.parametrize("openings", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_offer_without_any_numbers_is_a_named_error(room: Room, openings: int, temperature: float) -> None:
    bad = poisoned(room, 902, 1e38)
    sampling = DRAWN.model_copy(update={"temperature": temperature})
    request = Offer(weights=bad, prompt=Prompt(text="Bread"), sampling=sampling, group_size=3, seed=1,
                    context_length=256, openings=openings)  # fmt: skip
    with pytest.raises(EngineError, match="no number") as raised:
        run(room.engine.offer(request))
    assert raised.value.code == "not_finite"


def test_learning_and_assessing_without_numbers_are_named_errors(room: Room) -> None:
    bad = poisoned(room, 903, 1e38)
    options = (Option(text="a", tokens=(5, 6), finish="stop"), Option(text="b", tokens=(7, 8), finish="stop"))
    lesson = Lesson(prompt=Prompt(text="Bread"), options=options, choice=0, temperature=1.0)
    learning = Learning(learning_rate=1e-2)
    with pytest.raises(TrellisError, match="overflowed") as raised:
        run(room.engine.learn(Learn(weights=bad, lesson=lesson, learning=learning, context_length=256)))
    assert raised.value.code == "not_finite"
    with pytest.raises(TrellisError, match="no number") as raised:
        run(room.engine.assess(Assess(weights=bad, lessons=(lesson,), learning=learning, context_length=256)))
    assert raised.value.code == "not_finite"


def test_a_click_that_leads_to_no_numbers_makes_no_weights(room: Room) -> None:
    options = (Option(text="a", tokens=(5, 6), finish="stop"), Option(text="b", tokens=(7, 8), finish="stop"))
    lesson = Lesson(prompt=Prompt(text="Bread"), options=options, choice=0, temperature=1.0)
    learning = Learning(learning_rate=0.1).model_copy(update={"learning_rate": 1e30, "inner_steps": 1})
    planted = run(room.engine.create_adapter(CreateAdapter(adapter=Adapter(lora_rank=4), seed=904))).weights
    with pytest.raises(TrellisError, match="overflowed") as raised:
        run(room.engine.learn(Learn(weights=planted, lesson=lesson, learning=learning, context_length=256)))
    assert raised.value.code == "not_finite"


def test_a_base_model_without_numbers_teaches_nothing(tmp_path: Path) -> None:
    room = Room(make_model(tmp_path / "model", "llama"), tmp_path / "weights")
    planted = run(room.engine.create_adapter(CreateAdapter(adapter=Adapter(lora_rank=4), seed=1))).weights
    with torch.no_grad():
        room.engine.loaded.model.get_parameter("model.norm.weight").fill_(float("nan"))
    lesson = Lesson(prompt=Prompt(text="Bread"), choice=0, temperature=1.0,
                    options=(Option(text="a", tokens=(5, 6), finish="stop"),))  # fmt: skip
    request = Learn(weights=planted, lesson=lesson, learning=Learning(learning_rate=1e-2), context_length=256)
    with pytest.raises(EngineError, match="no number"):
        run(room.engine.learn(request))


# ── Long conversations ─────────────────────────────────────────────────────────────────────────────


def test_a_conversation_that_is_certainly_too_long_is_refused_unread(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, asked = room.engine.loaded, []
    tokenizer = loaded.tokenizer
    monkeypatch.setattr(loaded, "tokenizer", lambda *args, **more: asked.append(args))
    monkeypatch.setattr("trellis.engine.text.loaded_model.vocabulary_of", lambda _: chat_batch.vocabulary_of(tokenizer))
    for request in (asks("sea " * 350_000), Chat(text="sea " * 350_000, sampling=DRAWN, seed=1)):
        with pytest.raises(Exception, match="at least") as raised:
            loaded.prepare_chat(request)
        assert raised.value.code == "prompt_too_long"  # type: ignore[attr-defined]
    assert not asked


def slow(room: Room, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A tokenizer that takes long over what is long, as those written in Python do."""
    conversation = room.engine.loaded.prepare_chat

    def slowly(request: Chat) -> Any:
        if len(request.turns[-1].text) > chat_slots.MAX_INLINE_CHARACTERS:
            time.sleep(seconds)
        return conversation(request)

    monkeypatch.setattr(room.engine.loaded, "prepare_chat", slowly)


def test_a_long_message_holds_up_nobody(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(room, monkeypatch, 1.0)
    alone = said(room.run(asks(WORDS[0]))[1])
    room.chats.join(1, "a", asks(WORDS[0]))
    room.chats.join(2, "b", asks("sea " * 5000))
    events: dict[int, list[Any]] = {1: [], 2: []}
    longest = 0.0
    while room.chats.has_work:
        began = time.monotonic()
        for number, event, _ in room.chats.step():
            events[number].append(event)
        longest = max(longest, time.monotonic() - began)
    assert longest < 0.5
    assert said(events[1]) == alone
    assert isinstance(events[2][-1], Failed)
    assert events[2][-1].code == "prompt_too_long"


def test_a_long_message_that_nobody_wants_any_more_is_let_go(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(room, monkeypatch, 0.2)
    room.chats.join(1, "a", asks("sea " * 5000))
    assert room.chats.step() == []
    room.chats.leave(1)
    assert [event.type for _, event, _ in room.chats.step()] == ["cancelled"]
    assert not room.chats.has_work
    time.sleep(0.4)
    assert isinstance(room.run(asks(WORDS[0]))[1][-1], AnswerDone), "what was read for it is not taken for another"


def test_long_conversations_are_trimmed_without_reading_all_of_it_again(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[Turn] = []
    for number in range(400):
        turns += [Turn(role="user", text=f"Number {number}, the sea. " * 3), Turn(role="assistant", text="Wide. " * 9)]
    turns.append(Turn(role="user", text="And now?"))
    loaded, read = room.engine.loaded, []
    tokens = loaded._tokenize_turns

    def counted(said: Any, *more: Any) -> list[int]:
        found = tokens(said, *more)
        read.append(len(found))
        return found

    monkeypatch.setattr(loaded, "_tokenize_turns", counted)
    prepared = loaded.prepare_chat(asks("", turns=tuple(turns), trims=True))
    assert prepared.left_out > 0
    assert len(prepared.tokens) > prepared.context_length // 3
    assert sum(read[1:]) < 12 * prepared.context_length, "besides once, to see whether it fits"
