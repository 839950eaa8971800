"""One suite for every engine: what the studio relies on, held by the fake and by the real one alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import thread_spawner
from trellis.blobs import Blobs
from trellis.errors import EngineError, Invalid, TrellisError, WeightsMissing
from trellis.messages import (  # fmt: skip
    LOG_FILE,
    AdapterCreated,
    AnswerDone,
    Assess,
    Assessed,
    Chat,
    CreateAdapter,
    Delta,
    Learn,
    Learned,
    Lesson,
    Load,
    Loaded,
    Merge,
    Merged,
    Offer,
    Offered,
    Option,
    Progress,
    Prompt,
    PromptRead,
    Ranking,
    Request,
    Retrain,
    Status,
    StatusReport,
    TextDelta,
    Turn,
    Written,
)
from trellis.options import Adapter, Learning, Sampling
from trellis.workers.worker import Worker

pytestmark = pytest.mark.anyio

Made = Callable[[Blobs], Any]
LEARNING = Learning(learning_rate=1e-2)


def fake(blobs: Blobs) -> Any:
    from trellis.engine.fake import FakeEngine

    return FakeEngine(blobs)


def text(blobs: Blobs) -> Any:
    from trellis.engine.handlers import TextEngine

    return TextEngine(blobs)


@pytest.fixture(params=[fake, pytest.param(text, marks=pytest.mark.engine)])
def made(request: pytest.FixtureRequest) -> Made:
    chosen: Made = request.param
    return chosen


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path / "weights")


async def start(made: Made, blobs: Blobs, model: Path) -> Worker:
    worker = await Worker.start(thread_spawner(lambda: made(blobs)))
    await worker.ask(Load(path=str(model)))
    return worker


@pytest.fixture
async def worker(made: Made, blobs: Blobs, tiny_llama: Path) -> AsyncIterator[Worker]:
    worker = await start(made, blobs, tiny_llama)
    yield worker
    await worker.stop()


async def plant(worker: Worker, seed: int = 1) -> str:
    planted = await worker.ask(CreateAdapter(adapter=Adapter(lora_rank=4), seed=seed))
    assert isinstance(planted, AdapterCreated)
    return planted.weights


def offer(weights: str, *, seed: int = 7, text: str = "Tell me about the sea.", tokens: int = 12) -> Offer:
    return Offer(
        weights=weights, prompt=Prompt(text=text), sampling=Sampling(max_new_tokens=tokens), group_size=4, seed=seed,
        context_length=256,
    )  # fmt: skip


async def draw(worker: Worker, request: Offer) -> tuple[Option, ...]:
    offered = await worker.ask(request)
    assert isinstance(offered, Offered)
    return offered.options


def lesson(options: tuple[Option, ...], choice: Any = 0) -> Lesson:
    return Lesson(prompt=Prompt(text="Tell me about the sea."), options=options, choice=choice, temperature=1.0)


def learn(weights: str, what: Lesson, *replay: Lesson) -> Learn:
    return Learn(weights=weights, lesson=what, replay=replay, learning=LEARNING, context_length=256)


async def learned_from(worker: Worker, request: Learn) -> Learned:
    learned = await worker.ask(request)
    assert isinstance(learned, Learned)
    return learned


def files(blobs: Blobs, weights: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in blobs.path(weights).iterdir() if file.suffix == ".safetensors"}


async def test_a_load_tells_true_stages_in_order(made: Made, blobs: Blobs, tiny_llama: Path) -> None:
    worker = await Worker.start(thread_spawner(lambda: made(blobs)))
    events = [event async for event in worker.stream(Load(path=str(tiny_llama)))]
    assert isinstance(events[-1], Loaded)
    progress = [event for event in events if isinstance(event, Progress)]
    fractions = [event.fraction for event in progress]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)
    reading = [event for event in progress if event.stage == "reading"]
    assert reading
    assert all(event.bytes is not None and event.bytes <= (event.total_bytes or 0) for event in reading)
    await worker.stop()


async def test_nothing_is_done_before_a_model_is_loaded(made: Made, blobs: Blobs) -> None:
    worker = await Worker.start(thread_spawner(lambda: made(blobs)))
    with pytest.raises(EngineError, match="No model is loaded"):
        await worker.ask(CreateAdapter(adapter=Adapter(), seed=0))
    await worker.stop()


async def test_the_same_offer_gives_the_same_options_and_another_seed_gives_others(worker: Worker) -> None:
    weights = await plant(worker)
    first = await draw(worker, offer(weights))
    assert await draw(worker, offer(weights)) == first
    assert await draw(worker, offer(weights, seed=8)) != first
    assert len(first) == 4
    assert all(option.finish in ("stop", "length") and option.tokens for option in first)
    assert all(option.logprob <= 0 for option in first)


async def test_deltas_join_to_the_options(worker: Worker) -> None:
    weights = await plant(worker)
    texts = [""] * 4
    async for event in worker.stream(offer(weights)):
        if isinstance(event, Delta):
            for index, text in event.texts.items():
                texts[index] += text
        elif isinstance(event, Offered):
            assert texts == [option.text for option in event.options]


async def test_learning_names_what_it_makes_and_leaves_it_whole_on_disk(worker: Worker, blobs: Blobs) -> None:
    weights = await plant(worker)
    request = learn(weights, lesson(await draw(worker, offer(weights)), 2))
    learned = await learned_from(worker, request)
    assert learned.weights == request.weights_id()
    assert learned.weights in blobs
    assert learned.metrics.share_after > learned.metrics.share_before
    assert learned.metrics.drift > 0
    assert not list(blobs.root.glob(".tmp-*"))


@pytest.mark.parametrize(
    "choice", [0, (0, 2), "none", Ranking(ranking=(2, 0, 1)), Written(written="The sea is wide.")], ids=str
)
async def test_every_kind_of_choice_is_learned_from(worker: Worker, choice: Any) -> None:
    weights = await plant(worker)
    learned = await learned_from(worker, learn(weights, lesson(await draw(worker, offer(weights)), choice)))
    assert learned.metrics.share_after > learned.metrics.share_before
    assert learned.weights != weights


async def test_weights_that_are_not_kept_are_in_memory_alone_until_they_are(worker: Worker, blobs: Blobs) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    request = learn(weights, lesson(options, 2))
    ahead = request.model_copy(update={"keep": False})
    assert ahead.weights_id() == request.weights_id()
    learned = await learned_from(worker, ahead)
    assert learned.weights == request.weights_id()
    assert learned.weights not in blobs
    drawn = await draw(worker, offer(learned.weights))
    after = await learned_from(worker, learn(learned.weights, lesson(drawn, 0)).model_copy(update={"keep": False}))
    assert await learned_from(worker, ahead) == learned
    assert await learned_from(worker, request) == learned  # asked again to be kept
    written = files(blobs, learned.weights)
    assert after.weights not in blobs
    blobs.discard(learned.weights)
    assert await learned_from(worker, request) is not None  # gone from disk: made again, the same
    assert files(blobs, learned.weights) == written
    assert await draw(worker, offer(learned.weights)) == drawn


class Gated:
    """An engine that holds up all requests behind the first one for its status, until a second one has arrived."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._held = False
        self._open = threading.Event()

    @property
    def lanes(self) -> int:
        lanes: int = self._engine.lanes
        return lanes

    def batches(self) -> Any:
        return self._engine.batches()

    def handlers(self) -> Any:
        return {**self._engine.handlers(), Status: self._status}

    def _status(self, request: Status) -> Any:
        """Called as a frame arrives; what it returns is worked on later."""
        if self._held:
            self._open.set()
        self._held = True
        return self._when_open(request)

    def _when_open(self, request: Status) -> Any:
        while not self._open.wait(0.001):
            yield None
        return (yield from self._engine.handlers()[Status](request))


