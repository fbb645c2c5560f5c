"""Kills a training process that saves with a peer, over and over, and counts what it has left each time."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.campaign.crash.lanes import Child
from tests.campaign.crash.peers.adapters import Peer
from tests.campaign.crash.peers.life import (
    FAILURES,
    LOST,
    NOTHING,
    VERDICTS,
    WRONG,
    Before,
    EnoughError,
    Look,
    Training,
    resume,
)
from tests.campaign.crash.trainee import Book, BrokenPromiseError, Plan, reference

STEPS = 200
ROOT = "run"


@dataclasses.dataclass
class Tally:
    """What came of killing a peer."""

    verdicts: Counter[str] = dataclasses.field(default_factory=Counter)
    in_saves: int = 0
    """How many of the kills came in the middle of a save."""
    leftovers: int = 0
    """The most that lay there beside the checkpoints, once the next process had saved twice."""

    @property
    def kills(self) -> int:
        """Those after which somebody has looked."""
        return sum(self.verdicts[verdict] for verdict in VERDICTS)


class Run:
    """One training run in a folder of its own."""

    def __init__(self, kind: type[Peer], plan: Plan, folder: Path, book: Path | None = None) -> None:
        self._kind = kind
        self._plan = plan
        self.folder = folder
        self.root = folder / ROOT
        self.book = Book(book or folder / "book")
        for name in ("tmp", "cwd"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._hashes = _reference(plan)

    def kill_once(self, rng: random.Random) -> bool:
        """Start a process and kill it in or after one of its next saves. Whether it had to be killed."""
        seed = rng.random()

        def live(ready: Callable[[float], None]) -> None:
            self._move_in()
            resume(self._kind, self._plan, self.root, Training(self.book, self._hashes, random.Random(seed), ready))

        child = Child(live)
        child.kill_after(rng.uniform(0, child.wait_until_ready()))
        if child.problem:
            raise BrokenPromiseError(child.problem)
        return child.status != 0

    def do(self, work: Callable[[], object]) -> None:
        """In a process of its own, which has no place for its files but this run's."""

        def live(_: Callable[[float], None]) -> None:
            self._move_in()
            work()

        Child(live).finish()

    def look(self) -> str:
        """What a new process finds."""

        def work() -> None:
            finding = Look(self.book, self._hashes)
            resume(self._kind, self._plan, self.root, finding)
            self.book.write("failed", len(finding.failed))

        self.do(work)
        return next(line[0] for line in reversed(self.book.lines()) if line[0] in (*VERDICTS, NOTHING))

    def train(self, act: Callable[[Peer, int], None]) -> None:
        """Begin, and do something before each save. :class:`EnoughError` ends it, and so does a save that fails."""

        def work() -> None:
            try:
                resume(self._kind, self._plan, self.root, Before(self.book, self._hashes, act))
            except EnoughError:
                pass
            except FAILURES:
                if self.book.lines()[-1][0] != "saving":
                    raise

        self.do(work)

    def _move_in(self) -> None:
        os.environ.update(TMPDIR=str(self.folder / "tmp"), HOME=str(self.folder))
        tempfile.tempdir = None
        os.chdir(self.folder / "cwd")


_known: dict[Plan, list[str]] = {}


def _reference(plan: Plan) -> list[str]:
    """Made in a process of its own: whoever forks must not have started threads."""
    if plan not in _known:
        with tempfile.NamedTemporaryFile() as file:
            path = Path(file.name)
            child = Child(lambda _: _write(path, json.dumps(reference(plan))))
            child.finish()
            _known[plan] = json.loads(path.read_text())
    return _known[plan]


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def draw(rng: random.Random) -> Plan:
    """A run with all drawn by lot; one in four has tensors of a MiB."""
    wide = rng.random() < 0.25
    return Plan(rng.randrange(3), "sync", 2, wide, STEPS // 3 if wide else STEPS)


def kill(kind: type[Peer], folder: Path, seconds: float, most: int, seed: int) -> Tally:
    """Kill for so long, or so often."""
    tally, rng = Tally(), random.Random(f"{seed} {kind.name}")
    until = time.monotonic() + seconds
    count = 0
    while time.monotonic() < until and tally.kills < most:
        count += 1
        run = Run(kind, draw(rng), folder / f"run-{count}")
        while time.monotonic() < until and tally.kills < most:
            seen = len(run.book.lines())
            killed = run.kill_once(rng)
            verdict = _read(run.book, seen, tally)
            if not killed or verdict in (WRONG, LOST):
                break
        shutil.rmtree(run.folder)
    return tally


def _read(book: Book, seen: int, tally: Tally) -> str:
    """Count what the last process has written: its verdict on the one before."""
    lines = book.lines()
    verdict = ""
    for word, *numbers in lines[seen:]:
        if word == "left":
            tally.leftovers = max(tally.leftovers, int(numbers[0]))
        elif word in VERDICTS:
            verdict = word
            tally.verdicts[verdict] += 1
            tally.in_saves += lines[seen - 1][0] == "saving"
    return verdict
