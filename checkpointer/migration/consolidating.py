"""One plain model out of any checkpoint, however many ranks wrote it: streaming, without a process group."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from checkpointer.distributed.box_reads import narrowed, reads_of_box
from checkpointer.errors import ConfigError, SaveError
from checkpointer.format import paths
from checkpointer.format.boxes import Box, overlap
from checkpointer.format.index import Chunk, Component, TensorSpec
from checkpointer.format.tensor_files import ComponentTensors, TensorFile, plan_files, shard_indexes
from checkpointer.policy.values import did_you_mean
from checkpointer.repository.checkpoint_reader import CheckpointReader
from checkpointer.repository.repository import Repository
from checkpointer.state.tensors import DTYPES, host_bytes
from checkpointer.storage import Buffer, LocalStorage, open_storage

SAFETENSORS = ".safetensors"

PIECE = 32 << 20
"""Bytes of a tensor that are in memory at a time."""


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    path: str
    component: str
    files: tuple[str, ...]
    """Inside ``path``, where that is a directory; else its own name."""
    tensors: int
    size: int
    """Bytes of all files."""
    left_out: tuple[str, ...]
    """Entries of the model's state that are no tensors, which safetensors cannot hold."""


def consolidate(
    root: str | os.PathLike[str],
    step: int,
    out: str | os.PathLike[str],
    *,
    component: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Consolidated:
    """Write the model of a checkpoint as plain safetensors. Every byte is checked against its hash before.

    Needs memory for a piece of one tensor at a time, and no process group, whatever layout it was saved from.

    Args:
        root: directory or fsspec URL that holds the run's checkpoints.
        step: a step that was saved.
        out: a local path. With the suffix ``.safetensors``: one file. Else a new directory as the Hugging Face tools
            read it: one file, or shards and their index, and the checkpoint's attachments (``config.json``, …).
        component: which one. Default: ``model``, or the only module.
        shard_size: bytes of tensors in one file of a directory at most. Default: 50·10⁹.
        overwrite: replace what is there.
        storage_options: handed to fsspec.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: it is damaged; nothing was written.
        ConfigError: an unknown component, or ``out`` exists.
        SaveError: ``out`` cannot be written.
    """
    repository = Repository(open_storage(root, storage_options))
    return consolidate_step(repository, step, out, component=component, shard_size=shard_size, overwrite=overwrite)


def consolidate_step(
    repository: Repository,
    step: int,
    out: str | os.PathLike[str],
    *,
    component: str | None = None,
    shard_size: int | None = None,
    overwrite: bool = False,
) -> Consolidated:
    """As :func:`consolidate`, in an open run root."""
    path = os.path.abspath(os.fspath(out))
    if os.path.lexists(path) and not overwrite:
        raise ConfigError(f"{path} exists; choose another name, or overwrite it (--force)")
    with repository.open(repository.find(step)) as reader:
        name = _chosen(reader.index.components, component)
        reader.check_metadata()
        tensors = reader.index.components[name].tensors
        reader.check_chunks((f"{name}.{key}", chunk) for key in tensors for chunk in reader.index.chunks[name, key])
        work = _Consolidation(reader, name, 1 << 62 if path.endswith(SAFETENSORS) else shard_size)
        try:
            return work.write(path)
        except OSError as error:
            raise SaveError(f"{path} could not be written: {error}. What was there before is untouched") from error


def _chosen(components: Mapping[str, Component], wanted: str | None) -> str:
    modules = [name for name, part in components.items() if part.kind == "module"]
    if wanted is None and ("model" in modules or len(modules) == 1):
        return "model" if "model" in modules else modules[0]
    if wanted in components:
        return str(wanted)
    if wanted is None:
        raise ConfigError(f"which component? There are {', '.join(components)} (--component)")
    hint = did_you_mean(wanted, components)
    raise ConfigError(f"there is no component {wanted!r}, only {', '.join(components)}{hint}")


class _Consolidation:
    """The files of one component."""

    def __init__(self, reader: CheckpointReader, name: str, limit: int | None) -> None:
        self._reader = reader
        self._name = name
        component = reader.index.components[name]
        tree: Any = component.tree if component.kind == "module" else {}
        hidden: Any = component.meta.get("inner", []) if component.kind == "module" else []
        entries = tree.items() if isinstance(tree, dict) else ()
        specs = {
            key: TensorSpec(spec.dtype, spec.shape) for key, spec in component.tensors.items() if key not in hidden
        }
        aliases = {key: node["$tensor"] for key, node in entries if _refers(node, specs)}
        self._parts = {"model": ComponentTensors("module", specs, aliases=aliases)}
        self._files = plan_files(self._parts, limit)
        self._left_out = tuple(key for key, node in entries if key not in aliases)

    def write(self, path: str) -> Consolidated:
        single = path.endswith(SAFETENSORS)
        if not self._files:
            raise ConfigError(f"the component {self._name!r} holds no tensors")
        parent, aside = os.path.dirname(path), f"{path}.{secrets.token_hex(4)}.partial"
        os.makedirs(parent, exist_ok=True)
        storage = LocalStorage(aside)
        try:
            for file in self._files:
                storage.write(file.path, self._bytes(file), file.size)
            small = {} if single else {**shard_indexes(self._files, self._parts), **self._attachments()}
            for name, data in small.items():
                storage.write(name, [data], len(data))
            written = [*(file.path for file in self._files), *small]
            sizes = [os.path.getsize(os.path.join(aside, name)) for name in written]
            storage.sync("", *{name.rpartition("/")[0] for name in written if "/" in name})
            _put_in_place(os.path.join(aside, written[0]) if single else aside, path)
            LocalStorage(parent).sync("")
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        tensors = sum(len(file.slots) for file in self._files)
        return Consolidated(path, self._name, tuple(written), tensors, sum(sizes), self._left_out)

    def _attachments(self) -> dict[str, bytes]:
        prefix = f"{paths.ATTACHMENTS}/"
        return {
            path.removeprefix(prefix): self._reader.whole(path, 0, record.size)
            for path, record in self._reader.files.items()
            if path.startswith(prefix)
        }

    def _bytes(self, file: TensorFile) -> Iterator[Buffer]:
        yield file.header
        for slot, spec in zip(file.slots, file.specs, strict=True):
            chunks = self._reader.index.chunks[self._name, slot.key]
            for box in _pieces(spec):
                yield self._piece(slot.key, spec, box, chunks)

    def _piece(self, key: str, spec: TensorSpec, box: Box, chunks: tuple[Chunk, ...]) -> memoryview:
        """The row-major bytes of a box, gathered from all chunks that hold some of it. They have been checked."""
        target = torch.empty(box.lengths, dtype=DTYPES[spec.dtype], device="cpu")
        for chunk in chunks:
            common = overlap(Box(chunk.offsets, chunk.lengths), box)
            if common is not None:
                place = narrowed(target, box, common)
                self._reader.read(reads_of_box(f"{self._name}.{key}", chunk, common, place), verify=False)
        return host_bytes(target)


def _refers(node: object, specs: Mapping[str, TensorSpec]) -> bool:
    return isinstance(node, dict) and set(node) == {"$tensor"} and node["$tensor"] in specs


def _pieces(spec: TensorSpec) -> Iterator[Box]:
    """Boxes of at most ``PIECE`` bytes, one behind the other in the tensor's row-major bytes."""
    item = spec.nbytes // max(prod(spec.shape), 1)
    if spec.nbytes:
        yield from _cut((), spec.shape, max(item, 1))


def _cut(first: tuple[int, ...], rest: tuple[int, ...], item: int) -> Iterator[Box]:
    """The boxes of what lies at the indices ``first`` of the leading dimensions."""
    ones = (1,) * len(first)
    if not rest or prod(rest) * item <= PIECE:
        yield Box((*first, *(0,) * len(rest)), (*ones, *rest))
        return
    rows = PIECE // (prod(rest[1:]) * item)
    for start in range(0, rest[0], max(rows, 1)):
        if rows:
            count = min(rows, rest[0] - start)
            yield Box((*first, start, *(0,) * (len(rest) - 1)), (*ones, count, *rest[1:]))
        else:
            yield from _cut((*first, start), rest[1:], item)


def _put_in_place(new: str, path: str) -> None:
    """Rename ``new`` to ``path``; a directory that is there is moved away first, and then removed."""
    if not os.path.isdir(path):
        os.replace(new, path)
        return
    old = f"{path}.{secrets.token_hex(4)}.old"
    os.rename(path, old)
    os.rename(new, path)
    shutil.rmtree(old)
