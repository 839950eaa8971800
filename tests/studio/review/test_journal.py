"""The journal and the choices to take away."""

from __future__ import annotations

import json

import pytest

from tests.studio.steering.test_sessions import choose, ready
from trellis.errors import Invalid
from trellis.messages import Ranking, Written
from trellis.studio.review.journal import CHOICE_FORMATS, describe_choice, export_choices, journal_markdown
from trellis.studio.steering.session import Session
from trellis.studio.studio import Studio

pytestmark = pytest.mark.anyio
ALL = [1, (0, 2), "none", Ranking(ranking=(3, 1)), Written(written="Mine.\n> quoted")]


@pytest.fixture
async def session(studio: Studio) -> Session:
    session = await studio.steering.create("Every\nkind", {"system_prompt": "Be kind."})
    for choice in ALL:
        await choose(session, choice)
    await session.commands.skip("skip")
    await ready(session)
    return session


async def lines(studio: Studio, session: Session, layout: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in await export_choices(studio.store, session, layout)]


async def test_the_journal_tells_every_step(studio: Studio, session: Session) -> None:
    text = await journal_markdown(studio.store, session)
    assert text.startswith("# Every kind\n")
    for said in ("chose B", "chose A, C", "none of these", "ranked D › B", "wrote an answer", "skipped"):
        assert said in text
    assert text.count("**(chosen)**") == 1 + 2 + 1
    assert "> Mine.\n> > quoted" in text
    assert text.count("drift") == len(ALL)


async def test_the_raw_log_has_every_choice(studio: Studio, session: Session) -> None:
    log = await lines(studio, session, "raw")
    assert [line["choice"] for line in log] == [
        1, [0, 2], "none", {"ranking": [3, 1]}, {"written": "Mine.\n> quoted"}, "skip"
    ]  # fmt: skip
    assert all(line["prompt"] and len(line["options"]) == 4 for line in log)  # type: ignore[arg-type]


async def test_preferences_are_the_pairs_that_the_choices_imply(studio: Studio, session: Session) -> None:
    pairs = await lines(studio, session, "trl-preference")
    # one of four: 3; two good: 2 x 2; none: 0; D over three, B over two: 5; written over four: 4
    assert len(pairs) == 3 + 4 + 0 + 5 + 4
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    first = pairs[0]["prompt"]
    assert isinstance(first, list)
    assert [message["role"] for message in first] == ["system", "user"]
    openai = await lines(studio, session, "openai-dpo")
    assert [line["preferred_output"] for line in openai] == [pair["chosen"] for pair in pairs]


async def test_unpaired_labels_say_good_or_not(studio: Studio, session: Session) -> None:
    labels = [line["label"] for line in await lines(studio, session, "trl-unpaired")]
    assert len(labels) == 4 * 5 + 1
    assert sum(map(bool, labels)) == 1 + 2 + 0 + 1 + 1


async def test_an_unknown_format_is_refused(studio: Studio, session: Session) -> None:
    with pytest.raises(Invalid, match="unknown format “xml”"):
        await export_choices(studio.store, session, "xml")
    for layout in CHOICE_FORMATS:
        assert await lines(studio, session, layout)


def test_every_choice_has_words() -> None:
    assert describe_choice(None) == "base model"
    assert len({describe_choice(choice) for choice in [*ALL, "skip", None]}) == 7  # type: ignore[list-item]


async def test_an_answer_is_never_worse_than_itself_in_what_is_taken_away(studio: Studio) -> None:
    session = await studio.steering.create("Twice", {})
    await ready(session)
    await session.commands.replace_prompt("Please repeat yourself.", "the same twice")
    await choose(session, 2)
    await ready(session)
    (raw,) = await lines(studio, session, "raw")
    assert raw["choice"] == [0, 2]
    pairs = await lines(studio, session, "trl-preference")
    assert len(pairs) == 2
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    labels = [line["label"] for line in await lines(studio, session, "trl-unpaired")]
    assert labels == [True, False, False]
