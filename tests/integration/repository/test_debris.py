"""What systems leave in checkpoints without being asked: it goes with them, and nothing of anybody else's does."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.format import paths
from checkpointer.repository import debris
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, Storage, open_storage
from checkpointer.testing import Fault, faulty
from tests.conftest import Root
from tests.integration.repository.test_unremovable import refusing, silenced

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
DEBRIS = (".DS_Store", "._model.safetensors", "THUMBS.DB", "Desktop.ini", "files/.DS_Store", "empty/inner/._x")
OPEN = ".nfs000000000001a2b300000004"


@pytest.fixture(autouse=True)
def no_lock_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no lock that a dead owner frees")
        yield


def manager(root: Root, **config: Any) -> CheckpointManager:
    live = {"tensor": torch.zeros(3)}
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=live)


def save(mgr: CheckpointManager, *steps: int, **options: Any) -> None:
    """Each also until it is pruned."""
    for step in steps:
        mgr.save(step, **options)
        mgr._saver.wait()


def storage_of(root: Root) -> Storage:
    return open_storage(root.url, root.options)


def litter(root: Root, directory: str, names: tuple[str, ...] = DEBRIS) -> None:
    for name in names:
        storage_of(root).put(f"{directory}/{name}", b"left by the system")


def left(root: Root) -> list[str]:
    """Every file and every directory of the run but those of committed checkpoints and of the lock."""
    storage = storage_of(root)
    top = [entry.name for entry in storage.list_directory("") if not storage.exists(f"{entry.name}/{paths.MANIFEST}")]
    private = [
        f"{folder}/{entry.name}"
        for folder in (paths.TMP, paths.TRASH, paths.QUARANTINE, paths.NOTES)
        for entry in storage.list_directory(folder)
    ]
    return sorted({*top, *private} - {paths.PRIVATE})


# ------------------------------------------------------------------------------------------ with the checkpoint


def test_debris_goes_with_the_checkpoint_that_is_pruned_and_nobody_hears_of_it(root: Root) -> None:
    with manager(root, keep={"last": 1}) as mgr:
        save(mgr, 1)
        data = mgr._repository.manifest(mgr.latest()).data
        litter(root, "checkpoint-1")
        if data:
            litter(root, f"checkpoint-1/{data}")
        save(mgr, 2)  # a warning would be an error
        assert [info.step for info in mgr.checkpoints()] == [2]
    assert left(root) == []


def test_debris_goes_with_the_checkpoint_that_is_replaced(root: Root) -> None:
    with manager(root) as mgr:
        save(mgr, 1)
        data = mgr._repository.manifest(mgr.latest()).data
        litter(root, f"checkpoint-1/{data}" if data else "checkpoint-1")
        save(mgr, 1, overwrite=True)
        assert mgr.verify().checkpoints[0].extra == ()
    assert left(root) == []


def test_debris_goes_with_the_checkpoint_that_is_removed_in_place(local: Root) -> None:
    with refusing(errno.EXDEV, "checkpoint-1"), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        litter(local, "checkpoint-1")
        save(mgr, 2)
    assert left(local) == []


def test_debris_goes_where_a_removal_was_interrupted(local: Root) -> None:
    with manager(local) as mgr:
        save(mgr, 1, 2)
        ids = {info.step: info.id for info in mgr.checkpoints()}
    trash = Path(local.url, paths.TRASH)
    trash.mkdir(exist_ok=True)
    os.rename(Path(local.url, "checkpoint-1"), trash / ids[1])
    litter(local, f"{paths.TRASH}/{ids[1]}")
    litter(local, f"{paths.TRASH}/{'a' * 32}")  # its manifest is gone already
    with manager(local) as mgr:
        mgr.restore_latest()
    assert left(local) == []


def test_what_is_somebodys_survives_with_a_warning_and_the_debris_beside_it_goes(root: Root) -> None:
    with manager(root, keep={"last": 1}) as mgr:
        save(mgr, 1)
        litter(root, "checkpoint-1", (*DEBRIS, "mine.txt", "DS_Store", "._", "thumbs.db.txt"))
        with pytest.warns(CheckpointerWarning, match="did not write"):
            save(mgr, 2)
    storage = storage_of(root)
    kept = Path(paths.QUARANTINE, storage.list_directory(paths.QUARANTINE)[0].name) if root.kind == "local" else None
    directory = str(kept) if kept else "checkpoint-1"
    names = [entry.name for entry in storage.list_directory(directory)]
    assert sorted(names) == ["._", "DS_Store", "mine.txt", "thumbs.db.txt"]


def test_only_a_file_is_debris(local: Root) -> None:
    with manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        Path(local.url, "checkpoint-1", "._directory").mkdir()
        Path(local.url, "checkpoint-1", "._directory", "mine.txt").write_text("precious")
        Path(local.url, "checkpoint-1", ".DS_Store").symlink_to("/etc/hostname")
        with pytest.warns(CheckpointerWarning, match="quarantine"):
            save(mgr, 2)
    (kept,) = Path(local.url, paths.QUARANTINE).iterdir()
    assert sorted(os.listdir(kept)) == [".DS_Store", "._directory"]


def test_a_file_that_the_manifest_lists_is_content_whatever_its_name(root: Root) -> None:
    attached = {name: name.encode() for name in (".DS_Store", "._x", "Thumbs.db", OPEN)}
    with manager(root, keep={"last": 1}) as mgr:
        save(mgr, 1, files=attached)
        assert mgr.verify().checkpoints[0].extra == ()
        assert Doctor(mgr._repository).examine().ok
        place = f"checkpoint-1/{mgr._repository.manifest(mgr.latest()).place('files/Thumbs.db')}"
        storage_of(root).remove(place)
        assert not mgr.verify().ok
        storage_of(root).put(place, attached["Thumbs.db"])
        assert mgr.verify().ok
        save(mgr, 2)
        assert [info.step for info in mgr.checkpoints()] == [2]
    assert left(root) == []


def test_debris_among_the_notes_of_a_checkpoint_goes_with_them(local: Root) -> None:
    with manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        mgr.annotate(1, note="a note")
        litter(local, f"{paths.NOTES}/{mgr.latest().id}", (".DS_Store",))
        save(mgr, 2)
    assert left(local) == []


@pytest.mark.parametrize("how", ["prune", "replace"])
def test_wherever_a_removal_ends_the_next_writer_clears_the_debris_and_leaves_what_is_open(
    tmp_path: Path, how: str
) -> None:
    """The storage changes nothing more from one operation on, as where a process has died."""
    base = Root("local", str(tmp_path / "base"))
    with manager(base) as mgr:
        save(mgr, 1, 2)
    litter(base, "checkpoint-2", (".DS_Store", "inner/._x", OPEN))
    for at in range(1, 200):
        root = Root("local", str(tmp_path / str(at)))
        shutil.copytree(base.url, root.url)
        fault = Fault("EIO", at=at, forever=True, on=["remove", "remove_directory", "rename", "exchange"])
        fault.end()
        with faulty(fault), silenced():
            mgr = manager(root, keep={"last": 1} if how == "prune" else {})
            mgr.restore_latest()
            fault.restart()
            with contextlib.suppress(OSError):
                save(mgr, 3) if how == "prune" else mgr.save(2, overwrite=True)
            fault.end()
            with contextlib.suppress(OSError):
                mgr.close()
        with manager(root, keep={"last": 1}) as writer:
            writer.restore_latest()  # a warning would be an error
            writer.prune()
            assert writer.verify().ok
        left_open = {Path(path).parent for path in Path(root.url).rglob(OPEN)}
        assert {path.parent.name for path in left_open} <= {"trash", str(at)}, at
        assert set(left(root)) == {str(path.relative_to(root.url)) for path in left_open if path.parent.name == "trash"}
        shutil.rmtree(root.url)
        if not fault.reached:
            return
    raise AssertionError("it never ends")


# ------------------------------------------------------------------------------------------------ files still open


@pytest.mark.parametrize("how", ["prune", "replace", "in place"])
def test_a_file_that_is_open_somewhere_is_left_in_silence_and_its_directory_goes_at_the_next_chance(
    local: Root, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client of NFS gives such a file a name of this form, and removes it when it is closed."""
    caplog.set_level(logging.DEBUG, "checkpointer")
    with refusing(errno.EXDEV, *["checkpoint-1"] * (how == "in place")), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        litter(local, "checkpoint-1", (OPEN, ".DS_Store"))
        if how == "replace":
            save(mgr, 1, overwrite=True)
        save(mgr, 2, 3)  # a warning would be an error
        assert [info.step for info in mgr.checkpoints()] == [3]
        (found,) = Path(local.url).rglob(OPEN)
        assert os.listdir(found.parent) == [OPEN]
        assert Doctor(Repository(storage_of(local))).examine().findings[0].kind == "busy"
        found.unlink()
        mgr.prune()
        assert left(local) == []
    said = [record for record in caplog.records if OPEN in record.getMessage()]
    assert said
    assert {record.levelno for record in said} == {logging.DEBUG}


