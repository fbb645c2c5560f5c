"""The long form says by its exit status whether every resume was exact."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FORGETFUL = """
import torch
from checkpointer.state.optimizer import OptimizerAdapter

capture = OptimizerAdapter.capture

def without_moments(self):
    captured = capture(self)
    for key, tensor in captured.tensors.items():
        if key.endswith(".exp_avg"):
            captured.tensors[key] = torch.zeros_like(tensor)
    return captured

OptimizerAdapter.capture = without_moments
"""
"""Python runs it at the start of every process: each save then lacks the first moments."""
SCRIPT = """
import contextlib, runpy, sys
sys.path.insert(0, "scripts")
import _env
_env.environment = lambda: contextlib.nullcontext(sys.executable)  # this one will do
runpy.run_path("scripts/exact_resume")
"""


def exact_resume(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_script_ends_with_status_1_where_a_resume_differs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    forgetful = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}

    found = exact_resume("Adam", "SGD", "--jobs", "1", **forgetful)
    assert found.returncode == 1, found.stderr
    rows = {line.split()[0]: line for line in found.stdout.splitlines() if line.startswith(("Adam ", "SGD "))}
    assert rows["Adam"].endswith("DIFFERS")
    assert rows["SGD"].endswith("identical")  # it has no such moments
    assert found.stdout.count("cut after step") == 3
    assert "exp_avg" in found.stdout
    assert "1 of 2 cases are identical" in found.stdout


@pytest.mark.slow
def test_the_script_ends_with_status_0_where_none_does():
    found = exact_resume("Adam", "--jobs", "1")
    assert (found.returncode, found.stderr) == (0, "")
    assert "1 of 1 cases are identical" in found.stdout


def test_a_name_that_no_case_has_is_no_success():
    found = exact_resume("no such case")
    assert found.returncode == 1
    assert "0 of 0 cases" in found.stdout
