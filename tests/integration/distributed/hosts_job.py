"""What each rank of a job over two hosts does: ``torchrun -m tests.integration.distributed.hosts_job FOLDER CASE…``."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from checkpointer import CheckpointManager
from checkpointer.repository.lock import WriterLock
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, open_storage

PRIVATE = Path("/mnt")
"""A disk that each host has of its own."""

CONFIG = {"write": {"rank_timeout": "2s"}}


def caught(work: Callable[[], object]) -> dict[str, Any]:
    """The error of ``work``, and how long it took."""
    began = time.monotonic()
    told = "no error"
    try:
        work()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return {"told": told, "seconds": time.monotonic() - began}


def committed(root: Path) -> list[int]:
    repository = Repository(open_storage(root))
    assert repository.verify_all().ok
    return [info.step for info in repository.list_checkpoints().checkpoints]


def model() -> nn.Module:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)))


def manager(root: Path, weights: nn.Module) -> CheckpointManager:
    return CheckpointManager(root, config={**CONFIG, "save": {"every_n_steps": 1, "every": "1h"}}, weights=weights)


def normal(folder: Path) -> dict[str, Any]:
    """Saved by a job over both hosts, and restored by it."""
    trained = model()
    with manager(folder / "run", trained) as mgr:
        mgr.save(1).result()
        mgr.save(2).result()
    saved = [parameter.clone() for parameter in trained.parameters()]
    for parameter in trained.parameters():
        parameter.data.zero_()
    with manager(folder / "run", trained) as mgr:
        step = mgr.restore_latest().step
    same = all(map(torch.equal, saved, trained.parameters()))
    return {"step": step, "same": same, "monotonic": time.monotonic(), "committed": committed(folder / "run")}


def locked_here(root: Path) -> WriterLock:
    (root / ".checkpointer").mkdir(parents=True, exist_ok=True)
    lock = WriterLock(str(root), str(root / ".checkpointer" / "lock"))
    lock.acquire()
    return lock


def on_the_second_host() -> bool:
    return socket.gethostname() == "host-1" and os.environ["LOCAL_RANK"] == "0"


def stale_owner(folder: Path) -> dict[str, Any]:
    """A job on the second host was killed: its words are still there, its lock is not."""
    root = folder / "stale"
    if on_the_second_host():
        pid = os.fork()
        if pid == 0:
            locked_here(root)
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
    dist.barrier()
    owner = json.loads((root / ".checkpointer" / "owner.json").read_text("utf-8"))
    dist.barrier()

    def save() -> None:
        with manager(root, model()) as mgr:
            mgr.save(1).result()

    return {"owner": owner["host"], **caught(save), "committed": committed(root)}


def living_owner(folder: Path) -> dict[str, Any]:
    """A job on the second host is writing."""
    root = folder / "living"
    lock = locked_here(root) if on_the_second_host() else None
    dist.barrier()
    found = caught(lambda: manager(root, model()).save(1))
    dist.barrier()
    if lock is not None:
        lock.release()
    return {**found, "committed": committed(root)}


def private_root(folder: Path) -> dict[str, Any]:
    """Each host has its own directory under the same name."""
    del folder
    root = PRIVATE / "run"
    found = caught(lambda: manager(root, model()).save(1))
    return {**found, "committed": committed(root), "left": left(root)}


def left(root: Path) -> list[str]:
    """What is unfinished, or was."""
    return [str(file) for file in root.glob(".checkpointer/t*/*")]


def private_copy(folder: Path) -> dict[str, Any]:
    """Each host has its own directory under the same name, with the same checkpoint in it."""
    own, here = PRIVATE / "copied", manager(folder / "copied", model())
    here.save(1).result()
    here.close()
    if os.environ["LOCAL_RANK"] == "0":
        shutil.copytree(folder / "copied", own)
    dist.barrier()
    found = caught(lambda: manager(own, model()).restore_latest())
    return {**found, "committed": committed(own), "left": left(own)}


def link_down(folder: Path) -> dict[str, Any]:
    """The hosts lose each other while both are writing."""
    root = folder / "down"
    mgr = manager(root, model())
    mgr.save(1).result()
    whole = LocalStorage.write

    def waiting(self: LocalStorage, path: str, *arguments: Any, **options: Any) -> float:
        (folder / f"writing-{dist.get_rank()}").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)
        return whole(self, path, *arguments, **options)

    LocalStorage.write = waiting  # type: ignore[method-assign]
    found = caught(lambda: mgr.save(2).result())
    return {**found, "committed": committed(root)}


WORK = {
    "run": normal,
    "stale owner": stale_owner,
    "living owner": living_owner,
    "private root": private_root,
    "private copy": private_copy,
    "link down": link_down,
}


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for case in sys.argv[2:]:
        found = {"host": socket.gethostname(), **WORK[case](folder)}
        place = folder / f"{case}-{dist.get_rank()}"
        place.with_suffix(".new").write_text(json.dumps(found), "utf-8")
        place.with_suffix(".new").rename(place.with_suffix(".json"))
    if "link down" in sys.argv:
        os._exit(0)  # there is nobody to say good-bye to
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
