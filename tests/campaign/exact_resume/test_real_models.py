"""Real models on real data, interrupted in the middle of an epoch, go on bit for bit."""

from __future__ import annotations

import pytest

from tests.campaign.exact_resume.cases import CASES
from tests.campaign.exact_resume.engine import check, resume, save, task_for, uninterrupted

STEPS = 10
CUTS = (2, 6)
NAMES = [name for name, case in CASES.items() if case.group == "real models"]


@pytest.mark.slow
def test_real_models_go_on_bit_for_bit_in_mid_epoch(tmp_path):
    tasks = {name: [task_for(name, tmp_path / name, cut, STEPS) for cut in CUTS] for name in NAMES}
    for name in NAMES:
        save(name, tmp_path / name / "run", CUTS)
    flat = [task for parts in tasks.values() for task in parts]
    found = dict(zip(flat, resume(flat, tmp_path), strict=True))  # one process: transformers takes long to import
    for name in NAMES:
        expected = uninterrupted(name, STEPS)
        losses = [state["loss"] for moment, state in expected.items() if moment.startswith("step")]
        assert sum(losses[-3:]) < sum(losses[:3])  # it does learn
        for task in tasks[name]:
            check(expected, found[task])
