"""Checkpoints are read by stock tools alone: safetensors, json, xxhash, transformers. No code of ours takes part."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from checkpointer import CheckpointManager
from tests.support.vision import make_importable

SYNC = {"write": {"mode": "sync"}}


# The independent reader: everything that FORMAT.md asks of one, in standard words. ---------------------------------


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    raw = (checkpoint / "manifest.json").read_bytes()
    head, tail = raw[:-53], raw[-53:]
    found = re.fullmatch(rb',\n  "checksum": "([0-9a-f]{32})"\n}\n', tail)
    assert found
    assert xxhash.xxh3_128_hexdigest(head) == found[1].decode()
    manifest: dict[str, Any] = json.loads(raw)
    assert (manifest["format"], manifest["version"]) == ("checkpointer", 1)
    return manifest


def read_checked(path: Path, size: int, xxh3: str) -> bytes:
    data = path.read_bytes()
    assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (size, xxh3)
    return data


def read_table(data: bytes) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Columns as lists of numbers, and the texts: a safetensors file with nothing but struct and json."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    texts = {name: json.loads(text) for name, text in header.pop("__metadata__").items() if text[:1] in "[{"}
    columns = {}
    for name, column in header.items():
        begin, end = column["data_offsets"]
        code = {"U8": "B", "U16": "H", "U32": "I", "I64": "q"}[column["dtype"]]
        columns[name] = [number for (number,) in struct.iter_unpack("<" + code, data[8 + length :][begin:end])]
    return columns, texts


def read_tensors(checkpoint: Path, component: str) -> dict[str, torch.Tensor]:
    manifest = read_manifest(checkpoint)
    base = checkpoint / (manifest["data"] or "")
    index = json.loads(read_checked(base / "index.json", *manifest["index"]["index.json"]))
    table, texts = read_table(read_checked(base / "index.safetensors", *manifest["index"]["index.safetensors"]))
    for entry in [*index["files"], *texts["files"]]:
        read_checked(base / entry["path"], entry["size"], entry["xxh3"])
    tensors, dimension, text, boxed = [], 0, bytes(table["keys"]), 0
    for length, dtype, ndim in zip(table["key_lengths"], table["dtype"], table["ndim"], strict=True):
        shape, dimension = table["shape"][dimension : dimension + ndim], dimension + ndim
        key, text = text[:length].decode(), text[length:]
        tensors.append((key, torch.empty(shape, dtype=getattr(torch, texts["dtypes"][dtype]))))
    chunks = zip(table["chunk_tensor"], table["chunk_file"], table["chunk_begin"], strict=True)
    for row, (number, file, begin) in enumerate(chunks):
        tensor = tensors[number][1]
        offsets, lengths = [0] * tensor.ndim, list(tensor.shape)
        if row in table.get("boxed", []):
            offsets, lengths = (table[f"box_{name}"][boxed : boxed + tensor.ndim] for name in ("offsets", "lengths"))
            boxed += tensor.ndim
        box = tensor[tuple(slice(start, start + size) for start, size in zip(offsets, lengths, strict=True))]
        data = (base / texts["files"][file]["path"]).read_bytes()[begin : begin + box.numel() * box.element_size()]
        assert xxhash.xxh3_128_digest(data) == bytes(table["chunk_hash"][16 * row : 16 * row + 16])
        box[...] = torch.frombuffer(bytearray(data), dtype=box.dtype).reshape(lengths) if data else box
    first = 0
    for entry in index["components"]:
        if entry["name"] == component:
            return dict(tensors[first : first + entry["tensors"]])
        first += entry["tensors"]
    raise KeyError(component)


# The tests ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tied weights, buffers, two dtypes; ``frozen`` decides whether it is stored in shards."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6).requires_grad_(not frozen)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.rand(3, dtype=torch.bfloat16))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.body(self.embedding(x)))) * self.scale.float().sum()
        return out


def trained(net: Net) -> torch.optim.AdamW:
    """The optimizer after two real steps."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.arange(11)).square().sum().backward()
        optimizer.step()
    return optimizer


def save(root: Path, **components: Any) -> Path:
    """Save ``components`` as step 5; the checkpoint's directory."""
    files = components.pop("files", None)
    with CheckpointManager(root, config=SYNC, **components) as manager:
        handle = manager.save(5, files=files)
        assert handle is not None
        return Path(handle.result().path)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(bits(found[key]), bits(tensor)), key


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def without_alias(net: Net) -> dict[str, torch.Tensor]:
    """``state_dict()`` with each tied tensor under its first name alone, as it is stored."""
    return {key: value for key, value in net.state_dict().items() if key != "head.weight"}


