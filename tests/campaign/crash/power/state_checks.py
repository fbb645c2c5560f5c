"""What must hold after a power cut, and a look at one state that a cut may leave."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpointer import CheckpointInfo, CheckpointManager, Restored
from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.repository.verify import VerifyReport
from checkpointer.storage import LocalStorage
from tests.campaign.crash.power.record import MARK, Record, Tree
from tests.campaign.crash.power.scenarios import ROOT, state

AFTERWARDS = 99
"""What the next job saves: larger than every step and value of the scenarios."""


@dataclass(frozen=True)
class Expectation:
    """What a run has promised by some moment."""

    newest: frozenset[int | None]
    """Values of which one must be restored: the last that is durable, or one whose save has begun since."""
    present: frozenset[str]
    """Ids of the checkpoints that are durable and that nothing has begun to remove."""
    notes: frozenset[tuple[object, ...]] = frozenset()
    """(id, what, value) of the pins and annotations that were acknowledged."""
    kept: frozenset[bytes] = frozenset()
    """Files that the library did not write, and will never delete."""
    damaged: bool = False
    """Whether a checkpoint was damaged before the run began."""


def expectations(record: Record, *, damaged: bool = False) -> Iterator[Expectation]:
    """What holds before the first operation of a record, and after each."""
    found = _manifests(record, 0)
    values: list[int | None] = [_newest(found)]
    durable = {manifest.id for manifest in found}
    notes: dict[tuple[object, ...], object] = {}
    kept: set[bytes] = set()
    yield Expectation(frozenset(values), frozenset(durable), damaged=damaged)
    for number, operation in enumerate(record.operations, 1):
        kind, *what = operation.mark or ("",)
        if kind == "saving":
            values.append(int(str(what[0])))
        elif kind == "saved":
            saved = int(str(what[0]))
            values = values[values.index(saved) :]  # the next one may have begun
            durable |= {manifest.id for manifest in _manifests(record, number) if manifest.metrics["value"] == saved}
        elif kind == "noted":
            notes[what[0], what[1]] = what[2]
        elif kind == "kept":
            kept |= {bytes.fromhex(str(what[0]))}
        elif kind == "noting":
            notes.pop((what[0], what[1]), None)
        removing = ("checkpoint-", paths.MANIFEST)  # by a rename, or in place by the manifest
        if operation.kind != MARK and any(change.name.startswith(removing) for change in operation.changes):
            durable &= {manifest.id for manifest in _manifests(record, number)}
        known = frozenset((*key, value) for key, value in notes.items())
        yield Expectation(frozenset(values), frozenset(durable), known, frozenset(kept), damaged)


def _manifests(record: Record, end: int) -> list[Manifest]:
    """Of every checkpoint that a process would list then."""
    tree = record.tree(end)
    root = tree.find(record.root)
    children = tree.children()
    found = []
    for name, directory in children.get(root, {}).items() if root is not None else ():
        inode = children.get(directory, {}).get(paths.MANIFEST)
        if paths.parse_checkpoint_name(name) is not None and inode is not None:
            try:
                found.append(parse_manifest(tree.files[inode].data, name))
            except CorruptCheckpointError:
                continue
    return found


def _newest(found: list[Manifest]) -> int | None:
    newest = max(found, key=lambda manifest: manifest.sequence, default=None)
    return None if newest is None else int(newest.metrics["value"])


def materialise(tree: Tree, folder: str) -> str:
    """Make a file system in an empty ``folder``; returns the run root there."""
    made: dict[int, str] = {}
    for path, inode in tree.walk():
        place = os.path.join(folder, path)
        file = tree.files.get(inode)
        if file is None:
            os.mkdir(place)
        elif inode in made:
            os.link(made[inode], place)
        else:
            made[inode] = place
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(fd, file.data)
            os.fchmod(fd, file.mode)
            os.close(fd)
    return os.path.join(folder, ROOT)


def check(root: str, expected: Expectation) -> None:
    """Whoever comes after the power cut finds a whole run, and can go on with it.

    Raises:
        AssertionError: or whatever the package raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = _read(root, expected)
        _go_on(root, expected, value)
        _look_for_leftovers(root, expected)
        _look_for_what_is_not_ours(root, expected)


