"""A training process that something fails under, and what has to hold then."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.format import paths
from checkpointer.storage import LocalStorage

MIB = 1 << 20


class Unavailable(Exception):  # noqa: N818 - no error: this machine has no such thing
    """The system does not let this be tried, and why."""


class Training:
    """A small training run with a checkpoint manager, of about so many bytes."""

    def __init__(self, root: Path, mode: str, size: int = 512 * 1024, **config: Any) -> None:
        torch.manual_seed(0)
        width = 256
        layers = max(size // (3 * 4 * width * width), 1)  # a parameter, and two moments
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.root = root
        self.step = 0
        self.manager = CheckpointManager(
            root, config={"write": {"mode": mode}, **config}, model=self.model, optimizer=self.optimizer
        )
        restored = self.manager.restore_latest()
        if restored is not None:
            self.step = restored.step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(CheckpointerError):
            self.manager.close()

    def train(self) -> None:
        """One step, whatever the disk does."""
        self.step += 1
        self.optimizer.zero_grad()
        self.model(torch.randn(2, 256)).square().mean().backward()
        self.optimizer.step()

    def saved(self) -> int:
        """Train and save, durably. Returns the step."""
        self.train()
        handle = self.manager.save(self.step)
        assert handle is not None
        handle.result()
        return self.step

    def error_of_a_save(self) -> CheckpointerError | None:
        """Train and save until an error is raised by the call, or by one of the next."""
        for _ in range(2):
            self.train()
            try:
                self.manager.save(self.step)
            except CheckpointerError as error:
                return error
        try:
            self.manager.wait()
        except CheckpointerError as error:
            return error
        return None

    def settle(self) -> None:
        """No save is in flight, and no error is left that nobody has seen."""
        with suppress(CheckpointerError):
            self.manager.wait()


def fingerprint(root: Path) -> dict[str, str]:
    """A hash of every file of every committed checkpoint."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.glob("checkpoint-*/**/*"))
        if path.is_file()
    }


def check_afterwards(root: Path, before: dict[str, str], steps: Sequence[int]) -> None:
    """What was there is as it was, what was acknowledged is there, and nothing is left over."""
    after = fingerprint(root)
    assert {path: after.get(path) for path in before} == before
    with CheckpointManager(root, read_only=True) as reader:
        report = reader.verify()
        assert report.ok, str(report)
        found = [info.step for info in reader.checkpoints()]
        assert set(steps) <= set(found), (steps, found)
    storage = LocalStorage(root)
    for folder in (paths.TMP, paths.TRASH, paths.QUARANTINE):
        assert storage.list_directory(folder) == [], storage.list_directory(folder)


def suffer(
    root: Path, mode: str, begin: Callable[[], object], end: Callable[[], object], *codes: int, **config: Any
) -> str:
    """Save twice, let the cause ``begin``, train on, ``end`` it, and save again. Returns the error in words."""
    with Training(root, mode, **config) as training:
        steps = [training.saved(), training.saved()]
        training.settle()
        before = fingerprint(root)
        begin()
        try:
            error = training.error_of_a_save()
            training.train()
            training.settle()
        finally:
            end()
        assert isinstance(error, SaveError), f"no save failed: {error!r}"
        assert error.errno in codes, f"{errno.errorcode.get(error.errno or 0)}: {error}"
        with CheckpointManager(root, read_only=True) as reader:
            assert reader.verify().ok
        steps.append(training.saved())
    check_afterwards(root, before, steps)
    return str(error)
