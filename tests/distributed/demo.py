"""Train with FSDP2, kill ranks, let torchrun start them again, compare: ``scripts/demo_ranks [--quick]``.

The training script is the one of docs/distributed.md. It ends with the same bits as a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def script() -> str:
    """The training script of the documentation."""
    page = (REPOSITORY / "docs" / "distributed.md").read_text("utf-8")
    return page.partition("```python fsdp\n")[2].partition("\n```")[0]


def start(program: Path, root: Path, ranks: int, steps: int) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=9"]
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "RUN": str(root), "STEPS": str(steps), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command, "--monitor-interval=0.2", str(program)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def workers(job: subprocess.Popen[str]) -> list[int]:
    """The process of each rank."""
    found = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text("ascii").split()
    return [pid for pid in map(int, found) if b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def newest(root: Path) -> int:
    return max((int(item.name.partition("-")[2]) for item in root.glob("checkpoint-*")), default=0)


def kill_some(job: subprocess.Popen[str], root: Path, kills: int, dice: random.Random) -> None:
    """Kill a rank after some new checkpoint, at a random moment, again and again."""
    seen = 0
    for number in range(kills):
        while job.poll() is None and newest(root) <= seen:
            time.sleep(0.02)
        seen = newest(root)
        time.sleep(dice.random() * 0.3)
        ranks = workers(job) if job.poll() is None else []
        if ranks:
            victim = dice.choice(ranks)
            print(f"  kill {number + 1}: rank process {victim}, the newest checkpoint is {newest(root)}", flush=True)
            os.kill(victim, signal.SIGKILL)


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
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    ranks, kills, steps = (2, 1, 30) if options.quick else (4, 4, 80)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "train.py")
        program.write_text(script(), "utf-8")
        print(f"{ranks} ranks, {steps} steps, undisturbed", flush=True)
        expected = ended(start(program, Path(folder, "straight"), ranks, steps))
        print(f"the same, with {kills} ranks killed", flush=True)
        job = start(program, Path(folder, "killed"), ranks, steps)
        kill_some(job, Path(folder, "killed"), kills, random.Random(options.seed))
        found = ended(job)
    print(*sorted(expected), sep="\n")
    if found != expected:
        raise SystemExit(f"DIFFERENT: {sorted(found)}")
    print("the same bits")


if __name__ == "__main__":
    main()