@pytest.mark.parametrize("frozen", [False, True], ids=["one-file", "sharded"])
def test_thirty_lines_without_the_library_read_model_and_optimizer(tmp_path, frozen):
    net = Net(frozen=frozen)
    optimizer = trained(net)
    checkpoint = save(tmp_path, model=net, optimizer=optimizer)
    assert_same(read_tensors(checkpoint, "model"), without_alias(net))
    state = optimizer.state_dict()["state"]
    flat = {f"state.{number}.{name}": value for number, entry in state.items() for name, value in entry.items()}
    assert_same(read_tensors(checkpoint, "optimizer"), flat)


def test_the_shards_are_found_through_the_hugging_face_index(tmp_path):
    net = Net(frozen=True)
    checkpoint = save(tmp_path, model=net)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text("ascii"))
    found = {}
    for key, file in index["weight_map"].items():
        with safe_open(checkpoint / file, "pt") as shard:
            found[key] = shard.get_tensor(key)
    assert_same(found, without_alias(net))
    assert index["metadata"]["total_size"] == sum(bits(tensor).numel() for tensor in found.values())
    assert sorted(set(index["weight_map"].values())) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert set(load_file(checkpoint / "model-00002-of-00002.safetensors")) == {"body.weight", "body.bias"}


def test_load_file_reads_model_and_optimizer(tmp_path):
    net = Net()
    optimizer = trained(net)
    checkpoint = save(tmp_path, model=net, optimizer=optimizer)
    assert_same(load_file(checkpoint / "model.safetensors"), without_alias(net))
    found = load_file(checkpoint / "optimizer.safetensors")
    assert torch.equal(found["state.0.exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_load_model_loads_tied_weights_whose_other_names_are_in_the_metadata(tmp_path):
    net = Net()
    trained(net)
    checkpoint = save(tmp_path, model=net)
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    fresh = Net()
    missing, unexpected = load_model(fresh, checkpoint / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert_same(dict(fresh.state_dict()), dict(net.state_dict()))
    assert fresh.head.weight is fresh.embedding.weight


def test_small_components_share_one_file_under_component_and_key(tmp_path):
    progress = {"seen": torch.arange(3), "state": {"inner": torch.ones(2)}}
    checkpoint = save(tmp_path, progress=progress)
    found = load_file(checkpoint / "state.safetensors")
    assert torch.equal(found["progress/seen"], progress["seen"])
    assert torch.equal(found["progress/state.inner"], torch.ones(2))
    assert {"rng/torch", "rng/numpy.state.key"} <= found.keys()


def test_the_data_of_every_tensor_file_starts_on_a_cache_line_and_fills_it(tmp_path):
    net = Net(frozen=True)
    checkpoint = save(tmp_path, model=net, optimizer=trained(net), small={"x": torch.ones(1)})
    files = sorted(path for path in checkpoint.glob("*.safetensors") if path.name != "index.safetensors")
    assert len(files) == 4
    for path in files:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        assert (8 + length) % 64 == 0
        assert 8 + length + max(ends) == len(data)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
def test_dtypes_that_safetensors_cannot_name_are_read_as_bytes(tmp_path):
    values = torch.view_as_complex(torch.tensor([[1.0, -2.0]], dtype=torch.float16))
    checkpoint = save(tmp_path, half={"c": values})
    raw = load_file(checkpoint / "state.safetensors")["half/c"]
    assert (raw.dtype, raw.tolist()) == (torch.uint8, bits(values).tolist())
    assert_same(read_tensors(checkpoint, "half"), {"c": values})


@pytest.mark.parametrize("command", [["xxhsum", "-H2"], ["xxh128sum"]], ids=["xxhsum", "xxh128sum"])
def test_the_command_line_tool_gives_the_hashes_of_the_manifest(tmp_path, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    checkpoint = save(tmp_path, model=Net(frozen=True))
    for name, (_, xxh3) in read_manifest(checkpoint)["index"].items():
        done = subprocess.run([*command, name], cwd=checkpoint, capture_output=True, text=True, check=True)
        assert done.stdout.split()[0] == xxh3


# transformers ------------------------------------------------------------------------------------------------------


def language_model(kind: str) -> Any:
    """A tiny model with random weights; its class is what ``from_pretrained`` is called on."""
    if kind == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=2, n_head=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers and what it imports
@pytest.mark.parametrize("frozen", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_from_pretrained_reads_a_checkpoint_bit_for_bit(tmp_path, monkeypatch, kind, frozen):
    """GPT-2 ties its head to the embedding, Llama here does not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("transformers")
    make_importable()
    model = language_model(kind)
    if frozen:
        model.get_input_embeddings().requires_grad_(requires_grad=False)
    checkpoint = save(tmp_path / "run", model=model, files={"config.json": model.config.to_json_string().encode()})
    export = tmp_path / "export"
    export.mkdir()
    for path in (*checkpoint.glob("model*"), checkpoint / "files" / "config.json"):
        shutil.copy(path, export)
    assert (export / "model.safetensors.index.json").exists() == frozen
    loaded, report = type(model).from_pretrained(export, output_loading_info=True)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
