"""A tree from anywhere gives a value or a typed error: never code, never a crash, never memory out of proportion."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format.index import TensorSpec
from checkpointer.state.tensors import empty_for, spec_of
from checkpointer.state.tree.decode import Decoder, decode, skeleton
from checkpointer.state.tree.encode import encode

TENSORS = {
    "f": torch.arange(6.0).view(2, 3),
    "i": torch.tensor([[0, 1], [1, 5]]),
    "v": torch.tensor([1.0, 2.0]),
    "u": torch.arange(16, dtype=torch.uint8),
    "c": torch.tensor([0, 1, 2]),
    "b": torch.tensor([True]),
}


def nest(node: Any, depth: int, wrap: Any) -> Any:
    for _ in range(depth):
        node = wrap(node)
    return node


def coo(**changes: Any) -> Any:
    parts = {"indices": "i", "values": "v"}
    return {"$sparse": {"layout": "coo", "shape": [2, 6], "coalesced": True, "parts": parts, **changes}}


def csr(**changes: Any) -> Any:
    parts = {"crow_indices": "c", "col_indices": "c", "values": "v"}
    return {"$sparse": {"layout": "csr", "shape": [2, 3], "coalesced": False, "parts": parts, **changes}}


def array(**changes: Any) -> Any:
    return {"$ndarray": {"dtype": "<f4", "shape": [2, 3], "order": "C", "tensor": "f", **changes}}


def quantized(scheme: Any, **parts: str) -> Any:
    return {"$quantized": {"scheme": scheme, "parts": parts}}


HOSTILE: dict[str, Any] = {
    "unknown tag": {"$pickle": "gASV"},
    "tag among keys": {"a": 1, "$b": 2},
    "two tags": {"$tuple": [], "$list": []},
    "empty tag": {"$": 1},
    "int out of range": 2**63,
    "big int not hex": {"$int": "0x10"},
    "big int too short": {"$int": "f"},
    "big int of a number": {"$int": 5},
    "nan untagged": float("nan"),
    "float bits of a finite": {"$float": "3ff0000000000000"},
    "float word": {"$float": "nano"},
    "complex arity": {"$complex": [1.0]},
    "complex types": {"$complex": [1, 2]},
    "tuple of dict": {"$tuple": {"a": 1}},
    "set of lists": {"$set": [[1]]},
    "set of equals": {"$set": [1, 1]},
    "dict of equals": {"$dict": [[1, 2], [True, 3]]},
    "dict arity": {"$dict": [[1, 2, 3]]},
    "dict of list keys": {"$dict": [[[1], 2]]},
    "dict of tensor keys": {"$dict": [[{"$tensor": "f"}, 2]]},
    "factory": {"$defaultdict": ["eval", []]},
    "factory type": {"$defaultdict": [["list"], []]},
    "deque overflow": {"$deque": [2**62, []]} and {"$deque": [{"$int": "f" * 40}, []]},
    "deque negative": {"$deque": [-1, []]},
    "deque longer than its limit": {"$deque": [1, [1, 2]]},
    "range of floats": {"$range": [1.0, 2, 3]},
    "range step zero": {"$range": [1, 2, 0]},
    "slice arity": {"$slice": [1]},
    "base64": {"$bytes": "%%%"},
    "bytes of a missing tensor": {"$bytes": {"tensor": "zz"}},
    "bytes of a float tensor": {"$bytes": {"tensor": "f"}},
    "bytes twice": [{"$bytes": {"tensor": "u"}}, {"$bytes": {"tensor": "u"}}],
    "datetime": {"$datetime": ["2020-99-01", 0, None]},
    "datetime with a zone inside": {"$datetime": ["2020-01-01T00:00:00+01:00", 0, None]},
    "zone path": {"$datetime": ["2020-01-01", 0, {"zone": "../../etc/passwd"}]},
    "zone absolute": {"$datetime": ["2020-01-01", 0, {"zone": "/etc/passwd"}]},
    "fold": {"$datetime": ["2020-01-01", True, None]},
    "timedelta": {"$timedelta": [10**12, 0, 0]},
    "path class": {"$path": ["os.system", "x"]},
    "path type": {"$path": ["path", 3]},
    "dtype": {"$dtype": "load"},
    "device": {"$device": "cpu; rm"},
    "device unknown": {"$device": "toaster:0"},
    "size": {"$size": ["a"]},
    "size overflow": {"$size": [{"$int": "f" * 30}]},
    "numpy scalar objects": {"$npscalar": ["|O8", "AAAAAAAAAAA="]},
    "numpy scalar size": {"$npscalar": ["<f8", "AAAA"]},
    "numpy scalar huge": {"$npscalar": ["<V999999999999", "AAAA"]},
    "tensor missing": {"$tensor": "zz"},
    "tensor not a name": {"$tensor": ["f"]},
    "parameter of a list": {"$parameter": [[1], True]},
    "parameter of an array": {"$parameter": [array(), True]},
    "parameter flag": {"$parameter": [{"$tensor": "f"}, 1]},
    "gradient of ints": {"$parameter": [{"$tensor": "i"}, True]},
    "leaf of bools": {"$leaf": {"$tensor": "b"}},
    "array of objects": array(dtype="|O8"),
    "array of structures": array(dtype="i4,i4"),
    "array shape": array(shape=[3, 2]),
    "array negative": array(shape=[-2, -3]),
    "array huge": array(dtype="<U1", shape=[2**40, 2**40], tensor="u"),
    "array huge and empty": array(dtype="<U1", shape=[0, 2**80], tensor="u"),
    "array order": array(order="K"),
    "array keys": {"$ndarray": {}},
    "array dtype of another": array(dtype="<i4"),
    "sparse index out of range": coo(shape=[2, 5]),
    "sparse negative shape": coo(shape=[-1, 6]),
    "sparse overflow": coo(shape=[2**62, 2**62]) and coo(shape=[2**64, 2]),
    "sparse dims": coo(shape=[2]),
    "sparse layout": coo(layout="strided"),
    "sparse indices not int": coo(parts={"indices": "f", "values": "v"}),
    "sparse missing": coo(parts={"indices": "i", "values": "zz"}),
    "sparse parts": coo(parts={"indices": "i"}),
    "sparse falsely coalesced": coo(parts={"indices": "i2", "values": "v"}),
    "csr too many": csr(parts={"crow_indices": "c", "col_indices": "i", "values": "v"}),
    "csr shape": csr(shape=[7, 3]),
    "csr huge": csr(shape=[2**60, 3]),
    "quantized dtype": quantized({"dtype": "float32", "scale": 1.0, "zero_point": 0}, values="u"),
    "quantized values": quantized({"dtype": "qint8", "scale": 1.0, "zero_point": 0}, values="f"),
    "quantized zero point": quantized({"dtype": "quint8", "scale": 1.0, "zero_point": 2**62}, values="u"),
    "quantized axis": quantized({"dtype": "quint8", "axis": 7}, values="u", scales="v", zero_points="c"),
    "quantized twice": [quantized({"dtype": "quint8", "scale": 1.0, "zero_point": 0}, values="u")] * 2,
    "custom arity": {"$custom": ["x"]},
    "custom name": {"$custom": [["os"], 1]},
    "subclass": {"$subclass": {"class": "os.system", "inner": {}, "ctx": None, "size": [], "stride": []}},
    "deep lists": nest(1, 900, lambda node: [node]),
    "deep tuples": nest(1, 450, lambda node: {"$tuple": [node]}),
    "deep objects": nest(1, 900, lambda node: {"a": node}),
    "not json": object(),
    "bytes in json": b"x",
    "keys that are no strings": {1: 2},
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_hostile_tree_is_a_typed_error(name):
    tensors = {**TENSORS, "i2": torch.tensor([[1, 0], [1, 5]])}
    with pytest.raises(CheckpointerError) as caught:
        decode(HOSTILE[name], tensors)
    if name != "subclass":
        assert isinstance(caught.value, CorruptCheckpointError)


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_the_check_without_data_never_fails_otherwise(name):
    specs = {key: spec_of(tensor) for key, tensor in TENSORS.items()}
    with contextlib.suppress(CheckpointerError):
        skeleton(HOSTILE[name], specs, place="x")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([*TENSORS, "coo", "csr", "<f4", "|u1", "C", "qint8", "utc", "path", "list", "", "nan"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "tensor", "order", "layout", "parts"]), inner, max_size=5
        )
        | st.tuples(
            st.sampled_from(
                [
                    *sorted(Decoder({}, None, place="")._tags),
                    "$unknown",
                ]
            ),
            inner,
        ).map(lambda pair: {pair[0]: pair[1]})
    ),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(json_values)
def test_any_json_gives_a_value_or_a_typed_error(tree):
    with contextlib.suppress(CheckpointerError):
        decode(tree, TENSORS)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_valid_tree_with_one_node_replaced_gives_a_value_or_a_typed_error(data):
    state = {
        "a": (1, 2.5, {"x": torch.ones(2, 2), 3: [torch.zeros(1).numpy(), {1, 2}]}),
        "s": torch.eye(3).to_sparse(),
        "b": b"0" * 5000,
        "p": torch.nn.Parameter(torch.ones(1)),
    }
    tree, tensors = encode(state)
    tree = json.loads(json.dumps(tree))
    node: Any = tree
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(json_values)
            break
        node = node[key]
    with contextlib.suppress(CheckpointerError):
        decode(tree, tensors)


def test_many_references_to_one_tensor_cost_no_memory():
    tree = [[{"$tensor": "f"}, array(), {"$parameter": [{"$tensor": "f"}, True]}] for _ in range(2000)]
    big = {"f": torch.zeros(2, 3)}
    tracemalloc.start()
    value = decode(tree, big)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    assert value[0][1] is value[1999][1]


@pytest.mark.parametrize("strides", [(1, 1), (3,), (-1, 2), (6, 2), (2**62, 1), (0, 0), (1, 3)])
def test_strides_that_are_not_dense_are_refused(strides):
    with pytest.raises(ValueError, match="strides"):
        empty_for(TensorSpec("float32", (2, 3), strides))


def test_huge_strides_of_dims_of_size_one_are_harmless():
    assert empty_for(TensorSpec("float32", (1, 3), (2**62, 1))).untyped_storage().nbytes() == 12


def test_a_device_that_is_not_here_means_the_cpu():
    for device in ("cuda:7", "toaster", "meta", "xla:0", "mps"):
        assert empty_for(TensorSpec("float32", (1,), None, device)).device.type in ("cpu", "cuda", "mps")
