"""Kills processes before each operation on an object store, and says what the next process finds.

A program: ``python -m tests.campaign.crash.kill_operations SCENARIO URL OPTIONS FIRST STRIDE``. It imports torch
once, and forks for each point: a child that is killed with SIGKILL before its n-th operation, then one that checks.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import s3fs  # noqa: F401 - imported once, in the parent; no client may be made before the fork
import torch

from checkpointer.testing import Fault, faulty
from tests.campaign.crash.kill_points import in_child
from tests.campaign.crash.scenarios import SCENARIOS
from tests.campaign.crash.test_storage_faults import check, maker_of
from tests.conftest import Root


def main() -> None:
    scenario, url, options, first, stride = sys.argv[1:]
    prepare, act, allowed = SCENARIOS[scenario]
    torch.set_num_threads(1)
    number, tried = int(first), 0
    while True:
        root = Root("s3", f"{url}/{number}", json.loads(options))

        def work(root: Root = root, number: int = number) -> None:
            prepare(maker_of(root))
            with faulty(Fault(at=number, instead=lambda: os.kill(os.getpid(), signal.SIGKILL))):
                act(maker_of(root))

        status = in_child(work)
        if status not in (0, -signal.SIGKILL):
            raise SystemExit(f"operation {number}: the scenario itself failed with {status}")
        what = f"killed before operation {number}"
        if in_child(lambda root=root, what=what: check(root, allowed, what)) != 0:  # type: ignore[misc]
            raise SystemExit(f"operation {number} of {scenario}: what it left is not as it should be")
        if status == 0:
            break
        tried += 1
        number += int(stride)
    print("ok", tried)


if __name__ == "__main__":
    main()
