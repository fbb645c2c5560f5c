"""JSON that is written piece by piece is the JSON that the standard library writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.format import strict_json

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=6), max_leaves=40
)


@given(values)
def test_every_value_gives_the_text_of_the_standard_library(value: Any) -> None:
    assert strict_json.dumps(value) == json.dumps(value, allow_nan=False, separators=(",", ":"))


@pytest.mark.parametrize("length", [strict_json.SLICE + extra for extra in (-1, 0, 1, strict_json.SLICE)])
def test_long_lists_and_dicts_are_whole_at_every_border(length: int) -> None:
    value = {"a": [{"b": list(range(length))}, {str(i): [i, {"c": None}] for i in range(length)}], "d": []}
    assert strict_json.dumps(value) == json.dumps(value, separators=(",", ":"))


def test_nesting_deeper_than_is_looked_through_is_written_too() -> None:
    value: Any = list(range(1000))
    for _ in range(3 * strict_json.MAX_LEVELS):
        value = {"in": [value]}
    assert json.loads(strict_json.dumps(value)) == value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [[float("-inf")]]])
def test_what_json_has_no_word_for_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        strict_json.dumps(value)
