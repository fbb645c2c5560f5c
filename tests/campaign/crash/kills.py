"""Kills a training process with SIGKILL at random moments, over and over, and looks at what it has left each time.

A program: ``python -m tests.campaign.crash.kills`` (``scripts/crash`` is the same in the environment; ``--help``).

Torch is imported once. This process forks lanes, each of which has run roots of its own and forks one training process
after another: none of them starts a thread before it forks, so nothing that a fork would leave behind is ever held.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import select
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from tests.campaign.crash.lanes import Lane, Tally
from tests.campaign.crash.sabotage import SABOTAGES
from tests.campaign.crash.trainee import MODES, Book, Life, Plan, reference, words_of


@dataclasses.dataclass(frozen=True)
class Campaign:
    """So many seconds of killing, in several lanes."""

    seconds: float
    jobs: int
    seed: int
    modes: Sequence[str]
    folder: Path
    sabotage: str | None = None

    def run(self, show: Callable[[Tally], None]) -> Tally:
        """Ends early where something is wrong. ``show`` is told the sum every few seconds."""
        until = time.monotonic() + self.seconds
        pipes = {}
        for number in range(self.jobs):
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.close(reading)
                self._lane(number, until, writing)
            os.close(writing)
            pipes[reading] = b""
        latest: dict[int, Tally] = {}
        shown = time.monotonic()
        while pipes:
            for pipe in select.select(list(pipes), [], [], 1)[0]:
                *lines, pipes[pipe] = (pipes[pipe] + (data := os.read(pipe, 1 << 20))).split(b"\n")
                if lines:
                    latest[pipe] = _tally(lines[-1])
                if not data:
                    del pipes[pipe]
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                show(_sum(latest.values()))
        for _ in range(self.jobs):
            os.wait()
        return _sum(latest.values())

    def _lane(self, number: int, until: float, writing: int) -> None:
        """In the forked child: one lane. It leaves its folder where something was wrong."""
        folder = self.folder / f"lane-{number}"
        folder.mkdir()
        first = number % len(self.modes)
        modes = (*self.modes[first:], *self.modes[:first])
        lane = Lane(folder, f"{self.seed} {number}", modes, self.sabotage)
        try:
            lane.work(until, lambda tally: _tell(writing, tally))
        except BaseException as error:
            lane.tally.problem = f"the campaign itself: {words_of(error)}"
            _tell(writing, lane.tally)
        os._exit(0)


def _tell(out: int, tally: Tally) -> None:
    os.write(out, (json.dumps(vars(tally)) + "\n").encode())


def _tally(line: bytes) -> Tally:
    fields = json.loads(line)
    return Tally(**{**fields, "kills": Counter(fields["kills"])})


def _sum(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10; 0: only sabotage)")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this mode; may be given again")
    parser.add_argument("--seed", type=int, default=0, help="what decides plans and delays (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="lanes (default: one for each core)")
    parser.add_argument(
        "--folder", type=Path, help="where run roots are made (default: in memory, if there is /dev/shm)"
    )
    parser.add_argument(
        "--sabotage",
        choices=SABOTAGES,
        action="append",
        help="then break the library so, and be caught; may be given again",
    )
    return parser.parse_args(arguments)


def warm_up(folder: Path) -> None:
    """Whatever is imported late is imported now, once. No thread of it is left."""
    plan = Plan(0, "sync", 1, wide=True, steps=3)
    life = Life(plan, folder / "root", Book(folder / "book"), reference(plan), random.Random(0))
    life.live(lambda _: None)
    life.examine()


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="kills-", dir=options.folder or memory) as folder:
        (Path(folder) / "warm").mkdir()
        warm_up(Path(folder) / "warm")
        gc.freeze()  # a collection in a child would touch, and so copy, all that was imported
        modes = tuple(options.mode or MODES)
        campaign = Campaign(60 * options.minutes, options.jobs, options.seed, modes, Path(folder))
        status = kill(campaign) if options.minutes else 0
        return max([status, *(catch(campaign, name) for name in options.sabotage or ())])


def kill(campaign: Campaign) -> int:
    """Run a campaign, and print what it has seen. Returns the exit status."""
    began = time.monotonic()
    tally = campaign.run(lambda tally: print(f"{time.monotonic() - began:5.0f} s: {tally.total} kills", flush=True))
    print(tally.table())
    print(
        f"{tally.total} kills in {time.monotonic() - began:.0f} s and {tally.runs} runs (seed {campaign.seed}); "
        f"at most {tally.most_leftovers} leftovers, {tally.most_checkpoints} rotating checkpoints, "
        f"{tally.most_bytes / 2**20:.1f} MiB"
    )
    last = "each left the newest checkpoint known to be durable, or a newer one"
    print(f"FAILED: {tally.problem}" if tally.problem else last, flush=True)
    return 1 if tally.problem else 0


def catch(campaign: Campaign, name: str) -> int:
    """The same against a library broken on purpose, for a minute at most. The exit status: 1 if nothing was noticed."""
    folder = campaign.folder / name
    folder.mkdir()
    tally = dataclasses.replace(campaign, seconds=60, folder=folder, sabotage=name).run(lambda _: None)
    caught = f"caught after {tally.total} kills: {tally.problem}"
    print(f"{name}: {caught if tally.problem else 'MISSED'}", flush=True)
    return 0 if tally.problem else 1


if __name__ == "__main__":
    sys.exit(main())
