"""Everything that saves and restores: this library in each mode, and its peers as their own documentation uses them.

A contender gets a folder and a run, keeps what it reuses from save to save, and writes each checkpoint anew. Waiting,
restoring and timing are the same for all. One that is not installed, or a mode that this version does not have, says
so when it is made (``Unavailable``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.pagecache import sync
from benchmarks.workloads import Training
from checkpointer import CheckpointManager
from checkpointer.errors import ConfigError
from tests.support.vision import make_importable

Restore = Callable[[], object]


class Unavailable(Exception):  # noqa: N818  # a state, not a fault
    """This contender cannot be measured here; the message says why."""


class Pending:
    """A save that has begun."""

    def __init__(self, future: Future[Any] | None = None) -> None:
        self._future = future
        """``None``: it was done when ``save`` returned."""

    def done(self) -> bool:
        """Whether the contender has finished what it promises."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Until ``done``; raises what went wrong."""
        if self._future is not None:
            self._future.result()


class Contender(ABC):
    """One way to save and restore."""

    name: ClassVar[str]
    """What ``--only`` selects by."""
    title: ClassVar[str]
    requires: ClassVar[str] = ""
    """The module of the package that it needs."""
    fsyncs: ClassVar[bool] = True
    """Whether what it calls done is on the disk. If not, the benchmark fsyncs after it, for the time to durable."""
    times_saves: ClassVar[bool] = True
    """``False``: saves like another contender, and is here for the way that it restores."""

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        self.folder = folder
        self.training = training
        self.keep_all = keep_all
        """Whether the checkpoints of one run add up on disk; else only the newest is kept."""
        self._count = 0
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def prepare(cls) -> None:
        """Import what it needs: not part of any figure."""
        if cls.requires:
            if importlib.util.find_spec(cls.requires.split(".")[0]) is None:
                raise Unavailable("not installed")
            importlib.import_module(cls.requires)

    def save(self) -> Pending:
        """Save the run's state as it is now, as a new checkpoint."""
        self._count += 1
        return self._save(self.newest)

    @property
    def newest(self) -> Path:
        """The checkpoint saved last."""
        return self.folder / f"checkpoint-{self._count}"

    @abstractmethod
    def _save(self, path: Path) -> Pending:
        """Save as ``path``, which does not exist; a directory if the contender likes."""

    @abstractmethod
    def restorer(self, target: Training) -> Restore:
        """What restores the newest checkpoint into ``target``. Making it is not timed, calling it is."""

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """What has to be around each update of the run while a save may be in flight."""
        return contextlib.nullcontext()

    def discard_old(self) -> None:
        """Remove all checkpoints but the newest."""
        for path in self.folder.glob("checkpoint-*"):
            if path != self.newest and not self.keep_all:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def close(self) -> None:  # noqa: B027  # most have nothing to free
        """Free what is reused from save to save."""


# ---------------------------------------------------------------------------------------------------- this library


class Checkpointer(Contender):
    """This library."""

    mode: ClassVar[str]

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        super().__init__(folder, training, keep_all=keep_all)
        write = {"mode": self.mode, **({"share": 1000} if keep_all else {})}
        try:
            self._manager = CheckpointManager(
                folder, config={"write": write}, model=training.model, optimizer=training.optimizer
            )
        except ConfigError as error:
            raise Unavailable("not available in this version") from error

    def _save(self, path: Path) -> Pending:
        del path  # the manager names it the same way
        handle = self._manager.save(self._count)
        assert handle is not None
        return _Handle(handle)

    def restorer(self, target: Training) -> Restore:
        """As a new process would: its own manager, on the same run."""

        def restore() -> None:
            manager = CheckpointManager(self.folder, read_only=True, model=target.model, optimizer=target.optimizer)
            with manager:
                assert manager.restore_latest() is not None

        return restore

    def close(self) -> None:
        """Frees the memory that states are staged in."""
        self._manager.close()


