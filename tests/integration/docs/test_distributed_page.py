"""The code of docs/distributed.md is run as it stands there."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from tests.support.ranks import run

REPOSITORY = Path(__file__).resolve().parents[3]


def block(name: str) -> str:
    page = (REPOSITORY / "docs" / "distributed.md").read_text("utf-8")
    return page.partition(f"```python {name}\n")[2].partition("\n```")[0]


def train(root: str, steps: int) -> str:
    """The script, in a process that torchrun might have started."""
    os.environ.update(RUN=root, STEPS=str(steps))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(block("fsdp"), "train.py", "exec"), {"__name__": "__main__"})
    return said.getvalue()


train.makes_its_group = True  # type: ignore[attr-defined]


def digests(said: list[str]) -> set[str]:
    found = {match for text in said for match in re.findall(r"step \d+, model [0-9a-f]{16}", text)}
    assert len(found) == 1, said
    return found


def test_the_script_resumes_bit_for_bit_and_at_another_number_of_ranks(tmp_path):
    straight = digests(run(2, train, str(tmp_path / "straight"), 8))
    digests(run(2, train, str(tmp_path / "broken"), 4))
    assert digests(run(2, train, str(tmp_path / "broken"), 8)) == straight
    assert "step 10" in digests(run(4, train, str(tmp_path / "broken"), 10)).pop()
    assert sorted(item.name for item in (tmp_path / "broken").glob("check*")) == [
        "checkpoint-10",
        "checkpoint-6",
        "checkpoint-8",
    ]


def test_the_example_of_the_plug_ins_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(block("dcp"), space)
    assert space["state"]["step"] == 7
    assert (tmp_path / "runs" / "dcp" / "checkpoint-7" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_starts_killed_ranks_again_and_training_ends_with_the_same_bits(request):
    if not request.config.getoption("--thorough"):
        pytest.skip("each process of torchrun imports torch: with --thorough, or scripts/demo_ranks")
    demo = [sys.executable, "-m", "tests.campaign.distributed.demo", "--quick"]
    done = subprocess.run(demo, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill 1: rank " in done.stdout
    assert "in the middle of a save" in done.stdout
    assert done.stdout.endswith("the same bits\n")


@pytest.mark.filterwarnings("ignore:torch.distributed is")  # DCP's own, in one process
def test_the_example_of_a_managers_checkpoint_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    trained = torch.optim.AdamW(saved.parameters(), lr=0.5)
    saved(torch.ones(2)).sum().backward()
    trained.step()
    with CheckpointManager("runs/gpt", model=saved, optimizer=trained) as mgr:
        mgr.save(500)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    exec(block("manager"), {"model": model, "optimizer": optimizer})
    assert torch.equal(model.weight, saved.weight)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], trained.state[saved.weight]["exp_avg"])
