"""Models elsewhere: a second real server is talked to, and hostile ones are borne."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server


class Elsewhere:
    """A server that answers everything as a test wants it, and notes what it was asked."""

    def __init__(self) -> None:
        there = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length", 0))
                about = {"path": self.path, "headers": dict(self.headers), "body": self.rfile.read(length)}
                there.asked.append(about)
                status, body = there.decide(about) if there.decide else (there.status, there.body)
                self.send_response(status)
                for name, value in there.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.answers(b"")
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answers(
        self, body: bytes, status: int = 200, decide: Callable[[dict[str, Any]], tuple[int, bytes]] | None = None,
        **headers: str,
    ) -> None:  # fmt: skip
        self.body, self.status, self.headers, self.decide = body, status, headers, decide
        self.asked: list[dict[str, Any]] = []

    def bodies(self) -> list[dict[str, Any]]:
        """The JSON of each request."""
        return [json.loads(each["body"]) for each in self.asked]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def there() -> Iterator[Elsewhere]:
    there = Elsewhere()
    yield there
    there.close()


@pytest.fixture(scope="module")
def here(there: Elsewhere, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A studio that may talk to it."""
    with studio(tmp_path_factory.mktemp("here"), there.address) as (server, client):
        yield client
    assert "the-secret" not in server.output
    assert "Traceback" not in server.output, server.output


@contextmanager
def studio(folder: Path, *own: str) -> Iterator[tuple[Server, httpx.Client]]:
    server = Server(folder, TRELLIS_LOCAL_SERVERS=",".join(own), TRELLIS_RATE_LIMIT="0")
    try:
        with server.client() as client:
            yield server, client
    finally:
        server.stop()


