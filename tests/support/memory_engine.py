"""A checkpoint in memory: what the real engine does with captured tensors and restore plans, without files.

``save`` and ``restore`` for an adapter, ``carry`` from one object to another, ``roundtrip`` for any value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from checkpointer.format.index import Component, TensorSpec
from checkpointer.state import Adapter, ComponentReport, RestoreOptions, SavedState, adapter_for
from checkpointer.state.tensors import DTYPES, as_bytes, contiguous_strides, empty_for, spec_of
from checkpointer.state.tree.decode import decode
from checkpointer.state.tree.encode import encode

Saved = tuple[SavedState, dict[str, bytes]]


def _json(tree: Any) -> Any:
    return json.loads(json.dumps(tree, allow_nan=False))


def to_bytes(tensor: torch.Tensor, spec: TensorSpec) -> bytes:
    """The elements in memory order for dense tensors, else row-major."""
    if spec.strides is not None:
        order = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
        tensor = tensor.permute(order)
    return as_bytes(tensor).numpy().tobytes()


def fill(target: torch.Tensor, data: bytes, spec: TensorSpec) -> None:
    """Write the saved bytes into a tensor of the saved dtype and shape, whatever its strides."""
    assert (target.dtype, tuple(target.shape)) == (DTYPES[spec.dtype], spec.shape)
    if target.numel() == 0:
        return
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(target.dtype)
    source = flat.as_strided(spec.shape, spec.strides or contiguous_strides(spec.shape))
    with torch.no_grad():
        carrier = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
        kind = carrier[target.element_size()]
        target.detach().view(kind).copy_(source.view(kind))


def save(adapter: Adapter, name: str = "component") -> Saved:
    """Capture, and copy everything out."""
    captured = adapter.capture()
    specs = {key: spec_of(tensor) for key, tensor in captured.tensors.items()}
    component = Component(captured.kind, _json(captured.tree), specs, _json(captured.meta))
    return SavedState(name, component), {key: to_bytes(t, specs[key]) for key, t in captured.tensors.items()}


def restore(adapter: Adapter, saved: Saved, **options: Any) -> ComponentReport:
    """Prepare, read and apply."""
    state, data = saved
    plan = adapter.prepare(state, RestoreOptions(**options))
    for key, target in plan.reads.items():
        fill(target, data[key], state.component.tensors[key])
    plan.apply()
    return plan.report


def carry(source: Any, target: Any, modules: Any = None, **options: Any) -> ComponentReport:
    """Save one live object and restore it into another. ``modules``: the pair of mappings for optimizers."""
    before, after = modules or ({}, {})
    saved = save(adapter_for("it", source, before), "it")
    return restore(adapter_for("it", target, after), saved, **options)


def roundtrip(value: Any, live: Any = None) -> Any:
    """Encode, copy through bytes, decode."""
    tree, tensors = encode(value)
    copies = {}
    for key, tensor in tensors.items():
        spec = spec_of(tensor)
        copies[key] = empty_for(spec)
        fill(copies[key], to_bytes(tensor, spec), spec)
    return decode(_json(tree), copies, live)


def snapshot(module: nn.Module) -> Mapping[str, torch.Tensor]:
    """A copy of a module's state."""
    return {key: value.detach().clone() for key, value in module.state_dict().items()}
