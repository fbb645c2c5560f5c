"""Tensors of which each rank holds a part: DTensors, as FSDP2 and tensor parallelism make them.

They are saved and restored as the boxes that the ranks hold. Everything else here sees them as tensors of their global
shape. The module that defines them takes long to import: while it is not imported, there are none.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from checkpointer.errors import UnsupportedStateError


def is_sharded(value: object) -> bool:
    """Whether ``value`` is a DTensor, a parameter or not."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(value, kind)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor in this process: its own, or that of this rank's part."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor
    part: torch.Tensor = sharded._local_tensor.detach()  # noqa: SLF001  to_local() builds a node of autograd
    return part


def local_box(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Offsets and lengths of this rank's part of a DTensor; ``None`` where it holds nothing.

    Raises:
        UnsupportedStateError: it is no box, or it waits for a reduction over the ranks.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = tensor
    mesh, placements = sharded.device_mesh, sharded.placements
    if any(placement.is_partial() for placement in placements):
        raise UnsupportedStateError(
            f"a DTensor with placements {placements} waits for a reduction: redistribute it first"
        )
    if mesh.get_coordinate() is None:
        return None
    lengths, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if tuple(lengths) != tuple(sharded._local_tensor.shape):  # noqa: SLF001
        raise UnsupportedStateError(f"the part of a DTensor with placements {placements} is no box of it")
    return None if 0 in lengths and 0 not in tensor.shape else (tuple(offsets), tuple(lengths))


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
