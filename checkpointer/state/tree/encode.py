"""Python state as a JSON tree with references to tensors, type-exact in both directions. FORMAT.md, "Trees".

What JSON holds exactly is written as it is. Everything else is an object with one key that starts with ``$``.
:func:`encode` is here; :func:`checkpointer.state.tree.decode.decode` is its inverse.
"""

from __future__ import annotations

import datetime as dt
from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from checkpointer.errors import UnsupportedStateError
from checkpointer.format.index import Json
from checkpointer.format.trees import MOST_COUNTED
from checkpointer.state import tensors
from checkpointer.state.dtensor import PLAIN_TYPES, address, is_sharded
from checkpointer.state.tree import leaves
from checkpointer.state.tree.codecs import codec_for
from checkpointer.state.tree.hints import REGISTER, hint

MAX_DEPTH = 200
INLINE_BYTES = 4096
WORTH_A_TAG = 16
"""Tensors or numbers of a dict or list from which on the tree says all of them in one word."""
KEY_PART = 120
"""Characters of a dict's key that the keys of tensors below it hold."""
#: The default factories that a defaultdict may have, by name.
FACTORIES: Mapping[str, Callable[[], Any]] = {
    factory.__name__: factory
    for factory in (list, dict, set, int, float, str, tuple, bool, bytes, OrderedDict, Counter, deque)
}
_FACTORY_NAMES: Mapping[Any, str] = {factory: name for name, factory in FACTORIES.items()}
#: numpy dtypes whose arrays are stored as a tensor of the same dtype; others are stored as bytes.
TORCH_NUMPY = frozenset(
    np.dtype(name).str
    for name in ("bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
)
#: Tensor keys that safetensors keeps for itself.
RESERVED_KEYS = frozenset({"__metadata__"})
_NAMED = hasattr(torch.Tensor, "has_names")  # gone since torch 2.13


def encode(value: Any, root: str = "state") -> tuple[Json, dict[str, torch.Tensor]]:
    """``(tree, tensors)`` of nested Python state; the tensors are live ones, detached.

    ``root`` names the state in messages. Raises :class:`UnsupportedStateError` naming the key path.
    """
    encoder = Encoder(root)
    tree = encoder.encode(value)
    if not encoder.prefixes_hold():
        encoder = Encoder(root, brief=False)
        tree = encoder.encode(value)
    return tree, encoder.tensors


class Encoder:
    """Encodes values into one name space of tensors."""

    def __init__(self, root: str, *, brief: bool = True) -> None:
        """``brief``: dicts of tensors are one word, which holds if :meth:`prefixes_hold` says so in the end."""
        self.root = root
        self._brief = brief
        self._prefixes: dict[str, int] = {}
        """For each dict of tensors that is one word: how many tensors its prefix stands for."""
        self._counted = 0
        self.tensors: dict[str, torch.Tensor] = {}
        self._by_pointer: dict[int, tuple[str, ...]] = {}
        self._path: list[tuple[str, Any]] = []
        self._open: set[int] = set()
        self._hashable = 0
        # Tag and method by type: few frames a level, so that MAX_DEPTH levels fit the interpreter's recursion limit.
        self._containers: Mapping[type, tuple[str, Callable[[Any], Json]]] = {
            list: ("", self._list),
            dict: ("", self._dict),
            tuple: ("$tuple", self._list),
            set: ("$set", self._members),
            frozenset: ("$frozenset", self._members),
            OrderedDict: ("$odict", self._pairs),
            Counter: ("$counter", self._pairs),
            defaultdict: ("$defaultdict", self._defaultdict),
            deque: ("$deque", self._deque),
            slice: ("$slice", self._slice),
            bytes: ("$bytes", self._bytes),
            bytearray: ("$bytearray", self._bytes),
            np.ndarray: ("$ndarray", self._ndarray),
        }

    def encode_at(self, path: Iterable[tuple[str, Any]], value: Any) -> Json:
        """Encode ``value`` at ``path``, which messages and tensor keys name: ``("[]", key)`` or ``(".", name)``."""
        self._path = list(path)
        return self.encode(value)

    def encode(self, value: Any) -> Json:
        """The tree of one value."""
        if leaves.is_plain(value):
            plain: Json = value
            return plain
        tag, handler = self._containers.get(type(value)) or ("", self._other)
        if id(value) in self._open:
            self._fail("a container that holds itself")
        if len(self._open) >= MAX_DEPTH:
            self._fail(f"nesting deeper than {MAX_DEPTH}")
        self._open.add(id(value))
        try:
            node = handler(value)
        except RecursionError:
            self._fail("nesting too deep for the recursion limit of this interpreter")
        finally:
            self._open.discard(id(value))
        return {tag: node} if tag else node

    def _other(self, value: Any) -> Json:
        codec = codec_for(type(value))
        if codec is not None:
            return {"$custom": [codec.name, self.encode(codec.encode(value))]}
        return self._leaf(value)

    def prefixes_hold(self) -> bool:
        """Whether each prefix stands for the tensors of its dict, and for no others."""
        keys = sorted(self.tensors)
        return all(
            not prefix or bisect_left(keys, prefix[:-1] + "/") - bisect_left(keys, prefix) == count
            for prefix, count in self._prefixes.items()
        ) and ("" not in self._prefixes or self._prefixes[""] == len(keys))

    def _list(self, items: Iterable[Any]) -> Json:
        if self._brief and type(items) is list and self._counts(items):
            return {"$count": [items[0], len(items)]}
        out: list[Json] = []
        for index, item in enumerate(items):
            if leaves.is_plain(item):
                out.append(item)
                continue
            self._path.append(("[]", index))
            out.append(self.encode(item))
            self._path.pop()
        return out

    def _counts(self, items: list[Any]) -> bool:
        """Whether these are consecutive integers, as the numbers of parameters in a group are, and many of them."""
        count = len(items)
        if count < WORTH_A_TAG or type(items[0]) is not int or items[0] < 0 or items[0] >= 1 << 62:
            return False
        if self._counted + count > MOST_COUNTED or items != list(range(items[0], items[0] + count)):
            return False
        if not all(type(item) is int for item in items):
            return False
        self._counted += count
        return True

    def _tensor_dict(self, value: dict[str, Any], prefix: str) -> Json | None:
        """One word for a dict of nothing but simple tensors, each under the key of its path; else ``None``.

        What it has added by then stays: the tensors are met again, and have their keys.
        """
        if not self._brief or len(value) < WORTH_A_TAG or self._hashable or prefix in self._prefixes:
            return None
        if not all(isinstance(item, torch.Tensor) and is_simple(item) for item in value.values()):
            return None
        if max(map(len, value)) > KEY_PART or any(
            self.add(prefix + key, item) != prefix + key for key, item in value.items()
        ):
            return None
        self._prefixes[prefix] = len(value)
        return {"$tensors": prefix}

    def _dict(self, value: dict[Any, Any]) -> Json:
        for key in value:
            if type(key) is not str or key.startswith("$") or not leaves.is_plain_str(key):
                return {"$dict": self._pairs(value)}
        out: dict[str, Json] = {}
        prefix = ".".join([*(_key_part(part) for _, part in self._path), ""])
        brief = self._tensor_dict(value, prefix)
        if brief is not None:
            return brief
        for key, item in value.items():
            if (
                isinstance(item, torch.Tensor) and not self._hashable and is_simple(item)
            ):  # the state of optimizers: nearly all there is
                out[key] = {"$tensor": self.add(prefix + key if len(key) <= 120 else _key_part(key), item)}
                continue
            if leaves.is_plain(item):
                out[key] = item
                continue
            self._path.append(("[]", key))
            out[key] = self.encode(item)
            self._path.pop()
        return out

    def _pairs(self, value: Mapping[Any, Any]) -> Json:
        out: list[Json] = []
        for key, item in value.items():
            self._path.append(("[]", key))
            out.append([key if leaves.is_plain(key) else self._member(key), self.encode(item)])
            self._path.pop()
        return out

    def _members(self, value: Iterable[Any]) -> Json:
        return [self._member(item) for item in value]

    def _member(self, key: Any) -> Json:
        """A dict key or set member: tensors and arrays, which hash by identity or not at all, have no place in it."""
        self._hashable += 1
        node = self.encode(key)
        self._hashable -= 1
        return node

    def _defaultdict(self, value: defaultdict[Any, Any]) -> Json:
        factory = value.default_factory
        if factory is not None and factory not in _FACTORY_NAMES:
            self._fail(f"a defaultdict with the factory {factory!r} (only builtins such as list or int can be stored)")
        return [None if factory is None else _FACTORY_NAMES[factory], self._pairs(value)]

    def _deque(self, value: deque[Any]) -> Json:
        return [value.maxlen, self._list(value)]

    def _slice(self, value: slice) -> Json:
        return self._list((value.start, value.stop, value.step))

    def _bytes(self, value: bytes | bytearray) -> Json:
        if len(value) <= INLINE_BYTES or self._hashable:
            return leaves.to_base64(bytes(value))
        return {"tensor": self._add(torch.frombuffer(bytearray(value), dtype=torch.uint8))}

    def _ndarray(self, value: np.ndarray[Any, Any]) -> Json:
        self._refuse_as_key(value)
        dtype = value.dtype
        if not is_storable(dtype):
            self._fail(f"a numpy array of dtype {dtype}", hint(value))
        fortran = value.flags.f_contiguous and not value.flags.c_contiguous
        stored = array_tensor(value.T if fortran else value)
        order = "F" if fortran else "C"
        shape: list[Json] = list(value.shape)
        return {"dtype": dtype.str, "shape": shape, "order": order, "tensor": self._add(stored)}

    def _leaf(self, value: Any) -> Json:
        kind = type(value)
        try:
            if kind in leaves.LEAF_ENCODERS:
                tag, payload = leaves.LEAF_ENCODERS[kind](value)
                return {tag: payload}
            if isinstance(value, np.generic):
                tag, payload = leaves.encode_numpy_scalar(value)
                return {tag: payload}
        except ValueError as error:
            self._fail(str(error), hint(value))
        if not isinstance(value, torch.Tensor):
            self._fail(_describe(value), hint(value))
        return self._any_tensor(value)

    def _any_tensor(self, value: torch.Tensor) -> Json:
        self._refuse_as_key(value)
        if is_lazy(value):
            self._fail("an uninitialized (lazy) parameter; run one forward pass first")
        node = self.tensor_node(value.detach())
        if isinstance(value, nn.Parameter):
            return {"$parameter": [node, value.requires_grad]}
        return {"$leaf": node} if value.requires_grad and value.is_leaf else node

    def tensor_node(self, value: torch.Tensor) -> Json:
        """A tensor without its autograd flags."""
        if is_sharded(value):
            return self._plain_tensor(value)
        if type(value) not in PLAIN_TYPES:
            return self._subclass(value)
        if value.device.type == "meta":
            self._fail("a tensor on the meta device, which has no data; materialize it first")
        if value.is_quantized:
            return self._quantized(value)
        if value.layout in tensors.LAYOUTS.values():
            return self._sparse(value)
        if value.layout is not torch.strided or value.is_nested:
            self._fail(f"a tensor of layout {value.layout}; convert it first, for example with to_dense()")
        return self._plain_tensor(value)

    def _plain_tensor(self, value: torch.Tensor) -> Json:
        self._refuse_as_key(value)
        if value.dtype not in tensors.STORABLE:
            raise UnsupportedStateError(f"{self._place()}: {tensors.unknown_dtype(value.dtype)}")
        if _NAMED and value.has_names():  # type: ignore[attr-defined]
            self._fail("a named tensor; drop the names with rename(None)")
        return {"$tensor": self._add(value)}

    def _sparse(self, value: torch.Tensor) -> Json:
        layout, parts, coalesced = tensors.sparse_parts(value)
        shape: list[Json] = list(value.shape)
        return {"$sparse": {"layout": layout, "shape": shape, "coalesced": coalesced, "parts": self._parts(parts)}}

    def _quantized(self, value: torch.Tensor) -> Json:
        try:
            scheme, parts = tensors.quantized_parts(value)
        except ValueError as error:
            self._fail(f"a tensor with {error}; store its int_repr() instead")
        encoded = {name: self.encode(item) for name, item in scheme.items()}
        return {"$quantized": {"scheme": encoded, "parts": self._parts(parts)}}

    def _parts(self, parts: Mapping[str, torch.Tensor]) -> Json:
        out: dict[str, Json] = {}
        for name, part in parts.items():
            self._path.append((".", name))
            out[name] = self._add(part.detach())
            self._path.pop()
        return out

    def _subclass(self, value: torch.Tensor) -> Json:
        if not hasattr(value, "__tensor_flatten__"):
            self._fail(f"a tensor of class {type(value).__qualname__} without __tensor_flatten__")
        names, context = value.__tensor_flatten__()
        inner: dict[str, Json] = {}
        for name in names:
            self._path.append((".", name))
            inner[name] = self.encode(getattr(value, name))
            self._path.pop()
        self._path.append((".", "__tensor_flatten__"))
        encoded = self.encode(context)
        self._path.pop()
        size: list[Json] = list(value.shape)
        stride: list[Json] = list(value.stride())
        fields: dict[str, Json] = {"class": tensors.class_label(value), "inner": inner, "ctx": encoded}
        return {"$subclass": {**fields, "size": size, "stride": stride}}

    def _refuse_as_key(self, value: Any) -> None:
        if self._hashable:
            self._fail(f"a {type(value).__name__} as a dict key or set member")

    def _add(self, tensor: torch.Tensor) -> str:
        return self.add(".".join([_key_part(part) for _, part in self._path]), tensor)

    def add(self, key: str, tensor: torch.Tensor) -> str:
        """Store a plain strided tensor, once however often its memory occurs; returns the key that it has.

        That is ``key``, ``key#2`` where ``key`` is taken, or the one that the same memory is already stored under.
        """
        # Most memory occurs once: comparing pointers first makes this several times faster.
        pointer = address(tensor)
        others = self._by_pointer.get(pointer, ())
        if others:
            same = tensors.memory_key(tensor)
            for other in others:
                if tensors.memory_key(self.tensors[other]) == same:
                    return other
        stored = self._unique(key or "value")
        self._by_pointer[pointer] = (*others, stored)
        self.tensors[stored] = tensor.detach() if tensor.requires_grad else tensor
        return stored

    def _unique(self, key: str) -> str:
        count, unique = 1, key
        while unique in self.tensors or unique in RESERVED_KEYS:
            count += 1
            unique = f"{key}#{count}"
        return unique

    def _fail(self, what: str, instead: str = REGISTER) -> NoReturn:
        raise UnsupportedStateError(f"{self._place()}: cannot store {what}; {instead}")

    def _place(self) -> str:
        return self.root + "".join(_show(kind, part) for kind, part in self._path)


def is_simple(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored as it is: nothing to take apart, to flag or to refuse."""
    if tensor.requires_grad or tensor.dtype not in tensors.STORABLE:
        return False
    if type(tensor) is not torch.Tensor and isinstance(tensor, nn.Parameter):  # which takes long to tell
        return False
    if not tensors.is_ordinary(tensor):
        return False
    return not (_NAMED and tensor.has_names())  # type: ignore[attr-defined]


def is_storable(dtype: np.dtype[Any]) -> bool:
    """Whether an array of this dtype is numbers, times, text or bytes, and not objects or structures."""
    return dtype.kind in "biufcmMSUV" and dtype.fields is None and dtype.itemsize > 0 and not dtype.subdtype


def array_tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """The array's memory as a tensor: of its own dtype where torch has it, else of its bytes. Row-major shape.

    A copy where torch cannot refer to the memory (read-only, negative strides).
    """
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy(order="C")
    if array.dtype.str not in TORCH_NUMPY:
        return torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    if any(stride % array.itemsize for stride in array.strides):
        array = array.copy(order="C")
    return torch.from_numpy(array)


def _key_part(part: Any) -> str:
    if type(part) is int and 0 <= part < 10**9:
        return str(part)
    text = part if isinstance(part, str) else show_part(part)
    return text if len(text) <= 120 and text.isascii() else text[:120].encode("utf-8", "replace").decode()


def _show(kind: str, part: Any) -> str:
    return f".{part}" if kind == "." else f"[{show_part(part)[:80]}]"


def show_part(part: Any) -> str:
    """``repr`` of a dict key or index, for messages and tensor keys."""
    try:
        return repr(part)
    except ValueError:  # an int with more digits than the interpreter converts
        return type(part).__name__


def _describe(value: Any) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, dt.tzinfo):
        return f"a time zone of type {name}"
    builtins = (bool, int, float, str, bytes, tuple, list, dict, set)
    bases = [base.__name__ for base in builtins if isinstance(value, base)]
    return f"a value of type {name}" + (f" (a subclass of {bases[0]}: only exact types are stored)" if bases else "")
