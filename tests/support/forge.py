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

import numpy as np
import safetensors.numpy
import xxhash

from checkpointer.format import columns, strict_json
from checkpointer.format.index import ITEM_SIZES

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
    """A committed checkpoint of one process whose parts can be replaced; hashes and sizes are made to fit.

    ``index`` shows the two files of the index as one object: ``components`` by name, each with ``tensors`` by key, each
    with ``dtype``, ``shape``, and ``chunks`` of ``offsets``, ``lengths``, ``file``, ``range`` and ``xxh3``; ``files``
    has the length and the hash of the header of each tensor file. What is written of it is not checked, only cut to
    what a column holds. The attribute ``files`` lists every file beside the index as the index does.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = fields_of(self.read("manifest.json"))
        raw = json.loads(self.read("index.json"))
        self.columns, self.metadata = read_table(self.read("index.safetensors"))
        stored = json.loads(self.metadata["files"])
        self.files: dict[str, Json] = {entry["path"]: entry for entry in [*raw["files"], *stored]}
        self.index: dict[str, Json] = {
            "format": raw["format"],
            "version": raw["version"],
            "files": {entry["path"]: entry["header"] for entry in stored},
            "components": _components(raw["components"], self.columns, self.metadata),
        }

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
        if path in self.manifest["index"]:
            self.manifest["index"][path] = [len(data), digest(data)]
        else:
            self.files[path] = {**self.files.get(path, {"path": path}), "size": len(data), "xxh3": digest(data)}

    def write_header(self, path: str, length: int) -> None:
        """Let the index say of a file's header what it is now, if it is ``length`` bytes long."""
        data = self.read(path)
        self.index["files"][path] = [min(length, len(data)), digest(data[:length])]

    def write_index(self, data: bytes | None = None) -> None:
        """Write the index as it is now, or other bytes in the place of ``index.json``, then the manifest."""
        stored = [
            {**entry, "header": self.index["files"][path]}
            for path, entry in self.files.items()
            if self._is_tensor_file(path)
        ]
        plain = [entry for path, entry in self.files.items() if not self._is_tensor_file(path)]
        found = _Columns(self.index["components"], [entry["path"] for entry in stored])
        kept = {name: array for name, array in self.columns.items() if name.startswith(("param_", "part"))}
        metadata = {**self.metadata, **found.metadata, "files": json.dumps(stored)}
        self.write("index.safetensors", columns.pack({**found.columns, **kept}, metadata))
        head = {name: value for name, value in self.index.items() if name not in ("components", "files")}
        text = json.dumps({**head, "components": found.components, "files": plain})
        self.write("index.json", text.encode() if data is None else data)
        self.write_manifest()

    def _is_tensor_file(self, path: str) -> bool:
        return path in self.index["files"]

    def write_table(self, change: Callable[[dict[str, Json], dict[str, str]], object]) -> None:
        """Let ``change`` edit the columns, by name, and the texts of the table; then write it, and the manifest."""
        change(self.columns, self.metadata)
        self.write("index.safetensors", columns.pack(self.columns, self.metadata))
        self.write_manifest()

    def write_manifest(self, data: bytes | None = None) -> None:
        """Write the manifest as it is now, or other bytes in its place."""
        index = self.manifest["index"].values() if self.counts else ()
        listed = [*(entry["size"] for entry in self.files.values()), *(item[0] for item in index)]
        if data is None and self.counts and all(type(size) is int for size in listed):
            self.manifest.update(files=len(listed), size=sum(listed))
            self.manifest.pop("shared", None)
            for entry in self.files.values():
                if "shared" in entry:
                    shared = self.manifest.setdefault("shared", {})
                    shared[entry["shared"][0]] = shared.get(entry["shared"][0], 0) + entry["size"]
        overwrite(self.directory / "manifest.json", seal(self.manifest) if data is None else data)

    counts = True
    """Whether the totals of the manifest are made to fit."""

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


def read_table(data: bytes) -> tuple[dict[str, Json], dict[str, str]]:
    """The columns of a table, by name, and its texts."""
    (length,) = struct.unpack("<Q", data[:8])
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return dict(safetensors.numpy.load(data)), metadata


