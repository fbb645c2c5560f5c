"""The inverse of :mod:`checkpointer.state.tree.encode`, for trees from anywhere.

A tree is data: no name in it is imported, evaluated or unpickled. Whatever is not well formed is a
:class:`CorruptCheckpointError` with the place in the tree; time and memory are linear in the tree and its tensors.

Decoding runs twice in a restore: once over the specs alone, where every tensor is a :class:`Leaf`, to check the tree
and to find the tensors' places; then over the tensors that were read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from checkpointer.errors import CheckpointerError, CorruptCheckpointError, IncompatibleStateError
from checkpointer.format.index import Json, TensorSpec
from checkpointer.format.trees import MOST_COUNTED
from checkpointer.state import tensors as tensor_data
from checkpointer.state.tree.codecs import codec_named, tensor_class
from checkpointer.state.tree.encode import FACTORIES, MAX_DEPTH, TORCH_NUMPY, show_part
from checkpointer.state.tree.leaves import (
    LEAF_DECODERS,
    decode_float,
    decode_int,
    expect,
    expect_dict,
    expect_list,
    from_base64,
    numpy_dtype,
)

_BAD_TREE = (ValueError, TypeError, KeyError, OverflowError, RuntimeError, AttributeError, IndexError, RecursionError)


@dataclass(eq=False, slots=True)
class Leaf:
    """Stands for a tensor, or something made of tensors, while only specs are known. Compared by identity."""

    kind: str
    """``tensor``, ``parameter``, ``leaf``, ``array``, or ``other`` for what cannot be read in place."""
    key: str = ""
    spec: TensorSpec | None = None
    order: str = "C"
    dtype: str = ""
    shape: tuple[int, ...] = ()
    requires_grad: bool = False


def decode(
    tree: Json,
    tensors: Mapping[str, torch.Tensor],
    live: Any = None,
    *,
    place: str = "state",
    specs: Mapping[str, TensorSpec] | None = None,
) -> Any:
    """The value of a tree. ``live`` supplies the classes of tensor subclasses at the same paths; it is not changed.

    ``specs``: those of the tensors, where they are known. The result shares memory with ``tensors``.
    Raises :class:`CorruptCheckpointError`, and :class:`IncompatibleStateError` for classes that are not known here.
    """
    known = {key: tensor_data.spec_of(item) for key, item in tensors.items()} if specs is None else specs
    return Decoder(known, tensors, place=place).run(tree, live)


def skeleton(tree: Json, specs: Mapping[str, TensorSpec], live: Any = None, *, place: str) -> tuple[Any, set[str]]:
    """The value of a tree with a :class:`Leaf` for every tensor, and the keys it refers to.

    Raises as :func:`decode`.
    """
    decoder = Decoder(specs, None, place=place)
    value = decoder.run(tree, live)
    return value, decoder.used


class Decoder:
    """Decodes trees over one set of tensors."""

    def __init__(
        self, specs: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor] | None, *, place: str
    ) -> None:
        self.used: set[str] = set()
        self._specs = specs
        self._tensors = tensors
        self._place = place
        self._path: list[Any] = []
        self._depth = 0
        self._copied: set[str] = set()
        self._spread: set[str] = set()
        """Tensors that lie in a dict of which the tree names only the prefix."""
        self._counted = 0
        self._made: dict[tuple[Any, ...], Any] = {}
        self._plain_tags: Mapping[str, Callable[[Json], Any]] = {
            **LEAF_DECODERS,
            "$set": lambda node: self._set(node, set),
            "$frozenset": lambda node: self._set(node, frozenset),
            "$slice": lambda node: slice(*self._items(expect_list(node, 3), None)),
            "$bytes": self._bytes,
            "$bytearray": lambda node: bytearray(self._bytes(node)),
            "$custom": self._custom,
            "$tensor": lambda node: self._tensor(self._key(node)),
            "$tensors": self._tensor_dict,
            "$slots": self._slot_dicts,
            "$count": self._count,
            "$ndarray": self._ndarray,
            "$sparse": self._sparse,
            "$quantized": self._quantized,
        }
        # Those in which a tensor subclass may lie, whose class the live value at the same path supplies.
        self._live_tags: Mapping[str, Callable[[Json, Any], Any]] = {
            "$tuple": self._tuple,
            "$dict": self._dict,
            "$odict": lambda node, live: self._pairs(node, OrderedDict(), live),
            "$counter": lambda node, live: self._pairs(node, Counter(), live),
            "$defaultdict": self._defaultdict,
            "$deque": self._deque,
            "$parameter": self._parameter,
            "$leaf": self._grad_leaf,
            "$subclass": self._subclass,
        }

        self._tags = {*self._plain_tags, *self._live_tags}

    def run(self, tree: Json, live: Any = None) -> Any:
        """Decode one tree, turning whatever goes wrong into a typed error."""
        try:
            return self._decode(tree, live)
        except CheckpointerError:
            raise
        except _BAD_TREE as error:
            self._fail(str(error).partition("\n")[0], error)

    def _decode(self, node: Json, live: Any) -> Any:
        kind = type(node)
        if node is None or kind is bool or kind is str:
            return node
        if kind is int:
            return decode_int(node)
        if kind is float:
            return decode_float(node)
        self._depth += 1
        if self._depth > 2 * MAX_DEPTH:
            self._fail("nesting too deep")
        if kind is list:
            value: Any = self._items(expect_list(node), live)
        else:
            tag, payload = _tag(expect(node, dict))
            plain = self._plain_tags.get(tag)
            if plain is not None:
                value = plain(payload)
            elif tag in self._live_tags:
                value = self._live_tags[tag](payload, live)
            else:
                value = self._object(node, live)
        self._depth -= 1
        return value

    def _tuple(self, node: Json, live: Any) -> tuple[Any, ...]:
        return tuple(self._items(expect_list(node), live))

    def _dict(self, node: Json, live: Any) -> dict[Any, Any]:
        return self._pairs(node, {}, live)

    def _object(self, node: Json, live: Any) -> Any:
        entries: dict[str, Json] = expect(node, dict)
        known = live if isinstance(live, dict) else {}
        out: dict[str, Any] = {}
        for key, item in entries.items():
            if type(key) is not str or key.startswith("$"):
                problem = "a tag beside other keys" if key in self._tags else "unknown tag"
                self._fail(f"{problem}: {str(key)[:40]!r}")
            self._path.append(key)
            out[key] = self._decode(item, known.get(key))
            self._path.pop()
        return out

    def _items(self, node: list[Json], live: Any) -> list[Any]:
        known = live if isinstance(live, (list, tuple)) else ()
        out: list[Any] = []
        for index, item in enumerate(node):
            self._path.append(index)
            out.append(self._decode(item, known[index] if index < len(known) else None))
            self._path.pop()
        return out

    def _set(self, node: Json, cls: type) -> Any:
        items = [self._hashable(item) for item in expect_list(node)]
        made = cls(items)
        if len(made) != len(items):
            self._fail("a set with equal members")
        return made

    def _pairs(self, node: Json, out: dict[Any, Any], live: Any) -> dict[Any, Any]:
        pairs = expect_list(node)
        known = live if isinstance(live, dict) else {}
        for pair in pairs:
            key_node, item = expect_list(pair, 2)
            key = self._hashable(key_node)
            self._path.append(key)
            out[key] = self._decode(item, dict.get(known, key))
            self._path.pop()
        if len(out) != len(pairs):
            self._fail("a dict with equal keys")
        return out

    def _hashable(self, node: Json) -> Any:
        value = self._decode(node, None)
        if isinstance(value, (torch.Tensor, Leaf)) and not (isinstance(value, Leaf) and value.kind == "custom"):
            self._fail("a tensor as a dict key or set member")
        hash(value)
        return value

    def _defaultdict(self, node: Json, live: Any) -> Any:
        name, pairs = expect_list(node, 2)
        if name is not None and (type(name) is not str or name not in FACTORIES):
            self._fail("unknown default factory")
        factory = None if name is None else FACTORIES[str(name)]
        return self._pairs(pairs, defaultdict(factory), live)

    def _deque(self, node: Json, live: Any) -> deque[Any]:
        maxlen, items = expect_list(node, 2)
        limit = None if maxlen is None else decode_int(maxlen)
        entries = self._items(expect_list(items), list(live) if isinstance(live, deque) else None)
        if limit is not None and not len(entries) <= limit:
            self._fail("a deque longer than its limit")
        return deque(entries, limit)

    def _bytes(self, node: Json) -> bytes:
        if type(node) is str:
            return from_base64(node)
        key = self._key(expect_dict(node, ("tensor",))["tensor"], dtype="uint8", copies=True)
        return b"" if self._tensors is None else self._tensors[key].cpu().contiguous().numpy().tobytes()

    def _custom(self, node: Json) -> Any:
        name, payload = expect_list(node, 2)
        codec = codec_named(expect(name, str))
        if codec is None:
            raise IncompatibleStateError(
                f"{self._where()}: saved as {name!r}, which is not registered here; "
                f"call checkpointer.register_codec({name!r}, …) before restoring"
            )
        value = self._decode(payload, None)
        if self._tensors is None:
            return Leaf("custom")
        try:
            return codec.decode(value)
        except CheckpointerError:
            raise
        except Exception as error:
            raise CorruptCheckpointError(f"{self._where()}: {name!r} cannot be decoded: {error!r}") from error

    # Tensors

    def _key(self, node: Json, *, dtype: str | None = None, copies: bool = False) -> str:
        """A reference. ``copies``: decoding copies the tensor, so one reference must be the only such one."""
        key: str = expect(node, str)
        if key not in self._specs:
            self._fail(f"no tensor {key[:80]!r}")
        if dtype is not None and self._specs[key].dtype != dtype:
            self._fail(f"tensor {key[:80]!r} is {self._specs[key].dtype}, expected {dtype}")
        if copies and key in self._copied:
            self._fail(f"tensor {key[:80]!r} is used twice")
        if copies:
            self._copied.add(key)
        self.used.add(key)
        return key

    def _once(self, name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """One object for each name, so that what was one object is one again."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _tensor(self, key: str) -> Any:
        if self._tensors is None:
            return self._once(("tensor", key), lambda: Leaf("tensor", key, self._specs[key]))
        return self._tensors[key]

    def _below(self, node: Json) -> Iterator[tuple[str, str]]:
        """Every tensor whose key begins with a prefix, in the order of the table: its key, and the rest of that."""
        prefix: str = expect(node, str)
        if prefix and not prefix.endswith("."):
            self._fail(f"the prefix {prefix[:80]!r} of a dict of tensors does not end in a dot")
        rows = self._sorted[bisect_left(self._sorted, (prefix, -1)) : bisect_left(self._sorted, _behind(prefix))]
        if not rows:
            self._fail(f"no tensor begins with {prefix[:80]!r}")
        for key, _ in sorted(rows, key=lambda row: row[1]):
            if key in self._spread:
                self._fail(f"tensor {key[:80]!r} is in two dicts of tensors")
            self._spread.add(key)
            self.used.add(key)
            yield key, key[len(prefix) :]

    @cached_property
    def _sorted(self) -> list[tuple[str, int]]:
        """The key of each tensor with its row, by key."""
        return sorted((key, row) for row, key in enumerate(self._specs))

    def _tensor_dict(self, node: Json) -> dict[str, Any]:
        return {name: self._tensor(key) for key, name in self._below(node)}

    def _slot_dicts(self, node: Json) -> dict[int, dict[str, Any]]:
        out: dict[str, dict[str, Any]] = {}
        for key, rest in self._below(node):
            number, dot, slot = rest.partition(".")
            if not dot:
                self._fail(f"tensor {key[:80]!r} is no slot of a parameter")
            slots = out.get(number)
            if slots is None:
                if not number.isascii() or not number.isdecimal() or (number[0] == "0" and number != "0"):
                    self._fail(f"tensor {key[:80]!r} is no slot of a parameter with a number")
                slots = out[number] = {}
            slots[slot] = self._tensor(key)
        return {int(number): slots for number, slots in out.items()}

    def _count(self, node: Json) -> list[int]:
        start, count = (decode_int(item) for item in expect_list(node, 2))
        self._counted += count
        if start < 0 or count < 0 or self._counted > MOST_COUNTED:
            self._fail(f"{count} integers from {start} on, at most {MOST_COUNTED} may be counted in one tree")
        return list(range(start, start + count))

    def _parameter(self, node: Json, live: Any) -> Any:
        inner, requires_grad = expect_list(node, 2)
        flag = expect(requires_grad, bool)
        value = self._wrapped(inner, live)
        if isinstance(value, Leaf):
            leaf = value
            return self._once(
                ("parameter", id(leaf), flag), lambda: _wrapped_leaf("parameter", leaf, requires_grad=flag)
            )
        self._check_grad(value, requires_grad=flag)
        return self._once(("parameter", id(value), flag), lambda: nn.Parameter(value, requires_grad=flag))

    def _grad_leaf(self, node: Json, live: Any) -> Any:
        value = self._wrapped(node, live)
        if isinstance(value, Leaf):
            return self._once(("leaf", id(value)), lambda: _wrapped_leaf("leaf", value, requires_grad=True))
        self._check_grad(value, requires_grad=True)
        return self._once(("leaf", id(value)), lambda: value.detach().requires_grad_(True))

    def _wrapped(self, node: Json, live: Any) -> Any:
        value = self._decode(node, live)
        if not isinstance(value, (torch.Tensor, Leaf)) or (isinstance(value, Leaf) and value.kind == "array"):
            self._fail("a parameter that is not a tensor")
        self._made.setdefault(("keep", id(value)), value)
        return value

    def _check_grad(self, value: torch.Tensor, *, requires_grad: bool) -> None:
        if requires_grad and not (value.is_floating_point() or value.is_complex()):
            self._fail(f"requires_grad of a tensor of {value.dtype}")

    def _ndarray(self, node: Json) -> Any:
        fields = expect_dict(node, ("dtype", "shape", "order", "tensor"))
        dtype, order = numpy_dtype(fields["dtype"]), fields["order"]
        shape = tuple(expect(size, int) for size in expect_list(fields["shape"]))
        key = self._key(fields["tensor"])
        if order not in ("C", "F"):
            self._fail("unknown order")
        self._check_array(dtype, shape if order == "C" else shape[::-1], self._specs[key])
        name = ("array", key, dtype.str, shape, order)
        if self._tensors is None:
            spec = self._specs[key]
            return self._once(name, lambda: Leaf("array", key, spec, str(order), dtype.str, shape))
        tensor = self._tensors[key]
        return self._once(name, lambda: _array(tensor, dtype, shape, str(order)))

    def _check_array(self, dtype: np.dtype[Any], stored: tuple[int, ...], spec: TensorSpec) -> None:
        """``stored``: the shape in memory order."""
        if any(size < 0 for size in stored) or len(stored) > 64:
            self._fail("not the shape of an array")
        if dtype.str in TORCH_NUMPY:
            if spec.shape != stored or np.dtype(spec.dtype) != dtype:
                self._fail(f"array of {dtype} {list(stored)} refers to a tensor of {spec.dtype} {list(spec.shape)}")
            return
        if spec.dtype != "uint8" or len(spec.shape) != 1 or spec.nbytes != dtype.itemsize * _numel(stored):
            self._fail("array and its bytes differ in size")

    def _sparse(self, node: Json) -> Any:
        fields = expect_dict(node, ("layout", "shape", "coalesced", "parts"))
        layout, coalesced = fields["layout"], expect(fields["coalesced"], bool)
        if type(layout) is not str or layout not in tensor_data.LAYOUTS:
            self._fail("unknown sparse layout")
        shape = [expect(size, int) for size in expect_list(fields["shape"])]
        if any(not 0 <= size < 2**63 for size in shape):
            self._fail("not a shape")
        parts = expect_dict(fields["parts"], tensor_data.sparse_part_names(str(layout)))
        keys = {name: self._key(key) for name, key in parts.items()}
        name = str(layout)
        return self._assemble(keys, lambda found: tensor_data.build_sparse(name, found, shape, coalesced=coalesced))

    def _quantized(self, node: Json) -> Any:
        fields = expect_dict(node, ("scheme", "parts"))
        scheme = dict(expect(fields["scheme"], dict))
        if scheme.get("dtype") not in tensor_data.QUANTIZED_VALUES:
            self._fail("unknown quantized dtype")
        per_channel = "axis" in scheme
        expect_dict(scheme, ("dtype", "axis") if per_channel else ("dtype", "scale", "zero_point"))
        if per_channel:
            scheme["axis"] = decode_int(scheme["axis"])
        else:
            scheme["scale"], scheme["zero_point"] = decode_float(scheme["scale"]), decode_int(scheme["zero_point"])
        names = ("values", "scales", "zero_points") if per_channel else ("values",)
        parts = expect_dict(fields["parts"], names)
        dtype = tensor_data.QUANTIZED_VALUES[str(scheme["dtype"])]
        keys = {name: self._key(parts[name]) for name in names}
        self._key(parts["values"], dtype=dtype, copies=True)
        return self._assemble(keys, lambda found: tensor_data.build_quantized(scheme, found))

    def _assemble(self, keys: Mapping[str, str], build: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]) -> Any:
        tensors = self._tensors
        if tensors is None:
            return Leaf("other")
        return build({name: tensors[key] for name, key in keys.items()})

    def _subclass(self, node: Json, live: Any) -> Any:
        fields = expect_dict(node, ("class", "inner", "ctx", "size", "stride"))
        cls = self._subclass_of(expect(fields["class"], str), live)
        inner: dict[str, Any] = {}
        for name, part in expect(fields["inner"], dict).items():
            inner[name] = self._wrapped(part, getattr(live, name, None) if type(live) is cls else None)
        context = self._decode(fields["ctx"], None)
        size, stride = (tuple(decode_int(part) for part in expect_list(fields[name])) for name in ("size", "stride"))
        if self._tensors is None:
            return Leaf("other")
        unflatten: Any = cls.__tensor_unflatten__  # type: ignore[attr-defined]
        return unflatten(inner, context, torch.Size(size), stride)

    def _subclass_of(self, label: str, live: Any) -> type[torch.Tensor]:
        known = tensor_class(label)
        if known is not None:
            return known
        if isinstance(live, torch.Tensor) and tensor_data.class_label(live) == label:
            return type(live)
        raise IncompatibleStateError(
            f"{self._where()}: saved as a tensor of class {label}, and the live object has none there; "
            f"build it as it was, or call checkpointer.register_codec(name, cls) with that class"
        )

    def _where(self) -> str:
        return self._place + "".join(f"[{show_part(part)[:80]}]" for part in self._path)

    def _fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise CorruptCheckpointError(f"the tree of {self._where()[:400]} is not well formed: {what}") from cause


def _wrapped_leaf(kind: str, inner: Leaf, *, requires_grad: bool) -> Leaf:
    """A leaf for a parameter (or a tensor that requires grad) over what ``inner`` stands for."""
    kind = kind if inner.kind == "tensor" else "other"
    return Leaf(kind, inner.key, inner.spec, requires_grad=requires_grad)


def _behind(prefix: str) -> tuple[str, int]:
    """What sorts behind all keys that begin with ``prefix``, which ends in a dot unless it is empty."""
    return (prefix[:-1] + chr(ord(prefix[-1]) + 1), -1) if prefix else (chr(0x10FFFF) * 2, 0)


def _tag(node: dict[str, Json]) -> tuple[str, Json]:
    """Tag and payload of a node with one key; ``("", None)`` for others."""
    if len(node) != 1:
        return "", None
    ((tag, payload),) = node.items()
    return tag, payload


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _array(tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> np.ndarray[Any, Any]:
    """The array over the memory of a CPU tensor."""
    data = tensor.cpu().contiguous().numpy()
    stored = shape if order == "C" else shape[::-1]
    if dtype.str not in TORCH_NUMPY:
        data = data.view(dtype).reshape(stored) if data.size else np.empty(stored, dtype)
    return data if order == "C" else data.T
