"""Kill random ranks at random events of their saves, for a while: ``scripts/crash_ranks --seconds 120``.

Jobs have 2 to 4 ranks. First a rank is killed at each event that a save has, once on the coordinator and once on
another rank: between any two operations on the disk, half-way through each file, before and after each word to the
others. Then at random ones. After each kill every checkpoint has to be whole, the newest has to come back bit for bit,
at the same and at another number of ranks, the next job has to save again, and nothing may be left over.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.campaign.distributed.crashing import SABOTAGES, Kill, check_one, events_of

WORLDS = (2, 3, 4)
MOST_EVENTS = 60
"""Of a job, about, that come on the coordinator; and a third as many on another rank."""


class Crash(NamedTuple):
    """One job, and its end."""

    world: int
    kill: Kill
    other: int
    """How many ranks look at what is left, before as many as before go on."""

    def __str__(self) -> str:
        place = self.kill.event or "any event"
        return f"{self.world} ranks, rank {self.kill.rank} killed at {place}, number {self.kill.count}"


def every_event(dice: random.Random) -> Iterator[Crash]:
    """A kill of each kind of rank at each event."""
    with tempfile.TemporaryDirectory() as folder:
        events = events_of(Path(folder, "run"), 2)
    for kind, names in enumerate(events):
        for name in names:
            world = dice.choice(WORLDS)
            yield Crash(world, Kill(kind and dice.randrange(1, world), name), another(world, dice))


def random_events(dice: random.Random) -> Iterator[Crash]:
    """Any rank, at any event."""
    while True:
        world = dice.choice(WORLDS)
        victim = dice.randrange(world)
        count = dice.randint(1, MOST_EVENTS // 3 if victim else MOST_EVENTS)
        yield Crash(world, Kill(victim, "", count), another(world, dice))


def another(world: int, dice: random.Random) -> int:
    """Another number of ranks."""
    return dice.choice([size for size in (1, 1, *WORLDS) if size != world])


class Campaign:
    """What came of it."""

    def __init__(self, sabotage: str | None = None) -> None:
        self.outcomes: Counter[str] = Counter()
        self.events: set[tuple[bool, str]] = set()
        self._sabotage = sabotage

    def crash(self, crash: Crash) -> None:
        """One crash.

        Raises:
            AssertionError: something was lost.
        """
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damage: that is an error below
            outcome = check_one(
                Path(folder, "run"), crash.world, crash.kill, other=crash.other, sabotage=self._sabotage
            )
        assert outcome != "not killed" or not crash.kill.event, "there was no such event"
        kind = "coordinator" if crash.kill.rank == 0 else "other rank"
        self.outcomes[f"{crash.world} ranks, {kind} {outcome}"] += 1
        if crash.kill.event:
            self.events.add((crash.kill.rank == 0, crash.kill.event))

    @property
    def kills(self) -> int:
        """How many there were."""
        return sum(count for outcome, count in self.outcomes.items() if "not killed" not in outcome)


def caught(name: str, dice: random.Random) -> bool:
    """Whether a campaign on a library that is broken in this way finds anything."""
    campaign = Campaign(name)
    for crash in every_event(dice):
        try:
            campaign.crash(crash)
        except AssertionError as error:
            print(f"{name}: caught after {campaign.kills} kills: {str(error).splitlines()[0]}", flush=True)
            return True
    print(f"{name}: NOT CAUGHT by {campaign.kills} kills", flush=True)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/crash_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="of kills at random events (default: 120)")
    parser.add_argument("--random", action="store_true", help="no kills at each event before them")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    parser.add_argument(
        "--sabotage", action="append", choices=sorted(SABOTAGES), default=[], help="the campaign has to notice it"
    )
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"seed {options.seed}", flush=True)
    if options.sabotage:
        noticed = [caught(name, dice) for name in options.sabotage]
        raise SystemExit(not all(noticed))
    campaign = Campaign()
    if not options.random:
        for crash in every_event(dice):
            attempt(campaign, crash)
        print(f"{campaign.kills} kills, at each of {len(campaign.events)} events of a save", flush=True)
    limit = time.monotonic() + options.seconds
    for crash in random_events(dice):
        if time.monotonic() > limit:
            break
        attempt(campaign, crash)
    print(*(f"{count:4} {outcome}" for outcome, count in sorted(campaign.outcomes.items())), sep="\n")
    print(f"{campaign.kills} kills: every checkpoint whole, every restart exact")


def attempt(campaign: Campaign, crash: Crash) -> None:
    """One crash; the program ends where something was lost."""
    try:
        campaign.crash(crash)
    except AssertionError as error:
        raise SystemExit(f"LOST: {crash}: {error}") from error


if __name__ == "__main__":
    main()
