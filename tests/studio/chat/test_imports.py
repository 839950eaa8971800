"""Conversations of other programs: all that was said is kept or its loss is told, and one bad one spoils no other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid
from trellis.studio.chat.imports import RoomPlan, import_rooms, plan_rooms
from trellis.studio.chat.message import Message
from trellis.studio.studio import Studio

pytestmark = pytest.mark.anyio


def planned(data: Any) -> RoomPlan:
    """The one conversation of a file."""
    (plan,), left_out = plan_rooms(data if isinstance(data, bytes) else json.dumps(data).encode())
    assert left_out == []
    return plan


def branch(plan: RoomPlan) -> list[tuple[str, str]]:
    """What is said on the branch that is looked at."""
    by_id: dict[str | None, Message] = {each.id: each for each in plan.room_arguments["messages"]}
    found, at = [], by_id.get(plan.room_arguments["head"])
    while at:
        found.append((at.role, at.text))
        at = by_id.get(at.parent)
    return found[::-1]


def open_webui(*messages: dict[str, Any], title: str = "A chat") -> dict[str, Any]:
    """A chat as open-webui exports it, each message after the one before."""
    chain = {}
    for place, each in enumerate(messages):
        chain[str(place)] = {"id": str(place), "parentId": str(place - 1) if place else None} | each
    return {"id": "x", "title": title, "chat": {"title": title, "models": ["llama3"],
            "history": {"messages": chain, "currentId": str(len(messages) - 1)}}}  # fmt: skip


ASKED = {"role": "user", "content": "Hello."}
ANSWERED = {"role": "assistant", "content": "Good day.", "model": "llama3"}
TALK = [("user", "Hello."), ("assistant", "Good day.")]


async def test_the_good_ones_of_a_file_are_imported_and_the_bad_named(studio: Studio) -> None:
    bad = open_webui({"role": "user", "content": 7}, title="The bad one")
    far = {"format": "trellis-room-1", "title": "Too warm", "messages": [], "sampling": {"temperature": 99}}
    body = [open_webui(ASKED, ANSWERED, title="First"), bad, far, 5, open_webui(ASKED, title="Last")]
    imported = await import_rooms(studio.rooms, json.dumps(body).encode())
    assert [room.title for room in imported.rooms] == ["First", "Last"]
    assert len(imported.left_out) == 3
    assert imported.left_out[0] == "“The bad one”: message 1 isn't text or a list of parts."
    assert imported.left_out[1].startswith("“Too warm”: ")
    assert "99" in imported.left_out[1]
    assert imported.left_out[2].startswith("“number 4”")
    assert {each["title"] for each in await studio.rooms.search()} == {"First", "Last"}


async def test_a_file_of_bad_ones_alone_is_refused_with_the_first_reason(studio: Studio) -> None:
    bad = [open_webui({"role": "user", "content": 7}, title=f"Bad {number}") for number in range(3)]
    with pytest.raises(Invalid) as refused:
        await import_rooms(studio.rooms, json.dumps(bad).encode())
    assert "“Bad 0”: message 1 isn't text" in refused.value.message
    assert "2 others" in refused.value.message
    assert await studio.rooms.search() == []


@pytest.mark.parametrize(("content", "text"), [
    ("plain", "plain"), (None, ""), ([], ""), (["a", "b"], "a\nb"),
    ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
    ([{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "data:x"}}], "Look:\n[picture]"),
    ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "a"}], "<think>\nHm.\n</think>\n\na"),
    ({"type": "text", "text": "a"}, "a"), ({"content_type": "text", "parts": ["a"]}, "a"),
])  # fmt: skip
def test_content_in_parts_is_joined(content: Any, text: str) -> None:
    plan = planned(open_webui({"role": "user", "content": content}, ANSWERED))
    assert branch(plan) == ([("user", text), TALK[1]] if text else [TALK[1]])


def test_pictures_and_other_parts_are_counted() -> None:
    parts = [{"type": "text", "text": "a"}, *[{"type": "image_url"}] * 2, {"type": "input_audio", "data": "x"}]
    plan = planned(open_webui({"role": "user", "content": parts}, ANSWERED, title="Seen"))
    assert plan.notes == ["“Seen”: 2 pictures and 1 part of the kind “input audio” were left out."]


def test_names_of_files_stay_in_the_text() -> None:
    files = [{"type": "file", "name": "notes.md"}, {"type": "image", "url": "data:x"}]
    plan = planned(open_webui(ASKED | {"files": files}, ANSWERED))
    assert branch(plan)[0] == ("user", "[notes.md]\n\n[a picture]\n\nHello.")
    assert plan.notes == ["“A chat”: 2 files were left out."]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_what_a_system_says_first_becomes_the_system_prompt(role: str) -> None:
    plan = planned(open_webui({"role": role, "content": "Be brief."}, ASKED, ANSWERED))
    assert plan.room_arguments["system"] == "Be brief."
    assert branch(plan) == TALK
    assert plan.notes == []


def test_tools_and_late_system_messages_are_told_and_what_stands_around_them_is_joined() -> None:
    plan = planned(open_webui(
        ASKED, {"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Let me see."}, {"role": "tool", "content": "43"}, ANSWERED,
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "More."}, title="Tools",
    ))  # fmt: skip
    assert branch(plan) == [("user", "Hello."), ("assistant", "Let me see.\n\nGood day."), ("user", "More.")]
    assert plan.notes == [
        "“Tools”: 2 messages of the role “tool” and 1 message of the role “system” were left out."
    ]  # fmt: skip


def test_branches_behind_what_was_left_out_stay_branches() -> None:
    data = open_webui(ASKED, ANSWERED, {"role": "tool", "content": "a"})
    messages = data["chat"]["history"]["messages"]
    for name in ("3", "4"):
        messages[name] = {"id": name, "parentId": "2", "role": "assistant", "content": f"Answer {name}."}
    plan = planned(data)
    texts = {each.text: each for each in plan.room_arguments["messages"]}
    assert set(texts) == {"Hello.", "Good day.", "Answer 3.", "Answer 4."}
    assert texts["Answer 3."].parent == texts["Answer 4."].parent == texts["Good day."].id


def test_chatgpt() -> None:
    def node(name: str, parent: str | None, message: Any) -> dict[str, Any]:
        return {"id": name, "parent": parent, "children": [], "message": message}

    def said(role: str, *parts: Any, kind: str = "text", **more: Any) -> dict[str, Any]:
        return {"author": {"role": role}, "content": {"content_type": kind, "parts": list(parts)},
                "recipient": "all", "metadata": {}, "create_time": 1_700_000_000.5} | more  # fmt: skip

    hidden = {"metadata": {"is_visually_hidden_from_conversation": True}}
    thoughts = {"content": {"content_type": "thoughts", "thoughts": [{"summary": "Looking", "content": "Hm."}]}}
    code = {"content": {"content_type": "code", "text": "search('sea')"}, "recipient": "browser"}
    result = {"content": {"content_type": "execution_output", "text": "found it"}}
    mapping = [
        node("root", None, None), node("s", "root", said("system", "", **hidden)),
        node("c", "s", said("user", kind="user_editable_context", **hidden)),
        node("u", "c", said("user", {"content_type": "image_asset_pointer", "asset_pointer": "f"}, "What is it?",
                            kind="multimodal_text", metadata={"attachments": [{"name": "sea.png"}]})),
        node("t", "u", said("assistant", **thoughts)), node("k", "t", said("assistant", **code)),
        node("r", "k", said("tool", **result)),
        node("a", "r", said("assistant", "The sea.", metadata={"model_slug": "gpt-4o"})),
        node("b", "u", said("assistant", "A lake.")),
    ]  # fmt: skip
    plan = planned([{"title": "Sea", "mapping": {each["id"]: each for each in mapping}, "current_node": "a",
                     "default_model_slug": "gpt-4o"}])  # fmt: skip
    assert branch(plan) == [
        ("user", "[sea.png]\n\n[picture]\nWhat is it?"),
        ("assistant", "<think>\nHm.\n</think>\n\n\n\nThe sea."),
    ]
    assert {each.text for each in plan.room_arguments["messages"]} > {"A lake."}
    assert plan.models == ["gpt-4o"]
    assert plan.notes == [
        "“Sea”: 1 picture, 1 file, 1 message of the role “tool call” and 1 message of the role “tool” were left out."
    ]
    assert plan.room_arguments["messages"][0].created == pytest.approx(1_700_000_000.5)


def test_claude() -> None:
    messages = [
        {"uuid": "1", "sender": "human", "text": "Hello.", "content": [{"type": "text", "text": "Hello."}],
         "created_at": "2025-01-01T00:00:00Z", "attachments": [{"file_name": "a.txt", "extracted_content": "x"}]},
        {"uuid": "2", "sender": "assistant", "text": "Good day.", "content": [{"type": "text", "text": "Good day."}]},
    ]  # fmt: skip
    plan = planned([{"uuid": "c", "name": "A talk", "chat_messages": messages}])
    assert branch(plan) == [("user", "[a.txt]\n\nHello."), TALK[1]]
    assert plan.room_arguments["title"] == "A talk"


def test_lm_studio() -> None:
    answer = {"type": "multiStep", "role": "assistant", "senderInfo": {"senderName": "qwen3"}, "steps": [
        {"type": "contentBlock", "style": {"type": "thinking"}, "content": [{"type": "text", "text": "Hm."}]},
        {"type": "debugInfoBlock", "debugInfo": "x"},
        {"type": "contentBlock", "content": [{"type": "text", "text": "Good day."}]},
    ]}  # fmt: skip
    other = {"type": "singleStep", "role": "assistant", "content": [{"type": "text", "text": "Hi."}]}
    question = {"type": "singleStep", "role": "user", "content": [{"type": "text", "text": "Hello."}]}
    plan = planned({"name": "Local", "systemPrompt": "Be brief.", "messages": [
        {"versions": [question], "currentlySelected": 0}, {"versions": [other, answer], "currentlySelected": 1},
    ]})  # fmt: skip
    assert branch(plan) == [TALK[0], ("assistant", "<think>\nHm.\n</think>\n\nGood day.")]
    assert len(plan.room_arguments["messages"]) == 3
    assert plan.room_arguments["system"] == "Be brief."


@pytest.mark.parametrize("data", [
    {"messages": [ASKED, ANSWERED]}, [ASKED, ANSWERED], {"conversations": [{"messages": [ASKED, ANSWERED]}]},
    {"chat": {"messages": [ASKED, ANSWERED]}}, {"data": [open_webui(ASKED, ANSWERED)]},
    {"conversations": [{"messages": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Good day."}]}]},
])  # fmt: skip
def test_plain_messages(data: Any) -> None:
    assert branch(planned(data)) == TALK


def test_json_lines_utf_16_and_archives() -> None:
    line = json.dumps(open_webui(ASKED, ANSWERED))
    plans, left_out = plan_rooms(f"{line}\n{{broken}}\n{line}\n".encode())
    assert len(plans) == 2
    assert left_out[0].startswith("“line 2”: it isn't valid JSON")
    assert branch(planned(line.encode("utf-16"))) == TALK
    with pytest.raises(Invalid, match="unpack it"):
        plan_rooms(b"PK\x03\x04rest")


def test_a_role_that_nobody_has_is_told_in_our_own_format_too() -> None:
    messages = [{"id": "1", "role": "tool", "text": "x"}]
    with pytest.raises(Invalid, match="message 1 has a role other than"):
        plan_rooms(json.dumps({"format": "trellis-room-1", "messages": messages}).encode())


def test_a_long_system_prompt_is_cut_and_that_is_told() -> None:
    plan = planned({"messages": [{"role": "system", "content": "x" * 20_005}, ASKED], "title": "Long"})
    assert len(plan.room_arguments["system"]) == 20_000
    assert plan.notes == ["“Long”: 5 characters of the system prompt were left out."]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "parts", "type", "text", "id", "parentId", "chat", "history", "messages",
                         "mapping", "message", "author", "versions", "steps", "chat_messages", "format"]),
        inner, max_size=5,
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_whatever_a_file_holds_is_read_or_refused(data: Any) -> None:
    for each in (data, {"messages": data}, {"chat": {"history": {"messages": data}}}, {"mapping": data},
                 {"format": "trellis-room-1", "messages": data}, {"chat_messages": data}):  # fmt: skip
        try:
            plans, left_out = plan_rooms(json.dumps(each).encode())
        except Invalid as refused:
            assert refused.code == "unreadable"
        else:
            assert plans
            assert all(reason.endswith(".") for reason in left_out)


CHATGPT = {"author": {"role": "user"}, "content": {"parts": ["Hello."]}}
NO_NAMES: dict[str, Any] = {
    "ours": {"format": "trellis-room-1", "messages": [{"id": "a", "parent": {}, "role": "user", "text": "Hello."}]},
    "open-webui": {"chat": {"history": {"messages": {"a": {"id": "a", "parentId": [], **ASKED}}, "currentId": {}}}},
    "ChatGPT": {"mapping": {"a": {"parent": {}, "message": CHATGPT}}, "current_node": []},
    "Claude": {"chat_messages": [{"uuid": "a", "parent_message_uuid": {}, "sender": "human", "text": "Hello."}]},
}


@pytest.mark.parametrize("program", NO_NAMES)
def test_a_parent_that_is_no_name_is_none(program: str) -> None:
    assert branch(planned(NO_NAMES[program])) == [("user", "Hello.")]


def test_an_id_that_is_no_name_is_told() -> None:
    with pytest.raises(Invalid, match="has none"):
        plan_rooms(json.dumps({"chat_messages": [{"uuid": {"a": 1}, "sender": "human", "text": "Hello."}]}).encode())


def test_what_was_left_out_is_told_in_text_that_can_be_sent() -> None:
    """Half of a surrogate pair stands in JSON as an escape, and in no answer of ours."""
    parts = [{"type": "\ud800"}, "Hello."]
    plan = planned({"messages": [{"role": "user", "content": parts}, {"role": "\ud800", "content": "Hm."}]})
    "".join(plan.notes).encode()
    assert "part of the kind “?”" in plan.notes[0]
