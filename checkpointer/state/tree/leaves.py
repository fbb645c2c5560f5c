"""Encoding of single values that hold neither other values nor tensors: numbers, times, paths, ranges, dtypes.

``LEAF_ENCODERS`` maps an exact Python type to ``value -> (tag, payload)``; ``LEAF_DECODERS`` maps a tag to
``payload -> value``. A decoder is given JSON from anywhere and raises ``ValueError`` or ``TypeError`` for nonsense.
"""

from __future__ import annotations

import base64
import math
import pathlib
import re
import struct
import zoneinfo
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta, timezone
from typing import Any

import numpy as np
import torch

from checkpointer.errors import IncompatibleStateError
from checkpointer.format.index import Json
from checkpointer.state.tensors import DTYPES, dtype_name

INT_LIMIT = 2**63
_HEX_INT = re.compile(r"-?[0-9a-f]{16,}")
_HEX_FLOAT = re.compile(r"[0-9a-f]{16}")
_PATHS: Mapping[str, type[pathlib.PurePath]] = {
    "path": type(pathlib.Path()),
    "pure_posix": pathlib.PurePosixPath,
    "pure_windows": pathlib.PureWindowsPath,
}
_NAN = "7ff8000000000000"


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def from_base64(text: Json) -> bytes:
    """Raises ``ValueError`` for anything but canonical base64."""
    return base64.b64decode(expect(text, str), validate=True)


def expect(value: Json, kind: type) -> Any:
    """``value`` if its type is exactly ``kind``; else ``TypeError``."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def expect_list(value: Json, length: int | None = None) -> list[Json]:
    """``value`` if it is a list (of ``length``); else ``TypeError`` or ``ValueError``."""
    if type(value) is not list:
        raise TypeError(f"expected a list, found {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"expected {length} entries, found {len(value)}")
    return value


def expect_dict(value: Json, keys: tuple[str, ...]) -> dict[str, Json]:
    """``value`` if it is a dict with exactly ``keys``."""
    if type(value) is not dict:
        raise TypeError(f"expected an object, found {type(value).__name__}")
    if set(value) != set(keys):
        raise ValueError(f"expected the keys {sorted(keys)}, found {sorted(value)[:10]}")
    return value


def is_plain_str(value: str) -> bool:
    """Whether UTF-8 can hold the string (no lone surrogates)."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_plain(value: Any) -> bool:
    """Whether JSON holds the value exactly."""
    kind = type(value)
    if kind is str:
        return is_plain_str(value)
    if kind is int:
        return bool(-INT_LIMIT < value < INT_LIMIT)
    if kind is float:
        return math.isfinite(value)
    return value is None or kind is bool


def encode_int(value: int) -> Json:
    return value if -INT_LIMIT < value < INT_LIMIT else {"$int": format(value, "x")}


def decode_int(node: Json) -> int:
    """An int, natural or tagged."""
    if type(node) is dict and len(node) == 1 and "$int" in node:
        return _decode_big_int(node["$int"])
    value: int = expect(node, int)
    if not -INT_LIMIT < value < INT_LIMIT:
        raise ValueError("integer out of range")
    return value


def _decode_big_int(payload: Json) -> int:
    if not _HEX_INT.fullmatch(expect(payload, str)):
        raise ValueError("not a hexadecimal integer")
    return int(str(payload), 16)


def encode_float(value: float) -> Json:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"$float": "inf" if value > 0 else "-inf"}
    bits = struct.pack(">d", value).hex()
    return {"$float": "nan" if bits == _NAN else bits}


def decode_float(node: Json) -> float:
    """A float, natural or tagged."""
    if type(node) is dict and len(node) == 1 and "$float" in node:
        return _decode_special_float(node["$float"])
    value: float = expect(node, float)
    if not math.isfinite(value):
        raise ValueError("a float that is not finite must be tagged")
    return value


def _decode_special_float(payload: Json) -> float:
    text = expect(payload, str)
    if text in ("nan", "inf", "-inf"):
        return float(text)
    if not _HEX_FLOAT.fullmatch(text):
        raise ValueError("not a float")
    value: float = struct.unpack(">d", bytes.fromhex(text))[0]
    if not math.isnan(value):
        raise ValueError("only NaN is written as bits")
    return value


def _decode_complex(payload: Json) -> complex:
    real, imaginary = expect_list(payload, 2)
    return complex(decode_float(real), decode_float(imaginary))


def _decode_str(payload: Json) -> str:
    return from_base64(payload).decode("utf-8", "surrogatepass")


def _encode_datetime(value: datetime) -> Json:
    return [value.replace(tzinfo=None, fold=0).isoformat(), value.fold, _encode_zone(value.tzinfo)]


def _encode_zone(zone: Any) -> Json:
    if zone is None:
        return None
    if zone is timezone.utc:
        return "utc"
    if type(zone) is timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return {"offset": _encode_timedelta(offset), "name": name[0] if name else None}
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        return {"zone": zone.key}
    raise ValueError(f"time zone {zone!r}")


def _decode_datetime(payload: Json) -> datetime:
    iso, fold, zone = expect_list(payload, 3)
    value = datetime.fromisoformat(expect(iso, str))
    if value.tzinfo is not None or fold not in (0, 1):
        raise ValueError("not a datetime")
    return value.replace(tzinfo=_decode_zone(zone), fold=expect(fold, int))


def _decode_zone(node: Json) -> timezone | zoneinfo.ZoneInfo | None:
    if node is None:
        return None
    if node == "utc":
        return timezone.utc
    if type(node) is dict and set(node) == {"zone"}:
        return _zone_info(expect(node["zone"], str))
    fields = expect_dict(node, ("offset", "name"))
    offset = _decode_timedelta(fields["offset"])
    if fields["name"] is None:
        return timezone(offset)
    return timezone(offset, expect(fields["name"], str))


