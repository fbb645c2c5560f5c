"""``keep: best`` by a metric: which direction is better, and what if the metric never comes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.config.settings import Config
from checkpointer.errors import CheckpointerWarning, ConfigError
from checkpointer.policy.monitoring import mode_by_name, nearest_name, resolve_mode
from checkpointer.policy.retention import BestRule, KeepPolicy, doubts, plan
from tests.conftest import Root
from tests.unit.policy.test_retention import NOW, checkpoint, run, steps

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
LOWEST = {"monitor": "val_loss"}


def manager(root: Root, **config: Any) -> CheckpointManager:
    return CheckpointManager(root.url, config={**SYNC, **config}, state={"tensor": torch.zeros(3)})


def save(mgr: CheckpointManager, step: int, **metrics: float) -> None:
    """Also until it is pruned."""
    mgr.save(step, metrics=metrics)
    mgr._saver.wait()


def save_all(mgr: CheckpointManager, steps: range, **metrics: float) -> None:
    for step in steps:
        save(mgr, step, **metrics)


def steps_of(mgr: CheckpointManager) -> list[int]:
    return [info.step for info in mgr.checkpoints()]


# ------------------------------------------------------------------------------------- which direction is better


@pytest.mark.parametrize(
    "mode,names",
    [
        ("min", "loss val_loss val/loss eval.loss VAL:WER val-error test_perplexity Loss/train train_loss_val"),
        ("max", "acc eval/accuracy val/top1_acc mean.iou f1 macro_f1 bleu episode:reward AUC Accuracy/test"),
        (None, "score lossless loss_acc f1_error error_acc neg_loss negative_reward -loss 1-acc val/1-acc 1_minus_acc"),
        (None, "inv_loss non_loss std_reward delta_loss reward_std loss_scale acc1 acc@1 losses rouge valLoss val _"),
    ],
)
def test_a_name_says_its_mode_by_its_last_word_or_not_at_all(mode, names):
    assert {name: mode_by_name(name) for name in names.split()} == dict.fromkeys(names.split(), mode)


def test_what_is_stated_first_counts_before_what_the_name_says():
    assert resolve_mode("val_loss", None, None) == "min"
    assert resolve_mode("val_loss", None, "max") == "max"
    assert resolve_mode("score", "min", "max") == "min"
    assert resolve_mode("score", None) is None


def test_a_rule_without_a_mode_takes_it_from_the_name_or_is_refused():
    assert BestRule(monitor="eval/acc") == BestRule(monitor="eval/acc", mode="max")
    assert Config.from_mapping({"keep": {"best": LOWEST}}).keep.best[0].mode == "min"
    with pytest.raises(ConfigError, match=r"^keep\.best\.mode: is missing, and the name 'score' does not say it"):
        Config.from_mapping({"keep": {"best": {"monitor": "score"}}})


def test_the_best_accuracy_is_the_highest_and_a_name_that_says_nothing_needs_a_mode(local):
    with manager(local, keep={"best": {"monitor": "score", "mode": "max"}, "last": 9}) as mgr:
        for step, value in enumerate((0.2, 0.9, 0.5), 1):
            save(mgr, step, acc=value, score=value, odd=value)
        assert mgr.best("acc").step == 2
        assert mgr.restore_best("acc").step == 2
        assert mgr.best("acc", mode="min").step == 1
        assert mgr.best("score").step == mgr.best().step == 2
        assert mgr.best(mode="min").step == 1
        assert mgr.restore_best("odd", mode="max").step == 2
        for refused in (mgr.best, mgr.restore_best):
            with pytest.raises(ConfigError, match=r"'odd' does not say.*mode='min' or mode='max'"):
                refused("odd")
            with pytest.raises(ConfigError, match="mode: must be one of min, max"):
                refused("odd", mode="lowest")
        with pytest.raises(ConfigError, match="must be a string"):
            mgr.best(7)


# ------------------------------------------------------------------------------------ a metric that never comes


def test_where_best_is_the_only_rule_nothing_is_removed_until_its_metric_is_reported():
    infos = [checkpoint(step, metrics={"val_loss": 1 / step}) for step in (1, 2, 3)]
    misspelled = plan(infos, KeepPolicy(best={"monitor": "val/loss"}), now=NOW)
    assert (steps(misspelled.keep), misspelled.remove) == ([1, 2, 3], [])
    assert misspelled.keep[0][1] == ("kept until a checkpoint reports val/loss",)
    reported = [*infos, checkpoint(4, metrics={"val/loss": 1.0}), *run(5)]
    assert steps(plan(reported, KeepPolicy(best={"monitor": "val/loss"}), now=NOW).keep) == [4, 5]


def test_a_metric_that_was_only_ever_nan_withholds_removal_too_and_a_budget_still_holds():
    infos = [checkpoint(step, metrics={"val_loss": math.nan}, size=10) for step in (1, 2, 3)]
    assert steps(plan(infos, KeepPolicy(best=LOWEST), now=NOW).keep) == [1, 2, 3]
    (doubt,) = doubts(infos, KeepPolicy(best=LOWEST))
    assert "has reported a finite value" in doubt.message
    assert steps(plan(infos, KeepPolicy(best=LOWEST, max_size=20), now=NOW).keep) == [2, 3]


def test_checkpoints_with_nan_are_not_withheld():
    infos = [checkpoint(1, finite=False), checkpoint(2), checkpoint(3)]
    assert steps(plan(infos, KeepPolicy(best=LOWEST), now=NOW).keep) == [2, 3]


def test_a_misspelled_monitor_warns_before_anything_is_removed_names_what_was_meant_and_says_it_once(local):
    with manager(local, keep={"best": {"monitor": "val_los", "mode": "min"}}) as mgr:
        save(mgr, 1, val_loss=1.0, lr=0.1)
        said = r"'val_los', which no checkpoint has reported \(reported: lr, val_loss; did you mean val_loss\?\)"
        with pytest.warns(CheckpointerWarning, match=said + r".*nothing is removed.*disk fills") as warned:
            save(mgr, 2, val_loss=0.5)
        assert len(warned) == 1
        save(mgr, 3, val_loss=2.0)  # a second warning would be an error
        assert steps_of(mgr) == [1, 2, 3]


def test_beside_other_rules_the_warning_comes_before_the_first_removal(local):
    with manager(local, keep={"last": 2, "best": LOWEST}) as mgr:
        save(mgr, 1)
        save(mgr, 2)
        with pytest.warns(CheckpointerWarning, match=r"reported: none\)\. So this rule keeps no checkpoint"):
            save(mgr, 3)
        save(mgr, 4)
        assert steps_of(mgr) == [3, 4]


def test_a_metric_that_an_evaluator_has_annotated_counts_as_reported(local):
    with manager(local, keep={"best": LOWEST}) as mgr:
        save(mgr, 1)
        with manager(local) as evaluator:
            evaluator.annotate(1, metrics={"val_loss": 0.5})
        save(mgr, 2)
        save(mgr, 3)
        assert steps_of(mgr) == [1, 3]


def test_a_metric_that_was_renamed_at_a_restart_is_noticed_by_the_new_name(local):
    with manager(local, keep={"best": LOWEST}) as mgr:
        save(mgr, 1, loss=1.0, val_loss=0.5)
        save(mgr, 2, loss=1.0)  # not every save evaluates
        save(mgr, 3, loss=1.0)
    with manager(local, keep={"best": LOWEST}) as mgr:
        mgr.restore_latest()
        with pytest.warns(CheckpointerWarning, match="'val_loss', which was last reported at step 1.*'eval_loss'"):
            save(mgr, 4, loss=1.0, eval_loss=0.1)
        save(mgr, 5, loss=1.0, eval_loss=0.1)


def test_the_nearest_name_is_found_however_its_words_are_joined():
    assert nearest_name("val/loss", {"val_loss", "train_loss"}) == "val_loss"
    assert nearest_name("val_loss", {"lr", "throughput"}) is None


# ----------------------------------------------------------------------------- a metric given where nothing is due


def test_a_monitored_metric_given_only_where_nothing_is_due_is_said_once_at_the_next_save(local):
    with manager(local, save={"every_n_steps": 10}, keep={"last": 5, "best": LOWEST}) as mgr:
        assert mgr.save(1, metrics={"loss": 1.0}) is None
        assert mgr.save(2, metrics={"val_loss": 1.0}) is None
        with pytest.warns(
            CheckpointerWarning, match=r"'val_loss' at step 2, .* not at step 10, .*on_metric: true"
        ) as said:
            mgr.save(10, metrics={"loss": 1.0})
        assert [Path(warning.filename).name for warning in said] == ["test_monitoring.py"]
        assert mgr.save(12, metrics={"val_loss": 1.0}) is None
        mgr.save(20)


def test_a_monitored_metric_given_at_every_call_is_recorded_where_it_counts_and_nothing_is_said(local):
    with manager(local, save={"every_n_steps": 10}, keep={"last": 5, "best": LOWEST}) as mgr:
        for step in range(1, 21):
            mgr.save(step, metrics={"val_loss": 1 / step})
        mgr.save(21, metrics={"val_loss": 1 / 21})
        mgr.save(21, force=True)
        assert mgr.best().step == 20


def test_a_monitored_metric_given_to_a_step_that_is_saved_already_is_said_with_its_own_cure(local):
    with manager(local, keep={"last": 5, "best": LOWEST}) as mgr:
        save(mgr, 1, val_loss=1.0)
        mgr.save(1, metrics={"val_loss": 1.0}, force=True)  # the last save after the loop: it is recorded
        save(mgr, 2)
        with pytest.warns(CheckpointerWarning, match=r"step 2, which is saved already.*mgr\.annotate\(2"):
            mgr.save(2, metrics={"val_loss": 1.0})


def test_on_metric_makes_a_call_due_that_is_given_the_monitored_metric(local):
    with manager(local, save={"every_n_steps": 10, "on_metric": True}, keep={"last": 5, "best": LOWEST}) as mgr:
        assert mgr.save(1, metrics={"loss": 1.0}) is None
        assert mgr.save(2, metrics={"val_loss": 0.5}) is not None
        assert mgr.save(10) is not None
        assert mgr.best().step == 2
    with manager(local, save={"on_metric": True}, keep={"last": 5, "best": LOWEST}) as mgr:
        mgr.restore_latest()
        assert not mgr.should_save(11)
        assert mgr.save(11) is None  # it is a rule: not every call is due any more


def test_on_metric_without_a_monitor_has_nothing_to_go_by():
    with pytest.raises(ConfigError, match=r"^save\.on_metric: has no metric to go by"):
        Config.from_mapping({"save": {"on_metric": True}})
    with pytest.raises(ConfigError, match=r"^save\.on_metric: must be true or false, got 1"):
        Config.from_mapping({"save": {"on_metric": 1}})
    config = Config.from_mapping({"save": {"on_metric": True}, "keep": {"best": LOWEST}})
    assert "on_metric: true" in config.to_yaml()


def test_a_metric_with_a_longer_name_after_a_restart_is_said_before_anything_is_removed(local):
    rules = {"last": 1, "best": {"monitor": "acc"}}
    with manager(local, keep=rules) as mgr:
        for step in range(3):
            save(mgr, step, acc=step / 10)
    with manager(local, keep=rules) as mgr:
        with pytest.warns(CheckpointerWarning, match="last reported at step 2; since then 'accuracy' is reported"):
            save_all(mgr, range(3, 5), accuracy=0.9)
        save(mgr, 5, accuracy=0.9)


def test_a_monitor_that_many_commits_in_a_row_leave_out_is_said_although_an_old_one_reported_it(local):
    rules = {"last": 1, "best": {"monitor": "acc"}}
    with manager(local, keep=rules) as mgr:
        for step in range(20):
            save(mgr, step, acc=1 / (step + 1))
    with manager(local, keep=rules) as mgr:
        for step in range(20, 28):
            save(mgr, step, top1=0.9, lr=0.1)  # a warning would be an error
        with pytest.warns(CheckpointerWarning, match=r"'acc', which none of the last .* \(reported: lr, top1"):
            save_all(mgr, range(28, 40), top1=0.9, lr=0.1)


def test_validation_at_every_tenth_save_and_scores_that_come_later_say_nothing(local):
    with manager(local, keep={"last": 1, "best": {"monitor": "acc"}}) as mgr:
        for step in range(45):
            save(mgr, step, lr=0.1, **({"acc": 1 / (step + 1)} if step % 10 == 0 else {}))
