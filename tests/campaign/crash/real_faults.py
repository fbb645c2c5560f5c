"""Lets real file systems and real limits fail under a training process, and looks at what that does to it.

A program: ``unshare --mount python -m tests.campaign.crash.real_faults FOLDER [SCENARIO…]``, as root; with ``--user
--map-root-user``, where the kernel lets users mount a tmpfs. What it mounts is visible to it alone, and goes when it
ends. It imports torch once, forks for each scenario, and prints a line of JSON for each. ``--every-mode`` tries each
scenario in every mode, not in one of them.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from checkpointer.errors import CheckpointerWarning
from tests.campaign.crash import disks, limits, lying_fsync
from tests.campaign.crash.suffering import Training, Unavailable, check_afterwards
from tests.campaign.crash.trainee import MODES

PATIENCE = 60
"""Seconds. Only a bug takes that long."""


SCENARIOS: dict[str, Callable[[Path, str], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        limits.file_size, limits.large_file_size, limits.open_files, limits.address_space, limits.no_permission,
        disks.full_tmpfs, disks.full_ext4, disks.full_at_start, disks.no_inodes, disks.filled_meanwhile,
        disks.read_only_at_start, disks.read_only_meanwhile, lying_fsync.failing_fsync, lying_fsync.retried_fsync,
    )
}  # fmt: skip


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
