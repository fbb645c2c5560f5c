"""A checkpoint becomes a file that plain ``torch.load`` or safetensors reads."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    ConfigError,
    SaveError,
    UnsupportedStateError,
)
from checkpointer.format import paths
from checkpointer.format.index import Component
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.values import did_you_mean
from checkpointer.repository.checkpoint_reader import CheckpointReader, ChunkRead
from checkpointer.repository.repository import Repository
from checkpointer.staging.read_targets import TensorTarget
from checkpointer.state import SavedState
from checkpointer.state.destinations import Destinations
from checkpointer.state.module.adapter import check_meta
from checkpointer.state.module.match import saved_entries
from checkpointer.state.tensors import is_plain
from checkpointer.state.tree.decode import decode, skeleton
from checkpointer.storage import open_storage

SAFETENSORS = ".safetensors"
FORMATS = (SAFETENSORS, ".pt", ".pth")

RNG = "rng"


@dataclass(frozen=True)
class Exported:
    """A finished export."""

    path: str
    checkpoint: CheckpointInfo
    components: tuple[str, ...]
    """What is in the file."""
    left_out: tuple[str, ...]
    """Components of the checkpoint that are not."""
    size: int
    """Bytes."""
    safe: bool
    """Whether ``torch.load(path, weights_only=True)`` reads it."""


def export_checkpoint(
    root: str | os.PathLike[str],
    step: int,
    path: str | os.PathLike[str],
    *,
    component: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write the checkpoint of ``step`` to one file. Every byte is checked against its hash on the way.

    Args:
        root: directory or fsspec URL that holds the run's checkpoints.
        step: a step that was saved.
        path: a local file. ``.safetensors``: the tensors of one component under their ``state_dict`` names. ``.pt`` or
            ``.pth``: what ``torch.save`` makes of the ``state_dict``, or of ``{"model": …, "step": …, …}`` for all.
        component: the one to write. Default: for ``.safetensors`` the model, else all but the random generators,
            which ``torch.load`` would not read without ``weights_only=False``.
        overwrite: replace a file that is there.
        storage_options: handed to fsspec.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: it is damaged; nothing was written.
        ConfigError: another suffix, an unknown component, or the file exists.
        UnsupportedStateError: safetensors has no form for the component.
        SaveError: the file cannot be written.
    """
    repository = Repository(open_storage(root, storage_options))
    return export_step(repository, step, path, component=component, overwrite=overwrite)


def export_step(
    repository: Repository,
    step: int,
    path: str | os.PathLike[str],
    *,
    component: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """As :func:`export_checkpoint`, for an open run."""
    place = os.path.abspath(os.path.expanduser(os.fspath(path)))
    suffix = _check_target(place, overwrite=overwrite)
    info = repository.find(step)
    try:
        with repository.open(info) as reader:
            names = _choose(reader.index.components, component, suffix)
            reader.check_metadata()
            states = {name: read_state(reader, name) for name in names}
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"{info.path} was removed while it was read") from error
    if component is None and suffix != SAFETENSORS:
        _write(place, _with_counters(states, info), overwrite=overwrite)
    else:
        (state,) = states.values()
        _write(place, _flat(names[0], state) if suffix == SAFETENSORS else state, overwrite=overwrite)
    rest = tuple(name for name in reader.index.components if name not in names)
    safe = suffix == SAFETENSORS or _loads_safely(place)
    return Exported(place, info, tuple(names), rest, os.path.getsize(place), safe)


def read_state(reader: CheckpointReader, name: str) -> Any:
    """The state of one component in host memory, as ``state_dict()`` of the live object returned it."""
    component = reader.index.components[name]
    if component.kind != "module":
        _, keys = skeleton(component.tree, component.tensors, place=name)
        tensors = _read(reader, name, keys)
        return decode(component.tree, tensors, place=name, specs=component.tensors)
    check_meta(SavedState(name, component))
    entries = saved_entries(name, component)
    keys = {entry.stored for entry in entries.values() if entry.stored is not None}
    trees = {key: entry.node for key, entry in entries.items() if entry.stored is None}
    for key, tree in trees.items():
        keys |= skeleton(tree, component.tensors, place=f"{name}[{key!r}]")[1]
    tensors = _read(reader, name, keys)
    state = OrderedDict(
        (key, tensors[entry.stored])
        if entry.stored is not None
        else (key, decode(entry.node, tensors, place=f"{name}[{key!r}]", specs=component.tensors))
        for key, entry in entries.items()
    )
    state._metadata = _versions(component, entries)  # type: ignore[attr-defined]  # noqa: SLF001  as torch does
    return state


