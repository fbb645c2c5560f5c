"""Which bytes of a tensor hold a NaN or an infinity."""

from __future__ import annotations

import math

import pytest
import torch

from checkpointer.staging.finite import all_finite
from checkpointer.state.tensors import host_bytes

FLOATS = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def looks_finite(tensor: torch.Tensor) -> bool:
    return all_finite(str(tensor.dtype)[6:], host_bytes(tensor))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("place", [0, 70_000, 1_999_999])
def test_one_nan_among_millions_of_values_is_seen(dtype: torch.dtype, place: int) -> None:
    values = torch.randn(2_000_000)
    assert looks_finite(values.to(dtype))
    values[place] = math.nan
    assert not looks_finite(values.to(dtype))


@pytest.mark.parametrize("dtype", [item for item in FLOATS if not str(item).endswith(("fn", "fnuz"))], ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinity_of_either_sign_is_seen(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(10).to(dtype)
    tensor[3] = value
    assert not looks_finite(tensor)


@pytest.mark.parametrize("dtype", [item for item in FLOATS if not item.is_complex], ids=str)
def test_the_largest_numbers_and_those_below_normal_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = [limits.max, limits.min, limits.smallest_normal, 0.0, -0.0]
    assert looks_finite(torch.tensor(values, dtype=torch.float64).to(dtype))


def test_what_is_no_float_is_finite() -> None:
    assert looks_finite(torch.full((100,), 0x7F800000, dtype=torch.int32))
    assert looks_finite(torch.ones(3, dtype=torch.bool))
