"""A training run that is killed at chosen moments and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

TRAIN = Path(__file__).with_name("train.py")
FIRST_STEP = re.compile(r"^first step: (\d+)\n", re.MULTILINE)  # a line among warnings
GLANCE = 0.05  # seconds between two looks at how far a run has come
HUNT = 0.0002  # seconds between two looks at a run that is to be caught in the middle of a save


class DemoError(Exception):
    """The demonstration could not be carried out; it proves nothing either way."""


@dataclass(frozen=True)
class Landing:
    """Where a kill landed, read off the disk while the process was stopped and could change nothing."""

    steps_done: int
    where: str
    newest: int | None
    """Step of the newest committed checkpoint."""


class Run:
    """One run of ``train.py``, of as many processes as it takes."""

    def __init__(self, folder: Path, data: Path, steps: int) -> None:
        self.steps = steps
        self.root = folder / "checkpoints"
        self.final = folder / "final.pt"
        self.losses = folder / "losses.txt"
        self._output = folder / "output.txt"
        self._command = [sys.executable, str(TRAIN), str(folder), f"--data={data}", f"--steps={steps}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._left_over: set[Path] = set()
        folder.mkdir(parents=True)

    def start(self) -> None:
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(self._command, stdout=output, stderr=subprocess.STDOUT)

    def first_step(self) -> int:
        """The step at which the running process began; waits until it has restored."""
        while True:
            ended = self._poll() is not None
            if found := FIRST_STEP.search(self._output.read_text(errors="replace")):
                return int(found[1])
            if ended:
                raise DemoError("train.py ended and did not print its first step")
            time.sleep(GLANCE)

    def steps_done(self) -> int:
        """Steps whose loss is logged: the log is written before the step is saved."""
        return self.losses.read_bytes().count(b"\n") if self.losses.exists() else 0

    def wait(self) -> None:
        while self._poll() is None:
            time.sleep(GLANCE)

    def kill(self, step: int, moment: Moment) -> Landing:
        """SIGKILL at the first ``moment`` after ``step``, which is made sure of while the process stands still."""
        while self.steps_done() < step:
            self._require_running()
            time.sleep(GLANCE)
        while True:
            self._require_running()
            if moment(self) and self._stop():
                if where := moment(self):  # still true now that nothing moves
                    landing = Landing(self.steps_done(), where, self._newest_checkpoint())
                    self.end()
                    self._left_over = {*self._entries("tmp"), *self._entries("trash")}
                    return landing
                self._signal(signal.SIGCONT)
            time.sleep(HUNT)

    def end(self) -> None:
        """SIGKILL, if the process still lives."""
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def saves_in_flight(self) -> list[Path]:
        """Files of every save that is not committed, less those of saves that died with an earlier process."""
        attempts = set(self._entries("tmp")) - self._left_over
        return [path for attempt in attempts for path in _files(attempt)]

    def deletions_in_flight(self) -> list[Path]:
        """Checkpoints that are being deleted, less those whose deletion an earlier kill interrupted."""
        return [path for path in self._entries("trash") if path not in self._left_over]

    def _entries(self, private_folder: str) -> list[Path]:
        folder = self.root / ".checkpointer" / private_folder
        try:
            return list(folder.iterdir())
        except FileNotFoundError:
            return []

    def _newest_checkpoint(self) -> int | None:
        committed = self.root.glob("checkpoint-*/manifest.json")
        return max((int(path.parent.name.split("-")[1]) for path in committed), default=None)

    def _stop(self) -> bool:
        """Wait until every thread stands still; false if the process ended instead."""
        self._signal(signal.SIGSTOP)
        assert self._process
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._process.returncode = os.waitstatus_to_exitcode(status)
        return os.WIFSTOPPED(status)

    def _signal(self, number: int) -> None:
        assert self._process
        os.kill(self._process.pid, number)

    def _require_running(self) -> None:
        if self._poll() is not None:
            raise DemoError("the run ended before the moment to kill it came; try again")

    def _poll(self) -> int | None:
        assert self._process
        if status := self._process.poll():
            output = self._output.read_text(errors="replace")
            raise DemoError(f"train.py ended with status {status}:\n{output}")
        return status


def _files(attempt: Path) -> list[Path]:
    try:
        return [path for path in attempt.rglob("*") if path.is_file()]
    except FileNotFoundError:  # committed while we looked
        return []


Moment: TypeAlias = Callable[[Run], "str | None"]
"""Says where a run is, if that is where it is to be killed."""


def between_saves(run: Run) -> str | None:
    return None if run.saves_in_flight() else "training, between saves"


def writing(run: Run) -> str | None:
    files = run.saves_in_flight()
    if not files or any(path.name == "manifest.json" for path in files):
        return None
    return f"saving: {_amount(files)}, no manifest yet"


def committing(run: Run) -> str | None:
    files = run.saves_in_flight()
    if not any(path.name == "manifest.json" for path in files):
        return None
    return f"saving: {_amount(files)}, about to commit"


def deleting(run: Run) -> str | None:
    return "deleting an old checkpoint" if run.deletions_in_flight() else None


def _amount(files: list[Path]) -> str:
    sizes = [_size(path) for path in files if path.name != "manifest.json"]
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes) / 1e3:,.0f} kB"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # committed while we looked
        return 0
