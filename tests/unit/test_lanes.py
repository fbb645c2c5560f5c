"""What is promised, what the lanes run, and what the README says are one."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.support.versions import NEWEST_TORCH

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def scripts(monkeypatch):
    """The modules of scripts/ that make environments."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("_env"), importlib.import_module("_lanes")
    for name in ("_env", "_lanes"):
        sys.modules.pop(name, None)


def python_of(lane):
    return ".".join(map(str, lane.python))


def test_the_lanes_are_the_oldest_and_the_newest_python_that_pyproject_names(scripts):
    _, lanes = scripts
    named = [f"3.{minor}" for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', PYPROJECT)]
    assert re.findall(r'requires-python = ">=(.*)"', PYPROJECT) == [python_of(lanes.LOWEST)] == named[:1]
    assert python_of(lanes.NEWEST) == named[-1]


def test_the_environments_ask_for_the_torch_that_pyproject_promises(scripts):
    env, _ = scripts
    assert f'"{env.TORCH}"' in PYPROJECT
    assert f"torch=={NEWEST_TORCH}" == env.TORCH_WHEEL


def test_the_readme_says_what_is_tested(scripts):
    env, lanes = scripts
    (said,) = re.findall(r"^Tested with: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    said = " ".join(said.split())
    lowest = env.TORCH.partition(">=")[2]
    assert f"Python {python_of(lanes.LOWEST)} with the lowest version of each dependency (PyTorch {lowest}, " in said
    assert f"Python {python_of(lanes.NEWEST)} with the newest of everything" in said
    assert f"Python 3.11 with PyTorch {NEWEST_TORCH}" in said
    for package, version in re.findall(r"(NumPy|fsspec) ([\d.]+\d)", said):
        assert f'"{package.lower()}>={version}"' in PYPROJECT
    assert "fsspec" in said


def test_ci_runs_each_lane(scripts):
    _, lanes = scripts
    steps = re.findall(r"^scripts/test(.*) \|\|", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert steps == [*(f" --lane {name}" for name in lanes.LANES), ' "$@"']  # pytest's main run is the last


def test_a_lane_whose_python_is_missing_is_skipped_with_a_sentence(scripts, monkeypatch, tmp_path, capsys):
    _, lanes = scripts
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lanes.run("lowest", [], lambda command: pytest.fail(f"ran {command}")) == 0
    assert "lane lowest: SKIPPED, for there is no Python 3.10 " in capsys.readouterr().out


def test_an_interpreter_of_another_version_is_not_taken_for_a_lane(scripts, monkeypatch, tmp_path):
    _, lanes = scripts
    (tmp_path / "versions" / "3.10.99" / "bin").mkdir(parents=True)
    (tmp_path / "versions" / "3.10.99" / "bin" / "python").write_text("#!/bin/sh\necho 3 9 1\n")
    (tmp_path / "versions" / "3.10.99" / "bin" / "python").chmod(0o755)
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lanes.LOWEST.interpreter() is None


def test_an_unknown_lane_is_an_error_that_names_those_there_are(scripts, capsys):
    _, lanes = scripts
    assert lanes.run("middle", [], lambda command: 0) != 0
    assert "lowest, newest" in capsys.readouterr().err
