"""Measure, and write the report: ``scripts/bench``, or ``python -m benchmarks`` where the peers are installed."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a spawned child imports this module, and should not import all that
    from benchmarks.measure import Plan, Result
    from benchmarks.workloads import Workload

Chosen = TypeVar("Chosen")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; with ``--strict`` 1 where a goal is missed; 2 for names that do not exist."""
    options = _parse(arguments)
    from benchmarks.contenders import CONTENDERS
    from benchmarks.measure import Plan
    from benchmarks.workloads import WORKLOADS

    contenders = _select(options.only, {kind.name: kind for kind in CONTENDERS})
    workloads = _select(options.workload, WORKLOADS)
    if not contenders or not workloads:
        return 2
    for folder in (options.out, options.dir):
        folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        options.dir,
        options.scale,
        options.rounds,
        options.seed,
        options.loader_workers,
        options.device,
        tuple(contenders),
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    with _undisturbed():
        return _measure_all(workloads, plan, options)


def _measure_all(workloads: Sequence[Workload], plan: Plan, options: argparse.Namespace) -> int:
    """The report is written anew after each round: what is measured is not lost."""
    from benchmarks import environment, goals
    from benchmarks.measure import measure

    run = {
        "scale": plan.scale, "rounds": plan.rounds, "seed": plan.seed, "loader workers": plan.loader_workers,
        "device": plan.device,
    }  # fmt: skip
    about = {"environment": environment.describe(plan.folder), "run": run}
    results: dict[str, Result] = {}
    for workload in workloads:

        def write(result: Result, name: str = workload.name) -> str:
            results[name] = result
            return _write(results, about, options)

        text = write(measure(workload, plan, write))
    print(text)
    print(f"written to {options.out}", file=sys.stderr)
    return 1 if options.strict and any(verdict.holds is False for verdict in goals.judge(results)) else 0


def _write(results: Mapping[str, Result], about: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Markdown, JSON, and a plot of what was measured last; returns the Markdown."""
    from benchmarks import goals, plot, report

    verdicts = goals.judge(results)
    text = report.to_markdown(results, about)
    if options.against_goals or options.strict:
        text += f"\n{report.goals_to_markdown(verdicts)}"
    (options.out / "results.md").write_text(text, encoding="utf-8")
    found = json.dumps(report.to_json(results, verdicts, about), indent=1)
    (options.out / "results.json").write_text(found, encoding="utf-8")
    name, result = list(results.items())[-1]
    plot.draw(result, options.out / name)
    return text


def _select(patterns: str, known: Mapping[str, Chosen]) -> list[Chosen]:
    """What is called like one of the globs, in the order of ``known``; nothing, and a message, if nothing is."""
    globs = [pattern.strip() for pattern in patterns.split(",")]
    unknown = [glob for glob in globs if not fnmatch.filter(known, glob)]
    if unknown:
        print(f"nothing is called {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return []
    return [item for name, item in known.items() if any(fnmatch.fnmatch(name, glob) for glob in globs)]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No warnings of the peers, which come at every call."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        logging.disable(logging.NOTSET)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="*", help="globs with commas: gpt, small, large, lora, convnet")
    parser.add_argument("--only", default="*", help="contenders, as globs with commas: 'checkpointer-*,torch.save*'")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the state; 1 is 1.5 GB of GPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round, and of the data")
    parser.add_argument(
        "--loader-workers", type=int, default=0, help="forked workers of a DataLoader, alive in every save"
    )
    parser.add_argument("--device", default="cpu", help="where model and optimizer live, for example cuda")
    parser.add_argument("--dir", type=Path, default=Path("runs/bench/work"), help="on the file system to measure")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="for results.md, results.json and the plots"
    )
    parser.add_argument("--against-goals", action="store_true", help="say of each goal of the project whether it holds")
    parser.add_argument("--strict", action="store_true", help="the same, with exit status 1 where one does not")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
