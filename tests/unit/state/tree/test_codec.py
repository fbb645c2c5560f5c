"""Python state and tensors come back with the same types and the same bits."""

from __future__ import annotations

import enum
import math
import pathlib
import struct
import warnings
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer.errors import ConfigError, IncompatibleStateError, UnsupportedStateError
from checkpointer.format.index import ITEM_SIZES
from checkpointer.state import register_codec, tensors
from checkpointer.state.tensors import DTYPES, as_bytes, empty_for, spec_of
from checkpointer.state.tree import codecs
from checkpointer.state.tree.decode import decode
from checkpointer.state.tree.encode import encode
from tests.support.compare import assert_identical
from tests.support.memory_engine import roundtrip
from tests.support.versions import NEWEST_TORCH, release

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

nans = st.integers(1, 2**52 - 1).flatmap(
    lambda bits: st.sampled_from([0x7FF, 0xFFF]).map(
        lambda top: struct.unpack(">d", struct.pack(">Q", (top << 52) | bits))[0]
    )
)
floats = st.floats() | nans
zones = st.none() | st.sampled_from(
    [
        timezone.utc,
        timezone(timedelta(hours=5, minutes=30)),
        timezone(timedelta(hours=-3), "BRT"),
        zoneinfo.ZoneInfo("UTC"),
    ]
)
keys = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | floats
    | st.text(st.characters(codec=None), max_size=5)
    | st.binary(max_size=4)
    | st.builds(complex, st.floats(), st.floats()),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
