"""Kill random ranks at random operations of their saves, for a while: ``scripts/crash_ranks --seconds 120``.

Jobs have 2 to 4 ranks. After each kill every checkpoint has to be whole, and the next job has to restore the newest,
bit for bit, and to save again.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.distributed.crashing import check_one


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/crash_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the moments")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    print(f"seed {options.seed}")
    outcomes: Counter[str] = Counter()
    limit = time.monotonic() + options.seconds
    while time.monotonic() < limit:
        world = dice.randint(2, 4)
        victim, after = dice.randrange(world), dice.randint(1, 40)
        if victim:
            after = dice.randint(1, 15)
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = check_one(Path(folder, "run"), world, victim, after)
            except AssertionError as error:
                raise SystemExit(f"{world} ranks, rank {victim} killed at operation {after}: {error}") from error
        outcomes[f"{'coordinator' if victim == 0 else 'other rank'} {outcome}"] += 1
    print(*(f"{count:4} {outcome}" for outcome, count in sorted(outcomes.items())), sep="\n")
    print(f"{sum(outcomes.values())} jobs: every checkpoint whole, every restart exact")


if __name__ == "__main__":
    main()
