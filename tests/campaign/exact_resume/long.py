"""The long form: every case and variant, several cut points, each case resumed in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.campaign.exact_resume import layers, optimizers, schedulers
from tests.campaign.exact_resume.cases import CASES
from tests.campaign.exact_resume.engine import check, resume, save, task_for, uninterrupted

CUTS, STEPS = (0, 4, 9), 14


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    name: str
    seconds: float
    differences: tuple[str, ...]
    """One for each cut point that did not go on exactly."""


def run_case(name: str) -> Outcome:
    """Resume one case from each cut point and compare."""
    begin = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            differences = tuple(_differences(name, Path(folder)))
        except Exception as error:
            differences = (f"{type(error).__name__} before the cut: {error}",)
    torch.set_num_threads(threads)
    return Outcome(name, time.monotonic() - begin, differences)


def _differences(name: str, folder: Path) -> Iterator[str]:
    expected = uninterrupted(name, STEPS)
    save(name, folder / "run", CUTS)
    for cut, found in zip(CUTS, resume([task_for(name, folder, cut, STEPS) for cut in CUTS], folder), strict=True):
        try:
            check(expected, found)
        except AssertionError as error:
            yield f"cut after step {cut}: {error}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; the exit status is 1 on a difference."""
    parser = argparse.ArgumentParser(prog="scripts/exact_resume", description=__doc__)
    parser.add_argument("only", nargs="*", default=["*"], help="globs of case names, for example 'Adam*'")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time")
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing")
    options = parser.parse_args(arguments)
    names = [name for name in CASES if any(fnmatch.fnmatchcase(name, glob) for glob in options.only)]
    if options.list:
        print("\n".join(names))
        return 0
    return _report(names, options.jobs)


def _report(names: Sequence[str], jobs: int) -> int:
    width = max(map(len, names), default=4)
    failed = 0
    print(f"{'case':<{width}}  {'group':<10}  {'s':>4}  result of cuts after steps {', '.join(map(str, CUTS))}")
    with contextlib.ExitStack() as stack:
        outcomes: Iterator[Outcome] = map(run_case, names)
        if jobs > 1:
            pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
            outcomes = stack.enter_context(pool).map(run_case, names)
        for outcome in outcomes:
            failed += bool(outcome.differences)
            result = "DIFFERS" if outcome.differences else "identical"
            group = CASES[outcome.name].group
            print(f"{outcome.name:<{width}}  {group:<10}  {outcome.seconds:4.0f}  {result}", flush=True)
            for difference in outcome.differences:
                print("    " + difference.strip().replace("\n", "\n    "), flush=True)
    left_out = (optimizers.EXCLUDED_CLASSES, optimizers.EXCLUDED_FLAGS, schedulers.EXCLUDED, layers.EXCLUDED)
    for name, reason in itertools.chain.from_iterable(table.items() for table in left_out):
        print(f"{name:<{width}}  left out: {reason}")
    print(f"\n{len(names) - failed} of {len(names)} cases are identical in every bit, from {len(CUTS)} cut points each")
    return 1 if failed or not names else 0


if __name__ == "__main__":
    raise SystemExit(main())
