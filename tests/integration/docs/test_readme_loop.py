"""The README's loop, as it stands, in a script, a notebook, a sweep and a job of two ranks; every warning is an error.

Wherever it is interrupted, it ends with the bits of a run that was not.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOP = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0]

SETUP = """
import hashlib, os, signal
from pathlib import Path

import torch

class Loader:
    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return torch.full((3, 4), float(self.position)) + torch.randn(3, 4)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]

def setup():
    global model, optimizer, scheduler, loader
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
    loader = Loader()

def train_step(step):
    if step == fails_at:
        fail()
    loss = model(next(loader)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses[step] = loss.item()
    return loss.item()

def digest():
    state = [sorted(losses.items())[-1], loader.position, scheduler.last_epoch, torch.get_rng_state().tolist()]
    state += [tensor.tolist() for tensor in model.state_dict().values()]
    return hashlib.sha256(repr(state).encode()).hexdigest()

def fail():
    os.kill(os.getpid(), signal.SIGKILL)

losses, total_steps, fails_at = {}, 6, int(os.environ.get("FAILS_AT", -1))
setup()
"""
RANKS = """
import torch.distributed as dist
dist.init_process_group("gloo")
fails_at = fails_at if dist.get_rank() == 1 else -1
torch.manual_seed(dist.get_rank())
model = torch.nn.parallel.DistributedDataParallel(model)
"""
UNINTERRUPTED = "\nos.write(1, f'digest {digest()}\\n'.encode())  # one call: ranks share the pipe\n"


def script(folder: Path, *parts: str) -> Path:
    path = folder / "train.py"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def start(command: list[str], folder: Path, fails_at: int = -1) -> subprocess.CompletedProcess[str]:
    options = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAILS_AT": str(fails_at)}
    nothing = subprocess.DEVNULL
    return subprocess.run(command, cwd=folder, env=options, stdin=nothing, capture_output=True, text=True, check=False)


def digests(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the program has printed at its end, of all ranks; its stderr is empty of warnings."""
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    found = sorted(re.findall(r"^digest (\w+)$", done.stdout, re.MULTILINE))
    assert found, done.stdout
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The digest of a training that nobody interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (found,) = digests(start([sys.executable, "-W", "error", str(script(folder, SETUP, LOOP, UNINTERRUPTED))], folder))
    return found


def test_a_script_that_is_killed_and_started_again_loses_nothing(tmp_path, expected):
    command = [sys.executable, "-W", "error", str(script(tmp_path, SETUP, LOOP, UNINTERRUPTED))]
    assert start(command, tmp_path, fails_at=4).returncode == -9
    assert digests(start(command, tmp_path)) == [expected]


NOTEBOOK = """
cells = {}
exec(compile(SETUP, "cell 1", "exec"), cells)

def interrupt():
    raise KeyboardInterrupt

cells.update(fail=interrupt, fails_at=4)
try:
    exec(compile(LOOP, "cell 2", "exec"), cells)
except KeyboardInterrupt as error:
    last_traceback = error                 # as a notebook keeps it, with all that its frames hold
else:
    raise AssertionError("not interrupted")
cells.update(fails_at=-1)
exec(compile(LOOP, "cell 2", "exec"), cells)
print("digest", cells["digest"]())
exec(compile(LOOP, "cell 2", "exec"), cells)     # all is done: nothing is trained, nothing is said
print("digest", cells["digest"]())
"""


def test_a_notebook_whose_cell_is_interrupted_and_run_again_loses_nothing(tmp_path, expected):
    path = script(tmp_path, f"SETUP, LOOP = {SETUP!r}, {LOOP!r}", NOTEBOOK)
    assert digests(start([sys.executable, "-W", "error", str(path)], tmp_path)) == [expected] * 2


SWEEP = """
for name in ("a", "b", "c"):
    os.mkdir(name)
    os.chdir(name)
    trial = {}
    exec(compile(SETUP + LOOP, name, "exec"), trial)
    print("digest", trial["digest"]())
    os.chdir("..")
"""


def test_a_sweep_of_three_roots_in_one_process_loses_nothing(tmp_path, expected):
    path = script(tmp_path, "import os", f"SETUP, LOOP = {SETUP!r}, {LOOP!r}", SWEEP)
    assert digests(start([sys.executable, "-W", "error", str(path)], tmp_path)) == [expected] * 3
    assert sorted(path.parent.name for path in tmp_path.glob("*/runs")) == ["a", "b", "c"]


def test_a_job_of_two_ranks_of_which_one_is_killed_loses_nothing(tmp_path):
    outcomes = []
    for name, fails_at in (("whole", -1), ("killed", 4)):
        folder = tmp_path / name
        folder.mkdir()
        path = script(folder, SETUP, RANKS, LOOP, UNINTERRUPTED, "dist.destroy_process_group()")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
        command = [*torchrun, sys.executable, "-W", "error", str(path)]
        if fails_at >= 0:
            assert start(command, folder, fails_at).returncode != 0
        outcomes.append(digests(start(command, folder)))
    assert len(outcomes[0]) == 2
    assert outcomes[0] == outcomes[1]
