"""A hand-made ``torch.save`` file becomes a checkpoint. Nothing is ever unpickled that can run code."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from checkpointer.config.arguments import check_component_names, check_step
from checkpointer.config.metrics import check_metrics
from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    RunNotEmptyError,
    SaveError,
    UnsupportedStateError,
)
from checkpointer.format import strict_json
from checkpointer.format.info import CheckpointInfo
from checkpointer.migration.naming import ImportPlan, Naming, Part, plan_import
from checkpointer.repository.repository import Repository
from checkpointer.save.snapshot import Snapshot
from checkpointer.save.writer import write_checkpoint
from checkpointer.staging.stager import Stager
from checkpointer.state import Captured
from checkpointer.state.module.adapter import ModuleAdapter
from checkpointer.state.tree.encode import encode
from checkpointer.storage import open_storage
from checkpointer.version import __version__

VALUES = "imported.json"
"""The attachment that holds what is no component's state, as a tree."""

_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True)
class Imported:
    """A finished import."""

    checkpoint: CheckpointInfo
    plan: ImportPlan
    """What became of everything in the file."""


def import_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any],
    root: str | os.PathLike[str],
    *,
    step: int | None = None,
    epoch: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    map: Naming | None = None,  # noqa: A002  what it does to keys
    kinds: Mapping[str, str] | None = None,
    append: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """Make a checkpoint of ``source``, which ``CheckpointManager(root, model=…, …).restore_latest()`` restores.

    The random generators are not in such files: a restore leaves them as they are, and says so.

    Args:
        source: a file that ``torch.save`` wrote (or a ``.safetensors`` file), or what ``torch.load`` returned.
        root: directory or fsspec URL of the run, which should hold no checkpoint yet.
        step: the step that the state belongs to: training goes on at ``step + 1``. Default: what the file says.
        epoch: the epoch. Default: what the file says.
        metrics: numbers that retention and ``restore_best`` can go by.
        map: key in the file to component name, ``step`` or ``epoch``; ``None`` leaves a key out. The usual names need
            none of it.
        kinds: component name to ``module``, ``optimizer``, ``stateful`` or ``container``, where the guess is wrong.
        append: add to a run that holds checkpoints; what is imported is the newest then. Nothing is replaced.
        storage_options: handed to fsspec.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CorruptCheckpointError: it is no file of ``torch.save``, or damaged.
        UnsupportedStateError: it holds objects that only unpickling could make, or values that cannot be stored.
        ConfigError: what is in it cannot be told apart, or the step is not known.
        RunNotEmptyError: the run holds checkpoints.
        RunLockedError: another job writes to it.
    """
    name, state = ("a mapping", source) if isinstance(source, Mapping) else (os.path.basename(source), load(source))
    plan = plan_of(name, state, step=step, epoch=epoch, naming=map, kinds=kinds)
    repository = Repository(open_storage(root, storage_options))
    return Imported(write_import(repository, plan, name=name, metrics=check_metrics(metrics), append=append), plan)


def load(path: str | os.PathLike[str]) -> Mapping[Any, Any]:
    """What a file holds; its tensors stay in the file, mapped into memory, where its format allows that."""
    place = os.fspath(path)
    if not os.path.isfile(place):
        raise CheckpointNotFoundError(f"there is no file {place}")
    with _typed_errors(place):
        state = _safetensors(place) if place.endswith(".safetensors") else _torch_file(place)
    if not isinstance(state, Mapping):
        raise ConfigError(f"{place} holds a {type(state).__name__}, not a dict of states")
    return state


def _torch_file(place: str) -> Any:
    # A namespace of settings, which half of all scripts save, does nothing when it is made.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(place, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(place))


