#!/usr/bin/env python3
"""Write the golden files of format version 1: ``scripts/make_golden.py [--force] [folder]``.

Golden files prove that checkpoints written once stay readable for ever, so they are made once for each version of the
format and never again in silence: without ``--force`` existing ones are left alone. Ids, times and the environment are
fixed, so that two runs of one version of the code write the same bytes.

``tests/integration/format/test_golden.py`` imports the objects below, restores the files into them, and compares
the outcome with ``expected.json``, which holds plain hexadecimal bits: nothing of this library takes part in making
it.
"""

from __future__ import annotations

import argparse
import enum
import itertools
import json
import pathlib
import random
import shutil
import struct
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any
from unittest import mock
from zoneinfo import ZoneInfo

import numpy as np
import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "tests" / "data" / "format-v1"
ENVIRONMENT = {
    "checkpointer": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "platform": "linux-x86_64",
    "host": "golden",
    "devices": ["cpu"],
}
SMALL = ("model", "optimizer", "scheduler", "state")
"""Components of the checkpoints that do not hold everything."""

BEGIN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc)

# ------------------------------------------------------------------------------------------------- what is saved


class Net(nn.Module):
    """A frozen part, tied weights, buffers of two dtypes, a channels-last weight, a parameter in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.stem = nn.Linear(4, 4).requires_grad_(False).eval()
        self.conv = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("empty", torch.zeros(0, 5))

    def fill(self) -> None:
        """Values that need no generator, so that every machine has the same."""
        with torch.no_grad():
            for number, tensor in enumerate((*self.parameters(), *self.buffers())):
                if tensor.is_floating_point():
                    tensor.copy_((torch.arange(tensor.numel()) / 16 - number).reshape(tensor.shape))


class Color(enum.Enum):
    """Stored by the name of its member, once registered."""

    RED = 1
    BLUE = 2


@dataclass
class Note:
    """Stored by field, once registered."""

    text: str
    score: float


class Scaled(torch.Tensor):
    """A tensor subclass that is taken apart: ``part`` times ``factor``."""

    part: torch.Tensor
    factor: float

    @staticmethod
    def __new__(cls: type[Scaled], part: torch.Tensor, factor: float) -> Scaled:  # noqa: PYI034  # no Self in 3.10
        made: Scaled = torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype)  # noqa: SLF001
        made.part, made.factor = part, factor
        return made

    def __init__(self, part: torch.Tensor, factor: float) -> None:
        """Everything is done in ``__new__``."""

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, float]]:
        return ["part"], {"factor": self.factor}

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], ctx: dict[str, float], size: Any, stride: Any) -> Scaled:
        return Scaled(inner["part"], ctx["factor"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].part.detach(), args[0].factor)
        raise NotImplementedError(str(func))


Scaled.__module__, Scaled.__qualname__ = "golden", "Scaled"  # its label in the files, from wherever this is run


def register() -> None:
    """Register the classes above as a user would."""
    from checkpointer import register_codec

    register_codec("golden.color", Color)
    register_codec("golden.note", Note)
    register_codec("golden.scaled", Scaled)


def progress() -> dict[str, Any]:
    """Every tag of a tree that stands for plain Python and NumPy values."""
    factory: defaultdict[str, list[int]] = defaultdict(list)
    factory["seen"].append(3)
    return {
        "none": None,
        "bools": [True, False],
        "counted": list(range(3, 23)),
        "ints": [0, -1, 2**63 - 1, 1 - 2**63, 2**63, -(2**70)],
        "floats": [0.1, -0.0, 5e-324, sys.float_info.max, float("inf"), float("-inf"), float("nan"), _payload_nan()],
        "complex": [1.5 - 2.5j, complex(float("nan"), -0.0)],
        "strings": ["", "naïve ☃ 𝄞", "lone \ud800 surrogate", "$tensor"],
        "bytes": [b"", b"\x00\xff", bytes(range(256)) * 17],
        "bytearray": bytearray(b"mutable"),
        "tuple": (1, (2,), ()),
        "sets": [{1, (2, 3)}, frozenset({1.5, 2}), set()],
        "$keys": {1: "int", True + 1: "two", 2.5: "float", None: "none", (1, "x"): "tuple", b"b": "bytes", "s": "str"},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "counter": Counter({30: 2, 80: 1}),
        "defaultdict": factory,
        "deques": [deque([1, 2], maxlen=3), deque(["unbounded"])],
        "slice": slice(None, 10, 2),
        "range": range(10, 0, -3),
        "times": [
            datetime(2026, 10, 25, 2, 30, 0, 123456),  # noqa: DTZ001  # a naive one is what is stored
            datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=timezone.utc),
            datetime(2026, 10, 25, tzinfo=timezone(timedelta(hours=-3, minutes=-30), "NST")),
            datetime(2026, 10, 25, tzinfo=timezone(timedelta(seconds=3600))),
            date(2026, 2, 28),
            timedelta(days=-1, seconds=2, microseconds=3),
        ],
        "paths": [pathlib.Path("runs/a"), pathlib.PurePosixPath("a/b"), pathlib.PureWindowsPath("C:\\a")],
        "torch": [torch.Size([2, 3]), torch.bfloat16, torch.device("cuda", 1), torch.device("cpu")],
        "scalars": [np.float32(0.1), np.int64(-7), np.bool_(True), np.complex128(1j), np.str_("é"), np.bytes_(b"b"),
                    np.datetime64("2026-01-02", "D")],
        "arrays": [
            np.arange(6, dtype=np.float32).reshape(2, 3),
            np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
            np.array(["2026-01-02"], dtype="datetime64[D]"),
            np.array(["ab", "c"]),
            np.array(5, dtype=np.uint8),
            np.arange(3, dtype=">i4"),
        ],
        "registered": [Color.BLUE, Note("fine", 0.5)],
    }  # fmt: skip


def zones() -> dict[str, Any]:
    """A time that needs the machine's time zone data."""
    return {"berlin": datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))}


