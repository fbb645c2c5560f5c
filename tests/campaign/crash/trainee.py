"""The training process that is killed: small, deterministic, and it writes down what it knows to be durable."""

from __future__ import annotations

import os
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from checkpointer import CheckpointManager, PendingSave
from checkpointer.format import paths
from checkpointer.storage import LocalStorage

MODES = ("sync", "async", "lazy")

MILESTONE = 100
"""Retention keeps each checkpoint whose step is a multiple of this."""

ROWS = 4
"""That one step trains on."""

BEGINNING = 0.05
"""Seconds that it takes to take the lock and to restore, about."""


@dataclass(frozen=True)
class Plan:
    """One training run. Everything follows from it."""

    seed: int
    mode: str
    keep: int
    """The newest so many checkpoints stay."""
    wide: bool
    """Whether there are tensors of a MiB, one of them frozen: written past the page cache, and shared."""
    steps: int

    @property
    def config(self) -> dict[str, Any]:
        return {"write": {"mode": self.mode}, "keep": {"last": self.keep, "every_n_steps": MILESTONE}}


class Trainee:
    """A model that trains on random numbers of every kind, and all that has to be saved of it."""

    def __init__(self, plan: Plan) -> None:
        random.seed(plan.seed)
        np.random.seed(plan.seed)
        torch.manual_seed(plan.seed)
        width = 512 if plan.wide else 8
        first = nn.Linear(width, width)  # of a MiB, where wide
        first.requires_grad_(not plan.wide)
        parts = (first, nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))
        self.model = nn.Sequential(*parts)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 7, 0.9)
        self.position = {"rows": 0}
        self.width = width

    @property
    def components(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "position": self.position,
        }

    def step(self) -> None:
        """Train once."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def loss(self) -> torch.Tensor:
        """Of the next rows, with a draw from each global generator."""
        rows = torch.randn(ROWS, self.width) * random.random() + float(np.random.rand()) + self.position["rows"] % 3
        self.position["rows"] += ROWS
        return self.model(rows).square().mean()  # type: ignore[no-any-return]

    @property
    def trained(self) -> int:
        """How many steps have been begun."""
        return self.position["rows"] // ROWS

    def digest(self) -> str:
        """A hash of every bit that decides how training goes on. Knows nothing of the library under test."""
        hasher = xxhash.xxh3_128()
        state = self.optimizer.state_dict()
        tensors = [*self.model.state_dict().values(), torch.get_rng_state()]
        tensors += [value for _, moments in sorted(state["state"].items()) for value in moments.values()]
        for tensor in tensors:
            hasher.update(tensor.detach().contiguous().numpy().tobytes())
        plain = (state["param_groups"], self.scheduler.state_dict(), self.position, random.getstate())
        hasher.update(repr(plain).encode())
        _, words, *rest = np.random.get_state()
        hasher.update(words.tobytes() + repr(rest).encode())  # type: ignore[union-attr]
        return hasher.hexdigest()


def reference(plan: Plan) -> list[str]:
    """The hash of the state after each step of a run that nothing interrupts."""
    trainee = Trainee(plan)
    hashes = []
    for _ in range(plan.steps):
        trainee.step()
        hashes.append(trainee.digest())
    return hashes


class Book:
    """What a training process knew, line by line, in a file outside the run root: it survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None

    def write(self, word: str, *numbers: int) -> None:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(self._fd, f"{' '.join(map(str, (word, *numbers)))}\n".encode())

    def lines(self) -> list[list[str]]:
        return [line.split() for line in self._path.read_text().splitlines()] if self._path.exists() else []

    def durable(self) -> int:
        """The highest ``sequence`` whose commit was known to be durable; 0 if none was."""
        return max((int(line[2]) for line in self.lines() if line[0] == "durable"), default=0)


class BrokenPromiseError(Exception):
    """Something that must not be."""


def expect(*, that: bool, else_: str) -> None:
    """Raise :class:`BrokenPromiseError` unless ``that``."""
    if not that:
        raise BrokenPromiseError(else_)


