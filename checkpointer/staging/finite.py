"""Noticing NaN and infinities in the bytes of tensors on their way to the disk: a run that diverged has to be told.

In IEEE formats they are the numbers whose exponent has all its bits set. Read as integers, signed and unsigned, the
positive ones are the largest signed values and the negative ones the largest unsigned values: two maxima, which numpy
takes without a copy and without the GIL, tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_IEEE: Mapping[str, tuple[int, int]] = {
    "float16": (2, 0x7C00),
    "bfloat16": (2, 0x7F80),
    "float32": (4, 0x7F80_0000),
    "float64": (8, 0x7FF0_0000_0000_0000),
    "complex32": (2, 0x7C00),
    "complex64": (4, 0x7F80_0000),
    "complex128": (8, 0x7FF0_0000_0000_0000),
    "float8_e5m2": (1, 0x7C),
    "float8_e4m3fn": (1, 0x7F),  # no infinities; all bits but the sign set: NaN
}
"""Bytes of a number, and positive infinity: the smallest bits that are not finite."""

_NAN = {"float8_e4m3fnuz": 0x80, "float8_e5m2fnuz": 0x80, "float8_e8m0fnu": 0xFF}
"""Formats of one byte with one NaN and no infinities."""


def all_finite(dtype: str, block: memoryview) -> bool:
    """Whether ``block``, whole elements of ``dtype``, holds no NaN and no infinity. True for what is no float."""
    if not len(block):
        return True
    if dtype in _IEEE:
        size, infinity = _IEEE[dtype]
        sign = 1 << (8 * size - 1)
        signed, unsigned = np.frombuffer(block, dtype=f"i{size}"), np.frombuffer(block, dtype=f"u{size}")
        return int(signed.max()) < infinity and int(unsigned.max()) < sign + infinity
    return dtype not in _NAN or not (np.frombuffer(block, dtype=np.uint8) == _NAN[dtype]).any()
