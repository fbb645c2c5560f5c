"""What is in the way of a commit, and what is not ours: nothing foreign is ever lost."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, RunLockedError, SaveError
from checkpointer.format import paths
from checkpointer.restore.request import restore_request
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.support.forge import flip
from tests.support.processes import Process

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}


def state(value: int) -> dict[str, Any]:
    return {"value": value, "tensor": torch.full((3,), float(value))}


def manager(root: Root, live: dict[str, Any], **config: Any) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=live)


@pytest.fixture(autouse=True)
def no_lock_warning() -> Iterator[None]:
    """Object stores say that nothing locks them; that is tested with the lock."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "s3://.*no lock that a dead owner frees")
        yield


def save(root: Root, step: int, value: int | None = None, *, back_to: int | None = None, **config: Any) -> None:
    """One save by a manager of its own, after going back to a step if one is given."""
    live = state(0)
    with manager(root, live, **config) as writer:
        if back_to is not None:
            writer.restore(back_to)
        live.update(state(step if value is None else value))
        writer.save(step, overwrite=True)


def restored_value(root: Root, step: int | None = None) -> int:
    live = state(0)
    with CheckpointManager(root.url, storage_options=root.options, read_only=True, state=live) as reader:
        if step is None:
            reader.restore_latest()
        else:
            reader.restore(step)
        assert reader.verify().ok
    assert torch.equal(live["tensor"], torch.full((3,), float(live["value"])))
    return int(live["value"])


def contents(folder: str | Path) -> dict[str, bytes | str | None]:
    """Every file with its bytes, link with its target and directory (``None``) below a folder."""
    found: dict[str, bytes | str | None] = {}
    for directory, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[relative] = os.readlink(path)
            else:
                found[relative] = None if os.path.isdir(path) else Path(path).read_bytes()
    return found


# --------------------------------------------------------------------------------- what is in the way, local


@pytest.mark.parametrize("kind", ["directory", "empty directory", "file", "link", "dangling link"])
def test_something_without_a_manifest_in_the_way_is_an_error_and_stays_untouched(local, tmp_path, kind):
    save(local, 1)
    place = Path(local.url, "checkpoint-7")
    if kind == "directory":
        (place / "deep").mkdir(parents=True)
        (place / "deep" / "mine.txt").write_text("precious")
    elif kind == "empty directory":
        place.mkdir()
    elif kind == "file":
        place.write_text("precious")
    else:
        target = tmp_path / "elsewhere"
        if kind == "link":
            target.mkdir()
            (target / "mine.txt").write_text("precious")
        place.symlink_to(target)
    before = {name: data for name, data in contents(local.url).items() if name.startswith("checkpoint-")}
    live = state(7)
    with manager(local, live) as writer:
        with pytest.warns(CheckpointerWarning, match="checkpoint-7"):  # when the run is opened, not hours later
            writer.restore_latest()
        reason = "it is a link to .*elsewhere" if "link" in kind else "it has no manifest.json"
        cure = "doctor .* --fix' removes it" if kind == "empty directory" else "move it away"
        with pytest.raises(SaveError, match=rf"checkpoint-7 exists but is not a checkpoint.*{reason}.*{cure}"):
            writer.save(7)
        assert {name: data for name, data in contents(local.url).items() if name.startswith("checkpoint-")} == before
        assert contents(local.url)[".checkpointer/tmp"] is None
        assert not any(Path(local.url, ".checkpointer", "tmp").iterdir())
        live.update(state(8))
        writer.save(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)  # as above
        if "link" in kind:
            place.unlink()  # it may have led to a checkpoint, so that nothing is whole while it is there
        assert restored_value(local) == 8


