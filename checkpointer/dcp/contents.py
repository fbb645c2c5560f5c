"""What a checkpoint holds, under the names by which DCP knows the parts of a nested state.

DCP joins the keys that lead to a value with dots: ``optimizer.state.0.exp_avg``. It goes into every dict, and into
lists that hold tensors or dicts; any other value stays whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import NamedTuple, TypeAlias

from checkpointer.dcp.checkpoint_id import MODEL, OBJECTS, is_plugin_made, paths_of
from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import Component, Index, Json
from checkpointer.format.trees import spelled_out
from checkpointer.state.tree.decode import decode

Path: TypeAlias = tuple[str | int, ...]

_MAPPINGS = frozenset({"$dict", "$odict", "$counter"})
"""Tags whose payload is pairs of a key and a value."""


class TensorAt(NamedTuple):
    """A tensor of the index."""

    component: str
    key: str


class ValueAt(NamedTuple):
    """Any other value: its tree."""

    component: str
    node: Json
    names: tuple[str, ...] = ()
    """The same value for who calls parameters by name: those of a group of an optimizer, in its order."""


Held: TypeAlias = TensorAt | ValueAt


@dataclass(frozen=True)
class Contents:
    """All of a checkpoint, by name."""

    listed: dict[str, Held] = field(default_factory=dict)
    """Everything once."""
    paths: dict[str, Path] = field(default_factory=dict)
    """The keys that lead to each of it."""
    also: dict[str, Held] = field(default_factory=dict)
    """Other names for some of it."""

    @classmethod
    def of(cls, index: Index) -> Contents:
        """What ``index`` describes: a state that DCP has saved, or the components of a manager.

        Raises:
            CorruptCheckpointError: a tree is not well formed.
        """
        found = cls()
        index = replace(index, components={name: _spelled_out(part) for name, part in index.components.items()})
        entries = _saved_by_dcp(index) if is_plugin_made(index) else _components(index)
        for path, held, name in entries:
            if isinstance(held, TensorAt) and held.key not in index.components[held.component].tensors:
                raise CorruptCheckpointError(f"{name}: the checkpoint has no tensor {held.component}.{held.key}")
            found.listed[name], found.paths[name] = held, path
        if not is_plugin_made(index):
            for component, part in index.components.items():
                if part.kind == "optimizer":
                    found.also.update(_names_by_parameter(found, index, component, part))
        return found

    def find(self, name: str) -> Held:
        """What is called ``name``."""
        return self.listed[name] if name in self.listed else self.also[name]


def _spelled_out(component: Component) -> Component:
    return replace(component, tree=spelled_out(component.tree, component.tensors))


def _saved_by_dcp(index: Index) -> Iterator[tuple[Path, Held, str]]:
    model = index.components[MODEL]
    paths = paths_of(model.meta)
    for key in model.tensors:
        yield paths.get(key, (key,)), TensorAt(MODEL, key), key
    objects = index.components.get(OBJECTS)
    if objects is not None:
        paths = paths_of(objects.meta)
        items = _items(objects.tree)
        if items is None:
            raise CorruptCheckpointError("the tree of the component 'objects' is not well formed")
        for key, node in items:
            yield paths.get(key, (key,)), ValueAt(OBJECTS, node), key


def _components(index: Index) -> Iterator[tuple[Path, Held, str]]:
    for name, component in index.components.items():
        entries = _module(name, component) if component.kind == "module" else _walk(name, (name,), component.tree)
        yield from ((path, held, ".".join(map(str, path))) for path, held in entries)


def _module(name: str, component: Component) -> Iterator[tuple[Path, Held]]:
    """The entries of ``state_dict()``: tensors by their names, and a tree of what is none, or has two names."""
    inner = component.meta.get("inner")
    hidden = set(map(str, inner)) if isinstance(inner, list) else set()
    for key in component.tensors:
        if key not in hidden:
            yield (name, key), TensorAt(name, key)
    for key, node in _items(component.tree) or ():
        yield from _walk(name, (name, key), node)


def _walk(component: str, path: Path, node: Json) -> Iterator[tuple[Path, Held]]:
    items = _items(node)
    key = _tensor_key(node)
    if items is not None:
        for part, inner in items:
            yield from _walk(component, (*path, part), inner)
    elif isinstance(node, list) and any(map(_is_entered, node)):
        for number, inner in enumerate(node):
            yield from _walk(component, (*path, number), inner)
    else:
        yield path, ValueAt(component, node) if key is None else TensorAt(component, key)


def _is_entered(node: Json) -> bool:
    """Whether DCP goes into a list because of this member."""
    if isinstance(node, list):
        return any(map(_is_entered, node))
    return _items(node) is not None or _tensor_key(node) is not None


def _items(node: Json) -> list[tuple[str, Json]] | None:
    """Keys and nodes of a mapping, as DCP writes keys; ``None`` for any other node."""
    if not isinstance(node, dict):
        return None
    tag = next(iter(node), "")
    if not tag.startswith("$"):
        return list(node.items())
    pairs = node[tag]
    if tag == "$defaultdict" and isinstance(pairs, list) and len(pairs) == 2:
        pairs = pairs[1]
    elif tag not in _MAPPINGS:
        return None
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise CorruptCheckpointError(f"a {tag} of a tree is not well formed")
    return [(_key(pair[0]), pair[1]) for pair in pairs if isinstance(pair, list)]


def _key(node: Json) -> str:
    """A key of a dict as DCP writes it."""
    return str(node if isinstance(node, str | int) else decode(node, {}, place="key"))


def _tensor_key(node: Json) -> str | None:
    """The key of the tensor that a node stands for."""
    if not isinstance(node, dict) or len(node) != 1:
        return None
    tag, payload = next(iter(node.items()))
    if tag == "$tensor" and isinstance(payload, str):
        return payload
    if tag == "$leaf":
        return _tensor_key(payload)
    return _tensor_key(payload[0]) if tag == "$parameter" and isinstance(payload, list) and payload else None


# ------------------------------------------------------------------------------------ optimizers, by parameter


def _names_by_parameter(found: Contents, index: Index, name: str, part: Component) -> dict[str, Held]:
    """What ``get_optimizer_state_dict`` of DCP calls the state of an optimizer: parameters by name, not by number.

    None where a parameter has no name, or two have the same.
    """
    groups = [dict(_items(node) or ()) for node in _groups(part)]
    names = _parameters(index, part)
    numbers = [_numbers(group) for group in groups]
    flat = [given for group in names for given in group]
    if list(map(len, numbers)) != list(map(len, names)) or len({*flat} - {None}) != len(flat):
        return {}
    called = {str(number): str(given) for number, given in zip(chain.from_iterable(numbers), flat, strict=True)}
    also: dict[str, Held] = {}
    for listed, path in found.paths.items():
        if path[:2] == (name, "state") and len(path) > 3 and path[2] in called:
            also[".".join(map(str, (name, "state", called[str(path[2])], *path[3:])))] = found.listed[listed]
    for number, (group, params) in enumerate(zip(groups, names, strict=True)):
        place = f"{name}.param_groups.{number}.params"
        found.listed[place] = ValueAt(name, group.get("params"), tuple(map(str, params)))
        for option, node in group.items():
            for path, held in _walk(name, (option,), node) if option != "params" else ():
                rest = ".".join(map(str, path))
                also.update({f"{name}.param_groups.{given}.{rest}": held for given in params})
    return also


def _groups(part: Component) -> Sequence[Json]:
    groups = part.tree.get("param_groups") if isinstance(part.tree, dict) else None
    return groups if isinstance(groups, list) else []


def _numbers(group: Mapping[str, Json]) -> Sequence[Json]:
    params = group.get("params")
    return params if isinstance(params, list) else []


def _parameters(index: Index, part: Component) -> list[list[str | None]]:
    """The name of each parameter in its module, for each group."""
    groups = part.meta.get("params")
    return [
        [_without_component(index, given) for given in group if given is None or isinstance(given, str)]
        for group in (groups if isinstance(groups, list) else [])
        if isinstance(group, list)
    ]


def _without_component(index: Index, name: str | None) -> str | None:
    component, _, rest = (name or "").partition(".")
    known = index.components.get(component)
    return rest if rest and known is not None and known.kind == "module" else name