async def test_what_waits_can_be_made_urgent(made: Made, blobs: Blobs, tiny_llama: Path) -> None:
    worker = await start(lambda blobs: Gated(made(blobs)), blobs, tiny_llama)
    weights = await plant(worker)
    order: list[str] = []
    urgent, patient = offer(weights, seed=1, tokens=30), offer(weights, seed=2, tokens=30)

    async def ask(name: str, request: Request, priority: int) -> None:
        await worker.ask(request, priority)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask("gate", Status(), 0))
        group.create_task(ask("patient", patient, 3))
        group.create_task(ask("urgent", urgent, 3))
        await asyncio.sleep(0)  # each of them has been sent
        await worker.set_priority(urgent)
        await worker.set_priority(offer(weights, seed=3))  # not under way: nothing happens
        group.create_task(ask("opened", Status(), 0))
    assert order.index("urgent") < order.index("patient")
    await worker.stop()


async def test_learning_twice_is_learning_once(worker: Worker) -> None:
    weights = await plant(worker)
    request = learn(weights, lesson(await draw(worker, offer(weights))))
    assert await learned_from(worker, request) == await learned_from(worker, request)


async def test_another_engine_makes_the_same_weights_bit_for_bit(
    made: Made, worker: Worker, blobs: Blobs, tiny_llama: Path, tmp_path: Path
) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    first = await learned_from(worker, learn(weights, lesson(options)))
    second = await learned_from(worker, learn(first.weights, lesson(options, 3), lesson(options)))
    others = Blobs(tmp_path / "others")
    other = await start(made, others, tiny_llama)
    assert await plant(other) == weights
    assert await draw(other, offer(weights)) == options
    await learned_from(other, learn(weights, lesson(options)))
    again = await learned_from(other, learn(first.weights, lesson(options, 3), lesson(options)))
    assert again.weights == second.weights
    assert files(others, again.weights) == files(blobs, second.weights)
    assert await draw(other, offer(again.weights)) == await draw(worker, offer(second.weights))
    await other.stop()


