"""A checkpoint that two ranks have written with FSDP2 stays readable: by one process, by two ranks, and by hand.

``tests/data/format-v1/ranks`` was made by ``scripts/golden_ranks.py``. What is expected is plain hexadecimal bits.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from scripts import golden_ranks as ranks
from scripts import make_golden as golden
from tests.integration.format.test_golden import registered_codecs_and_own_generators  # noqa: F401  a fixture
from tests.integration.format.test_independent_reader import read_tensors
from tests.support import forge
from tests.support.ranks import run

EXPECTED: dict[str, Any] = json.loads((ranks.FOLDER / "expected.json").read_text("ascii"))
CHECKPOINT = ranks.FOLDER / f"checkpoint-{ranks.SAVED}"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy that tests may write to."""
    return Path(shutil.copytree(ranks.FOLDER, tmp_path / "ranks"))


def restored(root: str, *, sharded: bool) -> list[Any]:
    """What a restore makes of live objects that hold nothing of what is saved."""
    live = ranks.components(sharded=sharded)
    with torch.no_grad():
        for tensor in live["model"].state_dict().values():
            tensor.zero_()
    live["model"].requires_grad_(requires_grad=True)
    with CheckpointManager(root, read_only=True, **live) as manager:
        info = manager.restore_latest().checkpoint
    return [ranks.describe(live), json.loads(json.dumps(golden.describe_info(info)))]


def test_one_process_restores_every_bit_of_what_two_ranks_have_written(copy):
    state, info = restored(str(copy), sharded=False)
    for component, expected in EXPECTED["ranks"][0].items():
        assert state[component] == expected, component
    assert info == EXPECTED["checkpoint"]


def test_two_ranks_restore_what_each_of_them_had(copy):
    for rank, (state, _) in enumerate(run(ranks.WORLD, sharded, str(copy))):
        for component, expected in EXPECTED["ranks"][rank].items():
            assert state[component] == expected, (rank, component)
    assert EXPECTED["ranks"][0]["rng"] != EXPECTED["ranks"][1]["rng"]
    assert EXPECTED["ranks"][0]["progress"] != EXPECTED["ranks"][1]["progress"]


def sharded(root: str) -> list[Any]:
    return restored(root, sharded=True)


def test_every_hash_is_right_and_no_file_is_unknown():
    with CheckpointManager(ranks.FOLDER, read_only=True) as manager:
        (report,) = manager.verify().checkpoints
    assert report.ok, report
    assert not report.extra


def test_its_slices_are_put_together_by_hand_and_by_consolidate(copy, tmp_path):
    from safetensors.torch import load_file

    from checkpointer.migration.consolidating import consolidate

    _, _, items = EXPECTED["ranks"][0]["model"][0]
    expected = {bytes.fromhex(key[1]).decode(): value["bits"] for key, value in items}
    by_hand = read_tensors(CHECKPOINT, "model")
    consolidate(copy, ranks.SAVED, tmp_path / "model.safetensors")
    for found in (by_hand, load_file(tmp_path / "model.safetensors")):
        assert {key: tensor.numpy().tobytes().hex() for key, tensor in found.items()} == expected


def members(raw: dict[str, Any]) -> set[str]:
    """The members that the format gives a name, and not the user."""
    found = set(raw) | set(raw.get("environment", {})) | set(raw.get("statistics", {}))
    for component in raw["components"] if isinstance(raw.get("components"), list) else []:
        found |= set(component) | set(component["meta"])
    for file in raw["files"] if isinstance(raw.get("files"), list) else []:
        found |= set(file)
    return found


def test_the_specification_names_every_member_and_every_file_of_it():
    text = (golden.ROOT / "FORMAT.md").read_text("utf-8")
    tables = {name: forge.read_table((CHECKPOINT / name).read_bytes()) for name in TABLES}
    described = {
        f"{name}: {text}": {"components": value, "files": []} if text == "components" else {"files": value}
        for name, (_, texts) in tables.items()
        for text, value in ((text, json.loads(texts[text])) for text in ("components", "files") if text in texts)
    }
    for name, (columns, texts) in tables.items():
        described[name] = {column.removeprefix("own_"): 0 for column in (*columns, *texts)}
    for name in ("manifest.json", "index.json"):
        described[name] = json.loads((CHECKPOINT / name).read_text("ascii"))
    for name, raw in described.items():
        named = {member for member in members(raw) if not member.startswith("param_")}
        assert {member for member in named if not re.search(rf"[`\"]{member}[`\"]", text)} == set(), name
    files = {path.name.replace("optimizer", "model") for path in CHECKPOINT.iterdir() if path.is_file()}
    assert {name for name in files if without_numbers(name) not in without_numbers(text)} == set()


TABLES = ("index.safetensors", "index-00001.safetensors")


def without_numbers(text: str) -> str:
    return re.sub(r"[0-9]+", "0", text)
