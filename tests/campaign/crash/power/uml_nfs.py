"""NFSv4.2 with real locks, inside a guest: a server, and two hosts in network namespaces that mount what it exports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from checkpointer import CheckpointManager
from checkpointer.errors import RunLockedError
from tests.campaign.crash.power.scenarios import state
from tests.campaign.crash.trainee import MODES, BrokenPromiseError, expect

SERVER = "10.9.0.1"
MODULES = "/run/modules"
LEASE = 10
"""Seconds after which a server frees what a host held that it hears no more of: its shortest."""


def run(*command: str) -> None:
    """Run a program; its words are in the error where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BrokenPromiseError(f"{' '.join(command)}: {done.stderr.strip()}")


def locks_on_nfs(disk: Path) -> None:
    """One writer at a time, whichever host it is on, until it dies; and what it saved is there for the next."""
    _serve(disk)
    first, second = (_host(number) for number in (1, 2))
    for mode in MODES:
        for here, there in ((first, first), (first, second), (second, first)):
            _exclude(here / mode, there / mode, mode)
    for place in (first, second):
        run("umount", str(place))


def _serve(disk: Path) -> None:
    """Export a disk to every host, from this moment on."""
    run("modprobe", "-d", MODULES, "-a", "nfsd", "nfsv4", "veth")
    run("mount", "-t", "tmpfs", "none", "/var/lib/nfs")
    for name in ("etab", "rmtab", "xtab", "state"):
        Path("/var/lib/nfs", name).touch()
    for name in ("rpc_pipefs", "v4recovery"):
        Path("/var/lib/nfs", name).mkdir()
    run("mount", "-t", "nfsd", "none", "/proc/fs/nfsd")
    for what in ("nfsv4leasetime", "nfsv4gracetime"):
        Path("/proc/fs/nfsd", what).write_text(str(LEASE))
    run("ip", "link", "set", "lo", "up")
    run("exportfs", "-o", "rw,no_root_squash,insecure,fsid=0,no_subtree_check", f"*:{disk}")
    subprocess.Popen(["rpc.mountd", "--foreground", "-N", "3"])
    run("rpc.nfsd", "-N", "3", "-V", "4.2", "4")
    Path("/proc/fs/nfsd/v4_end_grace").write_text("Y")  # nobody was here before who could want his locks back


def _host(number: int) -> Path:
    """A host with a network and a name of its own; where it has mounted what is exported."""
    name, place = f"host{number}", Path(f"/run/host{number}")
    bridge, address = f"10.9.{number}.1", f"10.9.{number}.2"
    place.mkdir()
    run("ip", "netns", "add", name)
    run("ip", "link", "add", name, "type", "veth", "peer", "name", "net0", "netns", name)
    run("ip", "address", "add", f"{bridge}/24", "dev", name)
    run("ip", "link", "set", name, "up")
    run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "net0")
    run("ip", "-n", name, "link", "set", "net0", "up")
    mount = f"hostname {name} && mount -t nfs4 -o vers=4.2,hard {bridge}:/ {place}"
    run("nsenter", f"--net=/run/netns/{name}", "unshare", "--uts", "sh", "-c", mount)
    return place


def _exclude(here: Path, there: Path, mode: str) -> None:
    owner = _start(here, mode)
    _check_refused(there, owner)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    before = time.monotonic()
    _take_over(there, mode)
    expect(that=time.monotonic() - before < 60, else_="the lock of a dead process was freed late")


def _start(root: Path, mode: str) -> int:
    """A process that saves, and holds on to the run."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        live = state(0)
        with CheckpointManager(str(root), config={"write": {"mode": mode}}, **live) as manager:
            restored = manager.restore_latest()
            step = restored.step + 1 if restored else 1
            live["state"].update(state(step)["state"])
            manager.save(step)
            manager.wait()
            os.write(writing, b"saved")
            time.sleep(3600)
        sys.exit()
    os.close(writing)
    expect(that=os.read(reading, 5) == b"saved", else_="the first process could not save")
    os.close(reading)
    return child


def _check_refused(root: Path, owner: int) -> None:
    manager = CheckpointManager(str(root), **state(0))
    try:
        manager.restore_latest()
    except RunLockedError as error:
        expect(that=str(owner) in str(error), else_=f"the owner is not named: {error}")
    else:
        raise BrokenPromiseError("two writers at the same time")
    finally:
        manager.close()


def _take_over(root: Path, mode: str) -> None:
    """The next one restores what the dead one saved, bit for bit, saves, and verifies all."""
    live = state(0)
    with CheckpointManager(str(root), config={"write": {"mode": mode}}, **live) as manager:
        restored = manager.restore_latest()
        expect(that=restored is not None, else_="what was saved is not there")
        assert restored is not None
        value = live["state"]["value"]
        expect(that=value == restored.step, else_=f"{value} was restored from step {restored.step}")
        expect(that=bool((live["state"]["tensor"] == value).all()), else_="other bits were restored")
        manager.save(restored.step + 1)
        manager.wait()
    live["state"].update(state(restored.step + 1)["state"])
    with CheckpointManager(str(root), read_only=True, **live) as reader:
        report = reader.verify()
        expect(that=report.ok, else_=f"verify: {report}")
