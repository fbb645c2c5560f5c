"""What is recorded about the process, without secrets and without waiting; and what of it decides the bits."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from checkpointer import environment as environment_module
from checkpointer.environment import command_line, differences, environment, git_commit


def masked(*arguments: str) -> list[str]:
    return list(command_line(arguments))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--hf-token=abc def"], ["--hf-token=***"]),
        (["--api_key=abc"], ["--api_key=***"]),
        (["-password", "-abc"], ["-password", "***"]),
        (["wandb.api_key=abc"], ["wandb.api_key=***"]),
        (["AWS_SECRET_ACCESS_KEY=abc"], ["AWS_SECRET_ACCESS_KEY=***"]),
        (['{"token": "abc", "lr": 1}'], ['{"token": "***", "lr": 1}']),
        (["s3://user:abc@host/run"], ["s3://***@host/run"]),
        (["https://host/x?token=abc&b=1"], ["https://host/x?token=***&b=1"]),
        (["hf_" + "a" * 30], ["***"]),
        (["--use-auth", "--lr=1"], ["--use-auth", "--lr=1"]),
        (["--max-tokens", "2048"], ["--max-tokens", "2048"]),
        (["--tokenizer=gpt2"], ["--tokenizer=gpt2"]),
        (["train.py", "--lr", "0.1", "data/keys.txt"], ["train.py", "--lr", "0.1", "data/keys.txt"]),
    ],
)
def test_what_looks_like_a_secret_is_masked_and_nothing_else(arguments, expected):
    assert masked(*arguments) == expected


def test_a_long_command_line_is_cut():
    found = masked(*(f"file-{number}" for number in range(10_000)))
    assert sum(map(len, found)) < 4200
    assert found[-1].endswith("more")
    assert len(masked("x" * 10_000)[0]) == 501


def test_arguments_that_are_no_text_are_recorded():
    assert masked("a\udc80") == ["a\\udc80"]


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


def test_settings_that_decide_the_bits_are_recorded():
    found = environment()
    assert found["num_threads"] == torch.get_num_threads()
    assert found["deterministic_algorithms"] is torch.are_deterministic_algorithms_enabled()
    for name in ("float32_matmul_precision", "cudnn_benchmark", "cudnn_deterministic", "cudnn_tf32", "argv"):
        assert name in found


def test_a_setting_that_torch_refuses_to_tell_is_left_out(monkeypatch):
    def refuse():
        raise RuntimeError("you have used both legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert "float32_matmul_precision" not in environment()


def test_the_world_size_is_that_of_the_job(tmp_path):
    assert environment()["world_size"] == 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with mock.patch("torch.distributed.get_world_size", return_value=8):  # the other seven would have to exist
            assert environment()["world_size"] == 8
    finally:
        torch.distributed.destroy_process_group()


BASE: dict[str, Any] = {
    "torch": "2.6", "numpy": "2.0", "python": "3.11", "host": "a", "devices": ["cpu"], "num_threads": 2,
    "world_size": 1, "cudnn_benchmark": False, "argv": ["a"], "git_commit": "a", "deterministic_algorithms": False,
}  # fmt: skip
GPU = {**BASE, "devices": ["H100", "H100"]}


def test_the_same_environment_has_no_differences():
    assert differences(environment(), environment()).all == []


@pytest.mark.parametrize(
    "base, change",
    [
        (BASE, {"torch": "2.7"}),
        (BASE, {"numpy": "2.1"}),
        (BASE, {"devices": ["H100"]}),
        (BASE, {"num_threads": 3}),
        (BASE, {"world_size": 4}),
        (BASE, {"deterministic_algorithms": True}),
        (GPU, {"devices": ["A100"]}),
        (GPU, {"cudnn_benchmark": True}),
    ],
)
def test_what_decides_the_bits_is_a_matter_of_exactness(base, change):
    found = differences(base, {**base, **change})
    assert len(found.exactness) == 1
    assert not found.other


@pytest.mark.parametrize("change", [{"host": "b"}, {"argv": ["b"]}, {"git_commit": "b"}, {"python": "3.12"}])
def test_harmless_differences_are_told_apart(change):
    found = differences(BASE, {**BASE, **change})
    assert not found.exactness
    assert len(found.other) == 1


@pytest.mark.parametrize("change", [{"num_threads": 64}, {"devices": ["H100"]}])
def test_threads_and_the_number_of_devices_do_not_matter_on_gpus(change):
    assert differences(GPU, {**GPU, **change}).all == []


def test_benchmarking_is_harmless_where_there_is_no_gpu():
    assert differences(BASE, {**BASE, "cudnn_benchmark": True}).all == []


def test_what_an_older_library_did_not_record_is_not_compared():
    assert differences({"torch": "2.6"}, BASE).all == []
    assert differences({"devices": 3, "num_threads": "x"}, {"devices": ["cpu"], "num_threads": "x"}).exactness