def test_a_damaged_checkpoint_in_the_way_is_moved_to_quarantine(local):
    save(local, 1)
    save(local, 7)
    manifest = Path(local.url, "checkpoint-7", "manifest.json")
    damaged = manifest.read_bytes().replace(b'"step": 7', b'"step": 8')
    manifest.write_bytes(damaged)
    with pytest.warns(CheckpointerWarning, match=r"moved .*checkpoint-7 to .*quarantine"):
        save(local, 7, 70)
    (kept,) = Path(local.url, ".checkpointer", "quarantine").iterdir()
    assert kept.name.startswith("checkpoint-7-")
    assert (kept / "manifest.json").read_bytes() == damaged
    assert (kept / "state.safetensors").is_file()
    assert restored_value(local) == 70
    save(local, 9)
    assert (kept / "manifest.json").read_bytes() == damaged


def test_a_checkpoint_that_was_found_damaged_is_moved_to_quarantine_when_its_name_is_needed(local):
    save(local, 1)
    save(local, 7)
    file = Path(local.url, "checkpoint-7", "state.safetensors")
    flip(file)
    damaged = file.read_bytes()
    live = state(0)
    with manager(local, live) as writer:
        with pytest.warns(CheckpointerWarning, match="skipping"):
            writer.restore_latest()
        with pytest.warns(CheckpointerWarning, match="quarantine"):
            writer.save(7)
    (kept,) = Path(local.url, ".checkpointer", "quarantine").iterdir()
    assert (kept / "state.safetensors").read_bytes() == damaged
    assert restored_value(local, 7) == 1


# ------------------------------------------------------------------------------- what is in the way, anywhere


def test_saving_over_an_abandoned_branch_replaces_it(root):
    save(root, 1)
    save(root, 2, 2)
    save(root, 3, 3)
    save(root, 2, 22, back_to=1)
    with CheckpointManager(root.url, storage_options=root.options, read_only=True) as reader:
        assert [info.step for info in reader.checkpoints()] == [1, 3, 2]
        assert reader.latest().parent == reader.checkpoints()[0].id
    assert restored_value(root) == 22
    assert restored_value(root, 3) == 3


def test_a_pinned_checkpoint_of_an_abandoned_branch_stays_and_both_can_be_restored(root):
    save(root, 1)
    save(root, 2, 2)
    with CheckpointManager(root.url, storage_options=root.options, read_only=True) as evaluator:
        evaluator.pin(2)
        (old,) = [info for info in evaluator.checkpoints() if info.step == 2]
    save(root, 2, 22, back_to=1)
    live = state(0)
    with CheckpointManager(root.url, storage_options=root.options, read_only=True, state=live) as reader:
        first, second = [info for info in reader.checkpoints() if info.step == 2]
        assert (first.id, first.pinned, first.path) == (old.id, True, old.path)
        assert not second.pinned
        assert second.path.endswith(f"checkpoint-2-{second.id[:8]}")
        assert reader.verify().ok
        reader.restore(2)
        assert live["value"] == 22
    save(root, 3)  # a new writer leaves both where they are
    with CheckpointManager(root.url, storage_options=root.options, read_only=True) as reader:
        assert {info.id for info in reader.checkpoints()} > {first.id, second.id}
        reader._restorer.one(first, restore_request(components=[], configured="stream", read_only=True))
        assert reader.verify().ok


def test_a_damaged_manifest_in_the_way_is_kept_for_inspection_on_object_stores_too(object_root):
    save(object_root, 1)
    save(object_root, 7)
    storage = open_storage(object_root.url, object_root.options)
    path = "checkpoint-7/manifest.json"
    damaged = storage.read(path, paths.MANIFEST_LIMIT)[:-7]
    storage.put(path, damaged)
    save(object_root, 7, 70)
    assert restored_value(object_root) == 70
    (kept,) = storage.list_directory(paths.QUARANTINE)
    assert storage.read(f"{paths.QUARANTINE}/{kept.name}/manifest.json", paths.MANIFEST_LIMIT) == damaged


