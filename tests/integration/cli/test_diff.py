"""What differs between two checkpoints: found, measured, and nothing read that need not be."""

from __future__ import annotations

import copy
import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.compare import _runs, compare
from checkpointer.errors import CheckpointNotFoundError, CorruptCheckpointError
from checkpointer.format.index import Chunk
from checkpointer.repository.checkpoint_reader import CheckpointReader
from tests.integration.cli.test_cli import child, document, error_of, invoke
from tests.support.forge import flip


def save_pair(root: Any, before: dict[str, Any], after: dict[str, Any]) -> Any:
    """A run whose steps 1 and 2 hold the two states, with the same random generators."""
    torch.manual_seed(0)
    for step, state in ((1, before), (2, after)):
        config = {"require_resume": False, "write": {"mode": "sync", "durable": False}}
        with CheckpointManager(root, config=config, **state) as manager:
            manager.save(step)
    return root


def differences(root: Any) -> dict[str, Any]:
    """The tensors that differ, by key."""
    return {change.key: change for change in compare(root, 1, 2).tensors}


def test_equal_states_are_equal_and_none_of_their_tensors_is_read(tmp_path):
    model = nn.Linear(3, 2)
    save_pair(tmp_path, {"model": model}, {"model": model})

    with mock.patch.object(CheckpointReader, "blocks", side_effect=CheckpointReader.blocks, autospec=True) as blocks:
        found = compare(tmp_path, 1, 2)

    assert found.equal
    assert found.equal_tensors > 2
    assert not blocks.call_args_list
    result = invoke("diff", tmp_path, 1, 2)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("the same state: all ")


def test_changed_settings_are_named_by_their_path(tmp_path):
    model = nn.Linear(3, 2)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    two = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    save_pair(
        tmp_path,
        {"model": model, "optimizer": one, "progress": {"a": 1, "kind": {"x": 1}, "same": [1, 2]}},
        {"model": model, "optimizer": two, "progress": {"b": (1,), "kind": {"x": True}, "same": [1, 2]}},
    )

    found = {change.path: (change.before, change.after) for change in compare(tmp_path, 1, 2).settings}
    assert found == {
        "optimizer.param_groups[0].lr": ("0.1", "0.01"),
        "optimizer.param_groups[0].momentum": ("0", "0.5"),
        "progress.a": ("1", None),
        "progress.b": (None, "(1,)"),
        "progress.kind.x": ("1", "True"),
    }
    assert "  optimizer.param_groups[0].lr  0.1 -> 0.01\n" in invoke("diff", tmp_path, 1, 2).stdout


def test_components_and_tensors_that_only_one_side_has_are_named(tmp_path):
    save_pair(
        tmp_path,
        {"model": nn.Linear(3, 2), "old": {"x": 1}},
        {"model": nn.Linear(3, 2, bias=False), "new": {"x": 1}},
    )

    found = {change.path: (change.before, change.after) for change in compare(tmp_path, 1, 2).settings}
    assert found["model.bias"] == ("float32 [2]", None)
    assert found["old"] == ("a container component of 0 tensors", None)
    assert found["new"] == (None, "a container component of 0 tensors")


def test_another_shape_dtype_kind_or_frozen_flag_is_a_setting(tmp_path):
    frozen = nn.Linear(3, 2).requires_grad_(False)
    save_pair(
        tmp_path,
        {"model": nn.Linear(3, 2), "x": {"t": torch.ones(2), "d": {}}, "y": {"v": 1}},
        {"model": frozen, "x": {"t": torch.ones(3, dtype=torch.float64), "d": set()}, "y": [1]},
    )

    found = {change.path: (change.before, change.after) for change in compare(tmp_path, 1, 2).settings}
    assert found["x.t"] == ("float32 [2]", "float64 [3]")
    assert found["model (meta).frozen"] == ("[]", "['weight', 'bias']")
    assert found["x.d"] == ("{}", "set()")


def test_differences_are_measured_and_the_largest_comes_first(tmp_path):
    before = {"a": torch.zeros(4, 4), "b": torch.arange(6), "c": torch.ones(3), "same": torch.ones(2)}
    after = copy.deepcopy(before)
    after["a"][1, 2] = -0.5
    after["b"][:2] += 7
    after["c"][0] = 1 + 2**-20
    save_pair(tmp_path, {"x": before}, {"x": after})

    found = compare(tmp_path, 1, 2)
    assert [(item.key, item.largest, item.elements) for item in found.tensors] == [
        ("x.b", 7.0, 2),
        ("x.a", 0.5, 1),
        ("x.c", 2**-20, 1),
    ]
    assert not found.equal


def test_nan_infinity_and_signed_zero_are_told_apart(tmp_path):
    before = torch.tensor([math.nan, 1.0, math.nan, math.inf, 0.0, 2.0])
    after = torch.tensor([math.nan, math.nan, 3.0, 5.0, -0.0, 2.25])
    save_pair(tmp_path, {"x": {"t": before}}, {"x": {"t": after}})

    change = differences(tmp_path)["x.t"]
    assert (change.elements, change.became_nan, change.was_nan, change.largest) == (5, 1, 1, math.inf)
    assert document("diff", tmp_path, 1, 2)["tensors"][0]["max_abs_difference"] == "inf"


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint16, torch.complex64],
)
def test_every_kind_of_number_is_subtracted(tmp_path, dtype):
    before = torch.tensor([1.0, 2.0, 3.0]).to(dtype)
    after = torch.tensor([1.0, 4.0, 3.0]).to(dtype)
    save_pair(tmp_path, {"x": {"t": before}}, {"x": {"t": after}})

    change = differences(tmp_path)["x.t"]
    assert (change.elements, change.largest) == (1, 2.0)


