"""What is recorded: every way in which the package changes a run root."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.format import paths
from checkpointer.storage import local as local_storage
from tests.campaign.crash.power.record import Record
from tests.campaign.crash.power.recorder import Recorder

ROOT = "runs/a"
"""The run root, two directories below the area, so that the one above it has to be made, too."""


def state(value: int) -> dict[str, Any]:
    """What is saved: a number, and a tensor full of it that takes several sectors."""
    return {"state": {"value": value, "tensor": torch.full((400,), float(value))}}


def trained(value: int) -> dict[str, Any]:
    """A model of which one layer is frozen, and its optimizer."""
    model = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.Linear(48, 2))
    model[0].requires_grad_(requires_grad=False)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[1].weight.fill_(float(value))
    return {"model": model, "optimizer": torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)}


@dataclass
class Run:
    """One scenario while it runs: the root, and a place for what it promises."""

    root: str
    mark: Callable[..., None]

    def manager(self, live: dict[str, Any], mode: str = "sync", **config: Any) -> CheckpointManager:
        return CheckpointManager(
            self.root,
            config={"write": {"mode": mode}, "require_resume": False, **config},
            on_commit=self._committed,
            **live,
        )

    def save(self, manager: CheckpointManager, live: dict[str, Any], value: int, step: int, **options: Any) -> None:
        """Save ``value``; the mark that it is durable is set when the manager says so."""
        live["state"].update(state(value)["state"])
        self.mark("saving", value)
        manager.save(step, metrics={"value": value}, **options)

    def _committed(self, info: CheckpointInfo) -> None:
        self.mark("saved", int(info.metrics["value"]))


Act = Callable[[Run], None]


@dataclass(frozen=True)
class Scenario:
    """``prepare`` makes what is there, durably, before ``act`` is recorded."""

    prepare: Act
    act: Act
    exchange: bool = True
    damaged: bool = False
    """Whether it begins with a damaged checkpoint, so that some may be there afterwards."""
    large: int = local_storage.LARGE
    """Bytes from which on files are written past the page cache."""


# --------------------------------------------------------------------------------------------------- beginnings


def nothing(run: Run) -> None:
    """No run root yet."""


def two(run: Run) -> None:
    """Steps 1 and 2, with the values 1 and 2."""
    live = state(0)
    with run.manager(live) as manager:
        for step in (1, 2):
            run.save(manager, live, step, step, files={"notes/a.txt": b"attached"})


def two_and_pinned(run: Run) -> None:
    two(run)
    with CheckpointManager(run.root, read_only=True) as evaluator:
        evaluator.pin(2)


def two_trained(run: Run) -> None:
    live = {**state(0), **trained(0)}
    with run.manager(live) as manager:
        run.save(manager, live, 1, 1)
        run.save(manager, live, 2, 2)


def two_damaged(run: Run) -> None:
    """The manifest of step 2 is half there, and step 1 holds a file of somebody else."""
    two(run)
    with open(os.path.join(run.root, "checkpoint-2", paths.MANIFEST), "r+b") as file:
        file.truncate(100)
    with open(os.path.join(run.root, "checkpoint-1", "mine.txt"), "wb") as file:
        file.write(b"not written by the library")


def another_run(run: Run) -> None:
    """An empty run root, and beside it that of another run."""
    os.makedirs(run.root)
    two_trained(dataclasses.replace(run, root=os.path.join(os.path.dirname(run.root), "b")))


def left_over(run: Run) -> None:
    """What writers leave that are killed in every way: each of them died at another moment."""
    live = state(0)
    with run.manager(live) as manager:
        for step in (1, 2, 3, 4, 5):
            run.save(manager, live, step, step, files={"notes/a.txt": b"attached"})
        ids = {info.step: info.id for info in manager.checkpoints()}
    os.makedirs(os.path.join(run.root, paths.TRASH))
    _move(run, "checkpoint-2", f"{paths.TRASH}/{ids[2]}")  # killed between the rename and the deletion
    _move(run, "checkpoint-3", f"{paths.TMP}/{'3' * 32}")  # killed after an exchange
    _move(run, "checkpoint-4", f"{paths.TMP}/{ids[4]}")  # killed before the commit
    os.remove(os.path.join(run.root, paths.TMP, ids[4], paths.INDEX))
    _move(run, "checkpoint-1", f"checkpoint-1-{ids[1][:8]}")  # a replacement without exchange
    orphan = os.path.join(run.root, paths.NOTES, "4" * 32)
    os.makedirs(orphan)
    with open(os.path.join(orphan, "00000001-0123456789abcdef.json"), "wb") as file:
        file.write(b"a note on a checkpoint that is gone")


def _move(run: Run, old: str, new: str) -> None:
    shutil.move(os.path.join(run.root, old), os.path.join(run.root, new))


# ---------------------------------------------------------------------------------------------------------- acts


def first_save(run: Run) -> None:
    live = state(0)
    with run.manager(live) as manager:
        run.save(manager, live, 1, 1, files={"notes/deep/a.txt": b"attached"})


def save_and_prune(run: Run) -> None:
    live = state(0)
    with run.manager(live, keep={"last": 1}) as manager:
        manager.restore_latest(components=["state"])
        run.save(manager, live, 3, 3, files={"notes/a.txt": b"attached"})
        run.save(manager, live, 4, 4)


def train(mode: str) -> Act:
    def act(run: Run) -> None:
        live = {**state(0), **trained(0)}
        with run.manager(live, mode, keep={"last": 1}) as manager:
            manager.restore_latest()
            for step in (3, 4):
                live["optimizer"].step()
                run.save(manager, live, step, step)

    return act


def overwrite(run: Run) -> None:
    live = state(0)
    with run.manager(live) as manager:
        manager.restore_latest(components=["state"])
        run.save(manager, live, 22, 2, overwrite=True)


def branch(run: Run) -> None:
    live = state(0)
    with run.manager(live) as manager:
        manager.restore(1, components=["state"])
        for info in manager.checkpoints():
            run.mark("noted", info.id, "pinned", info.pinned)
        run.save(manager, live, 22, 2)


def remove(run: Run) -> None:
    live = state(0)
    with run.manager(live, keep={"last": 1}) as manager:
        manager.prune()


def immovable(act: Act) -> Act:
    """The act where a checkpoint's directory cannot be renamed, as in a lower layer of overlayfs."""
    rename = local_storage.rename_exclusively

    def refuse(a: str, b: str) -> bool:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), a, None, b)

    def rename_others(old: str, new: str) -> None:
        if os.path.basename(old) in ("checkpoint-1", "checkpoint-2"):
            refuse(old, new)
        rename(old, new)

    def acted(run: Run) -> None:
        with (
            mock.patch.object(local_storage, "rename_exclusively", rename_others),
            mock.patch.object(local_storage, "_exchange", refuse),
        ):
            act(run)

    return acted