class _Handle(Pending):
    def __init__(self, handle: Any) -> None:
        super().__init__()
        self._handle = handle

    def done(self) -> bool:
        return bool(self._handle.done())

    def wait(self) -> None:
        self._handle.result()


class CheckpointerSync(Checkpointer):
    """``save`` returns when the checkpoint is durable."""

    name, title, mode = "checkpointer-sync", "checkpointer, sync", "sync"


class CheckpointerAsync(Checkpointer):
    """``save`` returns when the state is copied."""

    name, title, mode = "checkpointer-async", "checkpointer, async", "async"


class CheckpointerLazy(Checkpointer):
    """``save`` returns at once; the next step copies what is not written yet."""

    name, title, mode = "checkpointer-lazy", "checkpointer, lazy", "lazy"


# ------------------------------------------------------------------------------------------------------ torch.save


def _whole_state(training: Training) -> dict[str, Any]:
    return {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(), "step": 1}


def _load_whole_state(target: Training, state: Mapping[str, Any]) -> None:
    target.model.load_state_dict(state["model"])
    target.optimizer.load_state_dict(state["optimizer"])


class TorchSave(Contender):
    """https://docs.pytorch.org/tutorials/beginner/saving_loading_models.html, "a general checkpoint"."""

    name, title, fsyncs = "torch.save", "torch.save", False
    mmap: ClassVar[bool] = False

    def _save(self, path: Path) -> Pending:
        torch.save(_whole_state(self.training), path)
        return Pending()

    def restorer(self, target: Training) -> Restore:
        """``torch.load``, then both ``load_state_dict``."""
        return lambda: _load_whole_state(target, torch.load(self.newest, weights_only=True, mmap=self.mmap))


class TorchSaveFsync(TorchSave):
    """What a careful user makes of it."""

    name, title, fsyncs = "torch.save+fsync", "torch.save + fsync", True

    def _save(self, path: Path) -> Pending:
        with path.open("wb") as file:
            torch.save(_whole_state(self.training), file)
            file.flush()
            os.fsync(file.fileno())
        sync(self.folder)
        return Pending()


class TorchLoadMmap(TorchSaveFsync):
    """The optimizer's state stays a lazy mapping of the file until the first step reads it."""

    name, title = "torch.load-mmap", "torch.load(mmap=True)"
    mmap, times_saves = True, False


# ----------------------------------------------------------------------------------------------------- safetensors


class Safetensors(Contender):
    """``save_file`` of flat names; what is not a tensor goes into the metadata, as JSON."""

    name, title = "safetensors", "safetensors + fsync"

    def _save(self, path: Path) -> Pending:
        state = self.training.optimizer.state_dict()
        tensors = {f"model.{name}": tensor for name, tensor in self.training.model.state_dict().items()}
        rest: dict[str, dict[str, Any]] = {}
        for index, slots in state["state"].items():
            for key, value in slots.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                else:
                    rest.setdefault(str(index), {})[key] = value
        save_file(tensors, path, {"groups": json.dumps(state["param_groups"]), "rest": json.dumps(rest)})
        sync(path)
        sync(self.folder)
        return Pending()

    def restorer(self, target: Training) -> Restore:
        """``load_file``, then both ``load_state_dict``."""

        def restore() -> None:
            with safe_open(self.newest, "pt") as file:
                metadata = file.metadata()
            tensors = load_file(self.newest)
            slots: dict[int, dict[str, Any]] = {int(i): dict(rest) for i, rest in json.loads(metadata["rest"]).items()}
            for name in [name for name in tensors if name.startswith("optimizer.")]:
                _, index, key = name.split(".", 2)
                slots.setdefault(int(index), {})[key] = tensors.pop(name)
            model = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
            groups = [{**group, **_tuples(group)} for group in json.loads(metadata["groups"])]
            _load_whole_state(target, {"model": model, "optimizer": {"state": slots, "param_groups": groups}})

        return restore