def test_foreign_objects_under_the_name_of_a_checkpoint_survive_its_removal(object_root):
    save(object_root, 1)
    storage = open_storage(object_root.url, object_root.options)
    storage.put("checkpoint-1/mine.txt", b"precious")
    storage.put("checkpoint-2/mine.txt", b"precious")
    save(object_root, 2)
    with manager(object_root, state(0), keep={"last": 1}) as writer:
        with pytest.warns(CheckpointerWarning, match=r"1 files that this library did not write.*mine.txt"):
            writer.prune()
        assert [info.step for info in writer.checkpoints()] == [2]
        assert writer.verify().ok
    assert storage.read("checkpoint-1/mine.txt", 100) == b"precious"
    assert storage.read("checkpoint-2/mine.txt", 100) == b"precious"
    assert [entry.name for entry in storage.list_directory("checkpoint-1")] == ["mine.txt"]


def test_a_second_writer_on_an_object_store_loses_by_name_and_overwrites_nothing(object_root):
    first, second = state(1), state(2)
    with manager(object_root, first) as winner:
        winner.save(1)
        loser = manager(object_root, second)
        storage = loser._repository.storage
        attempt = loser._repository.begin(5, 0)
        winner.save(5)
        newest = winner.checkpoints()[-1]
        manifest = winner._repository.manifest(newest)
        with pytest.raises(RunLockedError):
            loser._repository.commit(attempt, manifest)
        assert winner.checkpoints()[-1].id == newest.id
        assert winner.verify().ok
        assert storage.exists(f"checkpoint-5/{newest.id}/index.json")


# ------------------------------------------------------------------------------------------------ the lock


ANOTHER_JOB = """
import sys
import torch
from checkpointer import CheckpointManager
live = {"value": 0, "tensor": torch.zeros(3)}
mgr = CheckpointManager(sys.argv[1], config={"write": {"mode": "sync", "durable": False}}, state=live)
sys.stdin.readline()
mgr.restore_latest()
print("restored", flush=True)
sys.stdin.readline()
mgr.save(2)
print("saved", [info.step for info in mgr.checkpoints()], mgr.verify().ok, flush=True)
sys.stdin.read()
"""


def go_on(job: Process, expected: str) -> None:
    """Let another job do its next step."""
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.stdout.readline() == f"{expected}\n"


@pytest.mark.parametrize("how", ["removed", "replaced", "the whole folder"])
def test_a_commit_is_refused_when_the_lock_was_taken_away(local, how):
    import shutil

    save(local, 1)
    live = state(2)
    first = manager(local, live)
    first.restore_latest()
    lock = Path(local.url, ".checkpointer", "lock")
    if how == "the whole folder":
        shutil.rmtree(lock.parent)
    else:
        lock.unlink()
    with Process([sys.executable, "-c", ANOTHER_JOB, local.url]) as second:
        if how != "removed":
            go_on(second, "restored")
        with pytest.raises(RunLockedError, match="no longer ours"):
            first.save(2)
        if how == "removed":
            go_on(second, "restored")
        go_on(second, "saved [1, 2] True")
    first.close()
    assert restored_value(local) == 1


# ---------------------------------------------------------------------------------------------- foreign things


def test_a_foreign_file_in_a_pruned_checkpoint_survives_in_quarantine(local):
    save(local, 1)
    place = Path(local.url, "checkpoint-1")
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("precious")
    (place / "link").symlink_to("/etc/hostname")
    save(local, 2)
    with manager(local, state(0), keep={"last": 1}) as writer:
        with pytest.warns(CheckpointerWarning, match="quarantine.*Nothing there is ever deleted"):
            writer.prune()
        assert [info.step for info in writer.checkpoints()] == [2]
    (kept,) = Path(local.url, ".checkpointer", "quarantine").iterdir()
    assert contents(kept) == {"mine": None, "mine/notes.txt": b"precious", "link": "/etc/hostname"}
    assert Path("/etc/hostname").exists()


