"""Looks at every state that a power cut may leave of a record, and counts."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.campaign.crash.power.persistence import Effort, cuts, fingerprint
from tests.campaign.crash.power.record import Record, Tree
from tests.campaign.crash.power.recorder import Recorder
from tests.campaign.crash.power.scenarios import Act, Scenario, nothing, prepare, record, take_over
from tests.campaign.crash.power.state_checks import Expectation, check, expectations, materialise

State = tuple[int, Tree, Expectation]
"""After how many operations the power went, what is left, and what must hold."""


@dataclass(frozen=True)
class Failure:
    """A state in which something was lost."""

    end: int
    last: str
    """The last operation before the cut."""
    reason: str
    tree: Tree

    def __str__(self) -> str:
        return f"power cut after operation {self.end} ({self.last}): {self.reason}"


@dataclass
class Tally:
    """What came of some records."""

    records: int = 0
    operations: int = 0
    moments: int = 0
    """At which the power may go."""
    enumerated: int = 0
    """States, each as often as it came up."""
    checked: int = 0
    """Different ones, each under everything that was promised by then."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count another tally, too."""
        for name in ("records", "operations", "moments", "enumerated", "checked", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures += other.failures


@contextmanager
def scratch() -> Iterator[str]:
    """A folder in memory where there is such a place: the states in it are looked at once."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield os.path.realpath(name)


def record_scenario(scenario: Scenario) -> Record:
    """Carry a scenario out, once, and record it."""
    with scratch() as area:
        prepare(scenario, area)
        return record(scenario, area)


def taken_over(scenario: Scenario, before: Record, end: int, act: Act = take_over) -> Record:
    """A process is killed after ``end`` operations, and another one goes on: nothing has become durable in between."""
    with scratch() as area:
        materialise(before.tree(end), area)
        return record(scenario, area, act, Recorder(area, before.root, before, end))


def crashed_again(tree: Tree) -> Record:
    """After a power cut that left ``tree`` another process goes on, until the next one."""
    with scratch() as area:
        materialise(tree, area)
        return record(Scenario(nothing, take_over), area)


def states(
    run: Record,
    effort: Effort,
    seed: int = 0,
    *,
    damaged: bool = False,
    known: set[object] | None = None,
    first: int = 0,
    latest_first: bool = False,
    tally: Tally | None = None,
) -> Iterator[State]:
    """Every different state of a record; those in ``known``, which grows, are left out.

    The power goes after ``first`` operations at the earliest. ``tally`` counts what comes up.
    """
    seen = set() if known is None else known
    count = Tally() if tally is None else tally
    count.records += 1
    count.operations += run.count
    rng = random.Random(seed)
    moments = zip(cuts(run), expectations(run, damaged=damaged), strict=True)
    for cut, expected in reversed(list(moments)) if latest_first else moments:
        if cut.end < first:
            continue
        count.moments += 1
        for tree in cut.states(effort, rng):
            count.enumerated += 1
            key = (fingerprint(tree), expected)
            if key not in seen:
                seen.add(key)
                yield cut.end, tree, expected


def look(run: Record, found: Iterable[State], *, tally: Tally | None = None, most_failures: int = 3) -> Tally:
    """Check states, until there are none, or enough are bad."""
    tally = Tally() if tally is None else tally
    began = time.monotonic()
    for end, tree, expected in found:
        tally.checked += 1
        reason = _try(tree, expected)
        if reason is not None:
            last = str(run.operations[end - 1]) if end else "nothing"
            tally.failures.append(Failure(end, last, reason, tree))
        if len(tally.failures) >= most_failures:
            break
    tally.seconds += time.monotonic() - began
    return tally


def survey(run: Record, effort: Effort, seed: int = 0, **options: Any) -> Tally:
    """Check every different state of a record; ``options`` are those of ``states``."""
    tally = Tally()
    return look(run, states(run, effort, seed, tally=tally, **options), tally=tally)


def _try(tree: Tree, expected: Expectation) -> str | None:
    """Why a state is bad."""
    with scratch() as folder:
        try:
            check(materialise(tree, folder), expected)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None
