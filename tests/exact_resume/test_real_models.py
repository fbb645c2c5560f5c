"""Real models on real data, interrupted in the middle of an epoch, go on bit for bit."""

from __future__ import annotations

import pytest

from tests.exact_resume.cases import CASES
from tests.exact_resume.engine import check, resume, save, task_for, uninterrupted

STEPS = 12
CUTS = (2, 7)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.group == "real models"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # of DataLoader workers, since Python 3.12
def test_a_real_model_goes_on_bit_for_bit_in_mid_epoch(name, tmp_path):
    expected = uninterrupted(name, STEPS)
    losses = [state["loss"] for moment, state in expected.items() if moment.startswith("step")]
    assert sum(losses[-3:]) < sum(losses[:3])  # it does learn
    save(name, tmp_path / "run", CUTS)
    for found in resume([task_for(name, tmp_path, cut, STEPS) for cut in CUTS], tmp_path):
        check(expected, found)