leaves = (
    keys
    | st.datetimes(timezones=zones)
    | st.dates()
    | st.timedeltas()
    | st.builds(slice, st.integers() | st.none(), st.integers() | st.none())
    | st.builds(range, st.integers(), st.integers(), st.integers().filter(bool))
    | st.lists(st.integers(0, 2**62), max_size=3).map(torch.Size)
    | st.sampled_from([torch.float32, torch.int1, torch.device("cpu"), torch.device("cuda:1"), pathlib.Path("a/../b")])
    | st.sampled_from([pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:\\x"), bytearray(b"abc"), b"\0" * 9000])
    | st.sampled_from([np.float32(-0.0), np.int8(3), np.bool_(True), np.str_("é\0"), np.bytes_(b"x\0")])
    | st.sampled_from([np.datetime64("2020-01-01T00:00:01.5"), np.timedelta64(3, "h"), np.complex64(1j)])
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(keys, inner, max_size=3).map(lambda d: defaultdict(list, d))
        | st.dictionaries(keys, inner, max_size=3).map(Counter)
        | st.tuples(st.lists(inner, max_size=3), st.none() | st.integers(3, 2**40)).map(lambda t: deque(*t))
        | st.sets(keys, max_size=4)
    ),
    max_leaves=12,
)


@SETTINGS
@given(values)
def test_any_nested_python_state_comes_back_with_the_same_types_and_bits(value):
    assert_identical(value, roundtrip(value))


@pytest.mark.parametrize("value", [{"$tensor": "x"}, {"$x": 1, "y": 2}, {"a": {"$int": "ff"}}, {"$": 0}])
def test_a_dict_that_looks_like_a_tag_comes_back_as_a_dict(value):
    assert_identical(value, roundtrip(value))


@pytest.mark.parametrize(
    "value",
    [0, 2**63 - 1, 2**63, -(2**63), -(2**63) + 1, pytest.param(10**5000, id="huge"), True, -0.0, 5e-324, math.inf],
)
def test_numbers_at_the_edges_come_back_exactly(value):
    assert_identical(value, roundtrip(value))


def test_a_key_order_and_an_insertion_order_survive():
    value = {"b": 1, "a": 2, 3: 4}
    assert list(roundtrip(value)) == ["b", "a", 3]


def test_fold_and_date_survive():
    value = [datetime(2020, 10, 25, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")), date(2020, 1, 1)]
    assert_identical(value, roundtrip(value))
    assert roundtrip(value)[0].utcoffset() == value[0].utcoffset()


storable = sorted(name for name in ITEM_SIZES if name in DTYPES)


def make_tensor(name: str, shape: tuple[int, ...], layout: str, seed: int = 0) -> torch.Tensor:
    """Random bits (bools stay 0 and 1) of any dtype, shape and strides."""
    numel = math.prod(shape)
    generator = torch.Generator().manual_seed(seed)
    size = ITEM_SIZES[name]
    raw = torch.randint(0, 2 if name == "bool" else 256, (max(numel, 1) * size * 2,), generator=generator)
    flat = raw.to(torch.uint8).view(DTYPES[name])
    if layout == "gapped" and shape:
        return flat[: numel * 2].as_strided(shape, [2 * s for s in _row_major(shape)])
    if layout == "expanded" and shape:
        return flat[: numel // max(shape[0], 1) or 1].as_strided(shape, (0, *_row_major(shape)[1:]))
    if layout == "transposed":
        return flat.as_strided(shape, tuple(reversed(_row_major(shape[::-1]))))
    return flat.as_strided(shape, _row_major(shape), 1 if layout == "offset" else 0)


def _row_major(shape):
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


@SETTINGS
@given(
    st.sampled_from(storable),
    st.lists(st.integers(0, 4), max_size=4).map(tuple),
    st.sampled_from(["plain", "offset", "gapped", "expanded", "transposed"]),
    st.integers(0, 99),
)
def test_tensors_of_every_dtype_layout_and_size_come_back_bit_for_bit(name, shape, layout, seed):
    tensor = make_tensor(name, shape, layout, seed)
    back = roundtrip({"x": tensor})["x"]
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    if tensor.numel():
        assert torch.equal(as_bytes(back), as_bytes(tensor))
    if layout != "expanded":
        assert_identical(tensor, back)


@pytest.mark.parametrize("name", storable)
def test_every_torch_dtype_has_a_spec(name):
    tensor = make_tensor(name, (2, 3), "transposed")
    spec = spec_of(tensor)
    assert (spec.dtype, spec.shape, spec.nbytes) == (name, (2, 3), tensor.nbytes)
    assert empty_for(spec).stride() == tensor.stride()


QUANTIZED = {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}


def forgotten_dtypes(names, torch_version):
    """Dtypes that cannot be stored: none. A torch that is newer than the tests may have some; then they are said."""
    unknown = sorted(set(names) - QUANTIZED - set(ITEM_SIZES))
    if unknown and release(torch_version) > release(NEWEST_TORCH):
        warnings.warn(f"torch {torch_version} has dtypes that cannot be stored yet: {unknown}", stacklevel=2)
        return []
    return unknown


@pytest.mark.filterwarnings("default:torch .* has dtypes that cannot be stored yet")
def test_no_dtype_of_this_torch_is_forgotten():
    assert forgotten_dtypes(DTYPES, torch.__version__) == []


def test_a_new_dtype_is_a_warning_in_newer_torch_alone():
    with pytest.warns(UserWarning, match="bfloat7"):
        assert forgotten_dtypes([*DTYPES, "bfloat7"], "99.0.0") == []
    assert forgotten_dtypes([*DTYPES, "bfloat7"], NEWEST_TORCH)[-1] == "bfloat7"


def test_a_tensor_of_a_dtype_that_is_not_known_is_refused_by_its_name_and_the_version_of_torch(monkeypatch):
    monkeypatch.setattr(tensors, "STORABLE", tensors.STORABLE - {torch.complex128})
    with pytest.raises(UnsupportedStateError) as caught:
        encode({"scale": torch.zeros(2, dtype=torch.complex128)}, "model")
    message = str(caught.value)
    assert message.startswith("model['scale']: a tensor of dtype torch.complex128")
    assert torch.__version__ in message
    assert "update checkpointer" in message


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_channels_last_survives(memory_format):
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    assert_identical(tensor, roundtrip(tensor))


def test_conjugate_and_negative_views_come_back_with_their_values():
    tensor = torch.randn(3, dtype=torch.complex64)
    back = roundtrip([tensor.conj(), tensor.conj().imag, tensor])
    assert torch.equal(back[0], tensor.conj())
    assert torch.equal(back[1], tensor.conj().imag)
    assert torch.equal(back[2], tensor)


@pytest.mark.parametrize(
    "dtype", ["f4", ">f8", "<f2", "?", "i1", "u8", "c16", "U3", "S4", "M8[ns]", "m8[h]", "V3", "g", ">U2"]
)
@pytest.mark.parametrize("order", ["C", "F", "gapped", "reversed"])
def test_numpy_arrays_of_every_plain_dtype_come_back(dtype, order):
    flat = np.frombuffer(bytes(range(1, 100)) * 10, dtype="u1")
    made = np.zeros((4, 6), dtype=dtype)
    if made.dtype.kind not in "USgfc":
        made.reshape(-1).view("u1")[:] = flat[: made.nbytes] if made.dtype.kind != "b" else 1
    elif made.dtype.kind in "fgc":
        made[:] = np.arange(24).reshape(4, 6)
    else:
        made[:] = "ab"
    made = {"C": made, "F": np.asfortranarray(made), "gapped": made[::2, ::3], "reversed": made[::-1]}[order]
    assert_identical(made, roundtrip({"a": made})["a"])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 0)])
def test_numpy_arrays_without_elements_or_dims_come_back(shape):
    for dtype in ("f4", "U2"):
        value = np.zeros(shape, dtype)
        assert_identical(value, roundtrip([value])[0])


def test_a_read_only_array_is_stored_without_a_warning():
    value = np.arange(3)
    value.flags.writeable = False
    assert_identical(roundtrip(value), np.arange(3))


def sparse_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    dense = torch.tensor([[0.0, 1, 0, 0], [2, 0, 0, -0.0], [0, 0, 0, 3], [0, 0, 4, 5]])
    doubled = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 3), check_invariants=True)
    return {
        "coo": dense.to_sparse(),
        "uncoalesced": doubled,
        "coalesced": doubled.coalesce(),
        "hybrid": torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 3), (4, 3), check_invariants=True),
        "empty": torch.sparse_coo_tensor(
            torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (3, 4), check_invariants=True
        ),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "bsr": dense.to_sparse_bsr((2, 2)),
        "bsc": dense.to_sparse_bsc((2, 2)),
    }