def _components(raw: list[Json], table: dict[str, Json], metadata: dict[str, str]) -> dict[str, Json]:
    """Components by name, with their tensors taken out of the table one by one."""
    dtypes, devices = json.loads(metadata["dtypes"]), json.loads(metadata["devices"])
    files = [entry["path"] for entry in json.loads(metadata["files"])]
    found: dict[str, Json] = {}
    text, place, dimension, number = table["keys"].tobytes(), 0, 0, 0
    stride, boxed = 0, 0
    strided, boxes = table.get("strided", np.empty(0)).tolist(), table.get("boxed", np.empty(0)).tolist()
    for entry in raw:
        tensors: dict[str, Json] = {}
        for _ in range(entry["tensors"]):
            length, ndim = int(table["key_lengths"][number]), int(table["ndim"][number])
            key = text[place : place + length].decode("utf-8", "surrogatepass")
            shape = table["shape"][dimension : dimension + ndim].tolist()
            tensor: dict[str, Json] = {"dtype": dtypes[table["dtype"][number]], "shape": shape, "chunks": []}
            if number in strided:
                tensor["strides"] = table["strides"][stride : stride + ndim].tolist()
                stride += ndim
            if devices[table["device"][number]] != "cpu":
                tensor["device"] = devices[table["device"][number]]
            for chunk in np.flatnonzero(table["chunk_tensor"] == number).tolist():
                offsets, lengths = [0] * ndim, list(shape)
                if chunk in boxes:
                    offsets = table["box_offsets"][boxed : boxed + ndim].tolist()
                    lengths = table["box_lengths"][boxed : boxed + ndim].tolist()
                    boxed += ndim
                begin = int(table["chunk_begin"][chunk])
                size = int(np.prod(lengths, dtype=np.int64)) * ITEM_SIZES[tensor["dtype"]]
                tensor["chunks"].append(
                    {
                        "offsets": offsets,
                        "lengths": lengths,
                        "file": files[table["chunk_file"][chunk]],
                        "range": [begin, begin + size],
                        "xxh3": table["chunk_hash"][chunk].tobytes().hex(),
                    }
                )
            tensors[key] = tensor
            number, place, dimension = number + 1, place + length, dimension + ndim
        rest = {name: value for name, value in entry.items() if name not in ("name", "tensors")}
        found[entry["name"]] = {**rest, "tensors": tensors}
    return found


class _Columns:
    """The inverse of :func:`_components`, which believes everything."""

    def __init__(self, components: dict[str, Json], files: list[str]) -> None:
        self.components = [
            {"name": name, **entry, "tensors": len(entry["tensors"])}
            if isinstance(entry, dict) and isinstance(entry.get("tensors"), dict)
            else {"name": name, "entry": entry}
            for name, entry in (components.items() if isinstance(components, dict) else ())
        ]
        tensors = [
            (key, tensor)
            for entry in components.values()
            if isinstance(entry, dict) and isinstance(entry.get("tensors"), dict)
            for key, tensor in entry["tensors"].items()
        ]
        texts = [key.encode("utf-8", "surrogatepass") for key, _ in tensors]
        dtypes = list(dict.fromkeys(str(tensor["dtype"]) for _, tensor in tensors))
        devices = list(dict.fromkeys(str(tensor.get("device", "cpu")) for _, tensor in tensors))
        chunks = [(number, chunk) for number, (_, tensor) in enumerate(tensors) for chunk in tensor["chunks"]]
        strided = [number for number, (_, tensor) in enumerate(tensors) if "strides" in tensor]
        boxed = [
            row
            for row, (number, chunk) in enumerate(chunks)
            if chunk["lengths"] != tensors[number][1]["shape"] or any(chunk["offsets"])
        ]
        self.metadata = {"dtypes": json.dumps(dtypes), "devices": json.dumps(devices)}
        self.columns: dict[str, Json] = {
            "key_lengths": np.array([len(text) for text in texts], np.uint32),
            "keys": np.frombuffer(b"".join(texts), np.uint8),
            "dtype": np.array([dtypes.index(str(tensor["dtype"])) for _, tensor in tensors], np.uint8),
            "ndim": np.array([len(tensor["shape"]) for _, tensor in tensors], np.uint8),
            "shape": np.array([size for _, tensor in tensors for size in tensor["shape"]], np.int64),
            "device": np.array([devices.index(str(tensor.get("device", "cpu"))) for _, tensor in tensors], np.uint16),
            "strided": np.array(strided, np.uint32),
            "strides": np.array([step for number in strided for step in tensors[number][1]["strides"]], np.int64),
            "chunk_tensor": np.array([number for number, _ in chunks], np.uint32),
            "chunk_file": np.array(
                [files.index(chunk["file"]) if chunk["file"] in files else len(files) for _, chunk in chunks], np.uint32
            ),
            "chunk_begin": np.array([chunk["range"][0] for _, chunk in chunks], np.int64),
            "chunk_hash": np.frombuffer(bytes.fromhex("".join(chunk["xxh3"] for _, chunk in chunks)), np.uint8).reshape(
                -1, 16
            ),
            "boxed": np.array(boxed, np.uint32),
            "box_offsets": np.array([start for row in boxed for start in chunks[row][1]["offsets"]], np.int64),
            "box_lengths": np.array([size for row in boxed for size in chunks[row][1]["lengths"]], np.int64),
        }


def forge_manifest(directory: str | Path, change: Callable[[dict[str, Json]], object]) -> None:
    """Apply ``change`` to the manifest's fields and seal it again; a dict that it returns takes their place."""
    forgery = Forgery(directory)
    forgery.counts = False
    replaced = change(forgery.manifest)
    forgery.write_manifest(seal(replaced) if isinstance(replaced, dict) else None)


def forge_index(directory: str | Path, change: Callable[[dict[str, Json]], object] | bytes) -> None:
    """Apply ``change`` to the index, or write other bytes for ``index.json``, and make the manifest agree with it."""
    forgery = Forgery(directory)
    if isinstance(change, bytes):
        forgery.write_index(change)
        return
    change(forgery.index)
    forgery.write_index()


def files_of(directory: str | Path) -> list[str]:
    """Every file of a checkpoint, relative to it."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)
