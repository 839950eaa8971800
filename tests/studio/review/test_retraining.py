"""Learning from whole logs over the fake engine: afresh, from a file, on another model; and made again when lost."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import open_studio, ready, thread_spawner, until
from tests.studio.steering.test_sessions import choose
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import Conflict, Invalid, NotFound, TrellisError
from trellis.messages import LOG_FILE, Choice, Learn, Lesson, Option, Prompt, Retrain
from trellis.studio.jobs import Job
from trellis.studio.review.journal import describe_choice, journal_markdown
from trellis.studio.steering.choice_logs import ChoiceLogs, move_refusals_last, without_tokens
from trellis.studio.steering.retention import prunable_weights
from trellis.studio.steering.session import Session
from trellis.studio.steering.tree import Retraining, choices_to_replay
from trellis.studio.studio import Studio
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio


@pytest.fixture
async def session(studio: Studio) -> Session:
    session = await studio.steering.create("Test", {"seed": 5})
    for choice in (1, "none", (0, 2)):
        await choose(session, choice)
    await session.commands.skip("skip")
    await ready(session)
    return session


async def done(job: Job) -> dict[str, Any]:
    assert job.task
    await job.task
    assert job.row["state"] == "done", job.row["error"]
    result: dict[str, Any] = job.row["result"]
    return result


def prompts_folder(studio: Studio) -> Path:
    folder = studio.datasets.folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def preferences(studio: Studio, count: int = 3, name: str = "likes.jsonl") -> str:
    rows = [{"prompt": f"Why {number}?", "chosen": "Because.", "rejected": "No."} for number in range(count)]
    (prompts_folder(studio) / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


async def test_a_branch_is_fitted_afresh_beside_itself(studio: Studio, session: Session) -> None:
    head = session.tree.head_id
    result = await done(await studio.retraining.retrain(session.id))
    node = session.node(result["node"])
    assert isinstance(node.choice, Retraining)
    assert (node.parent, node.choice.kind, node.choice.source) == (session.tree.root.id, "refit", head)
    assert (node.choice.lessons, node.choice.teaching) == (3, 2)
    assert node.metrics
    assert node.metrics.agreed_of == 3
    assert session.tree.head_id == head
    await session.commands.go_to(node.id, "there")
    state = await ready(session)
    assert state["offer"]["options"]
    assert "retrained on 3 choices" in await journal_markdown(studio.store, session)
    assert describe_choice(node.choice) == "retrained on 3 choices"


async def test_the_same_branch_fitted_twice_is_one_node(studio: Studio, session: Session) -> None:
    first = await done(await studio.retraining.retrain(session.id))
    second = await done(await studio.retraining.retrain(session.id))
    other = await done(await studio.retraining.retrain(session.id, epochs=2))
    assert first["node"] == second["node"] != other["node"]


async def test_the_same_request_is_one_fit_also_after_more_was_said(studio: Studio, session: Session) -> None:
    first = await studio.retraining.retrain(session.id, request="r1")
    await done(first)
    await choose(session, 0)
    again = await studio.retraining.retrain(session.id, request="r1")
    assert again.id == first.id


async def test_what_comes_after_a_fit_replays_lessons_of_its_log(studio: Studio, session: Session) -> None:
    result = await done(await studio.retraining.import_preferences(session.id, preferences(studio, 40)))
    node = session.node(result["node"])
    assert node.parent is not None
    drawn = choices_to_replay(session.config, session.tree.path(node.id))
    assert len(drawn) == session.config.replay
    assert len(choices_to_replay(session.config, session.tree.path(node.parent))) == 2
    assert any(each is node and number > 0 for each, number in drawn)
    await session.commands.go_to(node.id, "there")
    state = await choose(session, 0)
    assert state["head"]["step"] == node.step + 1


async def test_a_branch_that_came_from_a_file_is_fitted_afresh_with_all_of_it(studio: Studio, session: Session) -> None:
    result = await done(await studio.retraining.import_preferences(session.id, preferences(studio, 5)))
    again = await done(await studio.retraining.retrain(session.id, result["node"]))
    assert again["lessons"] == 3 + 5


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    import csv
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


@pytest.mark.parametrize("ending", ["json", "jsonl.gz", "csv", "csv.gz", "parquet"])
async def test_choices_are_learned_from_whatever_the_format(studio: Studio, session: Session, ending: str) -> None:
    def turns(*said: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=False)]

    rows = [
        {"prompt": "Why, and how?", "chosen": turns("Why, and how?", "A; b"), "rejected": turns("Why, and how?", "B")},
        {"prompt": "And?", "chosen": turns("Why?", "So", "And?", "A"), "rejected": turns("Why?", "So", "And?", "B")},
    ]  # fmt: skip
    content = {
        "json": lambda: json.dumps({"version": "1", "data": rows}).encode(),
        "jsonl": lambda: "\n".join(map(json.dumps, rows)).encode(),
        "csv": lambda: csv_of(rows),
        "parquet": lambda: parquet_of(rows),
    }[ending.removesuffix(".gz")]()
    name = f"likes.{ending}"
    (prompts_folder(studio) / name).write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    job = await studio.retraining.import_preferences(session.id, name)
    result = await done(job)
    assert result["lessons"] == 1
    (note,) = job.row["body"]["notes"]
    assert note.startswith("1 of 2 rows skipped, the first in ")
    assert "multi-turn" in note
    lessons = await session.requests.lessons(session.tree.path(result["node"]))
    assert lessons[-1].prompt.text == "Why, and how?"
    assert [option.text for option in lessons[-1].options] == ["A; b", "B"]


async def test_weights_of_a_fit_are_kept_and_worked_out_again_when_they_are_lost(
    studio: Studio, session: Session, tmp_path: Path
) -> None:
    result = await done(await studio.retraining.import_preferences(session.id, preferences(studio)))
    node = session.node(result["node"])
    assert node.weights not in prunable_weights(session.tree, session.config)
    (weights,) = tmp_path.rglob(node.weights)
    shutil.rmtree(weights)
    await session.commands.go_to(node.id, "there")
    await ready(session)
    await until(lambda: weights.is_dir())
    (log,) = (tmp_path / "choices").rglob(node.choice.fitted if isinstance(node.choice, Retraining) else "")
    shutil.rmtree(log)
    shutil.rmtree(weights)
    await session.commands.go_to(session.tree.root.id, "away")
    await ready(session)
    await session.commands.go_to(node.id, "back")
    await until(lambda: session.status == "failed")
    assert session.error
    assert session.error.code == "log_missing"
    await session.commands.go_to(session.tree.root.id, "away again")
    await ready(session)


async def test_a_log_is_replayed_on_another_model(tmp_path: Path, fake_spawn: Spawn, tiny_llama: Path) -> None:
    other = tmp_path / "models" / "other"
    shutil.copytree(tiny_llama, other)
    async with open_studio(tmp_path, fake_spawn) as studio:
        session = await studio.steering.create("Test", {"system_prompt": "Be kind."})
        await choose(session, 1)
        models = [model["id"] for model in await studio.models.list_models()]
        name = next(model for model in models if model != "demo")
        job = await studio.retraining.replay_on_model(session.id, name, request="r1")
        result = await done(job)
        assert result["session"] != session.id
        new = await studio.steering.session(result["session"])
        state = await ready(new)
        assert state["config"]["model"] == name
        assert state["config"]["system_prompt"] == "Be kind."
        assert state["head"]["node"] == result["node"]
        lessons = await new.requests.lessons(new.tree.path(result["node"]))
        assert [lesson.choice for lesson in lessons] == [1]
        assert all(option.tokens == () and option.text for option in lessons[0].options)
        assert [each["id"] for each in await studio.retraining.list_jobs(session.id)] == [job.id]
        assert [each["id"] for each in await studio.retraining.list_jobs(new.id)] == [job.id]
        again = await studio.retraining.replay_on_model(session.id, name, request="r1")
        assert again.id == job.id


async def test_logs_that_no_node_names_go_when_the_studio_starts(tmp_path: Path, fake_spawn: Spawn) -> None:
    folder = tmp_path / "choices"
    async with open_studio(tmp_path, fake_spawn) as studio:
        first, second = await studio.steering.create("One", {}), await studio.steering.create("Two", {})
        await ready(first)
        await ready(second)
        shared, own = preferences(studio), preferences(studio, 4, "more.jsonl")
        for session, file in ((first, shared), (second, shared), (first, own)):
            await done(await studio.retraining.import_preferences(session.id, file))
        await studio.steering.delete(first.id)
        assert len(list(folder.iterdir())) == 2
    async with open_studio(tmp_path, fake_spawn) as studio:
        (kept,) = (place.name for place in folder.iterdir())
        session = await studio.steering.session(second.id)
        assert [node.choice.fitted for node in session.tree.nodes.values() if isinstance(node.choice, Retraining)] == [
            kept
        ]


async def test_a_session_at_work_on_a_fit_stays_in_memory(studio: Studio, session: Session) -> None:
    job = await studio.retraining.retrain(session.id, epochs=50)
    await until(lambda: job.row["progress"] and job.row["progress"]["stage"] == "fitting")
    assert not session.is_idle
    await studio.jobs.cancel(job.id)
    await until(lambda: session.is_idle)


async def test_undo_from_a_fit_brings_back_what_was_shown(studio: Studio, session: Session) -> None:
    result = await done(await studio.retraining.import_preferences(session.id, preferences(studio)))
    shown = session.state()["offer"]["id"]
    await session.commands.go_to(result["node"], "there")
    await ready(session)
    await session.commands.undo("back")
    assert (await ready(session))["offer"]["id"] == shown


async def test_what_cannot_be_learned_from_is_refused(studio: Studio, session: Session) -> None:
    empty = await studio.steering.create(None, {})
    with pytest.raises(Conflict, match="no choices on this branch"):
        await studio.retraining.retrain(empty.id)
    with pytest.raises(NotFound):
        await studio.retraining.retrain(session.id, "n404")
    with pytest.raises(NotFound):
        await studio.retraining.replay_on_model(session.id, "nope")
    with pytest.raises(Invalid, match="there is no file"):
        await studio.retraining.import_preferences(session.id, "../../etc/passwd")
    for name, content, words in (
        ("odd.txt", b"a\n", "“odd.txt” isn't a supported file type"),
        ("bytes.jsonl", b"\xff\xfe\x00", "cannot be read: it is not UTF-16"),
        ("broken.jsonl", b'{"prompt": "a"}\n{nope\n', "line 2, column 2 is not JSON"),
        ("header.csv", b"prompt,chosen,rejected\n", "is empty"),
        ("wide.csv", b"prompt,chosen,rejected\nWhy, you?,A,B\n", "line 2 has 4 cells, and the header has 3"),
        ("torn.parquet", b"PAR1", "not a whole Parquet file"),
    ):
        (prompts_folder(studio) / name).write_bytes(content)
        with pytest.raises(Invalid) as raised:
            await studio.retraining.import_preferences(session.id, name)
        assert words in raised.value.message
        assert raised.value.message.startswith("file: ")
        assert raised.value.field == "file"
        assert raised.value.next_step
    assert len(session.tree.nodes) == 5


async def test_a_fit_can_be_cancelled_and_leaves_nothing(studio: Studio, session: Session) -> None:
    job = await studio.retraining.retrain(session.id, epochs=50)
    await until(lambda: job.row["progress"] and job.row["progress"]["stage"] == "fitting")
    await studio.jobs.cancel(job.id)
    assert job.row["state"] == "cancelled"
    assert len(session.tree.nodes) == 5


async def test_a_person_does_not_wait_for_a_fit(studio: Studio, session: Session) -> None:
    job = await studio.retraining.retrain(session.id, epochs=50)
    await until(lambda: job.row["progress"] and job.row["progress"]["stage"] == "fitting")
    await choose(session, 0)
    assert job.row["state"] == "running"
    await studio.jobs.cancel(job.id)


async def test_the_engine_is_asked_for_whole_logs_in_the_sessions_own_words(tmp_path: Path) -> None:
    asked: list[Any] = []

    class Listening(FakeEngine):
        def retrain(self, request: Retrain) -> Any:
            asked.append([json.loads(line) for line in (Path(request.path) / LOG_FILE).read_text().splitlines()])
            return super().retrain(request)

        def learn(self, request: Learn) -> Any:
            asked.append(request)
            return super().learn(request)

    blobs = Blobs(tmp_path / "weights")
    async with open_studio(tmp_path, thread_spawner(lambda: Listening(blobs))) as studio:
        session = await studio.steering.create(
            "Test", {"system_prompt": "Be kind.", "prompt_prefix": "Q: ", "chat_template": False}
        )
        await ready(session)
        rows = [
            {"prompt": [{"role": "system", "content": "Be rude."}, {"role": "user", "content": "Why?"}],
             "chosen": "A", "rejected": "B"},
            {"prompt": "How?", "chosen": "A", "rejected": "B"},
        ]  # fmt: skip
        file = prompts_folder(studio) / "likes.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        await done(await studio.retraining.import_preferences(session.id, "likes.jsonl"))
    (lessons,) = asked
    assert [lesson["prompt"] for lesson in lessons] == [
        {"text": "Q: Why?", "system": "Be rude.", "template": False, "opening": "", "template_kwargs": {}},
        {"text": "Q: How?", "system": "Be kind.", "template": False, "opening": "", "template_kwargs": {}},
    ]


async def test_the_page_says_how_many_of_the_last_choices_the_model_agrees_with(
    studio: Studio, session: Session
) -> None:
    await session.commands.undo("from the skip")
    await until(lambda: session.tree.head.metrics and session.tree.head.metrics.agreed is not None)
    assert session.tree.head.metrics
    assert (session.tree.head.metrics.agreed, session.tree.head.metrics.agreed_of) == (3, 3)
    assert session.current_metrics()["agreed"] == 3


async def test_a_figure_that_cannot_be_had_stops_nothing(tmp_path: Path) -> None:
    class Unsure(FakeEngine):
        def assess(self, request: Any) -> Any:
            yield None
            raise TrellisError("No.", code="no", next_step="None.")

    blobs = Blobs(tmp_path / "weights")
    async with open_studio(tmp_path, thread_spawner(lambda: Unsure(blobs))) as studio:
        session = await studio.steering.create("Test", {})
        await choose(session, 1)
        state = await choose(session, 1)
        assert state["head"]["step"] == 2
        await until(lambda: session.tree.head_id in session._background._failed_assessments)
        assert session.status == "ready"
        assert session.current_metrics()["agreed"] is None


def lesson(text: str, choice: Choice) -> Lesson:
    option = Option(text=text, tokens=(1, 2), finish="length", logprob=-3.0)
    return Lesson(prompt=Prompt(text="Why?"), options=(option, option), choice=choice, temperature=1.0)


def test_a_log_is_named_by_its_content_and_read_by_number(tmp_path: Path) -> None:
    logs = ChoiceLogs(tmp_path)
    lessons, teaching = move_refusals_last([lesson("a", "none"), lesson("b", 0), lesson("c", 1)])
    assert (teaching, [each.options[0].text for each in lessons]) == (2, ["b", "c", "a"])
    log = logs.write(lessons)
    assert logs.write(lessons) == log != logs.write(lessons[::-1])
    assert [each.options[0].text for each in logs.read(log, [2, 0])] == ["a", "b"]
    with pytest.raises(Conflict, match="no longer exists on disk"):
        logs.read(log, [3])
    logs.discard(log)
    with pytest.raises(Conflict, match="no longer exists on disk"):
        logs.read(log, [0])
    words = without_tokens(lessons[0]).options[0]
    assert (words.text, words.tokens, words.finish) == ("b", (), "length")
