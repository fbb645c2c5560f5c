"""``save: {every: auto}``: the interval follows what saves have cost, and is told."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest
from torch import nn

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.policy.schedule import SavePolicy
from checkpointer.save.pacing import Pace

RARELY = {"every": "auto", "mtbf": "300d"}
"""So that a save of a millisecond is due again after minutes only."""


def commit(stall):
    return CheckpointInfo(step=1, statistics={"wait_seconds": 0.0, "stall_seconds": stall, "write_seconds": 0.01})


@pytest.fixture
def told(caplog):
    """What has been told since this was last asked."""
    caplog.set_level(logging.INFO, logger="checkpointer")

    def take():
        messages = [record.getMessage() for record in caplog.records if record.name == "checkpointer"]
        caplog.clear()
        return [message for message in messages if message.startswith("saving every")]

    return take


def train(root, steps, **save):
    """The steps that were saved in a run that resumes if it can."""
    config = {"save": save, "write": {"mode": "sync", "durable": False}}
    with CheckpointManager(root, config=config, model=nn.Linear(2, 2)) as manager:
        manager.restore_latest()
        return [step for step in steps if manager.save(step)]


def test_the_first_save_is_due_at_once_so_that_its_cost_becomes_known(tmp_path):
    assert train(tmp_path, range(5), **RARELY) == [0]


def test_a_restart_knows_what_saves_cost(tmp_path, told):
    train(tmp_path, range(5), **RARELY)
    assert len(told()) == 1
    assert train(tmp_path, range(5, 10), **RARELY) == []
    assert len(told()) == 1


def test_saves_that_cost_little_are_made_often(tmp_path):
    assert len(train(tmp_path, range(200), every="auto", max_overhead="99%", mtbf="0.000001s")) > 2


def test_a_save_in_flight_is_not_waited_for(tmp_path):
    config = {"save": {"every": "auto"}, "write": {"durable": False}}
    with CheckpointManager(tmp_path, config=config, model=nn.Linear(2000, 2000)) as manager:
        handle = manager.save(0)
        due = manager.should_save(1)
        assert handle.done() or not due


def test_should_save_asks_the_disk_where_nothing_was_restored(tmp_path):
    train(tmp_path, range(5), **RARELY)
    with CheckpointManager(tmp_path, config={"save": RARELY}, read_only=True) as reader:
        assert not reader.should_save(9)


def test_without_a_known_cost_nothing_is_told(told):
    assert Pace(SavePolicy(every="auto")).interval([CheckpointInfo(step=1)]) is None
    assert told() == []


def test_other_policies_have_no_interval(told):
    assert Pace(SavePolicy(every="1h")).interval([commit(1.0)]) is None
    assert told() == []


def test_the_choice_is_told_once_and_again_when_it_changes_by_much(told):
    pace = Pace(SavePolicy(every="auto", mtbf=timedelta(hours=12)))
    first = pace.interval([commit(1.0)])
    assert told() == [f"saving {first.reason}"]
    assert pace.interval([commit(1.1)]).every > first.every
    assert told() == []
    dearer = pace.interval([commit(4.0)])
    assert told() == [f"saving {dearer.reason}"]
    assert pace.interval([commit(1.0)]).every == first.every
    assert len(told()) == 1