def test_booleans_and_numpy_arrays_are_compared_too(tmp_path):
    save_pair(
        tmp_path,
        {"x": {"flags": torch.tensor([True, False]), "array": np.array([1.0, 2.0])}},
        {"x": {"flags": torch.tensor([True, True]), "array": np.array([1.0, 5.0])}},
    )
    found = differences(tmp_path)
    assert (found["x.flags"].largest, found["x.array"].largest) == (1.0, 3.0)


def test_a_large_tensor_is_compared_in_blocks(tmp_path):
    before = torch.zeros(500_000)
    after = before.clone()
    after[[0, 131_071, 131_072, 499_999]] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    save_pair(tmp_path, {"x": {"t": before}}, {"x": {"t": after}})

    change = differences(tmp_path)["x.t"]
    assert (change.elements, change.largest) == (4, 4.0)


def test_tensors_cut_in_another_way_overlap_element_by_element():
    whole = np.arange(4 * 6 * 5).reshape(4, 6, 5)
    a, b = Chunk((0, 0, 0), (4, 3, 5), "", 0, 0, ""), Chunk((1, 2, 0), (3, 4, 5), "", 0, 0, "")
    ours, others = whole[0:4, 0:3].reshape(-1), whole[1:4, 2:6].reshape(-1)

    runs = list(_runs(a, b, 1))
    pairs = [(ours[i + n], others[j + n]) for (i, j), size in runs for n in range(size)]
    assert [left for left, _ in pairs] == [right for _, right in pairs] == list(whole[1:4, 2:3].reshape(-1))
    assert list(_runs(a, Chunk((0, 3, 0), (4, 3, 5), "", 0, 0, ""), 1)) == []
    assert list(_runs(Chunk((), (), "", 0, 0, ""), Chunk((), (), "", 0, 0, ""), 4)) == [((0, 0), 4)]


def test_damage_is_not_taken_for_a_difference(tmp_path):
    save_pair(tmp_path, {"model": nn.Linear(3, 2)}, {"model": nn.Linear(3, 2)})
    flip(tmp_path / "checkpoint-2" / "model.safetensors")

    with pytest.raises(CorruptCheckpointError, match="step 2 is damaged"):
        compare(tmp_path, 1, 2)
    result = invoke("diff", tmp_path, 1, 2)
    assert result.exit_code == 2
    error_of(result)


def test_the_environment_is_shown_and_does_not_count(tmp_path):
    save_pair(tmp_path, {"x": {"a": 1}}, {"x": {"a": 1}})
    with mock.patch("checkpointer.manager.environment", return_value={"torch": "1.0", "devices": ["cpu"]}):
        torch.manual_seed(0)
        with CheckpointManager(tmp_path, config={"require_resume": False}, x={"a": 1}) as manager:
            manager.save(3)

    found = compare(tmp_path, 1, 3)
    assert ("torch", repr(str(torch.__version__)), "'1.0'") in found.environment
    assert found.equal
    result = invoke("diff", tmp_path, 1, 3)
    assert result.exit_code == 0
    assert "-> '1.0'" in result.stdout


def test_the_command_exits_with_1_and_cuts_long_lists(tmp_path):
    before = {f"t{number}": torch.zeros(1) for number in range(25)}
    after = {key: tensor + 1 for key, tensor in before.items()}
    save_pair(tmp_path, {"x": before}, {"x": after})

    result = invoke("diff", tmp_path, 1, 2)
    assert result.exit_code == 1
    assert "  and 5 more; --all prints them\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("0 settings differ; 25 of ")
    assert "more" not in invoke("diff", tmp_path, 1, 2, "--all").stdout
    assert len(document("diff", tmp_path, 1, 2)["tensors"]) == 25


def test_a_diff_as_json_has_the_documented_fields(tmp_path):
    save_pair(tmp_path, {"x": {"a": 1, "t": torch.zeros(2)}}, {"x": {"a": 2, "t": torch.ones(2)}})

    found = document("diff", tmp_path, 1, 2)
    assert set(found) == {"root", "a", "b", "equal", "environment", "settings", "tensors", "equal_tensors"}
    assert found["settings"] == [{"path": "x.a", "before": "1", "after": "2"}]
    assert found["tensors"] == [
        {
            "key": "x.t",
            "dtype": "float32",
            "shape": [2],
            "size": 8,
            "differing_elements": 2,
            "max_abs_difference": 1.0,
            "became_nan": 0,
            "was_nan": 0,
        }
    ]


def test_what_is_not_there_exits_with_3(tmp_path):
    save_pair(tmp_path, {"x": {"a": 1}}, {"x": {"a": 2}})
    with pytest.raises(CheckpointNotFoundError):
        compare(tmp_path, 1, 9)
    assert invoke("diff", tmp_path, 1, 9).exit_code == 3
    assert invoke("diff", tmp_path / "none", 1, 2).exit_code == 3


def test_values_cannot_command_the_terminal(tmp_path):
    save_pair(tmp_path, {"x": {"a\x1b[2J": "\x1b[31m"}}, {"x": {"a\x1b[2J": "y"}})
    assert "\x1b" not in invoke("diff", tmp_path, 1, 2).stdout


def test_settings_are_compared_without_torch(tmp_path):
    save_pair(tmp_path, {"x": {"a": 1}}, {"x": {"a": 2}})
    code = """
import sys
from checkpointer.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    result = child("diff", tmp_path, 1, 2, code=code)
    assert (result.returncode, result.stderr) == (1, "False\n")
