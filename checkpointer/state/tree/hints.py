"""What to store in the place of a value that cannot be stored: one way for each kind that people have."""

from __future__ import annotations

import dataclasses
import datetime as dt
import decimal
import enum
import functools
import types
import uuid
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpointer.state.tree.codecs import is_namedtuple

REGISTER = (
    "store plain values instead, or describe the class with checkpointer.register_codec(name, cls, encode, decode)"
)
_NAME_ALONE = "checkpointer.register_codec(name, {kind}) lets it be stored"
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)

#: The package that the class comes from, a part of the name of the class ("" for any), what to do.
_FOREIGN: tuple[tuple[str, str, str], ...] = (
    ("pandas", "DataFrame", "store a dict of arrays, {name: column.to_numpy() for name, column in df.items()}"),
    ("pandas", "Timestamp", "store .to_pydatetime()"),
    ("pandas", "Timedelta", "store .to_pytimedelta()"),
    ("pandas", "", "store .to_numpy(), or .tolist() where that is an array of objects"),
    ("polars", "", "store a dict of arrays, made with .to_numpy()"),
    ("pyarrow", "", "store .to_numpy() or .to_pylist()"),
    ("PIL", "", "store np.asarray(image)"),
    ("jax", "", "store np.asarray(x), and make the array anew with jnp.asarray"),
    ("jaxlib", "", "store np.asarray(x), and make the array anew with jnp.asarray"),
    ("cupy", "", "store cupy.asnumpy(x)"),
    ("tensorflow", "", "store x.numpy()"),
)


def hint(value: Any) -> str:
    """What to do about a value that cannot be stored; ``REGISTER`` where nothing better is known."""
    if isinstance(value, (np.ndarray, np.generic)):
        return _numpy(value)
    return _foreign(value) or _of_python(value) or REGISTER


def is_foreign_data(value: object) -> bool:
    """Whether it is data of another library (pandas, PIL, jax, …) for which there is a hint."""
    return bool(_foreign(value))


def _numpy(value: Any) -> str:
    structured = value.dtype.fields is not None
    scalar = isinstance(value, np.generic)
    found: tuple[tuple[bool, str], ...] = (
        (
            isinstance(value, np.ma.MaskedArray),
            "store its parts: {'data': x.data, 'mask': np.ma.getmaskarray(x), 'fill_value': x.fill_value}",
        ),
        (structured and scalar, "store .item(), a tuple, or the array that it is from by field"),
        (structured, "store its fields: {name: np.asarray(x[name]) for name in x.dtype.names}"),
        (isinstance(value, np.void), "store bytes(x)"),
        (scalar, REGISTER),
        (value.dtype.hasobject, "store .tolist(), and give the elements of the list types that can be stored"),
        (
            isinstance(value, np.memmap),
            "store np.asarray(x): the same memory, and a restore in place fills the mapped file",
        ),
        (type(value) is not np.ndarray, "store np.asarray(x)"),
    )
    return next((advice for fits, advice in found if fits), "store x.view(np.uint8), or an array of plain numbers")


def _foreign(value: object) -> str:
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    return next((advice for name, part, advice in _FOREIGN if name == package and part in kind.__qualname__), "")


def _of_python(value: Any) -> str:
    kind = type(value).__qualname__
    alone = _NAME_ALONE.format(kind=kind)
    found: tuple[tuple[bool, str], ...] = (
        (is_namedtuple(type(value)), f"{alone} as it is; ._asdict() makes plain values of it"),
        (isinstance(value, torch.Tensor), REGISTER),
        (isinstance(value, enum.Enum), f"{alone} as it is"),
        (dataclasses.is_dataclass(value) and not isinstance(value, type), f"{alone} as it is"),
        (isinstance(value, nn.Module | torch.optim.Optimizer), _component(kind)),
        (isinstance(value, type), "store its name, and look the class up by it"),
        (isinstance(value, _FUNCTIONS), "store the name of the function, and look it up by that"),
        (isinstance(value, decimal.Decimal | uuid.UUID), f"store str(x), and make it anew with {kind}(...)"),
        (isinstance(value, dt.time), "store .isoformat()"),
        (isinstance(value, KeysView | ValuesView | ItemsView), "store list(x)"),
        (isinstance(value, tuple), "store tuple(x)"),
        (isinstance(value, Mapping) and not isinstance(value, dict), "store dict(x)"),
        (isinstance(value, memoryview), "store bytes(x)"),
        (isinstance(value, types.SimpleNamespace), "store vars(x)"),
        (
            isinstance(value, Iterator),
            "an iterator does not know its position; store how many items were taken from it",
        ),
        (_is_stateful(value), f"store its state_dict(), or {_component(kind)}"),
    )
    return next((advice for fits, advice in found if fits), "")


def _is_stateful(value: object) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict"))


def _component(kind: str) -> str:
    return f"give the {kind} to CheckpointManager as a component of its own, by keyword"
