"""What retention keeps, what it removes, and why."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer.errors import ConfigError
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.retention import BestRule, KeepPolicy, physical_size, plan, rank

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)


def checkpoint(step, *, sequence=None, hours_ago=None, **fields):
    """A checkpoint of one byte whose sequence follows its step, made an hour before the next hundred steps."""
    sequence = step if sequence is None else sequence
    hours_ago = 1000 - sequence / 100 if hours_ago is None else hours_ago
    fields = {"size": 1, "id": f"{sequence:032x}", "path": f"checkpoint-{step}", **fields}
    return CheckpointInfo(step=step, sequence=sequence, created=NOW - hours_ago * HOUR, **fields)


def run(*steps, **fields):
    return [checkpoint(step, **fields) for step in steps]


def steps(decisions):
    return [info.step for info, _ in decisions]


def kept(checkpoints, protect=(), **rules):
    """The steps that stay."""
    return steps(plan(checkpoints, KeepPolicy(**rules), now=NOW, protect=protect).keep)


def reasons_for(step, checkpoints, protect=(), **rules):
    result = plan(checkpoints, KeepPolicy(**rules), now=NOW, protect=protect)
    (found,) = (reasons for info, reasons in result.keep + result.remove if info.step == step)
    return found


# The rules


def test_without_a_rule_everything_stays():
    checkpoints = [*run(100, 200), checkpoint(300, finite=False), checkpoint(400, damaged="hash")]
    assert kept(checkpoints) == [100, 200, 300, 400]
    assert reasons_for(100, checkpoints) == ("no retention rule set",)


def test_no_checkpoints_give_an_empty_plan():
    result = plan([], KeepPolicy(last=1, max_size=1), now=NOW)
    assert (result.keep, result.remove) == ([], [])
    assert str(result) == "no checkpoints"


def test_last_keeps_the_newest_commits():
    assert kept(run(100, 200, 300, 400), last=2) == [300, 400]


def test_last_may_ask_for_more_than_there_are():
    assert kept(run(100, 200), last=5) == [100, 200]


def test_newest_means_committed_last_not_the_highest_step():
    rollback = [*run(100, 200, 300), checkpoint(150, sequence=400), checkpoint(160, sequence=500)]
    assert kept(rollback, last=2) == [150, 160]


def test_modification_dates_do_not_decide_which_is_newest():
    checkpoints = [checkpoint(100, hours_ago=1), checkpoint(200, hours_ago=50)]
    assert kept(checkpoints, last=1) == [200]


def test_a_checkpoint_stays_if_any_rule_keeps_it():
    assert kept(run(100, 150, 200, 250, 300), last=1, every_n_steps=100) == [100, 200, 300]


def test_every_n_steps_keeps_steps_that_n_divides():
    assert kept(run(0, 100, 150, 200, 250), every_n_steps=100) == [0, 100, 200, 250]


def test_best_keeps_the_lowest_values_of_a_loss():
    losses = {100: 0.5, 200: 0.1, 300: 0.3, 400: 0.9}
    checkpoints = [checkpoint(step, metrics={"loss": value}) for step, value in losses.items()]
    assert kept(checkpoints, best={"k": 2, "monitor": "loss"}) == [200, 300, 400]


def test_best_keeps_the_highest_values_where_the_mode_is_max():
    scores = {100: 0.5, 200: 0.9, 300: 0.3, 400: 0.1}
    checkpoints = [checkpoint(step, metrics={"acc": value}) for step, value in scores.items()]
    assert kept(checkpoints, best={"monitor": "acc", "mode": "max"}) == [200, 400]


def test_ties_for_the_best_go_to_the_later_commit():
    checkpoints = [checkpoint(step, metrics={"loss": 0.5}) for step in (100, 200, 300)] + run(400)
    assert kept(checkpoints, best={"monitor": "loss"}) == [300, 400]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "0.1", 10**400])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_not_a_finite_number_is_never_best(value, mode):
    checkpoints = [checkpoint(100, metrics={"loss": 0.5}), checkpoint(200, metrics={"loss": value}), *run(300)]
    assert kept(checkpoints, best={"monitor": "loss", "mode": mode}) == [100, 300]


def test_several_best_rules_each_keep_their_own():
    checkpoints = [
        checkpoint(100, metrics={"loss": 0.1, "acc": 0.5}),
        checkpoint(200, metrics={"loss": 0.2, "acc": 0.9}),
        checkpoint(300, metrics={"loss": 0.3, "acc": 0.7}),
        *run(400),
    ]
    rules = [{"monitor": "loss"}, BestRule(monitor="acc", mode="max")]
    assert kept(checkpoints, best=rules) == [100, 200, 400]


def test_every_keeps_the_first_and_then_each_that_is_far_enough_from_the_last_one_kept():
    ages = {0: 30, 1: 29, 2: 19, 3: 17, 4: 7.5, 5: 7, 6: 1}
    checkpoints = [checkpoint(step, hours_ago=age) for step, age in ages.items()]
    assert kept(checkpoints, every="10h") == [0, 2, 4, 6]


def test_every_goes_on_after_the_clock_was_set_back():
    ages = {0: 2, 1: 1, 2: 5000, 3: 4995, 4: 4989, 5: 4988}
    checkpoints = [checkpoint(step, hours_ago=age) for step, age in ages.items()]
    assert kept(checkpoints, every="10h") == [0, 2, 4, 5]


def test_within_keeps_what_is_younger():
    checkpoints = [checkpoint(1, hours_ago=25), checkpoint(2, hours_ago=24), checkpoint(3, hours_ago=23.9)]
    assert kept([*checkpoints, checkpoint(4, hours_ago=100)], within="1d") == [3, 4]


def test_within_takes_a_date_in_the_future_for_young():
    assert kept([checkpoint(1, hours_ago=-900), checkpoint(2, hours_ago=100)], within="1d") == [1, 2]


# What is never removed


def test_the_newest_commit_stays_even_with_nan_and_so_does_the_newest_finite_one():
    checkpoints = [*run(100, 200), checkpoint(300, finite=False), checkpoint(400, finite=False)]
    assert kept(checkpoints, every_n_steps=1000) == [200, 400]
    assert reasons_for(200, checkpoints, every_n_steps=1000) == ("newest finite commit",)
    assert reasons_for(400, checkpoints, every_n_steps=1000) == ("newest commit",)


def test_a_damaged_newest_one_does_not_stand_in_for_an_intact_one():
    checkpoints = [*run(100, 200), checkpoint(300, damaged="hash")]
    assert kept(checkpoints, every_n_steps=1000) == [200, 300]


def test_a_checkpoint_whose_values_were_not_examined_counts_as_finite():
    assert kept([checkpoint(100, finite=True), checkpoint(200, finite=None)], every_n_steps=1000) == [200]


def test_a_pinned_checkpoint_stays_even_with_nan():
    checkpoints = [checkpoint(100, pinned=True), checkpoint(200, pinned=True, finite=False), *run(300, 400)]
    assert kept(checkpoints, last=1, max_size=1) == [100, 200, 400]
    assert reasons_for(100, checkpoints, last=1) == ("pinned",)


def test_the_one_restored_from_stays_while_it_is_protected():
    checkpoints = run(100, 200, 300)
    assert kept(checkpoints, last=1, max_size=1, protect=[checkpoints[0].id]) == [100, 300]
    assert reasons_for(100, checkpoints, last=1, protect={checkpoints[0].id}) == ("restored from",)
    assert kept(checkpoints, last=1) == [300]


def test_damaged_checkpoints_are_never_removed_and_take_no_place():
    checkpoints = [*run(100, 200), checkpoint(300, damaged="hash"), *run(400), checkpoint(500, damaged="size")]
    assert kept(checkpoints, last=2) == [200, 300, 400, 500]
    assert reasons_for(300, checkpoints, last=2) == ("damaged: never removed automatically",)


def test_checkpoints_with_nan_take_no_place_and_go():
    checkpoints = [*run(100, 200), *run(300, 400, finite=False), *run(500)]
    assert kept(checkpoints, last=2) == [200, 500]
    assert reasons_for(300, checkpoints, last=2) == ("holds NaN or infinity: no rule counts it",)


def test_a_checkpoint_with_nan_is_not_best_whatever_its_metric_says():
    checkpoints = [
        checkpoint(100, metrics={"loss": 0.5}),
        checkpoint(200, metrics={"loss": 0.0}, finite=False),
        checkpoint(300, metrics={"loss": 0.0}, damaged="hash"),
        *run(400),
    ]
    assert kept(checkpoints, best={"monitor": "loss"}) == [100, 300, 400]


def test_every_does_not_count_from_a_checkpoint_with_nan():
    checkpoints = [checkpoint(1, hours_ago=30, finite=False), checkpoint(2, hours_ago=25), checkpoint(3, hours_ago=1)]
    assert kept(checkpoints, every="12h") == [2, 3]


# The budget


def test_over_the_budget_the_oldest_go_first():
    checkpoints = run(100, 200, 300, 400, size=10)
    assert kept(checkpoints, last=4, max_size=25) == [300, 400]
    assert reasons_for(100, checkpoints, last=4, max_size=25) == ("over max_size 25B",)


def test_what_fits_the_budget_exactly_stays():
    assert kept(run(100, 200, 300, size=10), last=3, max_size=30) == [100, 200, 300]


def test_a_budget_alone_removes_only_what_does_not_fit():
    checkpoints = run(100, 200, 300, size=10)
    assert kept(checkpoints, max_size=20) == [200, 300]
    assert reasons_for(200, checkpoints, max_size=20) == ("no retention rule set",)


def test_the_budget_never_takes_what_is_needed():
    checkpoints = [
        checkpoint(100, size=10, metrics={"loss": 0.1}),
        checkpoint(200, size=10, metrics={"loss": 0.2}),
        checkpoint(300, size=10, pinned=True),
        checkpoint(400, size=10),
        checkpoint(500, size=10),
    ]
    assert kept(checkpoints, last=5, best={"k": 2, "monitor": "loss"}, max_size=1) == [100, 300, 500]


def test_damaged_checkpoints_do_not_count_against_the_budget():
    checkpoints = [checkpoint(100, size=1000, damaged="hash"), *run(200, 300, size=10)]
    assert kept(checkpoints, last=2, max_size=20) == [100, 200, 300]


def test_with_a_budget_alone_checkpoints_with_nan_go_before_good_ones():
    checkpoints = [*run(100, 200, size=10), *run(300, 400, 500, size=10, finite=False)]
    assert kept(checkpoints, max_size=30) == [100, 200, 500]


def test_a_newest_checkpoint_with_nan_pushes_no_good_one_out_of_the_budget():
    checkpoints = [*run(100, 200, size=10), checkpoint(300, size=10, finite=False)]
    assert kept(checkpoints, last=2, max_size=20) == [100, 200, 300]


def lora(step, *, origin, **fields):
    """A checkpoint of 1 byte of its own, and 100 that it shares with all of the same ``origin``."""
    return checkpoint(step, size=101, copies={f"{origin}/model": 100, f"{step}/optimizer": 1}, **fields)


def test_a_shared_copy_counts_once_against_the_budget():
    checkpoints = [lora(step, origin="a") for step in (100, 200, 300, 400)]
    assert physical_size(checkpoints) == 104
    assert kept(checkpoints, max_size=104) == [100, 200, 300, 400]
    assert kept(checkpoints, max_size=103) == [200, 300, 400]


def test_removing_one_of_several_that_share_a_copy_frees_only_what_is_its_own():
    checkpoints = [*(lora(step, origin="a") for step in (100, 200)), *(lora(step, origin="b") for step in (300, 400))]
    assert kept(checkpoints, max_size=203) == [200, 300, 400]
    assert kept(checkpoints, max_size=202) == [300, 400]
    assert kept(checkpoints, max_size=102) == [300, 400]
    assert kept(checkpoints, max_size=101) == [400]


def test_a_copy_that_a_protected_checkpoint_lies_on_is_not_freed():
    checkpoints = [lora(100, origin="a", pinned=True), *(lora(step, origin="a") for step in (200, 300, 400))]
    assert kept(checkpoints, max_size=103) == [100, 300, 400]
    assert kept(checkpoints, max_size=1) == [100, 400]


def test_the_plan_knows_how_many_bytes_removing_frees():
    checkpoints = [lora(step, origin=origin) for step, origin in ((100, "a"), (200, "b"), (300, "b"))]
    assert plan(checkpoints, KeepPolicy(last=1), now=NOW).freed == 102
    assert plan(checkpoints, KeepPolicy(), now=NOW).freed == 0
    assert plan(run(100, 200, 300, size=10), KeepPolicy(last=1), now=NOW).freed == 20


def test_the_plan_goes_on_until_planning_again_would_change_nothing():
    # 0 and 12 do not fit. Without them, `every` starts at 20, which is the best one, and 24 is too close to it.
    checkpoints = [
        checkpoint(step, hours_ago=100 - step, size=10, metrics={"loss": 0.1} if step == 20 else {})
        for step in (0, 12, 20, 24, 40)
    ]
    rules = {"every": "12h", "best": {"monitor": "loss"}, "max_size": 30}
    assert kept(checkpoints, **rules) == [20, 40]
    assert reasons_for(12, checkpoints, **rules) == ("over max_size 30B",)
    assert reasons_for(24, checkpoints, **rules) == ("no rule keeps it", "no finite loss reported")


# The plan


def test_the_plan_prints_one_line_for_each_checkpoint_in_commit_order():
    checkpoints = [
        checkpoint(500, metrics={"val_loss": 0.123}),
        checkpoint(1000, metrics={"val_loss": 0.5}),
        checkpoint(1500, metrics={"val_loss": math.nan}, finite=False),
        checkpoint(2000, pinned=True),
        checkpoint(2500, damaged="model.safetensors: hash differs"),
        checkpoint(2600, metrics={"val_loss": 0.25}, hours_ago=3),
    ]
    policy = KeepPolicy(last=1, best={"k": 2, "monitor": "val_loss"}, every_n_steps=2000, within="2d", max_size="500GB")
    assert str(plan(checkpoints, policy, now=NOW)).splitlines() == [
        "keep    step  500  best 2 by val_loss (min): 0.123",
        "remove  step 1000  no rule keeps it",
        "remove  step 1500  holds NaN or infinity: no rule counts it",
        "keep    step 2000  pinned, step divisible by 2000",
        "keep    step 2500  damaged: never removed automatically",
        "keep    step 2600  newest commit, last 1, best 2 by val_loss (min): 0.25, within 2d",
    ]


def test_a_misspelled_monitor_is_named_in_the_reasons():
    checkpoints = [checkpoint(100, metrics={"val_loss": 0.1}), *run(200)]
    assert reasons_for(100, checkpoints, last=1, best={"monitor": "val_los", "mode": "min"}) == (
        "no rule keeps it",
        "no finite val_los reported",
    )


def test_a_checkpoint_listed_twice_takes_one_place():
    checkpoints = run(100, 200, 300)
    result = plan(checkpoints + checkpoints, KeepPolicy(last=2), now=NOW)
    assert (steps(result.keep), steps(result.remove)) == ([200, 300], [100])


@pytest.mark.parametrize("flip", [False, True])
def test_of_two_listings_that_disagree_the_one_with_the_pin_stands(flip):
    before, after = checkpoint(100), checkpoint(100, pinned=True)
    twice = [after, before] if flip else [before, after]
    assert kept([*twice, *run(200)], last=1) == [100, 200]


def test_checkpoints_that_share_a_sequence_are_told_apart():
    made_up = [CheckpointInfo(step=step) for step in (3, 1, 2)]
    assert kept(made_up, last=2) == [2, 3]


def test_rank_lists_usable_checkpoints_best_first():
    checkpoints = [
        checkpoint(100, metrics={"loss": 0.5}),
        checkpoint(200, metrics={"loss": 0.1}),
        checkpoint(300, metrics={"loss": 0.5}),
        checkpoint(400, metrics={"loss": 0.0}, finite=False),
        checkpoint(500, metrics={"loss": math.nan}),
    ]
    assert [info.step for info in rank(reversed(checkpoints), BestRule(monitor="loss"))] == [200, 300, 100]
    assert [info.step for info in rank(checkpoints, BestRule(monitor="loss", mode="max"))] == [300, 100, 200]


# The policy


def test_a_policy_takes_what_yaml_holds_and_keeps_it_parsed():
    policy = KeepPolicy(best=[{"k": 2, "monitor": "acc", "mode": "max"}], every="12h", within="2d", max_size="500GB")
    assert policy.best == (BestRule(k=2, monitor="acc", mode="max"),)
    assert policy.every == timedelta(hours=12)
    assert policy.within == timedelta(days=2)
    assert policy.max_size == 500 * 10**9
    assert replace(policy, last=3).best == policy.best


@pytest.mark.parametrize("best", [None, [], ()])
def test_no_best_rule_is_an_empty_tuple(best):
    assert KeepPolicy(best=best).best == ()
    assert not KeepPolicy(best=best).has_rules


@pytest.mark.parametrize("rule", [{"last": 1}, {"best": {"monitor": "loss"}}, {"every_n_steps": 1}, {"every": "1s"}])
def test_any_rule_makes_a_policy_remove(rule):
    assert KeepPolicy(**rule).has_rules
    assert not KeepPolicy(max_size=1).has_rules


@pytest.mark.parametrize("key", ["last", "every_n_steps", "every", "within", "max_size"])
@pytest.mark.parametrize("value", [0, -1, True, False, "x", [1], 1.5])
def test_a_rule_that_makes_no_sense_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        KeepPolicy(**{key: value})


@pytest.mark.parametrize("key", ["last", "every_n_steps", "max_size"])
def test_zero_is_refused_with_the_reason_and_the_way_out(key):
    rules: dict[str, Any] = {key: 0}
    with pytest.raises(ConfigError, match=r"frameworks disagree on its meaning.*leave the rule out"):
        KeepPolicy(**rules)


@pytest.mark.parametrize(
    "best, message",
    [
        ("val_loss", "best: must look like {k: 2, monitor: val_loss, mode: min}, got 'val_loss'"),
        (["val_loss"], "best[0]: must look like"),
        ({"k": 2}, "best.monitor: must name a metric"),
        ({"monitor": ""}, "best.monitor: must name a metric"),
        ({"monitor": "a\nb"}, "best.monitor: must name a metric"),
        ({"monitor": "x", "k": 0}, "best.k: 0 is refused"),
        ({"monitor": "x", "k": None}, "best.k: must be a whole number, got null"),
        ({"monitor": "x", "mod": "min"}, "best.mod: unknown key; did you mean mode? (known: monitor, k, mode)"),
        ([{"monitor": "loss"}, {"monitor": "x", "mode": "mni"}], "best[1].mode: must be one of min, max, got 'mni'"),
        ({"monitor": "x", "mode": None}, "best.mode: is missing, and the name 'x' does not say it: write mode: min"),
    ],
)
def test_a_best_rule_that_makes_no_sense_is_refused_by_its_key(best, message):
    with pytest.raises(ConfigError) as caught:
        KeepPolicy(best=best)
    assert str(caught.value).startswith(message)


# Properties


@st.composite
def checkpoints_in_any_order(draw):
    """Up to 12 checkpoints of every kind, with clocks that jump, equal metrics, steps that repeat, and shared files."""
    result = []
    sizes = draw(st.lists(st.integers(0, 20), min_size=3, max_size=3))
    for sequence in draw(st.lists(st.integers(1, 40), unique=True, max_size=12)):
        info = CheckpointInfo(
            step=draw(st.integers(0, 12)) * 5,
            sequence=sequence,
            id=f"{sequence:032x}",
            path=f"p{sequence}",
            created=NOW + draw(st.integers(-60, 20)) * HOUR,
            metrics=draw(
                st.dictionaries(
                    st.sampled_from(["loss", "acc"]), st.sampled_from([0.1, 0.2, 0.3, math.nan, math.inf, -math.inf])
                )
            ),
            pinned=draw(st.sampled_from([False, False, False, True])),
            finite=draw(st.sampled_from([True, True, None, False])),
            damaged=draw(st.sampled_from([None, None, None, "hash differs"])),
            size=draw(st.integers(0, 10)),
        )
        shared = draw(st.sets(st.integers(0, 2)))
        if shared:
            copies = {f"{sequence}": info.size, **{f"shared {number}": sizes[number] for number in shared}}
            info = replace(info, size=sum(copies.values()), copies=copies)
        result.append(info)
    return result


best_rules = st.builds(
    BestRule, k=st.integers(1, 3), monitor=st.sampled_from(["loss", "acc"]), mode=st.sampled_from(["min", "max"])
)
hours = st.integers(1, 40).map(lambda n: n * HOUR)
policies = st.builds(
    KeepPolicy,
    last=st.none() | st.integers(1, 5),
    best=st.lists(best_rules, max_size=2),
    every_n_steps=st.none() | st.sampled_from([1, 10, 20]),
    every=st.none() | hours,
    within=st.none() | hours,
    max_size=st.none() | st.integers(1, 60),
)
protections = st.sets(st.integers(1, 40).map(lambda sequence: f"{sequence:032x}"), max_size=2)
many = settings(max_examples=100, deadline=None)


def ids(decisions):
    return [info.id for info, _ in decisions]


def needed(checkpoints, policy, protect):
    """Ids of what must never be removed, worked out in the plainest way."""
    by_sequence = sorted(checkpoints, key=lambda info: info.sequence)
    result = {info.id for info in checkpoints if info.pinned or info.damaged is not None or info.id in protect}
    result |= {info.id for info in [i for i in by_sequence if i.damaged is None][-1:]}
    usable = [info for info in by_sequence if info.damaged is None and info.finite is not False]
    result |= {info.id for info in usable[-1:]}
    for rule in policy.best:
        best = None
        for info in usable:
            value = info.metrics.get(rule.monitor, math.nan)
            at_least = best is None or (value <= best[0] if rule.mode == "min" else value >= best[0])
            if math.isfinite(value) and at_least:
                best = (value, info.id)
        result |= {best[1]} if best else set()
    return result


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_the_newest_pinned_best_damaged_and_protected_are_never_removed(checkpoints, policy, protect):
    removed = ids(plan(checkpoints, policy, now=NOW, protect=protect).remove)
    assert not needed(checkpoints, policy, protect) & set(removed)


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_each_checkpoint_is_either_kept_or_removed_with_a_reason_in_commit_order(checkpoints, policy, protect):
    result = plan(checkpoints, policy, now=NOW, protect=protect)
    assert sorted(ids(result.keep) + ids(result.remove)) == sorted(info.id for info in checkpoints)
    for decisions in (result.keep, result.remove):
        assert [info.sequence for info, _ in decisions] == sorted(info.sequence for info, _ in decisions)
        assert all(reasons and all(reason.isprintable() for reason in reasons) for _, reasons in decisions)
    assert len(str(result).splitlines()) == max(1, len(checkpoints))


@many
@given(checkpoints_in_any_order().flatmap(lambda found: st.tuples(st.just(found), st.permutations(found))), policies)
def test_the_order_of_the_input_does_not_matter(orders, policy):
    one, other = (plan(order, policy, now=NOW) for order in orders)
    assert one == other
    assert str(one) == str(other)


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_pruning_twice_changes_nothing(checkpoints, policy, protect):
    once = plan(checkpoints, policy, now=NOW, protect=protect)
    again = plan([info for info, _ in once.keep], policy, now=NOW, protect=protect)
    assert again.remove == []
    assert again.keep == once.keep


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_damaged_and_nonfinite_checkpoints_never_push_out_good_ones(checkpoints, policy, protect):
    good = [info for info in checkpoints if info.usable]
    with_the_bad = plan(checkpoints, policy, now=NOW, protect=protect)
    without = plan(good, policy, now=NOW, protect=protect)
    assert [info.id for info, _ in with_the_bad.keep if info.usable] == ids(without.keep)


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_the_budget_is_kept_unless_only_protected_checkpoints_remain(checkpoints, policy, protect):
    keep = [info for info, _ in plan(checkpoints, policy, now=NOW, protect=protect).keep]
    if policy.max_size is None:
        return
    fixed = needed(checkpoints, policy, protect)
    intact = [info for info in keep if info.damaged is None]
    usable = [info for info in keep if info.usable]
    assert taken(usable) <= policy.max_size or {info.id for info in usable} <= fixed
    with_nan = {info.id for info in intact if not info.usable}
    assert taken(intact) <= policy.max_size or with_nan <= fixed


def taken(checkpoints):
    """Bytes on disk, worked out in the plainest way."""
    copies = {pair for info in checkpoints for pair in (info.copies or {info.id: info.size}).items()}
    return sum(size for _, size in copies)


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_the_budget_removes_no_more_than_it_has_to(checkpoints, policy, protect):
    """The newest that went because of the budget would not have fitted beside those that stayed."""
    result = plan(checkpoints, policy, now=NOW, protect=protect)
    over = [info for info, reasons in result.remove if "over max_size" in reasons[0]]
    without_rules = not policy.has_rules  # with rules, what stayed may have shrunk since
    for usable in (True, False):
        gone = [info for info in over if info.usable is usable]
        beside = [info for info, _ in result.keep if info.damaged is None and (info.usable or not usable)]
        if gone and without_rules and all(info.usable is usable for info in over):
            assert taken([*beside, gone[-1]]) > policy.max_size


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_what_is_freed_is_what_the_rest_does_not_need(checkpoints, policy, protect):
    result = plan(checkpoints, policy, now=NOW, protect=protect)
    assert result.freed == taken(checkpoints) - taken([info for info, _ in result.keep])
    assert physical_size(checkpoints) == taken(checkpoints)


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_sharing_never_makes_the_budget_remove_more(checkpoints, policy, protect):
    """Up to the rules: a budget alone keeps everything that it would keep if each checkpoint had copies of its own."""
    alone = KeepPolicy(max_size=policy.max_size)
    apart = [replace(info, copies={}) for info in checkpoints]
    shared, separate = (plan(infos, alone, now=NOW, protect=protect) for infos in (checkpoints, apart))
    assert set(ids(separate.keep)) <= set(ids(shared.keep))


@many
@given(checkpoints_in_any_order(), policies)
def test_without_a_budget_more_rules_never_remove_more(checkpoints, policy):
    plain = replace(policy, max_size=None)
    if not (plain.last or plain.every_n_steps or plain.every or plain.within):
        return  # no rule keeps everything, and so do `best` rules alone whose metric nobody has reported
    wider = replace(plain, last=(plain.last or 0) + 1)
    assert set(ids(plan(checkpoints, plain, now=NOW).keep)) <= set(ids(plan(checkpoints, wider, now=NOW).keep))


@many
@given(checkpoints_in_any_order(), policies, protections)
def test_what_cannot_be_removed_stays_and_costs_no_other_its_place_in_the_budget(checkpoints, policy, ids_stuck):
    stuck = dict.fromkeys(ids_stuck, "immutable")
    removed = set(ids(plan(checkpoints, policy, now=NOW, stuck=stuck).remove))
    assert not removed & ids_stuck
    alone = KeepPolicy(max_size=policy.max_size)
    others = [info for info in checkpoints if info.id not in ids_stuck and info.copies == {}]
    newest = [info for info in others if info.sequence == max(item.sequence for item in checkpoints)]
    if newest and newest[0].usable:  # what is protected is the same with and without them
        with_stuck = plan([*others, *(i for i in checkpoints if i.id in ids_stuck)], alone, now=NOW, stuck=stuck)
        without = plan(others, alone, now=NOW)
        assert set(ids(with_stuck.remove)) == set(ids(without.remove))


@many
@given(checkpoints_in_any_order(), policies)
def test_checkpoints_with_nan_stay_only_where_something_protects_them(checkpoints, policy):
    if not policy.has_rules:
        return
    keep = plan(checkpoints, policy, now=NOW).keep
    assert {info.id for info, _ in keep if not info.usable} <= needed(checkpoints, policy, ())
