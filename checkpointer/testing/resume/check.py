"""Runs a training loop twice, once interrupted, and compares."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path

from checkpointer.errors import ConfigError
from checkpointer.testing.resume.differences import explain, first_difference, leave_out_idle_generators
from checkpointer.testing.resume.runs import Experiment, MakeRun, Segment


def assert_resume_exact(make_run: MakeRun | str, *, steps: int, interrupt_at: int | Sequence[int]) -> None:
    """Run a training loop twice, once interrupted, and fail on the first difference.

    Each part runs in a new process: the uninterrupted run; the run up to the first interruption, which saves and ends;
    the run that restores and goes on; and so forth. On a difference the uninterrupted run is done once more, to tell a
    resume that is not exact from a run that is never the same twice.

    Args:
        make_run: function at the top of a module, or ``"module:function"``; see the docstring of this module.
        steps: how many steps the whole run has; they are numbered from 0.
        interrupt_at: the last step before an interruption, or several.

    Raises:
        AssertionError: the first step, component and tensor that differ, and the likely cause; or a process failed.
        ConfigError: an argument makes no sense.
    """
    cuts = _check_cuts(steps, interrupt_at)
    _check_picklable(make_run)
    with tempfile.TemporaryDirectory(prefix="checkpointer-") as folder:
        problem = compare_runs(Experiment(make_run, Path(folder), steps, cuts))
    if problem:
        raise AssertionError(problem)


def compare_runs(experiment: Experiment) -> str:
    """What is wrong with the interrupted run, in words; empty if it is the uninterrupted one."""
    straight = experiment.run(Segment("the uninterrupted run", None, experiment.steps - 1))
    resumed = experiment.run_interrupted()
    leave_out_idle_generators([straight, *resumed.parts.values()])
    found = first_difference(straight, resumed)
    return "" if found is None else explain(found, straight, resumed, experiment)


def _check_cuts(steps: int, interrupt_at: int | Sequence[int]) -> tuple[int, ...]:
    cuts = (interrupt_at,) if isinstance(interrupt_at, int) else tuple(interrupt_at)
    if not cuts or list(cuts) != sorted(set(cuts)) or cuts[0] < 0 or cuts[-1] > steps - 2:
        raise ConfigError(
            f"interrupt_at={interrupt_at!r} must name increasing steps from 0 to {steps - 2} of {steps} steps: "
            "the last step before each interruption"
        )
    return cuts


def _check_picklable(make_run: MakeRun | str) -> None:
    if isinstance(make_run, str):
        if ":" not in make_run:
            raise ConfigError(f"make_run={make_run!r} must be 'module:function'")
        return
    try:
        pickle.dumps(make_run)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"make_run is handed to new processes, so it must lie at the top of a module: {error}"
        ) from error
