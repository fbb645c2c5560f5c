"""Runs whose processes are killed, one process after another, and what is checked in between."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from checkpointer.format import paths
from checkpointer.repository.lock import WriterLock
from checkpointer.storage import LocalStorage
from tests.campaign.crash.sabotage import SABOTAGES
from tests.campaign.crash.trainee import MILESTONE, MODES, Book, BrokenPromiseError, Life, Plan, reference, words_of

STEPS = 200
"""Of one run; then another one begins, in an empty run root."""

PATIENCE = 60
"""Seconds. Only a bug takes that long."""

PHASES = ("starting", "between", "staging", "writing", "commit", "committed", "replacing", "prune")


Work: TypeAlias = Callable[[Callable[[float], None]], None]
"""What a forked process does: it is handed what says that it may be killed within so many seconds."""


@dataclasses.dataclass
class Tally:
    """What a campaign, or one lane of it, has seen."""

    runs: int = 0
    kills: Counter[str] = dataclasses.field(default_factory=Counter)
    """How many processes were killed, by ``mode phase``."""
    most_leftovers: int = 0
    most_checkpoints: int = 0
    most_bytes: int = 0
    problem: str = ""

    @property
    def total(self) -> int:
        return sum(self.kills.values())

    def add(self, other: Tally) -> None:
        self.runs += other.runs
        self.kills += other.kills
        self.most_leftovers = max(self.most_leftovers, other.most_leftovers)
        self.most_checkpoints = max(self.most_checkpoints, other.most_checkpoints)
        self.most_bytes = max(self.most_bytes, other.most_bytes)
        self.problem = self.problem or other.problem

    def table(self) -> str:
        """Kills by phase and mode."""
        lines = [f"{'killed in':<12}{''.join(f'{mode:>9}' for mode in MODES)}{'all':>9}"]
        for phase in PHASES:
            counts = [self.kills[f"{mode} {phase}"] for mode in MODES]
            lines.append(f"{phase:<12}{''.join(f'{count:>9}' for count in counts)}{sum(counts):>9}")
        counts = [sum(self.kills[f"{mode} {phase}"] for phase in PHASES) for mode in MODES]
        lines.append(f"{'all':<12}{''.join(f'{count:>9}' for count in counts)}{sum(counts):>9}")
        return "\n".join(lines)


class Child:
    """A forked process that does ``work(ready)``; it says when it is ready, or what is wrong."""

    def __init__(self, work: Work) -> None:
        sys.stdout.flush()
        self._pipe, out = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._pipe)
            _work(work, out)
        os.close(out)
        self._said = b""
        self.status: int | None = None

    def wait_until_ready(self) -> float:
        """Until it is ready, or has ended. Returns the seconds within which it wants to be killed."""
        while b"\n" not in self._said and self._hear(PATIENCE):
            pass
        first = self._said.partition(b"\n")[0].split()
        return float(first[1]) if first[:1] == [b"ready"] else 0.0

    def kill_after(self, seconds: float) -> None:
        """Let it live for so long, at most."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self._hear(left):
            pass
        os.kill(self.pid, signal.SIGKILL)
        self._reap()

    def finish(self) -> None:
        """Until it has ended. Raises :class:`BrokenPromiseError` with what it has found."""
        while self._hear(PATIENCE):
            pass
        self._reap()
        if self.problem:
            raise BrokenPromiseError(self.problem)

    @property
    def problem(self) -> str:
        """What it has found wrong."""
        text = "\n".join(line for line in self._said.decode().splitlines() if not line.startswith("ready "))
        return text or ("" if self.status in (0, -signal.SIGKILL) else f"it ended with status {self.status}")

    def _hear(self, seconds: float) -> bool:
        """Whether it has said something within that time."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        data = os.read(self._pipe, 65536)
        self._said += data
        return bool(data)

    def _reap(self) -> None:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        while self._hear(0):
            pass
        os.close(self._pipe)


def _work(work: Work, out: int) -> None:
    """In the forked child."""
    status = 0
    try:
        warnings.simplefilter("ignore")
        work(lambda seconds: _say(out, f"ready {seconds}"))
    except BaseException as error:
        _say(out, str(error) if isinstance(error, BrokenPromiseError) else words_of(error))
        status = 1
    os._exit(status)


def _say(out: int, text: str) -> None:
    os.write(out, f"{text}\n".encode())


class Lane:
    """Runs, each in a folder of its own, one after the other."""

    def __init__(self, folder: Path, seed: str, modes: Sequence[str], sabotage: str | None) -> None:
        self._folder = folder
        self._rng = random.Random(seed)
        self._modes = modes
        self._sabotage = sabotage
        self._hashes: dict[tuple[int, bool], list[str]] = {}
        self.tally = Tally()

    def new_run(self) -> Run:
        """A run of the next mode, with all else drawn by lot."""
        mode = self._modes[self.tally.runs % len(self._modes)]
        wide = self._rng.random() < 0.25
        plan = Plan(self._rng.randrange(3), mode, self._rng.choice((1, 2, 3)), wide, STEPS // 3 if wide else STEPS)
        self.tally.runs += 1
        return Run(plan, self._folder / f"run-{self.tally.runs}", self._reference(plan), self._rng, self._sabotage)

    def _reference(self, plan: Plan) -> list[str]:
        key = plan.seed, plan.wide
        if key not in self._hashes:
            path = self._folder / "hashes"
            child = Child(lambda _: _write(path, json.dumps(reference(plan))))
            child.finish()
            self._hashes[key] = json.loads(path.read_text())
            path.unlink()
        return self._hashes[key]

    def work(self, until: float, report: Callable[[Tally], None]) -> None:
        """Kill until the time is over, or something is wrong."""
        run = self.new_run()
        while time.monotonic() < until and not self.tally.problem:
            try:
                alive = run.kill_once(self.tally)
            except BrokenPromiseError as wrong:
                self.tally.problem = f"{run.plan}, in {run.folder}: {wrong}"
                break
            if not alive:
                run.remove()
                run = self.new_run()
            report(self.tally)
        report(self.tally)


def _write(path: Path, text: str) -> None:
    path.write_text(text)


class Run:
    """One training run, whose processes are killed."""

    def __init__(
        self, plan: Plan, folder: Path, hashes: Sequence[str], rng: random.Random, sabotage: str | None
    ) -> None:
        self.plan = plan
        self.folder = folder
        self._root = folder / "root"
        self._book = Book(folder / "book")
        self._hashes = hashes
        self._rng = rng
        self._sabotage = sabotage
        for name in ("tmp", "home", "cwd"):
            (folder / name).mkdir(parents=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder)

    def kill_once(self, tally: Tally) -> bool:
        """Start a process and kill it. Whether the run is not yet at its end."""
        seed = self._rng.random()
        child = Child(lambda ready: self._live(random.Random(seed), ready))
        child.kill_after(self._rng.uniform(0, child.wait_until_ready()))
        if child.problem:
            raise BrokenPromiseError(child.problem)
        self._check_lock_is_free()
        self._check_nothing_outside()
        self._check_growth(tally)
        if child.status == 0:
            self._examine()
            return False
        tally.kills[f"{self.plan.mode} {self._phase()}"] += 1
        self._book.write("killed")
        return True

    def _live(self, rng: random.Random, ready: Callable[[float], None]) -> None:
        self._move_in()
        life = Life(self.plan, self._root, self._book, self._hashes, rng)
        life.examine()
        if self._sabotage is not None:
            SABOTAGES[self._sabotage]()
        life.live(ready)

    def _examine(self) -> None:
        """What a run leaves that came to its end."""

        def work(_: Callable[[float], None]) -> None:
            Life(self.plan, self._root, self._book, self._hashes, self._rng).examine()

        child = Child(work)
        child.finish()

    def _move_in(self) -> None:
        """Where a process would leave files that it does not put into the run root: empty, and looked at later."""
        os.environ.update(TMPDIR=str(self.folder / "tmp"), HOME=str(self.folder / "home"))
        tempfile.tempdir = None
        os.chdir(self.folder / "cwd")

    def _check_lock_is_free(self) -> None:
        if WriterLock(str(self._root), str(self._root / paths.LOCK)).taken():
            raise BrokenPromiseError("the lock of a process that was killed is still held")

    def _check_nothing_outside(self) -> None:
        strangers = {path.name for path in self.folder.iterdir()} - {"root", "book", "tmp", "home", "cwd"}
        strangers |= {str(path) for name in ("tmp", "home", "cwd") for path in (self.folder / name).iterdir()}
        if strangers:
            raise BrokenPromiseError(f"left outside the run root: {sorted(strangers)}")

    def _check_growth(self, tally: Tally) -> None:
        storage = LocalStorage(self._root)
        left = [*storage.list_directory(paths.TMP), *storage.list_directory(paths.TRASH)]
        steps = _steps(self._root)
        rotating = [step for step in steps if step % MILESTONE]
        tally.most_leftovers = max(tally.most_leftovers, len(left))
        tally.most_checkpoints = max(tally.most_checkpoints, len(rotating))
        tally.most_bytes = max(tally.most_bytes, _bytes_below(self._root))
        if len(left) > 2:  # what was being written, and what was being removed
            raise BrokenPromiseError(f"{len(left)} leftovers: {left}")
        if len(rotating) > self.plan.keep + 3:  # the new one, one that is not pruned yet, and what it restored from
            raise BrokenPromiseError(f"{len(rotating)} checkpoints, where {self.plan.keep} are kept: {sorted(steps)}")

    def _phase(self) -> str:
        return phase(self._root, self._book, self.plan.keep)


def _steps(root: Path) -> list[int]:
    names = [paths.parse_checkpoint_name(entry.name) for entry in LocalStorage(root).list_directory("")]
    return [step for step in names if step is not None]


def phase(root: Path, book: Book, keep: int) -> str:
    """What a process was doing when it was killed, by what it has left."""
    words = [line[0] for line in book.lines()]
    last = words[-1] if words else "killed"
    if last == "killed":
        return "starting"
    storage = LocalStorage(root)
    for entry in storage.list_directory(paths.TMP):
        try:
            id = json.loads((root / paths.TMP / entry.name / paths.MANIFEST).read_text())["id"]
        except (OSError, ValueError):
            return "writing"
        return "commit" if id == entry.name else "replacing"
    if storage.list_directory(paths.TRASH):
        return "prune"
    if len([step for step in _steps(root) if step % MILESTONE]) > keep:
        return "committed"
    return "staging" if last == "save" else "between"


def _bytes_below(folder: Path) -> int:
    """What a folder takes on disk, linked files once."""
    statuses = {
        status.st_ino: status.st_blocks
        for place, _, names in os.walk(folder)
        for name in names
        if (status := os.lstat(os.path.join(place, name)))
    }
    return 512 * sum(statuses.values())