def _tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON made lists of."""
    return {"betas": tuple(group["betas"])} if "betas" in group else {}


# ------------------------------------------------------------------------------------------------------------- DCP


class _App:
    """https://docs.pytorch.org/tutorials/recipes/distributed_checkpoint_recipe.html, its ``AppState``."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._training.model, self._training.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        set_state_dict(
            self._training.model,
            self._training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """DCP warns at every call that there is one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class DcpSave(Contender):
    """torch.distributed.checkpoint."""

    name, title = "dcp.save", "dcp.save"

    def _save(self, path: Path) -> Pending:
        with _quiet():
            state_dict_saver.save({"app": _App(self.training)}, checkpoint_id=path)
        return Pending()

    def restorer(self, target: Training) -> Restore:
        """Loads into the live tensors; the recipe makes the optimizer's state by a step of its own."""

        def restore() -> None:
            with _quiet():
                state_dict_loader.load({"app": _App(target)}, checkpoint_id=self.newest)

        return restore


class DcpAsync(DcpSave):
    """``async_save`` as its recipe has it: a thread, and a stager made for each save."""

    name, title = "dcp.async_save", "dcp.async_save"
    stager: DefaultStager | None = None

    def _save(self, path: Path) -> Pending:
        with _quiet():
            answer = state_dict_saver.async_save(
                {"app": _App(self.training)}, checkpoint_id=path, async_stager=self.stager
            )
        assert isinstance(answer, Future)
        return Pending(answer)


class DcpAsyncCached(DcpAsync):
    """With one stager for all saves, which keeps its memory; pinned memory is off, where no accelerator is."""

    name, title = "dcp.async_save-cached", "dcp.async_save, cached stager"
    in_thread = False
    """Whether the stager copies in a thread of its own."""

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        super().__init__(folder, training, keep_all=keep_all)
        pinned = torch.accelerator.is_available()
        options = StagingOptions(
            pinned, use_shared_memory=False, use_async_staging=self.in_thread, use_non_blocking_copy=pinned
        )
        self.stager = DefaultStager(options)

    def close(self) -> None:
        """Frees the stager's memory, and ends its thread."""
        assert self.stager is not None
        self.stager.close()


class DcpAsyncStaging(DcpAsyncCached):
    """Copies in a thread of its own; the run has to wait for that before it updates anything."""

    name, title = "dcp.async_save-staging", "dcp.async_save, async cached stager"
    in_thread = True
    _staged: Future[Any] | None = None

    def _save(self, path: Path) -> Pending:
        with _quiet():
            answer = state_dict_saver.async_save(
                {"app": _App(self.training)}, checkpoint_id=path, async_stager=self.stager
            )
        assert not isinstance(answer, Future)
        self._staged = answer.staging_completion
        return Pending(answer.upload_completion)

    @contextlib.contextmanager
    def _after_staging(self) -> Any:
        if self._staged is not None:
            self._staged.result()
        yield

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Waits for the copy."""
        guard: contextlib.AbstractContextManager[object] = self._after_staging()
        return guard


# --------------------------------------------------------------------------------------------- torch_checkpointing


class TorchCheckpointing(Contender):
    """Its tutorial, with what its "Troubleshooting" says for machines without an accelerator.

    Without direct I/O: version 0.1.1 writes unaligned memory with O_DIRECT, and fails with EINVAL on ext4.
    """

    name, title, requires, fsyncs = "torch_checkpointing", "torch_checkpointing, async", "torch_checkpointing", False

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        super().__init__(folder, training, keep_all=keep_all)
        package: Any = importlib.import_module("torch_checkpointing")
        pinned = torch.accelerator.is_available()
        staging = package.CheckpointStagerConfig(use_pinned_memory=pinned, use_non_blocking_copy=pinned)
        saving = package.AsyncCheckpointSaverConfig(staging_config=staging)
        files: Any = importlib.import_module("torch_checkpointing.storage.filesystem")
        storage = files.LocalFileSystemStorageConfig(use_direct_io=False)
        settings = package.CheckpointManager.Config(save=saving, storage_config=storage)
        self._manager = package.CheckpointManager(settings)

    def _save(self, path: Path) -> Pending:
        return Pending(self._manager.save(str(path), _whole_state(self.training)))

    def guard(self) -> contextlib.AbstractContextManager[object]:
        """Its lock, which waits for the copy."""
        lock: contextlib.AbstractContextManager[object] = self._manager.lock()
        return lock

    def restorer(self, target: Training) -> Restore:
        """Into the live model; the optimizer's state by ``load_state_dict``, as in the tutorial."""

        def restore() -> None:
            into = {"model": target.model.state_dict(), "optimizer": None, "step": 0}
            restored = self._manager.load(str(self.newest), into=into)
            target.optimizer.load_state_dict(restored["optimizer"])

        return restore

    def close(self) -> None:
        """Ends its process."""
        self._manager.close()


