"""File systems that are really full, and really read-only."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

from checkpointer import CheckpointManager
from checkpointer.errors import SaveError
from checkpointer.format import paths
from tests.campaign.crash.suffering import MIB, Training, Unavailable, check_afterwards, fingerprint, suffer


def run(*command: str | Path) -> None:
    """Run a program; Unavailable with its words where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory."""
    folder.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", options, "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def ext4(folder: Path, image: Path, size: str, *features: str) -> Iterator[Path]:
    """A file system in a file, made anew unless the file is there."""
    folder.mkdir(parents=True, exist_ok=True)
    if not image.exists():
        run("truncate", "-s", size, image)
        run("mkfs.ext4", "-q", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=1,nodiscard", *features, image)
    run("mount", "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


class Ballast:
    """Takes all space that is left, down to some blocks."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "ballast"

    def fill(self, leave: int = 0) -> None:
        with self._path.open("ab", buffering=0) as file, suppress(OSError):
            while _free(self._path.parent) > leave:
                file.write(bytes(min(MIB, _free(self._path.parent) - leave)))
            os.fsync(file.fileno())

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def full_tmpfs(folder: Path, mode: str) -> str:
    with tmpfs(folder / "disk", "size=16m") as disk:
        ballast = Ballast(disk)
        return suffer(disk / "run", mode, ballast.fill, ballast.drop, errno.ENOSPC)


def full_ext4(folder: Path, mode: str) -> str:
    with ext4(folder / "disk", folder / "image", "24m") as disk:
        ballast = Ballast(disk)
        return suffer(disk / "run", mode, ballast.fill, ballast.drop, errno.ENOSPC)


def two_steps(root: Path, mode: str) -> list[int]:
    """The steps that a job has saved before anything is wrong."""
    with Training(root, mode) as training:
        return [training.saved(), training.saved()]


def full_at_start(folder: Path, mode: str) -> str:
    """A job that is started again on a full disk: it can restore, and its saves are refused until there is room."""
    with tmpfs(folder / "disk", "size=16m") as disk:
        root = disk / "run"
        steps = two_steps(root, mode)
        before = fingerprint(root)
        ballast = Ballast(disk)
        ballast.fill()
        with Training(root, mode) as training:
            assert training.step == steps[-1]
            error = training.error_of_a_save()
            assert isinstance(error, SaveError), repr(error)
            assert error.errno == errno.ENOSPC, repr(error)
            ballast.drop()
            training.settle()
            steps.append(training.saved())
        check_afterwards(root, before, steps)
    return str(error)


def no_inodes(folder: Path, mode: str) -> str:
    """There is room for bytes, and none for another file: what cannot be seen beforehand."""
    with tmpfs(folder / "disk", "size=64m,nr_inodes=60") as disk:
        made: list[Path] = []

        def fill() -> None:
            with suppress(OSError):
                while True:
                    path = disk / f"ballast-{len(made)}"
                    path.touch()
                    made.append(path)
            for path in [made.pop(), made.pop(), made.pop()]:  # so that a save gets into its middle
                path.unlink()

        def drop() -> None:
            for path in made:
                path.unlink()

        return suffer(disk / "run", mode, fill, drop, errno.ENOSPC)


def filled_meanwhile(folder: Path, mode: str) -> str:
    """Somebody else takes the last blocks while a file is being written."""
    with tmpfs(folder / "disk", "size=64m") as disk:
        ballast = Ballast(disk)
        tmp = disk / "run" / paths.TMP
        fillers: list[int] = []

        def begin() -> None:
            fillers.append(os.fork())
            if fillers[-1] == 0:
                while not any(tmp.iterdir()):
                    pass
                ballast.fill()
                os._exit(0)

        def end() -> None:
            os.waitpid(fillers[-1], 0)
            ballast.drop()

        return suffer(disk / "run", mode, begin, end, errno.ENOSPC, size=12 * MIB)


def read_only_at_start(folder: Path, mode: str) -> str:
    """A run root on a file system that was mounted read-only: reading works, writing is refused at once."""
    with tmpfs(folder / "disk", "size=16m") as disk:
        root = disk / "run"
        steps = two_steps(root, mode)
        before = fingerprint(root)
        run("mount", "-o", "remount,ro", disk)
        refused = ""
        try:
            Training(root, mode)
        except SaveError as error:
            refused = str(error)
        assert "read_only=True" in refused, refused
        model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
        with CheckpointManager(root, read_only=True, model=model) as reader:
            assert reader.verify().ok
        run("mount", "-o", "remount,rw", disk)
        with Training(root, mode) as training:
            steps.append(training.saved())
        check_afterwards(root, before, steps)
    return refused


def read_only_meanwhile(folder: Path, mode: str) -> str:
    """ext4 goes read-only under the feet of a training process, as it does after an error of the disk."""
    image = folder / "image"
    with ext4(folder / "disk", image, "32m") as disk, Training(disk / "run", mode) as training:
        steps = [training.saved(), training.saved()]
        training.settle()
        before = fingerprint(training.root)
        run("mount", "-o", "remount,abort", disk)
        error = training.error_of_a_save()
        training.settle()
        training.train()
        assert isinstance(error, SaveError), repr(error)
        assert error.errno in (errno.EROFS, errno.EIO), repr(error)
        again = training.error_of_a_save()
        assert isinstance(again, SaveError), repr(again)
        with CheckpointManager(training.root, read_only=True) as reader:
            assert reader.verify().ok
    with ext4(folder / "disk", image, "") as disk:
        with Training(disk / "run", mode) as training:
            assert training.step == steps[-1]
            steps.append(training.saved())
        check_afterwards(disk / "run", before, steps)
    return str(error)
