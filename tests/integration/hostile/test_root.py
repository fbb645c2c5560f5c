"""A hostile or garbled run root: notes, records of unfinished work, links, and numbers that hurt only later."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError, CheckpointerWarning, SaveError
from checkpointer.format import paths
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.support import processes
from tests.support.forge import Forgery, seal

SETTINGS = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
ID = "0123456789abcdef" * 2

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([10**400, -(10**400), 1e308, -0.0])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
MANY = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.fixture(autouse=True)
def silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


def manager(root: Root, state: dict[str, int], **config: Any) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, config={**SETTINGS, **config}, state=state)


def save(root: Root, *steps: int) -> None:
    state = {"value": 0}
    with manager(root, state) as writer:
        for step in steps:
            state["value"] = step
            writer.save(step)


def assert_usable(root: Root, value: int) -> None:
    """A new writer restores the newest checkpoint, saves another, and all are whole."""
    state = {"value": -1}
    with manager(root, state) as writer:
        assert writer.restore_latest() is not None
        assert state["value"] == value
        writer.save(1000)
        assert writer.verify().ok
        assert writer.checkpoints()[-1].step == 1000


# ---------------------------------------------------------------------------------------------- notes


def test_a_note_with_any_content_is_read_or_counts_as_a_pin(memory):
    save(memory, 1)
    state = {"value": 0}
    with CheckpointManager(memory.url, read_only=True, state=state) as reader:
        (info,) = reader.checkpoints()
        storage = open_storage(memory.url)
        path = f"{paths.NOTES}/{info.id}/00000001-{'a' * 16}.json"
        note = {"pinned": None, "metrics": {"score": 1.0}, "tags": ["a"], "text": "x", "damaged": None}

        @MANY
        @given(st.dictionaries(st.sampled_from(list(note)), JSON, max_size=3), st.booleans())
        def check(changes: dict[str, Any], sealed: bool) -> None:
            data = seal({**note, **changes})
            storage.put(path, data if sealed else data[:-1])
            (found,) = reader.checkpoints()
            assert found.id == info.id
            if not sealed:
                assert found.pinned

        check()


@pytest.mark.parametrize("metric", [10**400, "high", None, True, [], {}])
def test_a_note_whose_metric_is_no_number_counts_as_a_pin(memory, metric):
    save(memory, 1)
    with CheckpointManager(memory.url, read_only=True) as reader:
        (info,) = reader.checkpoints()
        fields = {"pinned": None, "metrics": {"score": metric}, "tags": [], "text": None, "damaged": None}
        open_storage(memory.url).put(f"{paths.NOTES}/{info.id}/00000001-{'a' * 16}.json", seal(fields))
        (found,) = reader.checkpoints()
    assert found.pinned
    assert dict(found.metrics) == {}


def test_files_among_the_notes_that_are_no_notes_are_ignored(local):
    save(local, 1)
    notes = Path(local.url, paths.NOTES)
    (notes / "not-an-id").mkdir(parents=True)
    (notes / ID).mkdir()
    (notes / ID / "mine.txt").write_text("precious")
    (notes / "mine.txt").write_text("precious")
    assert_usable(local, 1)
    assert (notes / ID / "mine.txt").read_text() == "precious"
    assert (notes / "mine.txt").read_text() == "precious"


# ------------------------------------------------------------------------- records of unfinished work


def all_but_the_run(root: Root) -> dict[str, bytes]:
    """Every object beside the run root."""
    from fsspec.implementations.memory import MemoryFileSystem

    inside = "/" + root.url.removeprefix("memory://") + "/"
    return {path: file.getvalue() for path, file in MemoryFileSystem.store.items() if not path.startswith(inside)}


@pytest.fixture
def neighbour(memory):
    """Another run beside the one under attack."""
    other = Root("memory", f"{memory.url}-neighbour")
    save(other, 1)
    yield other
    storage = open_storage(other.url)
    storage.fs.rm(storage._path, recursive=True)  # type: ignore[attr-defined]


def names_of(neighbour: Root) -> list[str]:
    name = neighbour.url.removeprefix("memory://")
    place = f"{name}/checkpoint-1"
    return [f"../{place}", f"/{place}", f"x/../../{place}", "..", ".", "", "checkpoint-1/.."]


def test_a_forged_record_of_a_removal_deletes_nothing_but_that_checkpoint(memory, neighbour):
    save(memory, 1, 2)
    storage = open_storage(memory.url)
    other = open_storage(neighbour.url)
    manifest = other.read("checkpoint-1/manifest.json", paths.MANIFEST_LIMIT).decode()
    for number, name in enumerate([*names_of(neighbour), "checkpoint-2", "checkpoint-7", 3, None, ["checkpoint-2"]]):
        storage.put(f"{paths.TRASH}/{number:032x}.json", seal({"name": name, "manifest": manifest}))
    before = all_but_the_run(memory)
    assert_usable(memory, 2)
    assert all_but_the_run(memory) == before
    with manager(memory, {"value": 0}) as reader:
        assert [info.step for info in reader.checkpoints()] == [1, 2, 1000]


@MANY
@given(record=JSON, manifest=JSON, sealed=st.booleans())
def test_a_record_of_a_removal_with_any_content_stops_no_writer(record, manifest, sealed):
    root = Root("memory", "memory://records")
    storage = open_storage(root.url)
    with contextlib.suppress(FileNotFoundError):
        storage.fs.rm(storage._path, recursive=True)  # type: ignore[attr-defined]
    save(root, 1)
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    data = seal(record if isinstance(record, dict) else {"name": "checkpoint-1", "manifest": text})
    storage.put(f"{paths.TRASH}/{ID}.json", data if sealed else data[:-3])
    assert_usable(root, 1)
    storage.fs.rm(storage._path, recursive=True)  # type: ignore[attr-defined]


@pytest.mark.thorough(lambda object_root, record: object_root == "s3" and record != {"step": "../../x"})
@pytest.mark.parametrize(
    "record",
    [
        {"step": "1"}, {"step": -1}, {"step": True}, {"step": 1.0}, {"step": None}, {}, {"step": 10**30},
        {"step": "../../x"}, {"step": 1, "host": 7, "pid": "all"}, {"step": 1, "host": None, "pid": -1},
        {"step": 1, "pid": 10**30}, {"step": 1, "pid": 0},
    ],
    ids=repr,
)  # fmt: skip
def test_a_forged_record_of_an_attempt_stops_no_writer_and_deletes_no_checkpoint(object_root, record):
    import socket

    save(object_root, 1)
    storage = open_storage(object_root.url, object_root.options)
    (info,) = manager(object_root, {"value": 0}).checkpoints()
    for id in (ID, info.id, "not-an-id"):
        storage.put(f"{paths.TMP}/{id}.json", seal({"host": socket.gethostname(), **record}))
    assert_usable(object_root, 1)


def test_a_link_in_the_place_of_a_private_folder_leads_nowhere(local, tmp_path):
    save(local, 1)
    outside = tmp_path / "outside"
    for name in ("tmp", "trash", "notes"):
        folder = Path(local.url, ".checkpointer", name)
        target = outside / name / ID
        target.mkdir(parents=True)
        (target / f"00000001-{'a' * 16}.json").write_text("precious")
        (target / "index.json").write_text("precious")
        if folder.exists():
            folder.rmdir()
        folder.symlink_to(outside / name)
    state = {"value": 0}
    with manager(local, state, keep={"last": 1}) as writer:
        writer.restore_latest()
        writer.prune()
    assert state["value"] == 1
    for name in ("tmp", "trash", "notes"):
        assert len(os.listdir(outside / name / ID)) == 2


# ----------------------------------------------------------------------------- what hurts only later


@pytest.mark.parametrize("sequence", [2**63 - 1, 2**63 - 2])
def test_a_forged_sequence_never_makes_the_next_checkpoint_unreadable(local, sequence):
    save(local, 1)
    forgery = Forgery(Path(local.url, "checkpoint-1"))
    forgery.manifest["sequence"] = sequence
    forgery.write_manifest()
    state = {"value": 0}
    with manager(local, state) as writer:
        writer.restore_latest()
        if sequence == 2**63 - 1:
            with pytest.raises(SaveError, match=r"could not be read back.*sequence"):
                writer.save(2)
        else:
            writer.save(2)
        assert writer.verify().ok
        assert writer.restore_latest() is not None


def test_text_that_no_file_system_can_hold_stays_text(local):
    save(local, 1)
    forgery = Forgery(Path(local.url, "checkpoint-1"))
    forgery.manifest.update(tags=["\ud800", "\x00", "../..", "\x1b[31m"], metrics={"\ud800": 1.0, "": 2.0})
    forgery.write_manifest()
    with CheckpointManager(local.url, read_only=True) as reader:
        (info,) = reader.checkpoints()
        assert info.tags == ("\ud800", "\x00", "../..", "\x1b[31m")
        assert reader.verify().ok


def test_a_thousand_files_that_are_listed_exhaust_no_descriptors(local):
    save(local, 1)
    forgery = Forgery(Path(local.url, "checkpoint-1"))
    for number in range(1000):
        forgery.write(f"files/{number}", b"")
    forgery.write_index()
    script = """
        import resource, sys
        from checkpointer import CheckpointManager
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        state = {"value": 0}
        with CheckpointManager(sys.argv[1], read_only=True, state=state) as reader:
            report = reader.verify()
            reader.restore_latest()
        print(report.ok, state["value"])
    """
    arguments = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), local.url]
    done = processes.run(arguments)
    assert done.stdout.split() == ["True", "1"], done.stderr


@pytest.mark.parametrize("size", [2**40, 2**50])
def test_a_sparse_file_of_a_forged_size_is_refused_before_memory_is_asked_for(local, size):
    """The size is real this time: only the hash of a hole of a terabyte would tell, so structure must."""
    import torch

    state = {"weight": torch.zeros(4)}
    with CheckpointManager(local.url, config=SETTINGS, state=state) as writer:
        writer.save(1)
    forgery = Forgery(Path(local.url, "checkpoint-1"))
    entry = forgery.tensor("state", next(iter(forgery.index["components"]["state"]["tensors"])))
    path = entry["chunks"][0]["file"]
    place = forgery.directory / path
    try:
        os.truncate(place, size)
    except OSError:
        pytest.skip("this file system holds no file of that size")
    forgery.files[path]["size"] = size
    header = forgery.index["files"][path][0]
    forgery.index["components"]["state"]["tensors"] = {
        next(iter(forgery.index["components"]["state"]["tensors"])): {
            **entry,
            "dtype": "uint8",
            "shape": [size - header],
            "chunks": [{**entry["chunks"][0], "offsets": [0], "lengths": [size - header], "range": [header, size]}],
        }
    }
    forgery.index["components"].pop("rng")
    forgery.write_index()
    script = """
        import resource, sys, torch
        from checkpointer import CheckpointManager, errors
        state = {"weight": torch.zeros(4)}
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)
        try:
            CheckpointManager(sys.argv[1], read_only=True, state=state).restore(1, components=["state"])
        except errors.CheckpointerError as error:
            print(type(error).__name__, bool((state["weight"] == 0).all()))
    """
    arguments = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), local.url]
    done = processes.run(arguments)
    assert done.stdout.split()[1:] == ["True"], done.stderr


def test_every_error_of_a_hostile_root_is_typed(local):
    """Random bytes in every file of a root, one at a time."""
    save(local, 1, 2)
    files = sorted(path for path in Path(local.url).rglob("*") if path.is_file())

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(files), st.binary(max_size=80))
    def check(path: Path, data: bytes) -> None:
        whole = path.read_bytes()
        path.write_bytes(data)
        state = {"value": 0}
        try:
            with CheckpointManager(local.url, read_only=True, state=state) as reader:
                with contextlib.suppress(CheckpointerError):
                    reader.restore_latest()
                reader.verify()
                reader.checkpoints()
        finally:
            path.write_bytes(whole)

    check()
