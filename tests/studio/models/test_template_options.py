"""What a session asks of its model's chat template: whether to think, and a template that works at all."""

from __future__ import annotations

import html
import json
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import open_studio, thread_spawner, until
from trellis.blobs import Blobs
from trellis.engine.fake import FakeEngine
from trellis.errors import Invalid
from trellis.messages import Chat, Learn, Loaded, Offer, Prompt, PromptRead, TextDelta, Turn, recipe_of
from trellis.params import ModelOptions, Sampling, SessionConfig
from trellis.settings import Settings
from trellis.studio.chat.answer import GrowingAnswer
from trellis.studio.chat.message import Message
from trellis.studio.models.template_options import (
    may_have_thinking_switch,
    read_chat_templates,
    template_error,
    thinking_kwargs,
)
from trellis.studio.studio import Studio
from trellis.web.app import create_app

pytestmark = pytest.mark.anyio

DEMO = Path(__file__).parents[3] / "src" / "trellis" / "demo" / "text" / "model"
QWEN = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>{% endif %}"


def engine_with(tmp_path: Path, asked: list[Any], **about: Any) -> Any:
    """A fake engine whose model's chat template is as told; what it is asked to draw and learn is noted."""

    class Engine(FakeEngine):
        def load(self, request: Any) -> Any:
            loaded: Loaded = yield from super().load(request)
            return loaded.model_copy(update=about)

        def offer(self, request: Offer) -> Any:
            asked.append(request)
            return super().offer(request)

        def learn(self, request: Learn) -> Any:
            asked.append(request)
            return super().learn(request)

        def _require_can_chat(self, request: Chat) -> None:
            asked.append(request)
            super()._require_can_chat(request)

    return thread_spawner(lambda: Engine(Blobs(tmp_path / "weights")))


def thinker(tmp_path: Path, template: str = QWEN) -> str:
    """A model whose template has a switch. Returns its name."""
    folder = tmp_path / "models" / "thinker"
    shutil.copytree(DEMO, folder)
    (folder / "chat_template.jinja").write_text(template)
    return "thinker"


async def chatted(studio: Studio, model: str, **more: Any) -> None:
    speaker = await studio.chat_targets.find(model)
    request = Chat(turns=(Turn(role="user", text="Hello"),), sampling=Sampling(), seed=0, **more)
    async for _ in speaker.answer(request, "somebody", lambda progress: None):
        pass


@pytest.mark.parametrize(("wanted", "variables"), [("on", True), ("off", False), ("auto", None)])
async def test_whether_to_think_goes_with_every_prompt_and_every_chat(
    tmp_path: Path, wanted: str, variables: bool | None
) -> None:
    asked: list[Any] = []
    async with open_studio(tmp_path, engine_with(tmp_path, asked, can_switch_thinking=True)) as studio:
        model = thinker(tmp_path)
        session = await studio.steering.create("Test", {"model": model, "enable_thinking": wanted})
        await until(lambda: session.status == "ready" and len(asked) >= 2)
        assert session.offer
        await session.choose(session.offer.id, 0, "r1")
        await until(lambda: session.status == "ready" and any(isinstance(each, Learn) for each in asked))
        expected = {} if variables is None else {"enable_thinking": variables}
        prompts = [each.lesson.prompt if isinstance(each, Learn) else each.prompt for each in asked]
        assert all(prompt.template_kwargs == expected for prompt in prompts)
        asked.clear()
        await chatted(studio, f"session:{session.id}")
        await chatted(studio, f"session:{session.id}", template_kwargs={"enable_thinking": True, "mood": "glad"})
        await chatted(studio, model)
        chats = [each.template_kwargs for each in asked if isinstance(each, Chat)]
        assert chats == [expected, {"enable_thinking": True, "mood": "glad"}, {}]


async def test_a_session_without_the_chat_template_is_talked_to_without_it(tmp_path: Path) -> None:
    asked: list[Any] = []
    async with open_studio(tmp_path, engine_with(tmp_path, asked, template_problem="it fails.")) as studio:
        session = await studio.steering.create("Test", {"chat_template": False})
        await until(lambda: session.status == "ready")
        await chatted(studio, f"session:{session.id}")
        await chatted(studio, "demo")
        assert [each.template for each in asked if isinstance(each, Chat)] == [False, True]


async def test_a_switch_that_the_template_does_not_have_is_told_before_anything_is_loaded(
    tmp_path: Path, fake_spawn: Any
) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        config = {"enable_thinking": "off"}
        found = await studio.steering.check_config(config)
        assert [error["field"] for error in found["errors"]] == ["config.enable_thinking"]
        with pytest.raises(Invalid, match="the model “demo” has no switch for it") as raised:
            await studio.steering.create("Test", config)
        assert raised.value.code == "no_thinking_switch"
        assert studio.models.state(ModelOptions()) == "unloaded"
        assert (await studio.steering.check_config({"model": thinker(tmp_path), **config}))["errors"] == []
        assert (await studio.steering.check_config({"enable_thinking": "auto"}))["errors"] == []