@pytest.mark.parametrize("name", ["coo", "uncoalesced", "coalesced", "hybrid", "empty", "csr", "csc", "bsr", "bsc"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_come_back_in_their_layout(name):
    assert_identical(sparse_tensors()[name], roundtrip({"s": sparse_tensors()[name]})["s"])


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensors_come_back():
    x = torch.randn(3, 4)
    scales, zeros = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), torch.tensor([1, 2, 3])
    for dtype in (torch.qint8, torch.quint8, torch.qint32):
        value = [
            torch.quantize_per_tensor(x, 0.1, 3, dtype),
            torch.quantize_per_channel(x, scales, zeros, 0, dtype),
        ]
        assert_identical(value, roundtrip(value))


class Pair(torch.Tensor):
    """A tensor subclass of two tensors."""

    @staticmethod
    def __new__(cls, a, b, scale):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a, b, scale):
        self.a, self.b, self.scale = a, b, scale

    def __tensor_flatten__(self):
        return ["a", "b"], {"scale": self.scale}

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Pair(inner["a"], inner["b"], context["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Pair(args[0].a.detach(), args[0].b.detach(), args[0].scale)
        raise NotImplementedError(str(function))


def test_a_tensor_subclass_comes_back_onto_a_live_one_of_its_class_only():
    value = {"w": Pair(torch.randn(2), torch.randn(2), (1, 2))}
    live = {"w": Pair(torch.zeros(2), torch.zeros(2), None)}
    assert_identical(value, roundtrip(value, live))
    with pytest.raises(IncompatibleStateError, match="register_codec"):
        roundtrip(value)


def test_tied_tensors_come_back_as_one_and_views_of_a_larger_one_on_their_own():
    base = torch.randn(6)
    back = roundtrip(
        {"a": base, "b": base, "c": base.view(6), "part": base[:3], "e": torch.empty(0), "f": torch.empty(0)}
    )
    assert back["a"] is back["b"]
    assert back["a"] is back["c"]
    assert back["part"].data_ptr() != back["a"].data_ptr()
    assert back["part"].untyped_storage().nbytes() == 12
    assert back["e"] is not back["f"]


def test_parameters_and_leaves_keep_their_flags():
    parameter = torch.nn.Parameter(torch.randn(2), requires_grad=False)
    leaf = torch.randn(2, requires_grad=True)
    back = roundtrip([parameter, leaf, parameter, leaf * 2, torch.nn.Parameter(torch.ones(1))])
    assert type(back[0]) is torch.nn.Parameter
    assert not back[0].requires_grad
    assert back[0] is back[2]
    assert back[1].is_leaf
    assert back[1].requires_grad
    assert not back[3].requires_grad
    assert back[4].requires_grad


def test_colliding_tensor_keys_get_a_suffix():
    value = {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.ones(2), "1": torch.ones(3)}
    _, tensors = encode(value)
    assert list(tensors) == ["a.b", "a.b#2", "1", "1#2"]
    assert_identical(value, roundtrip(value))


Point = namedtuple("Point", "x y")  # noqa: PYI024


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Text(str):
    __slots__ = ()


@dataclass
class Record:
    a: int
    b: list[Any]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = (value,)
    return value


STRUCTURED = np.zeros(2, dtype=[("a", "i4")])


def foreign(module: str, name: str) -> Any:
    """An object of a library that need not be installed."""
    return type(name, (), {"__module__": module})()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        (len, "name of the function"),
        (lambda: 0, "name of the function"),
        (Point(1, 2), r"register_codec\(name, Point\).*_asdict"),
        Colour.RED,
        Level.LOW,
        Text("x"),
        Record(1, []),
        torch.empty(2, device="meta"),
        defaultdict(lambda: 0),
        (np.array([object()]), r"\.tolist\(\)"),
        (STRUCTURED, "store its fields"),
        (STRUCTURED[0], r"\.item\(\)"),
        (STRUCTURED.view(np.recarray), "store its fields"),
        (np.void(b"abc"), r"bytes\(x\)"),
        (np.ma.masked_equal([1, 2], 2), "getmaskarray"),
        (torch.ones(2, 2).max(0), r"tuple\(x\)"),
        (Decimal("0.1"), r"str\(x\)"),
        ({}.keys(), r"list\(x\)"),
        (Colour, "store its name"),
        (foreign("pandas", "DataFrame"), r"to_numpy\(\)"),
        (foreign("PIL.Image", "Image"), r"np\.asarray\(image\)"),
        (foreign("jaxlib._jax", "ArrayImpl"), r"np\.asarray\(x\)"),
        type("D", (dict,), {})(),
        (torch.nn.Linear(1, 1), "component of its own"),
        Exception("x"),
        (iter([]), "how many items"),
        nested(300),
        nested(3000),
        {torch.ones(1): 1},
        {frozenset([Point(1, 2)])},
        torch.nn.UninitializedParameter(),
    ],
    ids=lambda value: type(value[0] if type(value) is tuple else value).__name__,
)
def test_what_cannot_be_stored_is_refused_with_its_place_and_the_way_out(value):
    value, way_out = value if type(value) is tuple and len(value) == 2 else (value, "register_codec")
    with pytest.raises(UnsupportedStateError, match=way_out) as caught:
        encode({"loader": [0, 1, 2, {"foo": value}]})
    assert str(caught.value).startswith("state['loader'][3]['foo']")


