"""Checking what users pass to the manager, before anything happens."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from checkpointer.config.metrics import accept_metrics, read_metrics
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


def check_tags(tags: Iterable[str] | None) -> tuple[str, ...]:
    """Tags as a tuple of strings without repeats."""
    if tags is None:
        return ()
    words = None if isinstance(tags, str) or not isinstance(tags, Iterable) else tuple(tags)
    if words is None or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"tags must be a sequence of strings, got {tags!r}")
    return tuple(dict.fromkeys(words))


Attachments: TypeAlias = Mapping[str, bytes | str | os.PathLike[str]]


def check_attachments(files: Attachments | None) -> Attachments:
    """Files to attach, by name: that they are bytes or paths. None is read yet.

    Raises:
        ConfigError: a name that would leave the checkpoint's directory, or content of another type.
    """
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise ConfigError(f"files must be a mapping such as {{'config.json': path}}, got {type(files).__name__}")
    for name, content in files.items():
        try:
            paths.check_relative(name)
        except CorruptCheckpointError as error:
            raise ConfigError(f"files: {error}") from None
        if not isinstance(content, (bytes, bytearray, memoryview, str, os.PathLike)):
            raise ConfigError(f"files[{name!r}] must be bytes or a path, got {type(content).__name__}")
    return files


def read_attachments(files: Attachments) -> dict[str, bytes]:
    """The content of files that were checked: given bytes, or read now from a path.

    Raises:
        OSError: a file that cannot be read.
    """
    return {
        name: Path(content).read_bytes() if isinstance(content, (str, os.PathLike)) else bytes(content)
        for name, content in files.items()
    }


class Extras(NamedTuple):
    """What a checkpoint holds beside the state."""

    metrics: dict[str, float]
    tags: tuple[str, ...]
    attachments: dict[str, bytes]


class Given(NamedTuple):
    """What ``save`` was given beside the state: checked by type alone at every call, read where a save is due."""

    metrics: Mapping[str, object]
    """Those that were reported; no device was asked for their values."""
    tags: tuple[str, ...]
    files: Attachments
    fault: ConfigError | None
    """What is wrong. Of several ranks, one that raised it alone would leave the others waiting in a due save."""

    def read(self, *, attachments: bool) -> Extras:
        """The values, and with ``attachments`` the content of the files.

        Raises:
            ConfigError: something is wrong, or a value cannot be read as a number.
            OSError: a file that cannot be read.
        """
        if self.fault is not None:
            raise self.fault
        return Extras(read_metrics(self.metrics), self.tags, read_attachments(self.files if attachments else {}))


def check_given(metrics: Mapping[str, object] | None, tags: Iterable[str], files: Attachments | None) -> Given:
    """Everything that ``save`` takes beside the state. Raises nothing: see ``Given.fault``."""
    try:
        return Given(accept_metrics(metrics), check_tags(tags), check_attachments(files), None)
    except ConfigError as error:
        return Given({}, (), {}, error)


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