def test_pruning_deletes_nothing_outside_even_if_a_directory_of_the_checkpoint_is_now_a_link(local, tmp_path):
    live = state(1)
    with manager(local, live) as writer:
        writer.save(1, files={"a.txt": b"attached"})
        writer.save(2)
    files = Path(local.url, "checkpoint-1", "files")
    outside = tmp_path / "outside"
    files.rename(outside)
    files.symlink_to(outside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        with manager(local, live, keep={"last": 1}) as writer:
            writer.restore_latest()
            writer.save(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        save(local, 4)
    assert (outside / "a.txt").read_bytes() == b"attached"


NAMES = ["mine.txt", "data", ".hidden", "checkpoint-x", "state.safetensors.bak", "0123456789abcdef0123456789abcde"]
FOLDERS = [
    "", "checkpoint-1", "checkpoint-1/files", "checkpoint-2", "checkpoint-3", "checkpoint-9", "other", ".checkpointer",
    ".checkpointer/tmp", ".checkpointer/trash", ".checkpointer/notes", ".checkpointer/quarantine", "checkpoint-3/deep",
    ".checkpointer/tmp/theirs", ".checkpointer/trash/theirs",
]  # fmt: skip
KINDS = ["file", "full directory", "link", "dangling link"]

FOREIGN = st.lists(
    st.tuples(st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(KINDS)),
    min_size=1,
    max_size=5,
    unique_by=lambda item: (item[0], item[1]),
)
ACTIONS = st.lists(
    st.sampled_from(["save", "prune", "overwrite", "branch", "die", "pin", "recover"]), min_size=1, max_size=5
)


def sprinkle(root: str, outside: Path, things: list[tuple[str, str, str]]) -> list[bytes | str]:
    """Put foreign things below the root; returns what must still be there in the end."""
    kept: list[bytes | str] = []
    for number, (folder, name, kind) in enumerate(things):
        place = Path(root, folder, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        content = f"precious {number}"
        if kind == "file":
            place.write_text(content)
            kept.append(content.encode())
        elif kind == "full directory":
            (place / "deep").mkdir(parents=True)
            (place / "deep" / "file").write_text(content)
            kept.append(content.encode())
        else:
            target = outside / f"target {number}"
            if kind == "link":
                target.mkdir()
                (target / "file").write_text(content)
            place.symlink_to(target)
            kept.append(str(target))
    return kept


def act(root: Root, action: str) -> None:
    if action == "die":  # a writer that dies after it has written everything but the manifest
        dead = manager(root, state(0))
        dead._lock()
        attempt = dead._repository.begin(50, 0)
        attempt.write("state.safetensors", [b"data"], 4)
        dead._repository.lock.release()
        return
    live = state(0)
    with manager(root, live, keep={"last": 2} if action in ("prune", "save") else {}) as writer:
        restored = writer.restore_latest()
        step = restored.step if restored else 0
        if action == "save":
            writer.save(step + 1)
        elif action == "prune":
            writer.prune()
        elif action == "overwrite":
            writer.save(step, overwrite=True)
        elif action == "pin":
            writer.pin(step)
        elif action == "branch":
            first = writer.checkpoints()[0]
            writer.restore(first.step)
            writer.save(first.step + 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(things=FOREIGN, actions=ACTIONS)
def test_nothing_that_the_library_did_not_make_is_ever_lost(tmp_path_factory, things, actions):
    folder = tmp_path_factory.mktemp("foreign")
    root = Root("local", str(folder / "run"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        live = state(0)
        with manager(root, live) as writer:
            for step in (1, 2, 3):
                live.update(state(step))
                writer.save(step, files={"a.txt": b"attached"})
        outside = folder / "outside"
        outside.mkdir()
        kept = sprinkle(root.url, outside, things)
        before = contents(outside)
        for action in (*actions, "recover"):
            with contextlib.suppress(SaveError):  # the name that it needs is taken by something foreign
                act(root, action)
    there = list(contents(root.url).values())
    assert [item for item in kept if item not in there] == []
    assert contents(outside) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        assert restored_value(root) >= 1