async def test_an_engine_that_starts_again_goes_on_from_the_files(
    made: Made, worker: Worker, blobs: Blobs, tiny_llama: Path
) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    first = await learned_from(worker, learn(weights, lesson(options)))
    expected = await learned_from(worker, learn(first.weights, lesson(options, 1)))
    other = await start(made, blobs, tiny_llama)
    blobs.discard(expected.weights)
    again = await learned_from(other, learn(first.weights, lesson(options, 1)))
    assert again.weights == expected.weights
    assert again.metrics.model_dump(exclude={"seconds"}) == expected.metrics.model_dump(exclude={"seconds"})
    await other.stop()


def log_of(folder: Path, *lessons: Lesson) -> Path:
    folder.mkdir()
    (folder / LOG_FILE).write_text("".join(f"{each.model_dump_json()}\n" for each in lessons), encoding="utf-8")
    return folder


def fit(weights: str, log: Path, epochs: int = 2) -> Retrain:
    return Retrain(
        weights=weights, log="l1", path=str(log), learning=LEARNING, epochs=epochs, seed=3, context_length=256
    )  # fmt: skip


async def test_a_whole_log_is_fitted_with_progress_and_named_by_what_it_is_made_of(
    worker: Worker, blobs: Blobs, tmp_path: Path
) -> None:
    weights = await plant(worker)
    first, second = await draw(worker, offer(weights)), await draw(worker, offer(weights, seed=8))
    in_words = tuple(option.model_copy(update={"tokens": ()}) for option in second)
    log = log_of(tmp_path / "log", lesson(first, 2), lesson(in_words, (0, 1)), lesson(first, "none"))
    request = fit(weights, log)
    events = [event async for event in worker.stream(request)]
    assert any(isinstance(event, Progress) and event.stage == "fitting" for event in events)
    learned = events[-1]
    assert isinstance(learned, Learned)
    assert learned.weights == request.weights_id()
    assert learned.weights in blobs
    assert learned.metrics.share_after > learned.metrics.share_before
    assert learned.metrics.drift > 0
    assert learned.metrics.agreed_of == 3
    assert fit(weights, tmp_path / "elsewhere").weights_id() == request.weights_id()
    assert fit(weights, log, epochs=3).weights_id() != request.weights_id()
    assert await worker.ask(request) == learned


async def test_fitting_twice_makes_the_same_weights_and_what_comes_between_changes_nothing(
    worker: Worker, blobs: Blobs, tmp_path: Path
) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    other = (await learned_from(worker, learn(weights, lesson(options, 1)))).weights
    request = fit(weights, log_of(tmp_path / "log", lesson(options, 2), lesson(options, 0)))
    await worker.ask(request)
    alone = files(blobs, request.weights_id())
    blobs.discard(request.weights_id())
    async for event in worker.stream(request, priority=2):
        if isinstance(event, Progress):
            await draw(worker, offer(other, seed=4, tokens=3))
    assert files(blobs, request.weights_id()) == alone


async def test_what_does_not_fit_into_the_context_is_left_out_and_stops_no_click_after_it(
    worker: Worker, tmp_path: Path
) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    fine = lesson(options, 1)
    long = fine.model_copy(update={"prompt": Prompt(text="wide sea " * 400)})
    learned = await worker.ask(fit(weights, log_of(tmp_path / "log", fine, long)))
    assert isinstance(learned, Learned)
    assert learned.metrics.left_out in (None, 1)  # the fake has no context
    after = await learned_from(worker, learn(learned.weights, fine, long, fine))
    assert after.metrics.share_after > after.metrics.share_before


