"""A disk whose fsync fails once, and then says that all is well."""

from __future__ import annotations

import os
from pathlib import Path

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError
from checkpointer.storage import local as local_storage
from tests.campaign.crash.disks import ext4, run
from tests.campaign.crash.suffering import Training, check_afterwards, fingerprint


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
