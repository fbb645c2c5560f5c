"""Durations and sizes: what is read, what is refused, and that every value survives being written and read."""

from __future__ import annotations

import pickle
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import ConfigError
from checkpointer.policy.values import (
    FieldError,
    count,
    did_you_mean,
    dotted,
    duration,
    format_duration,
    format_fraction,
    format_size,
    fraction,
    roughly,
    shown,
    size,
)


def problem(check, value):
    """The message with which ``check`` refuses ``value``."""
    with pytest.raises(FieldError) as caught:
        check("key", value)
    assert caught.value.key == ("key",)
    return str(caught.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("90s", timedelta(seconds=90)),
        ("30min", timedelta(minutes=30)),
        ("12h", timedelta(hours=12)),
        ("2d", timedelta(days=2)),
        ("1.5h", timedelta(minutes=90)),
        ("0.1d", timedelta(hours=2, minutes=24)),
        (" 30 min ", timedelta(minutes=30)),
        ("0.000001s", timedelta(microseconds=1)),
        (timedelta(hours=3), timedelta(hours=3)),
    ],
)
def test_a_duration_is_a_number_and_a_unit(text, expected):
    assert duration("key", text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1B", 1),
        ("1kB", 1000),
        ("1MB", 10**6),
        ("500GB", 500 * 10**9),
        ("1.5TB", 15 * 10**11),
        ("1KiB", 2**10),
        ("64MiB", 2**26),
        ("2GiB", 2**31),
        ("0.5TiB", 2**39),
        ("20 GB", 20 * 10**9),
        (123, 123),
    ],
)
def test_a_size_is_bytes_or_a_number_and_a_unit(text, expected):
    assert size("key", text) == expected


@pytest.mark.parametrize(
    "value", ["", "h", "12", "1e3s", "-1h", "1h30min", "1:30", "12h!", "١٢h", "1..5h", "9" * 40 + "h"]
)
def test_text_that_is_no_duration_is_refused(value):
    assert problem(duration, value).startswith("key: ")


@pytest.mark.parametrize("value", [True, None, [], {}, b"12h", float("nan"), float("inf")])
@pytest.mark.parametrize("check", [duration, size])
def test_a_value_of_another_type_is_refused(check, value):
    assert "such as" in problem(check, value)


@pytest.mark.parametrize("value", [30, 1.5, pytest.param(10**5000, id="huge")])
def test_a_duration_without_a_unit_asks_for_one(value):
    message = problem(duration, value)
    assert "has no unit; write" in message
    assert len(message) < 250


def test_the_question_for_a_unit_shows_what_to_write():
    assert problem(duration, 30) == "key: 30 has no unit; write 30s, 30min, 30h or 30d"
    assert problem(duration, "30") == "key: '30' has no unit; write one of 30d, 30h, 30min, 30s"
    assert problem(size, 1.5) == "key: 1.5 has no unit; write 1.5MB, 1.5GB or 1.5TB"


@pytest.mark.parametrize(
    "check, text, hint",
    [
        (duration, "30m", "did you mean 30min?"),
        (duration, "30 minutes", "did you mean 30min?"),
        (duration, "2hours", "did you mean 2h?"),
        (duration, "2D", "did you mean 2d?"),
        (size, "500gb", "did you mean 500GB?"),
        (size, "10KB", "did you mean 10kB?"),
        (size, "500G", "did you mean 500GB or 500GiB?"),
    ],
)
def test_an_unknown_unit_is_refused_with_the_one_that_was_probably_meant(check, text, hint):
    assert problem(check, text).endswith(hint)


def test_a_unit_that_nothing_resembles_is_refused_without_a_guess():
    assert problem(duration, "2weeks") == "key: unknown unit 'weeks' (known: d, h, min, s)"


@pytest.mark.parametrize(
    "check, value",
    [(count, 0), (duration, "0s"), (duration, "0.0h"), (duration, timedelta(0)), (size, 0), (size, "0GB")],
)
def test_zero_is_refused_with_the_reason_and_the_way_out(check, value):
    message = problem(check, value)
    assert "frameworks disagree on its meaning" in message
    assert "null" in message


@pytest.mark.parametrize("check, value", [(count, -1), (duration, timedelta(seconds=-1)), (size, -5)])
def test_negative_values_are_refused(check, value):
    assert "must be more than zero" in problem(check, value)


@pytest.mark.parametrize("check, text", [(duration, "0.0000001s"), (size, "0.5B"), (size, "0.0001kB")])
def test_what_would_round_to_zero_is_refused(check, text):
    assert "too small" in problem(check, text)


