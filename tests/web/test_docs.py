"""What the docs promise: examples run, routes are named, links resolve, and the map in the architecture is the tree."""

from __future__ import annotations

import re
from pathlib import Path

import httpx

from tests.server import Server, wait_ready

ROOT = Path(__file__).parent.parent.parent


def test_the_example_in_the_api_docs_runs(server: Server, client: httpx.Client) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    scope: dict[str, object] = {}
    exec(code.replace("http://127.0.0.1:8117", server.url), scope)
    session = scope["session"]
    assert isinstance(session, dict)
    assert wait_ready(client, session["id"])["head"]["step"] == 1


def test_the_api_docs_name_every_route(client: httpx.Client) -> None:
    docs = (ROOT / "docs" / "api.md").read_text()
    for path in client.get("/openapi.json").json()["paths"]:
        last = [part for part in path.split("/") if part and not part.startswith("{")][-1]
        assert last in docs, path


def test_the_map_in_the_architecture_is_the_tree_of_files() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    source = ROOT / "src" / "trellis"
    files = {str(file.relative_to(source)) for file in source.rglob("*.py") if file.name != "__init__.py"}
    mapped = re.findall(r"^\| `([a-z_/]+\.py)` \| \S", text, re.MULTILINE)
    assert sorted(mapped) == sorted(file for file in files if "migrations/versions" not in file)
    for name in re.findall(r"`((?:web|studio|store|workers|engine|messages|options|reader|demo)/[a-z_/]+\.py)", text):
        assert (source / name).is_file(), name


def test_the_glossary_has_the_words_of_the_product() -> None:
    glossary = (ROOT / "ARCHITECTURE.md").read_text().partition("## Glossary")[2]
    words = {
        "session", "prompt", "offer", "option", "choice", "step", "node", "head", "weights", "drift", "control",
        "foresight", "journal", "room", "message", "job", "preset", "engine", "worker",
    }  # fmt: skip
    assert words <= set(re.findall(r"^- \*\*([^*]+)\*\*: \S", glossary, re.MULTILINE))


def test_every_test_that_the_cases_name_is_there() -> None:
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs" / "cases.md").read_text())
    assert len(named) > 100
    for file, test in named:
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


def test_every_link_and_image_of_the_docs_is_there() -> None:
    pages = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in headings(target.read_text()), f"{page.name}: {link}"
