"""What the demonstration reads of the runs that it kills."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

KILLING = Path(__file__).resolve().parents[2] / "scripts" / "demo_mnist" / "killing.py"


def run_of(folder: Path, program: str):
    """A run of ``program`` in the place of ``train.py``, and the module's error."""
    module = runpy.run_path(str(KILLING))
    run = module["Run"](folder / "run", folder / "digits.pt", 10)
    run._command = [sys.executable, "-c", program]
    run.start()
    return run, module["DemoError"]


def test_the_first_step_is_found_among_lines_that_the_run_prints_before_and_after_it(tmp_path):
    program = "print('a warning: first step: 3', 'first step: 12', 'first loss', 'unfinished', sep='\\n', end='')"
    run, _ = run_of(tmp_path, program)
    run.wait()
    assert run.first_step() == 12


def test_a_run_that_ends_without_its_first_step_is_an_error(tmp_path):
    run, error = run_of(tmp_path, "print('nothing to do')")
    with pytest.raises(error, match="did not print its first step"):
        run.first_step()