class Life:
    """One process's part of a run: look at what the last one left, resume, train until killed."""

    def __init__(self, plan: Plan, root: Path, book: Book, hashes: Sequence[str], rng: random.Random) -> None:
        self._plan = plan
        self._root = str(root)
        self._book = book
        self._hashes = hashes
        self._rng = rng

    def examine(self) -> None:
        """As a reader that takes no lock: the newest checkpoint is whole, exact, and no older than known durable."""
        trainee = Trainee(self._plan)
        with CheckpointManager(self._root, read_only=True, **trainee.components) as reader:
            restored = reader.restore_latest() if os.path.exists(self._root) else None
            durable = self._book.durable()
            if restored is None:
                expect(that=durable == 0, else_=f"sequence {durable} was durable, and the run is empty")
                return
            newest = restored.checkpoint.sequence
            expect(that=newest >= durable, else_=f"sequence {durable} was durable, and {newest} is the newest")
            expect(that=not restored.skipped, else_=f"passed over {restored.skipped}")
            self._check_exact(trainee, restored.step, "restored by a reader")
            report = reader.verify()
            extra = [item for checkpoint in report.checkpoints for item in checkpoint.extra]
            expect(that=report.ok and not extra, else_=f"verify: {report}")

    def live(self, ready: Callable[[float], None]) -> None:
        """Resume and train to the end; ``ready`` says that whoever kills may do so, within so many seconds from now.

        Some die while they take the lock, clear away, or restore, the others in or after one of the next saves.
        """
        saves = self._rng.randrange(4)
        if self._rng.random() < 0.1:
            ready(BEGINNING)
            saves = self._plan.steps
        trainee = Trainee(self._plan)
        with CheckpointManager(self._root, config=self._plan.config, **trainee.components) as manager:
            restored = manager.restore_latest()
            if restored is not None:
                self._check_exact(trainee, restored.step, "restored by the next writer")
            self._check_tidy()
            steps = [info.step for info in manager.checkpoints()]
            if restored is not None and self._rng.random() < 0.15:
                restored = manager.restore(self._rng.choice(steps))  # back, so that later names are taken
            self._book.write("resumed")
            self._train(manager, trainee, restored.step + 1 if restored else 0, saves, ready)

    def _train(
        self, manager: CheckpointManager, trainee: Trainee, first: int, saves: int, ready: Callable[[float], None]
    ) -> None:
        pending: list[PendingSave] = []
        began = time.monotonic()
        for step in range(first, self._plan.steps):
            trainee.step()
            self._note_durable(pending)
            if step == first + saves:
                ready((time.monotonic() - began) / max(saves, 1))  # one step and one save take about so long
            self._book.write("save", step)
            handle = manager.save(step, epoch=step // 10, files={"notes/step.txt": str(step).encode()})
            self._book.write("back", step)
            expect(that=handle is not None, else_=f"nothing was saved at step {step}")
            pending += [handle] if handle is not None else []
            self._note_durable(pending)
        manager.wait()
        self._note_durable(pending)

    def _note_durable(self, pending: list[PendingSave]) -> None:
        for handle in [handle for handle in pending if handle.done()]:
            self._book.write("durable", handle.step, handle.result().sequence)
            pending.remove(handle)

    def _check_exact(self, trainee: Trainee, step: int, what: str) -> None:
        expect(
            that=trainee.digest() == self._hashes[step],
            else_=f"the state of step {step}, {what}, is not that of the run that nothing interrupts",
        )

    def _check_tidy(self) -> None:
        """Nothing is left over once the next writer has begun."""
        storage = LocalStorage(self._root)
        for folder in (paths.TMP, paths.TRASH, paths.QUARANTINE):
            left = storage.list_directory(folder)
            expect(that=not left, else_=f"{folder} still holds {left}")
        foreign = [
            entry.name
            for entry in storage.list_directory("")
            if entry.name != paths.PRIVATE and paths.parse_checkpoint_name(entry.name) is None
        ]
        expect(that=not foreign, else_=f"the run root holds {foreign}")


def words_of(error: BaseException) -> str:
    """An error in one line, with the place that it comes from."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})".replace("\n", " | ")
