"""When a save is due."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import ConfigError
from checkpointer.policy.cost import SaveCost
from checkpointer.policy.schedule import RECENT, Interval, SavePolicy, choose_interval, due

NOON = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


def ask(policy, *, step=7, epoch=None, last_epoch=None, ago=timedelta(0), first=False, **measured):
    """What is due at noon when the newest commit was made ``ago``."""
    last_created = None if first else NOON - ago
    return due(policy, step=step, epoch=epoch, last_epoch=last_epoch, last_created=last_created, now=NOON, **measured)


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


# The interval that is measured


def cost(stall=1.0, write=10.0, wait=0.0, mode="async"):
    return SaveCost(mode=mode, wait=wait, stall=stall, write=write)


def choose(*costs, max_overhead=0.01, mtbf=timedelta(hours=12)):
    return choose_interval(costs, max_overhead=max_overhead, mtbf=mtbf)


def test_the_interval_is_that_of_young_and_daly():
    chosen = choose(cost(stall=2.0), mtbf=timedelta(days=1))
    assert chosen.every.total_seconds() == pytest.approx((2 * 2.0 * 86400) ** 0.5, abs=1e-6)
    assert chosen.reason == "every 9.8min: saves hold training for 2s; best for a failure every 1d"


def test_saves_take_no_more_of_the_time_than_max_overhead():
    chosen = choose(cost(stall=20.0), mtbf=timedelta(hours=1))
    assert chosen.every == timedelta(seconds=2000)
    assert chosen.reason == "every 33.3min: saves hold training for 20s; so that they take no more than 1% of the time"


def test_the_next_save_does_not_begin_before_the_last_is_durable():
    chosen = choose(cost(stall=0.001, write=300.0))
    assert chosen.every == timedelta(seconds=300.001)
    assert chosen.reason == "every 5min: saves hold training for 1ms; the 5min until they are durable"


def test_in_sync_mode_the_stall_includes_the_writing():
    chosen = choose(cost(stall=400.0, write=399.0, mode="sync"), max_overhead=0.9, mtbf=timedelta(minutes=1))
    assert chosen.every.total_seconds() == pytest.approx(400 / 0.9)


def test_the_time_that_a_save_waited_for_the_one_before_counts_as_its_cost():
    assert choose(cost(stall=1.0, wait=3.0)) == choose(cost(stall=4.0, write=7.0))


def test_without_a_measured_save_there_is_no_interval():
    assert choose() is None
    assert choose(SaveCost(), SaveCost(write=3.0)) is None


def test_one_slow_save_changes_nothing():
    usual = [cost() for _ in range(RECENT - 1)]
    assert choose(cost(stall=100.0), *usual) == choose(*usual, cost(stall=100.0)) == choose(*usual)


def test_old_saves_are_forgotten():
    slow, fast = [cost(stall=100.0)] * 20, [cost(stall=0.1)] * RECENT
    assert choose(*slow, *fast) == choose(*fast)


def test_saves_whose_cost_is_unknown_do_not_count():
    assert choose(cost(), *[SaveCost()] * 20) == choose(cost())


seconds = st.floats(0, 1e9)
costs = st.lists(
    st.builds(
        SaveCost,
        mode=st.sampled_from([None, "sync", "async", "lazy"]),
        wait=st.none() | seconds,
        stall=st.none() | seconds,
        write=st.none() | seconds,
    ),
    max_size=8,
)
fractions = st.floats(1e-6, 1, exclude_max=True)
failures = st.timedeltas(min_value=timedelta(seconds=1), max_value=timedelta(days=10_000))


@given(costs, fractions, failures)
def test_the_interval_respects_every_bound_and_is_one_of_the_three(costs, max_overhead, mtbf):
    chosen = choose_interval(costs, max_overhead=max_overhead, mtbf=mtbf)
    known = [cost for cost in costs if cost.to_training is not None][-RECENT:]
    if not known:
        assert chosen is None
        return
    stall = sorted(cost.to_training for cost in known)[len(known) // 2]
    durable = sorted(cost.to_durable or 0.0 for cost in known)[len(known) // 2]
    young = (2 * stall * mtbf.total_seconds()) ** 0.5
    every = chosen.every.total_seconds()
    if chosen.every == timedelta(days=36_500):  # what would exceed it exceeds every run
        return
    assert every * max_overhead >= stall * (1 - 1e-9)
    assert every >= durable * (1 - 1e-9)
    assert every >= young * (1 - 1e-9)
    assert every == pytest.approx(max(stall / max_overhead, durable, young), rel=1e-9, abs=2e-6)


@given(costs, st.floats(0, 1e6), fractions, failures)
def test_saves_that_cost_more_are_never_made_more_often(costs, more, max_overhead, mtbf):
    dearer = [
        SaveCost(
            mode=cost.mode, wait=cost.wait, stall=None if cost.stall is None else cost.stall + more, write=cost.write
        )
        for cost in costs
    ]
    chosen = choose_interval(costs, max_overhead=max_overhead, mtbf=mtbf)
    if chosen is not None:
        assert choose_interval(dearer, max_overhead=max_overhead, mtbf=mtbf).every >= chosen.every


def test_auto_is_due_at_once_while_no_save_has_been_measured():
    assert ask(SavePolicy(every="auto")) == ("every auto: no save has been measured yet",)
    assert ask(SavePolicy(every="auto"), first=True) == ("every auto: no save has been measured yet",)


@pytest.mark.parametrize("interval", [None, Interval(timedelta(seconds=1), "")])
def test_auto_is_not_due_while_a_save_is_being_written(interval):
    assert not ask(SavePolicy(every="auto"), ago=timedelta(hours=1), interval=interval, writing=True)


@pytest.mark.parametrize(
    "minutes, expected", [(0, False), (9, False), (10, True), (100, True), (-9, False), (-11, True)]
)
def test_auto_is_due_once_the_newest_commit_is_as_old_as_the_interval(minutes, expected):
    interval = Interval(timedelta(minutes=10), "every 10min: …")
    reasons = ask(SavePolicy(every="auto"), ago=timedelta(minutes=minutes), interval=interval)
    assert reasons == (("auto: every 10min: …",) if expected else ())


def test_auto_has_defaults_for_what_it_is_not_told():
    policy = SavePolicy(every="auto")
    assert (policy.max_overhead, policy.mtbf) == (0.01, timedelta(hours=12))
    assert SavePolicy(every="auto", max_overhead="2%", mtbf="1d").max_overhead == 0.02


@pytest.mark.parametrize("key, value", [("max_overhead", "1%"), ("mtbf", "12h")])
@pytest.mark.parametrize("every", [None, "30min"])
def test_what_belongs_to_auto_is_refused_without_it(key, value, every):
    with pytest.raises(
        ConfigError, match=f"^{key}: has a meaning only for an interval that is measured: add every: auto"
    ):
        SavePolicy(every=every, **{key: value})


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


def test_a_deadline_is_a_time_after_a_signal():
    assert SavePolicy(on_signal="SIGTERM", deadline="30s").deadline == timedelta(seconds=30)
    with pytest.raises(ConfigError, match=r"deadline: counts from a signal: add on_signal: \[SIGTERM\]"):
        SavePolicy(deadline="30s")
    with pytest.raises(ConfigError, match="deadline: must be"):
        SavePolicy(on_signal="SIGTERM", deadline="soon")
