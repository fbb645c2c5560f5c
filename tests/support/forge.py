"""The one forger: changes the files of a checkpoint on disk, with or without making all hashes fit again.

``flip`` and ``overwrite`` do damage, which some hash shows. ``forge_manifest``, ``forge_index`` and :class:`Forgery`
make every hash that covers a change fit, as an attacker would; ``seal`` and ``seal_text`` do it for any text at all.
"""

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


def flip(path: str | Path, position: int = -1, bit: int = 0, *, in_place: bool = False) -> None:
    """Change one bit of a file: of its last byte, where nothing is said.

    ``in_place``: as a disk does it, so that every checkpoint which shares the file's bytes is damaged too.
    """
    path = Path(path)
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    if in_place:
        path.chmod(0o644)
        path.write_bytes(data)
    else:
        overwrite(path, bytes(data))


def digest(data: bytes) -> str:
    """The hash of a file, as a manifest gives it."""
    return xxhash.xxh3_128_hexdigest(data)


def fields_of(sealed: bytes) -> dict[str, Json]:
    """What a sealed file says, without its checksum."""
    fields = strict_json.unseal(sealed, "sealed file")
    fields.pop("checksum", None)
    return fields


def seal(fields: Json) -> bytes:
    """A sealed file of any JSON: also of what no writer would ever seal."""
    if isinstance(fields, dict) and fields:
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
        return seal_text("{\n" + ",\n".join(lines))
    return seal_text(json.dumps(fields))


def seal_text(head: str | bytes) -> bytes:
    """Any text with the checksum after it, as if it were sealed."""
    data = head if isinstance(head, bytes) else head.encode("utf-8", "surrogatepass")
    return data + b',\n  "checksum": "' + digest(data).encode("ascii") + b'"\n}\n'


class Forgery:
    """A committed checkpoint whose parts can be replaced; the hashes and sizes that cover them are made to fit."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = fields_of(self.read("manifest.json"))
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
        self.manifest["files"][path] = [len(data), digest(data)]

    def write_header(self, path: str, length: int) -> None:
        """Let the index say of a file's header what it is now, if it is ``length`` bytes long."""
        data = self.read(path)
        self.index["files"][path] = [min(length, len(data)), digest(data[:length])]

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
        self.write_header(path, 8 + length)


def forge_manifest(directory: str | Path, change: Callable[[dict[str, Json]], object]) -> None:
    """Apply ``change`` to the manifest's fields and seal it again; a dict that it returns takes their place."""
    forgery = Forgery(directory)
    replaced = change(forgery.manifest)
    forgery.write_manifest(seal(replaced) if isinstance(replaced, dict) else None)


def forge_index(directory: str | Path, change: Callable[[dict[str, Json]], object] | bytes) -> None:
    """Apply ``change`` to the index, or write other bytes in its place, and make the manifest agree with it."""
    forgery = Forgery(directory)
    if isinstance(change, bytes):
        forgery.write_index(change)
        return
    replaced = change(forgery.index)
    forgery.write_index(json.dumps(replaced).encode() if isinstance(replaced, dict) else None)


def files_of(directory: str | Path) -> list[str]:
    """Every file of a checkpoint, relative to it."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)