async def test_a_log_that_is_gone_is_told_of(worker: Worker, tmp_path: Path) -> None:
    weights = await plant(worker)
    with pytest.raises(TrellisError) as raised:
        await worker.ask(fit(weights, tmp_path / "nowhere"))
    assert raised.value.code == "log_missing"


async def test_assessing_counts_the_choices_that_weights_agree_with(worker: Worker) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    learned = await learned_from(worker, learn(weights, lesson(options, 2)))
    request = Assess(weights=learned.weights, lessons=(lesson(options, 2),) * 2, learning=LEARNING, context_length=256)
    assert await worker.ask(request) == Assessed(agreed=2, of=2)


async def test_a_more_urgent_request_goes_first(worker: Worker) -> None:
    weights = await plant(worker)
    order: list[str] = []
    async with aclosing(worker.stream(offer(weights, tokens=60), priority=1)) as slow:
        async for _ in slow:
            if not order:
                await worker.ask(Status(), priority=0)
                order.append("urgent")
        order.append("patient")
    assert order == ["urgent", "patient"]


async def test_what_is_interrupted_ends_as_if_it_had_not_been(worker: Worker) -> None:
    weights = await plant(worker)
    options = await draw(worker, offer(weights))
    other = (await learned_from(worker, learn(weights, lesson(options, 1)))).weights
    alone = await draw(worker, offer(weights, seed=3, tokens=40))
    beside: list[tuple[Option, ...]] = []
    async for event in worker.stream(offer(weights, seed=3, tokens=40), priority=1):
        if isinstance(event, Delta):
            await draw(worker, offer(other, seed=4, tokens=3))
        elif isinstance(event, Offered):
            beside.append(event.options)
    assert beside == [alone]


@pytest.mark.engine
@pytest.mark.parametrize("dropout", [0.0, 0.1])
async def test_what_is_worked_on_at_once_is_the_same_as_one_after_the_other(
    tmp_path: Path, tiny_llama: Path, dropout: float
) -> None:
    from trellis.engine.handlers import TextEngine

    class OnManyLanes(TextEngine):
        lanes = 4

    adapters = Adapter(lora_rank=4, lora_dropout=dropout), Adapter(lora_rank=2)
    made = []
    for name, kind in (("one", TextEngine), ("many", OnManyLanes)):
        blobs = Blobs(tmp_path / name)
        worker = await start(kind, blobs, tiny_llama)
        asked: list[Learn] = []
        drawn = []
        for adapter in adapters:
            planted = await worker.ask(CreateAdapter(adapter=adapter, seed=1))
            assert isinstance(planted, AdapterCreated)
            offers = [offer(planted.weights, seed=seed) for seed in range(3)]
            if name == "one":
                options = [await draw(worker, each) for each in offers]
            else:
                options = await asyncio.gather(*(draw(worker, each) for each in offers))
            drawn += options
            asked += [
                learn(planted.weights, lesson(each, choice), lesson(options[0], "none"))
                for each in options for choice in (0, 3)
            ]  # fmt: skip
        if name == "one":
            learned = [await learned_from(worker, each) for each in asked]
        else:
            learned = await asyncio.gather(*(learned_from(worker, each) for each in asked))
        assert len({each.weights for each in learned}) == len(asked)
        made.append((drawn, [files(blobs, each.weights) for each in learned]))
        await worker.stop()
    assert made[0] == made[1]


async def test_leaving_a_stream_cancels_the_request(worker: Worker) -> None:
    weights = await plant(worker)
    async with aclosing(worker.stream(offer(weights, tokens=200))) as events:
        async for _ in events:
            break
    report = await worker.ask(Status())
    assert isinstance(report, StatusReport)
    assert report.resident_bytes > 0
    assert await draw(worker, offer(weights)) == await draw(worker, offer(weights))


async def test_missing_weights_are_named(worker: Worker) -> None:
    with pytest.raises(WeightsMissing) as raised:
        await worker.ask(offer("w0123"))
    assert raised.value.weights == "w0123"


