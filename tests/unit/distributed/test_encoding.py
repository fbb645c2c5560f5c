"""What ranks say arrives as it was said, and what is something else is an error that names who has said it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.distributed.encoding import decode, encode
from checkpointer.errors import SaveError

TEXT = st.text(st.characters(codec=None))  # lone surrogates, too


class Inner(NamedTuple):
    key: str
    numbers: tuple[int, ...]
    more: Any = None


@dataclass(frozen=True)
class Message:
    parts: dict[tuple[str, str], Inner]
    names: list[str]
    data: bytes
    share: float | None


INNER = st.builds(Inner, TEXT, st.lists(st.integers(-(2**63), 2**64 - 1)).map(tuple), st.none() | TEXT | st.lists(TEXT))
MESSAGES = st.builds(
    Message,
    st.dictionaries(st.tuples(TEXT, TEXT), INNER, max_size=3),
    st.lists(TEXT, max_size=3),
    st.binary(max_size=20),
    st.none() | st.floats(allow_nan=False),
)


@given(MESSAGES)
def test_a_message_arrives_as_it_was_said(message):
    assert decode(encode(message), Message, "rank 1") == message


@pytest.mark.parametrize("sent", [None, 3, ["a"], {"parts": 1}, Inner("\ud800", (1,)), "\udcff"])
def test_what_is_no_such_message_names_the_rank_and_what_to_do(sent):
    with pytest.raises(
        SaveError, match=r"the save of step 5: rank 3 of 8 has said what this rank cannot read: .* same"
    ):
        decode(encode(sent), Message, "the save of step 5: rank 3 of 8")


@given(st.binary(max_size=60))
def test_bytes_of_another_version_are_a_value_or_an_error_of_ours(data):
    with suppress(SaveError):
        assert isinstance(decode(data, Message, "rank 3"), Message)


def test_what_nests_without_end_is_an_error_of_ours():
    for data in (b"\x00" + b"\x91" * 10**6, b"\x01" + b"[" * 10**6):
        with pytest.raises(SaveError, match="rank 3"):
            decode(data, object, "rank 3")
