"""Kill a training run again and again, and prove that nothing was lost.

Two runs of ``train.py`` start from the same seed. One is left alone. The other is killed with SIGKILL several times,
also in the middle of saves, and started again each time. In the end the two must agree in every bit: weights,
optimizer state, learning-rate schedule, data order, random numbers, and the loss of every single step.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from compare import Comparison, compare
from digits import load_digits
from killing import GLANCE, DemoError, Landing, Moment, Run, between_saves, committing, deleting, writing
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

KILLS: Sequence[tuple[float, Moment]] = (  # part of the run that is done, and what to wait for then
    (0.15, between_saves),
    (0.35, writing),
    (0.55, committing),
    (0.75, deleting),
)
QUICK_KILLS: Sequence[tuple[float, Moment]] = ((0.3, writing), (0.6, committing))
ACCURACY = "test accuracy"


class Survived(NamedTuple):
    landing: Landing
    resumed_at: int

    @property
    def lost_nothing(self) -> bool:
        """Whether training went on right behind the newest committed checkpoint."""
        newest = self.landing.newest
        return self.resumed_at == (0 if newest is None else newest + 1)


def main() -> int:
    args = parse_arguments()
    console = Console()
    steps, kills = (150, QUICK_KILLS) if args.quick else (500, KILLS)
    try:
        with working_folder(args.keep) as folder:
            console.print(f"A vision transformer learns MNIST in {steps} steps, twice from the same seed.")
            data = folder / "digits.pt"
            load_digits(data)
            alone, killed = Run(folder / "alone", data, steps), Run(folder / "killed", data, steps)
            survived = carry_out(alone, killed, kills, console)
            results = compare_runs(alone, killed)
    except DemoError as error:
        console.print(str(error), markup=False)
        return 2
    return report(survived, results, console)


def carry_out(alone: Run, killed: Run, kills: Sequence[tuple[float, Moment]], console: Console) -> list[Survived]:
    """Let both runs come to their end, side by side."""
    survived = []
    with progress_of({"left alone": alone, "killed": killed}, console):
        try:
            alone.start()
            killed.start()
            for part, moment in kills:
                landing = killed.kill(int(part * killed.steps), moment)
                console.print(f"SIGKILL after {landing.steps_done} steps, {landing.where}", highlight=False)
                killed.start()
                survived.append(Survived(landing, killed.first_step()))
            killed.wait()
            alone.wait()
        finally:
            alone.end()
            killed.end()
    return survived


@contextlib.contextmanager
def progress_of(runs: Mapping[str, Run], console: Console) -> Iterator[None]:
    """Bars that follow the loss logs."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    finished = threading.Event()
    with Progress(*columns, console=console) as progress:
        bars = {progress.add_task(name, total=run.steps): run for name, run in runs.items()}

        def follow() -> None:
            while not finished.wait(GLANCE):
                for bar, run in bars.items():
                    progress.update(bar, completed=run.steps_done())

        follower = threading.Thread(target=follow)
        follower.start()
        try:
            yield
        finally:
            finished.set()
            follower.join()
            for bar, run in bars.items():
                progress.update(bar, completed=run.steps_done())


def compare_runs(alone: Run, killed: Run) -> dict[str, Comparison]:
    """What each run came to, item by item."""
    first, second = (torch.load(run.final, weights_only=True) for run in (alone, killed))
    losses = [run.losses.read_text(encoding="ascii").splitlines() for run in (alone, killed)]
    kept = [sorted(path.name for path in run.root.glob("checkpoint-*")) for run in (alone, killed)]
    return {
        **{item: compare(first[item], second[item]) for item in first if item != ACCURACY},
        f"{ACCURACY}: {first[ACCURACY]:.1%}": compare(first[ACCURACY], second[ACCURACY]),
        "loss of every step": compare(*losses),
        "names of the checkpoints kept": compare(*kept),
    }


def report(survived: Sequence[Survived], results: Mapping[str, Comparison], console: Console) -> int:
    console.print(table_of_kills(survived))
    console.print(table_of_results(results))
    wrong = [item for item, result in results.items() if result.differing]
    if wrong or not all(kill.lost_nothing for kill in survived):
        console.print(f"[bold red]NOT the same run: {', '.join(wrong) or 'a committed checkpoint was lost'}")
        return 1
    repeated = sum(kill.landing.steps_done - kill.resumed_at for kill in survived)
    console.print(f"[bold green]Identical in every bit: {len(survived)} kills cost {repeated} repeated steps, no more.")
    return 0


def table_of_kills(survived: Sequence[Survived]) -> Table:
    table = Table(title="Kills", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("steps\ndone", justify="right")
    table.add_column("\nkilled while", no_wrap=True)
    table.add_column("newest\ncheckpoint", justify="right")
    table.add_column("resumed\nat step", justify="right")
    for landing, resumed_at in survived:
        table.add_row(str(landing.steps_done), landing.where, str(landing.newest), str(resumed_at))
    return table


def table_of_results(results: Mapping[str, Comparison]) -> Table:
    table = Table(title="The run left alone against the run killed", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("item")
    table.add_column("values", justify="right")
    table.add_column("identical")
    for item, (values, differing) in results.items():
        verdict = f"[red]NO, {len(differing)} entries differ" if differing else "[green]yes"
        table.add_row(item, f"{values:,}", verdict)
    return table


@contextlib.contextmanager
def working_folder(keep: Path | None) -> Iterator[Path]:
    """``keep``, which must not exist yet, or a folder that is removed afterwards."""
    if keep:
        keep.mkdir(parents=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory(prefix="checkpointer-demo-") as folder:
            yield Path(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description="Kill a training run and prove that nothing was lost."
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and fewer kills")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave both runs in this new folder, to look at")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
