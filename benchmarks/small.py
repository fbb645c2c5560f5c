"""A model of 1 MB with AdamW, alone in its run root and behind 800 checkpoints: ``python -m benchmarks.small``.

Everything by turns, in one process and on one file system: plain torch with the fsyncs that make it durable, and a
manager in ``sync`` mode that was made just now, as after a restart. Prints Markdown; the exit status is 1 where a goal
is missed. The page cache is warm throughout: what is compared is what the processor does.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from checkpointer import CheckpointManager

SAVES = 3
"""Saves a round of each manager, with a step of training before each."""

NAP = 0.1
"""Seconds between two saves: what follows a commit in the background is not measured, as in a real run."""

GOALS = (
    ("sync save, empty root / plain torch", "save, empty root", "save, plain torch", 1.6),
    ("restore_latest, empty root / plain torch", "restore, empty root", "restore, plain torch", 2.0),
    ("sync save, many checkpoints / empty root", "save, many", "save, empty root", 1.1),
    ("restore_latest, many checkpoints / empty root", "restore, many", "restore, empty root", 1.1),
)


class Training:
    """A perceptron of ``layers`` square layers of ``width``, each with its norm."""

    def __init__(self, width: int, layers: int = 4) -> None:
        torch.manual_seed(0)
        pairs = ((nn.Linear(width, width), nn.LayerNorm(width)) for _ in range(layers))
        self.model = nn.Sequential(*(module for pair in pairs for module in pair))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.width = width
        self.step()

    def step(self) -> None:
        """Train one step."""
        self.optimizer.zero_grad()
        self.model(torch.randn(2, self.width)).square().mean().backward()
        self.optimizer.step()

    def manager(self, root: Path, *, durable: bool = True) -> CheckpointManager:
        """One that writes everything each time."""
        write = {"mode": "sync", "share": False, "durable": durable}
        return CheckpointManager(root, config={"write": write}, model=self.model, optimizer=self.optimizer)


class Bench:
    """The run roots in ``folder``, and what was measured of each, in seconds."""

    def __init__(self, folder: Path, checkpoints: int, width: int) -> None:
        self._training = Training(width)
        self._empty, self._many, self._plain = folder / "empty", folder / "many", folder / "plain"
        self.samples: dict[str, list[float]] = defaultdict(list)
        self._plain.mkdir()
        self._fill(self._many, checkpoints)

    def round(self) -> None:
        """Everything once."""
        self._plain_torch()
        shutil.rmtree(self._empty, ignore_errors=True)
        self._fill(self._empty, 1)
        self._restart("empty root", self._empty)
        self._restart("many", self._many)
        (self._many / ".checkpointer" / "known").unlink(missing_ok=True)
        with self._training.manager(self._many) as manager:
            self._time("restore, many, nothing known", manager.restore_latest)

    def _restart(self, kind: str, root: Path) -> None:
        """A new process's first restore, and then some saves."""
        with self._training.manager(root) as manager:
            self._time(f"restore, {kind}", manager.restore_latest)
            latest = manager.latest()
            assert latest is not None
            manager.save(latest.step + 1)  # the first one looks whether another job has saved meanwhile
            for step in range(latest.step + 2, latest.step + 2 + SAVES):
                self._training.step()
                time.sleep(NAP)
                self._time(f"save, {kind}", lambda step=step: manager.save(step))  # type: ignore[misc]

    def _fill(self, root: Path, checkpoints: int) -> None:
        """Save so often: a tiny model of the same form, and at last the one that is measured."""
        tiny = Training(4)
        with tiny.manager(root, durable=False) as manager:
            for step in range(checkpoints - 1):
                manager.save(step)
        with self._training.manager(root, durable=False) as manager:
            manager.restore_latest(components=[])
            manager.save(checkpoints)

    def _plain_torch(self) -> None:
        model, optimizer = self._training.model, self._training.optimizer
        place = self._plain / "checkpoint.pt"

        def save() -> None:
            with open(place.with_suffix(".new"), "wb") as file:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                file.flush()
                os.fsync(file.fileno())
            place.with_suffix(".new").rename(place)
            directory = os.open(self._plain, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

        def load() -> None:
            saved = torch.load(place, weights_only=True)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])

        for _ in range(SAVES):
            self._training.step()
            time.sleep(NAP)
            self._time("save, plain torch", save)
        self._time("restore, plain torch", load)

    def _time(self, name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        self.samples[name].append(time.perf_counter() - began)


def report(samples: dict[str, list[float]]) -> tuple[str, bool]:
    """Two tables; whether every goal holds."""
    medians = {name: statistics.median(values) for name, values in samples.items()}
    lines = ["| | median | lowest | highest |", "| --- | --- | --- | --- |"]
    for name, values in samples.items():
        cells = (medians[name], min(values), max(values))
        lines.append(f"| {name} | {' | '.join(f'{cell * 1e3:.2f} ms' for cell in cells)} |")
    lines += ["", "| goal | limit | measured | holds |", "| --- | --- | --- | --- |"]
    holds = True
    for goal, name, base, limit in GOALS:
        ratio = medians[name] / medians[base]
        holds = holds and ratio <= limit
        lines.append(f"| {goal} | {limit} × | {ratio:.2f} × | {'yes' if ratio <= limit else '**no**'} |")
    return "\n".join(lines), holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--checkpoints", type=int, default=800)
    parser.add_argument("--width", type=int, default=256, help="256 makes 1 MB of parameters")
    parser.add_argument("--dir", type=Path, default=None, help="on the file system to measure")
    options = parser.parse_args(arguments)
    logger = logging.getLogger("checkpointer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-small-") as folder:
            bench = Bench(Path(folder), options.checkpoints, options.width)
            for _ in range(options.rounds):
                bench.round()
    finally:
        logger.setLevel(level)
    text, holds = report(bench.samples)
    print(text)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