def tensors() -> dict[str, Any]:
    """One tensor of every kind that is more than dtype and shape, and all of them sharing what they share."""
    shared = torch.arange(4, dtype=torch.float32)
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 1], [2, 0]]), [3.0, 4.0], (2, 3), check_invariants=True).coalesce()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a beta
        csr = torch.sparse_csr_tensor([0, 1, 2], [2, 0], [3.0, 4.0], (2, 3), check_invariants=True)
    return {
        "shared": [shared, shared],
        "parameter": nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False),
        "leaf": torch.tensor([3.0]).requires_grad_(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(3, 0, 2, dtype=torch.int32),
        "strided": torch.arange(12, dtype=torch.int16).reshape(3, 4)[:, ::2],
        "transposed": torch.arange(6, dtype=torch.float32).reshape(2, 3).t(),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "coo": coo,
        "csr": csr,
        "scaled": Scaled(torch.tensor([1.0, -1.0]), 0.5),
    }


def quantized() -> dict[str, Any]:
    """Tensors of the two affine schemes."""
    values, scales = torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.tensor([0.1, 0.2], dtype=torch.float64)
    return {
        "tensor": torch.quantize_per_tensor(values, 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(values, scales, torch.tensor([0, 1]), 0, torch.qint8),
    }


def dtypes() -> dict[str, Any]:
    """A tensor of every dtype with known bytes."""
    names = [
        "bool", "uint8", "int8", "uint16", "int16", "float16", "bfloat16", "uint32", "int32", "float32", "uint64",
        "int64", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2",
        "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2",
    ]  # fmt: skip
    raw = (torch.arange(64, dtype=torch.int16) * 37 % 256).to(torch.uint8)
    found = {name: raw.view(getattr(torch, name)) for name in names if name != "bool"}
    return {"bool": raw[:3] > 50, **found}


def optimizer_for(net: Net) -> torch.optim.AdamW:
    """Two groups, so that hyper-parameters differ."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trained[:2], "lr": 0.01}, {"params": trained[2:]}]
    return torch.optim.AdamW(groups, lr=0.1)


def train(net: Net, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    """Elementwise arithmetic alone: the same on every machine, or nearly."""
    for step in range(steps):
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 0.25 * (step + 1))
        optimizer.step()
        scheduler.step()


def components() -> dict[str, Any]:
    """Everything that the full checkpoint holds, by component; freshly built, not trained."""
    net = Net()
    net.fill()
    optimizer = optimizer_for(net)
    return {
        "model": net,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 30], gamma=0.5),
        "progress": progress(),
        "tensors": tensors(),
        "dtypes": dtypes(),
        "generator": torch.Generator(),
        "numpy_generator": np.random.default_rng(5),
        "state": {"component": "whose name is taken by the shared file"},
    }


def special_components() -> dict[str, Any]:
    """Components that some machines or versions of torch cannot restore."""
    return {"zones": zones(), "quantized": quantized()}


def seed_generators() -> None:
    """The global generators, at a known place of their sequences."""
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002  # the global one is what is saved
    torch.manual_seed(3)


def _payload_nan() -> float:
    value: float = struct.unpack(">d", bytes.fromhex("fff8000000000abc"))[0]
    return value


# ------------------------------------------------------------------------------------------------- what is expected


def describe(value: Any) -> Any:  # noqa: PLR0911  # one line for each kind of value
    """JSON that says type and bits of a value, written without any code of the library."""
    name = type(value).__name__
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, np.ndarray):
        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        return [name, value.dtype.str, list(value.shape), order, value.tobytes().hex()]
    if isinstance(value, np.generic):
        return [f"numpy.{name}", value.dtype.str, value.tobytes().hex()]
    if isinstance(value, dict):
        factory = getattr(value, "default_factory", None)
        return [name, getattr(factory, "__name__", None), [[describe(k), describe(v)] for k, v in value.items()]]
    if isinstance(value, (set, frozenset)):
        return [name, sorted((describe(item) for item in value), key=json.dumps)]
    if isinstance(value, (list, tuple, deque)):
        return [name, getattr(value, "maxlen", None), [describe(item) for item in value]]
    if isinstance(value, slice):
        return [name, describe((value.start, value.stop, value.step))]
    if isinstance(value, Note):
        return [name, describe(vars(value))]
    return [name, _describe_scalar(value)]


def _describe_scalar(value: Any) -> str:
    if isinstance(value, float):
        return struct.pack(">d", value).hex()
    if isinstance(value, complex):
        return struct.pack(">2d", value.real, value.imag).hex()
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").hex()
    if isinstance(value, datetime):
        return f"{value.isoformat()} fold {value.fold} {value.tzinfo!r}"
    return repr(value)


def _describe_tensor(value: torch.Tensor) -> Any:
    found: dict[str, Any] = {"type": type(value).__name__, "dtype": str(value.dtype), "shape": list(value.shape)}
    found["requires_grad"] = value.requires_grad
    plain = value.detach()
    if isinstance(value, Scaled):
        return {**found, "part": describe(value.part), "factor": describe(value.factor)}
    if plain.is_quantized:
        parts = {"values": describe(plain.int_repr()), "means": describe(plain.dequantize())}
        return {**found, "scheme": str(plain.qscheme()), **parts}
    if plain.layout is torch.sparse_coo:
        return {**found, "indices": describe(plain._indices()), "values": describe(plain._values())}  # noqa: SLF001
    if plain.layout is torch.sparse_csr:
        triple = (plain.crow_indices(), plain.col_indices(), plain.values())
        return {**found, "parts": [describe(part) for part in triple]}
    if plain.numel() and _is_permuted(plain) and not plain.is_conj():
        found["strides"] = list(plain.stride())
    flat = plain.resolve_conj().contiguous().reshape(-1)
    return {**found, "bits": flat.view(torch.uint8).numpy().tobytes().hex() if flat.numel() else ""}


def _is_permuted(plain: torch.Tensor) -> bool:
    """Dense, but not row-major: such strides are kept."""
    strides = plain.stride()
    order = sorted(range(plain.ndim), key=lambda dimension: -strides[dimension])
    return plain.permute(order).is_contiguous() and not plain.is_contiguous()


def describe_draws() -> dict[str, Any]:
    """What the global generators draw next."""
    return {
        "python": describe(random.random()),
        "numpy": describe(np.random.random()),  # noqa: NPY002
        "torch": describe(torch.rand(2)),
    }


def describe_component(live: Any) -> Any:
    """The state of one live component."""
    if isinstance(live, nn.Module):
        flags = {name: parameter.requires_grad for name, parameter in live.named_parameters()}
        modes = {name: module.training for name, module in live.named_modules()}
        return [describe(dict(live.state_dict())), flags, modes]
    if isinstance(live, torch.Generator):
        return describe(torch.rand(2, generator=live))
    if isinstance(live, np.random.Generator):
        return describe(live.random())
    return describe(live.state_dict() if hasattr(live, "state_dict") else live)


def describe_all(live: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all live components, and of the global generators."""
    return {**{name: describe_component(part) for name, part in live.items()}, "rng": describe_draws()}


def describe_info(info: Any) -> dict[str, Any]:
    """The public description of a checkpoint, without where it lies."""
    names = ("step", "epoch", "sequence", "id", "parent", "pinned", "finite", "size", "note", "damaged")
    return {
        "name": pathlib.PurePosixPath(info.path).name,
        **{name: getattr(info, name) for name in names},
        "created": info.created.isoformat(),
        "metrics": {name: struct.pack(">d", value).hex() for name, value in info.metrics.items()},
        "tags": list(info.tags),
    }


# ------------------------------------------------------------------------------------------------- how it is saved


@contextmanager
def fixed_surroundings() -> Iterator[None]:
    """Ids, times and the environment that every run of this program writes."""
    numbers = itertools.count(1)
    minutes = itertools.count()

    def token_hex(size: int) -> str:
        return f"{next(numbers) * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128):032x}"[: 2 * size]

    clock = mock.Mock(wraps=datetime)
    clock.now.side_effect = lambda _: BEGIN + timedelta(minutes=next(minutes))
    with ExitStack() as stack:
        stack.enter_context(mock.patch("secrets.token_hex", token_hex))
        stack.enter_context(mock.patch("checkpointer.manager.datetime", clock))
        stack.enter_context(mock.patch("checkpointer.manager.environment", return_value=ENVIRONMENT))
        stack.enter_context(mock.patch("time.perf_counter", return_value=0.0))
        yield


def make(folder: pathlib.Path) -> None:
    """Write all golden files into ``folder``, which is empty."""
    register()
    with fixed_surroundings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of quantized and sparse tensors
        expected = {"local": _make_local(folder / "local"), "exported": _make_exported(folder / "exported")}
    text = json.dumps(expected, ensure_ascii=True, separators=(",", ":")).replace(',"', ',\n"')
    (folder / "expected.json").write_text(text + "\n", encoding="ascii")
    from scripts import golden_ranks

    golden_ranks.make(folder / "ranks")


def _make_local(root: pathlib.Path) -> dict[str, Any]:
    """A run root with three checkpoints: a small one, a full and pinned one, and a small one of the same step."""
    from checkpointer import CheckpointManager

    config = {"write": {"mode": "sync"}}
    full = {**components(), **special_components()}
    small = {name: full[name] for name in SMALL}
    states: dict[str, Any] = {}
    with CheckpointManager(root, config=config, **small) as manager:
        _save(manager, small, states, 0, metrics={"loss": float("nan"), "gap": float("inf")})
        manager.pin(0)
        manager.unpin(0)
        manager.annotate(0, metrics={"loss": 0.75, "late": 1.0}, tags=["evaluated"], note="scored later")
    train(full["model"], full["optimizer"], full["scheduler"], 2)
    with CheckpointManager(root, config=config, **full) as manager:
        manager.restore(0, components=["state"])
        _save(
            manager, full, states, 2, epoch=1, metrics={"loss": 0.1, "low": float("-inf")}, tags=("warm", "é"),
            files={"config.json": b'{"hidden": 4}\n', "src/train.py": b"pass\n"},
        )  # fmt: skip
        manager.pin(2)
    train(full["model"], full["optimizer"], full["scheduler"], 1)
    with CheckpointManager(root, config=config, **small) as manager:
        manager.restore(2, components=["state"])
        _save(manager, small, states, 2, epoch=1, overwrite=True)  # the plain name is pinned: both stay
        infos = [describe_info(info) for info in manager.checkpoints()]
    _keep_only_what_is_read(root)
    return {"checkpoints": infos, "states": states}


def _make_exported(root: pathlib.Path) -> dict[str, Any]:
    """A checkpoint made where directories cannot be renamed, copied to disk as it is."""
    import fsspec

    from checkpointer import CheckpointManager

    live = {name: part for name, part in components().items() if name in SMALL}
    train(live["model"], live["optimizer"], live["scheduler"], 1)
    states: dict[str, Any] = {}
    with CheckpointManager("memory://golden", config={"write": {"mode": "sync"}}, **live) as manager:
        _save(manager, live, states, 7, files={"config.json": b"{}"})
        infos = [describe_info(info) for info in manager.checkpoints()]
    fsspec.filesystem("memory").get("/golden/checkpoint-7", str(root / "checkpoint-7"), recursive=True)
    return {"checkpoints": infos, "states": states}


def _save(manager: Any, live: Mapping[str, Any], states: dict[str, Any], step: int, **options: Any) -> None:
    """Save, and record the state under the checkpoint's id. The draws of ``describe`` come after what is saved."""
    seed_generators()
    handle = manager.save(step, **options)
    states[handle.result().id] = describe_all(live)


def _keep_only_what_is_read(root: pathlib.Path) -> None:
    private = root / ".checkpointer"
    for entry in private.iterdir():
        if entry.name == "notes":
            continue
        (shutil.rmtree if entry.is_dir() else pathlib.Path.unlink)(entry)


def main() -> int:
    """Refuse to overwrite, unless told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=FOLDER)
    parser.add_argument("--force", action="store_true", help="replace golden files that exist")
    options = parser.parse_args()
    folder: pathlib.Path = options.folder
    if folder.exists() and any(folder.iterdir()):
        if not options.force:
            print(f"{folder} is not empty: golden files stay as they were written. To replace them: --force")
            return 1
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    make(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files)} bytes in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
