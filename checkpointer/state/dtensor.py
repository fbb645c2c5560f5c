"""Tensors of which each rank holds a part: DTensors, as FSDP2 and tensor parallelism make them.

They are saved and restored as the boxes that the ranks hold. Everything else here sees them as tensors of their global
shape. The module that defines them takes long to import: while it is not imported, there are none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash

from checkpointer.errors import UnsupportedStateError
from checkpointer.format.boxes import Box
from checkpointer.format.layouts import MAX_CUTS, Cut, Form

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
    """The memory of a tensor in this process: its own, or that of this rank's part. Requires no gradients."""
    part = _local(tensor)
    return part if type(part) is torch.Tensor and not part.requires_grad else part.detach()


def address(tensor: torch.Tensor) -> int:
    """A number that differs for tensors in different memory: the address, where there are elements in this process."""
    memory = tensor if type(tensor) in PLAIN_TYPES else _local(tensor)
    return memory.data_ptr() or memory.untyped_storage()._cdata  # noqa: SLF001


def own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """As :func:`local_part`, to be looked at and not to be written to: it may require gradients."""
    return _local(tensor)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    if type(tensor) in PLAIN_TYPES or not is_sharded(tensor):
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


# ------------------------------------------------------------------------------------ as a layout


class Sharding(NamedTuple):
    """How DTensors of one mesh and one list of placements lie over ranks, as this rank sees it."""

    form: Form
    """Cuts are in the order of tensor dimensions; one into a single piece is left out."""
    mesh: int
    """A hash of the mesh, of its sizes and its ranks: the same on all of them."""
    cell: int | None
    """This rank's cell of the mesh, in row-major order; ``None``: it is outside."""

    def box(self, shape: tuple[int, ...]) -> Box | None:
        """What this rank holds of a tensor; lengths may be 0. ``None``: it is outside the mesh."""
        if self.cell is None:
            return None
        return self.form.box(shape, self.form.place(0, self.cell).shard)


def sharding_of(tensor: torch.Tensor) -> Sharding:
    """How a DTensor lies over the ranks of its mesh. What this rank holds is compared with it.

    Raises:
        UnsupportedStateError: its parts are no boxes of it, or it waits for a reduction over the ranks.
    """
    sharded: Any = tensor
    order = getattr(getattr(sharded, "_spec", None), "shard_order", None)
    found = _sharding(sharded.device_mesh, sharded.placements, order, sharded.device_mesh.get_rank())
    _check_part(sharded, found)
    return found


@functools.lru_cache(maxsize=1 << 10)
def _sharding(mesh: Any, placements: tuple[Any, ...], order: Any, _rank: int) -> Sharding:
    """``_rank``: this one; meshes of different ranks may compare as equal."""
    sizes, where = tuple(mesh.mesh.shape), mesh.get_coordinate()
    cuts = _cuts(sizes, placements, {entry.tensor_dim: list(entry.mesh_dims) for entry in order or ()})
    cell = None if where is None else int(np.ravel_multi_index(tuple(where), sizes))
    ranks = np.array([*sizes, *mesh.mesh.reshape(-1).tolist()], np.int64)
    return Sharding(Form(sizes, cuts), xxhash.xxh3_64_intdigest(ranks.tobytes()), cell)


def _cuts(sizes: tuple[int, ...], placements: tuple[Any, ...], given: Mapping[int, list[int]]) -> tuple[Cut, ...]:
    """The order in which mesh dimensions cut. ``given``: what torch itself knows of it, by tensor dimension.

    ``_StridedShard`` says how many pieces there were before its own cut, made by mesh dimensions that stand behind it.
    """
    orders: dict[int, list[int]] = {}
    for dimension, placement in reversed(list(enumerate(placements))):
        if placement.is_partial():
            raise UnsupportedStateError(
                f"a DTensor with placements {placements} waits for a reduction: redistribute it first"
            )
        if not placement.is_replicate():
            order = orders.setdefault(placement.dim, [])
            before = _position(order, sizes, int(getattr(placement, "split_factor", 1)))
            if before is None:
                raise UnsupportedStateError(
                    f"the part of a DTensor with placements {placements} on a mesh of {sizes} is no box of it: a "
                    "_StridedShard needs the Shards whose pieces it cuts, as FSDP2 over tensor parallelism has them"
                )
            order.insert(before, dimension)
    for tensor_dimension, order in given.items():
        if sorted(order) == sorted(orders.get(tensor_dimension, ())):
            orders[tensor_dimension] = order
    cuts = tuple(Cut(mesh, axis) for axis in sorted(orders) for mesh in orders[axis] if sizes[mesh] > 1)
    if len(cuts) > MAX_CUTS:
        raise UnsupportedStateError(
            f"a DTensor with placements {placements} is cut along {len(cuts)} dimensions of its mesh, and a checkpoint "
            f"can tell {MAX_CUTS}: flatten some of them into one (DeviceMesh._flatten)"
        )
    return cuts


def _position(order: list[int], sizes: tuple[int, ...], factor: int) -> int | None:
    """Behind how many of the cuts in ``order`` there are ``factor`` pieces."""
    pieces = 1
    for place, dimension in enumerate([*order, None]):
        if pieces == factor:
            return place
        if dimension is not None:
            pieces *= sizes[dimension]
    return None


def _check_part(sharded: Any, sharding: Sharding) -> None:
    shape = tuple(sharded.shape)
    held = tuple(_local(sharded).shape)
    box = _checked_box(shape, sharded.device_mesh, sharded.placements, sharding)
    if box is None or box.lengths == held or (box.numel == 0 and 0 in held):
        return
    raise UnsupportedStateError(
        f"this rank holds {list(held)} of a DTensor of shape {list(shape)} with placements {sharded.placements} on a "
        f"mesh of {list(sharding.form.mesh)}, where it should hold {list(box.lengths)}"
    )


@functools.lru_cache(maxsize=1 << 14)  # a model has few different ones, and torch takes long to tell
def _checked_box(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], sharding: Sharding) -> Box | None:
    """What the layout gives this rank. Where torch places as many elements elsewhere, nobody can tell which they are.

    (FSDP2 over tensor parallelism keeps uneven pieces of other lengths than torch computes: then what is held decides.)
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    box = sharding.box(shape)
    if box is None or not box.numel or not any(getattr(placement, "split_factor", 1) > 1 for placement in placements):
        return box
    lengths, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    if tuple(lengths) == box.lengths and tuple(offsets) != box.offsets:
        raise UnsupportedStateError(
            f"a DTensor of shape {list(shape)} with placements {placements} on a mesh of {list(sharding.form.mesh)} is "
            "cut unevenly, and torch places this rank's part elsewhere than FSDP2 does: choose sizes that divide evenly"
        )
    return box
