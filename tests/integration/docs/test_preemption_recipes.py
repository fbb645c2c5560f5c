"""The recipes of docs/preemption.md, taken from the page and run: the test plays slurmstepd, or the kubelet."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from checkpointer import CheckpointManager, Config
from tests.support import processes
from tests.support.compare import assert_identical

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs" / "preemption.md").read_text(encoding="utf-8")
STEPS = 200
"""Of 10 ms at least: enough for a signal to come in the middle."""


def block(language: str, start: str) -> str:
    """The one block in ``language`` that begins with ``start``."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (text,) = (text for text in blocks if text.startswith(start))
    return text


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The directory of the job: the program and its configuration."""
    (tmp_path / "train.py").write_text(block("python", "import os"))
    shutil.copy(REPOSITORY / "configs" / "preemptible.yaml", tmp_path)
    return tmp_path


def environment(work: Path) -> dict[str, str]:
    """As on a node: ``python`` is this one, and the commands of Slurm do what they do there, with one task."""
    tools = work / "bin"
    tools.mkdir(exist_ok=True)
    scripts = {
        "python": f'exec {shlex.quote(sys.executable)} "$@"',
        "srun": 'exec "$@"',  # it forwards signals to its tasks
        "scontrol": f'echo "$@" >> {shlex.quote(str(work / "scontrol.log"))}',
    }
    for name, line in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SLURM_JOB_ID": "4711",
        "TOTAL_STEPS": str(STEPS),
        "OMP_NUM_THREADS": "1",
    }


def start(work: Path, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=work, env=environment(work), start_new_session=True)


def wait_for_training(work: Path) -> None:
    """Until the first save of this process has begun: then it trains, and handles signals."""
    deadline = time.monotonic() + 120
    while not (work / "runs" / "gpt" / ".checkpointer" / "owner.json").exists():
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.02)
    time.sleep(0.3)


def end_by(process: subprocess.Popen[bytes], number: int, grace: float) -> int:
    """The signal to the first process; when the grace period is over, SIGKILL to all. The exit status."""
    process.send_signal(number)
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def steps_saved(work: Path) -> list[int]:
    with CheckpointManager(work / "runs" / "gpt", read_only=True) as reader:
        assert reader.verify().ok
        return [info.step for info in reader.checkpoints()]


def final_state(work: Path) -> Any:
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(), nn.Linear(64, 1))
    with CheckpointManager(work / "runs" / "gpt", read_only=True, model=model) as reader:
        assert reader.restore(STEPS - 1, components=["model"]).step == STEPS - 1
    return dict(model.state_dict())


@pytest.fixture
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, work: Path) -> Any:
    """What training ends with where nobody interrupts it."""
    calm = tmp_path_factory.mktemp("calm")
    for name in ("train.py", "preemptible.yaml"):
        shutil.copy(work / name, calm)
    processes.run([sys.executable, "train.py"], cwd=calm, env=environment(calm), check=True)
    return final_state(calm)


def test_the_configuration_on_the_page_is_the_one_in_configs():
    shown = Config.from_mapping(yaml.safe_load(block("yaml", "save:")))
    assert shown.save == Config.from_yaml(REPOSITORY / "configs" / "preemptible.yaml").save


@pytest.mark.slow
def test_slurm_sends_a_signal_before_the_limit_and_the_job_requeues_itself(work, uninterrupted):
    script = block("bash", "#!/bin/bash")
    (work / "job.sh").write_text(script)
    sent, before = re.search(r"--signal=B:(\w+)@(\d+)", script).groups()
    job = start(work, ["bash", "job.sh"])
    wait_for_training(work)
    assert end_by(job, signal.Signals[f"SIG{sent}"], float(before)) == 75
    assert (work / "scontrol.log").read_text() == "requeue 4711\n"
    (last,) = steps_saved(work)[-1:]
    assert 0 < last < STEPS - 1
    again = start(work, ["bash", "job.sh"])
    assert again.wait(120) == 0
    assert (work / "scontrol.log").read_text() == "requeue 4711\n"  # it is done
    assert_identical(final_state(work), uninterrupted)


@pytest.mark.slow
def test_kubernetes_sends_sigterm_and_after_the_grace_period_sigkill(work, uninterrupted):
    pod = yaml.safe_load(block("yaml", "apiVersion:"))["spec"]["template"]["spec"]
    command, grace = pod["containers"][0]["command"], pod["terminationGracePeriodSeconds"]
    assert Config.from_yaml(work / "preemptible.yaml").save.deadline.total_seconds() == grace
    command = [str(work / "bin" / command[0]), *command[1:]]
    environment(work)
    first = start(work, command)
    wait_for_training(work)
    assert end_by(first, signal.SIGTERM, grace) == 75
    saved = steps_saved(work)
    second = start(work, command)
    wait_for_training(work)
    assert end_by(second, signal.SIGSTOP, 0.2) == -signal.SIGKILL  # it hangs, and the grace period ends
    assert steps_saved(work) == saved
    assert pod["restartPolicy"] == "OnFailure"
    assert start(work, command).wait(120) == 0
    assert_identical(final_state(work), uninterrupted)