def _safetensors(place: str) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    with safe_open(place, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
        aliases = {alias: key for alias, key in (file.metadata() or {}).items() if key in state}
    return {**state, **{alias: state[key] for alias, key in aliases.items()}}


@contextmanager
def _typed_errors(place: str) -> Iterator[None]:
    """What ``torch.load`` raises, as what it means."""
    try:
        yield
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        what = f"objects of {found[1]}" if found else "objects"
        raise UnsupportedStateError(
            f"{place} holds {what}, which only unpickling can make, and that runs whatever code the file holds. If you "
            "trust its author, load it in a script of your own, state = torch.load(path, weights_only=False, "
            "map_location='cpu'), and pass the dict: checkpointer.migration.import_checkpoint(state, root, step=…)"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if "TorchScript" in str(error):
            raise UnsupportedStateError(
                f"{place} is a TorchScript archive: pass torch.jit.load(path).state_dict() to "
                "checkpointer.migration.import_checkpoint in a script of your own, if you trust its author"
            ) from error
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise CorruptCheckpointError(f"{place} is no file of torch.save, or it is damaged: {reason}") from error


def plan_of(
    name: str,
    state: Mapping[Any, Any],
    *,
    step: int | None = None,
    epoch: int | None = None,
    naming: Naming | None = None,
    kinds: Mapping[str, str] | None = None,
) -> ImportPlan:
    """What an import would do; ``name`` is that of the file, for messages."""
    try:
        plan = plan_import(state, naming, kinds)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    check_component_names(plan.parts, reserved=())
    plan.step = plan.step if step is None else check_step(step)
    plan.epoch = plan.epoch if epoch is None else check_step(epoch, "epoch")
    _settle_values(plan)
    if plan.step is None:
        raise ConfigError(f"{name} does not say which step it is of: give the step (--step N)")
    return plan


def write_import(
    repository: Repository, plan: ImportPlan, *, name: str, metrics: Mapping[str, float], append: bool = False
) -> CheckpointInfo:
    """Carry a plan out, under the writer's lock."""
    snapshot = _snapshot(plan, name, metrics)
    repository.lock.acquire("an import")
    try:
        repository.recover()
        _check_room(repository, snapshot.step, append=append)
        return write_checkpoint(repository, snapshot)[0]
    except CheckpointerError:
        raise
    except OSError as error:
        raise SaveError(f"the import to {repository.url} failed: {repository.storage.redact(str(error))}") from error
    finally:
        repository.release()


def _check_room(repository: Repository, step: int, *, append: bool) -> None:
    listing = repository.list_checkpoints()
    taken = [info.step for info in listing.checkpoints] + [item.step for item in listing.unreadable]
    if taken and not append:
        raise RunNotEmptyError(
            f"{repository.url} holds {len(taken)} checkpoints: choose an empty root, or add to these (--append); "
            "what is imported is the newest then"
        )
    if step in taken:
        raise RunNotEmptyError(f"{repository.url} holds a checkpoint of step {step}, which an import does not replace")


def _snapshot(plan: ImportPlan, name: str, metrics: Mapping[str, float]) -> Snapshot:
    assert plan.step is not None
    captured = {part.name: capture(part) for part in plan.parts.values()}
    values = strict_json.dumps(plan.values, indent=2).encode("ascii")
    return Snapshot(
        step=plan.step,
        epoch=plan.epoch,
        created=datetime.now(timezone.utc),
        metrics=metrics,
        tags=(),
        staged=Stager().live(captured),
        attachments={VALUES: values} if plan.values else {},
        parent=None,
        environment={"checkpointer": __version__, "imported_from": name[:200]},  # what it was trained with is not known
    )


def capture(part: Part) -> Captured:
    """The state as the adapter of the live object would have captured it."""
    if part.kind == "module":
        return _module(part)
    tree, tensors = encode(part.value, part.name)
    return Captured(part.kind, tree, tensors)


def _module(part: Part) -> Captured:
    """Without the flags of a live module, which no ``state_dict`` has: a restore leaves them as they are."""
    captured = ModuleAdapter(part.name, _StandIn(part.value)).capture()
    versions = getattr(part.value, "_metadata", None)
    if isinstance(versions, Mapping):
        found = {path: item.get("version") for path, item in versions.items() if isinstance(item, Mapping)}
        captured.meta["versions"] = {path: item for path, item in found.items() if type(item) is int and item != 1}
    for flags in ("frozen", "eval"):
        del captured.meta[flags]
    return captured


class _StandIn(nn.Module):
    """A module that is nothing but its ``state_dict``."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        self._state = _Hidden(state)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:  # type: ignore[override]  # the one form that is called
        return dict(self._state.value)


@dataclass(frozen=True)
class _Hidden:
    """Keeps tensors from being taken for attributes that a module forgot to register."""

    value: Mapping[str, Any]


def _settle_values(plan: ImportPlan) -> None:
    """Encode the plain values. What cannot be is left out, and the plan says so."""
    values, plan.values = plan.values, {}
    for key, value in values.items():
        try:
            tree, tensors = encode(_numbers(value), key)
        except UnsupportedStateError as error:
            plan.left_out[key] = str(error).partition(";")[0]
            continue
        if tensors:
            plan.left_out[key] = "too large for a plain value; name it to make it a component"
        else:
            plan.values[key] = tree


def _numbers(value: Any) -> Any:
    """Plain containers with the tensors of one element as numbers."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, argparse.Namespace):
        return _numbers(vars(value))
    if type(value) is dict:
        return {key: _numbers(item) for key, item in value.items()}
    return type(value)(map(_numbers, value)) if type(value) in (list, tuple) else value


__all__ = ["VALUES", "Imported", "capture", "import_checkpoint", "load", "plan_of", "write_import"]
