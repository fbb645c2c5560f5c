"""One plain model out of what several ranks have saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from checkpointer.migration import consolidating
from checkpointer.migration.consolidating import consolidate
from tests.integration.format.test_independent_reader import read_table, read_tensors
from tests.support.forge import flip
from tests.support.ranks import run


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(5, dtype=torch.int16))


def expected() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    return Tied().state_dict()


def save_sharded(root: str) -> None:
    torch.manual_seed(4)
    model = Tied()
    fully_shard(model)
    with CheckpointManager(root, model=model) as mgr:
        mgr.save(5, files={"config.json": b'{"model_type": "tied"}'})


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("run")
    run(2, save_sharded, str(root))
    assert sorted(item.name for item in (root / "checkpoint-5").glob("model*")) == [
        "model-rank-00000.safetensors",
        "model-rank-00001.safetensors",
    ]
    return Path(root)


def same(found: dict[str, torch.Tensor], missing: set[str]) -> None:
    wanted = {name: tensor for name, tensor in expected().items() if name not in missing}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("piece", [8, 40, 1 << 20])
def test_slices_become_whole_tensors_however_small_the_pieces_in_memory(sharded, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(consolidating, "PIECE", piece)
    done = consolidate(sharded, 5, tmp_path / "out.safetensors")
    same(load_file(tmp_path / "out.safetensors"), missing={"head.weight"})
    assert done.tensors == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "out.safetensors"]
    from safetensors.torch import load_model

    model = Tied()
    load_model(model, tmp_path / "out.safetensors")
    assert torch.equal(model.head.weight, expected()["head.weight"])


def test_a_directory_is_a_hugging_face_model_with_its_attachments(sharded, tmp_path):
    out = tmp_path / "hf"
    consolidate(sharded, 5, out, shard_size=200)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1
    same({name: tensor for file in files for name, tensor in load_file(out / file).items()}, missing={"head.weight"})
    assert json.loads((out / "config.json").read_text()) == {"model_type": "tied"}
    with pytest.raises(ConfigError, match="exists"):
        consolidate(sharded, 5, out)
    consolidate(sharded, 5, out, overwrite=True)
    assert sorted(item.name for item in out.iterdir()) == ["config.json", "model.safetensors"]


def test_thirty_lines_without_the_library_read_the_slices_of_several_ranks(sharded):
    same(read_tensors(sharded / "checkpoint-5", "model"), missing={"head.weight"})
    data = (sharded / "checkpoint-5" / "index-00001.safetensors").read_bytes()
    columns, texts = read_table(data)
    assert [entry["name"] for entry in texts["components"]] == ["rng"]
    assert texts["files"] == []
    assert columns["own_chunk_file"] == [2**32 - 1] * len(columns["own_chunk_begin"])
    keys, begin = bytes(columns["own_keys"]).decode(), columns["own_chunk_begin"][-1]
    assert keys.endswith("torch")
    assert bytes(columns["data"][-5056:]) == data[begin : begin + columns["own_shape"][-1]]


def two_dimensions(root: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(7 * 9.0).reshape(7, 9)
    state = {
        "both": distribute_tensor(whole, mesh, [Shard(0), Shard(1)]),
        "columns": distribute_tensor(whole, mesh, [Replicate(), Shard(1)]),
    }
    with CheckpointManager(root, state=state) as mgr:
        mgr.save(1)


def test_boxes_of_a_mesh_of_two_dimensions_are_put_together(tmp_path):
    run(4, two_dimensions, str(tmp_path / "run"))
    consolidate(tmp_path / "run", 1, tmp_path / "out.safetensors", component="state")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], torch.arange(7 * 9.0).reshape(7, 9)) for name in ("both", "columns"))


def test_the_command_needs_no_process_group(sharded, tmp_path):
    out = tmp_path / "model.safetensors"
    command = [sys.executable, "-m", "checkpointer", "consolidate", str(sharded), "5", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["files"] == ["model.safetensors"]
    same(load_file(out), missing={"head.weight"})


def test_what_cannot_be_done_leaves_nothing(sharded, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="step 6"):
        consolidate(sharded, 6, tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean model"):
        consolidate(sharded, 5, tmp_path / "out", component="modle")
    damaged = tmp_path / "run" / "checkpoint-5"
    subprocess.run(["cp", "-r", str(sharded), str(tmp_path / "run")], check=True)
    file = damaged / "model-rank-00001.safetensors"
    flip(file, -5)
    with pytest.raises(CorruptCheckpointError, match="do not match their hash"):
        consolidate(tmp_path / "run", 5, tmp_path / "out")
    assert [item.name for item in tmp_path.iterdir()] == ["run"]
