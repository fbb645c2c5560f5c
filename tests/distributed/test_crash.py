"""SIGKILL of any rank at any operation of a save leaves the checkpoint before; scripts/crash_ranks has more."""

from __future__ import annotations

import pytest

from tests.distributed.crashing import check_one


@pytest.mark.parametrize("victim,after", [(0, 3), (0, 7), (1, 2)])
def test_a_rank_that_is_killed_in_a_save_leaves_the_checkpoint_before(tmp_path, victim, after):
    assert check_one(tmp_path, 2, victim, after).startswith("killed after")