# ------------------------------------------------------------------------------------------------------- Lightning


class Lightning(Contender):
    """``AsyncCheckpointIO`` around ``TorchCheckpointIO``, given what a Trainer would give it."""

    name, title, fsyncs = "lightning-async", "Lightning AsyncCheckpointIO", False
    requires = "lightning.pytorch.plugins.io"

    @classmethod
    def prepare(cls) -> None:
        """It imports torchvision, if that is there."""
        make_importable()
        super().prepare()

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        super().__init__(folder, training, keep_all=keep_all)
        plugins: Any = importlib.import_module(self.requires)
        self._written = threading.Event()
        written = self._written

        class Telling(plugins.TorchCheckpointIO):  # type: ignore[misc, name-defined, unused-ignore]
            """Says when it is done: the wrapper itself tells only by being taken down."""

            def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
                try:
                    super().save_checkpoint(*arguments, **options)
                finally:
                    written.set()

        self._io = plugins.AsyncCheckpointIO(Telling())

    def _save(self, path: Path) -> Pending:
        self._written.clear()
        self._io.save_checkpoint(_whole_state(self.training), str(path))
        return _Signalled(self._written)

    def restorer(self, target: Training) -> Restore:
        """``load_checkpoint``, then both ``load_state_dict``."""
        return lambda: _load_whole_state(target, self._io.load_checkpoint(str(self.newest)))

    def close(self) -> None:
        """Ends its thread, and raises what went wrong in it."""
        self._io.teardown()


class _Signalled(Pending):
    def __init__(self, event: threading.Event) -> None:
        super().__init__()
        self._event = event

    def done(self) -> bool:
        return self._event.is_set()

    def wait(self) -> None:
        self._event.wait()


# ------------------------------------------------------------------------------------------------------ Accelerate


class Accelerate(Contender):
    """``Accelerator.save_state`` and ``load_state``."""

    name, title, requires, fsyncs = "accelerate", "Accelerate save_state", "accelerate", False

    def __init__(self, folder: Path, training: Training, *, keep_all: bool = False) -> None:
        super().__init__(folder, training, keep_all=keep_all)
        self._accelerator = self._prepare(training)

    def _save(self, path: Path) -> Pending:
        self._accelerator.save_state(str(path))
        return Pending()

    def restorer(self, target: Training) -> Restore:
        """``prepare`` is part of building the run: not timed."""
        accelerator = self._prepare(target)
        return lambda: accelerator.load_state(str(self.newest))

    @staticmethod
    def _prepare(training: Training) -> Any:
        package: Any = importlib.import_module("accelerate")
        accelerator = package.Accelerator(cpu=not torch.accelerator.is_available())
        accelerator.prepare(training.model, training.optimizer)
        return accelerator


CONTENDERS: tuple[type[Contender], ...] = (
    CheckpointerSync,
    CheckpointerAsync,
    CheckpointerLazy,
    TorchSave,
    TorchSaveFsync,
    TorchLoadMmap,
    Safetensors,
    DcpSave,
    DcpAsync,
    DcpAsyncCached,
    DcpAsyncStaging,
    TorchCheckpointing,
    Lightning,
    Accelerate,
)