def _read(reader: CheckpointReader, name: str, keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors by key, in the order of the index, on the CPU."""
    wanted = set(keys)
    places = Destinations(name, reader.index.components[name].tensors, "cpu")
    for key in reader.index.components[name].tensors:
        if key in wanted:
            places.allocate(key)
    reads = [
        ChunkRead(f"{name}.{key}", chunk, TensorTarget(tensor, chunk))
        for key, tensor in places.reads.items()
        for chunk in reader.index.chunks[name, key]
    ]
    reader.read(reads, verify=True)
    return places.reads


def _versions(component: Component, keys: Iterable[str]) -> OrderedDict[str, dict[str, Any]]:
    """``_metadata`` as torch writes it, for every module that has an entry."""
    known: Any = component.meta.get("versions", {})
    prefixes = {parent.replace("/", ".") for key in keys for parent in paths.parents(key.replace(".", "/"))}
    return OrderedDict((path, {"version": known.get(path, 1)}) for path in sorted({"", *prefixes, *known}))


def _check_target(place: str, *, overwrite: bool) -> str:
    suffix = os.path.splitext(place)[1].lower()
    if suffix not in FORMATS:
        raise ConfigError(f"{place}: the suffix says the format, and must be one of {', '.join(FORMATS)}")
    if os.path.lexists(place) and not overwrite:
        raise ConfigError(f"{place} exists: choose another name, or replace it with --force (overwrite=True)")
    if not os.path.isdir(os.path.dirname(place)):
        raise ConfigError(f"there is no directory {os.path.dirname(place)}")
    return suffix


def _choose(components: Mapping[str, Component], component: str | None, suffix: str) -> list[str]:
    if component is None and suffix != SAFETENSORS:
        return [name for name in components if name != RNG]
    name = component or "model"
    if name not in components:
        hint = "" if component is None else did_you_mean(name, components)
        raise ConfigError(f"the checkpoint has no component {name!r}{hint}: name one of {', '.join(components)}")
    return [name]


def _with_counters(states: Mapping[str, Any], info: CheckpointInfo) -> dict[str, Any]:
    """All components as one dict, with the step and the epoch where no component has that name."""
    counters = {"step": info.step, **({} if info.epoch is None else {"epoch": info.epoch})}
    return {**counters, **states}


def _flat(name: str, state: Any) -> dict[str, torch.Tensor]:
    """A state of nothing but tensors, without the second names of tied ones."""
    if not isinstance(state, Mapping):
        raise UnsupportedStateError(f"component {name!r} is no dict of tensors: export it to a .pt file")
    wrong = [key for key, value in state.items() if not (isinstance(key, str) and _is_tensor(value))]
    if wrong:
        shown = ", ".join(map(repr, wrong[:5]))
        raise UnsupportedStateError(
            f"safetensors holds only plain tensors; {name!r} has also {shown}: export it to a .pt file"
        )
    return dict(state)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and is_plain(value)


# ------------------------------------------------------------------------------------------------------- the file


def _write(place: str, state: Any, *, overwrite: bool) -> None:
    """Beside its place first, then durably under its name: at no time is half a file there."""
    directory, name = os.path.split(place)
    temporary = os.path.join(directory, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        if place.lower().endswith(SAFETENSORS):
            _save_safetensors(state, temporary)
        else:
            torch.save(state, temporary)
        _sync(temporary)
        _move(temporary, place, overwrite=overwrite)
        _sync(directory)
    except CheckpointerError:
        raise
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
        raise SaveError(f"cannot write {place}: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _save_safetensors(state: Mapping[str, torch.Tensor], path: str) -> None:
    """Tied tensors once, the other names in the metadata, as ``safetensors.torch.save_model`` does."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    first: dict[int, str] = {}
    metadata = {"format": "pt"}
    for key, tensor in state.items():
        if first.setdefault(id(tensor), key) != key:
            metadata.setdefault(key, first[id(tensor)])
    kept = {key: state[key].contiguous() for key in first.values()}
    try:
        save_file(kept, path, metadata)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UnsupportedStateError(f"safetensors cannot hold this state: {error}. Export it to a .pt file") from error


def _sync(path: str) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: str, place: str, *, overwrite: bool) -> None:
    """Rename; unless ``overwrite`` never onto a file that somebody made meanwhile, where the file system can tell."""
    if not overwrite:
        try:
            os.link(temporary, place)
        except FileExistsError:
            raise ConfigError(f"{place} exists by now: choose another name") from None
        except OSError:  # no hard links here
            pass
        else:
            return
    os.replace(temporary, place)


def _loads_safely(place: str) -> bool:
    """Whether a reader that runs no code can load it."""
    try:
        torch.load(place, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return False
    return True


__all__ = ["FORMATS", "Exported", "export_checkpoint", "export_step", "read_state"]
