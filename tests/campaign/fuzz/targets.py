"""What is fuzzed: everything that is read from a run root or from a user's file, and what must hold for any bytes.

A target takes one input and says ``accepted`` or ``refused``; whatever else happens is a finding: an error that is not
typed, one that takes long, a live object that a refused restore has changed, a file that was touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import random as random_numbers
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from checkpointer import CheckpointManager, Config
from checkpointer.errors import CheckpointerError, ConfigError, CorruptCheckpointError
from checkpointer.format.columns import pack
from checkpointer.format.index import Index
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.format.table import parse_index
from checkpointer.format.tensor_files import check_header
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.lock import described, read_owner
from checkpointer.repository.notes import Note, read_notes
from checkpointer.repository.repository import Repository
from checkpointer.state.tree.decode import decode, skeleton
from checkpointer.storage import open_storage
from scripts import make_golden as golden
from tests.campaign.exact_resume.runs import Run, snapshot
from tests.support.compare import assert_identical
from tests.support.forge import Forgery, overwrite, read_table, seal
from tests.support.mutations import any_json, change_bytes, change_json, text_of

Verdict: TypeAlias = Literal["accepted", "refused"]

CHECKPOINTS = sorted(path.parent for path in golden.FOLDER.glob("*/checkpoint-*/manifest.json"))
NOTES = sorted(golden.FOLDER.glob("*/.checkpointer/notes/*/*.json"))
CONFIGS = sorted((golden.ROOT / "configs").glob("*.yaml"))
OWNER = b'{"host": "node-1", "pid": 4711, "since": "2026-11-22T10:00:00+00:00", "user": "me"}\n'


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    make: Callable[[Random], Any]
    """An input: a mutated real file, or one made from nothing."""
    take: Callable[[Any, Path], Verdict]
    """Read it; the folder is empty, and its own."""


def judged(read: Callable[[], object], allowed: type[Exception] = CheckpointerError) -> Verdict:
    """``refused`` for a typed error, which is all that may be raised."""
    try:
        read()
    except allowed as error:
        said = str(error)
    else:
        return "accepted"
    assert said, "an error that says nothing"
    assert len(said) < 20_000, "an error that says everything"
    return "refused"


def _either(original: bytes, random: Random, finish: Callable[[Any], bytes] | None = None) -> bytes:
    """Bytes changed as bytes, or as JSON; with ``finish`` in its place also as JSON that is sealed again."""
    kind = random.randint(0, 3)
    if kind == 0:
        return change_bytes(original, random)
    if kind == 3:
        return text_of(any_json(random), random) if finish is None else finish(any_json(random))
    changed = change_json(json.loads(original), random)
    return text_of(changed, random) if finish is None or kind == 1 else finish(changed)


# --------------------------------------------------------------------------------------------- manifest, index, header


def _reseal(value: Any) -> bytes:
    if isinstance(value, dict):
        value.pop("checksum", None)
    return seal(value)


def make_manifest(random: Random) -> bytes:
    return _either((random.choice(CHECKPOINTS) / "manifest.json").read_bytes(), random, _reseal)


def take_manifest(data: bytes, _: Path) -> Verdict:
    def read() -> None:
        manifest = parse_manifest(data, "manifest")
        info = manifest.info("here")
        assert isinstance(manifest, Manifest)
        assert info.step >= 0
        repr(info)

    return judged(read)


def _index_of(checkpoint: Path) -> tuple[bytes, bytes]:
    manifest = parse_manifest((checkpoint / "manifest.json").read_bytes(), "golden")
    text, table = ((checkpoint / manifest.place(path)).read_bytes() for path in ("index.json", "index.safetensors"))
    return text, table


def make_index(random: Random) -> tuple[bytes, bytes]:
    text, table = _index_of(random.choice(CHECKPOINTS))
    kind = random.randint(0, 3)
    if kind == 0:
        return _either(text, random), table
    if kind == 1:
        return text, change_bytes(table, random)
    columns, texts = read_table(table)
    name = random.choice(sorted(columns))
    if kind == 2 and columns[name].size:
        columns[name] = columns[name].copy()
        for _ in range(random.randint(1, 3)):
            columns[name].flat[random.randrange(columns[name].size)] = random.choice(
                [0, 1, 2, 255, random.randrange(256), np.iinfo(columns[name].dtype).max]
            )
    elif kind == 3 and random.randint(0, 1):
        columns[name] = columns[name][: random.randint(0, len(columns[name]))]
    else:
        key = random.choice(sorted(texts))
        texts[key] = change_bytes(texts[key].encode(), random).decode("utf-8", "replace")
    return text, pack(columns, texts)


def take_index(made: tuple[bytes, bytes], _: Path) -> Verdict:
    text, table = made

    def read() -> None:
        index = parse_index(text, table, "index")
        claimed = sum(spec.nbytes for part in index.components.values() for spec in part.tensors.values())
        assert claimed <= sum(record.size for record in index.files.values()), "tensors larger than the files"
        assert all(chunk.end <= index.files[chunk.file].size for found in index.chunks.values() for chunk in found)

    return judged(read)


def make_header(random: Random) -> tuple[bytes, Index, str]:
    checkpoint = random.choice(CHECKPOINTS)
    index = parse_index(*_index_of(checkpoint), "golden")
    path = random.choice(sorted(index.headers))
    length = index.headers[path][0]
    file = next(checkpoint.rglob(path)).read_bytes()[8:length]
    return struct.pack("<Q", length - 8) + _either(file, random), index, path


def take_header(made: tuple[bytes, Index, str], _: Path) -> Verdict:
    header, index, path = made
    chunks = [
        (index.components[component].tensors[key].dtype, chunk)
        for (component, key), parts in index.chunks.items()
        for chunk in parts
        if chunk.file == path
    ]
    return judged(lambda: check_header(header, chunks, "header"), CorruptCheckpointError)


# ----------------------------------------------------------------------------------------------- configuration, trees


def make_config(random: Random) -> bytes:
    original = random.choice(CONFIGS).read_bytes()
    if random.randint(0, 2):
        return change_bytes(original, random)
    import yaml

    return yaml.safe_dump(change_json(yaml.safe_load(original), random), allow_unicode=True).encode(
        "utf-8", "surrogatepass"
    )


def take_config(data: bytes, folder: Path) -> Verdict:
    path = folder / "run.yaml"
    path.write_bytes(data)

    def read() -> None:
        config = Config.from_yaml(path)
        (folder / "again.yaml").write_text(config.to_yaml(), encoding="utf-8")
        assert Config.from_yaml(folder / "again.yaml") == config

    return judged(read, ConfigError)


@dataclass(frozen=True)
class Tree:
    """A component's tree, and tensors for it to refer to."""

    tree: Any
    tensors: dict[str, torch.Tensor]


