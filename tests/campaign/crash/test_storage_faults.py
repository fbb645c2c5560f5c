"""Whatever operation of the storage fails, once or for good, before or after it took effect: nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, get_args

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError
from checkpointer.format import paths
from checkpointer.format.manifest import parse_manifest
from checkpointer.repository.contents import read_contents
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from checkpointer.testing import Fault, Kind, faulty
from tests.campaign.crash.scenarios import SCENARIOS, Make, check_newest, maker, state
from tests.conftest import Root
from tests.support import processes


def maker_of(root: Root) -> Make:
    """Not durable: what is made durable when is tested elsewhere, and here it would take minutes."""
    return maker(root.url, root.options, durable=False)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def files_of(root: Root) -> set[str]:
    """Every file below the root, by a client of its own."""
    storage = open_storage(root.url, root.options)

    def below(path: str) -> Iterator[str]:
        for entry in storage.list_directory(path):
            inner = f"{path}/{entry.name}" if path else entry.name
            if entry.is_dir:
                yield from below(inner)
            else:
                yield inner

    return set(below(""))


def expected_files(root: Root) -> set[str]:
    """What the manifests account for, and what belongs to the lock."""
    storage = open_storage(root.url, root.options)
    accounted = {paths.LOCK, paths.OWNER}
    for entry in storage.list_directory(""):
        if paths.parse_checkpoint_name(entry.name) is not None:
            path = f"{entry.name}/{paths.MANIFEST}"
            manifest = parse_manifest(storage.read(path, paths.MANIFEST_LIMIT), path)
            files = read_contents(storage, entry.name, manifest).files
            accounted |= {path, *(f"{entry.name}/{manifest.place(name)}" for name in files)}
    return accounted


def check(root: Root, allowed: Collection[int | None], what: str, *, quarantine: bool = False) -> None:
    """The newest checkpoint is a whole old or new one, a new writer saves, and no leftover stays.

    ``quarantine``: what could not be read may have been put aside as damaged; that is never deleted.
    """
    infos = check_newest(maker_of(root), allowed, what)
    notes = {path for path in files_of(root) if path.startswith(f"{paths.NOTES}/")}
    assert {path.split("/")[2] for path in notes} <= {info.id for info in infos}, what
    notes |= {path for path in files_of(root) if path.startswith(f"{paths.TMP}/probe-")}  # removed when old
    history = Repository(open_storage(root.url, root.options)).journal.read()
    assert history.damaged == 0, what
    assert history.events[-1].id == infos[-1].id or history.events[-1].kind == "removal", what
    told = {path for path in files_of(root) if path.startswith(f"{paths.JOURNAL}/")}
    left = files_of(root) - notes - told - expected_files(root)
    put_aside = any(path.startswith(f"{paths.QUARANTINE}/") for path in left)
    assert left == set() or (quarantine and put_aside), what


def snapshot(root: Root) -> Callable[[], None]:
    """Restores the root to what it is now."""
    if root.kind == "local":
        there = os.path.exists(root.url)
        if there:
            shutil.copytree(root.url, f"{root.url}.base")

        def again() -> None:
            shutil.rmtree(root.url, ignore_errors=True)
            if there:
                shutil.copytree(f"{root.url}.base", root.url)

        return again
    prefix = f"/{root.url.removeprefix('memory://')}/"
    saved = {path: file.getvalue() for path, file in MemoryFileSystem.store.items() if path.startswith(prefix)}

    def refill() -> None:
        fs = MemoryFileSystem()
        for path in [path for path in MemoryFileSystem.store if path.startswith(prefix)]:
            del MemoryFileSystem.store[path]
        for path, data in saved.items():
            fs.pipe_file(path, data)

    return refill


FAULTS: dict[str, dict[str, Any]] = {
    f"{kind} {persistence}": {"kind": kind, **how}
    for kind in get_args(Kind)
    for persistence, how in {"once": {}, "for good": {"forever": True}, "answer lost": {"after": True}}.items()
    if persistence != "answer lost" or kind == "EIO"
    if kind not in ("slow", "hang")
}
"""Every kind of fault that is an error or a lie; ``test_faults.py`` lets saves take their time, and hang."""


def every_how_many(stride: int, fault: str) -> int:
    """Of how many operations one fails: all kinds in fewer places where EIO has been."""
    return stride if stride == 1 or fault.startswith("EIO") else 20 * stride


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("fault_name", FAULTS)
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_no_failing_operation_loses_a_checkpoint_or_leaves_anything_behind(request, stride, kind, scenario, fault_name):
    root: Root = request.getfixturevalue(kind)
    prepare, act, allowed = SCENARIOS[scenario]
    step = every_how_many(stride, fault_name)
    with silenced():
        prepare(maker_of(root))
    again = snapshot(root)
    at = 1 + zlib.crc32(f"{scenario}, {fault_name}".encode()) % min(step, 20)
    while True:
        fault = Fault(at=at, **FAULTS[fault_name])
        with silenced(), faulty(fault), contextlib.suppress(CheckpointerError, OSError):
            act(maker_of(root))
        if not fault.reached:
            break
        with silenced():
            operation = fault.operations[at - 1]
            unread = fault.kind == "vanished" or operation.startswith(("open", "read"))
            check(root, allowed, f"{fault_name}, at {at}: {operation}", quarantine=unread)
        again()
        at += step
    assert fault.operations or fault.kind in ("short write", "close", "fsync")  # not every scenario writes files


@pytest.mark.parametrize("dies", [False, True], ids=["lives on", "dies"])
@pytest.mark.parametrize("scenario", ["pruning", "save that prunes", "overwriting save"])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_pin_that_was_accepted_holds_whenever_it_comes(request, stride, kind, scenario, dies):
    root: Root = request.getfixturevalue(kind)
    prepare, act, _ = SCENARIOS[scenario]
    prepare(maker_of(root))
    again = snapshot(root)
    step = 2 if scenario == "overwriting save" else 1
    accepted = 0
    number = 0
    while True:
        number += stride
        with CheckpointManager(root.url, storage_options=root.options, read_only=True) as evaluator:
            (info,) = [info for info in evaluator.checkpoints() if info.step == step]
            pinned: list[bool] = []

            def pin(evaluator=evaluator, info=info, pinned=pinned) -> None:
                with contextlib.suppress(CheckpointerError):
                    evaluator.pin(info)
                    pinned.append(True)

            fault = Fault(at=number, forever=dies, instead=pin)
            with silenced(), faulty(fault), contextlib.suppress(CheckpointerError, OSError):
                act(maker_of(root))
        if not fault.reached:
            break
        accepted += len(pinned)
        live = state(0)
        with silenced(), maker_of(root)(live, keep={"last": 1}) as writer:
            writer.restore_latest(components=["state"])
            writer.prune()
            kept = {info.id: info for info in writer.checkpoints()}
            assert writer.verify().ok
            if pinned:
                what = f"pinned at {number}: {fault.operations[number - 1]}"
                assert info.id in kept, what
                assert kept[info.id].pinned, what
        again()
    assert accepted > 0


@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize(
    "scenario",
    ["save that prunes", "overwriting save", "save beside a pinned checkpoint", "save that shares its files"],
)
def test_a_kill_before_any_request_to_an_object_store_loses_no_checkpoint(s3, stride, scenario):
    options = json.dumps(s3.options)
    step = 1 if stride == 1 else 8 * stride + 1  # each child takes a second to make its first request
    program = [sys.executable, "-W", "ignore", "-m", "tests.campaign.crash.kill_operations"]
    done = processes.run([*program, scenario, s3.url, options, "7", str(step)], timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) * step > 20
