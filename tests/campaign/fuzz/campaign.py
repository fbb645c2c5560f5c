"""A long campaign: ``python -m tests.campaign.fuzz.campaign --minutes N --seed S``. Seeded, bounded in time and memory.

Every input is named by seed, target and number, so that ``--only TARGET --input NUMBER`` repeats a single one. Targets
take turns, each for the same time. Ends with a table, and with status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch

from checkpointer.environment import environment
from tests.campaign.fuzz.targets import TARGETS, Target, empty_folder, live_components

SECONDS = 10
"""Of the clock, that an input may take at most: a thousand times what most take."""

MEMORY = 1 << 30
"""Bytes that the campaign may use beyond what it uses when it begins."""

FORBIDDEN = frozenset(
    {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect"}
)
"""What no file may make the reader do, by the names of Python's audit events."""

TURN = 2.0
"""Seconds after which the next target has its turn."""


class TooSlowError(BaseException):
    """Raised in the middle of an input; no ``except Exception`` may swallow it."""


class Watch:
    """Python's audit events while an input is read: programs started, classes unpickled, files opened outside."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Fail for what is forbidden inside, and for files opened for writing outside ``folder``."""
        self.folder, self.seen = str(folder), []
        try:
            yield
        finally:
            self.folder = None
        assert not self.seen, f"what no file may do: {self.seen[:3]}"

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            place = os.path.abspath(arguments[0])
            if not place.startswith((self.folder, "/dev/")) and "__pycache__" not in place and ".pyc" not in place:
                self.seen.append(f"open {place}")


@dataclass
class Score:
    """What came of one target."""

    inputs: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)
    """The first input of each kind, by where it failed."""


def attempt(target: Target, seed: int, number: int, score: Score, watch: Watch) -> None:
    """Make one input and read it."""
    made = target.make(Random(f"{seed}/{target.name}/{number}"))
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with empty_folder() as folder, watch.over(folder):
            score.verdicts[target.take(made, folder)] += 1
    except (Exception, TooSlowError) as error:
        lines = traceback.extract_tb(error.__traceback__)
        where = next((line for line in reversed(lines) if f"{os.sep}checkpointer{os.sep}" in line.filename), lines[-1])
        kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
        shown = (
            f"--only {target.name} --input {number}\n{''.join(traceback.format_exception(error))}{repr(made)[:2000]}"
        )
        score.findings.setdefault(kind, shown)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    score.inputs += 1
    score.slowest = max(score.slowest, time.perf_counter() - began)


def limit() -> None:
    """An input that makes the reader ask for much memory, or think for long, is a finding."""

    def too_slow(number: int, frame: object) -> None:
        raise TooSlowError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, too_slow)
    with open("/proc/self/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def campaign(targets: Sequence[Target], *, minutes: float, seed: int, first: int = 0) -> dict[str, Score]:
    """Let the targets take turns."""
    scores = {target.name: Score() for target in targets}
    watch = Watch()
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        for target in targets:
            turn = min(end, time.monotonic() + TURN)
            while time.monotonic() < turn:
                attempt(target, seed, first + scores[target.name].inputs, scores[target.name], watch)
    return scores


def report(scores: dict[str, Score]) -> int:
    """Print the table and what was found; the exit status."""
    print(f"{'target':<10} {'inputs':>10} {'accepted':>10} {'refused':>10} {'slowest':>9} {'findings':>9}")
    for name, score in scores.items():
        verdicts = f"{score.verdicts['accepted']:>10,} {score.verdicts['refused']:>10,}"
        print(f"{name:<10} {score.inputs:>10,} {verdicts} {score.slowest:>7.2f} s {len(score.findings):>9}")
    found = [(name, kind, text) for name, score in scores.items() for kind, text in score.findings.items()]
    for name, kind, text in found:
        print(f"\n{name}: {kind}\n{text}")
    inputs = sum(score.inputs for score in scores.values())
    print(f"\n{inputs:,} inputs, {len(found)} findings")
    return 1 if found or not inputs else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign, or repeat one input."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=[target.name for target in TARGETS], help="a target")
    parser.add_argument("--input", type=int, help="repeat this input of the one target")
    options = parser.parse_args(arguments)
    targets = [target for target in TARGETS if not options.only or target.name in options.only]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    live_components()  # whatever is imported late is imported now
    environment()  # asks git, once in a process
    limit()
    if options.input is None:
        return report(campaign(targets, minutes=options.minutes, seed=options.seed))
    (target,) = targets
    score = Score()
    attempt(target, options.seed, options.input, score, Watch())
    return report({target.name: score})


if __name__ == "__main__":
    raise SystemExit(main())
