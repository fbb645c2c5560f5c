"""Metrics, as users pass them: refused by type and shape at any call, read only where they are recorded.

Reading a number that lies on a GPU waits for everything that the GPU was given before, so a call that saves nothing
must not read. It must refuse all the same: else a wrong type would end a run at the first step that is due.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from checkpointer.errors import ConfigError
from checkpointer.policy.values import shown

_KINDS = frozenset("biuf")
"""Of NumPy's dtypes: bool, integers, floats."""

_EXTENSIONS = ("bfloat", "float", "int", "uint")
"""Names of dtypes that others register with NumPy, as if they were raw bytes."""


def accept_metrics(metrics: Mapping[str, object] | None) -> dict[str, object]:
    """The metrics that were reported, not read yet: by type and shape alone. ``None`` means "not reported".

    A number, or an array or tensor of any library and shape with one element that is a real number. A plain number,
    which costs nothing to read, is a float from here on.

    Raises:
        ConfigError: no mapping, a name that is no string, or a value that is no real number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics must be a mapping such as {{'val_loss': 0.5}}, got {type(metrics).__name__}")
    accepted: dict[str, object] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"the names of metrics must be strings, got {name!r}")
        if type(value) is float:
            accepted[name] = value
        elif value is not None:
            accepted[name] = _accepted(name, value)
    return accepted


def read_metrics(accepted: Mapping[str, object]) -> dict[str, float]:
    """Metrics as floats; waits for the devices that they lie on. Tensors that require grad are detached.

    Raises:
        ConfigError: a value that cannot be read, or that a float cannot hold.
    """
    return {name: value if type(value) is float else _read(name, value) for name, value in accepted.items()}


def check_metrics(metrics: Mapping[str, object] | None) -> dict[str, float]:
    """Metrics as floats, where they are recorded in any case.

    Raises:
        ConfigError: as ``accept_metrics`` and ``read_metrics``.
    """
    return read_metrics(accept_metrics(metrics))


def _accepted(name: str, value: object) -> object:
    if isinstance(value, (Real, Decimal)):  # NumPy's scalars too: they lie in host memory
        return _to_float(name, value)
    if isinstance(value, (str, bytes, bytearray)):
        raise _refusal(name, value)
    shape = _attribute(value, "shape")
    if shape is not None:
        _check_array(name, value, shape)
    elif not hasattr(type(value), "__float__"):
        raise _refusal(name, value)
    return value


def _check_array(name: str, value: object, shape: Iterable[int]) -> None:
    try:
        one = math.prod(shape) == 1
    except TypeError:  # a property of something that is no array
        raise _refusal(name, value) from None
    dtype = _attribute(value, "dtype")
    if not one:
        advice = "a metric is one number, such as their mean"
        raise ConfigError(f"metric {name!r} must be a number, got {_named(value)} of shape {tuple(shape)}: {advice}")
    if not _is_real(dtype):
        raise ConfigError(f"metric {name!r} must be a number, got {_named(value)} of dtype {dtype}")
    if _attribute(value, "is_meta") is True:
        raise ConfigError(f"metric {name!r} must be a number, got {_named(value)} on the meta device, which has none")


def _is_real(dtype: Any) -> bool:
    kind = getattr(dtype, "kind", None)
    if not isinstance(kind, str):  # not of NumPy
        return not getattr(dtype, "is_complex", False)
    return kind in _KINDS or (kind == "V" and dtype.names is None and dtype.name.startswith(_EXTENSIONS))


def _read(name: str, value: Any) -> float:
    try:
        if _attribute(value, "requires_grad") is True:
            value = value.detach()
        item = value.item() if hasattr(value, "item") else value
        return _to_float(name, item)
    except ConfigError:
        raise
    except Exception as error:  # whatever a device or a class of the user's raises: not the metric's type is wrong
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"metric {name!r}, a {type(value).__name__}, cannot be read as a number: {reason}") from error


def _to_float(name: str, value: Any) -> float:
    """As ``float``, which takes strings, and makes infinity of what it cannot hold where that is no ``int``."""
    if isinstance(value, (str, bytes, bytearray)):
        raise _refusal(name, value)
    try:
        number = float(value)
        overflow = math.isinf(number) and value != number
    except OverflowError:
        overflow = True
    except (TypeError, ValueError):
        raise _refusal(name, value) from None
    if overflow:
        text = shown(value) if isinstance(value, int) else _short(value)
        raise ConfigError(f"metric {name!r} is too large for a float: {text}")
    return number


def _refusal(name: str, value: object) -> ConfigError:
    nested = ": give each of its numbers a name of its own, such as 'eval/loss'" if isinstance(value, Mapping) else ""
    return ConfigError(f"metric {name!r} must be a number, got {_named(value)}{nested}")


def _named(value: object) -> str:
    return type(value).__name__


def _short(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # a fraction of integers with thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"a {type(value).__name__} of {len(text)} digits"


def _attribute(value: object, name: str) -> Any:
    """``None`` also where asking raises: a nested tensor has no shape, and says so by an error."""
    try:
        return getattr(value, name, None)
    except Exception:  # noqa: BLE001  a property of any class; what has none is refused by name
        return None
