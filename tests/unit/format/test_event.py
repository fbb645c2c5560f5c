"""One event as a line: whole or refused, of bounded length, whatever is in it."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError, FormatVersionError
from checkpointer.format import strict_json
from checkpointer.format.event import LINE_LIMIT, Event, Head, event_line, parse_line

NOON = datetime(2026, 1, 2, 12, tzinfo=timezone.utc)


def parse_event(line: bytes) -> Event:
    """The event of a line, which has no line break."""
    event = parse_line(line, "a line")
    assert isinstance(event, Event)
    return event


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
EVENTS = st.builds(
    Event,
    kind=st.text(min_size=1, max_size=20),
    time=st.integers(0, 200_000_000_000).map(lambda second: datetime.fromtimestamp(second, timezone.utc)),
    step=st.none() | st.integers(0, 2**63 - 1),
    id=st.none() | st.just("ab" * 16),
    reason=st.none() | st.text(min_size=1),
    metrics=st.dictionaries(st.text(), st.floats(), max_size=3),
    statistics=st.dictionaries(st.text(), JSON, max_size=3),
    details=st.dictionaries(st.text(), JSON, max_size=3),
)


@given(EVENTS)
def test_an_event_is_read_back_as_it_was_written(event: Event) -> None:
    line = event_line(event)
    assert line.count(b"\n") == 1
    assert line.isascii()
    again = parse_event(line.removesuffix(b"\n"))
    assert again.to_json() == event.to_json()


@given(EVENTS, st.data())
def test_a_line_that_was_cut_or_changed_is_refused(event: Event, data: st.DataObject) -> None:
    line = event_line(event).removesuffix(b"\n")
    cut = data.draw(st.integers(0, len(line) - 1))
    changed = bytearray(line)
    changed[cut] ^= data.draw(st.integers(1, 255))
    for broken in (line[:cut], line[cut + 1 :], bytes(changed)):
        with pytest.raises(CorruptCheckpointError):
            parse_event(broken)


@pytest.mark.parametrize("name", ["metrics", "statistics", "details", "reason"])
def test_what_is_too_long_is_left_out_and_that_is_said(name: str) -> None:
    values = {
        "metrics": {f"metric/{number}": number / 7 for number in range(1000)},
        "statistics": {"text": "x" * 10_000},
        "details": {"size": 5, "text": "x" * 10_000},
        "reason": "\U0001f600" * 1000,
    }
    line = event_line(Event(kind="commit", time=NOON, step=7, **{name: values[name]}))  # type: ignore[arg-type]
    assert len(line) <= LINE_LIMIT
    event = parse_event(line.removesuffix(b"\n"))
    assert (event.kind, event.step) == ("commit", 7)
    assert name in event.details["left_out"]


def test_a_reason_is_cut_at_a_thousand_characters() -> None:
    event = parse_event(event_line(Event(kind="damage", time=NOON, reason="y" * 5000))[:-1])
    assert event.reason == "y" * 1000 + "…"


def test_metrics_that_are_no_numbers_are_read_back() -> None:
    event = Event(kind="commit", time=NOON, metrics={"loss": math.nan, "best": -math.inf})
    again = parse_event(event_line(event)[:-1])
    assert math.isnan(again.metrics["loss"])
    assert again.metrics["best"] == -math.inf


def test_times_of_other_zones_are_written_in_utc() -> None:
    event = Event(kind="signal", time=NOON.astimezone(timezone(timedelta(hours=5))))
    assert parse_event(event_line(event)[:-1]).time.isoformat() == NOON.isoformat()
    with pytest.raises(ValueError, match="aware"):
        Event(kind="signal", time=NOON.replace(tzinfo=None))


GOOD: dict[str, Any] = {"kind": "commit", "time": NOON.isoformat()}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kind": "commit"},
        {"time": NOON.isoformat()},
        {**GOOD, "kind": ""},
        {**GOOD, "kind": "x" * 65},
        {**GOOD, "kind": 5},
        {**GOOD, "time": "yesterday"},
        {**GOOD, "time": "2026-01-02T12:00:00"},
        {**GOOD, "time": "0001-01-01T00:00:00+23:59"},
        {**GOOD, "time": 5},
        {**GOOD, "step": -1},
        {**GOOD, "step": True},
        {**GOOD, "step": 1.5},
        {**GOOD, "id": "../../etc"},
        {**GOOD, "reason": 5},
        {**GOOD, "metrics": {"loss": "low"}},
        {**GOOD, "metrics": []},
        {**GOOD, "details": 5},
        {**GOOD, "statistics": None},
    ],
)
def test_a_sealed_line_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError):
        parse_event(strict_json.seal_line(fields)[:-1])
    assert parse_event(strict_json.seal_line(GOOD)[:-1]).kind == "commit"


def test_members_and_kinds_of_newer_versions_are_read_over() -> None:
    line = strict_json.seal_line({**GOOD, "kind": "mirror", "lag": 5})
    assert parse_event(line[:-1]).kind == "mirror"


def test_the_first_line_tells_host_and_process_of_those_that_follow() -> None:
    head = parse_line(Head("node-7", 42).to_line()[:-1], "a line")
    assert head == Head("node-7", 42)
    event = parse_line(strict_json.seal_line(GOOD)[:-1], "a line", head)
    assert isinstance(event, Event)
    assert (event.host, event.pid) == ("node-7", 42)
    assert parse_line(strict_json.seal_line({"journal": 1})[:-1], "a line") == Head()
    with pytest.raises(FormatVersionError, match="version 2"):
        parse_line(strict_json.seal_line({"journal": 2})[:-1], "a line")
    with pytest.raises(CorruptCheckpointError):
        parse_line(strict_json.seal_line({"journal": 1, "host": 5})[:-1], "a line")
