"""What is done inside a guest of User-Mode Linux, for its PID 1.

A program: ``python -m tests.campaign.crash.power.uml_guest PART``.
The host hears of it by files in ``/run/share``, a folder of its own: what is written there survives the guest.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.campaign.crash.kills import warm_up
from tests.campaign.crash.lanes import phase
from tests.campaign.crash.power.recorder import Recorder
from tests.campaign.crash.power.scenarios import ROOT, SCENARIOS, prepare, record
from tests.campaign.crash.power.uml_nfs import MODULES, locks_on_nfs, run
from tests.campaign.crash.trainee import Book, BrokenPromiseError, Life, Plan, words_of

SHARE = Path("/run/share")
DEVICES = {"ext4": "/dev/ubda", "xfs": "/dev/ubdb"}


class Careless(Plan):
    """Nothing is fsynced: what a rig for power cuts has to notice."""

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, "write": {"mode": self.mode, "durable": False}}


def mounted(kind: str, device: str) -> Path:
    """A disk, which replays its journal if the power went."""
    place = Path("/run/disks") / kind
    place.mkdir(parents=True)
    run("mount", "-t", kind, device, str(place))
    return place


class Trainer:
    """One training run on one of the disks, of which the host keeps the book."""

    def __init__(self, disk: Path, what: dict[str, Any]) -> None:
        kind = Careless if what["careless"] else Plan
        self._plan = kind(**what["plan"])
        self._root = disk / what["name"]
        self._book = Book(SHARE / f"{what['name']}.book")
        self._hashes = json.loads((SHARE / f"hashes-{self._plan.wide}.json").read_text())
        self._rng = random.Random(what["seed"])
        self._again = what["again"]

    def work(self, ready: Callable[[float], None]) -> None:
        """Look at what the power cut has left, and train on until the next."""
        life = Life(self._plan, self._root, self._book, self._hashes, self._rng)
        if self._again:
            landed = phase(self._root, self._book, self._plan.keep)
            life.examine()
            self._book.write("examined")
            Book(SHARE / "phases").write(f"{self._plan.mode} {landed}")
            self._book.write("killed")
        life.live(ready)


def trainers(report: Book) -> None:
    """Trainers on every disk, at the same time, until the power goes."""
    disks = {kind: mounted(kind, device) for kind, device in DEVICES.items()}
    warm_up(disks["ext4"])  # imports take long here: once, not in each of them
    report.write("warm")
    for what in json.loads((SHARE / "runs.json").read_text()):
        if os.fork() == 0:
            work = Trainer(disks[what["kind"]], what).work
            os._exit(reported(report, partial(work, lambda _: report.write("ready"))))
    while True:
        os.wait()


def nfs(_: Book) -> None:
    """Locks between hosts, on a disk that this one exports."""
    locks_on_nfs(mounted("ext4", DEVICES["ext4"]))


def reported(report: Book, work: Callable[[], None]) -> int:
    """Do something, and say how it ended; returns an exit status."""
    try:
        work()
    except BrokenPromiseError as wrong:
        report.write(f"wrong {wrong}")
    except BaseException as error:
        report.write(f"wrong {words_of(error)}")
    else:
        report.write("done")
        return 0
    return 1


def log_writes(kind: str, name: str) -> None:
    """A scenario on a disk that logs what is written to it, with a mark after each operation on the file system."""
    run("modprobe", "-d", MODULES, "dm-log-writes")
    sectors = int(Path("/sys/block/ubda/size").read_text())
    run("dmsetup", "--noudevsync", "create", "logged", "--table", f"0 {sectors} log-writes /dev/ubda /dev/ubdb")
    run("dmsetup", "mknodes")
    area = mounted(kind, "/dev/mapper/logged") / "area"
    area.mkdir()
    prepare(SCENARIOS[name], str(area))
    os.sync()
    recorder = Recorder(str(area), ROOT)
    mark(0)
    recorder.after_each = mark
    recorded = record(SCENARIOS[name], str(area), recorder=recorder)
    (SHARE / "record").write_bytes(pickle.dumps(recorded))
    run("umount", str(area.parent))
    run("dmsetup", "--noudevsync", "remove", "logged")


def mark(end: int) -> None:
    """Note in the log how many operations have been carried out."""
    run("dmsetup", "message", "logged", "0", "mark", str(end))


PARTS: dict[str, Callable[[Book], None]] = {"kills": trainers, "nfs": nfs}


def main() -> int:
    """Carry out a part, and tell the host."""
    report = Book(SHARE / "report")
    report.write("started")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    part, *details = sys.argv[1].split(",")
    if part == "log-writes":
        return reported(report, partial(log_writes, *(detail.replace("_", " ") for detail in details)))
    return reported(report, partial(PARTS[part], report))


if __name__ == "__main__":
    sys.exit(main())
