"""Two hosts on one machine: network namespaces, joined by a link, with names, mounts and a clock of their own.

A program: ``unshare --mount --net python -m tests.integration.distributed.hosts FOLDER [CASE…]``, as root; with
``--user --map-root-user`` as anybody whom the kernel lets. A job of ``torchrun --nnodes 2`` runs the cases, and each is
one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[3]
PORT = 29500
CASES = ("run", "stale owner", "living owner", "private root", "private copy", "link down")
"""In this order: none can follow the last."""

AHEAD = 1_000_000
"""Seconds by which the monotonic clock of the second host differs: it was started at another time."""

LIMIT = 150
"""Seconds that a job may take: a torchrun that has lost the other host waits for long."""


class Host(NamedTuple):
    """One of the two."""

    name: str
    address: str
    holder: subprocess.Popen[str]
    """The process that the namespaces live as long as."""

    def inside(self, *command: str) -> list[str]:
        """What runs a command on this host."""
        spaces = ("--net", "--uts", "--mount", "--pid", "--time")
        return ["nsenter", f"--target={_child_of(self.holder.pid)}", *spaces, "--wd=.", *command]

    def run(self, *command: str) -> None:
        """Run a command to its end."""
        run(*self.inside(*command))


def run(*command: str) -> None:
    """Run a command to its end; with its words where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")


def _child_of(pid: int) -> int:
    """The process that ``unshare --fork`` has forked into the namespaces."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()[0])


@contextlib.contextmanager
def two_hosts(shared: Path) -> Iterator[tuple[Host, Host]]:
    """Hosts that both see ``shared``; ``/mnt`` is a disk of its own on each."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(_host(number)) for number in range(2))
        run("ip", "link", "add", "between", "type", "veth", "peer", "name", "other")
        for host, end in ((first, "between"), (second, "other")):
            run("ip", "link", "set", end, "netns", str(_child_of(host.holder.pid)))
            host.run("ip", "link", "set", end, "name", "wire")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "wire")
            for name in ("wire", "lo"):
                host.run("ip", "link", "set", name, "up")
        shared.mkdir(parents=True, exist_ok=True)
        yield first, second


@contextlib.contextmanager
def _host(number: int) -> Iterator[Host]:
    spaces = ["--net", "--uts", "--mount", "--pid", "--mount-proc", "--time", f"--monotonic={number * AHEAD}"]
    name = f"host-{number}"
    begin = f"hostname {name} && mount -t tmpfs none /mnt && echo ready && exec sleep infinity"
    command = ["unshare", *spaces, "--fork", "--kill-child", "sh", "-c", begin]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != "ready\n":
                raise SystemExit(f"{name}: {' '.join(command)} does not work here")
            yield Host(name, f"10.77.0.{number + 1}", holder)
        finally:
            holder.kill()


def torchrun(host: Host, program: Sequence[str], *, server: str, leads: bool, ranks: int) -> subprocess.Popen[str]:
    """Start a job's launcher on one host."""
    options = [
        "--nnodes=2", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", f"--rdzv-endpoint={server}:{PORT}",
        f"--rdzv-conf=is_host={int(leads)},join_timeout=60", "--rdzv-id=hosts", f"--local-addr={host.address}",
        "--monitor-interval=0.2",
    ]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", *program]
    limited = host.inside("timeout", "--kill-after=5", str(LIMIT), *command)
    return subprocess.Popen(
        limited, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )


def cut(hosts: Sequence[Host], folder: Path, jobs: Sequence[subprocess.Popen[str]], ranks: int) -> None:
    """Take the link down once all ranks are in the middle of a save, and wait for the words of all."""

    def wait_for(pattern: str) -> None:
        limit = time.monotonic() + LIMIT
        while len(list(folder.glob(pattern))) < ranks and time.monotonic() < limit:
            if any(job.poll() is not None for job in jobs):
                return
            time.sleep(0.02)

    wait_for("writing-*")
    hosts[1].run("ip", "link", "set", "wire", "down")
    (folder / "cut").touch()
    wait_for("link down-*.json")


def heard(folder: Path, ranks: int, cases: Sequence[str]) -> list[dict[str, object]]:
    """What the ranks have said of each case."""
    found: list[dict[str, object]] = []
    for case in cases:
        files = [folder / f"{case}-{rank}.json" for rank in range(ranks)]
        found.append({"case": case, "ranks": [json.loads(file.read_text("utf-8")) for file in files if file.exists()]})
    return found


def carry_out(folder: Path, cases: Sequence[str], ranks: int) -> str:
    """Run a job that goes through the cases; what its launchers say, if they fail."""
    with two_hosts(folder) as hosts:
        program = ["tests.integration.distributed.hosts_job", str(folder), *cases]
        jobs = [torchrun(host, program, server=hosts[0].address, leads=host is hosts[0], ranks=ranks) for host in hosts]
        lost = "link down" in cases
        if lost:
            cut(hosts, folder, jobs, 2 * ranks)
        else:
            for job in jobs:
                job.wait()
    said = [job.communicate()[1] for job in jobs]  # where the hosts have lost each other, it has ended with them
    return "" if lost or not any(job.returncode for job in jobs) else "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--ranks", type=int, default=1, help="on each host")
    options = parser.parse_args()
    cases = options.cases or CASES
    failed = carry_out(options.folder, cases, options.ranks)
    for line in heard(options.folder, 2 * options.ranks, cases):
        print(json.dumps(line))
    if failed:
        raise SystemExit(failed)


if __name__ == "__main__":
    main()
