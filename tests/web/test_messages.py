"""Whatever is sent that has the wrong type, the answer is in the words of a form: no name of a library's, no name of a
Python class, whole sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter, ValidationError

from tests.server import Server
from trellis.messages import CHOICE
from trellis.options import SessionConfig, invalid_from, invalid_from_details
from trellis.web import chat_commands as socket_commands

INTERNAL = re.compile(
    r"Input should|NoneType|None\b(?! of)|constrained|function-|tagged-union|lax-or|[Pp]ydantic|Traceback|<class|"
    r"dict\[|list\[|tuple\[|Optional|union_|literal\b|value_error|<locals>|object at 0x|' object|"
    r"valid (string|integer|number|list|dictionary|boolean|tuple)|"
    r"Extra inputs|Field required|Value error|\bstr\b|\bint\b|\bdict\b|\bbool\b|\{'|\['"
)
WRONG: list[Any] = [None, 5, -1, 1e300, 10**30, True, "", "x" * 200_001, "\x00", [], [None], [[1]], [{"a": 1}], {},
                    {"a": 1}, {"type": "nothing"}, {"a": {"b": []}}]  # fmt: skip


def not_in_words(error: dict[str, Any]) -> list[str]:
    """The texts of an error that are no whole sentence for a person, and the fields that nobody has sent."""
    entries = error.get("fields", [])
    texts = [error["message"], error.get("next_step") or ".", *(entry["message"] for entry in entries)]
    names = [error.get("field") or error.get("param") or "", *(entry["field"] for entry in entries)]
    whole = re.compile(r"[.?!]”?( \(\d+ more\))?$")
    return [
        *(text for text in texts if INTERNAL.search(text) or not whole.search(text) or len(text) > 1000),
        *(name for name in names if re.search(r"[\[\]()]|constrained|function-|\b(str|int|dict|list|tuple)\b", name)),
    ]


def resolved(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A schema, through its references and the branches that are objects."""
    while "$ref" in schema:
        schema = whole["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    for key in ("anyOf", "oneOf", "allOf"):
        for branch in schema.get(key, []):
            found = resolved(branch, whole)
            if "properties" in found:
                return found
    return schema


def bodies(schema: dict[str, Any], whole: dict[str, Any], depth: int = 0) -> Iterator[Any]:
    """Bodies with one wrong value each, at every place."""
    for name, inner in resolved(schema, whole).get("properties", {}).items():
        for value in WRONG:
            yield {name: value}
        if depth < 3:
            found = resolved(inner, whole)
            for value in bodies(found, whole, depth + 1):
                yield {name: value}
            for value in bodies(found.get("items", {}), whole, depth + 1):
                yield {name: [value]}
    yield {"unheard of": {"a": 2}}


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    server = Server(tmp_path_factory.mktemp("save"), TRELLIS_RATE_LIMIT="0", HF_ENDPOINT="http://127.0.0.1:9",
                    TRELLIS_HUB_TIMEOUT="1")  # fmt: skip
    with server.client() as client:
        yield client
    assert server.stop() == 0
    assert "Traceback" not in server.output, server.output


def test_every_route_refuses_wrong_types_in_words(unlimited: httpx.Client) -> None:
    whole = unlimited.get("/openapi.json").json()
    found: dict[str, str] = {}
    asked = 0
    for path, operations in whole["paths"].items():
        for verb, about in operations.items():
            content = about.get("requestBody", {}).get("content", {}) if isinstance(about, dict) else {}
            if verb not in ("post", "put", "patch") or "application/json" not in content:
                continue
            url = re.sub(r"\{[^}]+\}", "nothing", path)
            for body in [*WRONG, *bodies(content["application/json"]["schema"], whole)]:
                answer = unlimited.request(verb, url, json=body)
                said = f"{verb} {path} {str(body)[:100]} → {answer.status_code}"
                assert answer.status_code != 500, said
                if answer.status_code >= 400:
                    found |= dict.fromkeys(not_in_words(answer.json()["error"]), said)
                    asked += 1
    assert not found
    assert asked > 1000


def test_every_option_of_a_session_refuses_wrong_types_in_words(unlimited: httpx.Client) -> None:
    found: dict[str, str] = {}
    for name in [*SessionConfig.model_fields, "nonesuch"]:
        for value in WRONG:
            answer = unlimited.post("/api/steering/check", json={"config": {name: value}})
            assert answer.status_code == 200
            for entry in answer.json()["errors"]:
                found |= dict.fromkeys(not_in_words({"message": entry["message"], "fields": [entry]}), name)
    assert not found


def test_commands_of_a_socket_refuse_wrong_types_in_words() -> None:
    adapters = [each for each in vars(socket_commands).values() if isinstance(each, TypeAdapter)]
    assert adapters
    for adapter in [*adapters, CHOICE]:
        schema = adapter.json_schema()
        kinds = [kind.get("properties", {}) for kind in schema.get("$defs", {}).values()] or [{}]
        for value in [*WRONG, *({name: wrong, "type": kind.get("type", {}).get("const", "x")}
                                for kind in kinds for name in kind for wrong in WRONG)]:  # fmt: skip
            try:
                adapter.validate_python(value)
            except ValidationError as error:
                assert not not_in_words(invalid_from(error).as_json()), f"{value!r:.100}"


def test_what_branches_of_a_union_say_is_one_sentence() -> None:
    findings = [
        {"type": "string_type", "loc": ("stop", "function-after[storable(), constrained-str]"), "msg": "x", "input": 5},
        {"type": "list_type", "loc": ("stop", "list[constrained-str]"), "msg": "x", "input": 5},
        {"type": "extra_forbidden", "loc": ("str",), "msg": "x", "input": 5},
    ]
    assert invalid_from_details(findings).fields == [
        {"field": "stop", "message": "must be text or a list, got “5”."},
        {"field": "str", "message": "is not a field of this request."},
    ]
