"""Real power cuts: a file system in an image, cloned at each operation as it lies on its disk.

What the clone holds is what the system has handed to the disk by then, and nothing of its caches; mounting it replays
the journal, as after a power cut. Needs root, loop devices, and xfs for the clones.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.crash.power.engine import State, Tally
from tests.campaign.crash.power.persistence import Cut, cuts, fingerprint
from tests.campaign.crash.power.record import Record, Tree
from tests.campaign.crash.power.recorder import Recorder, scan
from tests.campaign.crash.power.scenarios import ROOT, Scenario, prepare, record
from tests.campaign.crash.power.state_checks import expectations

FILE_SYSTEMS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
IMAGE = 320 << 20
"""Bytes of an image: xfs makes none below 300 MiB. It is sparse."""

_FICLONE = 0x40049409  # ioctl_ficlone(2)


def lacking() -> str | None:
    """What this machine lacks for power cuts, and how to get it; ``None`` if they should be possible."""
    if sys.platform != "linux":
        return "needs Linux"
    again = "then: scripts/crash_states --only 'power cuts'"
    if not _may_mount() or not os.path.exists("/dev/loop-control"):
        return f"needs root and loop devices (in a container: --privileged); {again}"
    missing = [name for name in ("mkfs.xfs", "mkfs.ext4", "mount", "umount") if shutil.which(name) is None]
    return f"needs {', '.join(missing)}: apt-get install xfsprogs e2fsprogs mount; {again}" if missing else None


def impossible_here() -> str | None:
    """Why there can be no power cuts on this machine, though nothing seems to be lacking, or what is."""
    reason = lacking()
    if reason is not None:
        return reason
    try:
        with tempfile.TemporaryDirectory() as folder, _reflinks(Path(folder)):
            return None
    except subprocess.CalledProcessError as error:
        return f"cannot mount an image here: {error.stderr.strip()[:200]}"


def _may_mount() -> bool:
    """Whether this process has the capability CAP_SYS_ADMIN, number 21."""
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return capabilities is not None and bool(int(capabilities[1], 16) >> 21 & 1)


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """The file system in an image, whose journal is replayed."""
    place.mkdir(exist_ok=True)
    _run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        _unmount(place)


def _unmount(place: Path) -> None:
    """Patiently: the kernel lets go of the loop device of an image inside some time after that was unmounted."""
    for _ in range(100):
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("umount", str(place))
            return
        time.sleep(0.1)
    _run("umount", str(place))


@contextlib.contextmanager
def _reflinks(folder: Path) -> Iterator[Path]:
    """A file system whose files can be cloned."""
    image = _image(folder / "outer.img", 4 * IMAGE)
    _run(*FILE_SYSTEMS["xfs"], "-m", "reflink=1", str(image))
    with mounted(image, folder / "outer") as place:
        yield place


def _image(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _clone(image: Path, target: Path) -> None:
    with image.open("rb") as source, target.open("wb") as file:
        fcntl.ioctl(file.fileno(), _FICLONE, source.fileno())


@contextlib.contextmanager
def power_cuts(scenario: Scenario, kind: str, stride: int = 1) -> Iterator[tuple[Record, Iterator[tuple[Cut, Tree]]]]:
    """Carry a scenario out on a file system of ``kind``, whose power goes after each ``stride``-th operation.

    Yields the record, and each moment with what the disk held then.
    """
    with tempfile.TemporaryDirectory() as name, _reflinks(Path(name)) as outer:
        image = _image(outer / "disk.img", IMAGE)
        _run(*FILE_SYSTEMS[kind], str(image))
        with mounted(image, outer / "live") as live:
            area = live / "area"
            area.mkdir()
            prepare(scenario, str(area))
            os.sync()
            recorder = Recorder(str(area), ROOT)
            recorder.after_each = lambda end: None if end % stride else _clone(image, outer / f"{end}.img")
            run = record(scenario, str(area), recorder=recorder)
        yield run, _disks(run, outer)


def _disks(run: Record, outer: Path) -> Iterator[tuple[Cut, Tree]]:
    for cut in cuts(run):
        clone = outer / f"{cut.end}.img"
        if clone.exists():
            with mounted(clone, outer / "clone") as place:
                tree = scan(str(place / "area"))
            clone.unlink()
            yield cut, tree


def real_states(
    run: Record, disks: Iterator[tuple[Cut, Tree]], *, damaged: bool = False, tally: Tally | None = None
) -> Iterator[State]:
    """The different ones among the states that real power cuts left.

    Raises:
        AssertionError: the persistence model does not know such a state.
    """
    count = Tally() if tally is None else tally
    count.records += 1
    count.operations += run.count
    promised = list(expectations(run, damaged=damaged))
    known: set[object] = set()
    for cut, tree in disks:
        count.moments += 1
        count.enumerated += 1
        last = run.operations[cut.end - 1]
        assert cut.explains(tree), f"after {last} the disk held what the persistence model does not foresee"
        key = (fingerprint(tree), promised[cut.end])
        if key not in known:
            known.add(key)
            yield cut.end, tree, promised[cut.end]
