"""The long form says by its exit status whether every resume was exact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpointer.state.optimizer.adapter import OptimizerAdapter
from tests.campaign.exact_resume import long

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPT = """
import contextlib, runpy, sys
sys.path.insert(0, "scripts")
import _env
_env.environment = lambda extra: contextlib.nullcontext(sys.executable)  # this one will do
runpy.run_path("scripts/exact_resume")
"""
ONE_AT_A_TIME = ["--jobs", "1"]


@pytest.fixture
def forgetful(monkeypatch):
    """Each save lacks the first moments."""
    capture = OptimizerAdapter.capture

    def without_moments(self):
        captured = capture(self)
        for key, tensor in captured.tensors.items():
            if key.endswith(".exp_avg"):
                captured.tensors[key] = torch.zeros_like(tensor)
        return captured

    monkeypatch.setattr(OptimizerAdapter, "capture", without_moments)


def test_it_ends_with_status_1_where_a_resume_differs(forgetful, capsys):
    assert long.main(["Adam", "SGD", *ONE_AT_A_TIME]) == 1
    found = capsys.readouterr().out
    rows = {line.split()[0]: line for line in found.splitlines() if line.startswith(("Adam ", "SGD "))}
    assert rows["Adam"].endswith("DIFFERS")
    assert rows["SGD"].endswith("identical")  # it has no such moments
    assert found.count("cut after step") == 3
    assert "exp_avg" in found
    assert "1 of 2 cases are identical" in found


def test_it_ends_with_status_0_where_none_does(capsys):
    assert long.main(["Adam", *ONE_AT_A_TIME]) == 0
    assert "1 of 1 cases are identical" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name, status", [("no such case", 1), ("SGD", 0)])
def test_the_script_passes_the_status_on(name, status):
    command = [sys.executable, "-c", SCRIPT, name]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "")
    assert f"{1 - status} of {1 - status} cases" in done.stdout
