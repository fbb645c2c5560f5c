"""Whatever a component holds comes back from every kind of storage with the same types and the same bits."""

from __future__ import annotations

import copy
import secrets
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning
from checkpointer.format import tensor_files
from checkpointer.state.tensors import as_bytes
from tests.conftest import Root
from tests.support.compare import assert_identical
from tests.unit.state.tree.test_codec import make_tensor, storable, values

BLOCK = 512 * 1024
SIZES = st.sampled_from([(), (0,), (1,), (3, 4), (0, 5), (2, 1, 3), (65,), (257, 129), (BLOCK // 4 + 1,), (700, 1000)])
LAYOUTS = st.sampled_from(["plain", "offset", "gapped", "expanded", "transposed"])
tensors = st.builds(make_tensor, st.sampled_from(storable), SIZES, LAYOUTS, st.integers(0, 99))
states = st.fixed_dictionaries(
    {
        "python": st.lists(values, max_size=3),
        "tensors": st.dictionaries(st.text(max_size=4), tensors, max_size=4),
    }
)


def bits(tensor: torch.Tensor) -> bytes:
    """The row-major bytes of a tensor of any dtype and layout."""
    return bytes(as_bytes(tensor).numpy()) if tensor.numel() else b""


EXAMPLES = {"local": 30, "memory": 30, "s3": 4}


def managers(root: Root, url: str, config: dict[str, Any], **components: Any) -> CheckpointManager:
    return CheckpointManager(url, config=config, storage_options=root.options, **components)


@pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_any_state_comes_back_bit_for_bit(root: Root, mode: str) -> None:
    @settings(max_examples=EXAMPLES[root.kind], deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(states)
    def check(state: dict[str, Any]) -> None:
        url = f"{root.url}/{secrets.token_hex(8)}"
        config = {"write": {"mode": mode}}
        expected = copy.deepcopy(state["python"])
        described = {key: (item.dtype, item.shape, bits(item)) for key, item in state["tensors"].items()}
        with managers(root, url, config, state=state) as mgr:
            mgr.save(1)
        live: dict[str, Any] = {}
        with managers(root, url, config, state=live) as mgr:
            assert mgr.restore_latest() is not None
            assert mgr.verify().ok
        assert_identical(expected, live["python"])
        assert list(described) == list(live["tensors"])
        assert described == {key: (item.dtype, item.shape, bits(item)) for key, item in live["tensors"].items()}
        if root.kind == "local":
            shutil.rmtree(Path(url))

    check()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "narrowed"])
@pytest.mark.filterwarnings("ignore::checkpointer.errors.CheckpointerWarning")
def test_live_memory_of_any_layout_is_filled_in_place(root: Root, layout: str) -> None:
    def make(fill: bool) -> torch.Tensor:
        base = torch.randn(4, 6, 8, 8) if fill else torch.zeros(4, 6, 8, 8)
        if layout == "channels_last":
            return base.to(memory_format=torch.channels_last)
        return base.transpose(1, 3) if layout == "transposed" else base[:, 1:5]

    tensor = make(fill=True)
    expected = tensor.clone()
    with managers(root, root.url, {}, weights={"a": tensor}) as mgr:
        mgr.save(0)
    live = make(fill=False)
    where, strides = live.data_ptr(), live.stride()
    with managers(root, root.url, {}, weights={"a": live}) as mgr:
        mgr.restore_latest()
    assert torch.equal(live, expected)
    assert (live.data_ptr(), live.stride()) == (where, strides)


def test_a_tensor_of_one_element_may_have_any_stride(local: Root) -> None:
    tensor = torch.arange(4, dtype=torch.bfloat16)[1::2][:1]
    assert tensor.stride() == (2,)
    with managers(local, local.url, {}, state={"x": tensor}) as mgr:
        mgr.save(0)
        tensor.zero_()
        mgr.restore(0)
    assert tensor.item() == 1


def test_tied_weights_are_stored_once_and_come_back_tied(local: Root) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(300, 16)
            self.head = nn.Linear(16, 300, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    model = Tied()
    expected = model.embed.weight.detach().clone()
    with managers(local, local.url, {}, model=model) as mgr:
        handle = mgr.save(0)
        assert handle is not None
        info = handle.result()
    stored = (Path(info.path) / "model.safetensors").stat().st_size
    assert stored < 1.5 * expected.nbytes
    other = Tied()
    with managers(local, local.url, {}, model=other) as mgr:
        mgr.restore_latest()
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.embed.weight, expected)


def test_a_model_above_the_size_limit_is_sharded_and_comes_back(local: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_LIMIT", 100_000)
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(7)))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    with managers(local, local.url, {}, model=model) as mgr:
        handle = mgr.save(0)
        assert handle is not None
        files = sorted(path.name for path in Path(handle.result().path).glob("model*"))
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)] + ["model.safetensors.index.json"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with managers(local, local.url, {}, model=model) as mgr:
        mgr.restore_latest()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected, strict=True))


def test_an_object_store_says_once_what_it_does_not_protect(s3: Root) -> None:
    mgr = managers(s3, s3.url, {}, state={})
    with pytest.warns(CheckpointerWarning, match="no lock") as caught:
        mgr.save(0)
    mgr.save(1)
    mgr.close()
    assert len([item for item in caught if issubclass(item.category, CheckpointerWarning)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = CheckpointManager(s3.url, storage_options=s3.options, read_only=True)
        assert [info.step for info in reader.checkpoints()] == [0, 1]


def test_an_index_and_a_header_larger_than_a_block_that_is_read_at_once_are_read_whole(local: Root) -> None:
    state = {f"{number:0150}": torch.full((1,), number) for number in range(4000)}
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    with CheckpointManager(local.url, config={"write": {"mode": "sync"}}, state=state) as mgr:
        path = Path(mgr.save(1).result().path)
        assert mgr.verify(1).ok
    assert (path / "index.json").stat().st_size > 2 * BLOCK
    assert (path / "state.safetensors").stat().st_size > BLOCK
    with CheckpointManager(local.url, read_only=True, state=live) as mgr:
        mgr.restore_latest()
    assert_identical(live, state)