async def test_damaged_weights_are_taken_away_and_named_missing(
    made: Made, worker: Worker, blobs: Blobs, tiny_llama: Path
) -> None:
    weights = await plant(worker)
    learned = await learned_from(worker, learn(weights, lesson(await draw(worker, offer(weights)))))
    (blobs.path(learned.weights) / "weights.json").write_text("{")
    other = await start(made, blobs, tiny_llama)
    with pytest.raises(WeightsMissing):
        await other.ask(offer(learned.weights))
    await other.stop()


async def test_a_prompt_that_does_not_fit_is_refused_with_its_field(worker: Worker) -> None:
    weights = await plant(worker)
    with pytest.raises(Invalid, match="prompt has") as raised:
        await worker.ask(offer(weights, text="sea " * 1000))
    assert raised.value.field == "prompt"


async def test_merging_writes_a_model_and_says_how_far_it_is_from_base_and_adapter(
    worker: Worker, blobs: Blobs, tiny_llama: Path, tmp_path: Path
) -> None:
    root = await plant(worker)
    into = tmp_path / "merged"
    request = Merge(
        path=str(tiny_llama), weights=root, into=str(into), probes=(Prompt(text="Tell me about the sea."),),
        root=root, plant=CreateAdapter(adapter=Adapter(lora_rank=4), seed=1),
    )  # fmt: skip
    events = [event async for event in worker.stream(request)]
    merged = events[-1]
    assert isinstance(merged, Merged)
    assert merged.largest_difference < 1e-3
    assert merged.files == {str(file.relative_to(into)): file.stat().st_size for file in into.rglob("*")}
    assert "model.safetensors" in merged.files
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    assert fractions == sorted(fractions)


def chat(text: str, **more: Any) -> Chat:
    return Chat(**({"turns": (Turn(role="user", text=text),), "sampling": Sampling(), "seed": 1} | more))


async def test_a_conversation_is_heard_then_answered(worker: Worker) -> None:
    planted = await worker.ask(CreateAdapter(adapter=Adapter(), seed=1))
    assert isinstance(planted, AdapterCreated)
    for weights in ("", planted.weights):
        events = [event async for event in worker.stream(chat("Tell me about the sea.", weights=weights))]
        heard, answered = events[0], events[-1]
        assert isinstance(heard, PromptRead)
        assert heard.left_out == 0
        assert isinstance(answered, AnswerDone)
        assert answered.prompt_tokens == heard.prompt_tokens > 0
        spoken = [event for event in events if isinstance(event, TextDelta)]
        assert "".join(event.text for event in spoken)
        assert spoken[-1].tokens <= answered.tokens
        counts = [event.tokens for event in spoken]
        assert counts == sorted(counts)


async def test_conversations_go_on_side_by_side(worker: Worker) -> None:
    async def tell(text: str) -> list[str]:
        return [event.type async for event in worker.stream(chat(text))]

    for told in await asyncio.gather(*(tell(f"Number {number}, the sea.") for number in range(8))):
        assert told[0] == "heard"
        assert told[-1] == "answered"


async def test_who_stops_listening_stops_the_answer(worker: Worker) -> None:
    async with aclosing(worker.stream(chat("say 900 words at 100 a second"))) as events:
        async for event in events:
            if isinstance(event, TextDelta):
                break
    assert isinstance(await worker.ask(Status()), StatusReport)
    assert not worker.is_busy


async def test_a_chat_with_weights_that_are_not_there_says_so(worker: Worker) -> None:
    with pytest.raises(WeightsMissing):
        await worker.ask(chat("Hello.", weights="w" + "0" * 32))


async def test_chats_before_a_model_is_loaded_are_refused(made: Made, blobs: Blobs) -> None:
    worker = await Worker.start(thread_spawner(lambda: made(blobs)))
    with pytest.raises(EngineError) as refused:
        await worker.ask(chat("Hello."))
    assert refused.value.code == "not_loaded"
    await worker.stop()


async def test_a_conversation_goes_on_while_somebody_steers(worker: Worker) -> None:
    planted = await worker.ask(CreateAdapter(adapter=Adapter(), seed=1))
    assert isinstance(planted, AdapterCreated)
    long = Sampling(max_new_tokens=100)
    talking = asyncio.create_task(worker.ask(chat("say 50 words at 500 a second", sampling=long)))
    for number in range(3):
        offer = Offer(
            weights=planted.weights, prompt=Prompt(text=f"Bread {number}"), sampling=Sampling(), group_size=2, seed=1,
            context_length=256,
        )  # fmt: skip
        assert isinstance(await worker.ask(offer), Offered)
    assert isinstance(await talking, AnswerDone)
