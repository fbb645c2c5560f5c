"""A hostile checkpoint: forged so that every hash fits. It gets a typed error, and no live object is changed."""

from __future__ import annotations

import contextlib
import copy
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError, CorruptCheckpointError, FormatVersionError
from tests.support import processes
from tests.support.compare import assert_identical
from tests.support.forge import Forgery, forge_index, forge_manifest
from tests.support.mutations import change_json
from tests.support.training import Training, at

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A valid checkpoint of step 1 with a sharded model."""
    training = at(2, frozen=True)
    with CheckpointManager(tmp_path / "run", **training.components) as mgr:
        handle = mgr.save(1, files={"note.txt": b"hello"})
        assert handle is not None
        return Path(handle.result().path)


def refused(checkpoint: Path, error: type[CheckpointerError] = CorruptCheckpointError) -> str:
    """Restore and verify: both must refuse, and nothing live may change. Returns the message."""
    live: Training = at(5, seed=3, frozen=True)
    before = live.snapshot()
    with CheckpointManager(checkpoint.parent, read_only=True, **live.components) as mgr:
        with pytest.raises(error) as caught:
            mgr.restore(1)
        if error is CorruptCheckpointError:
            assert not mgr.verify().ok
    assert_identical(before, live.snapshot())
    return str(caught.value)


def tensor(raw: dict[str, Any], key: str = "2.weight") -> dict[str, Any]:
    found: dict[str, Any] = raw["components"]["model"]["tensors"][key]
    return found


PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "a/../../b",
    "a\\..\\b",
    "C:\\x",
    "",
    ".",
    "a//b",
    "a\0b",
    "x" * 2000,
    "\ud800",
]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_name_never_leaves_the_checkpoint(checkpoint: Path, path: str) -> None:
    forgery = Forgery(checkpoint)
    forgery.files[path] = {"path": path, "size": 1, "xxh3": "0" * 32}
    forgery.write_index()
    assert "not a file name inside a checkpoint" in refused(checkpoint)


def test_verify_finds_a_header_that_tells_stock_tools_another_story(checkpoint: Path) -> None:
    """Forged so that every hash fits: only the comparison of header and index can tell."""
    forgery = Forgery(checkpoint)
    name = tensor(forgery.index)["chunks"][0]["file"]

    def reshape(header: dict[str, Any]) -> None:
        header["2.weight"]["shape"].reverse()

    forgery.edit_header(name, reshape)
    forgery.write_index()
    with CheckpointManager(checkpoint.parent, read_only=True) as mgr:
        assert mgr.verify(1).checkpoints[0].damage == (
            f"the header of {name} describes other tensors than the index does",
        )


@pytest.mark.parametrize("target", ["file", "directory", "fifo"])
def test_a_link_or_a_special_file_is_not_followed(checkpoint: Path, tmp_path: Path, target: str) -> None:
    import os

    victim = checkpoint / "model-00001-of-00002.safetensors"
    outside = tmp_path / "outside"
    victim.rename(outside)
    if target == "file":
        victim.symlink_to(outside)
    elif target == "directory":
        (checkpoint / "files").rename(tmp_path / "files")
        (checkpoint / "files").symlink_to(tmp_path / "files")
        outside.rename(victim)
    else:
        os.mkfifo(victim)
    assert "plain file" in refused(checkpoint) or "regular file" in refused(checkpoint)


MANIFEST_FORGERIES: dict[str, Change] = {
    "no id": lambda f: f.pop("id"),
    "id is no id": lambda f: f.update(id="../x"),
    "parent is no id": lambda f: f.update(parent=3),
    "step is a string": lambda f: f.update(step="1"),
    "step is a bool": lambda f: f.update(step=True),
    "step is a float": lambda f: f.update(step=1.0),
    "step is negative": lambda f: f.update(step=-1),
    "step is of another checkpoint": lambda f: f.update(step=2),
    "sequence is huge": lambda f: f.update(sequence=2**64),
    "created has no zone": lambda f: f.update(created="2026-01-01T00:00:00"),
    "created is nonsense": lambda f: f.update(created="yesterday"),
    "metrics are a list": lambda f: f.update(metrics=[]),
    "a metric is huge": lambda f: f.update(metrics={"x": 10**400}),
    "a metric is a word": lambda f: f.update(metrics={"x": "low"}),
    "tags are a string": lambda f: f.update(tags="abc"),
    "finite is a number": lambda f: f.update(finite=1),
    "world size is zero": lambda f: f.update(world_size=0),
    "index is a list": lambda f: f.update(index=[]),
    "a file has no hash": lambda f: f["index"].update({"index.json": [1]}),
    "a hash is short": lambda f: f["index"].update({"index.json": [1, "ab"]}),
    "a size is negative": lambda f: f["index"].update({"index.json": [-1, "0" * 32]}),
    "there is no index": lambda f: f["index"].pop("index.json"),
    "there is no table": lambda f: f["index"].pop("index.safetensors"),
    "the index has another file": lambda f: f["index"].update({"../index": [1, "0" * 32]}),
    "the index is huge": lambda f: f["index"]["index.json"].__setitem__(0, 2**40),
    "files are a list": lambda f: f.update(files=[]),
    "files are fewer than those of the index": lambda f: f.update(files=1),
    "the size is smaller than that of the index": lambda f: f.update(size=1),
    "the size is huge": lambda f: f.update(size=2**64),
    "shared is a list": lambda f: f.update(shared=[]),
    "shared is somebody's elsewhere": lambda f: f.update(shared={"../other": 2}),
    "shared is its own": lambda f: f.update(shared={f["id"]: 2}),
    "more is shared than there is": lambda f: f.update(shared={"0" * 32: f["size"] + 1}),
    "a negative number is shared": lambda f: f.update(shared={"0" * 32: -1}),
    "foreign is negative": lambda f: f.update(foreign=-1),
    "run is no id": lambda f: f.update(run="../x"),
    "rules are a list": lambda f: f.update(rules=[1]),
    "replaces is no id": lambda f: f.update(replaces=7),
    "slimmed is a string": lambda f: f.update(slimmed="model"),
    "environment is a list": lambda f: f.update(environment=[]),
    "another format": lambda f: f.update(format="zip"),
    "version is zero": lambda f: f.update(version=0),
    "version is a string": lambda f: f.update(version="1"),
}


@pytest.mark.parametrize("name", MANIFEST_FORGERIES)
def test_a_forged_manifest_is_a_typed_error(checkpoint: Path, name: str) -> None:
    forge_manifest(checkpoint, MANIFEST_FORGERIES[name])
    refused(checkpoint)


def test_a_future_version_is_named_and_never_passed_over(checkpoint: Path) -> None:
    forge_manifest(checkpoint, lambda fields: fields.update(version=2, id=3, surprise=[]))
    assert "upgrade" in refused(checkpoint, FormatVersionError)
    with (
        CheckpointManager(checkpoint.parent, read_only=True, **at(0, frozen=True).components) as mgr,
        pytest.raises(FormatVersionError),
    ):
        mgr.restore_latest()


def swap_ranges(raw: dict[str, Any]) -> None:
    a, b = tensor(raw, "1.weight")["chunks"][0], tensor(raw, "2.weight")["chunks"][0]
    a["range"], b["range"] = b["range"], a["range"]


INDEX_FORGERIES: dict[str, Change] = {
    "a shape larger than the file": lambda r: tensor(r).update(shape=[10**6, 10**6]),
    "a shape beyond integers": lambda r: tensor(r).update(shape=[2**62, 2**62, 0]),
    "a negative shape": lambda r: tensor(r).update(shape=[-2, -4]),
    "two hundred dimensions": lambda r: tensor(r).update(shape=[1] * 200),
    "strides of another length": lambda r: tensor(r).update(strides=[1]),
    "strides that overlap": lambda r: tensor(r).update(strides=[0, 0]),
    "strides beyond memory": lambda r: tensor(r).update(strides=[2**40, 1]),
    "an unknown dtype": lambda r: tensor(r).update(dtype="object"),
    "a dtype of another size": lambda r: tensor(r).update(dtype="float64"),
    "no chunks": lambda r: tensor(r).update(chunks=[]),
    "a chunk outside": lambda r: tensor(r)["chunks"][0].update(offsets=[1, 1]),
    "a chunk in no file": lambda r: tensor(r)["chunks"][0].update(file="../../etc/passwd"),
    "a chunk in a file without tensors": lambda r: tensor(r)["chunks"][0].update(file="files/note.txt"),
    "a range outside": lambda r: tensor(r)["chunks"][0].update({"range": [2**40, 2**40 + 32]}),
    "a reversed range": lambda r: tensor(r)["chunks"][0].update({"range": [500, 400]}),
    "a range in the header": lambda r: tensor(r)["chunks"][0].update({"range": [0, 32]}),
    "ranges that overlap": lambda r: tensor(r)["chunks"][0].update(
        {"range": tensor(r, "2.bias")["chunks"][0]["range"]}
    ),
    "a forgotten tensor": lambda r: r["components"]["model"]["tensors"].pop("2.weight"),
    "ranges of other sizes swapped": swap_ranges,
    "a header longer than the file": lambda r: r["files"].update({"optimizer.safetensors": [2**40, "0" * 32]}),
    "a header that is shorter than its length": lambda r: r["files"].update({"optimizer.safetensors": [7, "0" * 32]}),
    "no components": lambda r: r["components"].clear(),
    "a component that is a list": lambda r: r["components"].update(model=[]),
    "a component without a tree": lambda r: r["components"]["progress"].pop("tree"),
    "a kind of another component": lambda r: r["components"]["model"].update(kind="rng"),
    "an unknown tag": lambda r: r["components"]["progress"].update(tree={"$evil": 1}),
    "a tensor that is not there": lambda r: r["components"]["progress"].update(tree={"x": {"$tensor": "nowhere"}}),
    "meta that is a list": lambda r: r["components"]["model"].update(meta=[]),
}


@pytest.mark.filterwarnings("ignore:skipping a damaged checkpoint")
@pytest.mark.parametrize("name", INDEX_FORGERIES)
def test_a_forged_index_is_a_typed_error(checkpoint: Path, name: str) -> None:
    forge_index(checkpoint, INDEX_FORGERIES[name])
    live = at(5, seed=3, frozen=True)
    before = live.snapshot()
    with CheckpointManager(checkpoint.parent, read_only=True, **live.components) as mgr:
        with pytest.raises(CheckpointerError):
            mgr.restore(1)
        with pytest.raises(CheckpointerError):
            mgr.restore_latest()
    assert_identical(before, live.snapshot())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b'{"a":' * 100_000,
        b'{"format":"checkpointer-index","format":"checkpointer-index"}',
        b'{"format":"checkpointer-index","version":NaN}',
        b"\xff\xfe\x00",
        b"9" * 100_000,
        b'{"format":"checkpointer-index","version":1e999}',
    ],
    ids=lambda data: repr(data[:20]),
)
def test_an_index_that_is_no_index_is_a_typed_error(checkpoint: Path, data: bytes) -> None:
    forge_index(checkpoint, data)
    refused(checkpoint)


def test_a_tree_in_a_restore_changed_anywhere_is_a_typed_error_or_harmless(checkpoint: Path) -> None:
    original = Forgery(checkpoint).index
    trees = {name: part["tree"] for name, part in original["components"].items() if name != "rng"}

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.sampled_from(list(trees)), st.randoms(use_true_random=False))
    def check(name: str, luck: Random) -> None:
        forged = copy.deepcopy(original)
        forged["components"][name]["tree"] = change_json({"tree": trees[name]}, luck).get("tree")
        forge_index(checkpoint, lambda raw: raw.update(forged))
        live = at(1, frozen=True)
        mgr = CheckpointManager(checkpoint.parent, read_only=True, **live.components)
        with contextlib.suppress(CheckpointerError):
            mgr.restore(1)

    check()


def test_forged_counts_take_bounded_memory(checkpoint: Path) -> None:
    """In a process that may not have the memory: a restore that believed the counts would die of it."""
    forge_index(
        checkpoint,
        lambda raw: raw["components"]["progress"].update(
            tree={
                "deque": {"$deque": {"items": [], "maxlen": 2**62}},
                "range": {"$range": [0, 2**62, 1]},
                "size": {"$size": [2**62] * 50},
                "zeros": {"$ndarray": {"tensor": "x", "dtype": "<f8", "shape": [2**40]}},
            }
        ),
    )
    script = """
        import resource, sys
        from checkpointer import CheckpointManager, errors
        from tests.support.training import at
        live = at(0, frozen=True)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000,) * 2)
        try:
            CheckpointManager(sys.argv[1], read_only=True, **live.components).restore(1)
        except errors.CheckpointerError as error:
            print("refused", type(error).__name__)
    """
    arguments = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(checkpoint.parent)]
    done = processes.run(arguments)
    assert "refused" in done.stdout, done.stderr


def test_nothing_in_a_checkpoint_is_ever_imported(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "trap_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for tag in (
        {"$custom": "trap_module.Evil", "value": 1},
        {"$subclass": "trap_module.Evil", "inner": {}, "ctx": None},
    ):
        tree = {"x": tag}
        forge_index(checkpoint, lambda raw: raw["components"]["progress"].update(tree=tree))  # noqa: B023  called at once
        refused_or_unsupported = at(0, frozen=True)
        with (
            CheckpointManager(checkpoint.parent, read_only=True, **refused_or_unsupported.components) as mgr,
            pytest.raises(CheckpointerError),
        ):
            mgr.restore(1)
    assert "trap_module" not in sys.modules


def test_a_hostile_checkpoint_does_not_shadow_an_older_good_one(checkpoint: Path) -> None:
    good = at(3, frozen=True)
    with CheckpointManager(checkpoint.parent, config={"require_resume": False}, **good.components) as mgr:
        mgr.save(2)
    forge_index(checkpoint.with_name("checkpoint-2"), lambda raw: tensor(raw).update(shape=[10**9, 10**9]))
    live = at(0, frozen=True)
    with CheckpointManager(checkpoint.parent, read_only=True, **live.components) as mgr:
        with pytest.warns(match="shape|chunk"):
            restored = mgr.restore_latest()
        assert restored is not None
        assert (restored.step, len(restored.skipped)) == (1, 1)
    assert torch.equal(live.model[2].weight, at(2, frozen=True).model[2].weight)
