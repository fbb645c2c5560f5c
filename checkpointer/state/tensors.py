"""Tensors as data: specs, allocation, and taking sparse, quantized and subclass tensors apart and together."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, TypeAlias

import torch

from checkpointer.format.index import ITEM_SIZES, TensorSpec, is_dense
from checkpointer.state.dtensor import PLAIN_TYPES, is_sharded, local_part, own_memory
from checkpointer.state.protocol import MapLocation

#: Every torch dtype by its name without ``torch.``.
DTYPES: Mapping[str, torch.dtype] = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

#: Dtypes that a stored tensor can have.
STORABLE = frozenset(dtype for name, dtype in DTYPES.items() if name in ITEM_SIZES)

Memory: TypeAlias = tuple[object, ...]

_INDEX_NAMES = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
LAYOUTS: Mapping[str, torch.layout] = {
    "coo": torch.sparse_coo,
    "csr": torch.sparse_csr,
    "csc": torch.sparse_csc,
    "bsr": torch.sparse_bsr,
    "bsc": torch.sparse_bsc,
}
_LAYOUT_NAMES = {layout: name for name, layout in LAYOUTS.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a torch dtype without ``torch.``."""
    return _NAMES[dtype]


def unknown_dtype(dtype: torch.dtype) -> str:
    """Why a tensor of a dtype outside ``STORABLE`` cannot be stored, and what to do."""
    return (
        f"a tensor of dtype {dtype}, which this version of checkpointer does not know how to store (PyTorch "
        f"{torch.__version__} has it); update checkpointer, or convert the tensor to another dtype"
    )


def contiguous_strides(shape: Iterable[int]) -> tuple[int, ...]:
    """Row-major strides of ``shape``, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _same_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether ``strides`` are row-major where it matters (dims of size 1 may have any stride)."""
    pairs = zip(strides, contiguous_strides(shape), shape, strict=True)
    return all(size == 1 or stride == expected for stride, expected, size in pairs)


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec of a strided tensor. Strides are given where it is dense and not row-major.

    Expanded, overlapping and gapped tensors are described as row-major: that is how they come back.
    """
    return _spec(tensor.dtype, tensor.shape, tensor.stride(), tensor.device)


@functools.lru_cache(maxsize=1 << 16)  # the same few for all the tensors of a model, save after save
def _spec(dtype: torch.dtype, size: torch.Size, strides: tuple[int, ...], device: torch.device) -> TensorSpec:
    shape = tuple(size)
    keep = 0 not in shape and not _same_order(shape, strides) and is_dense(shape, strides)
    return TensorSpec(dtype=_NAMES[dtype], shape=shape, strides=strides if keep else None, device=str(device))


def device_for(spec: TensorSpec, map_location: MapLocation) -> torch.device:
    """``map_location``, else the saved device if this machine has it, else the CPU."""
    if map_location is not None:
        return torch.device(map_location)
    try:
        device = torch.device(spec.device)
    except RuntimeError:
        return torch.device("cpu")
    return device if _available(device) else torch.device("cpu")


def _available(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    backend = getattr(torch, device.type, None)
    if backend is None or device.type == "meta" or not getattr(backend, "is_available", lambda: False)():
        return False
    return device.index is None or device.index < int(backend.device_count())


def empty_for(spec: TensorSpec, map_location: MapLocation = None) -> torch.Tensor:
    """An uninitialized tensor of the spec's dtype, shape and strides.

    Raises ``ValueError`` where the strides are not a permutation of dense ones.
    """
    device, dtype = device_for(spec, map_location), DTYPES[spec.dtype]
    if spec.dtype not in ITEM_SIZES:
        raise ValueError(f"dtype {spec.dtype} cannot be stored")
    if spec.strides is None:
        return _empty(spec.shape, contiguous_strides(spec.shape), dtype, device)
    if len(spec.strides) != len(spec.shape) or not is_dense(spec.shape, spec.strides):
        raise ValueError(f"strides {spec.strides} do not fit shape {spec.shape}")
    return _empty(spec.shape, _normal_strides(spec.shape, spec.strides), dtype, device)


def _empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if dtype != torch.complex32:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    with warnings.catch_warnings():  # takes longer than the tensor
        warnings.filterwarnings("ignore", message="ComplexHalf support is experimental")
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _normal_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """``strides`` with harmless values for dims of size 1, whose stride a hostile index could make huge."""
    bound = prod(shape)
    return tuple(min(max(stride, 0), bound) for stride in strides)


def memory_key(tensor: torch.Tensor) -> Memory:
    """Equal for tensors that are the same elements of the same memory, read the same way."""
    if is_sharded(tensor):
        return ("sharded", tuple(tensor.shape), *memory_key(local_part(tensor)))
    place: object = tensor.data_ptr()
    if tensor.numel() == 0 or not place:
        place = ("storage", tensor.untyped_storage()._cdata, tensor.storage_offset())  # noqa: SLF001
    view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, place, *view)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is an ordinary strided one with memory of its own (any wrapper as ``nn.Parameter`` apart)."""
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_meta
    )


