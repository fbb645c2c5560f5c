"""Power cuts of a whole machine: User-Mode Linux, killed while it trains.

A guest is a process of this machine. Its disks are files; when it is killed, whatever its kernel had
not handed to them is gone. The next guest mounts them, which replays their journals, looks, and trains on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tests.campaign.crash.power.engine import State, Tally, look, scratch
from tests.campaign.crash.power.log_writes import Write, losses, parse, replay
from tests.campaign.crash.power.persistence import cuts, fingerprint
from tests.campaign.crash.power.power_cuts import impossible_here, mounted
from tests.campaign.crash.power.record import Record
from tests.campaign.crash.power.recorder import scan
from tests.campaign.crash.power.state_checks import expectations
from tests.campaign.crash.trainee import MODES, Plan, reference

HERE = Path(__file__).parent
FORMATS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
DISK = 400 << 20
"""Bytes, of which few are ever written: xfs makes no file system below 300 MiB."""

STEPS = {False: 500, True: 60}
"""Of a run without and with wide tensors: more than a campaign comes to."""

PATIENCE = 300
"""Seconds. A guest imports torch in 15 to 25 of them on a quiet machine."""

PACKAGES = "apt-get install user-mode-linux kmod iproute2 dmsetup nfs-kernel-server nfs-common xfsprogs e2fsprogs gcc"
_TOOLS = ("linux.uml", "mkfs.ext4", "mkfs.xfs", "modprobe", "ip", "dmsetup", "exportfs", "rpc.nfsd", "mount.nfs")


def lacking() -> str | None:
    """What this machine lacks for a guest, and how to get it; ``None`` if nothing does."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "needs Linux on x86-64"
    tools = (*_TOOLS, *(("cc",) if _has_amx() else ()))
    missing = [name for name in tools if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    again = "then: scripts/crash_states --only uml"
    if missing:
        return f"needs {', '.join(missing)} (Debian: {PACKAGES}); {again}"
    return impossible_here()  # the disks that log are mounted here


def _has_amx() -> bool:
    return " amx_tile" in Path("/proc/cpuinfo").read_text()


class Guest:
    """A machine that runs, until its power goes. ``share`` is a folder that it writes through to."""

    def __init__(self, part: str, share: Path, disks: list[Path], *, memory: str = "2G") -> None:
        self._report = share / "report"
        self._report.unlink(missing_ok=True)
        self._console = share / "console"
        settings = {
            "PART": part, "SHARE": share, "PYTHON": sys.executable, "REPOSITORY": HERE.parents[2],
            "rootfstype": "hostfs", "init": HERE / "uml_init.sh", "mem": memory, "uml_dir": share / "uml",
            "con": "null", "con0": "fd:0,fd:1", "ssl": "null",
            **{f"ubd{letter}": disk for letter, disk in zip("abcdefg", disks, strict=False)},
        }  # fmt: skip
        command = ["linux.uml", "ro", "quiet", *(f"{name}={value}" for name, value in settings.items())]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
                env={**os.environ, **_preload(share)}, cwd=share,
            )  # fmt: skip

    def said(self) -> Counter[str]:
        """How often it has reported what; fails with what it found wrong."""
        lines = self._report.read_text().splitlines() if self._report.exists() else []
        wrong = [line for line in lines if line.startswith("wrong ")]
        assert not wrong, wrong[0]
        return Counter(lines)

    def wait_for(self, word: str, times: int = 1) -> None:
        """Until it has said something so often."""
        until = time.monotonic() + PATIENCE
        while self.said()[word] < times:
            assert self._process.poll() is None, f"the guest ended: {self._last_words()}"
            assert time.monotonic() < until, f"no {word!r} within {PATIENCE} s: {self._last_words()}"
            time.sleep(0.05)

    def _last_words(self) -> str:
        output = self._console.parent / "output"
        said = output.read_text(errors="replace") if output.exists() else ""
        return (said + self._console.read_text(errors="replace"))[-2000:]

    def cut_power(self) -> None:
        """Every process that it consists of is gone at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_until_off(self) -> None:
        """Until it has done its work."""
        self.wait_for("done")
        self._process.wait(PATIENCE)


def _preload(share: Path) -> Mapping[str, str]:
    """What the guest's own environment needs on a processor that it is older than."""
    if not _has_amx():
        return {}
    library = share / "xstate.so"
    if not library.exists():
        source = HERE / "uml_xstate.c"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


@contextlib.contextmanager
def powered(part: str, share: Path, disks: list[Path], **options: Any) -> Iterator[Guest]:
    """A guest, which is gone afterwards."""
    guest = Guest(part, share, disks, **options)
    try:
        yield guest
    finally:
        guest.cut_power()


@contextlib.contextmanager
def workshop() -> Iterator[tuple[Path, Path]]:
    """A folder for disks, and one to share."""
    with scratch() as name:
        share = Path(name) / "share"
        share.mkdir()
        yield Path(name), share


def formatted(folder: Path, kind: str) -> Path:
    """A new disk."""
    image = folder / f"{kind}.img"
    with image.open("wb") as file:
        file.truncate(DISK)
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    subprocess.run([*FORMATS[kind], str(image)], check=True, env={**os.environ, "PATH": path}, capture_output=True)
    return image


# ------------------------------------------------------------------------------------------- killed in the middle


