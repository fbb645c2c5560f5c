"""What the sample of live memory costs a ``save`` in lazy mode: ``python -m benchmarks.lazy_check``.

The same manager saves by turns with the sample and without; the copy of as many bytes, which ``async`` would make in
the call, is timed in every round. Nothing in the package switches the sample off: this program puts an empty one in its
place. A stall is the time that ``save`` holds training; durable is until the commit is fsynced. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from benchmarks import environment
from benchmarks.buffers import Buffer
from checkpointer import CheckpointManager
from checkpointer.policy.lazy_or_async import LazyOrAsync
from checkpointer.staging.sample import Items, Sampler

WITH, WITHOUT = "with the sample", "without"

take = Sampler.take


def gpt(scale: float) -> list[torch.Tensor]:
    """The sizes of a GPT of 124M parameters in fp32, in 146 matrices."""
    width = round(768 * scale**0.5)
    return [torch.randn(round(50257 * scale**0.5), width), *(torch.randn(width, width) for _ in range(145))]


def small(scale: float) -> list[torch.Tensor]:
    """Ten thousand of 16 values."""
    return [torch.randn(16) for _ in range(round(10_000 * scale))]


@dataclass
class Seconds:
    """Of each round."""

    stall: dict[str, list[float]] = field(default_factory=lambda: {WITH: [], WITHOUT: []})
    durable: dict[str, list[float]] = field(default_factory=lambda: {WITH: [], WITHOUT: []})
    sample: list[float] = field(default_factory=list)
    """What ``Sampler.take`` alone takes."""
    copy: list[float] = field(default_factory=list)


class Run:
    """AdamW on some parameters, saved into ``folder``."""

    def __init__(self, parameters: Sequence[torch.Tensor], folder: Path) -> None:
        model = nn.ParameterList([nn.Parameter(tensor) for tensor in parameters])
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
        for parameter in model:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self._optimizer.step()
        entries = self._optimizer.state.values()
        tensors = [*model, *(value for entry in entries for value in entry.values())]
        self.count, self.size = len(tensors), sum(tensor.nbytes for tensor in tensors)
        self._source, self._scratch = Buffer(self.size), Buffer(self.size)
        self._manager = CheckpointManager(
            folder, config={"write": {"mode": "lazy"}, "keep": {"last": 1}}, model=model, optimizer=self._optimizer
        )
        self._step = 0

    def measure(self, rounds: int) -> Seconds:
        """After a round that is not counted."""
        found = Seconds()
        with self._manager:
            for number in range(rounds + 1):
                found = Seconds() if number == 1 else found
                for which in (WITH, WITHOUT) if number % 2 else (WITHOUT, WITH):
                    self._save(which, found)
                began = time.perf_counter()
                np.copyto(self._scratch.array, self._source.array)
                found.copy.append(time.perf_counter() - began)
        return found

    def _save(self, which: str, found: Seconds) -> None:
        def timed(sampler: Sampler, spans: Any, seed: int) -> list[Items]:
            began = time.perf_counter()
            noted = take(sampler, spans, seed)
            found.sample.append(time.perf_counter() - began)
            return noted

        def nothing(sampler: Sampler, spans: Any, seed: int) -> list[Items]:  # noqa: ARG001  in place of Sampler.take
            return []

        os.sync()
        self._step += 1
        with mock.patch.object(Sampler, "take", timed if which == WITH else nothing):
            began = time.perf_counter()
            handle = self._manager.save(self._step)
            found.stall[which].append(time.perf_counter() - began)
            assert handle is not None
            handle.result()
            found.durable[which].append(time.perf_counter() - began)
        self._manager.wait()
        self._optimizer.step()


def row(name: str, seconds: Sequence[float], durable: Sequence[float] = ()) -> str:
    cells = [_spread(seconds, 1e3, 1), _spread(durable, 1, 2) if durable else ""]
    return f"| {name} | {' | '.join(cells)} |"


def _spread(seconds: Sequence[float], unit: float, digits: int) -> str:
    low, middle, high = (f"{pick(seconds) * unit:.{digits}f}" for pick in (min, statistics.median, max))
    return f"{middle} ({low} – {high})"


def table(title: str, run: Run, seconds: Seconds) -> str:
    goal = 10 + 0.005 * run.count
    return "\n".join(
        [
            f"\n## {title}: {run.size / 2**20:,.1f} MiB in {run.count:,} tensors\n",
            "| | ms of the call | durable, s |",
            "| --- | ---: | ---: |",
            *(row(f"`save`, {which}", seconds.stall[which], seconds.durable[which]) for which in (WITH, WITHOUT)),
            row("taking the sample", seconds.sample),
            row("copying as many bytes, one thread", seconds.copy),
            f"\nThe goal is 10 ms and 5 µs a tensor: {goal:.1f} ms.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of parameters")
    parser.add_argument("--dir", type=Path, help="where to write; default: a temporary directory")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        folder = Path(name)
        print("# What the check of lazy mode costs\n")
        about = {**environment.describe(folder), "rounds": str(options.rounds), "load": f"{os.getloadavg()[0]:.1f}"}
        print("\n".join(f"- {key}: {value}" for key, value in about.items()))
        print("\nBy turns in one run; medians with (lowest – highest). `load`: how many wanted a core beforehand.")
        # However much a save costs here, where no training hides it, it has to be a lazy one.
        with mock.patch.object(LazyOrAsync, "choose", return_value="lazy"):
            for title, build in (("GPT, 124M parameters in fp32, AdamW", gpt), ("Small parameters, AdamW", small)):
                run = Run(build(options.scale), folder / build.__name__)
                print(table(title, run, run.measure(options.rounds)), flush=True)


if __name__ == "__main__":
    main()
