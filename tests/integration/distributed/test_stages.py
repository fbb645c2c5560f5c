"""A failure in any stage of a save, on any rank, is one error on all ranks, commits nothing, and is over with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.integration.distributed.stages import CASES, PRUNE, STAGES, Stage, all_stages
from tests.support.ranks import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")

Said = list[dict[str, dict[str, Any]]]
"""By rank, and by case."""


def sampled(stage: Stage, victim: int, mode: str) -> bool:
    """Whether a case is tried without ``--thorough``: each stage on each rank is, in one mode; each mode is in some."""
    order = [(other, rank) for other in STAGES for rank in other.ranks]
    return stage.modes[order.index((stage, victim)) % len(stage.modes)] == mode


@pytest.mark.thorough(lambda every: every)
@pytest.mark.parametrize("every", [False, True], ids=["a mode for each", "every mode"])
def test_a_failure_in_any_stage_on_any_rank_is_one_error_on_all_and_the_next_save_works(tmp_path, every):
    """One test, since one job goes through all cases."""
    cases = [case for case in CASES if every or sampled(*case)]
    names = [(stage.name, victim, mode) for stage, victim, mode in cases]
    said: Said = run(2, all_stages, str(tmp_path), [*names, (PRUNE.name, 0, "async")])
    for stage, victim, mode in cases:
        case = f"{stage.name}-{victim}-{mode}"
        for rank in (0, 1):
            check(case, stage, said[rank][case], elsewhere=rank != victim, failed=f"rank {victim} of 2: ")
        whole_and_nothing_else(tmp_path / case)
    a_prune_that_fails_is_a_warning_and_what_was_saved_stays(*(outcomes["prune-0-async"] for outcomes in said))
    whole_and_nothing_else(tmp_path / "prune-0-async")


def check(case: str, stage: Stage, outcome: dict[str, Any], *, elsewhere: bool, failed: str) -> None:
    assert outcome["told"].startswith(f"{stage.kind}: "), f"{case}: {outcome['told']}"
    assert re.search(stage.cause, outcome["told"]), case
    named = set(re.findall(r"rank \d of 2: ", outcome["told"]))
    assert named == {failed} or (not elsewhere and not named), f"{case}: {outcome['told']}"
    assert (outcome["between"], outcome["after"]) == ([1], [3]), case


def a_prune_that_fails_is_a_warning_and_what_was_saved_stays(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["told"] == second["told"] == "no error"
    assert [("could not prune" in "".join(outcome["warned"])) for outcome in (first, second)] == [True, False]
    assert first["between"] == [1, 2]
    assert first["after"] == [3]


def whole_and_nothing_else(root: Path) -> None:
    assert Repository(open_storage(root)).verify_all().ok
    assert not [file for place in ("tmp", "trash") for file in (root / ".checkpointer" / place).glob("*")]