def _components() -> list[tuple[Any, dict[str, Any]]]:
    found = []
    for checkpoint in CHECKPOINTS:
        index = parse_index(*_index_of(checkpoint), "golden")
        found += [(part.tree, dict(part.tensors)) for part in index.components.values()]
    return found


COMPONENTS = _components()


def make_tree(random: Random) -> Tree:
    from checkpointer.state.tensors import empty_for

    tree, specs = random.choice(COMPONENTS)
    changed = change_json({"tree": tree}, random).get("tree") if random.randint(0, 3) else any_json(random, 5)
    with contextlib.suppress(ValueError, RecursionError):  # as it comes out of a file
        changed = json.loads(json.dumps(changed))
    return Tree(changed, {key: empty_for(spec).zero_() for key, spec in specs.items() if "float4" not in spec.dtype})


def take_tree(made: Tree, _: Path) -> Verdict:
    from checkpointer.state.tensors import spec_of

    specs = {key: spec_of(tensor) for key, tensor in made.tensors.items()}

    def read() -> None:
        skeleton(made.tree, specs, place="state")
        decode(made.tree, made.tensors)

    return judged(read)


# ----------------------------------------------------------------------------------------------------- notes, owners


def make_note(random: Random) -> bytes:
    return _either(random.choice(NOTES).read_bytes(), random, _reseal)


def take_note(data: bytes, folder: Path) -> Verdict:
    """A note never raises: one that cannot be read counts as a pin."""
    place = folder / ".checkpointer" / "notes" / ("0" * 32) / "00000001-0123456789abcdef.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    (note,) = read_notes(open_storage(folder), "0" * 32)
    assert isinstance(note, Note)
    return "refused" if note == Note(pinned=True) else "accepted"


def make_owner(random: Random) -> bytes:
    return _either(OWNER, random)


