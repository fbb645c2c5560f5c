"""Stored state made readable: a component's tree (FORMAT.md, "Trees") as nodes with Python-like text.

Nothing is decoded into live objects, so neither torch nor numpy is needed, and what is not well formed is shown as it
lies in the file.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format.index import Component, Json, TensorSpec
from checkpointer.format.trees import spelled_out

_PLAIN_KEY = re.compile(r"[\w./:-]+")
_STRUCT = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
_STRUCT |= {"f2": "e", "f4": "f", "f8": "d"}
_LONG = 20
"""Items of a sequence that are all shown. Python's generator is one of 625 integers."""
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Node:
    """A value, by the label that it has in the container around it."""

    label: str
    """A key such as ``lr``, or an index such as ``[0]``."""
    text: str = ""
    """The value as Python writes it; for a container with ``children`` its type."""
    spec: TensorSpec | None = None
    """For tensors and arrays."""
    children: tuple[Node, ...] = ()
    brief: str = ""
    """``text`` without the middle of long sequences, where it has any."""

    @property
    def shown(self) -> str:
        """What a person wants to see of ``text``."""
        return self.brief or self.text

    @property
    def inline(self) -> bool:
        return self.spec is None and not self.children


def describe_component(component: Component) -> tuple[Node, ...]:
    """Everything a component holds: its tensors, and the plain values beside them."""
    outliner = _Outliner(component.tensors)
    if component.kind == "module":  # its tree holds only what is no tensor under its own name
        inner = component.meta.get("inner")
        hidden = {key for key in inner if isinstance(key, str)} if isinstance(inner, list) else set()
        own = [outliner.tensor(_key(name), name) for name in component.tensors if name not in hidden]
    else:
        own = []
    try:
        root = outliner.build("value", _spelled_out(component))
    except RecursionError:
        root = Node("value", "(nested too deeply to show)")
    rest = [outliner.tensor(_key(name), name) for name in component.tensors if name not in outliner.seen]
    values = root.children or (() if component.tree in ({}, []) else (root,))
    return (*own, *values, *rest)


def _spelled_out(component: Component) -> Json:
    """Its tree with an entry for each tensor; as it is where it is malformed."""
    try:
        return spelled_out(component.tree, component.tensors)
    except CorruptCheckpointError:
        return component.tree


def leaves(nodes: Iterable[Node], prefix: str = "") -> Iterable[tuple[str, Node]]:
    """``(path, node)`` of every node without children: ``param_groups[0].lr``."""
    stack = [(prefix, node) for node in reversed(list(nodes))]
    while stack:
        above, node = stack.pop()
        path = f"{above}{'.' if above and not node.label.startswith('[') else ''}{node.label}"
        if node.children:
            stack += [(path, child) for child in reversed(node.children)]
        else:
            yield path, node


