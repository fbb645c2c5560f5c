"""Checkpoints written by earlier versions of the library stay readable: values, types, bits, notes, listing.

``tests/data/format-v1`` was made by ``scripts/make_golden.py``. What is expected is plain hexadecimal bits.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.format.index import ITEM_SIZES
from scripts import make_golden as golden

EXPECTED: dict[str, Any] = json.loads((golden.FOLDER / "expected.json").read_text("ascii"))
CASES = [
    pytest.param(root, info["name"], info["id"], info["sequence"], id=f"{root}-{info['name']}")
    for root in ("local", "exported")
    for info in EXPECTED[root]["checkpoints"]
]


@pytest.fixture(autouse=True)
def registered_codecs_and_own_generators() -> Iterator[None]:
    """The classes in the files are known, and what is drawn here does not reach other tests."""
    golden.register()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def blank_components(names: list[str]) -> dict[str, Any]:
    """Live objects that hold nothing of what is saved, so that only a restore can make them equal."""
    live = golden.components()
    with torch.no_grad():
        for tensor in live["model"].state_dict().values():
            tensor.zero_()
    live["model"].requires_grad_(requires_grad=True).train()
    live["generator"].manual_seed(99)
    live["numpy_generator"].random(3)
    for name, part in live.items():
        live[name] = {} if isinstance(part, dict) else part
    return {name: live.get(name, {}) for name in names}


def saved_components(root: str, id: str) -> list[str]:
    """Components of a checkpoint but the random generators, which are always there."""
    return [name for name in EXPECTED[root]["states"][id] if name != "rng"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def restore(root: Path, path: str, live: dict[str, Any]) -> None:
    """Restore just the checkpoint in directory ``path``, whatever else has its step."""
    with CheckpointManager(root, read_only=True, **live) as manager:
        info = next(info for info in manager.checkpoints() if Path(info.path).name == path)
        if info == next(found for found in reversed(manager.checkpoints()) if found.step == info.step):
            manager.restore(info.step)
            return
    other = root.parent / f"{root.name}-{path}"
    shutil.copytree(root / path, other / path)
    with CheckpointManager(other, read_only=True, **live) as manager:
        manager.restore(info.step)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the golden files that tests may write to."""
    return Path(shutil.copytree(golden.FOLDER, tmp_path / "v1"))


@pytest.mark.parametrize("root, name, id, sequence", CASES)
@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta:UserWarning")
def test_every_component_comes_back_bit_for_bit(run, root, name, id, sequence):
    names = saved_components(root, id)
    live = blank_components(names)
    restore(run / root, name, live)
    found = json.loads(json.dumps(golden.describe_all(live)))
    for component, expected in EXPECTED[root]["states"][id].items():
        assert found[component] == expected, component


@pytest.mark.parametrize("root", ["local", "exported"])
def test_listing_gives_every_field_with_notes_replayed(root):
    with CheckpointManager(golden.FOLDER / root, read_only=True) as manager:
        found = [golden.describe_info(info) for info in manager.checkpoints()]
    assert found == EXPECTED[root]["checkpoints"]


@pytest.mark.parametrize("root", ["local", "exported"])
def test_every_hash_is_right_and_no_file_is_unknown(root):
    with CheckpointManager(golden.FOLDER / root, read_only=True) as manager:
        report = manager.verify()
    assert report.ok, report
    assert not any(checkpoint.extra for checkpoint in report.checkpoints)
    assert len(report.checkpoints) == len(EXPECTED[root]["checkpoints"])


@pytest.mark.parametrize("root", ["local", "exported"])
def test_reading_changes_no_file(run, root):
    before = digests(run)
    info = EXPECTED[root]["checkpoints"][-1]
    live = blank_components(saved_components(root, info["id"]))
    with CheckpointManager(run / root, read_only=True, **live) as manager:
        restored = manager.restore_latest()
        manager.verify()
        manager.prune(dry_run=True)
    assert restored is not None
    assert restored.checkpoint.id == info["id"]
    assert digests(run) == before


