"""`/v1` with the public OpenAI client, as it is: sync and async, streamed and whole, and what it is refused."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

import trellis.demo.text
from tests.conftest import open_studio
from tests.server import Server, new_session
from trellis.errors import EngineDied, LoadFailed, Refused
from trellis.settings import Settings
from trellis.web.app import create_app
from trellis.workers.worker import Spawn

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
    ({"guided_json": {"type": "object"}}, "guided_json"), ({"guided_regex": "a+"}, "guided_regex"),
    ({"stop_token_ids": [1]}, "stop_token_ids"), ({"length_penalty": 2}, "length_penalty"), ({"seeed": 1}, "seeed"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"store": True}, "store"), ({"echo": True}, "echo"),
    ({"ignore_eos": True}, "ignore_eos"), ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"top_k": -2}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"), ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"), ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"tools": [1]}}, "chat_template_kwargs"), ({"top_k": "many"}, "top_k"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": None}}, "chat_template_kwargs"), ({"enable_thinking": False}, "enable_thinking"),
    ({"chat_template_kwargs": {str(n): 1 for n in range(51)}}, "chat_template_kwargs"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
     "messages.1.tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages.0.audio"),
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
            "tools": [], "response_format": {"type": "text"}, "parallel_tool_calls": True, "top_p": 0,
            "tool_choice": "auto", "stop_token_ids": [], "guided_json": None, "unheard_of": None, "store": False,
            "top_k": -1, "repetition_penalty": 1, "min_tokens": 0, "chat_template_kwargs": {}}  # fmt: skip
    taken = client.post("/v1/chat/completions", json=body)
    assert taken.status_code == 200, taken.text
    body["messages"] = [{"role": "user", "content": "x", "name": "me"},
                        {"role": "assistant", "content": "y", "refusal": None, "annotations": [], "tool_calls": [],
                         "reasoning_content": "z"}, *MESSAGES]  # fmt: skip
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_what_belongs_to_conversations_is_refused_for_texts(client: httpx.Client) -> None:
    for name, value in (("chat_template_kwargs", {"a": 1}), ("messages", MESSAGES), ("top_logprobs", 2)):
        refused = client.post("/v1/completions", json={"model": "demo", "prompt": "x", name: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name


def test_neighbouring_seeds_have_no_answer_in_common(api: OpenAI) -> None:
    said: dict[tuple[int, int], str | None] = {}
    for seed in (7, 8, 9):
        answers = api.chat.completions.create(model="demo", messages=MESSAGES, seed=seed, n=3)
        said |= {(seed, choice.index): choice.message.content for choice in answers.choices}
    assert len(set(said.values())) == len(said)
    alone = api.chat.completions.create(model="demo", messages=MESSAGES, seed=8)
    assert alone.choices[0].message.content == said[8, 0], (
        "the first answer is that of the seed, however many are asked"
    )


REFUSED: list[tuple[int, str, dict[str, Any]]] = [
    (400, "GET /v1/models", {"headers": {"host": "evil.example"}}),
    (400, "POST /v1/chat/completions", {"content": b"{"}),
    (400, "POST /v1/completions", {"json": {"model": "demo", "prompt": 5}}),
    (403, "POST /v1/chat/completions", {"headers": {"origin": "http://evil.example"}, "json": {}}),
    (401, "GET /v1/models", {"headers": {"authorization": "Bearer trellis-wrong"}}),
    (404, "GET /v1/nothing", {}),
    (404, "GET /v1", {}),
    (404, "GET /v1/models/org/name", {}),
    (405, "DELETE /v1/models", {}),
    (405, "GET /v1/chat/completions", {}),
    (405, "OPTIONS /v1/models", {}),
    (413, "POST /v1/chat/completions", {"content": b" " * 3_000_000}),
    (413, "POST /v1/chat/completions", {"content": iter([b" " * 100_000] * 30)}),
]


@pytest.mark.parametrize(("status", "call", "about"), REFUSED)
def test_every_error_has_the_shape_of_openai(
    client: httpx.Client, status: int, call: str, about: dict[str, Any]
) -> None:
    method, path = call.split()
    response = client.request(method, path, **about)
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]


@pytest.mark.anyio
async def test_a_bug_and_a_flood_have_the_shape_of_openai(tmp_path: Path, fake_spawn: Spawn) -> None:
    async with open_studio(tmp_path, fake_spawn) as studio:
        app = create_app(studio, Settings(save_dir=tmp_path))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        headers = {"accept": "text/html"}  # which changes nothing here
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            for raised, status, kind in (
                (RuntimeError("secret"), 500, "server_error"),
                (Refused("Too many.", code="too_many_requests", next_step="Wait."), 429, "rate_limit_error"),
                (EngineDied("It died.", next_step="Try again."), 503, "server_error"),
                (LoadFailed("It is torn.", code="corrupt_file", next_step="Copy it."), 400, "invalid_request_error"),
            ):
                studio.chat_targets.find = failing(raised)  # type: ignore[method-assign]
                for path in ("/v1/chat/completions", "/v1/completions"):
                    body = {"model": "demo", "messages": MESSAGES} if "chat" in path else {"model": "demo"}
                    told = await client.post(path, json=body)
                    assert told.status_code == status
                    error = told.json()["error"]
                    assert set(told.json()) == {"error"}
                    assert set(error) == {"message", "type", "param", "code"}
                    assert error["type"] == kind
                    assert "secret" not in told.text


def failing(raised: Exception) -> Any:
    async def find(name: str) -> Any:
        raise raised

    return find


def test_a_session_whose_model_is_gone_is_not_listed(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "gone"
    shutil.copytree(Path(trellis.demo.text.__file__).parent / "model", folder)
    server = Server(tmp_path)
    try:
        with server.client() as client:
            name = new_session(client, model="gone")["name"]
            assert f"session:{name}" in client.get("/v1/models").text
            shutil.rmtree(folder)
            assert f"session:{name}" not in client.get("/v1/models").text
    finally:
        server.stop()


def test_only_what_is_here_is_served_and_listed(tmp_path: Path) -> None:
    models = tmp_path / "save" / "models"
    here = models / "My own model (v2)"
    shutil.copytree(Path(trellis.demo.text.__file__).parent / "model", here)
    for name, files in (
        ("adapter", ["adapter_config.json", "adapter_model.safetensors"]),
        ("gguf", ["a.Q4.gguf"]),
        ("pickle", ["config.json", "pytorch_model.bin"]),
        ("torn", ["config.json", "x.safetensors"]),
    ):
        (models / name).mkdir()
        for file in files:
            (models / name / file).write_text("{" if name == "torn" else "{}")
    (models / "loose.gguf").write_bytes(b"GGUF")
    server = Server(tmp_path / "save", HF_ENDPOINT="http://127.0.0.1:9")
    try:
        with OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as api, server.client() as client:
            assert [model.id for model in api.models.list()] == ["demo", "My own model (v2)"]
            assert api.models.retrieve("My own model (v2)").id == "My own model (v2)"
            answer = api.chat.completions.create(model="My own model (v2)", messages=MESSAGES)
            assert answer.choices[0].message.content
            for name in ("org/name", "meta-llama/Llama-2-7b", "no such folder"):
                with pytest.raises(openai.NotFoundError):
                    api.models.retrieve(name)
                with pytest.raises(openai.NotFoundError) as missing:
                    api.chat.completions.create(model=name, messages=MESSAGES)
                assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError, match="GGUF") as refused:
                api.chat.completions.create(model="gguf", messages=MESSAGES)
            assert refused.value.code == "unsupported_format"
            reasons = {model["id"]: model["problem"] for model in client.get("/api/models").json()}
            assert set(reasons) == {"demo", here.name, "adapter", "gguf", "pickle", "torn", "loose.gguf"}
            assert all(reasons[name] is None for name in ("demo", here.name))
            assert "contains an adapter" in reasons["adapter"]["message"]
            assert "GGUF" in reasons["loose.gguf"]["message"]
            assert "can run code" in reasons["pickle"]["message"]
            page = client.get("/models", headers={"accept": "text/html"}).text
            assert page.count("data-cannot-load=") == 4
            assert "contains an adapter" in page
            assert client.post("/api/models/load", json={"model": "adapter"}).status_code == 422
            assert client.delete("/api/models/loose.gguf").status_code == 204
            assert list(models.glob("*loose*")) + list(models.glob(".deleted*")) == []
    finally:
        server.stop()


# ── Pages of other sites ───────────────────────────────────────────────────────────────────────────

ELSEWHERE = ["https://app.example", "null", "app://obsidian.md", "chrome-extension://abc", "http://localhost:3000"]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("locked"), TRELLIS_PASSWORD="correct horse")
    yield server
    assert server.stop() == 0


@pytest.fixture(params=["without a password", "with a password"])
def keyed(request: pytest.FixtureRequest, server: Server, locked: Server) -> Iterator[tuple[httpx.Client, str]]:
    """A client that knows nothing, and a key, of a server of either kind."""
    chosen = server if request.param == "without a password" else locked
    with chosen.client() as owner, httpx.Client(base_url=chosen.url, timeout=20) as stranger:
        owner.post("/login", data={"password": "correct horse"})
        yield stranger, owner.post("/api/keys", json={"name": "a page"}).json()["key"]


@pytest.mark.parametrize("origin", ELSEWHERE)
def test_a_page_of_another_site_may_ask_with_a_key(keyed: tuple[httpx.Client, str], origin: str) -> None:
    client, key = keyed
    wanted = {"origin": origin, "sec-fetch-site": "cross-site"}
    asked = wanted | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    allowed = client.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in allowed.headers
    assert "authorization" in allowed.headers["access-control-allow-headers"]
    assert "POST" in allowed.headers["access-control-allow-methods"]
    headers = wanted | {"authorization": f"Bearer {key}"}
    body = {"model": "demo", "messages": MESSAGES}
    for response in (client.post("/v1/chat/completions", json=body, headers=headers),
                     client.post("/v1/chat/completions", json=body | {"stream": True}, headers=headers),
                     client.get("/v1/models", headers=headers)):  # fmt: skip
        assert response.status_code == 200, response.text
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers
    wrong = client.post("/v1/chat/completions", json={"model": "nobody"}, headers=headers)
    assert wrong.status_code == 400
    assert wrong.headers["access-control-allow-origin"] == "*", "its errors can be read as well"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_page_of_another_site_gets_nothing_without_a_true_key(keyed: tuple[httpx.Client, str], method: str) -> None:
    client, _ = keyed
    wanted = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    path = "/v1/models" if method == "GET" else "/v1/chat/completions"
    for key in ("anything", "trellis-wrong"):
        refused = client.request(method, path, headers=wanted | {"authorization": f"Bearer {key}"}, json={})
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["access-control-allow-origin"] == "*", "so that the page can say what is wrong"
    for more in ({}, {"authorization": "Basic eDp5"}, {"authorization": "Bearer"}):
        unread = client.request(method, path, headers=wanted | more, json={})
        assert "access-control-allow-origin" not in unread.headers
        assert method == "GET" or unread.status_code == 403


def test_a_cookie_is_no_key_for_another_site(locked: Server) -> None:
    with locked.client() as owner:
        owner.post("/login", data={"password": "correct horse"})
        assert owner.get("/v1/models").status_code == 200
        for origin in ELSEWHERE:
            body = {"model": "demo", "messages": MESSAGES}
            refused = owner.post("/v1/chat/completions", json=body, headers={"origin": origin})
            assert refused.status_code == 403
            assert "access-control-allow-origin" not in refused.headers
            read = owner.get("/v1/models", headers={"origin": origin})
            assert "access-control-allow-origin" not in read.headers


def test_a_key_opens_no_other_path_to_another_site(keyed: tuple[httpx.Client, str]) -> None:
    client, key = keyed
    headers = {"origin": "https://app.example", "authorization": f"Bearer {key}"}
    asked = headers | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    for path in ("/api/keys", "/api/rooms", "/login", "/v1x/models", "/"):
        assert "access-control-allow-origin" not in client.request("OPTIONS", path, headers=asked).headers
        refused = client.post(path, headers=headers)
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers


def test_a_foreign_host_is_refused_before_any_key(keyed: tuple[httpx.Client, str]) -> None:
    client, key = keyed
    headers = {"host": "evil.example", "origin": "http://evil.example", "authorization": f"Bearer {key}",
               "access-control-request-method": "POST"}  # fmt: skip
    for method in ("OPTIONS", "GET", "POST"):
        refused = client.request(method, "/v1/models", headers=headers)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "bad_host"
        assert "access-control-allow-origin" not in refused.headers


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
            assert "".join(each.token for each in choice.logprobs.content) == choice.message.content
            text: Any = api.completions.create(model="demo", prompt="The 🌱 sea", max_tokens=20, seed=1, logprobs=2)
            (written,) = text.choices
            assert "".join(written.logprobs.tokens) == written.text
            for offset, token in zip(written.logprobs.text_offset, written.logprobs.tokens, strict=True):
                assert written.text[offset : offset + len(token)] == token
            offsets: list[int] = []
            for chunk in api.completions.create(
                model="demo", prompt="The 🌱 sea", max_tokens=20, seed=1, logprobs=2, stream=True
            ):
                piece: Any = chunk.choices[0].logprobs
                assert "".join(piece.tokens if piece else []) == chunk.choices[0].text
                offsets += piece.text_offset if piece else []
            assert offsets == written.logprobs.text_offset
            more = {"top_k": 1, "repetition_penalty": 1.2, "min_tokens": 3, "chat_template_kwargs": {"mood": "calm"}}
            likeliest = [
                api.chat.completions.create(model="demo", messages=MESSAGES, seed=seed, max_tokens=8, extra_body=more)
                for seed in (1, 2)
            ]
            assert len({answer.choices[0].message.content for answer in likeliest}) == 1
            first = choice.message.content.split()[0]
            stopped = api.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, stop=[first])
            assert first not in (stopped.choices[0].message.content or "")
            for times in (3000, 350_000):
                with pytest.raises(openai.BadRequestError) as refused:
                    api.chat.completions.create(model="demo", messages=[{"role": "user", "content": "sea " * times}])
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
