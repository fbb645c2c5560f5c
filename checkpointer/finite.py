"""Noticing NaN and infinities in the bytes of tensors on their way to the disk: a run that diverged has to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

BLOCK = 1 << 20
"""Bytes looked at at a time: what was just hashed is still in the processor's cache."""

_FLOATS: Mapping[str, type[Any]] = {
    "float16": np.float16, "float32": np.float32, "float64": np.float64, "complex64": np.float32,
    "complex128": np.float64,
}  # fmt: skip

_EXPONENTS: Mapping[str, tuple[type[Any], int]] = {"bfloat16": (np.uint16, 0x7F80), "float8_e5m2": (np.uint8, 0x7C)}
"""Formats that numpy does not know: NaN and infinities have all bits of the exponent set, and nothing else has."""

_NAN = {
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e5m2fnuz": (0x80,),
    "float8_e8m0fnu": (0xFF,),
}
"""Formats without infinities: the bytes that mean NaN."""


def all_finite(dtype: str, block: memoryview) -> bool:
    """Whether ``block``, whole elements of ``dtype``, holds no NaN and no infinity. True for what is no float."""
    return all(_all_finite(dtype, block[start : start + BLOCK]) for start in range(0, len(block), BLOCK))


def _all_finite(dtype: str, block: memoryview) -> bool:
    if dtype in _FLOATS:
        return bool(np.isfinite(np.frombuffer(block, dtype=_FLOATS[dtype])).all())
    if dtype in _EXPONENTS:
        unit, mask = _EXPONENTS[dtype]
        values = np.frombuffer(block, dtype=unit)
        return bool(((values & unit(mask)) != mask).all())
    values = np.frombuffer(block, dtype=np.uint8)
    return not any(bool((values == nan).any()) for nan in _NAN.get(dtype, ()))
