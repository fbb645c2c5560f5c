"""Whatever operation of the storage fails, once or for good, before or after it took effect: nothing is lost."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from checkpointer import CheckpointManager, layout
from checkpointer.errors import CheckpointerError
from checkpointer.manifest import parse_manifest
from checkpointer.storage import open_storage
from tests import processes
from tests.conftest import Root
from tests.faults import Fault, under
from tests.successor import succeed

# Not durable: what is made durable when is tested elsewhere, and here it would take minutes.
SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}


def state(value: int) -> dict[str, Any]:
    """What is saved: a number, and a tensor full of it."""
    return {"value": value, "tensor": torch.full((3,), float(value))}


def manager(root: Root, live: dict[str, Any], **config: Any) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=live)


def prepare(root: Root) -> None:
    """Steps 1 and 2, with the values 1 and 2."""
    live = state(0)
    with manager(root, live) as first:
        for step in (1, 2):
            live.update(state(step))
            first.save(step)


def save_and_prune(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live, keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        live.update(state(3))
        second.save(3)


def overwrite(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.restore_latest(components=["state"])
        live.update(state(22))
        second.save(2, overwrite=True)


def branch(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.restore(1, components=["state"])
        live.update(state(22))
        second.save(2)


def beside_a_pinned_one(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.pin(2)
        second.restore(1, components=["state"])
        live.update(state(22))
        second.save(2)


def share(root: Root, live: dict[str, Any]) -> None:
    """Step 3 is step 2 again, on the same bytes; then 2 goes."""
    with manager(root, live, keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        succeed(second._repository, second._repository.find(2), 3)
        second.prune()


def prune(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live, keep={"last": 1}) as second:
        second.prune()


def annotate(root: Root, live: dict[str, Any]) -> None:
    with manager(root, live) as second:
        second.pin(1)
        second.annotate(2, metrics={"score": 1.0})
        second.unpin(1)


SCENARIOS: dict[str, tuple[Callable[[Root, dict[str, Any]], None], set[int]]] = {
    "a save that prunes": (save_and_prune, {2, 3}),
    "an overwriting save": (overwrite, {2, 22}),
    "a save over an abandoned branch": (branch, {2, 22}),
    "a save beside a pinned checkpoint": (beside_a_pinned_one, {2, 22}),
    "pruning": (prune, {2}),
    "a save that shares its files": (share, {2}),
    "pins and annotations": (annotate, {2}),
}


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
    accounted = {layout.LOCK, layout.OWNER}
    for entry in storage.list_directory(""):
        if layout.parse_checkpoint_name(entry.name) is not None:
            path = f"{entry.name}/{layout.MANIFEST}"
            manifest = parse_manifest(storage.read(path, layout.MANIFEST_LIMIT), path)
            accounted |= {path, *(f"{entry.name}/{manifest.place(name)}" for name in manifest.files)}
    return accounted


def check(root: Root, allowed: set[int], what: str) -> None:
    """The newest checkpoint is a whole old or new one, a new writer saves, and no leftover stays."""
    live = state(0)
    with CheckpointManager(root.url, storage_options=root.options, read_only=True, state=live) as reader:
        restored = reader.restore_latest(components=["state"])
        assert restored is not None, what
        assert restored.skipped == (), what
        assert live["value"] in allowed, what
        assert torch.equal(live["tensor"], torch.full((3,), float(live["value"]))), what
        assert reader.verify().ok, f"{what}\n{reader.verify()}"
    with manager(root, live) as writer:
        assert writer.restore_latest(components=["state"]) is not None
        live.update(state(9))
        writer.save(9)
        assert writer.verify().ok, what
        assert [info.step for info in writer.checkpoints()][-1] == 9, what
        notes = {path for path in files_of(root) if path.startswith(f"{layout.NOTES}/")}
        ids = {info.id for info in writer.checkpoints()}
        assert {path.split("/")[2] for path in notes} <= ids, what
        notes |= {path for path in files_of(root) if path.startswith(f"{layout.TMP}/probe-")}  # removed when old
        assert files_of(root) - notes - expected_files(root) == set(), what


def snapshot(root: Root) -> Callable[[], None]:
    """Restores the root to what it is now."""
    if root.kind == "local":
        shutil.copytree(root.url, f"{root.url}.base")

        def again() -> None:
            shutil.rmtree(root.url)
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


@pytest.mark.parametrize(
    "forever, after",
    [(False, False), (True, False), (False, True)],
    ids=["once", "for good", "answer lost"],
)
@pytest.mark.timeout(1200)  # with --thorough
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_no_failing_operation_loses_a_checkpoint_or_leaves_anything_behind(
    request, stride, kind, scenario, forever, after
):
    root: Root = request.getfixturevalue(kind)
    act, allowed = SCENARIOS[scenario]
    prepare(root)
    again = snapshot(root)
    number = len(scenario) % stride
    while True:
        number += 1 if number == 0 else stride
        fault = Fault(number, forever=forever, after=after)
        with silenced(), under(fault), contextlib.suppress(CheckpointerError, OSError):
            act(root, state(0))
        if not fault.reached:
            break
        what = f"fault {number}: {fault.operations[number - 1]}"
        with silenced():
            check(root, allowed, what)
        again()
    assert number > 10


@pytest.mark.parametrize("dies", [False, True], ids=["lives on", "dies"])
@pytest.mark.parametrize("scenario", ["pruning", "a save that prunes", "an overwriting save"])
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_pin_that_was_accepted_holds_whenever_it_comes(request, stride, kind, scenario, dies):
    root: Root = request.getfixturevalue(kind)
    act, _ = SCENARIOS[scenario]
    prepare(root)
    again = snapshot(root)
    step = 2 if scenario == "an overwriting save" else 1
    accepted = 0
    number = 0
    while True:
        number += stride
        fault = Fault(number, forever=dies)
        with CheckpointManager(root.url, storage_options=root.options, read_only=True) as evaluator:
            (info,) = [info for info in evaluator.checkpoints() if info.step == step]
            pinned: list[bool] = []

            def pin(evaluator=evaluator, info=info, pinned=pinned) -> None:
                with contextlib.suppress(CheckpointerError):
                    evaluator.pin(info)
                    pinned.append(True)

            fault.hook = pin
            with silenced(), under(fault), contextlib.suppress(CheckpointerError, OSError):
                act(root, state(0))
        if not fault.reached:
            break
        accepted += len(pinned)
        live = state(0)
        with silenced(), manager(root, live, keep={"last": 1}) as writer:
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
    ["a save that prunes", "an overwriting save", "a save beside a pinned checkpoint", "a save that shares its files"],
)
def test_a_kill_before_any_request_to_an_object_store_loses_no_checkpoint(s3, stride, scenario):
    options = json.dumps(s3.options)
    step = 1 if stride == 1 else 8 * stride + 1  # each child takes a second to make its first request
    program = [sys.executable, "-W", "ignore", "-m", "tests.crash.kill_operations"]
    done = processes.run([*program, scenario, s3.url, options, "7", str(step)], timeout=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) * step > 20
