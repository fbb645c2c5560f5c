"""Strict comparison: ``assert_identical(a, b)`` for any state, live or restored.

Equal types, equal bits, equal order, equal strides. Nothing is "close". An error names the place that differs.
"""

from __future__ import annotations

import dataclasses
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from checkpointer.format.index import is_dense
from checkpointer.state.tensors import as_bytes, sparse_parts

_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


def assert_identical(a: Any, b: Any, where: str = "value") -> None:
    """Fail, naming the place, unless both values have the same types and the same bits throughout."""
    assert type(a) is type(b), f"{where}: {type(a)} is not {type(b)}"
    if isinstance(a, torch.Tensor):
        _tensors(a, b, where)
    elif isinstance(a, np.ndarray):
        _arrays(a, b, where)
    elif isinstance(a, np.generic):
        _scalars(a, b, where)
    elif isinstance(a, float):
        assert struct.pack(">d", a) == struct.pack(">d", b), f"{where}: {a!r} is not {b!r}"
    elif isinstance(a, complex):
        assert struct.pack(">2d", a.real, a.imag) == struct.pack(">2d", b.real, b.imag), f"{where}: {a!r} is not {b!r}"
    elif isinstance(a, _MAPPINGS):
        _mappings(a, b, where)
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b), f"{where}: length {len(a)} is not {len(b)}"
        assert getattr(a, "maxlen", None) == getattr(b, "maxlen", None), f"{where}: maxlen differs"
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_identical(left, right, f"{where}[{index}]")
    elif isinstance(a, (set, frozenset)):
        _sets(a, b, where)
    elif isinstance(a, slice):
        assert_identical((a.start, a.stop, a.step), (b.start, b.stop, b.step), where)
    elif dataclasses.is_dataclass(a):
        assert_identical(vars(a), vars(b), where)
    else:
        _others(a, b, where)


def _others(a: Any, b: Any, where: str) -> None:
    if isinstance(a, int):  # too many digits for a message, maybe
        assert a == b, f"{where}: numbers differ"
        return
    assert a == b, f"{where}: {a!r} is not {b!r}"
    assert repr(a) == repr(b), f"{where}: {a!r} is not {b!r}"
    assert getattr(a, "fold", 0) == getattr(b, "fold", 0), f"{where}: fold differs"
    assert_zone = (type(getattr(a, "tzinfo", None)), type(getattr(b, "tzinfo", None)))
    assert assert_zone[0] is assert_zone[1], f"{where}: time zones differ"


def _mappings(a: Mapping[Any, Any], b: Mapping[Any, Any], where: str) -> None:
    assert len(a) == len(b), f"{where}: {list(a)} is not {list(b)}"
    for key, other in zip(a, b, strict=True):
        assert_identical(key, other, f"{where}, key {key!r}")
        assert_identical(a[key], b[other], f"{where}[{key!r}]")
    if isinstance(a, defaultdict) and isinstance(b, defaultdict):
        assert a.default_factory is b.default_factory, f"{where}: default factories differ"


def _sets(a: Any, b: Any, where: str) -> None:
    assert len(a) == len(b), f"{where}: sizes differ"
    left, right = (sorted(map(_key, items)) for items in (a, b))
    assert left == right, f"{where}: {a} is not {b}"


def _key(value: Any) -> str:
    """Tells apart what ``==`` does not: 1 and True, 0.0 and -0.0, NaNs by their bits."""
    if isinstance(value, float):
        return f"float:{struct.pack('>d', value).hex()}"
    if isinstance(value, complex):
        return f"complex:{struct.pack('>2d', value.real, value.imag).hex()}"
    if isinstance(value, tuple):
        return f"tuple:({','.join(map(_key, value))})"
    if isinstance(value, frozenset):
        return f"frozenset:({','.join(sorted(map(_key, value)))})"
    return f"{type(value).__qualname__}:{value!r}"


def _tensors(a: torch.Tensor, b: torch.Tensor, where: str) -> None:
    for name in ("dtype", "shape", "layout", "requires_grad", "device"):
        left, right = getattr(a, name), getattr(b, name)
        assert left == right, f"{where}: {name} {left} is not {right}"
    a, b = a.detach(), b.detach()
    if hasattr(a, "__tensor_flatten__") and type(a) not in (torch.Tensor, torch.nn.Parameter):
        _subclasses(a, b, where)
    elif a.is_quantized:
        assert a.qscheme() == b.qscheme(), f"{where}: quantization schemes differ"
        assert_identical(a.int_repr(), b.int_repr(), where)
        assert torch.equal(a.dequantize(), b.dequantize()), f"{where}: scales differ"
    elif a.layout is not torch.strided:
        left_parts, right_parts = sparse_parts(a), sparse_parts(b)
        assert left_parts[2] == right_parts[2], f"{where}: coalesced differs"
        assert_identical(left_parts[1], right_parts[1], where)
    else:
        if is_dense(tuple(a.shape), tuple(a.stride())) and not a.is_conj() and a.numel() > 0:
            _strides(a, b, where)
        assert torch.equal(as_bytes(a), as_bytes(b)), f"{where}: values differ"


def _strides(a: torch.Tensor, b: torch.Tensor, where: str) -> None:
    left, right = ([s for s, n in zip(t.stride(), t.shape, strict=True) if n != 1] for t in (a, b))
    assert left == right, f"{where}: strides {left} are not {right}"


def _subclasses(a: Any, b: Any, where: str) -> None:
    (names, context), (other_names, other_context) = a.__tensor_flatten__(), b.__tensor_flatten__()
    assert_identical(list(names), list(other_names), where)
    assert_identical(context, other_context, f"{where}.__tensor_flatten__")
    for name in names:
        assert_identical(getattr(a, name), getattr(b, name), f"{where}.{name}")


def _arrays(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], where: str) -> None:
    assert a.dtype.str == b.dtype.str, f"{where}: dtype {a.dtype} is not {b.dtype}"
    assert a.shape == b.shape, f"{where}: shape {a.shape} is not {b.shape}"
    fortran = [x.flags.f_contiguous and not x.flags.c_contiguous for x in (a, b)]
    assert fortran[0] == fortran[1], f"{where}: order differs"
    assert a.tobytes() == b.tobytes(), f"{where}: values differ"


def _scalars(a: np.generic, b: np.generic, where: str) -> None:
    assert a.dtype.str == b.dtype.str, f"{where}: dtype {a.dtype} is not {b.dtype}"
    assert a.tobytes() == b.tobytes(), f"{where}: {a!r} is not {b!r}"
