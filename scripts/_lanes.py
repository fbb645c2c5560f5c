"""Lanes: the ends of what is promised. The lowest versions on the oldest Python, and the newest of everything.

Each has an environment of its own beside the usual one (``.venv-lowest``, ``.venv-newest``). Torch comes as a CPU build
or not at all: its builds for CUDA are gigabytes. Where there is none for a lane's Python, the lane says so and tests
what needs no torch. Where its Python is missing, it says so and tests nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import _env

TESTS = ["tests/unit", "tests/campaign/exact_resume/test_every_case.py", "-n", "2", "--dist", "worksteal"]
FOR_CUDA = ("nvidia-", "cuda-", "triton", "pytorch-triton")
"""Requirements of torch that a CPU build does not have, or can do without."""


class Lane(NamedTuple):
    """A Python, and which versions of everything are installed for it."""

    name: str
    python: tuple[int, int]
    resolution: str
    """As uv calls it."""
    torch_resolution: str

    def interpreter(self) -> str | None:
        """Where pyenv puts it, else on the PATH; ``None`` if it is at neither."""
        version = ".".join(map(str, self.python))
        versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
        for candidate in (*sorted(map(str, versions.glob(f"{version}.*/bin/python"))), f"python{version}"):
            if _env.version_of(candidate)[:2] == self.python:
                return candidate
        return None

    def stamp(self) -> str:
        """What asks for a new environment when it changes; the newest of everything are others next week."""
        week = "" if self.resolution != "highest" else time.strftime(" week %G-%V")
        return f"lane {self.name}{week}, _lanes.py {_env.digest(__file__)}"


LOWEST = Lane("lowest", (3, 10), "lowest-direct", "lowest")
NEWEST = Lane("newest", (3, 13), "highest", "highest")
LANES = {lane.name: lane for lane in (LOWEST, NEWEST)}


def run(name: str, arguments: Sequence[str], call: Callable[[Sequence[str]], int]) -> int:
    """Exit status of the lane's tests; ``call`` runs a command."""
    lane = LANES.get(name)
    if lane is None:
        print(f"test: no lane {name!r}; there are {', '.join(LANES)}", file=sys.stderr)
        return 2
    base = lane.interpreter()
    if base is None:
        print(f"lane {name}: SKIPPED, for there is no Python {lane.python[0]}.{lane.python[1]} in pyenv or on the PATH")
        return 0
    recipe = _env.Recipe(lane.name, base, lane.stamp(), lambda python: install(lane, python))
    with _env.environment(recipe=recipe) as python:
        found = _env.installed_version("torch", python)
        print(f"\nlane {name}: {describe(python)}", flush=True)
        if not found:
            print(f"lane {name}: NO CPU BUILD OF TORCH for this Python is to be had: only what needs none is tested")
        return call([python, "-m", "pytest", *TESTS, *([] if found else ["--without-torch"]), *arguments])


def install(lane: Lane, python: str) -> None:
    """Everything but torch in the lane's versions; torch by itself, so that nothing of CUDA comes along."""
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    uv = [python, "-m", "uv", "pip", "install", "--python", python]
    _env.step("uv", [*pip, "uv"])
    _install_torch(lane, pip, uv)
    override = Path(python).parent.parent / "no-torch.txt"
    override.write_text("torch; sys_platform == 'never'\n", encoding="utf-8")  # what is there stays, nothing else comes
    rest = [*uv, "--override", str(override)]
    _env.step("checkpointer and its tools", [*rest, "--resolution", lane.resolution, "-e", f"{_env.ROOT}[dev]"])
    needs = _needs_of_torch(python)
    if needs:
        _env.step("what torch needs", [*rest, *needs])
        if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode:
            print("   this torch cannot be imported, for it is built for CUDA: going on without", flush=True)
            _env.step("torch goes", [*uv[:-3], "uninstall", "--python", python, "torch"])


def _install_torch(lane: Lane, pip: Sequence[str], uv: Sequence[str]) -> None:
    cpu = [*uv, "--no-deps", "--index-url", _env.TORCH_CPU_INDEX, "--resolution", lane.torch_resolution, _env.TORCH]
    try:
        _env.step("torch", cpu, [*pip, "--no-index", "--no-deps", _env.TORCH])  # else what a folder of wheels holds
    except _env.SetupError:
        print("   neither the index of CPU builds nor a folder of wheels has one: going on without", flush=True)


def _needs_of_torch(python: str) -> list[str]:
    """Without those for CUDA; empty if there is no torch."""
    if not _env.installed_version("torch", python):
        return []
    ask = "import importlib.metadata as m; print(*m.requires('torch') or [], sep='\\n')"
    answer = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, check=True)
    asked = [line.strip() for line in answer.stdout.decode().splitlines() if "extra ==" not in line]
    return [need for need in asked if need and not need.startswith(FOR_CUDA)]


def describe(python: str) -> str:
    """``Python 3.10.13, torch 2.6.0+cpu, numpy 1.24.0, …``"""
    names = (
        "torch",
        "numpy",
        "fsspec",
        "filelock",
        "safetensors",
        "xxhash",
        "msgspec",
        "pyyaml",
        "click",
        "rich",
        "pytest",
    )
    versions = {name: _env.installed_version(name, python) or "none" for name in names}
    numbers = ".".join(map(str, _env.version_of(python)))
    return ", ".join([f"Python {numbers}", *(f"{name} {version}" for name, version in versions.items())])