@pytest.mark.parametrize("in_place", [False, True])
def test_the_next_writer_takes_over_what_waits_and_the_doctor_names_it_when_it_takes_long(
    local: Root, *, in_place: bool
) -> None:
    with refusing(errno.EXDEV, *["checkpoint-1"] * in_place), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        litter(local, "checkpoint-1", (OPEN,))
        save(mgr, 2)
    (found,) = Path(local.url).rglob(OPEN)
    examine = Doctor(Repository(storage_of(local))).examine
    assert examine().findings == ()
    with mock.patch.object(LocalStorage, "age", return_value=2 * 86400.0):
        (finding,) = examine().findings
    assert (finding.kind, finding.level, finding.path) == ("still-open", "note", str(found.parent))
    with manager(local) as mgr:
        mgr.restore_latest()  # a warning would be an error
    assert found.exists()
    found.unlink()
    with manager(local) as mgr:
        mgr.restore_latest()
    assert left(local) == []


def test_beside_somebodys_file_one_that_is_open_changes_nothing(local: Root) -> None:
    with manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        litter(local, "checkpoint-1", (OPEN, "mine.txt"))
        with pytest.warns(CheckpointerWarning, match="quarantine"):
            save(mgr, 2)
        save(mgr, 3)
    (kept,) = Path(local.url, paths.QUARANTINE).iterdir()
    assert sorted(os.listdir(kept)) == [OPEN, "mine.txt"]


