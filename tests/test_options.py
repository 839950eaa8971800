"""Options: one definition, from which the schema, the form and the messages of refusal follow."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trellis.errors import Invalid, shorten
from trellis.messages import CHOICE
from trellis.options import Adapter, Learning, Sampling, SessionConfig
from trellis.text_rules import plain_number, require_storable


def test_every_option_explains_itself() -> None:
    for name, field in SessionConfig.model_fields.items():
        about = field.json_schema_extra
        assert field.title, name
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(about, dict), name
        assert about["group"], name


def test_parts_hold_the_same_values() -> None:
    config = SessionConfig(lora_rank=3, temperature=0.5, replay=7)
    assert config.extract(Adapter).lora_rank == 3
    assert config.extract(Sampling).temperature == 0.5
    assert config.extract(Learning).replay == 7


def test_all_bad_fields_are_named_at_once_with_their_values() -> None:
    with pytest.raises(Invalid) as raised:
        SessionConfig.parse({"group_size": 99, "nope": 1, "temperature": "warm"})
    fields = {entry["field"]: entry["message"] for entry in raised.value.fields}
    assert set(fields) == {"config.group_size", "config.nope", "config.temperature"}
    assert "“99”" in fields["config.group_size"]
    assert "“warm”" in fields["config.temperature"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(sorted(SessionConfig.model_fields)) | st.text(), json_values))
def test_any_input_is_a_configuration_or_a_clear_refusal(values: dict[str, Any]) -> None:
    try:
        config = SessionConfig.parse(values)
    except Invalid as error:
        assert error.fields
        assert all(entry["field"].startswith("config") for entry in error.fields)
        assert all(len(entry["message"]) < 500 for entry in error.fields)
    else:
        assert SessionConfig.parse(config.model_dump(mode="json")) == config


@given(json_values)
def test_a_choice_that_is_taken_is_taken_back_from_its_json(value: Any) -> None:
    try:
        choice = CHOICE.validate_python(value)
    except ValueError:
        return
    assert CHOICE.validate_python(CHOICE.dump_python(choice, mode="json")) == choice


@given(st.text())
def test_what_can_be_stored_can_be_encoded(text: str) -> None:
    if "\x00" in text:
        with pytest.raises(ValueError, match="NUL"):
            require_storable(text)
    else:
        assert require_storable(text) == text


def test_a_lone_surrogate_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        require_storable("\ud800")


@given(st.text(), st.integers(2, 80))
def test_a_quoted_value_is_short_and_on_one_line(text: str, limit: int) -> None:
    quoted = shorten(text, limit)
    assert len(quoted) <= limit
    assert "\n" not in quoted


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("0,5", 0.5), ("0.5", 0.5), (",5", 0.5), ("1,5", 1.5), (" 2 ", 2), ("1,25e0", 1.25), ("0,024", 0.024),
        ("3,0", 3),
    ],
)  # fmt: skip
def test_a_decimal_comma_is_taken(typed: str, value: float) -> None:
    assert SessionConfig.parse({"temperature": typed}).temperature == value


@pytest.mark.parametrize("typed", ["1024", "1,024", "1 024", "1\u202f024", "1'024", "1024.0", "+1,024"])
def test_a_whole_number_may_have_groups_of_thousands(typed: str) -> None:
    assert SessionConfig.parse({"seed": typed}).seed == 1024


@pytest.mark.parametrize("typed", ["1.024", "0,5", "1,02", "1,0245", "10,24", "1 2", "1,024,5", "0,024", ",", "1,,024"])
def test_what_is_no_whole_number_is_refused_with_its_value(typed: str) -> None:
    with pytest.raises(Invalid, match="must be a whole number, got") as raised:
        SessionConfig.parse({"seed": typed})
    assert f"“{typed}”" in raised.value.message


def test_a_number_that_can_be_read_in_two_ways_is_refused_with_both() -> None:
    with pytest.raises(Invalid) as raised:
        SessionConfig.parse({"choice_beta": "1,024"})
    assert raised.value.message == "config.choice_beta: is ambiguous: write 1024 or 1.024, got “1,024”."


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_with_a_decimal_comma_is_the_same_number_or_refused(value: float) -> None:
    try:
        read = plain_number(repr(value).replace(".", ","), whole=False)
    except ValueError as error:
        assert "ambiguous" in str(error)
    else:
        assert float(read) == value


@given(st.integers(-(10**30), 10**30), st.sampled_from([",", " ", "\xa0", "’"]))
def test_a_whole_number_in_groups_is_the_same_number(value: int, mark: str) -> None:
    assert int(plain_number(f"{value:,}".replace(",", mark), whole=True)) == value


@given(st.text(), st.booleans())
def test_text_that_is_no_number_is_left_as_it_is(text: str, whole: bool) -> None:
    try:
        read = plain_number(text, whole=whole)
    except ValueError:
        return
    assert read == text or float(read) is not None
