"""What is recorded about the process, without secrets and without waiting; and what of it decides the bits."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from checkpointer import environment as environment_module
from checkpointer.environment import environment, git_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, and hooks that must not run."""
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("a")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-qm", "first")
    hook = tmp_path / ".git" / "monitor"
    hook.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    hook.chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(hook))
    return tmp_path


def test_the_commit_is_recorded_and_whether_tracked_files_differ_from_it(repository):
    commit = git(repository, "rev-parse", "HEAD")
    assert git_commit(str(repository)) == (commit, False)
    (repository / "output.bin").write_text("untracked")
    assert git_commit(str(repository)) == (commit, False)
    (repository / "a.txt").write_text("changed")
    assert git_commit(str(repository)) == (commit, True)


def test_git_runs_no_hook(repository):
    (repository / "ran").unlink(missing_ok=True)
    git_commit(str(repository))
    assert not (repository / "ran").exists()


def test_a_folder_outside_any_repository_and_one_without_commits_have_none(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(str(tmp_path)) is None
    git(tmp_path, "init", "-q")
    assert git_commit(str(tmp_path)) is None


def test_no_git_at_all_is_fine(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(str(tmp_path)) is None


def slow_git(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "git").write_text("#!/bin/sh\nexec sleep 5\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_a_slow_git_is_given_up(tmp_path, monkeypatch):
    slow_git(tmp_path, monkeypatch)
    monkeypatch.setattr(environment_module, "GIT_TIMEOUT", 0.2)
    began = time.monotonic()
    assert git_commit(str(tmp_path)) is None
    assert time.monotonic() - began < 3


def test_a_save_waits_a_moment_for_git_and_no_longer(tmp_path, monkeypatch):
    slow_git(tmp_path, monkeypatch)
    monkeypatch.setattr(environment_module, "GIT_TIMEOUT", 2.0)
    monkeypatch.setattr(environment_module, "_git", environment_module._Git())
    began = time.monotonic()
    assert "git_commit" not in environment()
    assert time.monotonic() - began < 1


def test_git_is_asked_once(monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(environment_module, "_git", environment_module._Git())
    monkeypatch.setattr(environment_module, "git_commit", lambda folder: calls.append(folder) or ("a" * 40, True))
    for _ in range(3):
        found = environment()
    assert (found["git_commit"], found["git_dirty"]) == ("a" * 40, True)
    assert calls == ["."]


def test_the_world_size_is_that_of_the_job(tmp_path):
    assert environment()["world_size"] == 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with mock.patch("torch.distributed.get_world_size", return_value=8):  # the other seven would have to exist
            assert environment()["world_size"] == 8
    finally:
        torch.distributed.destroy_process_group()
