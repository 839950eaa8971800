"""Rooms over a real database and the fake engine: what is said, how it is answered, and what survives."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import open_studio, ready, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import Conflict, Invalid, NotFound, TrellisError
from trellis.messages import Written
from trellis.store import rooms as rows
from trellis.studio.chat.answer_tasks import text_with_files
from trellis.studio.chat.exports import export_room
from trellis.studio.chat.imports import import_rooms
from trellis.studio.chat.message import Message
from trellis.studio.chat.room import MAX_TITLE_LENGTH, Room, make_title
from trellis.studio.chat.room_state import UNRESUMABLE_ERRORS
from trellis.studio.studio import Studio
from trellis.workers.processes import ProcessSpawner
from trellis.workers.worker import Spawn

pytestmark = pytest.mark.anyio

LONG = "say 400 words at 200 a second"


async def quiet(room: Room) -> list[Message]:
    """The branch once nothing grows."""
    await until(lambda: not room.as_json()["growing"])
    return room.path(room.head)


async def said(studio: Studio, *texts: str, **about: Any) -> Room:
    room = await studio.rooms.create(**about)
    for number, text in enumerate(texts):
        await room.send(text, f"request-{number}")
        await quiet(room)
    return room


async def test_what_is_said_is_answered_and_kept(studio: Studio) -> None:
    room = await said(studio, "Hello there.", "And then?")
    first, answer, second, last = await quiet(room)
    assert [each.role for each in (first, answer, second, last)] == ["user", "assistant", "user", "assistant"]
    assert answer.text
    assert answer.state == "done"
    assert answer.usage
    assert answer.usage["completion_tokens"] > 0
    assert answer.usage["time_to_first_token_ms"] > 0
    assert last.usage
    assert last.usage["prompt_tokens"] > answer.usage["prompt_tokens"], "the second is read with the first"
    row, messages = await studio.store.read(rows.get_room, room.id) or ({}, [])
    assert [each["text"] for each in messages] == [first.text, answer.text, second.text, last.text]
    assert row["title"] == "Hello there."


async def test_the_same_request_is_said_once(studio: Studio) -> None:
    room = await studio.rooms.create()
    one, other = await asyncio.gather(room.send("Hello.", "same-request"), room.send("Hello.", "same-request"))
    assert one is other
    assert len(await quiet(room)) == 2


async def test_rooms_can_be_made_twice_with_one_request(studio: Studio) -> None:
    one = await studio.rooms.create(request="the same")
    assert (await studio.rooms.create(request="the same")).id == one.id


async def test_editing_and_asking_again_keep_what_was_said(studio: Studio) -> None:
    room = await said(studio, "Hello.")
    first, answer = await quiet(room)
    again = await room.regenerate(answer.id, "again-request")
    await quiet(room)
    assert room.head == again.id
    assert [each.id for each in room.children(first.id)] == [answer.id, again.id]
    edited = await room.edit(first.id, "Good evening.", "edit-request")
    path = await quiet(room)
    assert path[0] is edited
    assert {each.text for each in room.children(None)} == {"Hello.", "Good evening."}
    await room.select_branch(answer.id)
    assert [each.id for each in room.path(room.head)] == [first.id, answer.id]
    mended = await room.edit(answer.id, "What it should have said.", "mend-request")
    assert mended.finish == "edited"
    assert room.head == mended.id


async def test_an_answer_can_be_stopped_and_goes_on(studio: Studio) -> None:
    room = await studio.rooms.create()
    await room.send(LONG, "a request")
    answer = room.message(room.head or "")
    await until(lambda: room.growing_answers[answer.id]._length > 20)
    await room.stop()
    assert answer.state == "stopped"
    text = answer.text
    assert 0 < len(text.split()) < 400
    await asyncio.sleep(0.05)
    assert answer.text == text
    await room.continue_answer(answer.id)
    await until(lambda: room.growing_answers[answer.id]._length > len(text) + 20)
    await room.stop()
    assert answer.text.startswith(text)
    assert len(answer.text) > len(text)


async def test_nothing_is_said_while_an_answer_grows(studio: Studio) -> None:
    room = await studio.rooms.create()
    await room.send(LONG, "a request")
    with pytest.raises(Conflict):
        await room.send("More.", "another request")
    await room.stop()
    await room.send("More.", "another request")


async def test_several_answer_side_by_side_and_one_is_gone_on_with(studio: Studio) -> None:
    session = await studio.steering.create("Ivy", {})
    await ready(session)
    room = await studio.rooms.create(models=["demo", "session:Ivy"])
    asked = await room.send("Hello.", "a request")
    await quiet(room)
    one, other = room.children(asked.id)
    assert one.group == other.group is not None
    assert [each.model for each in (one, other)] == ["demo", f"session:{session.id}@{session.tree.head_id}"]
    assert one.text != other.text, "the fake's words depend on the weights"
    await room.select_branch(other.id)
    await room.send("More.", "another request", models=["demo"])
    path = await quiet(room)
    assert path[1] is other


async def test_every_step_of_a_session_can_be_talked_to(studio: Studio) -> None:
    session = await studio.steering.create("Hop", {})
    state = await ready(session)
    await session.commands.choose(state["offer"]["id"], 0, "choose-request")
    await until(lambda: session.tree.head.step == 1)
    await ready(session)
    names = {
        f"session:{session.id}": "Hop", "session:Hop@0": "Hop, Base model", "session:Hop@1": "Hop, step 1",
        f"session:{session.id}@{session.tree.head_id}": "Hop, step 1",
    }  # fmt: skip
    for name, label in names.items():
        assert (await studio.chat_targets.find(name)).label == label
        room = await said(studio, "Hello.", models=[name])
        assert (await quiet(room))[-1].state == "done", name
    for name in ("session:Nobody", "session:Hop@7", "no such model", "session:", "session:Hop@"):
        if name != "session:Hop@":
            with pytest.raises(NotFound):
                await studio.chat_targets.find(name)
    versions = await studio.chat_targets.list_versions(session.id)
    assert [each["head"] for each in versions] == [True, False]


async def test_talking_does_not_move_the_session(studio: Studio) -> None:
    session = await studio.steering.create("Ivy", {})
    before = await ready(session)
    await said(studio, "Hello.", models=["session:Ivy"])
    assert session.state()["head"] == before["head"]
    assert session.state()["offer"] == before["offer"]


async def test_a_restart_shows_what_broke_off_and_goes_on(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        room = await studio.rooms.create()
        await room.send(LONG, "a request")
        answer = room.message(room.head or "")
        await until(lambda: room.growing_answers[answer.id]._length > 20)
    assert answer.state == "interrupted"
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.rooms.room(room.id)
        known = again.message(answer.id)
        assert known.state == "interrupted"
        assert known.text == answer.text != ""
        await again.continue_answer(known.id)
        await until(lambda: again.growing_answers[known.id]._length > len(answer.text))
        await again.stop()
        assert known.text.startswith(answer.text)


async def test_an_answer_is_written_down_as_it_grows(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trellis.studio.chat.answer.SAVE_SECONDS", 0.05)
    room = await studio.rooms.create()
    await room.send(LONG, "a request")
    answer = room.head or ""

    async def stored() -> str:
        _, messages = await studio.store.read(rows.get_room, room.id) or ({}, [])
        return str(next(each["text"] for each in messages if each["id"] == answer))

    await until(lambda: room.growing_answers[answer]._length > 100)
    await asyncio.sleep(0.1)
    assert len(await stored()) > 50
    await studio.store.write(rows.interrupt_messages)
    _, messages = await studio.store.read(rows.get_room, room.id) or ({}, [])
    assert messages[-1]["state"] == "interrupted"
    await room.stop()


async def test_the_death_of_an_engine_in_mid_answer_is_said_and_gone_on_from(tmp_path: Path) -> None:
    spawn = ProcessSpawner(tmp_path / "weights", tmp_path / "logs", fake=True)
    async with open_studio(tmp_path, spawn) as studio:
        room = await studio.rooms.create()
        await room.send(LONG, "a request")
        answer = room.message(room.head or "")
        await until(lambda: room.growing_answers[answer.id]._length > 20)
        (held,) = studio.models._instances.values()
        assert held.worker is not None
        assert held.worker.pid is not None
        os.kill(held.worker.pid, signal.SIGKILL)
        await quiet(room)
        assert answer.state == "interrupted"
        assert answer.error is not None
        assert answer.error["code"] == "engine_died"
        text = answer.text
        await room.continue_answer(answer.id)
        await until(lambda: room.growing_answers[answer.id]._length > len(text))
        await room.stop()
        assert answer.text.startswith(text)
        assert answer.error is None
    spawn.close()


async def test_a_model_that_is_not_there_is_said(studio: Studio) -> None:
    with pytest.raises(NotFound) as refused:
        await studio.rooms.create(models=["nobody"])
    assert refused.value.field == "model"
    room = await studio.rooms.create()
    for models in (["nobody"], ["demo"] * 2 + ["a", "b", "c", "d"]):
        with pytest.raises(TrellisError):
            await room.send("Hello.", "a request", models=models)
    assert room.messages == {}, "nothing is half said"


@pytest.mark.parametrize("text", ["", "   ", "\n"])
async def test_nothing_is_not_said(studio: Studio, text: str) -> None:
    room = await studio.rooms.create()
    with pytest.raises(Invalid) as refused:
        await room.send(text, "a request")
    assert refused.value.field == "text"


async def test_settings_are_checked_and_kept(studio: Studio) -> None:
    room = await studio.rooms.create()
    await room.update_settings(title="Mine", system="Be brief.", sampling={"temperature": 0.5}, models=["demo"])
    for sampling in ({"temperature": 9}, {"heat": 1}, {"max_new_tokens": 0}):
        with pytest.raises(Invalid) as refused:
            await room.update_settings(sampling=sampling)
        assert (refused.value.field or "").startswith("sampling.")
    await studio.rooms.close()
    studio.rooms._rooms.clear()
    again = await studio.rooms.room(room.id)
    assert (again.title, again.system, again.sampling) == ("Mine", "Be brief.", {"temperature": 0.5})
    assert (await again._answers._turns(Message("m", again.id, None, "assistant", "")))[0].text == "Be brief."


async def test_a_room_of_its_own_name_keeps_it(studio: Studio) -> None:
    room = await said(studio, "Hello.", title="Mine")
    assert room.title == "Mine"


async def test_all_that_was_said_is_found(studio: Studio) -> None:
    one = await said(studio, "Tell me of the Ärger with butterflies.")
    other = await said(studio, "100% of the sea_side")
    await said(studio, "Nothing.", title="Butterflies and bees")
    assert {each["title"] for each in await studio.rooms.search("butterflies")} == {one.title, "Butterflies and bees"}
    assert [each["id"] for each in await studio.rooms.search("ÄRGER butterflies")] == [one.id]
    assert [each["id"] for each in await studio.rooms.search("100% sea_side")] == [other.id]
    assert await studio.rooms.search("%_%") == []
    assert "Ärger" in (await studio.rooms.search("ärger"))[0]["found"]
    await one.update_settings(archived=True)
    assert await studio.rooms.search("ärger") == []
    assert [each["id"] for each in await studio.rooms.search("ärger", archived=True)] == [one.id]


async def test_composed_and_decomposed_letters_are_found_alike(studio: Studio) -> None:
    composed, decomposed = "Zürich caf\u00e9", "Zu\u0308rich cafe\u0301"
    rooms = {(await said(studio, f"{'words before it ' * 30}{text} {number}")).id
             for number, text in enumerate((composed, decomposed))}  # fmt: skip
    for q in (composed, decomposed, composed.upper(), "CAFE\u0301 zürich"):
        found = await studio.rooms.search(q)
        assert {each["id"] for each in found} == rooms, q
        assert all("rich" in each["found"] for each in found)
    old = decomposed.casefold()  # as it was stored before letters were composed
    (room, *_) = rooms
    opened = await studio.rooms.room(room)
    await studio.store.write(rows.update_message, opened.path(opened.head)[0].id, {"folded": old})
    assert room in {each["id"] for each in await studio.rooms.search("zürich")}


async def test_the_place_that_was_found_is_shown_though_folding_makes_text_longer(studio: Studio) -> None:
    await said(studio, "ß" * 500 + " The needle is here.")
    assert "needle" in (await studio.rooms.search("needle"))[0]["found"]


async def test_a_deleted_room_is_gone(studio: Studio) -> None:
    room = await studio.rooms.create()
    await room.send(LONG, "a request")
    await studio.rooms.delete(room.id)
    with pytest.raises(NotFound):
        await studio.rooms.room(room.id)
    assert await studio.rooms.search() == []


async def test_ratings_are_kept(studio: Studio) -> None:
    room = await said(studio, "Hello.")
    asked, answer = await quiet(room)
    await room.rate(answer.id, -1)
    assert answer.rating == -1
    for message, rating in ((asked.id, 1), (answer.id, 2)):
        with pytest.raises(Invalid):
            await room.rate(message, rating)


@pytest.mark.parametrize("format", ["json", "open-webui"])
async def test_a_room_comes_back_as_it_was_taken_away(studio: Studio, format: str) -> None:
    room = await said(studio, "Hello.", "More.")
    await room.regenerate(room.head or "", "again-request")
    await quiet(room)
    (back,) = (await import_rooms(studio.rooms, export_room(room, format).encode())).rooms
    assert back.title == room.title
    assert back.models == room.models

    def tree(of: Room, parent: str | None) -> list[Any]:
        return [[each.role, each.text, each.model, tree(of, each.id)] for each in of.children(parent)]

    assert tree(back, None) == tree(room, None)
    assert [each.text for each in back.path(back.head)] == [each.text for each in room.path(room.head)]


async def test_a_branch_comes_back_from_markdown(studio: Studio) -> None:
    room = await said(studio, "Hello.", "## User\n\nis a heading of mine", system="Be brief.\nVery.")
    (back,) = (await import_rooms(studio.rooms, export_room(room, "markdown").encode())).rooms
    assert back.system == room.system
    assert back.title == room.title
    texts = [each.text for each in room.path(room.head)]
    assert [each.text for each in back.path(back.head)] == [text.replace("## User", "### User") for text in texts]


@pytest.mark.parametrize("body", [
    b"", b"\xff\xfe", b"{", b"[1]", b"{}", b"null", b"no headings", b'{"format": "trellis-room-1", "messages": [{}]}',
    b'{"chat": {"history": {"messages": {"a": {"id": "a", "role": "root"}}}}}', b"[" * 100_000,
    json.dumps({"format": "trellis-room-1", "messages": [
        {"id": "1", "parent": "2", "role": "user", "text": "x"},
        {"id": "2", "parent": "1", "role": "user", "text": "x"},
    ]}).encode(),
    json.dumps({"format": "trellis-room-1", "messages": [{"id": "1", "role": "user", "text": "\ud800"}]}).encode(),
    json.dumps({"format": "trellis-room-1", "messages": [{"id": "1", "role": "user", "text": "a"}] * 2}).encode(),
    b'{"format": "trellis-room-1", "models": ["remote:\\ud800/x"], "messages": []}',
])  # fmt: skip
async def test_what_is_no_room_is_refused_and_makes_none(studio: Studio, body: bytes) -> None:
    with pytest.raises(Invalid) as refused:
        await import_rooms(studio.rooms, body)
    assert refused.value.code == "unreadable"
    assert await studio.rooms.search() == []


async def test_prompts_are_kept_by_name(studio: Studio) -> None:
    await studio.rooms.save_prompt("brief", "Be brief.")
    await studio.rooms.save_prompt("brief", "Be very brief.")
    (kept,) = await studio.rooms.list_prompts()
    assert kept["text"] == "Be very brief."
    await studio.rooms.delete_prompt(kept["id"])
    assert await studio.rooms.list_prompts() == []


def test_files_stand_before_a_message_under_their_names() -> None:
    message = Message("m", "r", None, "user", "What is it?", files=[{"id": "f", "name": "a.md", "kind": "text"}])
    text = text_with_files(message, {"f": "```\ncode\n```"})
    assert text == "a.md:\n````\n```\ncode\n```\n````\n\nWhat is it?"


@given(st.text(max_size=300))
def test_titles_are_short_and_on_one_line(text: str) -> None:
    title = make_title(text)
    assert len(title) <= MAX_TITLE_LENGTH + 1
    assert "\n" not in title


class Reader:
    """What a page does with the events of a room, told in Python: the same rules as static/chat/room.js."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.shown: dict[str, int] = {}
        self.last: int | None = None
        self.gaps = 0

    def take(self, name: str, data: dict[str, Any]) -> bool:
        """Whether the event could be understood; if not, all after the last one must be told again."""
        if name == "message":
            self.texts[data["message"]["id"]] = data["message"]["text"]
            self.shown[data["message"]["id"]] = data["message"]["shown"]
        elif name == "delta":
            have = self.texts.get(data["message"], "")
            if data["at"] > len(have):
                self.gaps += 1
                return False
            if data["at"] + len(data["text"]) > len(have):
                self.texts[data["message"]] = have[: data["at"]] + data["text"]
        elif name == "block":
            if data["shown"] > len(self.texts.get(data["message"], "")):
                self.gaps += 1
                return False
            assert data["shown"] > self.shown[data["message"]] or data["html"] == ""
            self.shown[data["message"]] = max(data["shown"], self.shown[data["message"]])
        self.last = data["seq"]
        return True


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chance=st.integers(0, 2**32).map(random.Random))
async def test_whatever_is_dropped_the_text_on_the_screen_is_the_stored_text(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("drops")
    monkeypatch.setattr("trellis.studio.hub.RING_SIZE", chance.choice([8, 64, 1024]))
    spawn = thread_spawner(lambda: FakeEngine(Blobs(folder / "weights")))
    async with open_studio(folder, spawn) as studio:
        room = await studio.rooms.create()
        readers = [Reader() for _ in range(3)]
        texts = ["say 40 words at 900 a second", "say 25 words at 700 a second"]

        async def follow(reader: Reader) -> None:
            while True:
                left = chance.randint(1, 40)
                async for event in studio.rooms.events(room, reader.last or room._first_event_number):
                    if event.name == "snapshot":
                        found, seq = await room.rendered_messages(list(room.messages.values()))
                        for message in found:
                            reader.take("message", {"message": message, "seq": seq})
                        reader.last = seq
                    elif not reader.take(event.name, event.data):
                        break
                    left -= 1
                    if left == 0:
                        break
                await asyncio.sleep(chance.random() * 0.02)

        following = [asyncio.create_task(follow(reader)) for reader in readers]
        for number, text in enumerate(texts):
            await room.send(text, f"request-{number}")
            if chance.random() < 0.5:
                await asyncio.sleep(0.01)
                await room.stop()
                await room.continue_answer(room.head or "")
            await quiet(room)
        stored = {each.id: each.text for each in room.messages.values()}
        done = lambda: all(reader.texts == stored for reader in readers)  # noqa: E731
        await until(done)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)


