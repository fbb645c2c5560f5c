"""Comparison of nested state, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Comparison(NamedTuple):
    values: int
    """How many numbers, texts and flags were compared."""
    differing: list[str]
    """Paths at which the two disagree, or that only one of them has."""


def compare(first: object, second: object) -> Comparison:
    a, b = dict(_leaves(first)), dict(_leaves(second))
    values = sum(count for _, count in a.values())
    return Comparison(values, [path for path in {**a, **b} if a.get(path) != b.get(path)])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, tuple[str | bytes, int]]]:
    """Every leaf: its path, its exact bits, and how many values it holds."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield path, (f"{value.dtype} {tuple(value.shape)} ".encode() + bits, value.numel())
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from _leaves(item, f"{path}[{position}]")
    else:
        exact = value.hex() if isinstance(value, float) else repr(value)
        yield path, (f"{type(value).__name__} {exact}", 1)
