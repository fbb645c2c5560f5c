"""The holder of the writer's lock reads a manifest once, and still lists what is on disk."""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager
from checkpointer.repository.repository import Listing, Repository
from checkpointer.storage import Storage, open_storage, wrapping
from tests.conftest import Root

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
SETTLED = 0.1
"""Seconds after which a file's times tell whether it has changed since."""


def manager(root: Root, **config: Any) -> CheckpointManager:
    state = {"tensor": torch.arange(3.0)}
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=state)


def counting(asked: list[str]) -> Any:
    """Wraps a storage; ``asked`` is each operation by name, and ``read_many`` once for each file."""

    def counted(storage: Storage) -> Storage:
        made: Any = copy.copy(storage)

        def operation(name: str, real: Any) -> Any:
            def called(*arguments: Any, **keywords: Any) -> Any:
                asked.extend([name] * (len(arguments[0]) if name == "read_many" else 1))
                return real(*arguments, **keywords)

            return called

        for name in ("list_directory", "exists", "read", "read_many", "open", "stamps"):
            setattr(made, name, operation(name, getattr(made, name)))
        return made  # type: ignore[no-any-return]

    return wrapping(counted)


def asked_by_one_save(root: Root, before: int, **config: Any) -> list[str]:
    asked: list[str] = []
    with counting(asked), manager(root, **config) as mgr:
        for step in range(before):
            mgr.save(step)
        time.sleep(SETTLED)
        mgr.save(before)
        mgr.prune()  # after the one of this save, which is not waited for
        time.sleep(SETTLED)
        asked.clear()
        mgr.save(before + 1)
    return sorted(asked)  # closed, so that all is pruned


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("prunes", [False, True])
def test_what_a_save_reads_does_not_depend_on_the_number_of_checkpoints(
    request: pytest.FixtureRequest, kind: str, prunes: bool
) -> None:
    root: Root = request.getfixturevalue(kind)
    few, many = Root(root.kind, f"{root.url}/few", root.options), Root(root.kind, f"{root.url}/many", root.options)
    keep = {"last": 5} if prunes else {"last": 100}
    expected = asked_by_one_save(few, 5, keep=keep)
    assert asked_by_one_save(many, 40, keep={"last": 40} if prunes else keep) == expected


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_writer_that_restores_reads_each_manifest_once(request: pytest.FixtureRequest, kind: str) -> None:
    root: Root = request.getfixturevalue(kind)
    with manager(root, keep={"last": 100}) as mgr:
        for step in range(20):
            mgr.save(step)
    time.sleep(SETTLED)
    asked: list[str] = []
    with counting(asked), manager(root) as mgr:
        assert mgr.restore_latest() is not None
        assert asked.count("read_many") == 20


def shown(listing: Listing) -> list[Any]:
    unreadable = [(item.name, item.step, str(item.error)) for item in listing.unreadable]
    return [listing.checkpoints, unreadable, listing.strangers, listing.others, listing.notes_known]


ACTS = ("save", "save again", "pin", "annotate", "remove", "damage", "heal", "swap", "unlink", "prune", "settle")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTS), st.integers(0, 7)), max_size=16))
def test_the_holder_of_the_lock_lists_what_a_stranger_lists_whatever_happens_on_disk(acts: Any) -> None:
    with tempfile.TemporaryDirectory() as place, manager(Root("local", place), keep={"last": 4}) as mgr:
        for step in range(3):
            mgr.save(step)
        saved = 3
        for act, which in acts:
            names = sorted(path.name for path in Path(place).glob("checkpoint-*"))
            infos = mgr.checkpoints()
            if act == "save":
                mgr.save(saved)
                saved += 1
            elif act == "settle":
                time.sleep(0.06)
            elif infos and act == "save again":
                mgr.save(saved - 1, overwrite=True, force=True)
            elif infos and act in ("pin", "annotate"):
                info = infos[which % len(infos)]
                mgr.pin(info) if act == "pin" else mgr.annotate(info, metrics={"score": float(which)})
            elif act == "prune":
                mgr.prune()
            elif names:
                change(Path(place), act, names, which)
            mgr.wait()
            stranger = Repository(open_storage(place)).list_checkpoints()
            assert shown(mgr._repository.list_checkpoints()) == shown(stranger)


def change(root: Path, act: str, names: list[str], which: int) -> None:
    """What a user, or a disk, does behind the writer's back."""
    manifest = root / names[which % len(names)] / "manifest.json"
    if act == "remove":
        shutil.rmtree(manifest.parent)
    elif act == "unlink":
        manifest.unlink(missing_ok=True)
    elif act in ("damage", "heal") and manifest.exists():  # one undoes the other
        data = bytearray(manifest.read_bytes())
        data[20] ^= 1
        manifest.chmod(0o644)
        manifest.write_bytes(data)
    elif act == "swap" and len(names) > 1:
        other = root / names[(which + 1) % len(names)]
        manifest.parent.rename(root / "between")
        other.rename(manifest.parent)
        (root / "between").rename(other)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_what_was_known_is_forgotten_with_the_lock(request: pytest.FixtureRequest, kind: str) -> None:
    root: Root = request.getfixturevalue(kind)
    with manager(root) as mgr:
        mgr.save(1)
    repository = Repository(open_storage(root.url, root.options))
    repository.lock.acquire()
    first = repository.list_checkpoints().checkpoints
    repository.lock.release()
    with manager(root) as mgr:
        mgr.restore_latest()
        mgr.save(1, overwrite=True, force=True)
    repository.lock.acquire()
    second = repository.list_checkpoints().checkpoints
    repository.lock.release()
    assert [info.step for info in second] == [1]
    assert second[0].id != first[0].id
