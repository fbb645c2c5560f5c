"""A checkpoint that cannot be moved or deleted: retention goes on with the others, and says so once."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.format import paths
from checkpointer.format.manifest import parse_manifest
from checkpointer.policy.retention import KeepPolicy, plan
from checkpointer.repository.commit.removal import record_path, record_removal
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, open_storage, wrapping
from checkpointer.testing import Fault
from checkpointer.testing.faults import faulty_storage
from tests.conftest import Root
from tests.unit.policy.test_retention import NOW, run

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}


def manager(root: Any, **config: Any) -> CheckpointManager:
    url, options = (root.url, root.options) if isinstance(root, Root) else (root, {})
    live = {"tensor": torch.zeros(3)}
    return CheckpointManager(url, storage_options=options, config={**SYNC, **config}, state=live)


def save(mgr: CheckpointManager, *steps: int, **options: Any) -> None:
    """Each also until it is pruned."""
    for step in steps:
        mgr.save(step, **options)
        mgr._saver.wait()


def steps_of(root: Any) -> list[int]:
    with manager(root) as mgr:
        return [info.step for info in mgr.checkpoints()]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest) -> Root:
    """A run root on a storage that renames, and on one that does not."""
    made: Root = request.getfixturevalue(request.param)
    return made


class Refusing(LocalStorage):
    """A root whose directories in ``kept`` cannot be renamed or exchanged, while all else is as usual."""

    kept: tuple[str, ...] = ()
    code = errno.EXDEV

    def _refuse(self, path: str) -> None:
        if path.startswith(self.kept):
            raise OSError(self.code, os.strerror(self.code), self.place(path))

    def rename(self, old: str, new: str) -> None:
        self._refuse(old)
        super().rename(old, new)

    def exchange(self, a: str, b: str) -> bool:
        self._refuse(b)
        return super().exchange(a, b)


@contextlib.contextmanager
def refusing(code: int, *names: str, fault: Fault | None = None) -> Iterator[None]:
    """Managers made inside cannot move these directories."""

    def wrapped(storage: Any) -> Any:
        made = Refusing(storage.root, durable=storage.durable)
        made.kept, made.code = names, code
        return made if fault is None else faulty_storage(made, fault)

    with wrapping(wrapped):
        yield


# ------------------------------------------------------------------------------------------------ the others go


def test_one_checkpoint_that_cannot_be_moved_does_not_stop_retention_and_is_warned_of_once(local):
    with refusing(errno.EPERM, "checkpoint-1"), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        with pytest.warns(CheckpointerWarning, match=r"checkpoint-1: Operation not permitted") as said:
            save(mgr, 2)
        assert len(said) == 1
        save(mgr, 3, 4)  # a second warning would be an error
        assert [info.step for info in mgr.checkpoints()] == [1, 4]
        (_, why), _ = mgr.prune(dry_run=True).keep
        assert why == ("cannot be removed: Operation not permitted",)
        assert [info.step for info, _ in mgr.prune().keep] == [1, 4]


def test_it_goes_as_soon_as_that_is_possible_and_another_reason_is_said_again(local):
    with refusing(errno.EPERM, "checkpoint-1"), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        with pytest.warns(CheckpointerWarning, match="not permitted"):
            save(mgr, 2)
        mgr._repository.storage.code = errno.EBUSY
        with pytest.warns(CheckpointerWarning, match="busy"):
            save(mgr, 3)
        mgr._repository.storage.kept = ()
        gone = mgr.prune()
        assert [(info.step, why) for info, why in gone.remove] == [(1, ("no rule keeps it",))]
        assert [info.step for info in mgr.checkpoints()] == [3]


@pytest.mark.parametrize("kind", ["EACCES", "EIO"])
def test_what_cannot_be_removed_anywhere_keeps_nothing_else_from_going(place, kind):
    """In an object store, too, where the manifest is what is removed first."""
    fault = Fault(kind, on=["rename", "remove"], path="checkpoint-1*", forever=True)
    fault.end()
    with wrapping(lambda storage: faulty_storage(storage, fault)):
        mgr = manager(place, keep={"last": 1})
    with mgr:
        save(mgr, 1)
        fault.restart()
        with pytest.warns(CheckpointerWarning, match="checkpoint-1") as said:
            save(mgr, 2, 3)
        assert len([item for item in said if "could not prune" in str(item.message)]) == 1
        assert [info.step for info in mgr.checkpoints()] == [1, 3]
        fault.end()
        save(mgr, 4)
        assert [info.step for info in mgr.checkpoints()] == [4]


def test_a_storage_that_refuses_everything_is_not_asked_for_each_checkpoint(local):
    fault = Fault("EIO", on=["rename"], path="checkpoint-*", forever=True)
    with manager(local) as mgr:
        save(mgr, *range(1, 10))
    with wrapping(lambda storage: faulty_storage(storage, fault)), manager(local, keep={"last": 1}) as mgr:
        mgr.restore_latest()
        with pytest.warns(CheckpointerWarning, match="could not prune"):
            result = mgr.prune()
    assert len(fault.operations) == 3
    assert len(result.keep) == 9
    assert "not tried" in str(result)


def test_what_cannot_be_removed_does_not_count_against_the_budget():
    infos = [replace(info, size=10) for info in run(1, 2, 3, 4)]
    policy = KeepPolicy(max_size=20)
    free = plan(infos, policy, now=NOW)
    assert [info.step for info, _ in free.keep] == [3, 4]
    stuck = plan(infos, policy, now=NOW, stuck={infos[2].id: "immutable"})
    assert [info.step for info, _ in stuck.keep] == [2, 3, 4]
    assert "cannot be removed (so max_size does not count it): immutable" in str(stuck)


# -------------------------------------------------------------------------------------------- removal in place


def test_a_directory_that_cannot_be_renamed_across_file_systems_is_removed_in_place(local):
    with refusing(errno.EXDEV, "checkpoint-1"), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        save(mgr, 2)
        assert [info.step for info in mgr.checkpoints()] == [2]
    assert sorted(os.listdir(local.url)) == [".checkpointer", "checkpoint-2"]
    assert os.listdir(Path(local.url, paths.TRASH)) == []


def test_the_doctor_finds_a_removal_in_place_that_was_interrupted_and_ends_it(local):
    with manager(local) as mgr:
        save(mgr, 1, 2)
    fault = Fault("EIO", on=["remove"], path="checkpoint-1/*.safetensors", forever=True)
    with refusing(errno.EXDEV, "checkpoint-1", fault=fault), silenced(), manager(local, keep={"last": 1}) as mgr:
        mgr.restore_latest()
        assert [info.step for info, _ in mgr.prune().remove] == [1]
    repository = Repository(open_storage(local.url))
    (finding,) = Doctor(repository).examine().findings
    assert finding.kind == "half-removed"
    assert [item.kind for item in Doctor(repository).mend().fixed] == ["half-removed"]
    assert sorted(os.listdir(local.url)) == [".checkpointer", "checkpoint-2"]


def test_foreign_files_in_what_is_removed_in_place_survive(local):
    with refusing(errno.EXDEV, "checkpoint-1"), manager(local, keep={"last": 1}) as mgr:
        save(mgr, 1)
        Path(local.url, "checkpoint-1", "mine.txt").write_text("precious")
        with pytest.warns(CheckpointerWarning, match=r"mine\.txt"):
            save(mgr, 2)
    assert os.listdir(Path(local.url, "checkpoint-1")) == ["mine.txt"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EBUSY, errno.EPERM])
def test_a_step_whose_old_checkpoint_cannot_be_moved_is_saved_under_the_second_name(local, code):
    with refusing(code, "checkpoint-1"):
        with manager(local) as mgr:
            first = mgr.save(1).result()
            second = mgr.save(1, overwrite=True).result()
            assert mgr.latest().id == second.id
            assert mgr.verify().ok
        there = [info.id for info in manager(local).checkpoints()]
        assert there == ([second.id] if code == errno.EXDEV else [first.id, second.id])
    save_again = manager(local)  # where it can be moved after all, nothing is in the way
    with save_again as mgr:
        assert mgr.restore_latest().checkpoint.id == second.id
        save(mgr, 2)


def test_a_damaged_checkpoint_that_cannot_be_moved_aside_does_not_stop_the_save_of_its_step(local):
    with refusing(errno.EXDEV, "checkpoint-1"), manager(local) as mgr:
        save(mgr, 1)
        Path(local.url, "checkpoint-1", paths.MANIFEST).write_text("{}")
        saved = mgr.save(1, overwrite=True).result()
    assert saved.path.endswith(f"checkpoint-1-{saved.id[:8]}")
    assert Path(local.url, "checkpoint-1", paths.MANIFEST).read_text() == "{}"


def test_a_commit_across_file_systems_is_an_error_that_says_what_must_be_one(local):
    with (
        refusing(errno.EXDEV, paths.TMP),
        manager(local) as mgr,
        pytest.raises(SaveError, match=r"\.checkpointer and the run root lie on different file systems"),
    ):
        mgr.save(1)
    assert not Path(local.url, "checkpoint-1").exists()


@pytest.mark.parametrize("kind", ["EIO", "EACCES"])
def test_wherever_a_removal_in_place_ends_the_next_writer_finds_a_whole_checkpoint_or_removes_the_rest(tmp_path, kind):
    """The storage fails from one operation on, as it does for a process that has died."""
    with manager(tmp_path / "base") as mgr:
        save(mgr, 1, 2)
    outcomes = set()
    for at in range(1, 200):
        root = tmp_path / str(at)
        shutil.copytree(tmp_path / "base", root)
        fault = Fault(kind, at=at, forever=True)
        fault.end()
        with refusing(errno.EXDEV, "checkpoint-1", fault=fault), silenced():
            repository = Repository(open_storage(root))
            info = repository.find(1)
            fault.restart()
            with contextlib.suppress(OSError):
                repository._protocol.remove("checkpoint-1", repository.manifest(info))
            reached = fault.reached
        whole_or_gone(root)
        with manager(root) as writer:
            writer.restore_latest()
            assert writer.verify().ok
            left = [info.step for info in writer.checkpoints()]
        assert left in ([1, 2], [2]), at
        assert (root / "checkpoint-1").exists() == (1 in left), at
        assert not list((root / paths.PRIVATE).glob("trash/*")), at
        outcomes.add(tuple(left))
        shutil.rmtree(root)
        if not reached:
            break
    assert outcomes == {(1, 2), (2,)}


def whole_or_gone(root: Path) -> None:
    """What a reader sees at this moment."""
    with manager(root) as reader:
        assert reader.verify().ok


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


def test_the_record_of_an_old_removal_never_touches_a_later_save_of_the_same_name(local):
    """A power cut may bring back a record whose removal was over."""
    with manager(local) as mgr:
        save(mgr, 1)
        text = Path(local.url, "checkpoint-1", paths.MANIFEST).read_bytes()
        mgr.save(1, overwrite=True)
        old = parse_manifest(text, "").id
        record_removal(mgr._repository.storage, "checkpoint-1", text, old)
        record = Path(mgr._repository.storage.place(record_path(old)))
    assert record.exists()
    with manager(local) as mgr:
        mgr.restore_latest()
        assert mgr.verify().ok
    assert not record.exists()


# ------------------------------------------------------------------------------------------- real file systems


def needs(possible: bool, what: str) -> Any:
    return pytest.mark.skipif(not possible, reason=f"{what}: only root can do that, on a file system that lets it")


@functools.cache
def can_mark() -> bool:
    """Whether this user may make a file immutable."""
    if sys.platform != "linux" or shutil.which("chattr") is None:
        return False
    with tempfile.NamedTemporaryFile() as file:
        if subprocess.run(["chattr", "+i", file.name], capture_output=True, check=False).returncode:
            return False
        return subprocess.run(["chattr", "-i", file.name], capture_output=True, check=False).returncode == 0


@functools.cache
def can_mount_overlay() -> bool:
    script = (
        "mount -t tmpfs none /mnt && mkdir /mnt/l /mnt/u /mnt/w /mnt/m && "
        "mount -t overlay overlay -o lowerdir=/mnt/l,upperdir=/mnt/u,workdir=/mnt/w /mnt/m"
    )
    try:
        return (
            subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, check=False).returncode == 0
        )
    except OSError:
        return False


@contextlib.contextmanager
def immutable(*files: Path) -> Iterator[None]:
    subprocess.run(["chattr", "+i", *files], check=True)
    try:
        yield
    finally:
        for path in files:
            moved = [path] if path.exists() else list(path.parents[1].rglob(path.name))
            subprocess.run(["chattr", "-i", *moved], check=True)


@needs(can_mark(), "chattr +i")
@pytest.mark.parametrize("what", ["directory", "file"])
def test_an_immutable_checkpoint_stays_the_others_go_and_the_doctor_names_the_cure(tmp_path, what):
    root = tmp_path / "run"
    with manager(root, keep={"last": 1}) as mgr:
        save(mgr, 1)
        place = root / "checkpoint-1"
        with immutable(place if what == "directory" else place / paths.SHARED_TENSORS):
            found = Doctor(mgr._repository).examine()
            (finding,) = [
                finding for finding in found.findings if finding.level == "problem" and finding.kind != "orphaned-lock"
            ]
            assert finding.kind == "unremovable"
            assert "immutable" in finding.meaning
            assert f"chattr -R -i {place}" in finding.advice
            assert "give write access" not in str(found)  # to root, whom no right helps
            with pytest.warns(CheckpointerWarning, match=r"immutable.*chattr") as said:
                save(mgr, 2)
            save(mgr, 3)
            assert len(said) == 1
            assert [info.step for info in mgr.checkpoints()] == ([1, 3] if what == "directory" else [3])
            found = Doctor(mgr._repository).examine()
            assert [finding.kind for finding in found.findings if finding.level == "problem"].count("unremovable") == 1
        save(mgr, 4)
        assert [info.step for info in mgr.checkpoints()] == [4]
        assert os.listdir(root / paths.TRASH) == []


@needs(can_mark(), "chattr +i")
def test_a_leftover_that_cannot_be_removed_keeps_the_next_writer_from_nothing_else(tmp_path):
    root = tmp_path / "run"
    with manager(root) as mgr:
        save(mgr, 1, 2, 3)
    trash = root / paths.TRASH
    trash.mkdir(exist_ok=True)
    for step in (1, 2):
        info = next(info for info in manager(root).checkpoints() if info.step == step)
        os.rename(root / f"checkpoint-{step}", trash / info.id)
    held, gone = sorted(trash.iterdir())
    with immutable(held / paths.SHARED_TENSORS):
        mgr = manager(root)
        with pytest.warns(CheckpointerWarning, match="could not clear away all leftovers.*immutable.*chattr"):
            mgr.restore_latest()
        with mgr:
            save(mgr, 4)
        assert held.exists()
        assert not gone.exists()


@needs(can_mark(), "chattr +i")
def test_a_rollback_over_an_immutable_checkpoint_says_what_keeps_the_old_one(tmp_path):
    root = tmp_path / "run"
    with manager(root) as mgr:
        save(mgr, 1, 2, 3)
    mgr = manager(root)
    mgr.restore(2)
    with immutable(root / "checkpoint-3"), mgr:
        with pytest.warns(CheckpointerWarning, match=r"next writer tries again.*checkpoint-3 is immutable.*chattr"):
            save(mgr, 3)
        assert mgr.latest().step == 3
        assert mgr.latest().path != str(root / "checkpoint-3")


@needs(sys.platform == "linux" and os.geteuid() == 0, "a change of the user")
def test_in_a_sticky_directory_of_another_user_the_doctor_says_whose_the_checkpoint_is(tmp_path):
    root = tmp_path / "run"
    with manager(root) as mgr:
        save(mgr, 1)
    os.chmod(root, 0o1777)
    parents = [path for path in root.parents if path.stat().st_uid == os.geteuid() and path != Path("/")]
    modes = [(path, path.stat().st_mode) for path in parents]
    for path, mode in modes:
        os.chmod(path, mode | 0o055)
    pid = os.fork()
    if pid == 0:
        os.seteuid(65534)
        found = open_storage(root).obstacle("checkpoint-1")
        os._exit(0 if found and "is sticky" in found and "chmod -t" in found else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        for path, mode in modes:
            os.chmod(path, mode)


OVERLAY = """
import errno, os, subprocess, sys
from pathlib import Path
from checkpointer.repository.doctor import Doctor
from checkpointer.errors import SaveError
from tests.integration.repository.test_unremovable import manager, save
base = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", base], check=True)
lower, upper, work, merged = (base / name for name in ("lower", "upper", "work", "merged"))
for path in (lower, upper, work, merged):
    path.mkdir()
