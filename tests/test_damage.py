"""Damage of any kind, in any file, is found by restore and by verify; the run falls back and says why."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, CorruptCheckpointError
from tests.conftest import Root
from tests.training import assert_at, at

FILES = [
    "manifest.json",
    "index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "optimizer.safetensors",
    "state.safetensors",
    "files/config.json",
]


def save_two(root: str) -> list[Path]:
    """Checkpoints of steps 1 and 2 with every kind of file; after step n the training has done n steps."""
    training = at(1, frozen=True)
    paths = []
    with CheckpointManager(root, **training.components) as mgr:
        for step in (1, 2):
            if step > 1:
                training.step()
            handle = mgr.save(step, files={"config.json": b'{"layers": %d}' % step})
            assert handle is not None
            paths.append(Path(handle.result().path))
    return paths


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_two(str(tmp_path_factory.mktemp("pristine") / "run"))


@pytest.fixture
def run(pristine: list[Path], tmp_path: Path) -> list[Path]:
    """A copy of both checkpoints, to be damaged."""
    shutil.copytree(pristine[0].parent, tmp_path / "run")
    return [tmp_path / "run" / path.name for path in pristine]


def found_and_survived(run: list[Path]) -> None:
    """Step 2 is damaged: verify says so, restoring it fails, and restore_latest falls back to step 1, bit for bit."""
    live = at(5, seed=7, frozen=True)
    with CheckpointManager(run[0].parent, read_only=True, **live.components) as mgr:
        damaged = [report.step for report in mgr.verify().checkpoints if not report.ok]
        assert damaged == [2]
        with pytest.raises(CorruptCheckpointError):
            mgr.restore(2)
        with pytest.warns(CheckpointerWarning, match="skipping a damaged checkpoint"):
            restored = mgr.restore_latest()
    assert restored is not None
    assert restored.step == 1
    assert [item.step for item in restored.skipped] == [2]
    assert restored.skipped[0].reason
    assert_at(live, 1, frozen=True)


def positions(path: Path) -> list[int]:
    """Sampled offsets: the first and last bytes, both ends of a safetensors header, and a few between."""
    size = path.stat().st_size
    sampled = {0, 1, 7, 8, 9, size // 4, size // 2, 3 * size // 4, size - 55, size - 2, size - 1}
    if path.suffix == ".safetensors":
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        sampled |= {header - 1, header, header + 1}
    return sorted(position for position in sampled if 0 <= position < size)


def test_the_list_of_files_is_complete(pristine: list[Path]) -> None:
    assert sorted(str(path.relative_to(pristine[1])) for path in pristine[1].rglob("*") if path.is_file()) == sorted(
        FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found(run: list[Path], name: str) -> None:
    path = run[1] / name
    whole = path.read_bytes()
    live = at(0, frozen=True)
    with CheckpointManager(run[0].parent, read_only=True, **live.components) as mgr:
        for position, bit in zip(positions(path), itertools.cycle(range(8)), strict=False):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            path.write_bytes(data)
            assert not mgr.verify().ok, (position, bit)
            with pytest.raises(CorruptCheckpointError):
                mgr.restore(2)
    found_and_survived(run)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut in half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of the other checkpoint": lambda path: shutil.copy(str(path).replace("checkpoint-2", "checkpoint-1"), path),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to itself": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a link to its content": lambda path: (
        path.rename(path.with_name("moved-" + path.name)),
        path.symlink_to("moved-" + path.name),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found(run: list[Path], name: str, damage: str) -> None:
    same = (run[0] / name).read_bytes() == (run[1] / name).read_bytes()
    if damage == "of the other checkpoint" and same:
        assert name in ("model-00002-of-00002.safetensors", "model.safetensors.index.json")  # what never changes
        return
    DAMAGES[damage](run[1] / name)
    found_and_survived(run)


@pytest.mark.parametrize("name", [name for name in FILES if name != "manifest.json"])
def test_a_missing_file_is_found(run: list[Path], name: str) -> None:
    (run[1] / name).unlink()
    found_and_survived(run)


def test_two_files_of_one_checkpoint_that_changed_places_are_found(run: list[Path]) -> None:
    a, b, aside = run[1] / "optimizer.safetensors", run[1] / "model-00001-of-00002.safetensors", run[1].parent / "aside"
    a.rename(aside)
    b.rename(a)
    aside.rename(b)
    found_and_survived(run)


def test_a_directory_without_its_manifest_is_no_checkpoint(run: list[Path]) -> None:
    (run[1] / "manifest.json").unlink()
    live = at(0, frozen=True)
    with CheckpointManager(run[0].parent, read_only=True, **live.components) as mgr:
        restored = mgr.restore_latest()
    assert restored is not None
    assert (restored.step, restored.skipped) == (1, ())


def test_an_extra_file_is_reported_by_verify_and_ignored_by_restore(run: list[Path]) -> None:
    (run[1] / "files" / "extra.txt").write_text("mine")
    live = at(0, frozen=True)
    with CheckpointManager(run[0].parent, read_only=True, **live.components) as mgr:
        report = mgr.verify(2)
        assert report.ok
        assert report.checkpoints[0].extra == ("files/extra.txt",)
        assert "extra file: files/extra.txt" in str(report)
        restored = mgr.restore_latest()
    assert restored is not None
    assert restored.step == 2
    assert_at(live, 2, frozen=True)


@pytest.mark.filterwarnings("ignore:.*has no lock that a dead owner frees")
def test_damage_on_an_object_store_is_found_and_survived(object_root: Root) -> None:
    training = at(1, frozen=True)
    with CheckpointManager(object_root.url, storage_options=object_root.options, **training.components) as mgr:
        mgr.save(1)
        training.step()
        mgr.save(2)
    storage = mgr._repository.storage
    objects = [path for path in storage.fs.find(f"{storage._path}/checkpoint-2") if not path.endswith("manifest.json")]
    assert len(objects) == 6
    for path in objects:
        whole = storage.fs.cat_file(path)
        for data in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], whole[:-1] + bytes([whole[-1] ^ 128])):
            storage.fs.pipe_file(path, data)
            live = at(4, frozen=True)
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
        assert_at(live, 1, frozen=True)
        storage.fs.pipe_file(path, whole)
    assert reader.verify(2).ok