def take_owner(data: bytes, folder: Path) -> Verdict:
    """Who holds the lock is told to people, and to their terminals."""
    path = folder / "owner.json"
    path.write_bytes(data)
    text = described(read_owner(path))
    assert len(text) < 2000, "a message without end"
    assert text.isprintable(), "control characters in a message"
    return "refused" if "has not said" in text else "accepted"


# ---------------------------------------------------------------------------------------------------- whole run roots


@dataclass(frozen=True)
class Damage:
    """A change to one file of a run, made where it lies."""

    root: str
    path: str
    seed: int
    fits: bool
    """Whether the hashes that cover it are made to fit."""


def _files(root: str) -> list[str]:
    folder = golden.FOLDER / root
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


ROOTS = {root: _files(root) for root in ("local", "exported")}


def make_damage(random: Random) -> Damage:
    root = random.choice(sorted(ROOTS))
    return Damage(root, random.choice(ROOTS[root]), random.randint(0, 2**32), bool(random.randint(0, 2)))


def do_damage(damage: Damage, root: Path) -> None:
    """Change the file; of a checkpoint without a folder for its data all hashes can be made to fit."""
    random, place = Random(damage.seed), root / damage.path
    data = place.read_bytes()
    directory = root / damage.path.split("/")[0]
    if damage.fits and damage.root == "local" and (directory / "manifest.json").exists():
        _forge(Forgery(directory), place, random)
    else:
        overwrite(place, change_bytes(data, random))


def _forge(forgery: Forgery, place: Path, random: Random) -> None:
    path = str(place.relative_to(forgery.directory))
    if path == "manifest.json":
        forgery.write_manifest(_reseal(change_json(forgery.manifest, random)))
    elif path == "index.json":
        forgery.write_index(text_of(change_json(json.loads(forgery.read(path)), random), random))
    elif path == "index.safetensors":
        forgery.write(path, change_bytes(forgery.read(path), random))
        forgery.write_manifest()
    else:
        forgery.write(path, change_bytes(place.read_bytes(), random))
        if path in forgery.index["files"] and random.randint(0, 1):
            forgery.write_header(path, forgery.index["files"][path][0])
        forgery.write_index()


def live_components() -> dict[str, Any]:
    """As a program has them that resumes: nothing of what is saved."""
    live = golden.components()
    return {name: {} if isinstance(part, dict) else part for name, part in live.items()}


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    states = random_numbers.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random_numbers.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def take_damage(damage: Damage, folder: Path) -> Verdict:
    """Restore, verify, list and examine: typed errors only, no file touched, no live object changed by a refusal.

    A reader that finds damage leaves a note of it, which is all that it may write.
    """
    golden.register()
    root = folder / "run"
    shutil.copytree(golden.FOLDER / damage.root, root)
    do_damage(damage, root)
    before = _contents(folder)
    live = live_components()
    parts = Run(live, lambda _: 0.0)
    state_before = snapshot(parts)
    with warnings.catch_warnings(), generators_kept():
        warnings.simplefilter("ignore")
        with CheckpointManager(root, read_only=True, **live) as manager:
            verdict = judged(lambda: manager.restore_latest(components=[*live, "rng"], strict=False, verify="before"))
            if verdict == "refused":
                assert_identical(snapshot(parts), state_before, "live objects after a refusal")
            judged(manager.verify)
            judged(manager.checkpoints)
            judged(lambda: manager.prune(dry_run=True))
        judged(Doctor(Repository(open_storage(root))).examine)
    after = _contents(folder)
    assert {path: after.get(path) for path in before} == before, "a reader changed files"
    assert all(path.startswith("run/.checkpointer") for path in after.keys() - before.keys()), "a reader made files"
    return verdict


def _contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


TARGETS = (
    Target("manifest", make_manifest, take_manifest),
    Target("index", make_index, take_index),
    Target("header", make_header, take_header),
    Target("config", make_config, take_config),
    Target("tree", make_tree, take_tree),
    Target("note", make_note, take_note),
    Target("owner", make_owner, take_owner),
    Target("run", make_damage, take_damage),
)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """In memory where there is such a place."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place, prefix="fuzz-") as folder:
        yield Path(folder)


__all__ = ["TARGETS", "Target", "Verdict", "empty_folder"]