def is_ordinary(tensor: torch.Tensor) -> bool:
    """Whether the tensor is stored under one key, as it is: plain, or in parts that the ranks hold."""
    return is_plain(tensor) or is_sharded(tensor)


def fillable(live: torch.Tensor, spec: TensorSpec) -> bool:
    """Whether saved bytes can be read straight into ``live``: same dtype and shape, plain, no element twice."""
    return (
        is_ordinary(live)
        and _NAMES[live.dtype] == spec.dtype
        and live.shape == spec.shape
        and not live.is_conj()
        and not live.is_neg()
        and not overlaps(own_memory(live))
    )


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a strided tensor's elements, as far as they are here, and of the first after."""
    tensor = own_memory(tensor)
    if tensor.is_contiguous():
        start = tensor.data_ptr()
        return (start, start + tensor.nbytes)
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return (tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two indices may name one element (``expand``, ``as_strided``); True where that is not clear."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as a flat uint8 tensor on the CPU (a view where possible)."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.is_contiguous():
        plain = _contiguous(plain)
    if plain.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return plain.cpu().as_strided((plain.numel(),), (1,)).view(torch.uint8)


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The row-major bytes of a tensor: a view of its memory where it has that form, else a copy."""
    array: Any = as_bytes(tensor).numpy()
    return memoryview(array)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as integers of the same size: few operators know the rarer dtypes, and bits are all that counts."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype == torch.complex128:
        return torch.view_as_real(plain).view(torch.int64)
    return plain.view(CARRIERS[plain.element_size()])


CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy, by way of an integer dtype: torch cannot copy the sub-byte dtypes."""
    carrier = CARRIERS.get(tensor.element_size())
    if carrier is None or tensor.ndim == 0:
        return tensor.contiguous()
    return tensor.view(carrier).contiguous().view(tensor.dtype)


def sparse_parts(tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor], bool]:
    """A sparse tensor's layout name, its component tensors by name, and whether it is coalesced."""
    name = _LAYOUT_NAMES[tensor.layout]
    if name == "coo":
        # indices() and values() refuse tensors that are not coalesced
        parts = {"indices": tensor._indices(), "values": tensor._values()}  # noqa: SLF001
        return name, parts, tensor.is_coalesced()
    outer, inner = _INDEX_NAMES[tensor.layout]
    parts = {outer: getattr(tensor, outer)(), inner: getattr(tensor, inner)(), "values": tensor.values()}
    return name, parts, False


def sparse_part_names(layout: str) -> tuple[str, ...]:
    """Names of the component tensors of a sparse layout."""
    return ("indices", "values") if layout == "coo" else (*_INDEX_NAMES[LAYOUTS[layout]], "values")


