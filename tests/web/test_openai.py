"""`/v1` with the public OpenAI client, as it is: sync and async, streamed and whole, and what it is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server import Server, new_session

MESSAGES: Any = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture
def api(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0) as client:
        yield client


def test_a_conversation_is_answered(api: OpenAI) -> None:
    answer = api.chat.completions.create(model="demo", messages=MESSAGES, seed=3)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = api.chat.completions.create(model="demo", messages=MESSAGES, seed=3)
    assert again.choices[0].message.content == choice.message.content


def test_a_stream_is_the_whole_answer_in_pieces(api: OpenAI) -> None:
    whole = api.chat.completions.create(model="demo", messages=MESSAGES, seed=4, n=2)
    stream = api.chat.completions.create(
        model="demo", messages=MESSAGES, seed=4, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, usage, roles = ["", ""], {}, None, []
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            roles += [choice.delta.role] if choice.delta.role else []
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == {0: "stop", 1: "stop"}
    assert roles == ["assistant", "assistant"]
    assert usage
    assert usage == whole.usage


async def _together(server: Server) -> list[str]:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="anything", max_retries=0) as api:

        async def tell(number: int) -> str:
            text = ""
            stream = await api.chat.completions.create(model="demo", messages=MESSAGES, seed=number, stream=True)
            async for chunk in stream:
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            return text

        return await asyncio.gather(*(tell(number) for number in range(8)))


def test_the_asynchronous_client_asks_for_many_at_once(server: Server, api: OpenAI) -> None:
    texts = asyncio.run(_together(server))
    assert all(texts)
    alone = api.chat.completions.create(model="demo", messages=MESSAGES, seed=5)
    assert texts[5] == alone.choices[0].message.content


def test_a_text_is_gone_on_with(api: OpenAI) -> None:
    answer = api.completions.create(model="demo", prompt=["The sea", "Bread"], max_tokens=8, n=2, seed=1, logprobs=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        assert choice.text
        assert choice.logprobs
        assert choice.logprobs.tokens
        assert "".join(choice.logprobs.tokens) == choice.text
    streamed = ""
    for chunk in api.completions.create(model="demo", prompt="The sea", max_tokens=8, seed=1, stream=True):
        streamed += chunk.choices[0].text
    assert streamed == answer.choices[0].text


def test_length_and_log_probabilities(api: OpenAI) -> None:
    answer = api.chat.completions.create(
        model="demo", messages=MESSAGES, max_completion_tokens=2, logprobs=True, top_logprobs=3
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs
    assert choice.logprobs.content
    assert len(choice.logprobs.content) == 2
    assert "".join(each.token for each in choice.logprobs.content) == choice.message.content


def test_parts_and_developer_messages_are_read(api: OpenAI) -> None:
    answer = api.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there."}]},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Go on."},
        ],
    )
    assert answer.usage
    assert answer.usage.prompt_tokens == 7, "the fake counts words"


def test_every_model_and_version_is_there(api: OpenAI, client: httpx.Client) -> None:
    state = new_session(client, group_size=2)
    name = state["name"]
    client.post(f"/api/steering/sessions/{state['id']}/choose", json={"offer": state["offer"]["id"], "choice": 0})
    names = [model.id for model in api.models.list()]
    assert "demo" in names
    assert f"session:{name}" in names
    for model in (f"session:{name}", f"session:{name}@0", f"session:{state['id']}"):
        assert api.models.retrieve(model).id == model
        assert api.chat.completions.create(model=model, messages=MESSAGES).choices[0].message.content


@pytest.mark.parametrize(("asked", "param"), [
    ({"temperature": 9}, "temperature"), ({"n": 0}, "n"), ({"n": 99}, "n"), ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages.0.content"),
    ({"tools": [{"type": "function"}]}, "tools"), ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"stop": ["a"] * 20}, "stop"),
    ({"logit_bias": {"1": 5}}, "logit_bias"), ({"model": ""}, "model"), ({"top_logprobs": 99}, "top_logprobs"),
])  # fmt: skip
def test_what_is_not_here_is_refused_by_its_name(client: httpx.Client, asked: dict[str, Any], param: str) -> None:
    response = client.post("/v1/chat/completions", json={"model": "demo", "messages": MESSAGES} | asked)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0 : len(param.split("."))] == param.split(".")
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"{}", b'{"model": null}', b"[" * 50_000])
def test_a_body_that_is_none_is_an_error_in_the_usual_shape(client: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = client.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_harmless_options_are_taken(client: httpx.Client) -> None:
    body = {"model": "demo", "messages": MESSAGES, "user": "me", "metadata": {"a": "b"}, "presence_penalty": 0,
            "tools": [], "response_format": {"type": "text"}, "parallel_tool_calls": True, "top_p": 0}  # fmt: skip
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_an_unknown_model_is_said_in_the_clients_own_error(api: OpenAI) -> None:
    for model in ("nobody", "session:nobody", "remote:nobody/x"):
        with pytest.raises(openai.NotFoundError) as refused:
            api.chat.completions.create(model=model, messages=MESSAGES)
        assert refused.value.code == "model_not_found"


def test_who_goes_away_in_mid_answer_stops_it(api: OpenAI, client: httpx.Client) -> None:
    long: Any = [{"role": "user", "content": "say 9000 words at 500 a second"}]
    stream = api.chat.completions.create(model="demo", messages=long, stream=True)
    next(iter(stream))
    stream.close()
    assert api.chat.completions.create(model="demo", messages=MESSAGES).choices[0].message.content


def test_too_many_at_once_are_refused(api: OpenAI) -> None:
    long: Any = [{"role": "user", "content": "say 9000 words at 50 a second"}]
    streams = [api.chat.completions.create(model="demo", messages=long, stream=True, n=16) for _ in range(4)]
    with pytest.raises(openai.RateLimitError):
        api.chat.completions.create(model="demo", messages=MESSAGES)
    for stream in streams:
        stream.close()


def test_a_key_opens_v1_and_nothing_else_until_it_is_revoked(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_PASSWORD="correct horse")
    try:
        with server.client() as client:
            client.post("/login", data={"password": "correct horse"})
            made = client.post("/api/keys", json={"name": "a program"}).json()
            listed = client.get("/api/keys").json()
            assert made["key"] not in json.dumps(listed)
            with httpx.Client(base_url=server.url) as program:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer trellis-wrong"}):
                    refused = program.get("/v1/models", headers=headers)
                    assert refused.status_code == 401
                    assert refused.json()["error"]["code"] == "invalid_api_key"
                right = {"authorization": f"Bearer {made['key']}"}
                assert program.get("/v1/models", headers=right).status_code == 200
                for path in ("/api/rooms", "/api/keys", "/api/steering/sessions", "/v1/../api/keys"):
                    assert program.get(path, headers=right).status_code == 401
            with OpenAI(base_url=f"{server.url}/v1", api_key=made["key"], max_retries=0) as api:
                assert api.chat.completions.create(model="demo", messages=MESSAGES).choices
                assert client.get("/api/keys").json()[0]["used"]
                assert client.delete(f"/api/keys/{made['id']}").status_code == 204
                with pytest.raises(openai.AuthenticationError):
                    api.models.list()
        database = (tmp_path / "trellis.db").read_bytes() + (tmp_path / "trellis.db-wal").read_bytes()
        assert made["key"].encode() not in database
    finally:
        server.stop()
    assert made["key"] not in server.output


def test_a_revoked_key_is_refused_where_no_password_is_wanted_too(client: httpx.Client) -> None:
    made = client.post("/api/keys", json={"name": "a program"}).json()
    right = {"authorization": f"Bearer {made['key']}"}
    assert client.get("/v1/models", headers=right).status_code == 200
    client.delete(f"/api/keys/{made['id']}")
    assert client.get("/v1/models", headers=right).status_code == 401
    assert client.delete(f"/api/keys/{made['id']}").status_code == 404


def test_another_site_cannot_ask(client: httpx.Client) -> None:
    response = client.post(
        "/v1/chat/completions", json={"model": "demo", "messages": MESSAGES}, headers={"origin": "http://evil.example"}
    )
    assert response.status_code == 403


@pytest.mark.engine
def test_a_real_model_answers_the_client(tmp_path: Path) -> None:
    server = Server(tmp_path, fake=False)
    try:
        with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=60) as api:
            answer = api.chat.completions.create(
                model="demo", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
            )
            (choice,) = answer.choices
            assert choice.message.content
            assert choice.logprobs
            assert choice.logprobs.content
            assert choice.logprobs.content[0].top_logprobs[0].logprob == choice.logprobs.content[0].logprob
            first = choice.message.content.split()[0]
            stopped = api.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, stop=[first])
            assert first not in (stopped.choices[0].message.content or "")
            with pytest.raises(openai.BadRequestError) as refused:
                api.chat.completions.create(model="demo", messages=[{"role": "user", "content": "sea " * 3000}])
            assert refused.value.code == "context_length_exceeded"
    finally:
        server.stop()


def test_a_hundred_thousand_mistakes_are_told_in_few_words(client: httpx.Client) -> None:
    many = [1] * 100_000
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": "demo", "messages": MESSAGES, "stop": many}),
        ("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": many}]}),
        ("/v1/completions", {"model": "demo", "prompt": [{}] * 100_000}),
        ("/api/rooms", {"sampling": {f"k{number}": 1 for number in range(60_000)}}),
        ("/api/rooms", {f"k{number}": 1 for number in range(60_000)}),
    ]
    for path, body in bodies:
        refused = client.post(path, json=body)
        assert refused.status_code in (400, 422), (path, refused.text)
        assert len(refused.content) < 20_000, path


def test_no_prompt_at_all_is_refused(client: httpx.Client) -> None:
    for stream in (True, False):
        refused = client.post("/v1/completions", json={"model": "demo", "prompt": [], "stream": stream})
        assert refused.status_code == 400
