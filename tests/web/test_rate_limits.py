"""Limits of a running server: expensive actions, pieces of uploads, and what the new routes refuse."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server import Server, new_session, wait_ready
from trellis.markdown import to_html


def test_expensive_actions_are_counted_and_cheap_ones_are_not(tmp_path: Path) -> None:
    server = Server(tmp_path, TRELLIS_RATE_LIMIT="3")
    try:
        with server.client() as client:
            state = new_session(client)
            for _ in range(2):
                client.post("/api/models/load", json={"model": "demo"})
            for path, body in (
                ("/api/steering/sessions", {}),
                ("/api/models/load", {"model": "demo"}),
                (f"/api/steering/sessions/{state['id']}/exports", {"kind": "adapter", "name": "x"}),
                (f"/api/steering/sessions/{state['id']}/sample", {"prompt": "Why?"}),
                ("/api/uploads", {"kind": "prompts", "name": "a", "files": [{"path": "a.txt", "bytes": 1}]}),
            ):
                answer = client.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_requests"), path
                assert "TRELLIS_RATE_LIMIT" in answer.json()["error"]["next_step"]
            assert client.post("/steer", data={}).status_code == 429
            for _ in range(10):
                assert client.get("/api/steering/sessions").status_code == 200
            said = {"offer": wait_ready(client, state["id"])["offer"]["id"], "choice": 0}
            assert client.post(f"/api/steering/sessions/{state['id']}/choose", json=said).status_code == 202
    finally:
        server.stop()


def test_an_upload_comes_through_the_api(client: httpx.Client, server: Server) -> None:
    data = b"Why is it so?\n" * 150_000
    body = {"kind": "prompts", "name": "via-api", "files": [{"path": "via-api.txt", "bytes": len(data)}]}
    upload = client.post("/api/uploads", json=body).json()
    while upload["state"] != "done":
        at = upload["files"][0]["received"]
        answer = client.put(
            f"/api/uploads/{upload['id']}/files/0", params={"offset": at}, content=data[at : at + upload["piece"]]
        )
        assert answer.status_code == 200, answer.text
        upload = answer.json()
    assert (server.save_dir / "prompts" / "via-api.txt").read_bytes() == data
    assert client.get(f"/api/uploads/{upload['id']}").json()["state"] == "done"
    assert "via-api.txt" in {file["name"] for file in client.get("/api/steering/files").json()}


@pytest.mark.parametrize(
    ("content", "params", "status"),
    [
        (b"", {"offset": 0}, 422),
        (b"x" * 1_000_001, {"offset": 0}, 422),
        (b"x" * 3_000_000, {"offset": 0}, 413),
        (b"x", {"offset": -1}, 422),
        (b"x", {}, 422),
        (b"x", {"offset": 7}, 409),
        (b"x" * 50, {"offset": 0}, 422),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(
    client: httpx.Client, content: bytes, params: dict[str, int], status: int
) -> None:
    body = {"kind": "prompts", "name": "refused", "files": [{"path": "refused.txt", "bytes": 10}]}
    upload = client.post("/api/uploads", json=body).json()["id"]
    answer = client.put(f"/api/uploads/{upload}/files/0", params=params, content=content)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["next_step"]
    assert client.put(f"/api/uploads/{upload}/files/5", params={"offset": 0}, content=b"x").status_code == 404
    client.delete(f"/api/uploads/{upload}")


@pytest.mark.parametrize(
    "dataset",
    [
        {"source": "file", "id": "../trellis.db"},
        {"source": "file", "id": "/etc/passwd"},
        {"source": "file", "id": "..%2ftrellis.db"},
        {"source": "file", "id": "a\x00b"},
        {"source": "hub", "id": "http://169.254.169.254/latest"},
        {"source": "nowhere"},
        {"source": "file", "id": {}},
        [],
    ],
)
def test_no_dataset_leads_out_of_the_prompts_folder(client: httpx.Client, dataset: Any) -> None:
    answer = client.post("/api/steering/preview", json={"dataset": dataset})
    assert answer.status_code == 422, answer.text
    assert "root:" not in answer.text


def test_a_configuration_is_checked_without_loading_anything(client: httpx.Client) -> None:
    jobs = len(client.get("/api/jobs").json())
    found = client.post(
        "/api/steering/check", json={"config": {"group_size": 99, "temperature": 0.5, "model": "nope"}}
    ).json()
    assert {entry["field"] for entry in found["errors"]} == {"config.group_size", "config.model"}
    assert found["memory"] is None
    found = client.post("/api/steering/check", json={"config": {"precision": "4-bit"}}).json()
    assert found["errors"] == []
    assert found["memory"]["precision"] == "4-bit"
    assert found["memory"]["needed"]["total"] == sum(
        found["memory"]["needed"][part] for part in ("weights", "adapter", "answers", "learning", "libraries")
    )
    for hostile in (
        "[]",
        '"x"',
        '{"config": []}',
        '{"config": {"dataset": "x"}}',
        '{"config": {"lora_rank": 1e400}}',
        "null",
    ):
        answer = client.post("/api/steering/check", content=hostile, headers={"content-type": "application/json"})
        assert answer.status_code in (200, 422), hostile
    assert len(client.get("/api/jobs").json()) == jobs


def test_every_preset_is_a_valid_configuration(client: httpx.Client) -> None:
    presets = client.get("/api/steering/presets").json()
    assert {each["id"] for each in presets} >= {"small", "medium", "large", "base", "thinking"}
    for each in presets:
        assert client.post("/api/steering/check", json={"config": each["config"]}).json()["errors"] == [], each["id"]
        on_demo = each["config"] | {"model": "demo"}
        errors = client.post("/api/steering/check", json={"config": on_demo}).json()["errors"]
        # The demo, which is asked about here, looks back on fewer tokens than a model that thinks needs for an answer.
        expected = ["config.max_new_tokens"] if each["id"] == "thinking" else []
        assert [error["field"] for error in errors] == expected, each["id"]


def test_a_node_is_named_and_the_name_taken_away(client: httpx.Client) -> None:
    state = new_session(client)
    url = f"/api/steering/sessions/{state['id']}"
    node = state["head"]["node"]
    assert client.patch(f"{url}/nodes/{node}", json={"name": " The start "}).json()["name"] == "The start"
    assert client.get(f"{url}/tree").json()["nodes"][0]["name"] == "The start"
    client.patch(f"{url}/nodes/{node}", json={"name": ""})
    assert client.get(f"{url}/tree").json()["nodes"][0]["name"] is None
    assert client.patch(f"{url}/nodes/nope", json={"name": "x"}).status_code == 404
    assert client.patch(f"{url}/nodes/{node}", json={"name": "x" * 201}).status_code == 422


HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://evil/?data)", "`<b>`",
    "[x](javascript:alert(1))", "[x](data:text/html,<script>)", '<a href="x" onclick="y">', "> <iframe src=x>",
    "<svg/onload=alert(1)>",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_is_text_links_and_nothing_else(text: str) -> None:
    html = to_html(text)
    tags = re.findall(r"<(\w+)([^>]*)>", html)
    assert all(name in ("p", "code", "blockquote", "a") for name, _ in tags), html
    assert all(not about for name, about in tags if name != "a"), html
    assert 'href="javascript' not in html
    assert 'href="data' not in html


def test_links_in_markdown_tell_nobody_where_they_were() -> None:
    assert 'rel="noopener noreferrer nofollow"' in to_html("[x](https://example.org)")


def test_the_journal_on_the_review_page_is_sanitised(client: httpx.Client) -> None:
    attack = "<img src=x onerror=alert(1)> ![p](http://evil/x)"
    state = new_session(client, control_prompt="")
    url = f"/api/steering/sessions/{state['id']}"
    client.patch(url, json={"name": attack})
    client.post(f"{url}/choose", json={"offer": state["offer"]["id"], "choice": {"written": attack}})
    wait_ready(client, state["id"])
    client.patch(f"{url}/nodes/{client.get(url).json()['head']['node']}", json={"name": attack})
    steering = f"/steer/{state['id']}"
    for path in (f"{steering}/review", f"{steering}/compare", steering, "/", f"/new?clone={state['id']}"):
        page = client.get(path, headers={"Accept": "text/html"}).text
        assert "<img" not in page, path
        assert "&lt;img src=x" in page, path


def at_once(client: httpx.Client, method: str, url: str, count: int = 6) -> list[int]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: client.request(method, url).status_code, range(count)))


def test_what_is_deleted_twice_at_once_is_deleted(client: httpx.Client, server: Server) -> None:
    state = new_session(client)
    for number in range(6):
        name = f"twice-{number}"
        client.post(f"/api/steering/sessions/{state['id']}/exports", json={"kind": "adapter", "name": name})
        folder = server.save_dir / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        while name not in {each["name"] for each in client.get("/api/exports").json()}:
            pass
        assert set(at_once(client, "DELETE", f"/api/exports/{name}")) <= {204, 404}
        assert set(at_once(client, "DELETE", f"/api/models/{name}")) <= {204, 404}
    assert client.delete("/api/models/no/thing").status_code == 404


def test_an_upload_can_be_read_while_it_ends(client: httpx.Client) -> None:
    for number in range(20):
        body = {"kind": "prompts", "name": "a", "files": [{"path": f"ends-{number}.txt", "bytes": 3}]}
        url = f"/api/uploads/{client.post('/api/uploads', json=body).json()['id']}"
        with ThreadPoolExecutor(4) as pool:
            reading = [pool.submit(client.get, url) for _ in range(6)]
            put = pool.submit(client.put, f"{url}/files/0", params={"offset": 0}, content=b"abc")
            assert put.result().status_code == 200
            assert {one.result().status_code for one in reading} <= {200, 404}


def test_a_key_of_one_action_is_not_another(client: httpx.Client) -> None:
    state = new_session(client)
    url, key = f"/api/steering/sessions/{state['id']}", {"Idempotency-Key": "one key for two"}
    node = state["head"]["node"]
    both = {"left": node, "right": node, "prompts": ["Why?"]}
    assert client.post(f"{url}/compare", json=both, headers=key).status_code == 202
    answer = client.post(f"{url}/exports", json={"kind": "adapter", "name": "other"}, headers=key)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "key_reused")


def test_a_proxy_may_name_the_port_that_a_scheme_has_anyway(client: httpx.Client) -> None:
    port = httpx.URL(str(client.base_url)).port
    for host, origin, right in (
        ("localhost:443", "https://localhost", True),
        ("localhost:80", "http://localhost", True),
        ("localhost:443", "http://localhost", False),
        (f"localhost:{port}", f"http://localhost:{port}", True),
        (f"localhost:{port}", "http://localhost", False),
    ):
        answer = client.post("/api/steering/check", json={}, headers={"Host": host, "Origin": origin})
        assert (answer.status_code == 200) is right, (host, origin)
