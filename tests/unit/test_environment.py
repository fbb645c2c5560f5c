"""What is recorded about the process, without secrets; and what of it decides the bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer.environment import command_line, differences, environment


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


@pytest.mark.parametrize("argument", ["x" * 300_000, "--config=" + "-a.b" * 80_000, "://" * 100_000, "key" * 100_000])
def test_an_argument_that_is_one_long_word_does_not_hold_up_the_first_save(argument):
    """At a cost that grows with the square of its length, this would take longer than a test may."""
    assert len(masked(argument)[0]) == 501


def test_arguments_that_are_no_text_are_recorded():
    assert masked("a\udc80") == ["a\\udc80"]


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


class _NoText:
    def __str__(self) -> str:
        raise ValueError("no text")


def test_arguments_of_any_type_are_recorded_and_none_at_all_are_none(monkeypatch):
    assert list(command_line([0, Path("train.py"), None, _NoText()])) == ["0", "train.py", "None", "<_NoText>"]
    monkeypatch.delattr("sys.argv")
    assert environment()["argv"] == []


def test_what_the_system_or_torch_refuses_to_tell_is_left_out(monkeypatch):
    def fail() -> str:
        raise OSError("no name")

    monkeypatch.delattr("torch.get_float32_matmul_precision")
    monkeypatch.setattr("torch.cuda.is_available", fail)
    found = environment()
    assert not {"devices", "float32_matmul_precision"} & found.keys()
    assert found["num_threads"] == torch.get_num_threads()
    assert differences({"devices": ["cpu"]}, found).all == []
