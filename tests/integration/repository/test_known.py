"""What was read of manifests is not read again, by this process or a later one, and each listing is as on disk."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from checkpointer import CheckpointManager
from checkpointer.cli.commands import cli
from checkpointer.errors import CheckpointerError
from checkpointer.repository import known_file
from checkpointer.repository.commit import read_manifest
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.known_file import KnownFile, decoded
from checkpointer.repository.repository import Listing, Repository
from checkpointer.repository.sequence import WHOLE_LOOK_EVERY
from checkpointer.storage import Storage, mounts, open_storage, wrapping
from checkpointer.storage.local import CLOCK_TICK, LocalStorage
from checkpointer.testing import Fault, faulty
from tests.conftest import Root
from tests.support.command import runner

SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
SETTLED = 1.2 * CLOCK_TICK / 1e9
"""Seconds after which a file has a stamp."""

needs_stamps = pytest.mark.skipif(
    not mounts.are_local(tempfile.gettempdir()), reason="the file system of the tests gives no stamps"
)


def manager(root: Root, **options: Any) -> CheckpointManager:
    config = {**SYNC, **options.pop("config", {})}
    return CheckpointManager(
        root.url, storage_options=root.options, config=config, state={"tensor": torch.arange(3.0)}, **options
    )


def listing(root: Root, *, anew: bool = False) -> Listing:
    """As a process lists that was started just now; ``anew``: and that trusts nothing."""
    return Repository(open_storage(root.url, root.options)).list_checkpoints(anew=anew)


def shown(found: Listing) -> Any:
    """All that a listing says."""
    unreadable = [(item.name, item.step, type(item.error), str(item.error)) for item in found.unreadable]
    return list(found.checkpoints), unreadable, sorted(map(str, found.strangers)), found.others, found.notes_known


def asking(asked: list[str]) -> Any:
    """Inside, ``asked`` gets each file and directory that a storage is asked to read or to list."""

    def watched(storage: Storage) -> Storage:
        made: Any = copy.copy(storage)

        def operation(name: str, real: Any) -> Any:
            def called(target: Any, *arguments: Any, **keywords: Any) -> Any:
                asked.extend(f"{name} {item}" for item in ([target] if isinstance(target, str) else target))
                return real(target, *arguments, **keywords)

            return called

        for name in ("list_directory", "read", "read_many", "open"):
            setattr(made, name, operation(name, getattr(made, name)))
        return made  # type: ignore[no-any-return]

    return wrapping(watched)


def manifests_read(asked: list[str]) -> list[str]:
    """Of which directories."""
    return [
        item.split()[1].removesuffix("/manifest.json")
        for item in asked
        if item.startswith("read") and item.endswith("/manifest.json") and ".checkpointer" not in item
    ]


def filled(root: Root, count: int) -> None:
    with manager(root) as mgr:
        for step in range(count):
            mgr.save(step)
        time.sleep(SETTLED)
        mgr.checkpoints()


# ------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_what_a_save_reads_does_not_depend_on_the_number_of_checkpoints(
    request: pytest.FixtureRequest, kind: str
) -> None:
    root: Root = request.getfixturevalue(kind)
    few, many = (Root(kind, f"{root.url}/{name}", root.options) for name in ("few", "many"))
    asked: dict[str, list[str]] = {}
    for place, count in ((few, 2), (many, 40)):
        filled(place, count)
        asked[place.url] = []
        with asking(asked[place.url]), manager(place) as mgr:
            for step in range(count, count + 3):
                asked[place.url].clear()
                mgr.save(step)
    assert len(manifests_read(asked[few.url])) == len(manifests_read(asked[many.url])) < 5
    assert len(asked[few.url]) == len(asked[many.url])


@needs_stamps
def test_a_restart_reads_the_manifest_of_the_checkpoint_that_it_restores_and_no_other(local: Root) -> None:
    filled(local, 40)
    asked: list[str] = []
    with asking(asked), manager(local) as mgr:
        assert mgr.restore_latest().step == 39
        assert set(manifests_read(asked)) == {"checkpoint-39"}
        asked.clear()
        mgr.save(40)
        assert manifests_read(asked).count("checkpoint-7") == 0


@needs_stamps
def test_pruning_and_lists_read_what_is_new_since_they_looked_last(local: Root) -> None:
    filled(local, 40)
    asked: list[str] = []
    with asking(asked), manager(local, config={"keep": {"last": 100}}) as mgr:
        mgr.restore_latest()
        mgr.save(40).result()
        asked.clear()
        mgr.prune()
        mgr.latest()
        assert set(manifests_read(asked)) <= {"checkpoint-40"}


@needs_stamps
def test_a_reader_uses_what_is_known_and_writes_nothing(local: Root) -> None:
    filled(local, 20)
    known = Path(local.url, ".checkpointer", "known")
    before = known.stat()
    asked: list[str] = []
    with asking(asked), manager(local, read_only=True) as mgr:
        assert [info.step for info in mgr.checkpoints()] == list(range(20))
        assert manifests_read(asked) == []
    with asking(asked):
        assert len(json.loads(runner().invoke(cli, ["ls", local.url, "--json"]).stdout)["checkpoints"]) == 20
    assert manifests_read(asked) == ["checkpoint-19"]  # which says the rules of the run
    assert known.stat() == before
    known.unlink()
    with manager(local, read_only=True) as mgr:
        mgr.checkpoints()
    assert not known.exists()


def test_nothing_is_known_of_a_bucket_or_a_mount_of_another_host(
    memory: Root, local: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "are_local", lambda _: False)
    for root in (memory, local):
        filled(root, 20)
        asked: list[str] = []
        with asking(asked), manager(root, read_only=True) as mgr:
            mgr.checkpoints()
            mgr.checkpoints()
        assert len([item for item in asked if item.startswith("read_many") and "manifest" in item]) == 40
    assert not Path(local.url, ".checkpointer", "known").exists()


# --------------------------------------------------------------------------------------- what is listed is on disk


class Run(RuleBasedStateMachine):
    """A run that a manager writes, that disks and users change behind its back, and that everybody lists alike."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.root = Root("local", f"{self._folder.name}/run")
        self.path = Path(self.root.url)
        self.fault = Fault()
        self.manager: CheckpointManager | None = None
        self.step = 0
        self.old_file = b""
        self.edited = False
        """Whether a manifest was given another sequence in its place, which the writer may find some commits later."""

    def teardown(self) -> None:
        self._close()
        self._folder.cleanup()

    def _close(self) -> None:
        if self.manager is not None:
            with contextlib.suppress(CheckpointerError):
                self.manager.close()
        self.manager = None

    def _names(self) -> list[Path]:
        return sorted(self.path.glob("checkpoint-*"))

    def _one(self, which: int) -> Path:
        return self._names()[which % len(self._names())]

    @initialize()
    def begin(self) -> None:
        self.start(1)
        for _ in range(3):
            self.save()

    @rule(at=st.integers(1, 12))
    def start(self, at: int) -> None:
        """A new process, whose disk can fail."""
        self._close()
        operations = ["rename", "remove", "read", "read_many", "stamps", "sync", "exchange", "list_directory"]
        self.fault = Fault("EIO", at=at, on=operations, forever=True)
        self.fault.end()
        with faulty(self.fault):
            self.manager = manager(self.root, config={"keep": {"last": 4}})
        self.step += 1

    @rule()
    def settle(self) -> None:
        time.sleep(SETTLED)
        self._manager().checkpoints()

    @rule()
    def save(self) -> None:
        self.step += 1
        highest = max(listing(self.root, anew=True).checkpoints.sequences, default=0) if not self.edited else 0
        handle = self._manager().save(self.step)
        assert handle is not None
        assert handle.result().sequence > highest

    @rule()
    def save_again(self) -> None:
        with contextlib.suppress(CheckpointerError):  # what somebody has deleted half of is in the way
            self._manager().save(self.step, overwrite=True, force=True)

    @rule()
    def copied_in(self) -> None:
        """A checkpoint of later is put back under a name that is new."""
        self.step += 1
        source = next(iter(self._names()), None)
        sequences = listing(self.root, anew=True).checkpoints.sequences
        if source is None or not (source / "manifest.json").exists() or not sequences:
            return
        with contextlib.suppress(CheckpointerError):
            manifest = read_manifest(open_storage(self.root.url), source.name)
            assert manifest is not None
            later = replace(manifest, step=self.step, id=f"{self.step:032x}", sequence=max(sequences) + 100)
            shutil.copytree(source, self.path / f"checkpoint-{self.step}")
            (self.path / f"checkpoint-{self.step}" / "manifest.json").write_bytes(later.to_bytes())

    @rule()
    def save_on_a_failing_disk(self) -> None:
        self.fault.restart()
        with contextlib.suppress(CheckpointerError):
            self.save()
        with contextlib.suppress(CheckpointerError, OSError):
            self._manager().prune()
        self.fault.end()

    @rule()
    def prune(self) -> None:
        with contextlib.suppress(CheckpointerError):
            self._manager().prune()

    @precondition(lambda self: self._names())
    @rule(which=st.integers(0, 9), pinned=st.booleans())
    def annotate(self, which: int, pinned: bool) -> None:
        infos = self._manager().checkpoints()
        if infos:
            info = infos[which % len(infos)]
            self._manager().pin(info) if pinned else self._manager().annotate(info, metrics={"score": float(which)})

    @precondition(lambda self: self._names())
    @rule(which=st.integers(0, 9), restored_time=st.booleans())
    def damage_or_heal(self, which: int, restored_time: bool) -> None:
        manifest = self._one(which) / "manifest.json"
        if manifest.exists():
            before = manifest.stat()
            self.edited = True
            data = bytearray(manifest.read_bytes())
            data[20] ^= 1
            with open(manifest, "r+b") as file:  # in place, of the same size
                file.write(data)
            if restored_time:
                os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns))

    @precondition(lambda self: self._names())
    @rule(which=st.integers(0, 9), sequence=st.integers(0, 50))
    def forge_sequence(self, which: int, sequence: int) -> None:
        """A valid manifest of another sequence, in the place of the one that was there."""
        name = self._one(which).name
        storage = open_storage(self.root.url)
        with contextlib.suppress(CheckpointerError):
            manifest = read_manifest(storage, name)
            if manifest is not None:
                self.edited = True
                Path(self.path, name, "manifest.json").write_bytes(replace(manifest, sequence=sequence).to_bytes())

    @precondition(lambda self: self._names())
    @rule(which=st.integers(0, 9), whole=st.booleans())
    def delete(self, which: int, whole: bool) -> None:
        place = self._one(which)
        shutil.rmtree(place) if whole else (place / "manifest.json").unlink(missing_ok=True)

    @precondition(lambda self: len(self._names()) > 1)
    @rule(which=st.integers(0, 9))
    def swap(self, which: int) -> None:
        one, other = self._one(which), self._one(which + 1)
        one.rename(self.path / "between")
        other.rename(one)
        self.edited = True
        (self.path / "between").rename(other)

    @rule(how=st.sampled_from(["gone", "kept", "old", "torn", "flipped"]))
    def change_the_file(self, how: str) -> None:
        known = self.path / ".checkpointer" / "known"
        data = known.read_bytes() if known.exists() else b""
        if how == "kept":
            self.old_file = data
        elif how == "gone":
            known.unlink(missing_ok=True)
        elif data:
            flipped = data[:200] + bytes([data[200] ^ 4]) + data[201:]
            known.write_bytes({"old": self.old_file, "torn": data[: len(data) // 2], "flipped": flipped}[how])

    @invariant()
    def everybody_lists_what_is_on_disk(self) -> None:
        if self.manager is None:
            return
        self.manager._saver.wait()  # until all is pruned
        on_disk = shown(listing(self.root, anew=True))
        assert shown(listing(self.root)) == on_disk
        assert shown(self._manager()._repository.list_checkpoints()) == on_disk

    def _manager(self) -> CheckpointManager:
        assert self.manager is not None
        return self.manager


@needs_stamps
@pytest.mark.timeout(300)
def test_what_is_remembered_is_what_is_on_disk_whoever_changed_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpointer.repository.known.WORTH_WRITING", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_state_machine_as_test(Run, settings=settings(max_examples=25, stateful_step_count=20, deadline=None))


def test_a_checkpoint_that_is_put_back_with_a_later_sequence_is_overtaken_by_the_next_commit(local: Root) -> None:
    filled(local, 3)
    with manager(local) as mgr:
        mgr.restore_latest()
        mgr.save(3)
        put_back(local, "checkpoint-1", 77, sequence=500)
        assert mgr.save(4).result().sequence == 501


def test_a_sequence_that_is_changed_in_its_place_is_overtaken_some_commits_later(local: Root) -> None:
    filled(local, 3)
    with manager(local) as mgr:
        mgr.restore_latest()
        mgr.save(3)
        put_back(local, "checkpoint-1", 1, sequence=500)
        for step in range(4, 4 + WHOLE_LOOK_EVERY):
            last = mgr.save(step)
        assert last.result().sequence > 500


def put_back(root: Root, name: str, step: int, *, sequence: int) -> None:
    """Copy a checkpoint, as of another step and sequence."""
    manifest = read_manifest(open_storage(root.url), name)
    assert manifest is not None
    place = Path(root.url, f"checkpoint-{step}")
    if place.name != name:
        shutil.copytree(Path(root.url, name), place)
    (place / "manifest.json").write_bytes(replace(manifest, id=f"{step:032x}", step=step, sequence=sequence).to_bytes())


@pytest.mark.parametrize("operation", ["remove", "rename", "sync"])
def test_after_a_removal_or_a_commit_that_failed_the_writer_looks_at_everything_again(
    local: Root, operation: str
) -> None:
    filled(local, 5)
    fault = Fault("EIO", on=[operation])
    fault.end()
    with faulty(fault):
        mgr = manager(local)
    with mgr:
        mgr.restore_latest()
        mgr.save(5)
        put_back(local, "checkpoint-1", 1, sequence=500)
        fault.restart()
        with contextlib.suppress(CheckpointerError, OSError):
            mgr.save(6)
        with contextlib.suppress(CheckpointerError, OSError):
            mgr._repository.remove(mgr.checkpoints()[0])
        assert fault.hits
        assert mgr.save(7).result().sequence > 500


# ------------------------------------------------------------------------------------------------------- the file


@pytest.fixture
def known(local: Root) -> Path:
    """What is known of a run of 20 checkpoints."""
    filled(local, 20)
    return Path(local.url, ".checkpointer", "known")


def rows_of(known: Path) -> list[known_file.Row]:
    return KnownFile(str(known.with_name("lock"))).read()


@needs_stamps
def test_no_byte_of_the_file_can_be_changed_and_none_be_missing_without_a_sign(local: Root, known: Path) -> None:
    data = known.read_bytes()
    assert len(rows_of(known)) == 20
    for place in (*range(400), *range(400, len(data), 97), len(data) - 1):
        known.write_bytes(data[:place])
        assert rows_of(known) == []
        known.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        assert rows_of(known) == []


def rewrite(known: Path, change: Any) -> None:
    """A file that is whole and says what ``change`` makes of each row."""
    rows = [change(row) for row in rows_of(known)]
    assert rows
    KnownFile(str(known.with_name("lock"))).write(rows)


@needs_stamps
@pytest.mark.parametrize("column", range(5))
def test_a_row_with_a_stamp_that_is_not_the_manifests_counts_for_nothing(local: Root, known: Path, column: int) -> None:
    before = shown(listing(local, anew=True))

    def forged(row: known_file.Row) -> known_file.Row:
        name, sequence, created, id, stamp, rest = row
        other = (*stamp[:column], stamp[column] + 1, *stamp[column + 1 :])
        return name, 10_000 - sequence, created, id, other, rest

    rewrite(known, forged)
    assert shown(listing(local)) == before


@needs_stamps
@pytest.mark.parametrize(
    "rest", ["", "{", "null", "[]", "{}", '{"step": 1}', '{"step": 999, "tags": []}', "[" * 15_000, '{"tags": 3}']
)
def test_a_row_that_makes_no_sense_is_read_from_its_manifest(local: Root, known: Path, rest: str) -> None:
    before = shown(listing(local, anew=True))
    rewrite(known, lambda row: (*row[:5], rest))
    assert shown(listing(local)) == before


@needs_stamps
def test_a_row_that_lies_about_the_id_is_found_out_before_anything_is_restored(local: Root, known: Path) -> None:
    with manager(local) as mgr:
        mgr.save(20, overwrite=True, force=True)
    live = {"state": torch.zeros(3)}
    time.sleep(SETTLED)
    repository = Repository(open_storage(local.url))
    repository.lock.acquire()
    repository.list_checkpoints()
    repository.keep_known(least=1)
    repository.lock.release()
    rewrite(known, lambda row: (*row[:3], "f" * 32, *row[4:]))
    assert {info.id for info in listing(local).checkpoints} == {"f" * 32}
    with CheckpointManager(local.url, config=SYNC, read_only=True, state=live) as mgr:
        assert mgr.restore_latest().step == 20
        assert mgr.restore(7).step == 7


@needs_stamps
@pytest.mark.parametrize("how", ["for the group", "for all", "another user", "link", "pipe", "directory"])
def test_a_file_that_somebody_else_can_have_written_is_not_used(local: Root, known: Path, how: str) -> None:
    before = shown(listing(local, anew=True))
    rewrite(known, lambda row: (row[0], 10_000 - row[1], *row[2:]))
    data = known.read_bytes()
    if how in ("for the group", "for all"):
        known.chmod(0o664 if how == "for the group" else 0o646)
    elif how == "another user":
        if os.geteuid() != 0:
            pytest.skip("only root gives a file away")
        os.chown(known, 12345, -1)
    else:
        known.unlink()
        if how == "link":
            (known.parent / "elsewhere").write_bytes(data)
            known.symlink_to(known.parent / "elsewhere")
        elif how == "pipe":
            os.mkfifo(known)
        else:
            known.mkdir()
    assert shown(listing(local)) == before
    with manager(local) as mgr:  # and nobody stumbles over it
        mgr.restore_latest()
        mgr.save(20)


@needs_stamps
def test_a_root_that_was_copied_with_its_file_is_read_anew(local: Root, known: Path) -> None:
    copied = Root("local", f"{local.url}-copied")
    shutil.copytree(local.url, copied.url)
    asked: list[str] = []
    with asking(asked):
        assert [info.step for info in listing(copied).checkpoints] == list(range(20))
    assert set(manifests_read(asked)) == {f"checkpoint-{step}" for step in range(20)}


@needs_stamps
def test_what_cannot_be_written_down_costs_time_and_nothing_else(local: Root, known: Path) -> None:
    known.unlink()
    (known.parent / "known.new" / "in the way").mkdir(parents=True)
    with manager(local) as mgr:
        mgr.restore_latest()
        mgr.save(20)
    assert not known.exists()
    assert len(listing(local).checkpoints) == 21


@needs_stamps
def test_what_a_writer_that_was_killed_has_left_of_the_file_is_replaced(local: Root, known: Path) -> None:
    known.unlink()
    (known.parent / "known.new").write_bytes(b"checkpointer known 1")
    with manager(local) as mgr:
        mgr.restore_latest()
    assert sorted(path.name for path in known.parent.glob("known*")) == ["known"]
    assert len(rows_of(known)) == 20


def test_an_info_comes_back_from_the_file_as_it_is_or_is_not_in_it(local: Root) -> None:
    odd = {"nan": float("nan"), "inf": float("inf"), "-0": -0.0, "big": 1e308, "ünïcode\t\n": 1.0}
    with manager(local) as mgr:
        info = mgr.save(1, epoch=3, metrics=odd, tags=["a\tb", "c\nd", "\udcff"[:0]], force=True).result()
    rest = known_file.encoded(info)
    assert rest is not None
    assert "\t" not in rest
    assert "\n" not in rest
    back = decoded(rest, info.sequence, known_file.microseconds(info.created), info.id, info.path)
    assert repr(back) == repr(info)
    assert known_file.encoded(replace(info, statistics={"not JSON": {1, 2}})) is None
    assert known_file.encoded(replace(info, statistics={"tuple": (1, 2)})) is None
    assert known_file.encoded(replace(info, note="x" * 20_000)) is None


@needs_stamps
def test_doctor_reads_what_is_known_too(local: Root, known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses bits changes no times."""
    stamps = LocalStorage.stamps
    seen: dict[str, Any] = {}

    def unchanged(self: LocalStorage, files: Any) -> Any:
        return [seen.setdefault(path, found) for path, found in zip(files, stamps(self, files), strict=True)]

    monkeypatch.setattr(LocalStorage, "stamps", unchanged)
    listing(local)
    manifest = Path(local.url, "checkpoint-7", "manifest.json")
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 7', b'"step": 8'))
    assert len(listing(local).checkpoints) == 20
    found = Doctor(Repository(open_storage(local.url))).examine().findings
    assert any("checkpoint-7" in finding.path for finding in found)


@needs_stamps
def test_a_file_that_changed_a_moment_ago_has_no_stamp_as_it_could_change_again_unseen(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path, durable=False)
    for _ in range(100):
        began = time.time_ns()
        (tmp_path / "file").write_bytes(b"1")
        (found,) = storage.stamps(["file"])
        if time.time_ns() - began < CLOCK_TICK:  # else the machine has slept in between
            assert found is None
            break
    else:
        pytest.skip("this machine takes longer than a moment to write a byte")
    time.sleep(SETTLED)
    assert storage.stamps(["file"]) != [None]


@needs_stamps
def test_a_manifest_that_was_changed_in_its_place_and_given_its_times_back_is_read_again(
    local: Root, known: Path
) -> None:
    mgr = manager(local, read_only=True)
    assert mgr.latest().step == 19
    manifest = Path(local.url, "checkpoint-7", "manifest.json")
    before, data = manifest.stat(), bytearray(manifest.read_bytes())
    data[20] ^= 1
    with open(manifest, "r+b") as file:
        file.write(data)
    os.utime(manifest, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert manifest.stat().st_mtime_ns == before.st_mtime_ns
    assert 7 not in [info.step for info in mgr.checkpoints()]
    assert 7 not in [info.step for info in listing(local).checkpoints]
