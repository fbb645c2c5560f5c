"""Each attack is refused with a typed error, touches nothing, runs nothing, and hides no older checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager
from checkpointer.cli.commands import cli
from checkpointer.errors import CheckpointerError, IncompatibleStateError, RunLockedError
from tests.integration.hostile.attacks import ATTACKS, OWNERS
from tests.support.command import runner
from tests.support.compare import assert_identical
from tests.support.processes import Process
from tests.support.training import assert_at, at

SETTINGS = {"write": {"mode": "sync", "durable": False}}
HARMLESS = ("a header that tells another story",)
"""Restored as it should be, for the index alone is believed: what ``verify`` finds."""

IN_TREES = (
    "a deque and a range without end",
    "an integer of a million hexadecimal digits",
    "eight hundred levels of a tree",
    "a default factory that is a function",
    "a million numbers again and again",
    "all tensors again and again",
)
"""Every hash fits, and ``verify`` makes no Python objects: what a restore finds."""

UNKNOWN = ("a class by its name", "a tensor class by its name")
"""As in ``IN_TREES``, but not damaged: a program that registers the name may have saved it, so none is passed over."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "run"
    for step in (1, 2):
        training = at(step, frozen=True)
        with CheckpointManager(root, config={**SETTINGS, "require_resume": False}, **training.components) as mgr:
            mgr.save(step, files={"note.txt": b"hello"})
    return root


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    place = tmp_path / "secret.txt"
    place.write_bytes(b"secret")
    return place


def kinds(folder: Path, run: Path) -> dict[str, Any]:
    """What lies beside the run."""
    return {
        str(path): path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if run not in (path, *path.parents)
    }


def test_every_attack_has_its_own_name():
    assert len(ATTACKS) > 40


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_and_the_checkpoint_before_it_is_restored(name, run, victim, tmp_path):
    ATTACKS[name](run / "checkpoint-2", victim)
    outside = kinds(tmp_path, run)
    live = at(3, seed=5, frozen=True)
    before = live.snapshot()
    with warnings.catch_warnings(), CheckpointManager(run, read_only=True, **live.components) as mgr:
        warnings.simplefilter("ignore")
        if name not in HARMLESS:
            with pytest.raises(CheckpointerError):
                mgr.restore(2, verify="before")
            assert_identical(live.snapshot(), before)
        assert mgr.verify().ok is (name in (*IN_TREES, *UNKNOWN))
        if name in UNKNOWN:
            with pytest.raises(IncompatibleStateError, match=r"not registered|register_codec"):
                mgr.restore_latest()
            assert_identical(live.snapshot(), before)
            mgr.restore(1)
        else:
            assert mgr.restore_latest() is not None
    assert_at(live, 2 if name in HARMLESS else 1, frozen=True)
    for command in ("ls", "show", "verify", "doctor"):
        done = runner().invoke(cli, [command, str(run)])
        assert done.exit_code in (0, 1, 3), done.exception
        assert all(char.isprintable() or char in "\n\t" for char in done.output), repr(done.output)
    assert kinds(tmp_path, run) == outside


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attacked_run_is_continued_by_a_new_writer(name, run, victim, tmp_path):
    """Saves go on, what is damaged stays where it is or in quarantine, and nothing outside is touched."""
    ATTACKS[name](run / "checkpoint-2", victim)
    outside = kinds(tmp_path, run)
    live = at(1, frozen=True)
    with warnings.catch_warnings(), CheckpointManager(run, config=SETTINGS, **live.components) as mgr:
        warnings.simplefilter("ignore")
        if name in UNKNOWN:
            mgr.restore(1)
        else:
            mgr.restore_latest()
        mgr.save(7)
        mgr.prune()
        assert [info.step for info in mgr.checkpoints()][-1] == 7
        assert mgr.verify(7).ok
        assert mgr.verify(1).ok
    assert kinds(tmp_path, run) == outside


HOLDER = """
import sys
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
repository = Repository(open_storage(sys.argv[1]))
repository.lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(run: Path) -> Any:
    """A run whose lock another process holds."""
    with Process([sys.executable, "-c", HOLDER, str(run)]) as holder:
        assert holder.stdout.readline() == "held\n"
        yield run


def refusal(run: Path) -> str:
    with CheckpointManager(run, config=SETTINGS) as mgr, pytest.raises(RunLockedError) as caught:
        mgr.restore_latest()
    return str(caught.value)


@pytest.mark.parametrize("name", OWNERS)
def test_a_forged_owner_cannot_command_a_terminal_or_hide_that_the_run_is_locked(name, held):
    place = held / ".checkpointer" / "owner.json"
    place.write_bytes(OWNERS[name].encode("utf-8", "surrogateescape"))
    message = refusal(held)
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a directory", "a terabyte of nothing"])
def test_an_owner_that_is_no_file_is_nobody(kind, held, victim):
    place = held / ".checkpointer" / "owner.json"
    place.unlink()
    if kind == "a pipe":
        os.mkfifo(place)  # a program that opens it would wait for somebody who writes
    elif kind == "a link":
        place.symlink_to(victim)
    elif kind == "a directory":
        place.mkdir()
    else:
        place.touch()
        os.truncate(place, 2**40)
    assert "has not said who it is" in refusal(held)
    if kind == "a directory":
        place.rmdir()
