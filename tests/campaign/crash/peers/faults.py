"""What else may happen to a peer's run: one byte of its newest checkpoint changes; the disk is full in mid-save."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

from tests.campaign.crash.disks import Ballast, tmpfs
from tests.campaign.crash.peers.adapters import Peer
from tests.campaign.crash.peers.campaign import Run
from tests.campaign.crash.peers.life import RESTORED, WRONG, EnoughError
from tests.campaign.crash.trainee import Plan

PLAN = Plan(0, "sync", 2, wide=True, steps=4)
"""Checkpoints of some MiB."""

HARMLESS, UNNOTICED, REFUSED, WENT_BACK = "no effect", "unnoticed", "refused", "went back"
FLIPS = (WENT_BACK, REFUSED, HARMLESS, UNNOTICED)


def flip(kind: type[Peer], folder: Path, trials: int, seed: int) -> Counter[str]:
    """Change one byte of the newest checkpoint, each time in another place, and resume."""
    rng = random.Random(f"{seed} {kind.name}")
    whole = Run(kind, PLAN, folder / "whole")

    def act(peer: Peer, step: int) -> None:
        if step == 3:
            newest = peer.path(peer.checkpoints()[0])
            (whole.folder / "newest").write_text(os.path.relpath(newest, whole.folder))
            raise EnoughError

    whole.train(act)
    newest = (whole.folder / "newest").read_text()
    counts: Counter[str] = Counter()
    for number in range(trials):
        place = folder / f"trial-{number}"
        run = Run(kind, PLAN, place)
        shutil.copytree(whole.folder, place, dirs_exist_ok=True)
        _flip_one(place / newest, rng)
        counts[_outcome(run)] += 1
        shutil.rmtree(place)
    shutil.rmtree(whole.folder)
    return counts


def _flip_one(newest: Path, rng: random.Random) -> None:
    """Each byte is as likely as any other."""
    files = [newest] if newest.is_file() else sorted(path for path in newest.rglob("*") if path.is_file())
    offset = rng.randrange(sum(path.stat().st_size for path in files))
    for path in files:
        size = path.stat().st_size
        if offset < size:
            break
        offset -= size
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << rng.randrange(8)
    path.unlink()  # it may be one of several names of a file
    path.write_bytes(data)


def _outcome(run: Run) -> str:
    verdict = run.look()
    if verdict in (RESTORED, WRONG):
        return HARMLESS if verdict == RESTORED else UNNOTICED
    return REFUSED if int(run.book.lines()[-1][1]) else WENT_BACK


def fill(kind: type[Peer], folder: Path, trials: int) -> tuple[Counter[str], int]:
    """Leave room for a part of a checkpoint, each time another one, save, and resume once there is room again.

    Returns the verdicts, and how many saves failed. Mounts a file system in memory: for root, in a mount namespace.
    """
    verdicts: Counter[str] = Counter()
    failed = 0
    for number in range(trials):
        with tmpfs(folder / f"disk-{number}", "size=64m") as disk:
            book = folder / f"book-{number}"
            run = Run(kind, PLAN, disk / "run", book)
            ballast = Ballast(disk)
            run.train(_filler(ballast, disk, 1.2 * number / trials))
            failed += run.book.lines()[-1][0] == "saving"
            ballast.drop()
            verdicts[run.look()] += 1
    return verdicts, failed


def _filler(ballast: Ballast, disk: Path, share: float):
    free: list[int] = []

    def act(_: Peer, step: int) -> None:
        status = os.statvfs(disk)
        free.append(status.f_bavail * status.f_frsize)
        if step == 2:
            ballast.fill(int(share * (free[0] - free[1])))
        if step == 3:
            raise EnoughError

    return act