def test_an_open_file_that_the_system_does_not_let_go_holds_up_no_recovery(local: Root) -> None:
    with manager(local) as mgr:
        save(mgr, 1)
    litter(local, f"{paths.TMP}/{'a' * 32}", (OPEN, "model.safetensors"))
    remove = LocalStorage.remove

    def busy(self: LocalStorage, path: str) -> None:
        if path.endswith(OPEN):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        remove(self, path)

    with mock.patch.object(LocalStorage, "remove", busy), manager(local) as mgr:
        mgr.restore_latest()  # a warning would be an error
    assert os.listdir(Path(local.url, paths.TMP, "a" * 32)) == [OPEN]


# ----------------------------------------------------------------------------------------------- where it is named


def test_verify_names_debris_as_what_it_is_and_the_doctor_is_silent_about_it(root: Root) -> None:
    with manager(root) as mgr:
        save(mgr, 1)
        litter(root, "checkpoint-1", (".DS_Store", "mine.txt"))
        report = mgr.verify()
    assert report.ok
    assert report.checkpoints[0].extra == (".DS_Store", "mine.txt")
    assert "extra file: .DS_Store (left by the system: it goes with the checkpoint)\n" in str(report)
    assert "extra file: mine.txt\n" in str(report)
    (finding,) = [item for item in Doctor(Repository(storage_of(root))).examine().findings if "file" in item.kind]
    assert "holds 1 files that it does not list (mine.txt)" in finding.meaning


