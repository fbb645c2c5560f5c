"""Lets real file systems and real limits fail under a training process, and looks at what that does to it.

A program: ``unshare --mount python -m tests.crash.real_faults FOLDER [SCENARIO…]``, as root; with ``--user
--map-root-user``, where the kernel lets users mount a tmpfs. What it mounts is visible to it alone, and goes when it
ends. It imports torch once, forks for each scenario, and prints a line of JSON for each. ``--every-mode`` tries each
scenario in every mode, not in one of them.
"""

from __future__ import annotations

import errno
import faulthandler
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from checkpointer import CheckpointManager, layout
from checkpointer.errors import CheckpointerError, CheckpointerWarning, SaveError
from checkpointer.storage import LocalStorage
from checkpointer.storage import local as local_storage
from tests.crash.trainee import MODES

MIB = 1 << 20

PATIENCE = 12
"""Seconds. Only a bug takes that long."""


class Unavailable(Exception):  # noqa: N818 - no error: this machine has no such thing
    """The system does not let this be tried, and why."""


# ------------------------------------------------------------------------------------------------------- training


class Training:
    """A small training run with a checkpoint manager, of about so many bytes."""

    def __init__(self, root: Path, mode: str, size: int = 512 * 1024, **config: Any) -> None:
        torch.manual_seed(0)
        width = 256
        layers = max(size // (3 * 4 * width * width), 1)  # a parameter, and two moments
        self.model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.root = root
        self.step = 0
        self.manager = CheckpointManager(
            root, config={"write": {"mode": mode}, **config}, model=self.model, optimizer=self.optimizer
        )
        restored = self.manager.restore_latest()
        if restored is not None:
            self.step = restored.step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(CheckpointerError):
            self.manager.close()

    def train(self) -> None:
        """One step, whatever the disk does."""
        self.step += 1
        self.optimizer.zero_grad()
        self.model(torch.randn(2, 256)).square().mean().backward()
        self.optimizer.step()

    def saved(self) -> int:
        """Train and save, durably. Returns the step."""
        self.train()
        handle = self.manager.save(self.step)
        assert handle is not None
        handle.result()
        return self.step

    def error_of_a_save(self) -> CheckpointerError | None:
        """Train and save until an error is raised by the call, or by one of the next."""
        for _ in range(2):
            self.train()
            try:
                self.manager.save(self.step)
            except CheckpointerError as error:
                return error
        try:
            self.manager.wait()
        except CheckpointerError as error:
            return error
        return None

    def settle(self) -> None:
        """No save is in flight, and no error is left that nobody has seen."""
        with suppress(CheckpointerError):
            self.manager.wait()


def fingerprint(root: Path) -> dict[str, str]:
    """A hash of every file of every committed checkpoint."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.glob("checkpoint-*/**/*"))
        if path.is_file()
    }


def check_afterwards(root: Path, before: dict[str, str], steps: Sequence[int]) -> None:
    """What was there is as it was, what was acknowledged is there, and nothing is left over."""
    after = fingerprint(root)
    assert {path: after.get(path) for path in before} == before
    with CheckpointManager(root, read_only=True) as reader:
        report = reader.verify()
        assert report.ok, str(report)
        found = [info.step for info in reader.checkpoints()]
        assert set(steps) <= set(found), (steps, found)
    storage = LocalStorage(root)
    for folder in (layout.TMP, layout.TRASH, layout.QUARANTINE):
        assert storage.list_directory(folder) == [], storage.list_directory(folder)


def suffer(
    root: Path, mode: str, begin: Callable[[], object], end: Callable[[], object], *codes: int, **config: Any
) -> str:
    """Save twice, let the cause ``begin``, train on, ``end`` it, and save again. Returns the error in words."""
    with Training(root, mode, **config) as training:
        steps = [training.saved(), training.saved()]
        training.settle()
        before = fingerprint(root)
        begin()
        try:
            error = training.error_of_a_save()
            training.train()
            training.settle()
        finally:
            end()
        assert isinstance(error, SaveError), f"no save failed: {error!r}"
        assert error.errno in codes, f"{errno.errorcode.get(error.errno or 0)}: {error}"
        with CheckpointManager(root, read_only=True) as reader:
            assert reader.verify().ok
        steps.append(training.saved())
    check_afterwards(root, before, steps)
    return str(error)


# ------------------------------------------------------------------------------------------------- limits of a process


def limited(kind: int) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Set a soft limit of this process, and take it back."""
    old, most = resource.getrlimit(kind)
    return lambda limit: resource.setrlimit(kind, (limit, most)), lambda: resource.setrlimit(kind, (old, most))


def file_size(folder: Path, mode: str) -> str:
    """RLIMIT_FSIZE: write(2) writes a part, and then fails."""
    limit, lift = limited(resource.RLIMIT_FSIZE)
    return suffer(folder / "run", mode, lambda: limit(100_000), lift, errno.EFBIG)


def large_file_size(folder: Path, mode: str) -> str:
    """The same for files that are written past the page cache."""
    limit, lift = limited(resource.RLIMIT_FSIZE)
    return suffer(folder / "run", mode, lambda: limit(MIB + 5000), lift, errno.EFBIG, errno.EINVAL, size=8 * MIB)


def open_files(folder: Path, mode: str) -> str:
    """RLIMIT_NOFILE, from none to enough: it runs out at every open of a save in turn."""
    limit, lift = limited(resource.RLIMIT_NOFILE)
    failed: list[str] = []
    with Training(folder / "run", mode, keep={"last": 2}) as training:
        acknowledged = [training.saved(), training.saved()]
        for spare in range(16):
            training.settle()
            before = fingerprint(training.root)
            limit(_lowest_free_descriptor() + spare)
            error = training.error_of_a_save()
            training.settle()
            lift()
            if error is None:
                break
            assert isinstance(error, SaveError), repr(error)
            assert error.errno in (errno.EMFILE, None), repr(error)
            failed.append(str(error))
            with CheckpointManager(training.root, read_only=True) as reader:
                assert reader.verify().ok
            newest = fingerprint(training.root)
            assert set(newest) & set(before), "every older checkpoint is gone"
        assert failed
        assert error is None, "a save needs more than sixteen descriptors"
        acknowledged.append(training.saved())
    check_afterwards(training.root, {}, acknowledged[-1:])
    return f"{len(failed)} limits: {failed[0]}"


def _lowest_free_descriptor() -> int:
    fd = os.open("/", os.O_RDONLY)
    os.close(fd)
    return fd


def address_space(folder: Path, mode: str) -> str:
    """RLIMIT_AS, from nothing more than there is to plenty: memory runs out at one place after another."""
    limit, lift = limited(resource.RLIMIT_AS)
    failed: list[str] = []
    with Training(folder / "run", mode, size=8 * MIB) as training:
        steps = [training.saved()]
        training.settle()
        before = fingerprint(training.root)
        for spare in (0, 1, 2, 4, 8, 16, 32, 64, 128):
            limit(_address_space() + spare * MIB)
            handle, error = None, None
            try:
                handle = training.manager.save(training.step + 1)
                if handle is not None:
                    handle.result()
            except CheckpointerError as refused:
                error = refused
            finally:
                lift()
            training.train()
            training.settle()
            if error is None:
                steps.append(training.step)
            else:
                failed.append(f"{spare} MiB: {error}")
        steps.append(training.saved())
    check_afterwards(training.root, before, steps)
    return f"{len(failed)} limits: {failed[:1]}"


def _address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def no_permission(folder: Path, mode: str) -> str:
    """A directory that becomes read-only, for a user who is not root."""
    if os.getuid() == 0:
        folder.chmod(0o777)
        for parent in folder.parents:
            if not parent.stat().st_mode & 0o001:
                raise Unavailable(f"{parent} lets no other user pass")
        os.setresuid(65534, 65534, 65534)
    if os.access("/root", os.W_OK):
        raise Unavailable("this user may write everywhere")
    private = folder / "run" / layout.PRIVATE / "tmp"
    return suffer(folder / "run", mode, lambda: private.chmod(0o555), lambda: private.chmod(0o755), errno.EACCES)


# ------------------------------------------------------------------------------------------------------ file systems


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


def full_at_start(folder: Path, mode: str) -> str:
    """A job that is started again on a full disk: it can restore, and its saves are refused until there is room."""
    with tmpfs(folder / "disk", "size=16m") as disk:
        root = disk / "run"
        with Training(root, mode) as training:
            steps = [training.saved(), training.saved()]
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
        tmp = disk / "run" / layout.TMP
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
        with Training(root, mode) as training:
            steps = [training.saved(), training.saved()]
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


# ------------------------------------------------------------------------------------------------ an fsync that lies


class Fsyncs:
    """Every fsync of this process: which were refused, and whether any of those was asked again."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.repeated: list[str] = []
        fsync = os.fsync

        def watched(fd: int) -> None:
            place = os.readlink(f"/proc/self/fd/{fd}")
            if place in self.refused:
                self.repeated.append(place)
            try:
                fsync(fd)
            except OSError:
                self.refused.append(place)
                raise

        setattr(os, "fsync", watched)  # noqa: B010 - a type checker knows better what os.fsync is


def failing_fsync(folder: Path, mode: str) -> str:
    """A disk that cannot hold what its file system promises: fsync fails once, and then says that all is well."""
    fsyncs = Fsyncs()
    error, steps, before = _save_until_fsync_fails(folder, mode)
    assert fsyncs.refused, "no fsync failed"
    files = [path for path in fsyncs.repeated if path.endswith((".json", ".safetensors"))]
    assert not files, f"asked again: {files}"
    with ext4(folder / "disk", folder / "thin" / "image", "") as disk:  # what the disk holds, not the page cache
        check_afterwards(disk / "run", before, steps)
    return f"{len(fsyncs.refused)} refused: {error}"


def retried_fsync(folder: Path, mode: str) -> str:
    """The same, with a storage that asks again: the run is lost, which shows that this rig can tell."""
    fsync = local_storage.os.fsync

    def stubborn(fd: int) -> None:
        try:
            fsync(fd)
        except OSError:
            stubborn(fd)

    setattr(local_storage.os, "fsync", stubborn)  # noqa: B010 - as above
    error, _, _ = _save_until_fsync_fails(folder, mode)
    with (
        ext4(folder / "disk", folder / "thin" / "image", "") as disk,
        CheckpointManager(disk / "run", read_only=True) as reader,
    ):
        report = reader.verify()
    assert not report.ok, f"nothing was lost: {error}\n{report}"
    return str(report).splitlines()[-1]


def _save_until_fsync_fails(folder: Path, mode: str) -> tuple[object, list[int], dict[str, str]]:
    """Also once more when there is room again. Returns the error, the acknowledged steps, and the files before it."""
    thin = folder / "thin"
    thin.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", thin)
    error: CheckpointerError | None = None
    steps: list[int] = []
    before: dict[str, str] = {}
    with (
        ext4(folder / "disk", thin / "image", "64m", "-O", "^has_journal") as disk,
        Training(disk / "run", mode) as training,
    ):
        while error is None and len(steps) < 20:
            before = fingerprint(training.root)
            try:
                steps.append(training.saved())
            except CheckpointerError as refused:
                error = refused
        training.train()
        run("mount", "-o", "remount,size=96m", thin)
        steps.append(training.saved())
    return error, steps, before


SCENARIOS: dict[str, Callable[[Path, str], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        file_size, large_file_size, open_files, address_space, no_permission, full_tmpfs, full_at_start, no_inodes,
        filled_meanwhile, read_only_at_start, full_ext4, read_only_meanwhile, failing_fsync, retried_fsync,
    )
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- program


def attempt(name: str, folder: Path, mode: str) -> dict[str, str]:
    """What came of one scenario in one mode, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("ignore", CheckpointerWarning)
        logging.disable()
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        outcome = {}
        try:
            outcome = {"outcome": "ok", "words": SCENARIOS[name](folder, mode)}
        except Unavailable as reason:
            outcome = {"outcome": "unavailable", "words": str(reason)}
        except BaseException:
            outcome = {"outcome": "failed", "words": traceback.format_exc()}
        os.write(writing, json.dumps(outcome).encode()[:60000])
        os._exit(0)
    os.close(writing)
    said = b"".join(iter(lambda: os.read(reading, 65536), b""))
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    ended = {"outcome": "failed", "words": f"it ended with status {os.waitstatus_to_exitcode(status)}"}
    return {"scenario": name, "mode": mode, **(json.loads(said) if said else ended)}


def main() -> None:
    folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with Training(Path(folder) / "warm", "async") as training:  # whatever is imported late is imported now, once
        training.saved()
    check_afterwards(Path(folder) / "warm", {}, [1])
    every = "--every-mode" in names
    for number, name in enumerate(SCENARIOS):
        if name not in names and set(names) - {"--every-mode"}:
            continue
        for mode in ("sync",) if "fsync" in name else MODES if every else (MODES[number % len(MODES)],):
            place = Path(folder) / name / mode
            place.mkdir(parents=True)
            began = time.monotonic()
            outcome = attempt(name, place, mode)
            print(json.dumps({**outcome, "seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main()
