"""When a save is due."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import ConfigError
from checkpointer.schedule import SavePolicy, due

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


def ask(policy, *, step=7, epoch=None, last_epoch=None, ago=timedelta(0), first=False):
    """What is due at noon when the newest commit was made ``ago``."""
    last_created = None if first else NOON - ago
    return due(policy, step=step, epoch=epoch, last_epoch=last_epoch, last_created=last_created, now=NOON)


def test_without_a_rule_every_call_is_due():
    assert ask(SavePolicy()) == ("every call",)


def test_a_signal_handler_is_not_a_rule():
    assert ask(SavePolicy(on_signal=["SIGTERM"])) == ("every call",)


@pytest.mark.parametrize("step, expected", [(0, True), (499, False), (500, True), (501, False), (1000, True)])
def test_every_n_steps_is_due_at_steps_that_n_divides(step, expected):
    assert bool(ask(SavePolicy(every_n_steps=500), step=step)) is expected


@pytest.mark.parametrize(
    "epoch, last_epoch, expected",
    [
        (0, None, True),
        (2, 1, True),
        (2, 0, True),
        (2, 2, False),  # already saved in this epoch
        (3, 2, False),  # 2 does not divide it
        (None, None, False),
        (None, 2, False),
        (2, 4, True),  # after a rollback
    ],
)
def test_every_n_epochs_is_due_once_in_each_epoch_that_n_divides(epoch, last_epoch, expected):
    assert bool(ask(SavePolicy(every_n_epochs=2), epoch=epoch, last_epoch=last_epoch)) is expected


@pytest.mark.parametrize("minutes, expected", [(0, False), (29.99, False), (30, True), (31, True), (100_000, True)])
def test_every_is_due_once_the_newest_commit_is_that_old(minutes, expected):
    assert bool(ask(SavePolicy(every="30min"), ago=timedelta(minutes=minutes))) is expected


def test_every_is_due_where_there_is_no_commit_yet():
    assert ask(SavePolicy(every="30min"), first=True) == ("every 30min: no commit yet",)


@pytest.mark.parametrize("minutes, expected", [(1, False), (29, False), (31, True), (60 * 24 * 365, True)])
def test_a_clock_that_was_set_back_does_not_stop_saving(minutes, expected):
    reasons = ask(SavePolicy(every="30min"), ago=-timedelta(minutes=minutes))
    assert bool(reasons) is expected
    assert all("set back" in reason for reason in reasons)


def test_every_rule_that_fires_gives_its_reason():
    policy = SavePolicy(every_n_steps=10, every_n_epochs=1, every="1h")
    reasons = ask(policy, step=20, epoch=3, last_epoch=2, ago=timedelta(hours=2))
    assert reasons == ("step divisible by 10", "epoch 3 divisible by 1", "every 1h")


def test_nothing_is_due_where_rules_are_set_and_none_fires():
    policy = SavePolicy(every_n_steps=10, every_n_epochs=1, every="1h")
    assert ask(policy, step=21, epoch=3, last_epoch=3) == ()


@given(
    every=st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=30)),
    jump=st.timedeltas(min_value=timedelta(days=-400), max_value=timedelta(days=400)),
)
def test_however_the_clock_jumps_a_save_becomes_due_within_twice_the_interval(every, jump):
    policy = SavePolicy(every=every)
    later = (NOON + passed for passed in (timedelta(0), every, 2 * every))
    assert any(due(policy, step=1, epoch=None, last_epoch=None, last_created=NOON + jump, now=now) for now in later)


def test_a_policy_takes_what_yaml_holds_and_keeps_it_parsed():
    policy = SavePolicy(every="30min", on_signal="SIGTERM")
    assert policy == SavePolicy(every=timedelta(minutes=30), on_signal=("SIGTERM",))
    assert policy.every == timedelta(minutes=30)
    assert policy.on_signal == ("SIGTERM",)


def test_a_signal_named_twice_is_handled_once():
    assert SavePolicy(on_signal=["SIGTERM", "SIGINT", "SIGTERM"]).on_signal == ("SIGTERM", "SIGINT")


@pytest.mark.parametrize(
    "signals, message",
    [
        ("TERM", "on_signal: this system has no signal 'TERM'; did you mean SIGTERM?"),
        (["sigusr1"], "on_signal[0]: this system has no signal 'sigusr1'; did you mean SIGUSR1?"),
        (["SIGTERM", "SIG_DFL"], r"on_signal[1]: this system has no signal 'SIG_DFL'"),
        ("SIGKILL", "on_signal: SIGKILL cannot be handled"),
        ("SIGSEGV", "on_signal: SIGSEGV cannot be handled"),
        ([15], "on_signal[0]: must be the name of a signal such as SIGTERM, got 15"),
        (15, "on_signal: must be a list of signal names such as [SIGTERM], got 15"),
        ({"SIGTERM": 1}, "on_signal: must be a list"),
    ],
)
def test_what_is_no_signal_that_can_be_handled_is_refused(signals, message):
    with pytest.raises(ConfigError) as caught:
        SavePolicy(on_signal=signals)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("key", ["every_n_steps", "every_n_epochs", "every"])
@pytest.mark.parametrize("value", [0, -1, True, "x", [1], 1.5])
def test_a_rule_that_makes_no_sense_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        SavePolicy(**{key: value})


def test_a_policy_cannot_be_changed():
    policy: Any = SavePolicy()
    with pytest.raises(AttributeError):
        policy.every = None
