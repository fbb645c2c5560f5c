"""A failure in any stage of a save, on any rank, is one error on all ranks, commits nothing, and is over with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpointer.repository import Repository
from checkpointer.storage import open_storage
from tests.distributed.stages import CASES, PRUNE, STAGES, Stage, all_stages
from tests.ranks import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")

Said = list[dict[str, dict[str, Any]]]
"""By rank, and by case."""


def sampled(stage: Stage, victim: int, mode: str) -> bool:
    """Whether a case is tried without ``--thorough``: each stage on each rank is, in one mode; each mode is in some."""
    order = [(other, rank) for other in STAGES for rank in other.ranks]
    return stage.modes[order.index((stage, victim)) % len(stage.modes)] == mode


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, folder: Path) -> Said:
    thorough = request.config.getoption("--thorough")
    cases = [(stage.name, rank, mode) for stage, rank, mode in CASES if thorough or sampled(stage, rank, mode)]
    return run(2, all_stages, str(folder), [*cases, (PRUNE.name, 0, "async")])


@pytest.mark.thorough(lambda stage, victim, mode: not sampled(stage, victim, mode))
@pytest.mark.parametrize("stage,victim,mode", CASES, ids=[f"{stage.name}-{rank}-{mode}" for stage, rank, mode in CASES])
def test_a_failure_in_any_stage_on_any_rank_is_one_error_on_all_and_the_next_save_works(
    folder, said, stage, victim, mode
):
    case = f"{stage.name}-{victim}-{mode}"
    for rank in (0, 1):
        outcome = said[rank][case]
        assert outcome["told"].startswith(f"{stage.kind}: "), outcome["told"]
        assert re.search(stage.cause, outcome["told"])
        assert rank == victim or f"rank {victim} of 2: " in outcome["told"]
        assert f"rank {1 - victim} of 2: " not in outcome["told"]
        assert outcome["between"] == [1]
        assert outcome["after"] == [3]
    whole_and_nothing_else(folder / case)


def test_pruning_that_fails_on_the_coordinator_is_a_warning_there_and_what_was_saved_stays(folder, said):
    first, second = (outcomes["prune-0-async"] for outcomes in said)
    assert first["told"] == second["told"] == "no error"
    assert [("could not prune" in "".join(outcome["warned"])) for outcome in (first, second)] == [True, False]
    assert first["between"] == [1, 2]
    assert first["after"] == [3]
    whole_and_nothing_else(folder / "prune-0-async")


def whole_and_nothing_else(root: Path) -> None:
    assert Repository(open_storage(root)).verify_all().ok
    assert not [file for place in ("tmp", "trash") for file in (root / ".checkpointer" / place).glob("*")]
