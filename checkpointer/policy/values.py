"""Checked values of the configuration: counts, durations such as ``"30min"``, sizes such as ``"500GB"``, ``"1%"``.

Pure. A check takes the key that the value stands under and returns the value in the type that the rest of the
package uses, or raises :class:`FieldError`, which remembers the key so that the line in a file can be found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TypeAlias, TypeVar

from checkpointer.errors import ConfigError

Key: TypeAlias = "tuple[str | int, ...]"
T = TypeVar("T")

#: Duration units, largest first, in microseconds: ``timedelta`` holds nothing finer.
DURATION_UNITS: Mapping[str, int] = {
    "d": 86_400_000_000,
    "h": 3_600_000_000,
    "min": 60_000_000,
    "s": 1_000_000,
}

#: Size units in bytes, decimal and binary.
SIZE_UNITS: Mapping[str, int] = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)},
}

# A file offset is a signed 64-bit number; anything above is a typing error, and a forged one could cost hours to print.
_LARGEST = 2**63 - 1
_LARGEST_DURATION = timedelta.max // timedelta(microseconds=1)

_ZERO = "0 is refused: frameworks disagree on its meaning (none, unlimited, delete after upload); {instead}"
_LEAVE_OUT = "leave the rule out (null) to switch it off"

# ASCII digits only, and few enough of them that arithmetic stays cheap whatever the file says.
_QUANTITY = re.compile(r"\s*(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?P<unit>[A-Za-z]*)\s*")
_PERCENT = re.compile(r"\s*(?P<number>[0-9]{1,20}(?:\.[0-9]{1,20})?)\s*%\s*")


class FieldError(ConfigError):
    """One value of the configuration makes no sense. The message starts with its key: ``keep.best[0].mode: …``."""

    def __init__(self, key: Key, problem: str) -> None:
        super().__init__(key, problem)
        self.key = key
        self.problem = problem

    def under(self, *prefix: str | int) -> FieldError:
        """The same error as the enclosing section sees it."""
        return FieldError((*prefix, *self.key), self.problem)

    def __str__(self) -> str:
        return f"{dotted(self.key)}: {self.problem}" if self.key else self.problem


def dotted(key: Key) -> str:
    """``("keep", "best", 0, "mode")`` as people write it: ``keep.best[0].mode``. Nothing in it commands a terminal."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown(value: object) -> str:
    """``value`` as YAML spells it, shortened: what an error message quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(word: object, options: Iterable[str]) -> str:
    """``"; did you mean keep?"`` for the closest of ``options``, or nothing."""
    import difflib  # only errors need it, and it is slow to import

    close = difflib.get_close_matches(str(word), list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def refuse_unknown(keys: Iterable[object], known: Iterable[str]) -> None:
    """Raise :class:`FieldError` for the first of ``keys`` that is not ``known``."""
    known = tuple(known)
    for key in keys:
        if key not in known:
            raise FieldError((str(key),), f"unknown key{did_you_mean(key, known)} (known: {', '.join(known)})")


def optional(check: Callable[[str, object], T], key: str, value: object) -> T | None:
    """``check(key, value)``, but ``None`` (the rule is not set) stays ``None``."""
    return None if value is None else check(key, value)


def count(key: str, value: object, *, instead: str = _LEAVE_OUT) -> int:
    """A whole number of at least 1. ``instead`` tells what to write for zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise FieldError((key,), f"must be a whole number, got {shown(value)}")
    return _in_range(key, value, value, _LARGEST, instead)


def boolean(key: str, value: object) -> bool:
    """``true`` or ``false``, nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise FieldError((key,), f"must be true or false, got {shown(value)}")
    return value


def choice(key: str, value: object, options: tuple[str, ...]) -> str:
    """One of the texts ``options``."""
    if isinstance(value, str) and value in options:
        return value
    hint = did_you_mean(value, options) if isinstance(value, str) else ""
    if isinstance(value, bool):
        hint = " (YAML reads on, off, yes and no without quotes as true and false)"
    raise FieldError((key,), f"must be one of {', '.join(options)}, got {shown(value)}{hint}")


def duration(key: str, value: object) -> timedelta:
    """A ``timedelta``, or text such as ``"90s"``, ``"30min"``, ``"1.5h"``, ``"2d"``: more than zero."""
    if isinstance(value, timedelta):
        microseconds = value // timedelta(microseconds=1)
    elif isinstance(value, str):
        microseconds = _quantity(key, value, DURATION_UNITS, example="30min")
    else:
        raise FieldError((key,), _no_unit(value, "a duration", ("s", "min", "h", "d")))
    return timedelta(microseconds=_in_range(key, microseconds, value, _LARGEST_DURATION, _LEAVE_OUT))


def fraction(key: str, value: object) -> float:
    """A part of a whole, from text such as ``"1%"`` or a number such as 0.01: more than zero, less than all of it."""
    if isinstance(value, str):
        number = _percent(key, value)
    elif isinstance(value, float) and math.isfinite(value):
        number = value
    elif isinstance(value, int) and not isinstance(value, bool):
        _in_range(key, value, value, _LARGEST, _LEAVE_OUT)
        raise FieldError((key,), f"{shown(value)} has no unit; write {shown(value)}%, or a number below 1")
    else:
        raise FieldError((key,), f"must be a percentage such as 1%, got {shown(value)}")
    if number == 0:
        raise FieldError((key,), _ZERO.format(instead=_LEAVE_OUT))
    if not 0 < number < 1:
        hint = f"; did you mean {shown(value)}%?" if isinstance(value, float) and 1 <= number < 100 else ""
        raise FieldError((key,), f"must be more than 0% and less than 100%, got {shown(value)}{hint}")
    return number


def size(key: str, value: object) -> int:
    """Bytes, from a whole number of bytes or text such as ``"500GB"`` or ``"1.5TiB"``: more than zero."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str):
        number = _quantity(key, value, SIZE_UNITS, example="500GB")
    else:
        raise FieldError((key,), _no_unit(value, "a size", ("MB", "GB", "TB")))
    return _in_range(key, number, value, _LARGEST, _LEAVE_OUT)