def test_a_cycle_is_refused_and_a_shared_child_is_not():
    shared = [1]
    assert roundtrip([shared, shared]) == [[1], [1]]
    cycle: list[Any] = []
    cycle.append({"x": cycle})
    with pytest.raises(UnsupportedStateError, match="holds itself"):
        encode(cycle)


@pytest.mark.parametrize(
    "wrap", [lambda x: [x], lambda x: (x,), lambda x: {"a": x}, lambda x: {1: x}, lambda x: deque([x])]
)
def test_two_hundred_levels_come_back(wrap):
    value: Any = 1
    for _ in range(199):
        value = wrap(value)
    back = roundtrip(value)
    for _ in range(199):
        assert type(back) is type(value)
        back, value = (next(iter(v.values())) if isinstance(v, dict) else v[0] for v in (back, value))


def forget(name: str) -> None:
    """Undo a registration: the library has no way to, since a checkpoint may need it at any time."""
    codec = codecs._by_name.pop(name, None)
    if codec is not None:
        del codecs._by_class[codec.cls]


@pytest.fixture
def registered():
    names: list[str] = []

    def register(name, *arguments):
        names.append(name)
        register_codec(name, *arguments)

    yield register
    for name in names:
        forget(name)


def test_registered_classes_come_back(registered):
    registered("colour", Colour)
    registered("level", Level)
    registered("record", Record)
    registered("point", Point, tuple, lambda pair: Point(*pair))
    value = [Colour.RED, Level.LOW, Record(1, [torch.ones(2), Point(1, 2)]), {Colour.RED: 1, (Level.LOW, 2): 3}]
    assert_identical(value, roundtrip(value))


