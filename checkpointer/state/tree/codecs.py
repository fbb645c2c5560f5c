"""Classes that the user registered: enums, dataclasses, namedtuples, tensor subclasses, and any with two functions.

A checkpoint holds the registered name. Nothing is ever imported by a name that a checkpoint gives.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from checkpointer.errors import ConfigError, IncompatibleStateError, UnsupportedStateError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.:/-]{0,127}")


@dataclass(frozen=True)
class Codec:
    """How one class is stored: ``encode`` gives a value that the codec knows, ``decode`` takes it back."""

    name: str
    cls: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_by_class: dict[type, Codec] = {}
_by_name: dict[str, Codec] = {}
_tensor_classes: dict[str, type[torch.Tensor]] = {}


def register_codec(
    name: str,
    cls: type,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> None:
    """Let instances of exactly ``cls`` be stored, under the stable ``name``.

    ``encode`` returns a value made of storable ones, ``decode`` takes it back. Both are derived for enums (by member
    name; flags by value), for dataclasses and namedtuples (by field, without calling ``__init__`` or ``__new__``) and,
    for tensor subclasses, from ``__tensor_flatten__`` and ``__tensor_unflatten__``. Registering the same class and
    functions under the same name again does nothing. Raises :class:`ConfigError` for a name or class that is taken or
    cannot be registered.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"codec name {name!r} must be 1 to 128 letters, digits or _ . : / -, starting with a letter")
    if not isinstance(cls, type):
        raise ConfigError(f"register_codec({name!r}, …) needs a class, got {cls!r}")
    if (encode is None) != (decode is None):
        raise ConfigError(f"register_codec({name!r}, …) needs both encode and decode, or neither")
    if encode is None and issubclass(cls, torch.Tensor):
        _register_tensor_class(cls)
        return
    encoder, decoder = (encode, decode) if encode is not None else _derived(cls)
    assert encoder is not None
    assert decoder is not None
    _add(Codec(name, cls, encoder, decoder), derived=encode is None)


def codec_for(cls: type) -> Codec | None:
    """The codec registered for exactly this class."""
    return _by_class.get(cls)


def codec_named(name: str) -> Codec | None:
    """The codec registered under this name."""
    return _by_name.get(name)


def tensor_class(label: str) -> type[torch.Tensor] | None:
    """The registered tensor subclass with this qualified name."""
    return _tensor_classes.get(label)


def _add(codec: Codec, *, derived: bool) -> None:
    if codec.cls in _BUILTIN:
        raise ConfigError(f"{codec.cls.__qualname__} is stored without registration")
    for known in (_by_name.get(codec.name), _by_class.get(codec.cls)):
        if known is None:
            continue
        same = known.name == codec.name and known.cls is codec.cls
        if same and (derived or (known.encode is codec.encode and known.decode is codec.decode)):
            return
        raise ConfigError(
            f"cannot register {codec.cls.__qualname__} as {codec.name!r}: "
            f"{known.cls.__qualname__} is registered as {known.name!r}"
        )
    _by_name[codec.name] = _by_class[codec.cls] = codec


_BUILTIN = {type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, object}


def _register_tensor_class(cls: type[torch.Tensor]) -> None:
    if not hasattr(cls, "__tensor_unflatten__") or cls is torch.Tensor:
        raise ConfigError(f"{cls.__qualname__} has no __tensor_unflatten__: give register_codec encode and decode")
    _tensor_classes[f"{cls.__module__}.{cls.__qualname__}"] = cls


def _derived(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    if issubclass(cls, enum.Flag):
        return (lambda member: member.value), cls
    if issubclass(cls, enum.Enum):
        return (lambda member: member.name), lambda member: _enum_member(cls, member)
    if dataclasses.is_dataclass(cls):
        return _fields, lambda fields: _from_fields(cls, fields)
    if is_namedtuple(cls):
        return _items, lambda items: _from_items(cls, items)
    raise ConfigError(
        f"{cls.__qualname__} is neither enum, dataclass nor namedtuple: give register_codec encode and decode"
    )


def is_namedtuple(cls: type) -> bool:
    """Whether the class was made by ``collections.namedtuple`` or ``typing.NamedTuple``, or is derived from one."""
    fields = getattr(cls, "_fields", None)
    return issubclass(cls, tuple) and isinstance(fields, tuple) and all(isinstance(name, str) for name in fields)


def _enum_member(cls: type[enum.Enum], name: Any) -> enum.Enum:
    if not isinstance(name, str) or name not in cls.__members__:
        raise IncompatibleStateError(f"enum {cls.__qualname__} has no member {name!r}; it had when this was saved")
    return cls[name]


def _fields(value: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value)]
    _refuse_attributes(value, set(getattr(value, "__dict__", {})) - set(names))
    return {name: getattr(value, name) for name in names}


def _refuse_attributes(value: Any, extra: set[str]) -> None:
    if extra:
        raise UnsupportedStateError(
            f"{type(value).__qualname__} has attributes that are not fields ({', '.join(sorted(extra)[:5])}); "
            f"register it with encode and decode of your own"
        )


def _items(value: Any) -> dict[str, Any]:
    """The fields of a namedtuple by name, as the tuple holds them: a property of a derived class may show others."""
    _refuse_attributes(value, set(getattr(value, "__dict__", {})))
    return dict(zip(value._fields, tuple.__iter__(value), strict=True))


def _from_items(cls: Any, items: Any) -> Any:
    names = cls._fields
    if not isinstance(items, dict) or set(items) != set(names):
        found = sorted(map(str, items)) if isinstance(items, dict) else items
        raise IncompatibleStateError(f"namedtuple {cls.__qualname__} has the fields {list(names)}, saved were {found}")
    return tuple.__new__(cls, [items[name] for name in names])


def _from_fields(cls: type, fields: Any) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(fields, dict) or set(fields) != names:
        found = sorted(map(str, fields)) if isinstance(fields, dict) else fields
        raise IncompatibleStateError(f"dataclass {cls.__qualname__} has the fields {sorted(names)}, saved were {found}")
    value: Any = object.__new__(cls)
    for name, field in fields.items():
        object.__setattr__(value, name, field)
    return value
