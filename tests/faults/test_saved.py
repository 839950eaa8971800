"""A save folder that an older version made is read as it was, and goes on: the same names on disk, in the database, on
the wire to browsers and in the JSON API, the same ids of weights (tests/saved).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pydantic import TypeAdapter

from tests.processor import describe_processor
from tests.saved import observe
from tests.server import Server
from trellis.messages import CreateAdapter, Learn, Retrain, derived_seed, recipe_id

EXPECTED = json.loads(observe.EXPECTED.read_text(encoding="utf-8"))
RECIPES = json.loads((observe.HERE / "recipes.json").read_text(encoding="utf-8"))
REQUEST: TypeAdapter[CreateAdapter | Learn | Retrain] = TypeAdapter(CreateAdapter | Learn | Retrain)


@dataclass
class Saved:
    """A studio on the folder, the rows of its database before and after it was looked at, what was shown, and apart
    from it the words for people."""

    server: Server
    client: httpx.Client
    before: dict[str, list[observe.Json]]
    after: dict[str, list[observe.Json]]
    shown: Any
    words: observe.Json


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("old") / "saved"
    observe.unpack(folder)
    before = observe.rows_of(folder)
    words: observe.Json = {}
    with observe.studio(folder, EXPECTED["cookie"]) as (server, client):
        shown = observe.words_apart(observe.shown(server, client, EXPECTED["key"]), words)
        after = observe.rows_of(folder, observe.columns_of(before))
        yield Saved(server, client, before, after, shown, words)


@pytest.fixture(scope="module")
def interface(saved: Saved) -> observe.Json:
    return observe.interface(saved.client)


@pytest.fixture(scope="module")
def gone_on(saved: Saved, interface: observe.Json) -> observe.Json:
    return observe.gone_on(saved.server, saved.client, EXPECTED["key"])


def same(expected: Any, found: Any) -> None:
    differences = observe.differences(expected, json.loads(json.dumps(found)))
    assert not differences, "\n".join(differences)


@pytest.mark.engine
def test_what_was_saved_is_shown_as_it_was(saved: Saved) -> None:
    """Sessions, trees, choices, rooms, comparisons, jobs, exports and files; event streams and sockets."""
    same(EXPECTED["shown"], saved.shown)


@pytest.mark.engine
def test_what_is_said_of_it_to_people(saved: Saved) -> None:
    """Journals and labels. Nothing reads these back: where the words on the screen change, these follow."""
    same(EXPECTED["words"], saved.words)


@pytest.mark.engine
def test_looking_changes_nothing_in_the_database(saved: Saved) -> None:
    for rows in (saved.before, saved.after):
        rows.pop("alembic_version", None)
        for key in rows["keys"]:
            key.pop("used")
    same(saved.before, saved.after)


@pytest.mark.engine
@pytest.mark.parametrize("part", ["paths", "options", "pages", "forms"])
def test_addresses_and_fields_are_called_as_they_were(interface: observe.Json, part: str) -> None:
    same(EXPECTED["interface"][part], interface[part])


@pytest.mark.engine
def test_it_goes_on_under_the_same_names(gone_on: observe.Json) -> None:
    """Lost weights are made again under their ids; a choice, imports, chat, a key and an upload go on."""
    ids = gone_on["ids"]
    assert len(ids["missing"]) >= 10
    assert set(ids["missing"]) == set(ids["made again"])
    same(EXPECTED["gone on"]["ids"], ids)


@pytest.mark.engine
@pytest.mark.skipif(
    describe_processor() != EXPECTED["gone on"]["texts"]["processor"], reason="the last bits are another processor's"
)
def test_weights_that_were_made_again_say_the_same(gone_on: observe.Json) -> None:
    same(EXPECTED["gone on"]["texts"], gone_on["texts"])


@pytest.mark.parametrize("recipe", RECIPES["weights"], ids=lambda recipe: recipe["makes"][:9])
def test_a_request_makes_weights_of_the_name_that_it_always_made(recipe: dict[str, Any]) -> None:
    request = REQUEST.validate_python(recipe["request"])
    same(recipe["request"], request.model_dump(mode="json"))
    made = request.weights_id(recipe["fingerprint"]) if isinstance(request, CreateAdapter) else request.weights_id()
    assert made == recipe["makes"]


def test_names_of_nodes_and_offers_and_seeds_are_what_they_were() -> None:
    for kind, parts, name in RECIPES["recipe"]:
        assert recipe_id(kind, parts) == name
    for parts, seed in RECIPES["seed"]:
        assert derived_seed(*parts) == seed
