"""Reading a YAML file as plain data that remembers its lines.

Stricter than YAML: one document in UTF-8; no tags, so that nothing but null, booleans, numbers, text, lists and
mappings can come out; no duplicate keys; no base-60 and no octal numbers, which YAML 1.1 makes of ``1:30`` and
``010``. Every error is a :class:`ConfigError` that starts with ``path:line:``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from checkpointer.errors import ConfigError
from checkpointer.policy.values import Key, dotted, shown

# A real file has 40 lines and 4 levels. Aliases can make much out of little, so values are counted as they are built.
_MAX_BYTES = 64 * 1024
_MAX_DEPTH = 16
_MAX_VALUES = 10_000

_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


@dataclass(frozen=True)
class YamlFile:
    """The contents of one file."""

    path: str
    """The file's path as it was given."""
    data: Any
    """Nested dicts (text keys), lists, text, numbers, booleans and ``None``; ``None`` for an empty file."""
    lines: dict[Key, int]
    """Line, from 1, of each key and each list item."""

    def where(self, key: Key) -> str:
        """``path:line`` of ``key``, or of the closest enclosing key that the file holds."""
        while key and key not in self.lines:
            key = key[:-1]
        return f"{self.path}:{self.lines.get(key, 1)}"


def read_yaml(path: str | os.PathLike[str]) -> YamlFile:
    """Read the YAML file at ``path``. Raises :class:`ConfigError` for anything that is not as the module says."""
    name = os.fspath(path)
    text = _read_text(name)
    node = _compose(name, text)
    builder = _Builder(name)
    data = None if node is None else builder.build(node, (), depth=0)
    return YamlFile(name, data, builder.lines)


def _read_text(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot read the configuration: {reason} (looked from {Path.cwd()})") from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path}: larger than {_MAX_BYTES // 1024} KiB: is this a configuration file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8") from None


def _compose(path: str, text: str) -> yaml.Node | None:
    """The file's node tree, after a first look at its events: a tag or deep nesting never reaches the composer."""
    try:
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader))
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except ConfigError:  # a ValueError too, and already complete
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.reason}") from None
    except (ValueError, OverflowError) as error:  # PyYAML: an escape such as "\UFFFFFFFF" that is no character
        raise ConfigError(f"{path}:1: not valid YAML: {error}") from None


def _check_events(path: str, events: Any) -> None:
    depth = 0
    for event in events:
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise ConfigError(f"{path}:{line}: the YAML tag {shown(event.tag)} is not accepted; write the plain value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{path}:{line}: nested more than {_MAX_DEPTH} levels deep")


class _Builder:
    """Turns nodes into data and notes the line of each key."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lines: dict[Key, int] = {}
        self.values = 0

    def build(self, node: yaml.Node, key: Key, *, depth: int) -> object:
        self.values += 1
        if self.values > _MAX_VALUES or depth > _MAX_DEPTH:
            raise self.error(node, "aliases make this file too large")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, key, depth)
        return self._scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key, depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            # The key's own text, since YAML 1.1 reads a key `on` as True. A list or mapping as key has no text.
            name = key_node.value
            if not isinstance(name, str):
                raise self.error(key_node, f"a key of {dotted(key) or 'this file'} must be plain text")
            here = (*key, name)
            if name in result:
                raise self.error(key_node, f"{dotted(here)}: duplicate key, first given in line {self.lines[here]}")
            self.lines[here] = _line(key_node)
            result[name] = self.build(value_node, here, depth=depth + 1)
        return result

    def _sequence(self, node: yaml.SequenceNode, key: Key, depth: int) -> list[object]:
        result: list[object] = []
        for index, item in enumerate(node.value):
            self.lines[(*key, index)] = _line(item)
            result.append(self.build(item, (*key, index), depth=depth + 1))
        return result

    def _scalar(self, node: yaml.Node, key: Key) -> object:
        kind, text = node.tag.rsplit(":", 1)[-1], shown(node.value)
        if node.tag not in _PLAIN_TAGS:
            raise self.error(node, f"{dotted(key)}: YAML reads {text} as a {kind}; put it in quotes if it is text")
        if kind in ("int", "float") and ":" in node.value:
            raise self.error(node, f"{dotted(key)}: YAML reads {text} as a number to base 60; write 90min or the like")
        if kind == "int" and _OCTAL.fullmatch(node.value):
            raise self.error(node, f"{dotted(key)}: YAML reads {text} as an octal number; drop the leading zero")
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except ValueError:  # Python reads no integer of more than 4300 digits
            raise self.error(node, f"{dotted(key)}: not a number: {text}") from None

    def error(self, node: yaml.Node, problem: str) -> ConfigError:
        return ConfigError(f"{self.path}:{_line(node)}: {problem}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


__all__ = ["YamlFile", "read_yaml"]