def build_sparse(layout: str, parts: Mapping[str, torch.Tensor], shape: list[int], *, coalesced: bool) -> torch.Tensor:
    """A sparse tensor over ``parts``. Raises ``ValueError`` where they do not fit together."""
    names = sparse_part_names(layout)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
            if layout == "coo":
                return _build_coo(parts["indices"], parts["values"], shape, coalesced=coalesced)
            outer, inner, values = (parts[name] for name in names)
            return torch.sparse_compressed_tensor(
                outer, inner, values, size=shape, layout=LAYOUTS[layout], device=values.device, check_invariants=True
            )
    except (RuntimeError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"not a valid sparse {layout} tensor: {_first_line(error)}") from error


def _build_coo(indices: torch.Tensor, values: torch.Tensor, shape: list[int], *, coalesced: bool) -> torch.Tensor:
    if indices.ndim != 2 or indices.dtype != torch.int64:
        raise ValueError("indices of a sparse coo tensor must be a matrix of int64")
    if coalesced and not _strictly_increasing(indices):
        raise ValueError("indices of a coalesced tensor must be sorted and unique")
    return torch.sparse_coo_tensor(
        indices, values, shape, device=values.device, check_invariants=True, is_coalesced=coalesced
    )


def _strictly_increasing(indices: torch.Tensor) -> bool:
    """Whether the columns of ``indices`` ([sparse_dim, nnz], int64) are in strict lexicographic order."""
    before, after = indices[:, :-1], indices[:, 1:]
    if before.shape[1] == 0:
        return True
    tied = torch.ones(before.shape[1], dtype=torch.bool, device=indices.device)
    increasing = torch.zeros_like(tied)
    for low, high in zip(before, after, strict=True):
        increasing |= tied & (low < high)
        tied &= low == high
    return bool(increasing.all())


def quantized_parts(tensor: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Scheme (JSON) and component tensors of an affine quantized tensor. Raises ``ValueError`` for other schemes."""
    name = _NAMES[tensor.dtype]
    if name not in ("qint8", "quint8", "qint32"):
        raise ValueError(f"quantized dtype {name}")
    if tensor.qscheme() is torch.per_tensor_affine:
        scheme = {"dtype": name, "scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
        return scheme, {"values": tensor.int_repr()}
    if tensor.qscheme() is torch.per_channel_affine:
        parts = {
            "values": tensor.int_repr(),
            "scales": tensor.q_per_channel_scales(),
            "zero_points": tensor.q_per_channel_zero_points(),
        }
        return {"dtype": name, "axis": tensor.q_per_channel_axis()}, parts
    raise ValueError(f"quantization scheme {tensor.qscheme()}")


QUANTIZED_VALUES = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}


def build_quantized(scheme: Mapping[str, Any], parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The reverse of :func:`quantized_parts`. Raises ``ValueError`` where the parts do not fit together."""
    values = parts["values"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if "axis" not in scheme:
                limits = torch.iinfo(values.dtype)
                if not limits.min <= scheme["zero_point"] <= limits.max:
                    raise ValueError("zero point out of range")
                scale, zero_point = scheme["scale"], scheme["zero_point"]
                return torch._make_per_tensor_quantized_tensor(values, scale, zero_point)  # noqa: SLF001
            scales, zero_points, axis = parts["scales"], parts["zero_points"], scheme["axis"]
            _check_channels(values, scales, zero_points, axis)
            return torch._make_per_channel_quantized_tensor(values, scales, zero_points, axis)  # noqa: SLF001
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"not a valid quantized tensor: {_first_line(error)}") from error


def _check_channels(values: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor, axis: int) -> None:
    if not 0 <= axis < values.ndim:
        raise ValueError(f"no axis {axis} in a tensor of {values.ndim} dims")
    if scales.shape != (values.shape[axis],) or zero_points.shape != scales.shape:
        raise ValueError("one scale and one zero point for each channel are needed")
    if scales.dtype != torch.float64 or zero_points.dtype != torch.int64:
        raise ValueError("scales must be float64 and zero points int64")


def class_label(tensor: torch.Tensor) -> str:
    """The qualified name of a tensor's class: a label to compare with, never something to import."""
    return f"{type(tensor).__module__}.{type(tensor).__qualname__}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
