"""One flipped bit anywhere, a file cut, lengthened, missing or swapped: detected by restore and by verify."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.errors import (
    CheckpointerWarning,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from checkpointer.format import paths
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.support import training
from tests.support.forge import files_of, flip, overwrite

SETTINGS = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
ATTACHED = {"config.json": b'{"lr": 1}', "deep/notes.txt": b"attached"}
FILES = [
    "files/config.json",
    "files/deep/notes.txt",
    "index.json",
    "index.safetensors",
    "manifest.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "optimizer.safetensors",
    "state.safetensors",
]
TARGET = "checkpoint-2"


def components(steps: int) -> dict[str, object]:
    return training.at(steps, frozen=True).components


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2, with files of every kind."""
    root = tmp_path_factory.mktemp("template") / "run"
    for steps in (1, 2):
        with CheckpointManager(root, config=SETTINGS, **components(steps)) as manager:
            manager.save(steps, files=ATTACHED, metrics={"loss": 1.0 / steps})
    assert files_of(root / TARGET) == FILES
    return root


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


def reader(run: Path, live: training.Training) -> CheckpointManager:
    return CheckpointManager(run, config=SETTINGS, read_only=True, **live.components)


def assert_detected(run: Path, what: str, *, structural: bool = False) -> None:
    """Verify and restore report the damage of step 2, and the newest whole checkpoint is restored instead."""
    live = training.make(7, frozen=True)
    with silenced(), reader(run, live) as manager:
        report = manager.verify()
        assert not report.ok, what
        assert [item.step for item in report.checkpoints if not item.ok] == [2], f"{what}\n{report}"
        assert not manager.verify(2).ok if _listed(run) else True
        before = live.snapshot()
        with pytest.raises(CorruptCheckpointError) as raised:
            manager.restore(2, verify="before")
        assert str(run / TARGET) in str(raised.value), what
        training.assert_identical(live.snapshot(), before, f"{what}: live objects after a refused restore")
    live = training.make(8, frozen=True)
    with reader(run, live) as manager, pytest.warns(CheckpointerWarning, match="skipping a damaged checkpoint"):
        restored = manager.restore_latest()
    assert restored is not None
    assert restored.step == 1, what
    assert [skipped.step for skipped in restored.skipped] == [2], what
    assert str(run / TARGET) in restored.skipped[0].reason, what
    training.assert_at(live, 1, frozen=True)


def _listed(run: Path) -> bool:
    """Whether the manifest itself can be read, so that the step can be asked for."""
    with CheckpointManager(run, config=SETTINGS, read_only=True) as manager:
        return 2 in [info.step for info in manager.checkpoints()]