async def test_what_only_running_the_template_shows_is_told_when_the_model_is_there(tmp_path: Path) -> None:
    """A template may name the variable and do nothing with it."""
    async with open_studio(tmp_path, engine_with(tmp_path, [])) as studio:
        session = await studio.steering.create("Test", {"model": thinker(tmp_path), "enable_thinking": "on"})
        await until(lambda: session.error is not None)
        assert session.error
        assert session.error.code == "no_thinking_switch"
        found = await studio.steering.check_config({"model": "thinker", "enable_thinking": "on"})
        assert [error["field"] for error in found["errors"]] == ["config.enable_thinking"]


async def test_a_template_that_cannot_be_used_stops_a_session_before_it_begins_and_names_the_option(
    tmp_path: Path,
) -> None:
    asked: list[Any] = []
    async with open_studio(tmp_path, engine_with(tmp_path, asked, template_problem="it fails with “x”.")) as studio:
        session = await studio.steering.create("Test", {})
        await until(lambda: session.error is not None)
        assert session.error
        assert session.error.code == "bad_template"
        assert session.error.message == "The chat template of the model “demo” cannot be used: it fails with “x”."
        assert "“Chat template” off" in session.error.next_step
        assert asked == []
        found = await studio.steering.check_config({})
        assert [error["field"] for error in found["errors"]] == ["config.chat_template"]
        (engine,) = (await studio.models.list_models())[0]["engines"]
        assert engine["template_problem"]["message"] == session.error.message
        transport = httpx.ASGITransport(app=create_app(studio, Settings(save_dir=tmp_path)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            page = (await client.get("/models", headers={"Accept": "text/html"})).text
        card = page[page.index('data-model="demo"') : page.index("</article>")]
        assert session.error.message in card
        assert session.error.next_step in html.unescape(card)
        other = await studio.steering.create("Other", {"chat_template": False})
        await until(lambda: other.status == "ready")


@pytest.mark.parametrize(("written", "text"), [("", "<think>\nHm, the sea"), ("<think>\nHm,", "<think>\nHm, the sea")])
async def test_a_thought_that_the_template_opened_has_its_beginning_in_the_answer(written: str, text: str) -> None:
    class Quiet:
        async def generate_answer(self, message: Message, answer: GrowingAnswer) -> None: ...
        async def save_text(self, message: Message) -> None: ...
        def publish(self, kind: str, **data: Any) -> None: ...

    message = Message(id="m", room="r", parent=None, role="assistant", text=written)
    answering = GrowingAnswer(Quiet(), message)
    await answering.run()
    heard = PromptRead(read=3, prompt_tokens=3, warm=0, left_out=0, context_length=9, in_thought=not written)
    for event in (heard, heard, TextDelta(text=(" the sea" if written else "Hm, the sea"), tokens=3)):
        await answering.handle_event(event)
    await answering.finish()
    assert message.text == text
    assert "<details" in (message.html or "")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"enable_thinking": "on", "chat_template": False}, "config.enable_thinking"),
        ({"enable_thinking": "off", "append_think": True}, "config.enable_thinking"),
        ({"enable_thinking": "maybe"}, "config.enable_thinking"),
    ],
)
def test_options_about_thinking_that_contradict_each_other_are_refused(values: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as raised:
        SessionConfig.parse(values)
    assert [each["field"] for each in raised.value.fields] == [field]


def test_weights_keep_their_names_while_the_option_is_not_used() -> None:
    assert thinking_kwargs(SessionConfig()) == {}
    assert "enable_thinking" not in recipe_of(SessionConfig())
    assert recipe_of(Prompt(text="x", template_kwargs=thinking_kwargs(SessionConfig()))) == {"text": "x", "system": ""}
    assert "enable_thinking" in recipe_of(SessionConfig(enable_thinking="on"))


def test_templates_are_found_wherever_a_folder_has_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not may_have_thinking_switch(tmp_path)
    named = [{"name": "default", "template": "plain"}, {"name": "other", "template": QWEN}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert may_have_thinking_switch(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ reasoning_effort }}"}))
    assert not may_have_thinking_switch(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "one.jinja").write_text("{{ thinking }}")
    assert may_have_thinking_switch(tmp_path)
    assert may_have_thinking_switch(tmp_path / "not here yet"), "what cannot be seen is not refused"


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b'{"chat_template": null}'])
def test_files_that_are_no_configuration_have_no_template(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    os.mkfifo(tmp_path / "chat_template.jinja")
    assert not any("{{" in each for each in read_chat_templates(tmp_path))


def test_nothing_is_asked_of_a_template_that_is_off() -> None:
    loaded = Loaded(
        fingerprint="", parameters=0, architecture="", device="", dtype="", bytes=0, seconds=0, template_problem="x"
    )
    assert template_error(SessionConfig(chat_template=False), loaded) is None
    assert template_error(SessionConfig(), loaded) is not None
