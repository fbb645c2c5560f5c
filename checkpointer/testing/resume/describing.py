"""State in words that are equal for equal bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from checkpointer.state import Captured
from checkpointer.state.tensors import as_bytes, is_plain

Values: TypeAlias = dict[str, str]
"""What lies at a place, in words: plain values as they are, tensors by dtype, shape and hash."""

PLAIN = (bool, int, float, complex, str, bytes, type(None))


def values(captured: Captured) -> Values:
    found = {key: describe(tensor) for key, tensor in captured.tensors.items()}
    found |= dict(_tree_values(captured.tree))
    found |= {f"({key})": describe(captured.meta[key]) for key in ("frozen", "eval") if key in captured.meta}
    return found


def _tree_values(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Plain values of an encoded tree by path; a long list (the words of a generator) is one value."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            if key != "$tensor":
                yield from _tree_values(item, path if key.startswith("$") else f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list) and len(tree) < 100:
        for index, item in enumerate(tree):
            yield from _tree_values(item, f"{path}[{index}]")
    else:
        yield path, describe(tree)


def describe(value: Any) -> str:
    """Equal for equal bits."""
    if isinstance(value, torch.Tensor):
        if not is_plain(value):
            value = value.to_dense() if value.layout is not torch.strided else value
        digest = xxhash.xxh3_64_hexdigest(as_bytes(value.detach()).numpy().data)
        return f"{str(value.dtype)[6:]}{list(value.shape)} {digest}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {xxhash.xxh3_64_hexdigest(value.tobytes())}"
    if isinstance(value, (list, tuple)):
        return _shortened(f"[{', '.join(map(describe, value))}]")
    if isinstance(value, Mapping):
        return _shortened(f"{{{', '.join(f'{key}: {describe(item)}' for key, item in value.items())}}}")
    return _shortened(repr(value)) if isinstance(value, (*PLAIN, np.generic)) else type(value).__qualname__


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}… {xxhash.xxh3_64_hexdigest(text.encode())}"
