"""Train with FSDP2, kill ranks, let torchrun start them again, compare: ``scripts/demo_ranks [--quick]``.

The training script is the one of docs/distributed.md. Each kill comes in the middle of a save, and each rank is killed
once. Training ends with the same bits as a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

APART = 4
"""Steps at least between two kills."""

NEW_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Else torchrun keeps its store, where gloo may find the addresses of ranks that have died, and wait for them
(pytorch issue 135712)."""


def script() -> str:
    """The training script of the documentation."""
    page = (REPOSITORY / "docs" / "distributed.md").read_text("utf-8")
    return page.partition("```python fsdp\n")[2].partition("\n```")[0]


def start(program: Path, root: Path, ranks: int, steps: int) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=9"]
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"RUN": str(root), "STEPS": str(steps), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **NEW_STORES}
    return subprocess.Popen(
        [sys.executable, *command, "--monitor-interval=0.2", str(program)],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def workers(job: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank that runs."""
    found = {}
    with contextlib.suppress(OSError):
        for pid in map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text("ascii").split()):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                told = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
                if told:
                    found[int(told[1])] = pid
    return found


def in_the_middle_of_a_save(root: Path) -> bool:
    """Whether some files of an uncommitted checkpoint are there."""
    with contextlib.suppress(OSError):
        attempts = (root / ".checkpointer" / "tmp").iterdir()
        return any(attempt.is_dir() and any(attempt.iterdir()) for attempt in attempts)
    return False


def kill_some(job: subprocess.Popen[str], root: Path, victims: Sequence[int]) -> None:
    """Kill each of these ranks in the middle of a save, some checkpoints after torchrun has started all anew."""
    for number, rank in enumerate(victims, start=1):
        seen = newest(root)
        while newest(root) < seen + APART or not in_the_middle_of_a_save(root):
            if job.poll() is not None:
                raise SystemExit(f"the job ended before kill {number}")
            time.sleep(0.001)
        dead = workers(job)
        os.kill(dead[rank], signal.SIGKILL)
        who = "rank 0, the coordinator," if rank == 0 else f"rank {rank}"
        print(f"  kill {number}: {who} in the middle of a save; the newest checkpoint is {newest(root)}", flush=True)
        wait_for_restart(job, {*dead.values()})


def wait_for_restart(job: subprocess.Popen[str], dead: set[int]) -> None:
    """Until none of the killed job's processes runs, and others do."""
    while job.poll() is None and (dead & {*workers(job).values()} or not workers(job)):
        time.sleep(0.02)


def newest(root: Path) -> int:
    return max((int(item.name.partition("-")[2]) for item in root.glob("checkpoint-*")), default=0)


def ended(job: subprocess.Popen[str]) -> set[str]:
    """What the ranks say in the end."""
    output, _ = job.communicate(timeout=600)
    said = set(re.findall(r"step \d+, model [0-9a-f]{16}", output))
    if job.returncode or not said:
        raise SystemExit(f"the job failed with status {job.returncode}: {output[-2000:]}")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/demo_ranks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two ranks, one kill")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the ranks")
    options = parser.parse_args()
    ranks, kills, steps = (2, 1, 30) if options.quick else (4, 4, 80)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "train.py")
        program.write_text(script(), "utf-8")
        print(f"{ranks} ranks, {steps} steps, undisturbed", flush=True)
        expected = ended(start(program, Path(folder, "straight"), ranks, steps))
        print(f"the same, with {kills} ranks killed", flush=True)
        job = start(program, Path(folder, "killed"), ranks, steps)
        victims = random.Random(options.seed).sample(range(ranks), kills)
        kill_some(job, Path(folder, "killed"), victims)
        found = ended(job)
    print(*sorted(expected), sep="\n")
    if found != expected:
        raise SystemExit(f"DIFFERENT: {sorted(found)}")
    print("the same bits")


if __name__ == "__main__":
    main()