class _Outliner:
    """Builds nodes over one component's tensors."""

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.seen: set[str] = set()
        self._specs = specs
        self._containers: Mapping[str, Callable[[str, Any], Node]] = {
            "$tuple": lambda label, items: self._sequence(label, items, "({})", "tuple"),
            "$set": lambda label, items: self._sequence(label, items, "{{{}}}" if items else "set()", "set"),
            "$frozenset": lambda label, items: self._sequence(label, items, "frozenset({{{}}})", "frozenset"),
            "$deque": lambda label, pair: self._sequence(label, pair[1], f"deque([{{}}], maxlen={pair[0]})", "deque"),
            "$slice": lambda label, items: self._sequence(label, items, "slice({})", "slice"),
            "$dict": lambda label, pairs: self._mapping(label, pairs, "dict"),
            "$odict": lambda label, pairs: self._mapping(label, pairs, "OrderedDict"),
            "$counter": lambda label, pairs: self._mapping(label, pairs, "Counter"),
            "$defaultdict": lambda label, pair: self._mapping(label, pair[1], f"defaultdict({pair[0]})"),
            "$custom": self._custom,
            "$tensor": self.tensor,
            "$parameter": lambda label, pair: self.build(label, pair[0]),
            "$leaf": self.build,
            "$ndarray": lambda label, array: self.tensor(label, array["tensor"], "numpy array"),
            "$sparse": lambda label, value: self._parts(label, value, f"{value['layout']} {value['shape']}"),
            "$quantized": lambda label, value: self._parts(label, value, "quantized"),
            "$subclass": self._subclass,
            "$bytes": lambda label, value: self._bytes(label, value, "bytes"),
            "$bytearray": lambda label, value: self._bytes(label, value, "bytearray"),
        }

    def build(self, label: str, value: Any) -> Node:
        """The node of one value; malformed ones as the JSON that they are."""
        if isinstance(value, list):
            return self._sequence(label, value, "[{}]", "list")
        if not isinstance(value, dict):
            return Node(label, repr(value))
        tag = next(iter(value)) if len(value) == 1 else ""
        try:
            if tag in self._containers:
                return self._containers[tag](label, value[tag])
            if tag in _LEAVES:
                return Node(label, _LEAVES[tag](value[tag]))
        except _MALFORMED:
            return Node(label, json.dumps(value))
        return self._mapping(label, list(value.items()), "dict", decoded=True)

    def tensor(self, label: str, key: str, what: str = "") -> Node:
        """A tensor; where it has been shown before, only its name."""
        if key in self.seen:
            return Node(label, f"(same tensor as {key})")
        spec = self._specs[key]
        self.seen.add(key)
        return Node(label, what, spec)

    def _sequence(self, label: str, items: list[Any], form: str, kind: str) -> Node:
        nodes = tuple([self.build(f"[{index}]", item) for index, item in enumerate(_listed(items))])
        if not all(node.inline for node in nodes):
            return Node(label, kind, children=nodes)
        comma = "," if kind == "tuple" and len(nodes) == 1 else ""
        text = ", ".join(node.text for node in nodes) + comma
        brief = ", ".join(_abbreviated([node.shown for node in nodes])) + comma
        return Node(label, form.format(text), brief="" if brief == text else form.format(brief))

    def _mapping(self, label: str, pairs: list[Any], kind: str, *, decoded: bool = False) -> Node:
        nodes = []
        for key, item in _listed(pairs):
            name = _key(key) if decoded or isinstance(key, str) else f"[{self.build('', key).text}]"
            nodes.append(self.build(name, item))
        return Node(label, kind if nodes else "{}" if kind == "dict" else f"{kind}()", children=tuple(nodes))

    def _custom(self, label: str, payload: Any) -> Node:
        name, value = payload
        inner = self.build("value", value)
        if inner.inline:
            return Node(label, f"{name}: {inner.text}", brief=f"{name}: {inner.brief}" if inner.brief else "")
        return Node(label, str(name), children=inner.children or (inner,))

    def _subclass(self, label: str, value: Any) -> Node:
        parts = [self.build(_key(name), part) for name, part in value["inner"].items()]
        return Node(label, f"{value['class']} {value['size']}", children=tuple(parts))

    def _parts(self, label: str, value: Any, what: str) -> Node:
        parts = [self.tensor(_key(name), key) for name, key in value["parts"].items()]
        scheme = [self.build(_key(name), item) for name, item in value.get("scheme", {}).items()]
        return Node(label, what, children=(*scheme, *parts))

    def _bytes(self, label: str, value: Any, kind: str) -> Node:
        if isinstance(value, dict):
            return self.tensor(label, value["tensor"], kind)
        data = base64.b64decode(value, validate=True)
        return Node(label, repr(data) if kind == "bytes" else f"bytearray({data!r})")


def _abbreviated(items: list[str]) -> list[str]:
    return items if len(items) <= _LONG else [*items[:3], f"… {len(items) - 4} more …", items[-1]]


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) and key.isprintable() else f"[{key!r}]"


def _number(value: Any) -> Any:
    """An int or float, natural or tagged."""
    if isinstance(value, dict):
        ((tag, payload),) = value.items()
        return int(payload, 16) if tag == "$int" else _float(payload)
    return value


def _float(payload: str) -> str:
    return payload if payload in ("inf", "-inf") else "nan"


def _big_int(payload: str) -> str:
    return str(int(payload, 16)) if len(payload) < 3000 else f"0x{payload}"


def _datetime(payload: Any) -> str:
    iso, _, zone = payload
    return f"datetime({iso}{'' if zone is None else f', {_zone(zone)}'})"


def _zone(zone: Any) -> str:
    if isinstance(zone, str):
        return zone
    return str(zone["zone"]) if "zone" in zone else f"offset {_timedelta(zone['offset'])}"


def _timedelta(payload: Any) -> str:
    days, seconds, microseconds = payload
    return f"timedelta(days={int(days)}, seconds={int(seconds)}, microseconds={int(microseconds)})"


def _path(payload: Any) -> str:
    text = payload[1] if isinstance(payload[1], str) else _surrogates(payload[1]["$str"])
    return f"Path({text!r})"


def _surrogates(payload: str) -> str:
    return base64.b64decode(payload, validate=True).decode("utf-8", "surrogatepass")


def _numpy_scalar(payload: Any) -> str:
    label, text = payload
    data = base64.b64decode(text, validate=True)
    if label in ("str", "bytes"):
        return f"numpy.{label}_({data.decode('utf-8', 'surrogatepass') if label == 'str' else data!r})"
    order = ">" if label[0] == ">" else "<"
    code = _STRUCT.get(label[1:])
    return f"numpy[{label}]({struct.unpack(order + code, data)[0] if code else f'0x{data.hex()}'})"


_LEAVES: Mapping[str, Callable[[Any], str]] = {
    "$int": _big_int,
    "$float": _float,
    "$str": lambda payload: repr(_surrogates(payload)),
    "$complex": lambda payload: f"complex({_number(payload[0])}, {_number(payload[1])})",
    "$datetime": _datetime,
    "$date": lambda payload: f"date({payload})",
    "$timedelta": _timedelta,
    "$range": lambda payload: f"range({', '.join(str(_number(part)) for part in _listed(payload))})",
    "$size": lambda payload: f"torch.Size({_listed(payload)})",
    "$dtype": lambda payload: f"torch.{payload}",
    "$device": lambda payload: f"device({payload})",
    "$path": _path,
    "$npscalar": _numpy_scalar,
}