def told(client: httpx.Client, model: str, text: str = "Hello.", **more: Any) -> dict[str, Any]:
    """The answer of a model in a new room."""
    made = client.post("/api/rooms", json={"models": [model]})
    assert made.status_code == 201, made.text
    room = made.json()["id"]
    sent = client.post(f"/api/rooms/{room}/messages", json={"text": text} | more)
    assert sent.status_code == 202, sent.text
    deadline = time.monotonic() + 30
    while (state := client.get(f"/api/rooms/{room}").json())["growing"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    answer: dict[str, Any] = state["messages"][-1]
    return answer


def test_a_second_studio_is_talked_to(tmp_path: Path, server: Server, client: httpx.Client) -> None:
    key = client.post("/api/keys", json={"name": "the other studio"}).json()["key"]
    there = server.url.removeprefix("http://")
    with studio(tmp_path, there) as (other, here):
        added = here.post("/api/remotes", json={"name": "first", "url": f"{server.url}/v1", "key": key})
        assert added.status_code == 201, added.text
        assert "demo" in added.json()["models"]
        names = [each["name"] for each in here.get("/api/rooms/speakers").json()]
        assert "remote:first/demo" in names
        answer = told(here, "remote:first/demo", "say 9 words at 500 a second")
        assert answer["state"] == "done", answer
        assert len(answer["text"].split()) == 9
        assert answer["usage"]["completion_tokens"] == 9
        assert answer["usage"]["prompt_tokens"] == 7
        assert answer["label"] == "demo at first"
        through = here.post("/v1/completions", json={"model": "remote:first/demo", "prompt": "The sea"})
        assert through.json()["choices"][0]["text"]
        seen = here.get("/connections").text + json.dumps(here.get("/api/remotes").json())
        assert key not in seen
        assert here.delete(f"/api/remotes/{added.json()['id']}").status_code == 204
        assert here.post("/api/rooms", json={"models": ["remote:first/demo"]}).status_code == 404
    assert key not in other.output


def test_a_wrong_key_and_a_silent_place_are_said(tmp_path: Path, server: Server) -> None:
    there = server.url.removeprefix("http://")
    with studio(tmp_path, there, "127.0.0.1:1") as (_, client):
        wrong = client.post("/api/remotes", json={"name": "a", "url": f"{server.url}/v1", "key": "trellis-wrong"})
        assert wrong.json()["error"]["code"] == "wrong_key"
        silent = client.post("/api/remotes", json={"name": "a", "url": "http://127.0.0.1:1/v1"})
        assert silent.status_code == 502
        assert silent.json()["error"]["code"] == "network"
        assert "nothing is listening" in silent.json()["error"]["message"]
        not_ours = client.post("/api/remotes", json={"name": "a", "url": f"{server.url}/static"})
        assert not_ours.status_code >= 400


def test_an_address_without_a_path_is_tried_under_v1(tmp_path: Path, server: Server) -> None:
    with studio(tmp_path, server.url.removeprefix("http://")) as (_, client):
        added = client.post("/api/remotes", json={"name": "a", "url": f"{server.url}/"})
        assert added.status_code == 201, added.text
        assert added.json()["url"] == f"{server.url}/v1"


@pytest.mark.parametrize(
    "field", [{"name": "a/b"}, {"name": ""}, {"url": "ftp://x"}, {"key": "a b\n"}, {"models": [""]}]
)
def test_bad_input_is_said(client: httpx.Client, field: dict[str, Any]) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": "https://example.org/v1", "models": ["m"]} | field)
    assert response.status_code == 422
    assert response.json()["error"]["field"].split(".")[0] in field


def test_a_private_address_is_refused_with_the_way_to_allow_it(client: httpx.Client) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": "http://localhost:11434/v1"})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "private_address"
    assert "TRELLIS_LOCAL_SERVERS" in response.json()["error"]["next_step"]


def test_a_redirect_is_not_followed(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b"", 302, Location="http://169.254.169.254/")
    refused = here.post("/api/remotes", json={"name": "a", "url": f"http://{there.address}/v1"})
    assert refused.json()["error"]["code"] == "redirected"
    assert len(there.asked) == 1


STREAMS = [
    (b"data: not json\n\n", "failed"), (b"data: [1, 2]\n\ndata: [DONE]\n\n", "failed"), (b"", "failed"),
    (b'data: {"choices": "x"}\n\ndata: {"choices": [5, {"delta": 7}]}\n\n', "failed"),
    (b'data: {"error": {"message": "out of <b>memory</b>"}}\n\n', "failed"),
    (b'data: {"choices": [{"delta": {"content": "<script>alert(1)</script>"}}], "usage": {"prompt_tokens": "x"}}\n\n'
     b"data: [DONE]\n\n", "done"),
    (b"x" * 3_000_000, "failed"), (b"data: " + b"[" * 20_000 + b"\n\n", "failed"),
    (b'data: {"choices": [{"delta": {"content": ' + b'[{"text": ' * 350 + b'"A"' + b"}]" * 350 + b"}}]}\n\n", "failed"),
    (b'data: {"error": {"message": "half of \\ud800"}}\n\n', "failed"),
]  # fmt: skip


def add(here: httpx.Client, there: Elsewhere, **more: Any) -> None:
    about = {"name": "odd", "url": f"http://{there.address}/v1", "models": ["m"]} | more
    assert here.post("/api/remotes", json=about).status_code == 201


@pytest.mark.parametrize(("answer", "state"), STREAMS)
def test_whatever_a_server_says_is_borne(there: Elsewhere, here: httpx.Client, answer: bytes, state: str) -> None:
    there.answers(answer)
    add(here, there, key="the-secret")
    found = told(here, "remote:odd/m")
    assert found["state"] == state, found
    assert there.asked[-1]["headers"]["authorization"] == "Bearer the-secret"
    assert "<script>" not in found["html"]
    assert here.get("/healthz").status_code == 200


def test_a_secret_that_a_server_says_back_is_not_shown(there: Elsewhere, here: httpx.Client) -> None:
    add(here, there, key="the-secret")
    for said in (b"your key the-secret is bad", b'{"error": {"message": "your key the-\\u0073ecret is bad"}}'):
        there.answers(said, 500)
        found = told(here, "remote:odd/m")
        assert found["state"] == "failed"
        assert "is bad" in json.dumps(found)
        assert "the-secret" not in json.dumps(found)


def test_names_of_models_that_cannot_be_shown_are_left_out(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b'{"data": [{"id": "half \\ud800"}, {"id": "a\\u0000b"}, {"id": "turned \\u202e"}, {"id": "good"}]}')
    added = here.post("/api/remotes", json={"name": "odd", "url": f"http://{there.address}/v1"})
    assert added.status_code == 201, added.text
    assert added.json()["models"] == ["good"]


def test_pictures_go_to_who_sees(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b'data: {"choices": [{"delta": {"content": "A cat."}}]}\n\ndata: [DONE]\n\n')
    add(here, there, name="eyes", sees=True)
    add(here, there, name="blind")
    room = here.post("/api/rooms", json={}).json()["id"]
    picture = b"\x89PNG\r\n\x1a\n" + b"0" * 20
    file = here.post(f"/api/rooms/{room}/files?name=cat.png", content=picture).json()
    assert file["kind"] == "picture"
    for model in ("demo", "remote:blind/m"):
        body = {"text": "What is it?", "attachments": [file["id"]], "models": [model]}
        refused = here.post(f"/api/rooms/{room}/messages", json=body)
        assert refused.status_code == 422
        assert refused.json()["error"]["code"] == "cannot_see"
    body = {"text": "What is it?", "attachments": [file["id"]], "models": ["remote:eyes/m"]}
    assert here.post(f"/api/rooms/{room}/messages", json=body).status_code == 202
    deadline = time.monotonic() + 20
    while here.get(f"/api/rooms/{room}").json()["growing"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    content = json.loads(there.asked[-1]["body"])["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_halves_of_characters_become_whole_and_none_are_left(there: Elsewhere, here: httpx.Client) -> None:
    pieces = ["\\ud83c", "\\udf31 and \\ud83c", " alone", "a\\u0000b"]
    stream = "".join(f'data: {{"choices": [{{"delta": {{"content": "{piece}"}}}}]}}\n\n' for piece in pieces)
    there.answers(stream.encode() + b"data: [DONE]\n\n")
    add(here, there)
    found = told(here, "remote:odd/m")
    assert found["state"] == "done", found
    assert found["text"] == "🌱 and \ufffd aloneab"


def test_a_server_that_does_not_stream_is_understood(there: Elsewhere, here: httpx.Client) -> None:
    answer = {"choices": [{"message": {"content": "All at once."}, "finish_reason": "stop"}],
              "usage": {"prompt_tokens": 3, "completion_tokens": 4}}  # fmt: skip
    there.answers(json.dumps(answer).encode(), **{"Content-Type": "application/json"})
    add(here, there)
    found = told(here, "remote:odd/m")
    assert found["text"] == "All at once."
    assert found["usage"]["prompt_tokens"] == 3


ENDS = {
    "content_filter": ("How to", {"finish_reason": "content_filter"}),
    "model_refused": ("", {"delta": {"refusal": "No."}, "finish_reason": "stop"}),
    "tool_call": ("", {"delta": {"tool_calls": [{"function": {"name": "search"}}]}, "finish_reason": "tool_calls"}),
    "only_thoughts": ("", {"delta": {"reasoning_content": "Hm."}, "finish_reason": "stop"}),
    "incomplete_answer": ("Half an", {"delta": {}}),
    "empty_answer": ("", {"delta": {}, "finish_reason": "stop"}),
}  # fmt: skip


@pytest.mark.parametrize("code", ENDS)
def test_an_odd_end_is_told_and_what_came_stays(there: Elsewhere, here: httpx.Client, code: str) -> None:
    text, end = ENDS[code]
    first = {"choices": [{"delta": {"content": text}}], "error": None}
    there.answers("".join(f"data: {json.dumps(each)}\n\n" for each in (first, {"choices": [end]})).encode())
    add(here, there)
    found = told(here, "remote:odd/m")
    assert (found["state"], found["error"]["code"]) == ("failed", code)
    assert found["text"].startswith(text)


def test_thoughts_are_folded_and_not_sent_back(there: Elsewhere, here: httpx.Client) -> None:
    deltas = [{"reasoning": "Hm. *So*."}, {"content": "An answer."}]
    stream = "".join(f"data: {json.dumps({'choices': [{'delta': each}]})}\n\n" for each in deltas)
    there.answers(f"{stream}data: [DONE]\n\n".encode())
    add(here, there)
    room = here.post("/api/rooms", json={"models": ["remote:odd/m"]}).json()["id"]
    for number in range(2):
        here.post(f"/api/rooms/{room}/messages", json={"text": f"Question {number}."})
        while (state := here.get(f"/api/rooms/{room}").json())["growing"]:
            time.sleep(0.05)
    answer = state["messages"][1]
    assert answer["text"] == "<think>\nHm. *So*.\n</think>\n\nAn answer."
    assert "<details" in answer["html"]
    assert [turn["content"] for turn in there.bodies()[-1]["messages"]] == ["Question 0.", "An answer.", "Question 1."]


GOOD = b'data: {"choices": [{"delta": {"content": "A"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def refuses(*names: str, say: str = "Unsupported parameter: '{}' is not supported with this model.") -> Any:
    """A server that takes none of some options."""

    def decide(about: dict[str, Any]) -> tuple[int, bytes]:
        sent = json.loads(about["body"])
        for name in names:
            if name in sent:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                message = {"message": say.format(name) + hint, "type": "invalid_request_error"}
                return 400, json.dumps({"error": message}).encode()
        return 200, GOOD

    return decide


def test_options_of_sampling_reach_the_server(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(GOOD)
    add(here, there)
    sampling = {"temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "max_new_tokens": 77}
    told(here, "remote:odd/m", sampling=sampling)
    (body,) = there.bodies()
    assert {name: body[name] for name in ("temperature", "top_p", "min_p", "max_tokens")} == {
        "temperature": 0.25, "top_p": 0.5, "min_p": 0.125, "max_tokens": 77,
    }  # fmt: skip
    assert isinstance(body["seed"], int)
    assert not {"top_k", "repetition_penalty", "min_tokens"} & set(body), "what changes nothing is not asked for"


def test_options_of_v1_reach_the_server(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(GOOD)
    add(here, there)
    options = {
        "top_k": 3,
        "repetition_penalty": 1.25,
        "min_tokens": 2,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    said = {"model": "remote:odd/m", "messages": [{"role": "user", "content": "Hello"}], **options}
    answer = here.post("/v1/chat/completions", json=said)
    assert answer.status_code == 200, answer.text
    (body,) = there.bodies()
    assert {name: body[name] for name in options} == options


def test_what_a_model_calls_otherwise_or_can_do_without_is_adapted_once(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b"", decide=refuses("max_tokens", "stream_options", "seed", "min_p"))
    add(here, there, name="new")
    first = told(here, "remote:new/m", sampling={"max_new_tokens": 77})
    assert (first["state"], first["text"]) == ("done", "A"), first
    assert len(there.asked) == 5
    assert there.bodies()[-1]["max_completion_tokens"] == 77
    told(here, "remote:new/m")
    assert len(there.asked) == 6, "it is remembered of this model"
    other = told(here, "remote:new/another")
    assert other["state"] == "done"
    assert "max_tokens" in there.bodies()[6], "and of this model alone"


def test_an_option_that_was_chosen_is_not_left_out_in_silence(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b"", decide=refuses("min_p", say="Unrecognized request argument supplied: {}"))
    add(here, there, name="strict")
    found = told(here, "remote:strict/m", sampling={"min_p": 0.3})
    assert (found["state"], found["error"]["code"]) == ("failed", "option_refused")
    assert "0.3" in found["error"]["message"]
    assert told(here, "remote:strict/m", sampling={"min_p": 0})["text"] == "A"


def test_a_limit_that_is_too_high_is_told_in_the_words_of_the_server(there: Elsewhere, here: httpx.Client) -> None:
    says = "max_tokens is too large: 8000. This model takes 4096 at most."
    there.answers(json.dumps({"error": {"message": says, "param": "max_tokens"}}).encode(), 400)
    add(here, there, name="small")
    found = told(here, "remote:small/m", sampling={"max_new_tokens": 8000})
    assert found["state"] == "failed"
    assert "4096" in found["error"]["message"]
    assert "{" not in found["error"]["message"]


def test_an_answer_that_broke_off_is_gone_on_with(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(b'data: {"choices": [{"delta": {"content": "Half an"}}]}\n\n')
    add(here, there, name="cut")
    found = told(here, "remote:cut/m")
    assert found["error"]["code"] == "incomplete_answer"
    there.answers(b'data: {"choices": [{"delta": {"content": " answer."}, "finish_reason": "stop"}]}\n\n')
    rooms = here.get("/api/rooms").json()
    page = here.get(f"/chat/{rooms[0]['id']}").text
    assert "Continue" in page
    here.post(f"/chat/{rooms[0]['id']}/go-on", data={"message": found["id"]})
    while (state := here.get(f"/api/rooms/{rooms[0]['id']}").json())["growing"]:
        time.sleep(0.05)
    assert (state["messages"][-1]["text"], state["messages"][-1]["state"]) == ("Half an answer.", "done")
    (body,) = there.bodies()
    assert body["messages"][-1] == {"role": "assistant", "content": "Half an"}
    assert body["continue_final_message"] is True


def test_logprobs_of_a_model_elsewhere_are_refused(there: Elsewhere, here: httpx.Client) -> None:
    there.answers(GOOD)
    add(here, there)
    asked = {"model": "remote:odd/m", "messages": [{"role": "user", "content": "x"}], "logprobs": True}
    refused = here.post("/v1/chat/completions", json=asked)
    assert refused.status_code in (400, 422)
    assert "logprobs" in refused.text


def test_an_answer_that_never_ends_is_cut(there: Elsewhere, here: httpx.Client) -> None:
    piece = json.dumps({"choices": [{"delta": {"content": "word " * 2000}}]})
    there.answers(f"data: {piece}\n\n".encode() * 100)
    add(here, there)
    found = told(here, "remote:odd/m")
    assert (found["state"], found["finish"]) == ("done", "length")
    assert 200_000 < len(found["text"]) < 230_000


@pytest.mark.parametrize("url", ["http://münchen.invalid/v1", "http://a..b/v1", f"http://{'x' * 70}.invalid/v1"])
def test_odd_names_of_servers_are_said(client: httpx.Client, url: str) -> None:
    response = client.post("/api/remotes", json={"name": "a", "url": url})
    assert response.status_code in (422, 502), response.text
    assert response.json()["error"]["field"] == "url"


@contextmanager
def at_home(folder: Path, **environment: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A studio that nobody has told of local servers."""
    server = Server(folder, TRELLIS_RATE_LIMIT="0", **environment)
    try:
        with server.client() as client:
            yield server, client
    finally:
        server.stop()


def test_a_person_at_this_computer_permits_a_local_server_once(tmp_path: Path, there: Elsewhere) -> None:
    there.answers(b'{"data": [{"id": "llama"}]}', **{"Content-Type": "application/json"})
    form = {"name": "ollama", "url": f"http://{there.address}"}
    with at_home(tmp_path) as (_, client):
        asks = client.post("/connections/remotes", data=form)
        assert asks.status_code == 403
        assert "Allow and add provider" in asks.text
        assert form["url"] in asks.text, "what was typed is kept"
        assert client.get("/api/remotes").json() == []
        assert client.post("/connections/remotes", data=form | {"permit": "true"}).status_code == 303
        (remote,) = client.get("/api/remotes").json()
        assert remote["models"] == ["llama"]
        there.answers(GOOD)
        assert told(client, "remote:ollama/llama")["text"] == "A"
    with at_home(tmp_path) as (_, client):
        assert told(client, "remote:ollama/llama")["text"] == "A", "it is remembered over a restart"
        there.answers(b'{"data": [{"id": "llama"}]}')
        assert client.post("/api/remotes", json=form | {"name": "again"}).status_code == 201, "and asked once"
        for each in client.get("/api/remotes").json():
            client.delete(f"/api/remotes/{each['id']}")
        assert client.post("/api/remotes", json=form).status_code == 403, "until it is taken away"


FORWARDED = [
    {"x-forwarded-for": "203.0.113.9"}, {"forwarded": "for=203.0.113.9"}, {"x-real-ip": "203.0.113.9"},
    {"via": "1.1 proxy"}, {"x-forwarded-port": "443"}, {"x-cluster-client-ip": "203.0.113.9"},
    {"tailscale-user-login": "a@example"}, {"cf-connecting-ip": "203.0.113.9"}, {"x-forwarded-proto": "https"},
    {"host": "studio.example"}, {"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"},
]  # fmt: skip


@pytest.mark.parametrize("proxied", ["0", "1"])
def test_nobody_else_may_permit_a_local_server(tmp_path: Path, there: Elsewhere, proxied: str) -> None:
    there.answers(b'{"data": [{"id": "llama"}]}')
    form = {"name": "a", "url": f"http://{there.address}", "permit": "true"}
    with at_home(tmp_path, TRELLIS_BEHIND_PROXY=proxied, TRELLIS_ALLOWED_HOSTS="studio.example") as (_, client):
        for headers in FORWARDED:
            refused = client.post("/connections/remotes", data=form, headers=headers)
            assert refused.status_code == 403, headers
            assert 'name="permit"' not in refused.text, headers
        assert there.asked == []
        assert client.get("/api/remotes").json() == []
        programs = client.post("/api/remotes", json=form | {"permit": True})
        assert programs.status_code == 422, "the page alone asks"


@pytest.mark.parametrize("url", ["http://169.254.169.254/v1", "http://0.0.0.0:11434", "http://[fe80::1]/v1"])
def test_what_no_server_of_models_has_cannot_be_permitted(tmp_path: Path, url: str) -> None:
    with at_home(tmp_path) as (_, client):
        refused = client.post("/connections/remotes", data={"name": "a", "url": url, "permit": "true"})
        assert refused.status_code == 403
        assert "no model server can be" in refused.text


def test_a_permission_holds_for_its_port_and_while_there_is_such_a_server(tmp_path: Path, there: Elsewhere) -> None:
    there.answers(b"gone", 500)
    form = {"name": "a", "url": f"http://{there.address}/v1", "permit": "true"}
    with at_home(tmp_path) as (_, client):
        failed = client.post("/connections/remotes", data=form)
        assert failed.status_code >= 400
        assert "answered 500" in failed.text
        assert "Allow and add provider" in failed.text, "what was said is kept in the form"
        assert client.post("/api/remotes", json={"name": "a", "url": form["url"]}).status_code == 403
        there.answers(b'{"data": [{"id": "llama"}]}')
        assert client.post("/connections/remotes", data=form).status_code == 303
        other = client.post("/api/remotes", json={"name": "b", "url": "http://127.0.0.1:9/v1"})
        assert other.json()["error"]["code"] == "private_address"
