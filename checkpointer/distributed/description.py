"""What a rank has, told so that ranks that have the same say the same: sections, each with a digest of 16 bytes.

A section holds the tensors of one component that the same ranks have: the plain ones that are trained, the plain ones
that are not, and those of each mesh of DTensors. A rank outside a mesh has no such section, and is not asked for it.
Devices, strides and addresses are left out: they may differ.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import xxhash

from checkpointer.errors import UnsupportedStateError
from checkpointer.format import strict_json
from checkpointer.format.index import Json
from checkpointer.format.layouts import Cut
from checkpointer.state.dtensor import Sharding, is_sharded, sharding_of
from checkpointer.state.optimizer.adapter import STATE
from checkpointer.state.protocol import Captured
from checkpointer.state.tensors import dtype_name

Sort: TypeAlias = Literal["plain", "own", "mesh"]
"""``plain``: trained, and equal on all ranks that have it. ``own``: what may differ from rank to rank, such as buffers,
random state and positions of loaders; the lowest rank that has it is asked first. ``mesh``: parts of DTensors."""


class Entry(NamedTuple):
    """One tensor."""

    name: str
    """What it is called on every rank: the key, but for the state of a named parameter ``state.<its name>.<slot>``."""
    key: str
    """In this process, in ``Captured.tensors``."""
    dtype: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    cuts: tuple[Cut, ...] = ()
    frozen: bool = False
    declared: bool = False
    """Whether the user has said that different modules hold it with one value (tied weights of a pipeline's ends)."""


@dataclass(frozen=True)
class Section:
    """The tensors of one component that the same ranks have."""

    component: str
    kind: str
    sort: Sort
    entries: tuple[Entry, ...]
    """In the order of their names, which is the same on all ranks."""
    parameters: tuple[str, ...] = ()
    """With ``plain`` tensors of an optimizer: what all its parameters are called, and their shapes."""
    mesh: tuple[int, ...] = ()
    """The sizes of the mesh; empty where there is none."""
    group: int = 0
    """Which mesh of these sizes this rank is in, as a hash of its ranks."""
    cell: int = 0
    """This rank's cell of it."""

    @cached_property
    def digest(self) -> bytes:
        """Equal on two ranks just where their sections are: the meshes they stand in, and where, are told beside it."""
        entries: list[Any] = [
            [entry.name, entry.dtype, list(entry.shape), list(map(list, entry.cuts)), entry.frozen, entry.declared]
            for entry in self.entries
        ]
        told = [self.component, self.kind, self.sort, list(self.parameters), list(self.mesh), entries]
        return xxhash.xxh3_128_digest(strict_json.dumps(told).encode("ascii"))


@dataclass(frozen=True)
class Description:
    """All that a rank has."""

    sections: tuple[Section, ...]

    @cached_property
    def digest(self) -> bytes:
        """Of everything, with this rank's place in each mesh: where it is the same again, nothing has to be told."""
        told = b"".join(
            section.digest + section.group.to_bytes(8, "little") + section.cell.to_bytes(8, "little")
            for section in self.sections
        )
        return xxhash.xxh3_128_digest(told)


class Describer:
    """Describes the state of one manager, save after save. What is as it was is not described again."""

    def __init__(self, replicated: Mapping[str, Collection[str]] | None = None) -> None:
        """``replicated``: of each component, globs of keys that several modules hold with one value."""
        self._replicated = replicated or {}
        self._seen: list[object] | None = None
        self._last = Description(())

    def describe(self, captured: Mapping[str, Captured]) -> Description:
        """The sections of ``captured``; the object of the last call, where nothing has changed.

        Raises:
            UnsupportedStateError: a DTensor is no box of a tensor on this rank. The message names it.
        """
        seen = _traits(captured)
        if seen != self._seen:
            self._last = describe(captured, self._replicated)
            self._seen = seen
        return self._last


def _traits(captured: Mapping[str, Captured]) -> list[object]:
    """All that a description depends on, cheap to make and to compare."""
    found: list[object] = []
    for name, part in captured.items():
        found += [name, part.kind, list(part.tensors), part.trainable, part.frozen, part.meta.get("params")]
        found.append(part.meta.get("shapes"))
        found.append([_trait(tensor) for tensor in part.tensors.values()])
    return found


def _trait(tensor: torch.Tensor) -> object:
    if not is_sharded(tensor):
        return tensor.dtype, tensor.shape
    sharded: Any = tensor
    order = getattr(sharded._spec, "shard_order", None)  # noqa: SLF001  newer torch alone has it
    return tensor.dtype, tensor.shape, sharded.device_mesh, sharded.placements, order


def describe(captured: Mapping[str, Captured], replicated: Mapping[str, Collection[str]]) -> Description:
    """The sections of all components."""
    found: list[Section] = []
    for name in sorted(captured):
        found += _sections(name, captured[name], replicated)
    return Description(tuple(found))


@dataclass
class _Draft:
    """A section before its entries are in order."""

    sharding: Sharding | None = None
    entries: list[Entry] = field(default_factory=list)


def _sections(component: str, part: Captured, replicated: Mapping[str, Collection[str]]) -> list[Section]:
    names = _Names(component, part, replicated)
    shardings = _shardings(component, part)
    meshes = _meshes_of_parameters(part, shardings)
    drafts: dict[tuple[Sort, int], _Draft] = {("plain", 0): _Draft()}
    for key, tensor in part.tensors.items():
        mesh = shardings.get(key) or meshes.get(_number(key))
        if mesh is None:
            place: tuple[Sort, int] = ("plain" if key in part.trainable else "own", 0)
        elif mesh.cell is None:
            continue
        else:
            place = ("mesh", mesh.mesh)
        cuts = shardings[key].form.cuts if key in shardings else ()
        entry = Entry(names.of(key), key, dtype_name(tensor.dtype), tuple(tensor.shape), cuts)
        draft = drafts.setdefault(place, _Draft(mesh))
        draft.entries.append(entry._replace(frozen=key in part.frozen, declared=names.declared(key)))
    return [_section(component, part, sort, draft) for (sort, _), draft in drafts.items()]


def _section(component: str, part: Captured, sort: Sort, draft: _Draft) -> Section:
    entries = tuple(sorted(draft.entries))
    parameters = _parameters_of(part) if sort == "plain" else ()
    if draft.sharding is None:
        return Section(component, part.kind, sort, entries, parameters)
    sharding = draft.sharding
    assert sharding.cell is not None, "a rank outside a mesh has no section of it"
    return Section(component, part.kind, sort, entries, parameters, sharding.form.mesh, sharding.mesh, sharding.cell)


def _shardings(component: str, part: Captured) -> dict[str, Sharding]:
    found: dict[str, Sharding] = {}
    for key, tensor in part.tensors.items():
        if is_sharded(tensor):
            try:
                found[key] = sharding_of(tensor)
            except UnsupportedStateError as error:
                raise UnsupportedStateError(f"{component}.{key}: {error}") from error
    return found


def _meshes_of_parameters(part: Captured, shardings: Mapping[str, Sharding]) -> dict[int | None, Sharding]:
    """The mesh of each parameter of an optimizer, by number: plain state of it, such as a step count, belongs there."""
    if part.kind != "optimizer":
        return {}
    found = {_number(key): sharding for key, sharding in shardings.items()}
    found.pop(None, None)
    return found


def _number(key: str) -> int | None:
    """The parameter that a key of an optimizer's state belongs to: ``state.<number>.<slot>``."""
    number, dot, _ = key.removeprefix(STATE).partition(".")
    return int(number) if dot and key.startswith(STATE) and number.isdecimal() else None


class _Names:
    """What tensors of one component are called on all ranks."""

    def __init__(self, component: str, part: Captured, replicated: Mapping[str, Collection[str]]) -> None:
        self._component = component
        self._replicated = replicated
        params: Any = part.meta.get("params") if part.kind == "optimizer" else None
        self._parameters: list[str | None] = [name for group in params or () for name in group]
        found = {key: self._named(key) for key in part.tensors}
        self._found = found if len(set(found.values())) == len(found) else {}

    def of(self, key: str) -> str:
        """The key itself, where parameters have no names, or two of them the same."""
        return self._found.get(key, key)

    def declared(self, key: str) -> bool:
        """Whether the user has declared it, or the parameter that it is state of."""
        if not self._replicated:
            return False
        parameter = self._parameter(key)
        component, _, name = (self._component, "", key) if parameter is None else parameter.partition(".")
        return any(fnmatchcase(name, glob) for glob in self._replicated.get(component, ()))

    def _named(self, key: str) -> str:
        parameter = self._parameter(key)
        return key if parameter is None else f"{STATE}{parameter}.{key.split('.', 2)[2]}"

    def _parameter(self, key: str) -> str | None:
        number = _number(key) if self._parameters else None
        return self._parameters[number] if number is not None and number < len(self._parameters) else None


def _parameters_of(part: Captured) -> tuple[str, ...]:
    """What the parameters of an optimizer are called, group by group, and their shapes."""
    names, shapes = part.meta.get("params"), part.meta.get("shapes")
    if part.kind != "optimizer" or not isinstance(names, list) or not isinstance(shapes, list):
        return ()
    return tuple(_told(names, shapes))


def _told(names: Sequence[Json], shapes: Sequence[Json]) -> Iterable[str]:
    for group, (of_group, their_shapes) in enumerate(zip(names, shapes, strict=True)):
        assert isinstance(of_group, list)
        assert isinstance(their_shapes, list)
        for number, (name, shape) in enumerate(zip(of_group, their_shapes, strict=True)):
            yield f"{name or 'unnamed'} {shape}, parameter {number} of group {group}"