def test_a_directory_of_debris_is_no_checkpoint_of_anybody_and_is_said_to_be_worthless(local: Root) -> None:
    litter(local, "checkpoint-7", ("._model.safetensors",))
    litter(local, ".", ("._epoch=1.ckpt",))
    with manager(local) as mgr:
        with pytest.warns(CheckpointerWarning) as said:
            assert mgr.restore_latest() is None
        assert "checkpoint-7 holds nothing but ._model.safetensors; 'checkpointer doctor --fix'" in str(said[0].message)
        assert "Lightning" not in str(said[0].message)
        with pytest.raises(SaveError, match=r"checkpointer doctor .* --fix' removes it, then save again"):
            mgr.save(7)
    assert [item.kind for item in Doctor(Repository(storage_of(local))).mend().fixed] == ["in-the-way"]
    with manager(local) as mgr:
        save(mgr, 7)


# -------------------------------------------------------------------------------------------------- doctor --fix


def test_fix_clears_debris_and_empty_directories_and_nothing_else(root: Root) -> None:
    with manager(root) as mgr:
        save(mgr, 1)
    litter(root, "checkpoint-5")
    for folder in (paths.TMP, paths.TRASH, paths.QUARANTINE):
        litter(root, folder, (".DS_Store",))
        litter(root, f"{folder}/checkpoint-3-abcdef01")
        litter(root, f"{folder}/checkpoint-4-abcdef01", (".DS_Store", "model.safetensors", paths.MANIFEST))
    if root.kind == "local":
        for name in ("checkpoint-2-abcdef01", "._a directory"):
            Path(root.url, paths.QUARANTINE, name, "inner").mkdir(parents=True)
    litter(root, "checkpoint-6", (".DS_Store", "mine.txt"))
    litter(root, "checkpoint-1", (".DS_Store",))
    doctor = Doctor(Repository(storage_of(root)))
    assert {item.level for item in doctor.examine().findings if item.kind == "debris"} == {"note"}
    diagnosis = doctor.mend()
    assert "debris" in {item.kind for item in diagnosis.fixed}
    assert "debris" not in {item.kind for item in diagnosis.findings}
    folders = (paths.QUARANTINE, paths.TMP, paths.TRASH)
    assert left(root) == sorted(["checkpoint-6", *(f"{folder}/checkpoint-4-abcdef01" for folder in folders)])
    storage = storage_of(root)
    for folder in folders:
        assert len(storage.list_directory(f"{folder}/checkpoint-4-abcdef01")) == 3
    assert len(storage.list_directory("checkpoint-6")) == 2
    assert storage.exists("checkpoint-1/.DS_Store")  # it goes with its checkpoint
    assert doctor.mend().fixed == ()


def test_fix_takes_nothing_of_an_attempt_in_a_bucket_that_is_at_work(s3: Root) -> None:
    with manager(s3) as mgr:
        save(mgr, 1)
        attempt = mgr._repository.begin(7, 100)
        attempt.write(".DS_Store", [b"listed"], 6)
        litter(s3, paths.QUARANTINE, (".DS_Store",))
        debris.clear_away(storage_of(s3))
        assert storage_of(s3).exists(f"checkpoint-7/{attempt.id}/.DS_Store")
        assert not storage_of(s3).exists(f"{paths.QUARANTINE}/.DS_Store")


def test_notes_that_only_debris_is_left_of_are_forgotten(local: Root) -> None:
    with manager(local) as mgr:
        save(mgr, 1)
    litter(local, f"{paths.NOTES}/{'b' * 32}", (".DS_Store",))
    repository = Repository(storage_of(local))
    assert [item.kind for item in Doctor(repository).mend().fixed] == ["orphaned-notes"]
    assert left(local) == []
