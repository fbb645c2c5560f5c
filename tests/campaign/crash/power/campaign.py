"""Every state that a power cut may leave, of every operation: ``scripts/crash_states``."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from tests.campaign.crash.power import uml
from tests.campaign.crash.power.engine import Tally, crashed_again, look, record_scenario, states, survey, taken_over
from tests.campaign.crash.power.mutations import ORDERS, REDUNDANT, Verdicts, in_another_order, judge
from tests.campaign.crash.power.persistence import Effort
from tests.campaign.crash.power.power_cuts import FILE_SYSTEMS, impossible_here, power_cuts, real_states
from tests.campaign.crash.power.record import MARK, Record
from tests.campaign.crash.power.scenarios import SCENARIOS

SYSTEMATIC = Effort(exhaustive=256, sample=8, pairs=False)
THOROUGH = Effort(exhaustive=4096, sample=64)
QUICK = Effort(exhaustive=16, sample=2, pairs=False)
SAMPLE = Effort(exhaustive=0, sample=16, pairs=False)
TAKE_OVER_STRIDE = 8
"""Processes are killed at each operation; so many tasks share the work."""


@dataclass(frozen=True)
class Task:
    """A part of the campaign that one process does at a time."""

    part: str
    name: str
    """Of the scenario, or of the mutation."""
    seed: int
    detail: str = ""
    """The file system, where a process is killed, or how many states are gone on from."""
    thorough: bool = False


@dataclass
class Outcome:
    """What came of a task."""

    task: Task
    tally: Tally
    verdicts: Verdicts = field(default_factory=Verdicts)
    bad: tuple[str, ...] = ()
    """What should not be."""

    @property
    def complaints(self) -> list[str]:
        """``bad``, with where."""
        return [f"{self.task.part}, {self.task.name} {self.task.detail}: {bad}" for bad in self.bad]


def perform(task: Task) -> Outcome:
    """Carry out one task, in a process of its own."""
    torch.set_num_threads(1)
    work: dict[str, Callable[[Task], Outcome]] = {
        "states": _states,
        "sample": _states,
        "take-overs": _take_over,
        "again": _again,
        "mutations": _mutations,
        "orders": _order,
        "power cuts": _power_cuts,
        "uml": _uml,
    }
    try:
        outcome = work[task.part](task)
    except Exception as error:
        return Outcome(task, Tally(), Verdicts(), (f"{type(error).__name__}: {error}",))
    outcome.bad += tuple(map(str, outcome.tally.failures))
    return outcome


def _states(task: Task) -> Outcome:
    scenario = SCENARIOS[task.name]
    effort = SAMPLE if task.part == "sample" else THOROUGH if task.thorough else SYSTEMATIC
    tally = survey(record_scenario(scenario), effort, task.seed, damaged=scenario.damaged)
    return Outcome(task, tally)


def _take_over(task: Task) -> Outcome:
    """Killed after each of a range of operations, with another process going on."""
    scenario = SCENARIOS[task.name]
    before = record_scenario(scenario)
    tally, known = Tally(), set[object]()
    for end in range(1 + int(task.detail), len(before.operations), TAKE_OVER_STRIDE):
        if before.operations[end - 1].kind != MARK:
            run = taken_over(scenario, before, end)
            tally.add(survey(run, QUICK, task.seed, damaged=scenario.damaged, known=known, first=end + 1))
    return Outcome(task, tally)


def _again(task: Task) -> Outcome:
    """Some of the states that a power cut leaves, each with a next job in whose recovery the power goes again."""
    scenario = SCENARIOS[task.name]
    found = list(states(record_scenario(scenario), QUICK, task.seed))
    tally, known = Tally(), set[object]()
    for _, tree, _ in random.Random(task.seed).sample(found, min(int(task.detail), len(found))):
        tally.add(survey(crashed_again(tree), QUICK, task.seed, known=known))
    return Outcome(task, tally)


def _mutations(task: Task) -> Outcome:
    scenario = SCENARIOS[task.name]
    run = _killed(task) if task.detail else record_scenario(scenario)
    verdicts = judge(run, damaged=scenario.damaged)
    return Outcome(task, Tally(), verdicts, tuple(f"can be left out: {odd}" for odd in verdicts.odd))


def _killed(task: Task) -> Record:
    """Taken over right after the first operation that ``detail`` describes."""
    before = record_scenario(SCENARIOS[task.name])
    return taken_over(SCENARIOS[task.name], before, after(before, task.detail))


def after(run: Record, kind: str) -> int:
    """How many operations there were once the first of some kind was done: ``rename … -> runs/a/checkpoint-3``."""
    begin, _, end = kind.partition(" … ")
    return 1 + next(
        n for n, item in enumerate(run.operations) if str(item).startswith(begin) and str(item).endswith(end)
    )


def _order(task: Task) -> Outcome:
    with in_another_order(task.name) as name:
        run = record_scenario(SCENARIOS[name])
        noticed = look(run, states(run, SYSTEMATIC, task.seed), most_failures=1).failures
    return Outcome(task, Tally(), Verdicts(), () if noticed else (f"nobody notices: {task.name}",))


def _power_cuts(task: Task) -> Outcome:
    scenario = SCENARIOS[task.name]
    with power_cuts(scenario, task.detail) as (run, disks):
        tally = Tally()
        look(run, real_states(run, disks, damaged=scenario.damaged, tally=tally), tally=tally)
    return Outcome(task, tally)


def _uml(task: Task) -> Outcome:
    """Whole machines, of User-Mode Linux."""
    return Outcome(task, uml.PARTS[task.name](int(task.detail), task.seed))


IMPOSSIBLE: dict[str, Callable[[], str | None]] = {"power cuts": impossible_here, "uml": uml.lacking}
"""Why a part cannot be carried out on this machine, if it cannot."""


KILLED = {
    "first save": ("mkdir runs", "mkdir runs/a"),
    "save and prune": ("rename … -> runs/a/checkpoint-3", "rename runs/a/checkpoint-1 -> … "),
    "pin and annotate": ("mkdir runs/a/.checkpointer/notes",),
    "prune in place": ("unlink runs/a/checkpoint-1/manifest.json",),
}
"""Where a process is killed so that the next one has to make durable what it has left."""


def tasks(seed: int, *, thorough: bool) -> dict[str, list[Task]]:
    """What there is to do, by part; the short ones before the long ones."""
    again = 40 if thorough else 4
    small = [name for name, scenario in SCENARIOS.items() if not scenario.damaged]
    return {
        "states": [Task("states", name, seed, thorough=thorough) for name in SCENARIOS],
        "again": [Task("again", name, seed, str(again)) for name in small],
        "mutations": [
            *(Task("mutations", name, seed) for name in SCENARIOS),
            *(Task("mutations", name, seed, where) for name, places in KILLED.items() for where in places),
            *(Task("orders", name, seed) for name in ORDERS),
        ],
        "power cuts": [Task("power cuts", name, seed, kind) for kind in FILE_SYSTEMS for name in SCENARIOS],
        "take-overs": [
            Task("take-overs", name, seed, str(first))
            for name in (small if thorough else KILLED)
            for first in range(TAKE_OVER_STRIDE)
        ],
        "uml": [Task("uml", name, seed, str(50 if thorough else 5)) for name in uml.PARTS],
    }


Perform: TypeAlias = "Callable[[Iterable[Task]], Iterator[Outcome]]"


class Report:
    """The table, line by line, as tasks end."""

    HEADER = (
        f"{'part':<12} {'records':>8} {'operations':>11} {'moments':>8} {'enumerated':>11} {'checked':>8} {'lost':>5}"
    )

    def __init__(self) -> None:
        self.bad: list[str] = []
        self.total = Tally()
        self.tasks = 0

    def add(self, part: str, outcomes: Sequence[Outcome]) -> None:
        """One line for a part of the campaign."""
        tally = Tally()
        self.tasks += len(outcomes)
        for outcome in outcomes:
            tally.add(outcome.tally)
            self.bad += outcome.complaints
        self.total.add(tally)
        self.line(part, tally)

    def line(self, part: str, tally: Tally) -> None:
        """Print one."""
        print(
            f"{part:<12} {tally.records:8,} {tally.operations:11,} {tally.moments:8,} {tally.enumerated:11,} "
            f"{tally.checked:8,} {len(tally.failures):5}",
            flush=True,
        )

    def mutations(self, outcomes: Sequence[Outcome]) -> None:
        """What was made of wrong programs."""
        verdicts = Verdicts()
        self.tasks += len(outcomes)
        for outcome in outcomes:
            verdicts.add(outcome.verdicts)
            self.bad += outcome.complaints
        missing = [site for site, failure in verdicts.sites.items() if failure is None]
        self.bad += [f"can all be left out: the fsyncs of {site}" for site in missing]
        orders = [outcome for outcome in outcomes if outcome.task.part == "orders"]
        print(f"\nmutations: {verdicts.total} programs without one fsync, {verdicts.noticed.total()} of them noticed;")
        print(
            f"  {len(verdicts.sites)} without any fsync of one function, {len(verdicts.sites) - len(missing)} noticed;"
        )
        print(f"  {len(orders)} with steps in another order, {sum(not outcome.bad for outcome in orders)} noticed")
        for site in sorted(verdicts.sites):
            print(
                f"  {site:<40} {verdicts.noticed[site]:4} of {verdicts.noticed[site] + verdicts.unnoticed[site]:4}",
                end="",
            )
            print(f"  the others: {REDUNDANT[site]}" if verdicts.unnoticed[site] and site in REDUNDANT else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; the exit status is 1 where anything was lost, or a wrong program was not noticed."""
    parser = argparse.ArgumentParser(prog="scripts/crash_states", description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=["*"], help="globs of their names, for example 'save *'")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument("--minutes", type=float, default=0.0, help="take more samples until so much time is over")
    parser.add_argument("--thorough", action="store_true", help="more of everything: hours")
    parser.add_argument("--only", choices=tasks(0, thorough=False), action="append", help="parts to run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tasks at a time")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        run: Perform = _in_turn
        if options.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(options.jobs, mp_context=spawn))
            run = partial(pool.map, perform)
        report = _campaign(options, run)
    report.line("all", report.total)
    print("", *report.bad, sep="\n")
    return 1 if report.bad or not report.tasks else 0


def _in_turn(work: Iterable[Task]) -> Iterator[Outcome]:
    return map(perform, work)


def _campaign(options: argparse.Namespace, run: Perform) -> Report:
    """Every part that is asked for, then samples until the time is over."""
    until = time.monotonic() + 60 * options.minutes
    report = Report()
    print(Report.HEADER, flush=True)
    for part, every in tasks(options.seed, thorough=options.thorough).items():
        work = [task for task in every if any(fnmatch.fnmatchcase(task.name, glob) for glob in options.scenarios)]
        reason = IMPOSSIBLE[part]() if part in IMPOSSIBLE else None
        if (options.only and part not in options.only) or reason or not work:
            print(f"{part:<12} left out: {reason or 'not asked for'}")
        elif part == "mutations":
            report.mutations(list(run(work)))
        else:
            report.add(part, list(run(work)))
    for seed in itertools.count(options.seed + 1):
        if time.monotonic() >= until:
            break
        report.add("sample", list(run([Task("sample", name, seed) for name in SCENARIOS])))
    return report


if __name__ == "__main__":
    raise SystemExit(main())