def _read(root: str, expected: Expectation) -> int | None:
    """A reader finds the newest checkpoint, and every other that was promised, whole; returns the value."""
    live = state(0)
    if not os.path.exists(root):
        assert None in expected.newest, f"there is no run root, and one of {set(expected.newest)} was promised"
        return None
    with CheckpointManager(root, read_only=True, **live) as reader:
        restored = _restore(reader, expected)
        value = None if restored is None else live["state"]["value"]
        assert value in expected.newest, f"{value} was restored, not one of {set(expected.newest)}"
        if restored is not None and value is not None:
            assert restored.skipped == () or expected.damaged, f"skipped {restored.skipped}"
            assert torch.equal(live["state"]["tensor"], state(value)["state"]["tensor"]), "other bits were restored"
        _check_report(reader.verify(), expected)
        _check_promises(reader.checkpoints(), expected)
    return value


def _go_on(root: str, expected: Expectation, value: int | None) -> None:
    """A writer restores the same, saves, and prunes."""
    live = state(0)
    config = {"write": {"mode": "sync"}, "require_resume": False, "keep": {"last": 2}}
    with CheckpointManager(root, config=config, **live) as writer:
        restored = _restore(writer, expected)
        assert (None if restored is None else live["state"]["value"]) == value, (
            "reader and writer restored different ones"
        )
        _check_promises(writer.checkpoints(), expected)
        live["state"].update(state(AFTERWARDS)["state"])
        writer.save(AFTERWARDS, metrics={"value": AFTERWARDS})
        writer.prune()
        left = writer.checkpoints()
        assert [info.metrics["value"] for info in left][-1] == AFTERWARDS, "the new save is not the newest"
        assert restored is None or restored.checkpoint.id in {info.id for info in left}, "the one before is gone"
        pins = {name for name, what, pinned in expected.notes if what == "pinned" and pinned}
        assert pins <= {info.id for info in left}, "a pinned checkpoint was pruned"
        _check_report(writer.verify(AFTERWARDS), expected)


def _restore(manager: CheckpointManager, expected: Expectation) -> Restored | None:
    try:
        return manager.restore_latest(components=["state"])
    except CorruptCheckpointError:
        if not expected.damaged or None not in expected.newest:
            raise
        return None


def _check_promises(found: list[CheckpointInfo], expected: Expectation) -> None:
    by_id = {info.id: info for info in found}
    lost = expected.present - by_id.keys()
    assert not lost, f"lost {lost}, there are {sorted(info.step for info in found)}"
    for name, what, value in expected.notes:
        if name in by_id:
            assert getattr(by_id[str(name)], str(what)) == value, f"{what} of {name} is not {value}"


def _check_report(report: VerifyReport, expected: Expectation) -> None:
    for checkpoint in report.checkpoints:
        if not expected.damaged:
            assert (checkpoint.ok, checkpoint.extra) == (True, ()), str(report)
        elif checkpoint.info is not None and checkpoint.info.id in expected.present:
            assert checkpoint.ok, str(report)


def _look_for_leftovers(root: str, expected: Expectation) -> None:
    """Nothing is left that the next power cut could add to for ever."""
    storage = LocalStorage(root)
    for folder in (paths.TMP, paths.TRASH):
        assert storage.list_directory(folder) == [], f"{folder} holds {storage.list_directory(folder)}"
    with CheckpointManager(root, read_only=True) as reader:
        infos = reader.checkpoints()
    private = {entry.name for entry in storage.list_directory(paths.PRIVATE)}
    notes = {entry.name for entry in storage.list_directory(paths.NOTES)}
    assert private <= {"lock", "tmp", "trash", "notes", "journal", "quarantine"}, private
    if not expected.damaged:
        names = {os.path.basename(info.path) for info in infos}
        there = {entry.name for entry in storage.list_directory("")}
        assert there == {*names, paths.PRIVATE}, f"{there} are more than {names}"
        assert storage.list_directory(paths.QUARANTINE) == []
        assert notes <= {info.id for info in infos}, f"notes of {notes}"


def _look_for_what_is_not_ours(root: str, expected: Expectation) -> None:
    """Quarantine never deletes, and what lies there is nothing else."""
    found = set()
    for folder, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                found.add(file.read())
    assert expected.kept <= found, f"{[data[:40] for data in expected.kept - found]} is gone"
    quarantine = os.path.join(root, *paths.QUARANTINE.split("/"))
    for folder, _, names in os.walk(quarantine):
        if "checkpoint-" not in folder:  # then it was a whole one, and files of others lay in it
            assert not [name for name in names if name.endswith(".safetensors")], f"{folder} holds {names}"
