"""A disk that is full, or nearly: what is noticed before anything is written, and what each policy makes of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointerWarning, SaveError
from checkpointer.storage import LocalStorage, wrapping
from checkpointer.storage.base import Buffer

SIZE = 400_000
"""Bytes of the state, which a checkpoint takes with little more."""

ROOM = 600_000
"""Bytes that are enough for one checkpoint and not for two."""

MODES = ("sync", "async", "lazy")


class SmallDisk(LocalStorage):
    """A run root on a disk of its own. ``quota``: the system does not tell in advance that it will be full."""

    capacity = 10**9
    quota = False

    def free_bytes(self) -> int | None:
        return 10**12 if self.quota else self.left

    @property
    def left(self) -> int:
        """Bytes that can really be written."""
        inodes = {entry.stat().st_ino: entry.stat() for entry in Path(self.root).rglob("*") if entry.is_file()}
        return self.capacity - sum(status.st_blocks * 512 for status in inodes.values())

    def write(self, path: str, pieces: Iterable[Buffer], size: int, *, steady: bool = False) -> float:
        if size <= self.left:
            return super().write(path, pieces, size, steady=steady)
        place = Path(self.place(path))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(bytes(max(self.left // 2, 0)))
        raise OSError(errno.EDQUOT if self.quota else errno.ENOSPC, "the disk is full", str(place))


class Run:
    """A manager on a small disk."""

    def __init__(self, mgr: CheckpointManager, disk: SmallDisk) -> None:
        self.mgr = mgr
        self.disk = disk

    def leave(self, free: int) -> None:
        """From now on ``free`` bytes are free."""
        self.disk.capacity = 0
        self.disk.capacity = free - self.disk.left

    def save(self, step: int, **keywords: Any) -> CheckpointInfo | None:
        handle = self.mgr.save(step, **keywords)
        info = None if handle is None else handle.result(60)
        self.mgr._saver.wait()  # for the pruning too
        return info

    @property
    def steps(self) -> list[int]:
        return [info.step for info in self.mgr.checkpoints()]

    @property
    def leftovers(self) -> list[str]:
        place = Path(self.disk.root, ".checkpointer", "tmp")
        return os.listdir(place) if place.exists() else []


MakeRun = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[MakeRun]:
    """Makes a run from a configuration."""
    made: list[CheckpointManager] = []

    def make(on_full: str = "error", mode: str = "async", keep: Mapping[str, Any] | None = None) -> Run:
        disk = SmallDisk(tmp_path / "run")
        config = {"write": {"on_full": on_full, "mode": mode}, "keep": keep or {}}
        with wrapping(lambda _: disk):
            mgr = CheckpointManager(tmp_path / "run", config=config, state=torch.ones(SIZE // 4))
        made.append(mgr)
        mgr.restore_latest()
        return Run(mgr, disk)

    yield make
    for mgr in made:
        mgr.close()


@contextlib.contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of this package that were given inside, from whatever thread."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(item.message) for item in caught if item.category is CheckpointerWarning]


# ------------------------------------------------------------------------------------------------- beforehand


@pytest.mark.parametrize("mode", MODES)
def test_what_is_announced_is_enough_and_little_more_than_what_is_written(run: MakeRun, mode: str) -> None:
    made = run(mode=mode)
    repository = made.mgr._repository
    with mock.patch.object(repository, "check_space", wraps=repository.check_space) as check:
        made.leave(10**9)
        made.save(1, files={"notes.txt": bytes(50_000)})
    _, announced = check.call_args.args
    written = 10**9 - made.disk.left
    assert written <= announced <= written + 200_000


def test_attachments_count_before_anything_is_written(run: MakeRun) -> None:
    made = run()
    made.leave(ROOM)
    with pytest.raises(SaveError, match="are missing; nothing was written"):
        made.save(1, files={"large": bytes(300_000)})
    assert made.leftovers == []
    with warned():
        made.save(2)
    assert made.steps == [2]


def test_a_file_that_is_shared_needs_no_room(run: MakeRun, tmp_path: Path) -> None:
    model = torch.nn.Linear(SIZE // 400, 100).requires_grad_(False)
    disk = SmallDisk(tmp_path / "frozen")
    with wrapping(lambda _: disk):
        mgr = CheckpointManager(tmp_path / "frozen", model=model)
    with mgr, warned():
        made = Run(mgr, disk)
        made.leave(ROOM)
        made.save(1)
        assert disk.left < SIZE
        made.save(2)
        assert made.steps == [1, 2]
        shutil.rmtree(tmp_path / "frozen" / "checkpoint-2")
        made.leave(SIZE // 2)
        with pytest.raises(SaveError, match="are missing"):  # what it would share is gone: now it needs room
            made.save(3)


@pytest.mark.parametrize("mode", MODES)
def test_an_error_is_that_of_a_full_disk_and_the_next_save_works_once_there_is_room(run: MakeRun, mode: str) -> None:
    made = run(mode=mode)
    made.save(1)
    made.leave(1000)
    with pytest.raises(SaveError, match="1000 bytes free") as caught:
        made.save(2)
    assert caught.value.errno == errno.ENOSPC
    made.leave(10**8)
    made.save(3)
    assert made.steps == [1, 3]


@pytest.mark.parametrize("mode", MODES)
def test_a_quota_shows_while_writing_and_nothing_is_left_of_it(run: MakeRun, mode: str) -> None:
    made = run(mode=mode)
    made.save(1)
    made.leave(1000)
    made.disk.quota = True
    with pytest.raises(SaveError, match="disk is full") as caught:
        made.save(2)
    assert caught.value.errno == errno.EDQUOT
    assert made.leftovers == []
    made.leave(10**8)
    made.save(3)
    assert made.steps == [1, 3]


# ------------------------------------------------------------------------------------------------------ prune


@pytest.mark.parametrize("quota", [False, True])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_prune_makes_room_by_what_retention_lets_go_and_by_nothing_else(run: MakeRun, mode: str, quota: bool) -> None:
    first = run()
    for step in range(4):
        first.save(step)
    first.mgr.close()
    made = run("prune", mode, {"last": 2})
    made.leave(1000)
    made.disk.quota = quota
    with warned():
        made.save(4)
    assert made.steps == [3, 4]
    made.leave(1000)
    with pytest.raises(SaveError, match="full" if quota else "missing"):  # retention keeps both
        made.save(5)
    assert made.steps == [3, 4]


def test_prune_never_removes_what_the_run_was_restored_from(run: MakeRun) -> None:
    first = run()
    for step in range(3):
        first.save(step)
    first.mgr.close()
    made = run("prune", keep={"last": 1})
    made.mgr.restore(0)
    made.leave(1000)
    made.disk.capacity -= SIZE * 2
    with pytest.raises(SaveError, match="are missing"):
        made.save(3, overwrite=True)
    assert made.steps == [0, 2]


def test_error_removes_nothing_to_make_room(run: MakeRun) -> None:
    first = run()
    for step in range(3):
        first.save(step)
    first.mgr.close()
    made = run("error", keep={"last": 1})
    made.leave(1000)
    with pytest.raises(SaveError, match="are missing"):
        made.save(3)
    assert made.steps == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize("mode", MODES)
def test_skip_leaves_saves_out_warns_once_and_saves_again_when_there_is_room(run: MakeRun, mode: str) -> None:
    made = run("skip", mode)
    made.save(1)
    made.leave(1000)
    with warned() as texts:
        assert [made.mgr.save(step) for step in (2, 3, 4)] == [None, None, None]
    assert len(texts) == 1
    assert "step 2 was not saved" in texts[0]
    assert "are missing" in texts[0]
    made.mgr.wait()
    made.leave(10**8)
    with warned() as texts:
        made.save(5)
    assert (made.steps, texts) == ([1, 5], [])
    made.leave(1000)
    with warned() as texts:
        assert made.mgr.save(6) is None
    assert len(texts) == 1


@pytest.mark.parametrize("mode", MODES)
def test_skip_raises_nothing_where_space_runs_out_while_writing(run: MakeRun, mode: str) -> None:
    made = run("skip", mode)
    made.save(1)
    made.leave(1000)
    made.disk.quota = True
    with warned() as texts:
        handles = [made.mgr.save(2), made.mgr.save(3)]
        made.mgr.wait()
    assert len(texts) == 1
    assert "disk is full" in texts[0]
    if mode == "sync":
        assert handles == [None, None]
    else:  # whoever asks is told
        for handle in handles:
            with pytest.raises(SaveError, match="disk is full"):
                handle.result(60)  # type: ignore[union-attr]
    made.leave(10**8)
    made.save(4)
    made.mgr.close()
    assert made.steps == [1, 4]


def test_where_warnings_are_errors_a_save_that_is_left_out_ends_all_the_same(run: MakeRun) -> None:
    made = run("skip")
    made.leave(1000)
    made.disk.quota = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle = made.mgr.save(1)
        assert handle is not None
        with pytest.raises(SaveError, match="disk is full"):
            handle.result(60)
        with pytest.raises(CheckpointerWarning, match="step 1 was not saved"):
            made.mgr.wait()


def test_skip_leaves_other_errors_what_they_are(run: MakeRun) -> None:
    made = run("skip")
    broken = mock.patch.object(made.disk, "write", side_effect=OSError(errno.EIO, "broken"))
    with broken, pytest.raises(SaveError, match="broken"):
        made.save(1)


def test_while_it_is_full_a_save_that_is_due_copies_nothing_and_a_forced_one_is_tried(run: MakeRun) -> None:
    made = run("skip")
    made.save(1)
    made.leave(1000)
    with warned():
        assert made.mgr.save(2) is None
    with mock.patch.object(made.mgr._saver, "stage", side_effect=AssertionError("staged")):
        assert made.mgr.save(3) is None
        with pytest.raises(AssertionError, match="staged"):
            made.mgr.save(4, force=True)


def test_after_a_signal_skip_does_not_pretend_that_the_state_is_durable(tmp_path: Path) -> None:
    disk = SmallDisk(tmp_path / "run")
    config = {"write": {"on_full": "skip"}, "save": {"on_signal": "SIGUSR2"}}
    with wrapping(lambda _: disk):
        mgr = CheckpointManager(tmp_path / "run", config=config, state=torch.ones(SIZE // 4))
    with mgr, warned():
        made = Run(mgr, disk)
        made.leave(1000)
        disk.quota = True
        os.kill(os.getpid(), signal.SIGUSR2)
        assert mgr.save(1) is None
        assert mgr.stop_requested()
        assert not mgr.should_stop()
        made.leave(10**8)
        assert mgr.save(2) is not None
        assert mgr.should_stop()


# ---------------------------------------------------------------------------------------------- before it is


def test_a_warning_comes_before_it_gets_tight_once_until_it_has_recovered(run: MakeRun) -> None:
    made = run()
    made.leave(10 * SIZE)
    found = []
    for step, free in enumerate([10, 2.5, 2.5, 3, 10, 2.5]):
        made.leave(int(free * SIZE))
        with warned() as texts:
            made.save(step)
        found.append(len(texts))
        assert not texts or "no room for two more" in texts[0]
    assert found == [0, 1, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------------ a real one


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("a file system of 2 MiB needs root: 'mount -t tmpfs -o size=2m tmpfs DIR' was refused")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("mode", MODES)
def test_on_a_real_disk_that_fills_up_the_older_checkpoints_stay_whole(tiny: Path, mode: str) -> None:
    config = {"write": {"mode": mode, "on_full": "skip"}}
    with CheckpointManager(tiny / "run", config=config, state=torch.ones(SIZE // 4)) as mgr, warned() as texts:
        handles = [mgr.save(step) for step in range(8)]
        mgr.wait()
        kept = [info.step for info in mgr.checkpoints()]
        assert mgr.verify().ok
    assert kept == [0, 1, 2, 3]
    assert handles[4:] == [None] * 4
    assert [text.split(" was ")[0] for text in texts if "skip" in text] == ["step 4"]


@pytest.mark.parametrize("mode", MODES)
def test_a_real_disk_that_others_fill_meanwhile_fails_the_save_and_leaves_nothing(tiny: Path, mode: str) -> None:
    with CheckpointManager(tiny / "run", config={"write": {"mode": mode}}, state=torch.ones(SIZE // 4)) as mgr:
        first = mgr.save(0)
        assert first is not None
        first.result(60)
        mgr._saver.wait()  # it still looks at the space that is left
        with mock.patch.object(LocalStorage, "free_bytes", return_value=10**9):
            (tiny / "other").write_bytes(bytes(2**21 - shutil.disk_usage(tiny).used - SIZE // 2))
            with pytest.raises(SaveError, match="No space left") as caught:
                mgr.save(1).result(60)  # type: ignore[union-attr]
        assert caught.value.errno == errno.ENOSPC
        (tiny / "other").unlink()
        with warned():
            handle = mgr.save(2)
            assert handle is not None
            handle.result(60)
            mgr.wait()
        assert [info.step for info in mgr.checkpoints()] == [0, 2]
        assert mgr.verify().ok
        assert os.listdir(tiny / "run" / ".checkpointer" / "tmp") == []