def format_duration(value: timedelta) -> str:
    """Text that :func:`duration` reads back exactly, in the largest unit that divides it: ``"30min"``."""
    microseconds = value // timedelta(microseconds=1)
    for unit, factor in DURATION_UNITS.items():
        if microseconds % factor == 0:
            return f"{microseconds // factor}{unit}"
    seconds, rest = divmod(microseconds, 1_000_000)
    return f"{seconds}.{rest:06d}".rstrip("0") + "s"


def format_size(value: int) -> str:
    """Text that :func:`size` reads back exactly, with the smallest whole number: ``"500GB"``, ``"64MiB"``."""
    unit = max((unit for unit in SIZE_UNITS if value % SIZE_UNITS[unit] == 0), key=lambda unit: SIZE_UNITS[unit])
    return f"{value // SIZE_UNITS[unit]}{unit}"


def format_fraction(value: float) -> str | float:
    """What :func:`fraction` reads back exactly: ``"1%"`` where that is possible, else the number."""
    text = f"{value * 100:.6f}".rstrip("0").rstrip(".") + "%"
    return text if value >= 1e-8 and _percent("", text) == value else value


def roughly(seconds: float) -> str:
    """Time passed, for people: ``12.3ms``, ``4.56s``, ``9.28min``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g}ms"
    for unit, length, limit in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 360_000)):
        if seconds < limit:
            return f"{seconds / length:.3g}{unit}"
    return f"{seconds / 86400:.3g}d"


def _percent(key: str, text: str) -> float:
    match = _PERCENT.fullmatch(text)
    if match is None:
        raise FieldError((key,), f"must be a percentage such as 1% or 0.5%, got {shown(text)}")
    whole, _, decimals = str(match["number"]).partition(".")
    scale: int = 100 * 10 ** len(decimals)
    return int(whole + decimals) / scale  # of integers: rounded once


def _in_range(key: str, number: int, value: object, largest: int, instead: str) -> int:
    if number == 0:
        raise FieldError((key,), _ZERO.format(instead=instead))
    if number < 0:
        raise FieldError((key,), f"must be more than zero, got {shown(value)}; {instead}")
    if number > largest:
        raise FieldError((key,), f"is too large: {shown(value)}")
    return number


def _quantity(key: str, text: str, units: Mapping[str, int], *, example: str) -> int:
    """The number in ``text`` times its unit, rounded down to whole microseconds or bytes."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise FieldError((key,), f"must be a positive number and a unit such as {example}, got {shown(text)}")
    number, unit = str(match["number"]), str(match["unit"])
    if unit not in units:
        raise FieldError((key,), _bad_unit(number, unit, units))
    # Integers, not floats or Decimal: exact, and the same whatever decimal context the program has set.
    whole, _, decimals = number.partition(".")
    digits = int(whole + decimals)
    result: int = digits * units[unit] // 10 ** len(decimals)
    if digits and not result:
        raise FieldError((key,), f"is too small: {shown(text)}")
    return result


def _bad_unit(number: str, unit: str, units: Mapping[str, int]) -> str:
    if not unit:
        return f"{number!r} has no unit; write one of {', '.join(f'{number}{known}' for known in units)}"
    # Prefixes cover what people write (30m, 2 hours, 500G); G stays a question, since tools differ on GB or GiB.
    wanted = unit.lower()
    near = [known for known in units if known.lower().startswith(wanted) or wanted.startswith(known.lower())]
    hint = f"; did you mean {' or '.join(f'{number}{known}' for known in near)}?" if near else ""
    return f"unknown unit {unit!r} (known: {', '.join(units)}){hint}"


def _no_unit(value: object, what: str, units: tuple[str, ...]) -> str:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, float) and math.isfinite(value)):
        number = shown(value)
        return f"{number} has no unit; write {', '.join(f'{number}{u}' for u in units[:-1])} or {number}{units[-1]}"
    return f"must be {what} such as {'30min' if what == 'a duration' else '500GB'}, got {shown(value)}"


__all__ = [
    "FieldError",
    "Key",
    "boolean",
    "choice",
    "count",
    "did_you_mean",
    "dotted",
    "duration",
    "format_duration",
    "format_fraction",
    "format_size",
    "fraction",
    "optional",
    "refuse_unknown",
    "roughly",
    "shown",
    "size",
]