@pytest.mark.parametrize(
    "check, value",
    [(duration, "999999999999d"), (size, "99999999999TB"), (size, 2**63), pytest.param(count, 10**5000, id="huge")],
)
def test_absurdly_large_values_are_refused(check, value):
    assert "too large" in problem(check, value)


@pytest.mark.parametrize(
    "value, expected",
    [("1%", 0.01), ("0.5%", 0.005), (" 12.5 % ", 0.125), ("99.99%", 0.9999), (0.01, 0.01), (0.3, 0.3)],
)
def test_a_fraction_is_a_percentage_or_a_number(value, expected):
    assert fraction("key", value) == expected


@pytest.mark.parametrize(
    "value", ["100%", "250%", 1.0, 2.5, 1e300, -0.01, "0.01", "1 percent", "%", "1%%", True, None, []]
)
def test_what_is_no_part_of_a_whole_is_refused(value):
    assert problem(fraction, value).startswith("key: must be ")


@pytest.mark.parametrize("value", [0, 0.0, "0%", "0.00%"])
def test_a_fraction_of_nothing_is_refused_with_the_way_out(value):
    assert "leave the rule out (null)" in problem(fraction, value)


def test_a_percentage_without_its_sign_is_asked_for_it():
    assert problem(fraction, 1) == "key: 1 has no unit; write 1%, or a number below 1"
    assert problem(fraction, 1.5).endswith("did you mean 1.5%?")


@pytest.mark.parametrize(
    "value, text", [(0.01, "1%"), (0.005, "0.5%"), (0.125, "12.5%"), (1 / 3, 1 / 3), (1e-12, 1e-12)]
)
def test_fractions_are_written_as_percentages_where_that_is_exact(value, text):
    assert format_fraction(value) == text


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_every_fraction_reads_back_as_it_was_written(value):
    assert fraction("key", format_fraction(value)) == value


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0ms"),
        (0.0123, "12.3ms"),
        (2, "2s"),
        (99, "99s"),
        (300, "5min"),
        (5400, "90min"),
        (36_000, "10h"),
        (864_000, "10d"),
    ],
)
def test_times_for_people_have_three_digits_and_a_unit(seconds, text):
    assert roughly(seconds) == text


@pytest.mark.parametrize("value", [True, False, 3.0, "3", None, [3]])
def test_a_count_is_a_whole_number_and_nothing_that_looks_like_one(value):
    assert "whole number" in problem(count, value)


@pytest.mark.parametrize(
    "value, text",
    [
        (timedelta(minutes=30), "30min"),
        (timedelta(minutes=90), "90min"),
        (timedelta(hours=24), "1d"),
        (timedelta(seconds=1.5), "1.5s"),
        (timedelta(microseconds=1), "0.000001s"),
    ],
)
def test_durations_are_written_in_the_largest_unit_that_divides_them(value, text):
    assert format_duration(value) == text


@pytest.mark.parametrize(
    "value, text", [(500 * 10**9, "500GB"), (2**26, "64MiB"), (1536, "1536B"), (15 * 10**11, "1500GB"), (1000, "1kB")]
)
def test_sizes_are_written_in_the_unit_that_they_were_thought_in(value, text):
    assert format_size(value) == text


@given(st.timedeltas(min_value=timedelta(microseconds=1)))
def test_every_duration_reads_back_as_it_was_written(value):
    assert duration("key", format_duration(value)) == value


@given(st.integers(min_value=1, max_value=2**63 - 1))
def test_every_size_reads_back_as_it_was_written(value):
    assert size("key", format_size(value)) == value


@given(st.text())
def test_any_text_is_a_duration_or_a_config_error(text):
    try:
        value = duration("key", text)
    except ConfigError:
        return
    assert value > timedelta(0)


def test_key_paths_read_as_people_write_them():
    assert dotted(("keep", "best", 0, "mode")) == "keep.best[0].mode"


def test_an_error_knows_its_key_from_the_top_and_survives_pickling():
    error = FieldError(("mode",), "no").under("keep", "best", 0)
    assert str(error) == "keep.best[0].mode: no"
    assert isinstance(error, ConfigError)
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_long_values_are_shortened_in_messages():
    assert len(shown("x" * 1000)) == 60


def test_a_suggestion_is_made_only_where_something_is_close():
    assert did_you_mean("kep", ["keep", "save"]) == "; did you mean keep?"
    assert did_you_mean("zzz", ["keep", "save"]) == ""
