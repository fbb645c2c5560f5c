"""Measure, and write the report: ``scripts/bench``, or ``python -m benchmarks`` where the peers are installed."""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; with ``--strict`` 1 where a goal is missed."""
    options = _parse(arguments)
    from benchmarks import environment, goals, plot, report
    from benchmarks.contenders import CONTENDERS
    from benchmarks.measure import Plan, measure
    from benchmarks.workloads import WORKLOADS

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # peers warn at every call; what is wrong shows in the gate
    patterns = [pattern.strip() for pattern in options.only.split(",")]
    chosen = tuple(kind for kind in CONTENDERS if any(fnmatch.fnmatch(kind.name, pattern) for pattern in patterns))
    names = list(WORKLOADS) if options.workload == "all" else options.workload.split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown or not chosen:
        known = ", ".join([*WORKLOADS] if unknown else [kind.name for kind in CONTENDERS])
        print(f"nothing is called {', '.join(unknown or patterns)}; there are {known}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        options.dir, options.scale, options.rounds, options.seed, options.loader_workers, chosen,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    run = {
        "scale": options.scale,
        "rounds": options.rounds,
        "seed": options.seed,
        "loader workers": options.loader_workers,
    }
    options.dir.mkdir(parents=True, exist_ok=True)
    about = {"environment": environment.describe(options.dir), "run": run}
    results = {}
    for name in names:
        results[name] = measure(WORKLOADS[name], plan)
        verdicts = goals.judge(results)
        text = report.to_markdown(results, about)
        if options.against_goals or options.strict:
            text += f"\n{report.goals_to_markdown(verdicts)}"
        (options.out / "results.md").write_text(text, encoding="utf-8")
        (options.out / "results.json").write_text(
            json.dumps(report.to_json(results, verdicts, about), indent=1), encoding="utf-8"
        )
        plot.draw(results[name], options.out / name)
    print(text)
    print(f"written to {options.out}", file=sys.stderr)
    return 1 if options.strict and any(verdict.holds is False for verdict in verdicts) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="all", help="names, with commas: gpt, small, large, lora, convnet")
    parser.add_argument("--only", default="*", help="contenders, as globs with commas: 'checkpointer-*,torch.save*'")
    parser.add_argument("--scale", type=float, default=1.0, help="size of the state; 1 is 1.5 GB of GPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the order in each round, and of the data")
    parser.add_argument(
        "--loader-workers", type=int, default=0, help="forked workers of a DataLoader, alive in every save"
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/bench/work"), help="on the file system to measure")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="for results.md, results.json and the plots"
    )
    parser.add_argument("--against-goals", action="store_true", help="say of each goal of the project whether it holds")
    parser.add_argument("--strict", action="store_true", help="the same, with exit status 1 where one does not")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
