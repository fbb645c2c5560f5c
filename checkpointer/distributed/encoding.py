"""Messages between ranks as bytes: typed values in msgpack.

What arrives is checked against its type. A type is anything that msgspec decodes: numbers and strings, lists, named
tuples and dataclasses, which cost nothing to declare where there is one process; or its structs, in a module that is
imported only where there are several.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from checkpointer.errors import SaveError

Value = TypeVar("Value")

_PACKED, _ESCAPED = b"\x00", b"\x01"
"""The first byte: msgpack; or JSON, for strings that UTF-8 cannot hold."""


def encode(value: Any) -> bytes:
    """A value as bytes.

    Raises:
        TypeError: it is of a type that msgspec does not know.
    """
    try:
        return _PACKED + msgspec.msgpack.encode(value)
    except UnicodeEncodeError:  # a lone surrogate, in a key or a path for one
        return _ESCAPED + json.dumps(_listed(msgspec.to_builtins(value))).encode("ascii")


def decode(data: bytes, kind: type[Value], sender: str) -> Value:
    """The inverse of :func:`encode`. ``sender`` is named in errors: ``the save of step 5: rank 3 of 8``.

    Raises:
        SaveError: it is no value of ``kind``.
    """
    try:
        if data[:1] == _PACKED:
            return msgspec.msgpack.decode(memoryview(data)[1:], type=kind)
        return msgspec.convert(_unlisted(json.loads(data[1:])), kind)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise SaveError(
            f"{sender} has said what this rank cannot read: {error}. Every rank has to run the same version of "
            "checkpointer"
        ) from error


def _listed(value: Any) -> Any:
    """The same, with a dictionary as a list of pairs inside an object: keys may be other than strings."""
    if isinstance(value, dict):
        return {"pairs": [[_listed(key), _listed(item)] for key, item in value.items()]}
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unlisted(value: Any) -> Any:
    if isinstance(value, dict):
        return {_key(key): _unlisted(item) for key, item in value["pairs"]}
    return [_unlisted(item) for item in value] if isinstance(value, list) else value


def _key(value: Any) -> Any:
    return tuple(map(_key, value)) if isinstance(value, list) else value
