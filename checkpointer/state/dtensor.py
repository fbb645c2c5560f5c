"""Tensors of which each rank holds a part: DTensors, as FSDP2 and tensor parallelism make them.

They are saved and restored as the boxes that the ranks hold. Everything else here sees them as tensors of their global
shape. The module that defines them takes long to import: while it is not imported, there are none.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from checkpointer.errors import UnsupportedStateError

PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
"""Just these, no class derived from them."""


def is_sharded(value: object) -> bool:
    """Whether ``value`` is a DTensor, a parameter or not."""
    if type(value) in PLAIN_TYPES:  # asked for every tensor of every save
        return False
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor in this process: its own, or that of this rank's part."""
    return _local(tensor).detach()


def address(tensor: torch.Tensor) -> int:
    """A number that differs for tensors in different memory: the address, where there are elements in this process."""
    memory = tensor if type(tensor) in PLAIN_TYPES else _local(tensor)
    return memory.data_ptr() or memory.untyped_storage()._cdata  # noqa: SLF001


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part: torch.Tensor = sharded._local_tensor  # noqa: SLF001  to_local() builds a node of autograd
    return part


def local_box(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and lengths of this rank's part of a DTensor; ``None`` where it holds nothing.

    Raises:
        UnsupportedStateError: it is no box, or it waits for a reduction over the ranks.
    """
    sharded: Any = tensor
    placements = sharded.placements
    found = _box(tuple(tensor.shape), sharded.device_mesh, placements)
    if found is not None and found[1] != tuple(_local(tensor).shape):
        raise UnsupportedStateError(f"the part of a DTensor with placements {placements} is no box of it")
    return None if found is None or (0 in found[1] and 0 not in tensor.shape) else found


@functools.lru_cache(maxsize=1 << 14)  # a model has few different ones, and torch takes long to tell
def _box(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and lengths of this rank's part of any DTensor that is so laid out; lengths may be 0."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in placements):
        raise UnsupportedStateError(
            f"a DTensor with placements {placements} waits for a reduction: redistribute it first"
        )
    if mesh.get_coordinate() is None:
        return None
    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(offsets), tuple(lengths)


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new DTensor, not filled, that is laid out over the ranks as ``tensor`` is."""
    from torch.distributed.tensor import DTensor

    sharded: Any = tensor
    part = torch.empty_like(local_part(tensor), dtype=dtype)
    mesh, placements = sharded.device_mesh, sharded.placements
    made: torch.Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made


def sharding_hook(hook: object) -> bool:
    """Whether a state-dict hook is FSDP2's, which brings parameters into their sharded form and does nothing else."""
    inner: Any = getattr(hook, "hook", hook)
    return str(getattr(inner, "__module__", "")).startswith("torch.distributed.fsdp._fully_shard.")