with manager(lower) as mgr:
    save(mgr, 1, 2, 3)
options = f"lowerdir={lower},upperdir={upper},workdir={work}"
subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, merged], check=True)
try:
    os.rename(merged / "checkpoint-1", merged / "moved")
except OSError as error:
    assert error.errno == errno.EXDEV, error
else:
    print("unavailable")
    os._exit(0)
with manager(merged, keep={"last": 2}) as mgr:
    mgr.restore_latest()
    again = mgr.save(3, overwrite=True).result()
    mgr._saver.wait()
    assert [info.step for info in mgr.checkpoints()] == [2, 3], mgr.checkpoints()
    save(mgr, 4)
    assert [info.step for info in mgr.checkpoints()] == [3, 4]
    assert mgr.checkpoints()[0].id == again.id
    assert mgr.verify().ok
with manager(merged, keep={"last": 2}) as mgr:
    assert mgr.restore_latest().step == 4
assert sorted(os.listdir(merged)) == [".checkpointer", "checkpoint-3", "checkpoint-4"], os.listdir(merged)
assert not os.listdir(merged / ".checkpointer/trash") and not os.listdir(merged / ".checkpointer/tmp")

bound = base / "bound"
with manager(bound) as mgr:
    save(mgr, 1, 2)
    subprocess.run(["mount", "--bind", bound / "checkpoint-1", bound / "checkpoint-1"], check=True)
    (finding,) = [found for found in Doctor(mgr._repository).examine().findings if found.kind == "unremovable"]
    assert f"umount {bound}/checkpoint-1" in finding.advice, finding
    mgr.restore(1)
    again = mgr.save(1, overwrite=True).result()
    assert (mgr.latest().id, len(mgr.checkpoints())) == (again.id, 3)

(base / "apart" / ".checkpointer").mkdir(parents=True)
subprocess.run(["mount", "-t", "tmpfs", "none", base / "apart" / ".checkpointer"], check=True)
with manager(base / "apart") as mgr:
    try:
        mgr.save(1)
    except SaveError as error:
        assert "lie on different file systems" in str(error), error
    else:
        raise AssertionError("it cannot have been committed")
print("ok")
"""


@needs(can_mount_overlay(), "a mount of overlayfs")
def test_checkpoints_of_a_lower_layer_of_overlayfs_and_mounted_ones_are_removed_or_replaced(tmp_path):
    command = ["unshare", "--mount", sys.executable, "-c", OVERLAY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    if "unavailable" in done.stdout:
        pytest.skip("this overlayfs renames directories of its lower layer (redirect_dir=on)")
