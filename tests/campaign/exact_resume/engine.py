"""Train, save; in a new process restore and train on; compare with the run that nothing interrupted."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpointer import CheckpointManager
from tests.campaign.exact_resume.cases import CASES
from tests.campaign.exact_resume.runs import Run, quiet, seed, snapshot
from tests.support import processes
from tests.support.compare import assert_identical

CONFIG = {"write": {"mode": "sync", "durable": False}}
SEED = 1
OTHER_SEED = 2
"""What a resumed run is built with: nothing comes out right because it was seeded alike."""

RESTORED = "restored "

Moments = dict[str, Any]
"""A snapshot by the moment that it was taken at, in order; and the loss of each step."""


@dataclass(frozen=True)
class Task:
    """One resume for a child process to do."""

    case: str
    root: str
    cut: int
    """The step whose checkpoint is restored."""
    steps: int
    """The number of steps of the whole run."""
    out: str
    """The file that takes the result."""


def build(name: str, number: int) -> Run:
    """The run of a case, seeded."""
    seed(number)
    return CASES[name].make()


def uninterrupted(name: str, steps: int) -> Moments:
    """The moments of a run that is never saved."""
    with quiet():
        run = build(name, SEED)
        moments: Moments = {"before": snapshot(run)}
        return _train(run, range(steps), moments)


def save(name: str, root: Path, cuts: Iterable[int]) -> None:
    """Train up to the last of ``cuts``, saving at each."""
    cuts = sorted(cuts)
    with quiet():
        run = build(name, SEED)
        with CheckpointManager(root, config=CONFIG, **run.components) as manager:
            for number in range(cuts[-1] + 1):
                run.step(number)
                if number in cuts:
                    manager.save(number)


def resume(tasks: Sequence[Task], folder: Path) -> list[Moments | str]:
    """Let one new process restore and train on, task by task; the traceback of those that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "job.json"
    job.write_text(json.dumps({"threads": torch.get_num_threads(), "tasks": [asdict(task) for task in tasks]}))
    command = [sys.executable, "-m", "tests.campaign.exact_resume.engine", str(job)]
    done = processes.run(command, timeout=1000)
    assert done.returncode == 0, f"the child process ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return [torch.load(task.out, weights_only=False) for task in tasks]


def check(expected: Moments, found: Moments | str) -> None:
    """Fail, naming the first moment and the place in it, unless the resumed run went on as the other did."""
    assert isinstance(found, dict), f"the resume failed:\n{found}"
    for moment, state in found.items():
        wanted = expected[moment.replace(RESTORED, "")]
        if moment.startswith(RESTORED):
            wanted = {key: value for key, value in wanted.items() if key != "loss"}
        assert_identical(wanted, state, moment)


def task_for(name: str, folder: Path, cut: int, steps: int) -> Task:
    """The task of resuming a case; its folder is made for it."""
    return Task(name, str(folder / "run"), cut, steps, str(folder / f"resumed-{cut}.pt"))


def _train(run: Run, numbers: range, moments: Moments) -> Moments:
    for number in numbers:
        loss = run.step(number)
        moments[f"step {number}"] = {**snapshot(run), "loss": loss}
    return moments


def _resumed(task: Task) -> Moments:
    run = build(task.case, OTHER_SEED)
    with CheckpointManager(task.root, config=CONFIG, **run.components) as manager:
        restored = manager.restore(task.cut)
        restored_state = snapshot(run)
    moments = _train(run, range(restored.step + 1, task.steps), {})
    return {f"{RESTORED}step {task.cut}": restored_state, **moments}


def _main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    for task in [Task(**fields) for fields in job["tasks"]]:
        result: Moments | str
        try:
            with quiet():
                result = _resumed(task)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, task.out)


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text()))