def _zone_info(key: str) -> zoneinfo.ZoneInfo:
    if not re.fullmatch(r"[A-Za-z0-9_+\-]+(/[A-Za-z0-9_+\-]+)*", key):
        raise ValueError("not the name of a time zone")
    try:
        return zoneinfo.ZoneInfo(key)
    except (zoneinfo.ZoneInfoNotFoundError, OSError) as error:
        raise IncompatibleStateError(
            f"time zone {key!r} is not known on this machine; install its data: pip install tzdata"
        ) from error


def _encode_timedelta(value: timedelta) -> Json:
    return [value.days, value.seconds, value.microseconds]


def _decode_timedelta(payload: Json) -> timedelta:
    days, seconds, microseconds = (expect(part, int) for part in expect_list(payload, 3))
    return timedelta(days=days, seconds=seconds, microseconds=microseconds)


def _path_encoder(label: str) -> Callable[[Any], tuple[str, Json]]:
    def encode(value: pathlib.PurePath) -> tuple[str, Json]:
        text = str(value)
        return "$path", [label, text if is_plain_str(text) else {"$str": _surrogates(text)}]

    return encode


def _decode_path(payload: Json) -> pathlib.PurePath:
    label, text = expect_list(payload, 2)
    if type(text) is dict:
        text = _decode_str(expect_dict(text, ("$str",))["$str"])
    if type(label) is not str or label not in _PATHS:
        raise ValueError("unknown class of path")
    return _PATHS[label](expect(text, str))


def _surrogates(value: str) -> str:
    return to_base64(value.encode("utf-8", "surrogatepass"))


def _decode_dtype(payload: Json) -> torch.dtype:
    return DTYPES[expect(payload, str)]


def _decode_device(payload: Json) -> torch.device:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}(:[0-9]{1,4})?", expect(payload, str)):
        raise ValueError("not a device")
    return torch.device(str(payload))


def _decode_range(payload: Json) -> range:
    return range(*(decode_int(part) for part in expect_list(payload, 3)))


def _decode_size(payload: Json) -> torch.Size:
    sizes = [expect(part, int) for part in expect_list(payload)]
    if not all(-INT_LIMIT < size < INT_LIMIT for size in sizes):
        raise ValueError("size out of range")
    return torch.Size(sizes)


def encode_numpy_scalar(value: np.generic) -> tuple[str, Json]:
    """``np.float32(1)`` and its like. Raises ``ValueError`` for structured and object scalars."""
    if isinstance(value, np.str_):
        return "$npscalar", ["str", to_base64(str.encode(value, "utf-8", "surrogatepass"))]
    if isinstance(value, np.bytes_):
        return "$npscalar", ["bytes", to_base64(bytes(value))]
    if value.dtype.kind not in "biufcmM" or type(value) is not value.dtype.type:
        raise ValueError(f"numpy scalar of type {type(value).__name__}")
    return "$npscalar", [value.dtype.str, to_base64(value.tobytes())]


def _decode_numpy_scalar(payload: Json) -> np.generic:
    label, text = expect_list(payload, 2)
    data = from_base64(text)
    if label == "str":
        return np.str_(data.decode("utf-8", "surrogatepass"))
    if label == "bytes":
        return np.bytes_(data)
    dtype = numpy_dtype(label)
    if dtype.kind not in "biufcmM" or len(data) != dtype.itemsize:
        raise ValueError("not a numpy scalar")
    scalar: np.generic = np.frombuffer(data, dtype=dtype)[0]
    return scalar


def numpy_dtype(label: Json) -> np.dtype[Any]:
    """The numpy dtype of a ``dtype.str``: plain ones only, no objects, no structures."""
    if not re.fullmatch(r"[<>|=][biufcmMSUV][0-9]{1,12}(\[[0-9a-zA-Z]{1,24}\])?", expect(label, str)):
        raise ValueError("not a numpy dtype")
    dtype: np.dtype[Any] = np.dtype(str(label))
    if dtype.hasobject or dtype.fields is not None or dtype.itemsize == 0:
        raise ValueError("not a plain numpy dtype")
    return dtype


LEAF_ENCODERS: Mapping[type, Callable[[Any], tuple[str, Json]]] = {
    int: lambda value: ("$int", format(value, "x")),
    float: lambda value: ("$float", encode_float(value)["$float"]),  # type: ignore[index, call-overload]
    str: lambda value: ("$str", _surrogates(value)),
    complex: lambda value: ("$complex", [encode_float(value.real), encode_float(value.imag)]),
    datetime: lambda value: ("$datetime", _encode_datetime(value)),
    date: lambda value: ("$date", value.isoformat()),
    timedelta: lambda value: ("$timedelta", _encode_timedelta(value)),
    range: lambda value: ("$range", [encode_int(part) for part in (value.start, value.stop, value.step)]),
    torch.Size: lambda value: ("$size", list(value)),
    torch.dtype: lambda value: ("$dtype", dtype_name(value)),
    torch.device: lambda value: ("$device", str(value)),
    **{cls: _path_encoder(label) for label, cls in _PATHS.items()},
}

LEAF_DECODERS: Mapping[str, Callable[[Json], Any]] = {
    "$int": _decode_big_int,
    "$float": _decode_special_float,
    "$str": _decode_str,
    "$complex": _decode_complex,
    "$datetime": _decode_datetime,
    "$date": lambda payload: date.fromisoformat(expect(payload, str)),
    "$timedelta": _decode_timedelta,
    "$range": _decode_range,
    "$size": _decode_size,
    "$dtype": _decode_dtype,
    "$device": _decode_device,
    "$path": _decode_path,
    "$npscalar": _decode_numpy_scalar,
}