def annotate(run: Run) -> None:
    with CheckpointManager(run.root, read_only=True) as evaluator:
        ids = {info.step: info.id for info in evaluator.checkpoints()}
        evaluator.pin(1)
        run.mark("noted", ids[1], "pinned", True)
        evaluator.annotate(2, metrics={"score": 1.0}, note="good")
        run.mark("noted", ids[2], "note", "good")
        run.mark("noting", ids[1], "pinned")
        evaluator.unpin(1)
        run.mark("noted", ids[1], "pinned", False)


def recover(run: Run) -> None:
    """The next writer clears away what it finds, and goes on."""
    live = state(0)
    with run.manager(live) as manager:
        manager.restore_latest(components=["state"])
        run.save(manager, live, 6, 6)


def quarantine(run: Run) -> None:
    """The damaged one is in the way of step 2; what is pruned holds a file of somebody else."""
    live = state(0)
    for path in ("checkpoint-1/mine.txt", "checkpoint-2/manifest.json"):
        with open(os.path.join(run.root, path), "rb") as file:
            run.mark("kept", file.read().hex())
    with run.manager(live, keep={"last": 1}) as manager:
        manager.restore(1, components=["state"])
        run.save(manager, live, 22, 2)
        run.save(manager, live, 3, 3)


def share_with_a_copy(run: Run) -> None:
    """A checkpoint was copied here by hand, and nobody has fsynced it; then its frozen files are shared."""
    run.mark("saving", 2)
    source = os.path.join(os.path.dirname(run.root), "b", "checkpoint-2")
    os.mkdir(os.path.join(run.root, "checkpoint-2"))
    for name in sorted(os.listdir(source)):
        with open(os.path.join(source, name), "rb") as file:
            fd = os.open(os.path.join(run.root, "checkpoint-2", name), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(fd, file.read())
            os.close(fd)
    live = {**state(0), **trained(0)}
    with run.manager(live) as manager:
        manager.restore_latest()
        run.save(manager, live, 3, 3)


def take_over(run: Run) -> None:
    """The job is started again, while the system runs on: it keeps the newest only, and saves."""
    live = state(0)
    with run.manager(live, keep={"last": 1}) as manager:
        manager.restore_latest(components=["state"])
        manager.prune()
        run.save(manager, live, 50, 50)


SCENARIOS: dict[str, Scenario] = {
    "first save": Scenario(nothing, first_save),
    "save and prune": Scenario(two, save_and_prune),
    "save async": Scenario(two_trained, train("async")),
    "save lazy": Scenario(two_trained, train("lazy")),
    "save large files": Scenario(two_trained, train("sync"), large=4096),
    "overwrite": Scenario(two, overwrite),
    "overwrite without exchange": Scenario(two, overwrite, exchange=False),
    "branch": Scenario(two, branch),
    "branch beside a pinned one": Scenario(two_and_pinned, branch),
    "prune": Scenario(two, remove),
    "prune in place": Scenario(two, immovable(remove)),
    "overwrite in place": Scenario(two, immovable(overwrite)),
    "pin and annotate": Scenario(two, annotate),
    "share with a copy": Scenario(another_run, share_with_a_copy, damaged=True),
    "recover": Scenario(left_over, recover),
    "quarantine": Scenario(two_damaged, quarantine, damaged=True),
}


# ------------------------------------------------------------------------------------------------------- recording


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Warnings are for users; here what is on disk counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def prepare(scenario: Scenario, area: str) -> str:
    """Make the beginning of a scenario; returns the run root."""
    root = os.path.join(area, ROOT)
    with quietly(), mock.patch.object(local_storage, "LARGE", scenario.large):
        scenario.prepare(Run(root, lambda *_: None))
    return root


def record(scenario: Scenario, area: str, act: Act | None = None, recorder: Recorder | None = None) -> Record:
    """What the act of a scenario, whose beginning lies in ``area``, does there."""
    recorder = recorder or Recorder(area, ROOT)
    large = mock.patch.object(local_storage, "LARGE", scenario.large)
    with quietly(), large, recorder.listening(exchange=scenario.exchange):
        (act or scenario.act)(Run(os.path.join(recorder.area, ROOT), recorder.mark))
    return recorder.record
