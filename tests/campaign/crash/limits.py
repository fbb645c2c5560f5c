"""Limits of a process that are really reached: of files, of memory, and of what a user may do."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.format import paths
from tests.campaign.crash.suffering import MIB, Training, Unavailable, check_afterwards, fingerprint, suffer


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
    with Training(folder / "run", mode, size=6 * MIB) as training:
        steps = [training.saved()]
        training.settle()
        before = fingerprint(training.root)
        for spare in (0, 2, 8, 32, 128):
            limit(_address_space() + spare * MIB)
            handle, error = None, None
            try:
                handle = training.manager.save(training.step + 1)
                if handle is not None:
                    handle.result()
            except CheckpointerError as refused:
                error = refused
            with suppress(CheckpointerError, MemoryError):
                training.manager.restore_latest()
            lift()
            training.manager.restore_latest()
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
    private = folder / "run" / paths.PRIVATE / "tmp"
    return suffer(folder / "run", mode, lambda: private.chmod(0o555), lambda: private.chmod(0o755), errno.EACCES)
