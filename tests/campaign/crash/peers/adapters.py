"""Ways to save and resume a run: this library, and its peers as their own documentation uses them.

A peer saves at every step. After a crash ``checkpoints`` names what there is to resume from: first what its documented
way takes, then what somebody who looks into the folder would try by hand. It keeps the newest two checkpoints where it
has a setting for that.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import random
import re
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from checkpointer import CheckpointManager
from checkpointer.format import paths
from tests.campaign.crash.trainee import Trainee

KEEP = 2


class Hooks(ABC):
    """What is told as a run goes on."""

    @abstractmethod
    def restored(self) -> None:
        """The state is live, and training has not gone on yet."""

    @abstractmethod
    def saving(self, step: int) -> None:
        """The save of a step is about to begin."""

    @abstractmethod
    def saved(self, step: int) -> None:
        """The save of a step has returned."""


class Peer(ABC):
    """One way to save and resume."""

    name: ClassVar[str]
    title: ClassVar[str]
    how: ClassVar[str]
    """How its documentation uses it, for the report."""
    module: ClassVar[str] = "torch"
    holds: int = KEEP
    """How many files or directories lie in its folder after a save, if nothing is left over."""

    def __init__(self, root: Path, trainee: Trainee, steps: int) -> None:
        self.root = root
        self.trainee = trainee
        self.steps = steps
        root.mkdir(parents=True, exist_ok=True)

    @classmethod
    def installed(cls) -> bool:
        """Whether it can be used here; if so, it is imported."""
        if importlib.util.find_spec(cls.module.partition(".")[0]) is None:
            return False
        importlib.import_module(cls.module)
        return True

    @classmethod
    def version(cls) -> str:
        name = cls.module.partition(".")[0]
        return f"{name} {importlib.import_module(name).__version__}"

    @abstractmethod
    def checkpoints(self) -> list[str]:
        """What may be resumed from: the documented way's choice first, then others, newest first."""

    @abstractmethod
    def restore(self, name: str) -> None:
        """Make the state of one of ``checkpoints`` live. Raises whatever the peer raises."""

    @abstractmethod
    def save(self, step: int) -> None:
        """Save the live state."""

    def path(self, name: str) -> Path:
        """Where one of ``checkpoints`` lies."""
        return self.root / name

    def discard(self, name: str) -> None:
        """What somebody does by hand with a checkpoint that does not load."""
        path = self.path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def entries(self) -> list[Path]:
        """Everything in its folder."""
        return list(self.root.iterdir())

    def leftovers(self) -> int:
        """How much more than its checkpoints lies there after a save, or in the directory for temporary files."""
        return len(self.entries()) + len(os.listdir(tempfile.gettempdir())) - self.holds

    def finish(self) -> None:  # noqa: B027  # most do nothing in the background
        """Wait for whatever goes on in the background."""

    def run(self, name: str | None, hooks: Hooks) -> None:
        """Resume from one of ``checkpoints``, or begin, and train to the end."""
        if name is not None:
            self.restore(name)
            hooks.restored()
        for step in range(self.trainee.trained, self.steps):
            self.trainee.step()
            hooks.saving(step)
            self.save(step)
            hooks.saved(step)


class Checkpointer(Peer):
    """This library."""

    name, title, module = "checkpointer", "checkpointer", "checkpointer"
    how = "`CheckpointManager(…).save(step)` with `write: {mode: sync}`, `keep: {last: 2}`; `restore_latest()`"

    def __init__(self, root: Path, trainee: Trainee, steps: int) -> None:
        super().__init__(root, trainee, steps)
        config = {"write": {"mode": "sync"}, "keep": {"last": KEEP}}
        self._manager = CheckpointManager(root, config=config, **trainee.components)

    def checkpoints(self) -> list[str]:
        found = [str(info.path) for info in reversed(self._manager.checkpoints())]
        return [os.path.basename(path) for path in found[:1]]  # restore_latest goes back by itself

    def restore(self, name: str) -> None:
        assert self._manager.restore_latest() is not None
        self.holds = KEEP + 1  # what a process has restored from is not removed while it runs

    def save(self, step: int) -> None:
        self._manager.save(step)

    def finish(self) -> None:
        """It prunes in the background."""
        self._manager.close()

    def entries(self) -> list[Path]:
        self._manager.wait()  # it prunes in the background
        folders = [self.root, self.root / paths.TMP, self.root / paths.TRASH]
        found = [path for folder in folders if folder.exists() for path in folder.iterdir()]
        return [path for path in found if path.name != paths.PRIVATE]


# ------------------------------------------------------------------------------------------------------ torch.save


def random_numbers() -> dict[str, Any]:
    """The state of each global generator, in types that ``torch.load`` reads without being told to trust the file."""
    kind, words, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (kind, words.tolist(), *rest)}


