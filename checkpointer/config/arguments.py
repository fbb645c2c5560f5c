"""Checking what users pass to the manager, before anything happens."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from checkpointer.errors import ConfigError, CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.policy.values import shown

MAX_STEP = 10**18


def check_step(value: object, what: str = "step") -> int:
    """A non-negative integer (also of NumPy or a tensor), as an int.

    Raises:
        ConfigError: anything else.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # its TypeError is the check
    except TypeError:
        raise ConfigError(f"{what} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or not 0 <= number < MAX_STEP:
        raise ConfigError(f"{what} must be an integer from 0 on and below 10**18, got {_quoted(value)}")
    return number


def check_seconds(value: object, what: str, *, least: float) -> float:
    """A number of seconds, at least ``least``.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
        raise ConfigError(f"{what} must be a number of seconds, {least:g} or more; got {_quoted(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{what} must be a number of seconds that a float can hold; got {_quoted(value)}") from None


def _quoted(value: object) -> str:
    """As ``repr``, which refuses integers of thousands of digits."""
    return shown(value) if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def check_metrics(metrics: Mapping[str, object] | None) -> dict[str, float]:
    """Metrics as floats; numbers of NumPy and tensors with one element are converted.

    Raises:
        ConfigError: a name that is not a string, or a value that is not a real number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics must be a mapping such as {{'val_loss': 0.5}}, got {type(metrics).__name__}")
    checked = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"the names of metrics must be strings, got {name!r}")
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            checked[name] = float(value)  # type: ignore[arg-type]  # its TypeError is the check
        except OverflowError:
            raise ConfigError(f"metric {name!r} is too large for a float: {_quoted(value)}") from None
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(f"metric {name!r} must be a number, got {type(value).__name__}") from None
    return checked


def check_tags(tags: Iterable[str] | None) -> tuple[str, ...]:
    """Tags as a tuple of strings without repeats."""
    if tags is None:
        return ()
    words = () if isinstance(tags, str) else tuple(tags)
    if isinstance(tags, str) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"tags must be a sequence of strings, got {tags!r}")
    return tuple(dict.fromkeys(words))


def read_attachments(files: Mapping[str, bytes | str | os.PathLike[str]] | None) -> dict[str, bytes]:
    """The content of the files to attach: given bytes, or read now from a path.

    Raises:
        ConfigError: a name that would leave the checkpoint's directory, or content of another type.
        OSError: a file that cannot be read.
    """
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise ConfigError(f"files must be a mapping such as {{'config.json': path}}, got {type(files).__name__}")
    attachments = {}
    for name, content in files.items():
        try:
            paths.check_relative(name)
        except CorruptCheckpointError as error:
            raise ConfigError(f"files: {error}") from None
        if isinstance(content, (bytes, bytearray, memoryview)):
            attachments[name] = bytes(content)
        elif isinstance(content, (str, os.PathLike)):
            attachments[name] = Path(content).read_bytes()
        else:
            raise ConfigError(f"files[{name!r}] must be bytes or a path, got {type(content).__name__}")
    return attachments


class Extras(NamedTuple):
    """What a checkpoint holds beside the state."""

    metrics: dict[str, float]
    tags: tuple[str, ...]
    attachments: dict[str, bytes]


def check_extras(
    metrics: Mapping[str, object] | None,
    tags: Iterable[str],
    files: Mapping[str, bytes | str | os.PathLike[str]] | None,
) -> Extras:
    """Everything that ``save`` takes beside the state.

    Raises:
        ConfigError, OSError: as the checks of each.
    """
    return Extras(check_metrics(metrics), check_tags(tags), read_attachments(files))


def check_component_names(names: Iterable[str], reserved: Iterable[str]) -> None:
    """Names of components become names of files.

    Raises:
        ConfigError: a name that is no identifier, is reserved, or differs from another one only in case.
    """
    seen: dict[str, str] = {}
    for name in names:
        if not (name.isidentifier() and name.isascii()):
            raise ConfigError(f"component {name!r} must be named with letters, digits and underscores")
        if name in reserved:
            raise ConfigError(f"component {name!r}: this name is taken; the random generators are saved without asking")
        other = seen.setdefault(name.lower(), name)
        if other != name:
            raise ConfigError(f"components {other!r} and {name!r} differ only in case, which some file systems ignore")