async def test_events_are_numbered_on_over_a_restart(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        room = await said(studio, "Hello.")
        last = room.last_event_number
    async with open_studio(tmp_path, fake_spawn) as studio:
        again = await studio.rooms.room(room.id)
        assert again.last_event_number >= last
        async for event in studio.rooms.events(again, last):
            assert event.name == "snapshot", "what was told before the restart is not known any more"
            break


async def test_rooms_that_nobody_looks_at_leave_memory(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    room = await said(studio, "Hello.")
    monkeypatch.setattr("trellis.studio.chat.rooms.IDLE_SECONDS", -1.0)
    other = await studio.rooms.create()
    assert room.is_closed
    assert not other.is_closed
    assert (await studio.rooms.room(room.id)).title == "Hello."


async def test_an_error_that_nobody_knows_is_said_and_logged(
    studio: Studio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room = await studio.rooms.create()

    def fail(*arguments: Any) -> Any:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr("trellis.studio.chat.answer_tasks.parse_sampling", fail)
        await room.send("Hello.", "a request")
        await quiet(room)
    answer = room.message(room.head or "")
    assert answer.state == "failed"
    assert answer.error is not None
    assert answer.error["code"] == "internal"
    assert "ZeroDivisionError" in caplog.text
    assert re.findall(r"Error ID (\w+)", answer.error["next_step"])[0] in caplog.text
    await room.regenerate(answer.id, "again-request")
    assert (await quiet(room))[-1].state == "done"


async def test_a_session_learns_from_what_was_said_of_answers(studio: Studio) -> None:
    session = await studio.steering.create("Ivy", {})
    await ready(session)
    room = await said(studio, "Hello.")
    asked, answer = await quiet(room)
    with pytest.raises(Conflict):
        studio.rooms.choice_from_answer(room, answer.id)
    with pytest.raises(Conflict):
        studio.rooms.choice_from_answer(room, asked.id)
    await room.rate(answer.id, 1)
    prompt, options, choice = studio.rooms.choice_from_answer(room, answer.id)
    assert (prompt, options, choice) == ("Hello.", (), Written(written=answer.text))
    other = await room.regenerate(answer.id, "again-request")
    await quiet(room)
    prompt, options, choice = studio.rooms.choice_from_answer(room, other.id)
    assert [option.text for option in options] == [other.text, answer.text]
    assert choice == 0
    await room.rate(other.id, -1)
    assert studio.rooms.choice_from_answer(room, other.id)[1:] == ((options[0],), "none")
    job = await studio.retraining.learn_from_chat(session.id, prompt, options, 0, "an answer", "teach-request")
    again = await studio.retraining.learn_from_chat(session.id, prompt, options, 0, "an answer", "teach-request")
    assert again.id == job.id
    await until(lambda: job.row["state"] not in ("queued", "running"))
    assert job.row["state"] == "done", job.row
    grown = [node for node in session.tree.nodes.values() if node.step == 1]
    assert len(grown) == 1
    await room.send("More.", "more-request")
    last = (await quiet(room))[-1]
    with pytest.raises(Conflict) as refused:
        studio.rooms.choice_from_answer(room, last.id)
    assert refused.value.code == "not_a_prompt"


async def test_what_is_said_while_a_room_is_deleted_leaves_nothing_behind(studio: Studio) -> None:
    room = await studio.rooms.create()
    sent, _ = await asyncio.gather(
        room.send(LONG, "a request"), studio.rooms.delete(room.id), return_exceptions=True
    )  # fmt: skip
    assert isinstance(sent, Message | Conflict)
    assert room.as_json()["growing"] == []
    assert room.topic not in studio.hub._topics
    for late in (room.send("x", "late 1"), room.regenerate("m", "late 2"), room.edit("m", "x", "late 3")):
        with pytest.raises(Conflict):
            await late


async def test_stop_waits_until_all_is_written_down(studio: Studio) -> None:
    room = await studio.rooms.create()
    for number in range(8):
        await room.send("say 6 words at 300 a second", f"request-{number}")
        await asyncio.sleep(0.003 * number)
        await room.stop()
        assert room.as_json()["growing"] == []
        answer = room.message(room.head or "")
        assert answer.state in ("done", "stopped")
        _, messages = await studio.store.read(rows.get_room, room.id) or ({}, [])
        assert messages[-1]["state"] == answer.state


async def test_a_block_that_is_being_drawn_when_it_is_stopped_is_drawn_all_the_same(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = await studio.rooms.create()
    monkeypatch.setattr("trellis.studio.chat.answer.INLINE_RENDER_LIMIT", 0)
    await room.send(LONG, "a request")
    answering = room.growing_answers[room.head or ""]
    await until(lambda: answering._length > 20)
    answering._pending_blocks += ["First.\n\n", "Second.\n\n"]
    await room.stop()
    answer = room.message(room.head or "")
    assert answer.html is not None
    assert answer.html.index("First.") < answer.html.index("Second.")


async def test_the_same_room_is_made_once_however_it_is_asked_for(studio: Studio) -> None:
    made = await asyncio.gather(*(studio.rooms.create(request="the same request") for _ in range(5)))
    assert len({room.id for room in made}) == 1


async def test_dates_far_away_are_not_taken(studio: Studio) -> None:
    far = [{"id": "1", "role": "user", "text": "x", "created": "9999-12-31T23:59:59-12:00"}]
    body = {"format": "trellis-room-1", "title": "a", "messages": far}
    (room,) = (await import_rooms(studio.rooms, json.dumps(body).encode())).rooms
    (message,), _ = await room.rendered_messages(list(room.messages.values()))
    assert message["created"].startswith("20")


async def test_a_session_whose_name_has_an_at_in_it_is_found(studio: Studio) -> None:
    session = await studio.steering.create("me@home", {})
    await ready(session)
    for name in ("session:me@home", "session:me@home@0", f"session:{session.id}@0"):
        assert (await studio.chat_targets.find(name)).label.startswith("me@home")


async def test_go_on_is_offered_only_where_it_can_work(studio: Studio) -> None:
    session = await studio.steering.create("Ivy", {})
    await ready(session)
    room = await said(studio, "Hello.", models=["session:Ivy"])
    asked, answer = await quiet(room)
    assert not await room.can_continue(asked)
    assert not await room.can_continue(answer), "it is whole"
    answer.state = "stopped"
    assert await room.can_continue(answer)
    answer.state, answer.error = "failed", {"code": "network"}
    assert await room.can_continue(answer)
    for code in sorted(UNRESUMABLE_ERRORS):
        answer.error = {"code": code}
        assert not await room.can_continue(answer), code
    answer.state, answer.error, answer.finish = "done", None, "length"
    assert await room.can_continue(answer)
    answer.usage = {"context_used": 1024, "context_length": 1024}
    assert not await room.can_continue(answer), "there is no room for more, and nothing to leave out"
    answer.usage = {"context_used": 900, "context_length": 1024}
    assert await room.can_continue(answer)
    await studio.steering.delete(session.id)
    assert not await room.can_continue(answer), "who would go on is gone"
    await room.update_settings(models=["demo"])
    again = await room.regenerate(answer.id, "again-request")
    assert again.model == "demo", "but whom the room has chosen can answer"
    await quiet(room)


async def test_a_message_that_is_too_long_is_refused_with_what_to_do(studio: Studio) -> None:
    room = await said(studio, "Hello.")
    (asked, _) = await quiet(room)
    for action in (room.send("x" * 100_001, "a request"), room.edit(asked.id, "x" * 100_001, "another request")):
        with pytest.raises(Invalid) as refused:
            await action
        assert "100,001" in refused.value.message
        assert "file" in refused.value.next_step
    assert len(room.messages) == 2


async def test_steps_are_named_and_the_newest_is_not_where_the_session_stands(studio: Studio) -> None:
    session = await studio.steering.create("Hop", {})
    state = await ready(session)
    await session.commands.choose(state["offer"]["id"], 0, "choose-request")
    await until(lambda: session.tree.head.step == 1)
    await ready(session)
    session.nodes._labels[session.tree.head_id] = "  "
    await session.commands.undo("undo-request")
    await until(lambda: session.tree.head.step == 0)
    versions = await studio.chat_targets.list_versions(session.id)
    assert [each["label"] for each in versions] == ["Hop, step 1", "Hop, Base model"]
    assert [(each["newest"], each["head"]) for each in versions] == [(True, False), (False, True)]
