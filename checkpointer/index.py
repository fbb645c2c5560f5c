"""The index of a checkpoint: component trees, and where every tensor's bytes lie.

Pure data: no I/O and no torch. :func:`parse_index` accepts bytes from anywhere, hostile ones included, and
returns an index whose every promise (shapes, ranges, coverage) has been checked against the file sizes
that the manifest gives. See FORMAT.md, "index.json".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

Json: TypeAlias = "None | bool | int | float | str | list[Json] | dict[str, Json]"

#: Bytes of one element of each torch dtype, by the name that torch gives it after ``torch.``.
ITEM_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2"), 1),
    **dict.fromkeys((f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)), 1),
}


@dataclass(frozen=True)
class TensorSpec:
    """What a stored tensor is, without its bytes."""

    dtype: str
    """Name of the torch dtype without ``torch.``, for example ``"bfloat16"``."""
    shape: tuple[int, ...]
    """Global shape."""
    strides: tuple[int, ...] | None = None
    """Strides in elements where the tensor was dense but not row-major (``channels_last``); else ``None``."""
    device: str = "cpu"
    """Device that it was saved from, for example ``"cuda:0"``."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class Component:
    """One component's state: a tree with references to tensors, and the tensors it refers to."""

    kind: str
    """Which adapter captured it: ``module``, ``optimizer``, ``stateful``, ``container``, ``generator``, ``rng``."""
    tree: Json
    """Encoded Python state (see FORMAT.md, "Trees")."""
    tensors: Mapping[str, TensorSpec]
    """Tensors by the key that the tree and the safetensors file use."""
    meta: Mapping[str, Json] = field(default_factory=dict)
    """What the adapter needs beside the tree (parameter names, frozen flags, …)."""


Object: TypeAlias = dict[str, Any]