def interesting_positions(path: Path) -> list[int]:
    """Bytes of every region: header length, header, padding, the borders of tensors, first, middle and last."""
    data = path.read_bytes()
    size = len(data)
    found = {0, size // 2, size - 1}
    if path.suffix == ".safetensors":
        end = 8 + struct.unpack("<Q", data[:8])[0]
        padding = data[:end].rstrip(b" ")
        found |= {0, 7, 8, 9, len(padding) - 1, len(padding), end - 1, end, end + 1}
    found |= set(random.Random(path.name).sample(range(size), min(6, size)))
    return sorted(position for position in found if 0 <= position < size)


# -------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit_anywhere_in_a_file_is_detected(template, tmp_path, file):
    positions = interesting_positions(template / TARGET / file)
    for number, position in enumerate(positions):
        run = tmp_path / str(number)
        shutil.copytree(template, run)
        flip(run / TARGET / file, position, (position * 7 + number) % 8)
        assert_detected(run, f"bit of byte {position} of {file}")


@pytest.mark.parametrize("verify", ["stream", "before"])
def test_one_flipped_bit_of_any_tensor_is_detected_while_restoring(template, tmp_path, verify):
    repository = Repository(open_storage(template))
    with repository.open(repository.find(2)) as checkpoint:
        chunks = {name: chunk for name, (chunk,) in checkpoint.index.chunks.items() if chunk.end > chunk.begin}
    assert {component for component, _ in chunks} >= {"model", "optimizer", "rng"}
    for number, ((component, key), chunk) in enumerate(chunks.items()):
        run = tmp_path / str(number)
        shutil.copytree(template, run)
        flip(run / TARGET / chunk.file, random.Random(key).randrange(chunk.begin, chunk.end), number % 8)
        live = training.make(7, frozen=True)
        with silenced(), reader(run, live) as manager:
            with pytest.raises(CorruptCheckpointError, match=chunk.file):
                manager.restore(2, verify=verify)
            with pytest.raises(CorruptCheckpointError, match=key.split("/")[0]):
                manager.restore(2, verify=verify, components=[component])


def test_damage_that_was_not_read_does_not_stop_a_partial_restore_but_is_found_by_verify(run):
    flip(run / TARGET / "optimizer.safetensors", (run / TARGET / "optimizer.safetensors").stat().st_size - 1, 0)
    live = training.make(7, frozen=True)
    with silenced(), reader(run, live) as manager:
        manager.restore(2, components=["model"])
        assert not manager.verify(2).ok
    expected = training.at(2, frozen=True).model.state_dict()
    for key, value in live.model.state_dict().items():
        assert torch.equal(value, expected[key])


# -------------------------------------------------------------------------------------------- whole files


def cut(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def truncate(path: Path) -> None:
        data = path.read_bytes()
        overwrite(path, data[: keep(len(data))])

    return truncate


def lengthen(extra: bytes) -> Callable[[Path], None]:
    return lambda path: overwrite(path, path.read_bytes() + extra)


def by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def by_link_to_a_copy(path: Path) -> None:
    copy = path.parents[len(path.relative_to(path.parents[1]).parts)] / "elsewhere"
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def by_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def by_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "emptied": cut(lambda size: 0),
    "cut by one byte": cut(lambda size: size - 1),
    "cut to half": cut(lambda size: size // 2),
    "lengthened by a zero": lengthen(b"\0"),
    "lengthened by a line": lengthen(b"\n"),
    "deleted": Path.unlink,
    "replaced by a directory": by_directory,
    "replaced by a link to its copy": by_link_to_a_copy,
    "replaced by a link to itself": by_link_to_itself,
    "replaced by a dangling link": by_dangling_link,
    "replaced by a pipe": by_pipe,
    "zeroed": lambda path: overwrite(path, bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_detected(run, file, change):
    if (file, change) == ("manifest.json", "deleted"):
        pytest.skip("without its manifest it is no checkpoint: see the next test")
    CHANGES[change](run / TARGET / file)
    assert_detected(run, f"{file} {change}")


def test_without_its_manifest_a_directory_is_no_checkpoint_any_more(run):
    (run / TARGET / "manifest.json").unlink()
    live = training.make(7, frozen=True)
    with reader(run, live) as manager:
        assert [info.step for info in manager.checkpoints()] == [1]
        with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 2 .* there are 1"):
            manager.restore(2)
        with pytest.warns(CheckpointerWarning, match=r"checkpoint-2 holds files of a checkpoint .* without manifest"):
            restored = manager.restore_latest()
        assert restored is not None
        assert restored.step == 1
    training.assert_at(live, 1, frozen=True)


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_the_same_name_from_another_checkpoint_is_detected(run, file):
    own, other = run / TARGET / file, run / "checkpoint-1" / file
    if own.read_bytes() == other.read_bytes():
        pytest.skip("both checkpoints hold the same bytes under this name")
    overwrite(own, other.read_bytes())
    assert_detected(run, f"{file} of another checkpoint")


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize(
    "first, second", [SHARDS, ("optimizer.safetensors", "state.safetensors"), ("index.json", "manifest.json")]
)
def test_two_swapped_files_are_detected(run, first, second):
    one, two = (run / TARGET / first).read_bytes(), (run / TARGET / second).read_bytes()
    overwrite(run / TARGET / first, two)
    overwrite(run / TARGET / second, one)
    assert_detected(run, f"{first} and {second} swapped")


def test_two_swapped_manifests_are_detected(run):
    files = [run / f"checkpoint-{step}" / "manifest.json" for step in (1, 2)]
    one, two = (path.read_bytes() for path in files)
    overwrite(files[0], two)
    overwrite(files[1], one)
    live = training.make(7, frozen=True)
    with silenced(), reader(run, live) as manager:
        assert not manager.verify().ok
        assert len([item for item in manager.verify().checkpoints if not item.ok]) == 2
        with pytest.raises(CorruptCheckpointError, match=r"no valid checkpoint in .* \(2 damaged"):
            manager.restore_latest()


def test_a_renamed_checkpoint_is_not_taken_for_another_step(run):
    (run / TARGET).rename(run / "checkpoint-5")
    with silenced(), reader(run, training.make(7, frozen=True)) as manager:
        with pytest.raises(CorruptCheckpointError, match="files were swapped"):
            manager.restore(5)
        restored = manager.restore_latest()
        assert restored is not None
        assert (restored.step, [skipped.step for skipped in restored.skipped]) == (1, [5])


def test_a_copied_checkpoint_is_complete_in_itself(run, tmp_path):
    (tmp_path / "backup").mkdir()
    shutil.copytree(run / TARGET, tmp_path / "backup" / TARGET)
    shutil.rmtree(run)
    live = training.make(7, frozen=True)
    with reader(tmp_path / "backup", live) as manager:
        restored = manager.restore_latest()
        assert manager.verify().ok
    assert restored is not None
    training.assert_at(live, 2, frozen=True)


def test_if_all_are_damaged_the_error_names_each_of_them(run):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "state.safetensors").unlink()
    live = training.make(7, frozen=True)
    before = live.snapshot()
    expected = r"no valid checkpoint in .* \(2 damaged: .*checkpointer verify"
    with silenced(), reader(run, live) as manager, pytest.raises(CorruptCheckpointError, match=expected):
        manager.restore_latest()
    training.assert_identical(live.snapshot(), before)


# ------------------------------------------------------------------------------------------ extra files


def test_an_extra_file_is_reported_by_verify_and_ignored_by_restore(run):
    for name in ("mine.txt", "files/mine.txt", "model-00003-of-00003.safetensors", ".hidden"):
        (run / TARGET / name).write_bytes(b"not ours")
    (run / TARGET / "link").symlink_to("/etc/hostname")
    live = training.make(7, frozen=True)
    with reader(run, live) as manager:
        report = manager.verify()
        assert report.ok
        (found,) = [item for item in report.checkpoints if item.step == 2]
        assert found.extra == (".hidden", "files/mine.txt", "link", "mine.txt", "model-00003-of-00003.safetensors")
        assert "extra file: mine.txt" in str(report)
        restored = manager.restore_latest()
    assert restored is not None
    assert restored.step == 2
    training.assert_at(live, 2, frozen=True)


# ------------------------------------------------------------------------------- damage and retention


def test_damage_that_was_found_is_remembered_so_that_retention_does_not_count_on_it(run):
    state = run / TARGET / "state.safetensors"
    whole = state.read_bytes()
    flip(state, len(whole) - 1, 3)
    live = training.make(7, frozen=True)
    with silenced(), CheckpointManager(run, config={**SETTINGS, "keep": {"last": 1}}, **live.components) as manager:
        assert manager.restore_latest() is not None
        (damaged,) = [info for info in manager.checkpoints() if info.step == 2]
        assert damaged.damaged is not None
        assert "state.safetensors" in damaged.damaged
        kept = [info.step for info, _ in manager.prune(dry_run=True).keep]
        assert 1 in kept
        manager.prune()
        assert 1 in [info.step for info in manager.checkpoints()]
        restored = manager.restore_latest()
        assert restored is not None
        assert restored.step == 1


def test_damage_is_forgotten_once_a_restore_has_succeeded(run):
    state = run / TARGET / "state.safetensors"
    whole = state.read_bytes()
    flip(state, len(whole) - 1, 3)
    live = training.make(7, frozen=True)
    with silenced(), reader(run, live) as manager:
        manager.restore_latest()
        assert [info.step for info in manager.checkpoints() if info.damaged] == [2]
        overwrite(state, whole)
        restored = manager.restore_latest()
        assert restored is not None
        assert restored.step == 2
        assert [info.step for info in manager.checkpoints() if info.damaged] == []


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "emptied", "a directory", "other text"])
def test_a_damaged_note_counts_as_a_pin(run, damage):
    with CheckpointManager(run, config=SETTINGS, read_only=True) as evaluator:
        first = evaluator.checkpoints()[0]
        evaluator.annotate(first, metrics={"score": 0.5})
    (note,) = Path(run, paths.NOTES, first.id).iterdir()
    if damage == "a flipped bit":
        flip(note, 30, 1)
    elif damage == "cut":
        overwrite(note, note.read_bytes()[:-5])
    elif damage == "emptied":
        overwrite(note, b"")
    elif damage == "a directory":
        by_directory(note)
    else:
        overwrite(note, b"hello")
    live = training.make(7, frozen=True)
    with CheckpointManager(run, config={**SETTINGS, "keep": {"last": 1}}, **live.components) as manager:
        manager.restore_latest()
        manager.save(3)
        manager.prune()
        assert [info.step for info in manager.checkpoints()] == [1, 3]
        assert manager.checkpoints()[0].pinned


# --------------------------------------------------------------------------------------- object stores


ON_S3 = [("manifest.json", "cut"), ("index.json", "a flipped bit"), ("state.safetensors", "lengthened")]
"""Each file once. What differs from one object store to another is how bytes are fetched, not how they are judged."""


@pytest.mark.thorough(lambda object_root, file, change: object_root == "s3" and (file, change) not in ON_S3)
@pytest.mark.parametrize("change", ["a flipped bit", "cut", "deleted", "emptied", "lengthened"])
@pytest.mark.parametrize("file", ["manifest.json", "index.json", "state.safetensors"])
def test_damage_on_an_object_store_is_detected_too(object_root, file, change):
    if (file, change) == ("manifest.json", "deleted"):
        pytest.skip("without its manifest it is no checkpoint")
    root: Root = object_root
    live = {"value": 0, "tensor": torch.zeros(4)}
    with silenced():
        with CheckpointManager(root.url, storage_options=root.options, config=SETTINGS, state=live) as manager:
            for step in (1, 2):
                live["value"] = step
                manager.save(step)
            info = manager.checkpoints()[-1]
        storage = open_storage(root.url, root.options)
        place = f"{TARGET}/{file}" if file == "manifest.json" else f"{TARGET}/{info.id}/{file}"
        data = storage.read(place, 1 << 20)
        middle = len(data) // 2
        changed = {
            "a flipped bit": data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :],
            "cut": data[:-1],
            "emptied": b"",
            "lengthened": data + b"\n",
        }
        if change == "deleted":
            storage.remove(place)
        else:
            storage.put(place, changed[change])
        with CheckpointManager(
            root.url, storage_options=root.options, config=SETTINGS, read_only=True, state=live
        ) as reading:
            assert [item.step for item in reading.verify().checkpoints if not item.ok] == [2]
            with pytest.raises(CorruptCheckpointError):
                reading.restore(2)
            restored = reading.restore_latest()
    assert restored is not None
    assert (restored.step, live["value"], [skipped.step for skipped in restored.skipped]) == (1, 1, [2])


