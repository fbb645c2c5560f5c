"""What the README shows works as it stands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from torch import nn

from checkpointer import Config
from checkpointer.cli import main

ROOT = Path(__file__).parents[3]
README = ROOT / "README.md"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[int, str]]:
    """(line in the README, text) of each block in ``language``."""
    text = README.read_text(encoding="utf-8")
    found = [match for match in _BLOCK.finditer(text) if match[1] == language]
    assert found, f"the README has no {language} block"
    return [(text.count("\n", 0, match.start(2)), match[2]) for match in found]


def readers_names() -> dict[str, Any]:
    """What a reader of the README has at hand: a small training program."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)

    class Loader:
        position = 0

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    loader = Loader()

    def train_step(_: object) -> float:
        loader.position += 1
        loss: torch.Tensor = model(torch.randn(3, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
        "train_step": train_step,
        "dataset": torch.randn(96, 4),
        "epochs": 2,
        "evaluate": lambda _: 0.5,
        "patience": 0,
        "total_steps": 6,
    }


def import_lightning_file(names: dict[str, Any]) -> None:
    """As in the README: what Lightning's trainer saves of a module that keeps the model as its attribute ``model``."""
    names["train_step"](0)
    file = {
        "epoch": 1,
        "global_step": 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in names["model"].state_dict().items()},
        "optimizer_states": [names["optimizer"].state_dict()],
        "lr_schedulers": [names["scheduler"].state_dict()],
    }
    torch.save(file, "lightning.ckpt")
    command = "checkpointer import lightning.ckpt runs/from-lightning"
    assert f"`{command}`" in README.read_text(encoding="utf-8")
    with mock.patch.object(sys, "argv", command.split()), pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def run_python_blocks() -> None:
    """Each block with new live objects, as in a new process, on the runs that the blocks before it have written."""
    import_lightning_file(readers_names())
    imports: dict[str, Any] = {}
    for line, source in blocks("python"):
        names = {**imports, **readers_names()}
        code = compile("\n" * line + source, str(README), "exec")
        exec(code, names)
        imports["CheckpointManager"] = names["CheckpointManager"]


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks()
    runs = {path.name for path in (tmp_path / "runs").iterdir()}
    assert runs == {"accumulation", "announced", "epochs", "from-lightning", "preemptible", "vit", "whole"}


def test_yaml_blocks_are_valid_configurations() -> None:
    for _, text in blocks("yaml"):
        config = Config.from_mapping(yaml.safe_load(text))
        assert config != Config()


def test_commands_of_the_readme_succeed_on_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_python_blocks()
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0][1], encoding="utf-8")
    commands = [line for _, text in blocks("console") for line in text.splitlines()]
    for command in commands:
        prompt, *words = shlex.split(command)
        assert (prompt, words[0]) == ("$", "checkpointer")
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        expected = 1 if words[1] == "diff" else 0  # the state of another step differs
        assert (ended.value.code, printed.err) == (expected, ""), command
        assert printed.out, command


def test_files_that_the_readme_links_to_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_table_of_errors_is_complete_and_names_the_builtins() -> None:
    from checkpointer import errors

    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    actual = [
        (name, next(base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"))
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.CheckpointerError) and cls is not errors.CheckpointerError
    ]
    assert rows == actual
