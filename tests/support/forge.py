"""Changing checkpoints on disk: damage that a hash shows, and forgeries whose hashes all fit."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from checkpointer.format import strict_json

Json = Any


def overwrite(path: str | Path, data: bytes) -> None:
    """Give a file other bytes, also where it is read-only or one of several hard links."""
    path = Path(path)
    path.unlink()
    path.write_bytes(data)


def seal(fields: Json) -> bytes:
    """A sealed file of any JSON: also of what no writer would ever seal."""
    if isinstance(fields, dict) and fields:
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return seal_text("{\n" + ",\n".join(lines))
    return seal_text(json.dumps(fields))


def seal_text(head: str | bytes) -> bytes:
    """Any text with the checksum after it, as if it were sealed."""
    data = head if isinstance(head, bytes) else head.encode("utf-8", "surrogatepass")
    return data + b',\n  "checksum": "' + xxhash.xxh3_128_hexdigest(data).encode("ascii") + b'"\n}\n'


class Forgery:
    """A committed checkpoint whose parts can be replaced; the hashes and sizes that cover them are made to fit."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest: dict[str, Json] = strict_json.unseal(self.read("manifest.json"), "manifest")
        self.manifest.pop("checksum", None)
        self.index: dict[str, Json] = json.loads(self.read("index.json"))

    def read(self, path: str) -> bytes:
        """A file of the checkpoint."""
        return (self.directory / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """Replace or add a file, and list it."""
        place = self.directory / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.unlink()
        place.write_bytes(data)
        self.manifest["files"][path] = [len(data), xxhash.xxh3_128_hexdigest(data)]

    def write_index(self, data: bytes | None = None) -> None:
        """Write the index as it is now, or other bytes in its place, then the manifest."""
        self.write("index.json", json.dumps(self.index).encode() if data is None else data)
        self.write_manifest()

    def write_manifest(self, data: bytes | None = None) -> None:
        """Write the manifest as it is now, or other bytes in its place."""
        overwrite(self.directory / "manifest.json", seal(self.manifest) if data is None else data)

    def tensor(self, component: str, key: str) -> dict[str, Json]:
        """One tensor's entry in the index."""
        found: dict[str, Json] = self.index["components"][component]["tensors"][key]
        return found

    def edit_header(self, path: str, edit: Callable[[dict[str, Json]], None]) -> None:
        """Change the safetensors header of a file without changing its length."""
        data = self.read(path)
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= length, "the new header does not fit"
        changed = data[:8] + text.ljust(length, b" ") + data[8 + length :]
        self.write(path, changed)
        self.index["files"][path] = [8 + length, xxhash.xxh3_128_hexdigest(changed[: 8 + length])]


def files_of(directory: str | Path) -> list[str]:
    """Every file of a checkpoint, relative to it."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)
