"""The campaign of kills against this library and its peers, each used as its own documentation uses it.

A program: ``python -m tests.campaign.crash.peers`` (``scripts/crash_peers``, ``--help``, sets the environment up, too).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tests.campaign.crash.peers.adapters import (
    Accelerate,
    AccelerateOne,
    Checkpointer,
    Dcp,
    Peer,
    TorchSave,
    TorchSaveNumbered,
    TorchSaveRename,
    quiet,
)
from tests.campaign.crash.peers.campaign import Run, kill
from tests.campaign.crash.peers.controls import CONTROLS
from tests.campaign.crash.peers.faults import FLIPS, PLAN, fill, flip
from tests.campaign.crash.peers.life import NOTHING, VERDICTS, EnoughError, Finding, resume
from tests.campaign.crash.peers.lightning import Lightning
from tests.campaign.crash.peers.power import Unheard, cut

PEERS: dict[str, type[Peer]] = {
    kind.name: kind
    for kind in (
        Checkpointer, TorchSave, TorchSaveNumbered, TorchSaveRename, Dcp, Accelerate, AccelerateOne, Lightning,
    )
}  # fmt: skip

KNOWN: Mapping[str, type[Peer]] = {**PEERS, **CONTROLS}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/crash_peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", choices=KNOWN, action="append", help="only this one; may be given again")
    parser.add_argument("--minutes", type=float, default=2.0, help="of killing each (default: 2; 0: none)")
    parser.add_argument("--kills", type=int, default=1 << 30, help="so many each are enough")
    parser.add_argument("--flips", type=int, default=0, help="change a byte of the newest checkpoint so often")
    parser.add_argument(
        "--full-disk", type=int, default=0, help="fill the disk before so many saves (root, in `unshare --mount`)"
    )
    parser.add_argument("--power-cuts", type=int, default=0, help="look at so many states that a power cut may leave")
    parser.add_argument("--seed", type=int, default=0, help="what decides delays and places (default: 0)")
    parser.add_argument("--folder", type=Path, help="where runs are made (default: in memory, if there is /dev/shm)")
    return parser.parse_args(arguments)


def warm_up(kind: type[Peer], folder: Path) -> None:
    """Whatever it imports late is imported now, once. No thread of it may be left."""
    run = Run(kind, PLAN, folder / "warm")
    for _ in range(2):
        with contextlib.suppress(EnoughError):
            resume(kind, PLAN, run.root, _Short(run.book, []))
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{kind.name} has started threads: it cannot be forked"


class _Short(Finding):
    def saving(self, step: int) -> None:
        if step == 2:
            raise EnoughError


class Report:
    """Tables in Markdown."""

    def __init__(self) -> None:
        self._tables: dict[str, list[str]] = {}

    def add(self, table: str, columns: Sequence[str], kind: type[Peer], counts: Sequence[int]) -> None:
        header = [f"| {table} | {' | '.join(columns)} |", f"|{' --- |' * (len(columns) + 1)}"]
        row = f"| {kind.title} | {' | '.join(f'{count:,}' for count in counts)} |"
        self._tables.setdefault(table, header).append(row)
        print(f"{kind.name}: {table}: {', '.join(map('{} {}'.format, columns, counts))}", flush=True)

    def __str__(self) -> str:
        return "\n\n".join("\n".join(lines) for lines in self._tables.values())


def measure(kind: type[Peer], options: argparse.Namespace, folder: Path, report: Report) -> None:
    if options.minutes:
        tally = kill(kind, folder, 60 * options.minutes, options.kills, options.seed)
        counts = [tally.kills, tally.in_saves, *(tally.verdicts[verdict] for verdict in VERDICTS), tally.leftovers]
        report.add("killed", ["kills", "in a save", *VERDICTS, "left over"], kind, counts)
    if options.flips:
        outcomes = flip(kind, folder, options.flips, options.seed)
        report.add("one bit changed", ["trials", *FLIPS], kind, [options.flips, *(outcomes[name] for name in FLIPS)])
    if options.full_disk:
        verdicts, failed = fill(kind, folder, options.full_disk)
        counts = [options.full_disk, failed, *(verdicts[verdict] for verdict in VERDICTS)]
        report.add("disk full", ["trials", "save failed", *VERDICTS], kind, counts)
    if options.power_cuts:
        _cut_power(kind, options, folder, report)


def _cut_power(kind: type[Peer], options: argparse.Namespace, folder: Path, report: Report) -> None:
    try:
        verdicts = cut(kind, folder, options.power_cuts, options.seed)
    except Unheard:
        print(f"{kind.name}: its operations cannot be recorded", flush=True)
        return
    counts = [sum(verdicts.values()), *(verdicts[verdict] for verdict in (NOTHING, *VERDICTS))]
    report.add("power cut", ["states", "before the first save", *VERDICTS], kind, counts)


def main() -> int:
    options = parse()
    torch.set_num_threads(1)
    quiet()
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    report = Report()
    used = []
    for name in options.peer or PEERS:
        kind = KNOWN[name]
        if not kind.installed():
            print(f"{name}: not installed", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="peers-", dir=options.folder or memory) as folder:
            warm_up(kind, Path(folder))
            gc.freeze()  # a collection in a child would touch, and so copy, all that was imported
            measure(kind, options, Path(folder), report)
        used.append(f"- {kind.title} ({kind.version()}): {kind.how}")
    print(f"\n{report}\n\n" + "\n".join(used), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
