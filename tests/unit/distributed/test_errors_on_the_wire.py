"""An error that one rank has met is raised by all: of the same class where it is ours, never of one that is not."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer import errors
from checkpointer.distributed.encoding import decode, encode
from checkpointer.distributed.errors_on_the_wire import LONGEST, Failure, as_error, failure, joined
from checkpointer.errors import CheckpointerError, ConfigError, CorruptCheckpointError, SaveError

OURS = [
    found
    for name in errors.__all__
    if isinstance(found := getattr(errors, name), type) and issubclass(found, CheckpointerError)
]


def sent(error: BaseException) -> Failure:
    """As another rank hears of it."""
    return decode(encode(failure(error)), Failure, "rank 1")


@pytest.mark.parametrize("kind", OURS)
def test_an_error_of_ours_arrives_as_itself(kind):
    error = as_error(sent(kind("what happened")))
    assert (type(error), str(error)) == (kind, "what happened")


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt("x"), OSError(errno.EIO, "x"), MemoryError()])
def test_any_other_error_is_that_of_a_save_and_says_what_it_was(error):
    heard = as_error(sent(error))
    assert type(heard) is SaveError
    assert str(heard).startswith(f"{type(error).__name__}: ")


def test_a_full_disk_stays_one():
    full = SaveError("no room")
    full.errno = errno.ENOSPC
    heard = as_error(sent(full))
    assert isinstance(heard, SaveError)
    assert heard.errno == errno.ENOSPC
    assert joined("the save", {1: sent(full), 2: sent(full)}, 4).errno == errno.ENOSPC
    assert joined("the save", {1: sent(full), 2: sent(SaveError("else"))}, 4).errno is None


def test_what_several_ranks_have_met_is_one_error_that_names_them():
    error = joined("the save of step 5", {3: sent(ConfigError("b")), 1: sent(ConfigError("a"))}, 4)
    assert type(error) is ConfigError
    assert str(error) == "the save of step 5 failed: rank 1 of 4: a; rank 3 of 4: b"
    mixed = joined("the save", {0: sent(ConfigError("a")), 1: sent(CorruptCheckpointError("b"))}, 2)
    assert type(mixed) is SaveError


def test_the_words_of_eight_ranks_are_enough_and_none_is_endless():
    error = joined("the save", {rank: sent(ConfigError("x")) for rank in range(5000)}, 5000)
    assert str(error).count("rank ") == 8
    assert len(failure(ConfigError("x" * 10**6)).text) == LONGEST


@given(st.builds(Failure, st.text(), st.text(), st.none() | st.integers()))
def test_whatever_another_rank_says_it_is_an_error_of_ours(heard):
    assert isinstance(as_error(heard), CheckpointerError)


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "CheckpointerWarning", "__all__", "annotations", ""])
def test_a_class_is_looked_up_among_our_errors_alone(name):
    assert type(as_error(Failure(name, "x"))) is SaveError


@given(st.text(st.characters(codec=None)))
def test_words_that_no_encoding_can_carry_arrive_escaped(text):
    assert str(as_error(sent(ConfigError(text)))).encode() == text[:LONGEST].encode("utf-8", "backslashreplace")