def kills(boots: int, seed: int, *, careless: bool = False) -> tuple[Tally, Counter[str]]:
    """Machines that train in every mode on every file system, and whose power goes; and where it caught them.

    Raises:
        AssertionError: the next one has found something lost.
    """
    rng = random.Random(seed)
    tally = Tally(records=boots)
    with workshop() as (folder, share):
        disks = [formatted(folder, kind) for kind in FORMATS]
        for wide, steps in STEPS.items():
            (share / f"hashes-{wide}.json").write_text(json.dumps(reference(_plan("sync", steps, wide=wide))))
        for boot in range(boots + 1):  # the last one only looks
            runs = _runs(rng, again=boot > 0, careless=careless)
            (share / "runs.json").write_text(json.dumps(runs))
            with powered("kills", share, disks) as guest:
                if boot and boot < boots and rng.random() < 0.2:  # while it looks at what the one before left
                    guest.wait_for("warm")
                    time.sleep(rng.uniform(0, 8))
                else:
                    guest.wait_for("ready", len(runs))
                    time.sleep(rng.uniform(0, 3))
                guest.said()
        phases = Counter(line for line in (share / "phases").read_text().splitlines())
        tally.operations = sum(path.read_text().count("save ") for path in share.glob("*.book"))
    tally.moments = boots
    tally.enumerated = tally.checked = phases.total()
    return tally, phases


def _plan(mode: str, steps: int, *, wide: bool) -> Plan:
    return Plan(0, mode, 2, wide, steps)


def _runs(rng: random.Random, *, again: bool, careless: bool) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{kind}-{mode}", "kind": kind, "careless": careless, "again": again,
            "plan": vars(_plan(mode, STEPS[wide], wide=wide)), "seed": rng.randrange(1 << 30),
        }
        for number, (kind, mode) in enumerate(itertools.product(FORMATS, MODES))
        for wide in [number % 2 == 1]
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- locks over a network


def nfs() -> Tally:
    """A server and two hosts, in one guest."""
    with workshop() as (folder, share), powered("nfs", share, [formatted(folder, "ext4")]) as guest:
        guest.wait_until_off()
        checked = 3 * len(MODES)
    return Tally(records=1, enumerated=checked, checked=checked)


# ------------------------------------------------------------------------------------------- a disk that logs writes


LOGGED = ("save and prune", "save large files", "overwrite")
LOG = 1 << 30
"""Bytes of a log, of which few are ever written."""


def logged(kind: str, name: str, _: int, seed: int) -> Tally:
    """What a disk may hold after each write of a scenario, with what its cache loses lost: each mounted and looked at.

    Raises:
        AssertionError: the persistence model does not foresee a state.
    """
    tally = Tally(records=1)
    with workshop() as (folder, share):
        disk, log = formatted(folder, kind), folder / "log.img"
        subprocess.run(["cp", "--sparse=always", disk, folder / "before.img"], check=True)
        with log.open("wb") as file:
            file.truncate(LOG)
        with powered(f"log-writes,{kind},{name.replace(' ', '_')}", share, [disk, log]) as guest:
            guest.wait_until_off()
        run = pickle.loads((share / "record").read_bytes())
        tally.operations = run.count
        found = _look_at_disks(run, log, folder / "before.img", random.Random(seed), tally)
        return look(run, found, tally=tally)


def _look_at_disks(run: Record, log: Path, before: Path, rng: random.Random, tally: Tally) -> Iterator[State]:
    """The different states of which each operation had to make something sure."""
    writes = parse(log)
    begun = next(number for number, write in enumerate(writes, 1) if write.mark == "0")
    replay(log, writes[:begun], before)
    moments, promised = list(cuts(run)), list(expectations(run))
    known: set[object] = set()
    replayed = begun
    for end, sure, since in losses(writes, rng, begun):
        tally.moments += sure > replayed
        replay(log, writes[replayed:sure], before)
        replayed = sure
        with _mounted_copy(before, log, since) as place:
            tree = scan(str(place / "area"))
        tally.enumerated += 1
        last = max(int(write.mark) for write in writes[:end] if write.mark.isdigit())
        following = min((int(write.mark) for write in writes[end:] if write.mark.isdigit()), default=last)
        foreseen = any(moments[end].explains(tree) for end in (last, following))
        assert foreseen, f"after operation {last} the disk held what the persistence model does not foresee"
        key = (fingerprint(tree), promised[following])
        if key not in known:
            known.add(key)
            yield following, tree, promised[following]


@contextlib.contextmanager
def _mounted_copy(before: Path, log: Path, since: list[Write]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=before.parent) as name:
        copy = Path(name) / "copy.img"
        subprocess.run(["cp", before, copy], check=True)
        replay(log, since, copy)
        with mounted(copy, Path(name) / "mounted") as place:
            yield place


def _killed(boots: int, seed: int) -> Tally:
    tally, phases = kills(boots, seed)
    print(f"killed in: {', '.join(f'{phase} {count}' for phase, count in sorted(phases.items()))}", flush=True)
    return tally


def _careless(_: int, seed: int) -> Tally:
    """The rig can tell: without any fsync, the first power cut loses what was called durable."""
    try:
        kills(1, seed, careless=True)
    except AssertionError as noticed:
        if not any(word in str(noticed) for word in ("was durable", "CorruptCheckpointError")):
            raise
        return Tally(records=1, moments=1)
    raise AssertionError("nobody notices that nothing was fsynced")


PARTS: dict[str, Callable[[int, int], Tally]] = {
    "kills": _killed,
    "kills without fsync": _careless,
    "nfs": lambda boots, seed: nfs(),
    **{f"log-writes {kind}: {name}": partial(logged, kind, name) for kind in FORMATS for name in LOGGED},
}
"""By name: given how many boots there shall be, and a seed."""