def test_the_newest_is_the_one_with_the_highest_sequence_even_under_a_second_name():
    with CheckpointManager(golden.FOLDER / "local", read_only=True) as manager:
        latest = manager.latest()
    assert latest is not None
    assert Path(latest.path).name.startswith("checkpoint-2-")


@pytest.mark.filterwarnings("ignore:training cannot")  # they were written with one version of torch
def test_a_writer_continues_a_run_of_this_version(run):
    """It restores, saves on, and leaves the old checkpoints as they were."""
    before = digests(run / "local")
    live = blank_components(list(golden.SMALL))
    with CheckpointManager(run / "local", config={"write": {"mode": "sync"}}, **live) as manager:
        restored = manager.restore_latest()
        assert restored is not None
        handle = manager.save(3)
        assert handle is not None
        info = handle.result()
    assert info.parent == restored.checkpoint.id
    assert info.sequence == restored.checkpoint.sequence + 1
    after = digests(run / "local")
    assert {name: after.get(name) for name in before} == before


def test_attachments_lie_where_the_index_says():
    folder = golden.FOLDER / "local" / "checkpoint-2"
    index = json.loads((folder / "index.json").read_text("ascii"))
    attached = [file["path"] for file in index["files"] if file["path"].startswith("files/")]
    assert attached == ["files/config.json", "files/src/train.py"]
    assert [(folder / name).read_bytes() for name in attached] == [b'{"hidden": 4}\n', b"pass\n"]


def test_tied_weights_and_flags_of_the_golden_model_are_restored(run):
    live = blank_components(list(golden.SMALL))
    restore(run / "local", "checkpoint-0", live)
    model: golden.Net = live["model"]
    assert model.head.weight is model.embedding.weight
    assert isinstance(model.head.weight, nn.Parameter)
    assert not model.stem.weight.requires_grad
    assert not model.stem.training
    assert model.norm.training


def tags() -> set[str]:
    """Every tag that the codec's source names."""
    sources = (golden.ROOT / "checkpointer" / "state").rglob("*.py")
    return {tag for path in sources for tag in re.findall(r'"(\$[a-z]+)"', path.read_text("utf-8"))}


def test_together_the_golden_trees_hold_every_tag():
    """A new tag needs a new golden file: one is missing here as soon as the codec learns it."""
    text = (golden.FOLDER / "local" / "checkpoint-2" / "index.json").read_text("ascii")
    assert {tag for tag in tags() if f'{{"{tag}":' not in text} == set()
    assert len(tags()) > 30


def test_the_specification_has_an_example_of_every_tag():
    text = (golden.ROOT / "FORMAT.md").read_text("utf-8")
    assert {tag for tag in tags() if f'{{"{tag}": ' not in text} == set()


def test_the_specification_names_every_dtype():
    text = (golden.ROOT / "FORMAT.md").read_text("utf-8")
    listed = [name for name in ITEM_SIZES if not re.fullmatch(r"u?int[2-6]", name)]  # "`int1` to `int7`"
    assert {name for name in listed if f"`{name}`" not in text} == set()


def test_the_worked_example_of_the_specification_is_sealed():
    text = (golden.ROOT / "FORMAT.md").read_text("utf-8")
    example = text.partition("```json sealed\n")[2].partition("```")[0].encode()
    head, tail = example[:-53], example[-53:]
    assert tail == b',\n  "checksum": "' + xxhash.xxh3_128_hexdigest(head).encode() + b'"\n}\n'


def test_the_generator_refuses_to_overwrite(tmp_path, monkeypatch, capsys):
    (tmp_path / "kept").write_text("x")
    monkeypatch.setattr("sys.argv", ["make_golden.py", str(tmp_path)])
    assert golden.main() == 1
    assert "--force" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