@pytest.mark.filterwarnings("ignore:.*has no lock that a dead owner frees")
def test_damage_on_an_object_store_is_found_and_survived(object_root: Root, stride: int) -> None:
    run = training.at(1, frozen=True)
    with CheckpointManager(object_root.url, storage_options=object_root.options, **run.components) as mgr:
        mgr.save(1)
        run.step()
        mgr.save(2)
    storage = open_storage(object_root.url, object_root.options)
    objects = [path for path in storage.fs.find(f"{storage._path}/checkpoint-2") if not path.endswith("manifest.json")]
    assert len(objects) == 7
    for path in objects:
        whole = storage.fs.cat_file(path)
        changed = (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 128]))
        for data in changed if stride == 1 or object_root.kind == "memory" else changed[1:2]:
            storage.fs.pipe_file(path, data)
            live = training.at(4, frozen=True)
            reader = CheckpointManager(
                object_root.url, storage_options=object_root.options, read_only=True, **live.components
            )
            with pytest.raises(CorruptCheckpointError):
                reader.restore(2)
        assert not reader.verify(2).ok
        with pytest.warns(CheckpointerWarning, match="skipping"):
            restored = reader.restore_latest()
        assert restored is not None
        assert restored.step == 1
        training.assert_at(live, 1, frozen=True)
        storage.fs.pipe_file(path, whole)
    assert reader.verify(2).ok


def test_a_module_that_is_all_frozen_is_protected_like_any_other(tmp_path):
    model = nn.Linear(8, 8)
    model.requires_grad_(False)
    with CheckpointManager(tmp_path / "run", config=SETTINGS, model=model) as manager:
        manager.save(1)
    (file,) = [name for name in files_of(tmp_path / "run" / "checkpoint-1") if name.startswith("model")]
    flip(tmp_path / "run" / "checkpoint-1" / file, -1, 0)
    with (
        silenced(),
        CheckpointManager(tmp_path / "run", config=SETTINGS, read_only=True, model=model) as manager,
        pytest.raises(CorruptCheckpointError),
    ):
        manager.restore_latest()