def set_random_numbers(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, words, *rest = state["numpy"]
    np.random.set_state((kind, np.array(words, np.uint32), *rest))


class TorchSave(Peer):
    """https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html, "a general checkpoint"."""

    name, title, holds = "torch.save", "`torch.save`, one name", 1
    how = "`torch.save({…}, PATH)`, the same `PATH` each time; `torch.load(PATH)`"

    def checkpoints(self) -> list[str]:
        return ["checkpoint.pt"] if self.path("checkpoint.pt").exists() else []

    def restore(self, name: str) -> None:
        state = torch.load(self.path(name), weights_only=True)
        self.trainee.model.load_state_dict(state["model"])
        self.trainee.optimizer.load_state_dict(state["optimizer"])
        self.trainee.scheduler.load_state_dict(state["scheduler"])
        self.trainee.position.update(state["position"])
        set_random_numbers(state["random"])

    def save(self, step: int) -> None:
        torch.save(self.state(), self.path("checkpoint.pt"))

    def state(self) -> dict[str, Any]:
        states = {name: getattr(self.trainee, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        return {**states, "position": self.trainee.position, "random": random_numbers()}


class TorchSaveNumbered(TorchSave):
    """The same with a file for each step."""

    name, title, holds = "torch.save-numbered", "`torch.save`, a file a step", KEEP
    how = "`torch.save({…}, f'checkpoint-{step}.pt')`, keeping the newest two; the highest number is loaded"

    def checkpoints(self) -> list[str]:
        return newest_first(path.name for path in self.root.glob("checkpoint-*.pt"))

    def save(self, step: int) -> None:
        torch.save(self.state(), self.path(f"checkpoint-{step}.pt"))
        for name in self.checkpoints()[KEEP:]:
            self.discard(name)


class TorchSaveRename(TorchSave):
    """What a careful user makes of it."""

    name, title = "torch.save+rename", "`torch.save`, fsync, rename"
    how = "`torch.save` to a temporary name in the same folder, fsync, `os.replace`, fsync of the folder; `torch.load`"

    def save(self, step: int) -> None:
        path = self.path("checkpoint.pt")
        with open(f"{path}.tmp", "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
        folder = os.open(self.root, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def newest_first(names: Iterable[str]) -> list[str]:
    """By the last number in each name."""
    return sorted(names, key=lambda name: int(re.findall(r"\d+", name)[-1]), reverse=True)


# ------------------------------------------------------------------------------------------------------------- DCP


class _App:
    """https://docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html, its ``AppState``, with all."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._trainee.model, self._trainee.optimizer)
        rest = {"scheduler": self._trainee.scheduler.state_dict(), "position": dict(self._trainee.position)}
        return {"model": model, "optim": optimizer, **rest, "random": random_numbers()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_state_dict(
            self._trainee.model,
            self._trainee.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )
        self._trainee.scheduler.load_state_dict(state["scheduler"])
        self._trainee.position.update(state["position"])
        set_random_numbers(state["random"])


class Dcp(Peer):
    """torch.distributed.checkpoint; which one is the newest is found as torchtitan finds it."""

    name, title = "dcp.save", "`dcp.save`"
    how = (
        "`dcp.save({'app': AppState(…)}, checkpoint_id=f'step-{step}')`, keeping the newest two; `dcp.load` of the "
        "highest number that has a `.metadata`, as torchtitan does"
    )

    def checkpoints(self) -> list[str]:
        return newest_first(path.parent.name for path in self.root.glob("step-*/.metadata"))

    def restore(self, name: str) -> None:
        state_dict_loader.load({"app": _App(self.trainee)}, checkpoint_id=self.path(name))

    def save(self, step: int) -> None:
        state_dict_saver.save({"app": _App(self.trainee)}, checkpoint_id=self.path(f"step-{step}"))
        for name in newest_first(os.listdir(self.root))[KEEP:]:
            self.discard(name)


# ------------------------------------------------------------------------------------------------------ Accelerate


class _Position:
    """What ``register_for_checkpointing`` wants."""

    def __init__(self, position: dict[str, int]) -> None:
        self._position = position

    def state_dict(self) -> dict[str, int]:
        return dict(self._position)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._position.update(state)


class Accelerate(Peer):
    """https://huggingface.co/docs/accelerate/usage_guides/checkpoint, with automatic names."""

    name, title, module = "accelerate", "Accelerate `save_state`", "accelerate"
    how = (
        "`ProjectConfiguration(automatic_checkpoint_naming=True, total_limit=2)`; `save_state()`; `load_state()`, and "
        "`iteration` set to go on"
    )
    limit: ClassVar[int] = KEEP

    def __init__(self, root: Path, trainee: Trainee, steps: int) -> None:
        super().__init__(root / "checkpoints", trainee, steps)
        package: Any = importlib.import_module("accelerate")
        utilities: Any = importlib.import_module("accelerate.utils")
        project = utilities.ProjectConfiguration(
            project_dir=str(root), automatic_checkpoint_naming=True, total_limit=self.limit
        )
        self._accelerator = package.Accelerator(cpu=not torch.accelerator.is_available(), project_config=project)
        self._accelerator.prepare(trainee.model, trainee.optimizer, trainee.scheduler)
        self._accelerator.register_for_checkpointing(_Position(trainee.position))

    def checkpoints(self) -> list[str]:
        return newest_first(os.listdir(self.root))

    def restore(self, name: str) -> None:
        newest = name == self.checkpoints()[0]
        self._accelerator.load_state(None if newest else str(self.path(name)))
        self._accelerator.project_configuration.iteration = int(name.rpartition("_")[2]) + 1

    def save(self, step: int) -> None:
        self._accelerator.save_state()


class AccelerateOne(Accelerate):
    """The same, keeping one."""

    name, title, limit, holds = "accelerate-1", "Accelerate `save_state`, `total_limit=1`", 1, 1
    how = "as above, with `total_limit=1`"


def quiet() -> None:
    """Some warn, or tell what they do, at each save."""
    warnings.simplefilter("ignore")
    logging.disable()