class Labelled(Point):
    """A namedtuple with a ``__dict__``, and a ``__new__`` of its own."""

    def __new__(cls, x, y):
        raise AssertionError("values are put back as they were, not computed again")


def test_namedtuples_come_back_as_they_were(registered):
    registered("point", Point)
    registered("labelled", Labelled)
    labelled = tuple.__new__(Labelled, (1, np.ones(2)))
    value = {"p": Point(torch.ones(2), [Point(1, 2)]), Point(3, 4): {Point(5, (6,))}, "l": labelled}
    assert_identical(value, roundtrip(value))
    labelled.label = "x"
    with pytest.raises(UnsupportedStateError, match="not fields"):
        encode(labelled)
    for fields in ({"x": 1}, {"x": 1, "y": 2, "z": 3}, [1, 2]):
        with pytest.raises(IncompatibleStateError, match="fields"):
            decode({"$custom": ["point", fields]}, {})  # type: ignore[list-item]


def test_a_memory_map_is_stored_as_the_array_that_it_is_a_view_of(tmp_path):
    mapped = np.memmap(tmp_path / "x", "f4", "w+", shape=(3,))
    with pytest.raises(UnsupportedStateError, match=r"np\.asarray\(x\)"):
        encode({"m": mapped})
    mapped[:] = [1, 2, 3]
    saved = roundtrip({"m": np.asarray(mapped)})
    assert_identical(saved, {"m": np.array([1, 2, 3], "f4")})


def test_an_unregistered_name_is_refused_and_never_imported(registered):
    registered("colour", Colour)
    tree, _ = encode(Colour.RED)
    forget("colour")
    with pytest.raises(IncompatibleStateError, match="register_codec"):
        decode(tree, {})


def test_double_and_invalid_registrations_are_refused(registered):
    registered("colour", Colour)
    register_codec("colour", Colour)
    with pytest.raises(ConfigError):
        register_codec("colour", Level)
    with pytest.raises(ConfigError):
        register_codec("other", Colour)
    for arguments in [("", Level), ("x", 3), ("x", int, str, int), ("x", Text), ("x", Point, tuple), ("a b", Level)]:
        with pytest.raises(ConfigError):
            register_codec(*arguments)  # type: ignore[arg-type]


def test_a_dataclass_with_other_fields_than_saved_is_refused(registered):
    registered("record", Record)
    with pytest.raises(IncompatibleStateError, match="fields"):
        decode({"$custom": ["record", {"a": 1}]}, {})
