"""One checkpoint that the system does not let be read: it blocks nothing but the question which one is the newest."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager
from checkpointer.errors import (
    CheckpointerError,
    CheckpointerWarning,
    CorruptCheckpointError,
    RunNotEmptyError,
    SaveError,
    UnreadableCheckpointError,
)
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.repository import Repository
from checkpointer.repository.sequence import SEQUENCE_LEAP
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.integration.cli.test_cli import document, invoke
from tests.support.refusals import obeying_modes, refusing

SYNC = {"write": {"mode": "sync", "durable": False}}


def manager(root: str | Path, value: int = 0, *, read_only: bool = False, options: Any = None, **config: Any) -> Any:
    settings = {**SYNC, **config}
    state = {"value": value}
    made = CheckpointManager(root, config=settings, storage_options=options, read_only=read_only, state=state)
    return made, state


def make(root: str | Path, steps: tuple[int, ...] = (1, 2, 3), options: Any = None) -> None:
    writer, state = manager(root, options=options)
    with writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)  # an object store has no lock
        for step in steps:
            state["value"] = step
            writer.save(step)


@pytest.fixture
def denied(tmp_path: Path) -> Iterator[Path]:
    """A run of three checkpoints; the manifest of the second may not be read."""
    run = tmp_path / "run"
    make(run)
    (run / "checkpoint-2" / "manifest.json").chmod(0)
    with obeying_modes():
        yield run
    for place, _, _ in os.walk(tmp_path):
        os.chmod(place, 0o700)


# ----------------------------------------------------------------------------------------------- really denied


def test_a_manifest_that_may_not_be_read_blocks_no_other_checkpoint(denied: Path) -> None:
    reader, state = manager(denied, read_only=True)
    assert [info.step for info in reader.checkpoints()] == [1, 3]
    assert reader.latest().step == 3
    assert [info.step for info in reader.watch(timeout=0)] == [1, 3]
    report = reader.verify()
    assert [(item.step, item.ok) for item in report.checkpoints] == [(1, True), (3, True), (2, False)]
    assert "checkpoint-2: UNREADABLE" in str(report)
    assert str(report).endswith("3 checkpoints checked, 0 damaged, 1 unreadable")
    assert [item.damage for item in report.checkpoints] == [(), (), ()]
    reader.pin(1)
    with pytest.warns(CheckpointerWarning, match=r"checkpoint-2/manifest.json cannot be read: Permission denied"):
        assert reader.restore(3).step == 3
    assert state["value"] == 3


def test_restore_latest_says_which_cannot_be_read_and_that_restore_of_a_step_can(denied: Path) -> None:
    for read_only in (False, True):
        reader, _ = manager(denied, read_only=read_only)
        with reader, pytest.raises(UnreadableCheckpointError) as caught:
            reader.restore_latest()
        for part in (str(denied / "checkpoint-2" / "manifest.json"), "Permission denied", "mgr.restore(step)", "1, 3"):
            assert part in str(caught.value)
        assert isinstance(caught.value, (CheckpointerError, OSError))
        assert caught.value.errno == errno.EACCES


def test_a_new_job_goes_on_from_a_step_that_can_be_read_and_its_saves_are_the_newest_for_ever(denied: Path) -> None:
    writer, state = manager(denied)
    with writer:
        with pytest.warns(CheckpointerWarning, match="retention neither counts on it nor removes it"):
            writer.restore(1)
        state["value"] = 10
        first = writer.save(10).result()
        second = writer.save(11).result()
    assert first.sequence == 3 + SEQUENCE_LEAP + 1
    assert second.sequence == first.sequence + 1  # this process has leapt over it already
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    reader, state = manager(denied, read_only=True)
    assert reader.restore_latest().step == 11


def test_a_newest_checkpoint_that_can_be_read_again_does_not_undo_what_was_saved_since(denied: Path) -> None:
    for step in (2, 3):
        (denied / f"checkpoint-{step}" / "manifest.json").chmod(0)
    writer, _ = manager(denied)
    with writer:
        with pytest.warns(CheckpointerWarning):
            writer.restore(1)
        writer.save(2)  # the name belongs to one that nobody can look into: it stays, beside this one
    for step in (2, 3):
        (denied / f"checkpoint-{step}" / "manifest.json").chmod(0o644)
    assert len([name for name in os.listdir(denied) if name.startswith("checkpoint-2")]) == 2
    reader, state = manager(denied, read_only=True)
    assert reader.restore_latest().step == 2
    assert state["value"] == 1


def test_a_running_job_saves_on_and_retention_never_removes_what_it_cannot_read(denied: Path) -> None:
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    writer, _ = manager(denied, keep={"last": 1})
    with writer:
        writer.restore_latest()
        before = writer.save(4).result()
        (denied / "checkpoint-4" / "manifest.json").chmod(0)
        after = writer.save(5).result()
        writer.save(6)
        writer.wait()
        writer._saver.wait()
        assert [info.step for info in writer.checkpoints()] == [6]
    assert after.sequence > before.sequence
    assert (denied / "checkpoint-4").exists()
    (denied / "checkpoint-4" / "manifest.json").chmod(0o644)
    reader, _ = manager(denied, read_only=True)
    assert [info.step for info in reader.checkpoints()] == [4, 6]


def test_a_directory_that_may_not_be_listed_is_like_its_manifest(denied: Path) -> None:
    (denied / "checkpoint-2").chmod(0)
    reader, _ = manager(denied, read_only=True)
    assert [info.step for info in reader.checkpoints()] == [1, 3]
    with pytest.raises(UnreadableCheckpointError, match=r"checkpoint-2/manifest.json cannot be read"):
        reader.restore_latest()
    with pytest.raises(UnreadableCheckpointError, match=r"checkpoint-2/manifest.json cannot be read"):
        reader.restore(2)
    denied.chmod(0)
    with pytest.raises(UnreadableCheckpointError, match="run cannot be read"):
        reader.checkpoints()


def test_a_tensor_file_that_may_not_be_read_is_no_damage_and_no_bare_error(denied: Path) -> None:
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    (denied / "checkpoint-3" / "index.json").chmod(0)
    writer, _ = manager(denied)
    with writer:
        for call in (writer.restore_latest, lambda: writer.restore(3)):
            with pytest.raises(UnreadableCheckpointError, match=r"checkpoint-3/index.json cannot be read"):
                call()
        assert [report.ok for report in writer.verify().checkpoints] == [True, True, False]
        assert "DAMAGED" not in str(writer.verify())
        assert "3 checkpoints checked, 0 damaged, 1 unreadable" in invoke("verify", denied).stdout
        assert document("verify", denied, 3)["checkpoints"][0]["status"] == "unreadable"
        assert all(info.damaged is None for info in writer.checkpoints())
    for deep in (False, True):
        findings = Doctor(Repository(open_storage(denied)), deep=deep).mend().findings
        assert {item.kind for item in findings if item.level == "problem"} == {"unreadable"}
    assert (denied / "checkpoint-3").exists()  # not in quarantine


@pytest.mark.parametrize("found_by", ["restore", "verify"])
def test_retention_neither_counts_on_nor_removes_what_could_not_be_read_a_moment_ago(
    denied: Path, found_by: str
) -> None:
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    hidden = denied / "checkpoint-3" / "index.json"
    hidden.chmod(0)
    writer, _ = manager(denied, keep={"last": 2})
    if found_by == "verify":
        assert not writer.verify().ok
    else:
        with pytest.raises(UnreadableCheckpointError):
            writer.restore_latest()
    writer.restore(2)
    with writer:
        plan = writer.prune(dry_run=True)
        reasons = {info.step: why for info, why in plan.keep}
        assert "neither counted nor removed" in reasons[3][0]
        assert sorted(reasons) == [1, 2, 3]
        writer.save(9)
        writer.wait()
        writer._saver.wait()
        assert [info.step for info in writer.checkpoints()] == [2, 3, 9]
        hidden.chmod(0o644)
        assert writer.verify().ok  # it can be read again, and counts again
        assert {info.step: why for info, why in writer.prune().keep}[3] == ("last 2",)


def test_the_commands_name_it_with_the_cure(denied: Path) -> None:
    listed = {row["step"]: row["status"] for row in document("ls", denied)["checkpoints"]}
    assert listed == {1: "ok", 2: "unreadable", 3: "ok"}
    assert invoke("verify", denied, 3).exit_code == 0
    result = invoke("verify", denied)
    assert result.exit_code == 1
    assert "Permission denied" in result.stdout
    findings = document("doctor", denied)["findings"]
    found = next(item for item in findings if "restore_latest" in item["meaning"])
    assert (found["level"], found["kind"]) == ("problem", "unreadable")
    assert "make it readable" in found["advice"]
    fixed = invoke("doctor", denied, "--fix")
    assert fixed.exit_code == 1
    assert (denied / "checkpoint-2").exists()


@pytest.mark.parametrize("what", ["note", "notes of one", "all notes"])
def test_a_note_that_may_not_be_read_counts_as_a_pin(denied: Path, what: str) -> None:
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    reader, _ = manager(denied, read_only=True)
    reader.annotate(1, note="good")
    reader.unpin(1)
    notes = denied / ".checkpointer" / "notes"
    (of_one,) = notes.iterdir()
    {"note": max(of_one.iterdir()), "notes of one": of_one, "all notes": notes}[what].chmod(0)
    every = what == "all notes"
    if what == "notes of one":
        with pytest.raises(SaveError, match=r"nothing could be noted of .*checkpoint-1: Permission denied"):
            reader.pin(1)
    assert [info.pinned for info in reader.checkpoints()] == [True, every, every]
    writer, _ = manager(denied, keep={"last": 1})
    with writer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        writer.restore_latest()
        writer.prune()
        assert [info.step for info in writer.checkpoints()] == ([1, 2, 3] if every else [1, 3])
    said = [str(item.message) for item in caught]
    assert any("every checkpoint counts as pinned" in text for text in said) == every
    findings = Doctor(Repository(open_storage(denied))).examine().findings
    assert any("pin" in item.meaning and item.level == "problem" for item in findings)


@pytest.mark.parametrize("name", ["lock", "owner.json"])
def test_a_lock_or_owner_that_may_not_be_opened_is_a_typed_error_or_none(denied: Path, name: str) -> None:
    (denied / "checkpoint-2" / "manifest.json").chmod(0o644)
    place = denied / ".checkpointer" / name
    place.touch()
    place.chmod(0)
    writer, _ = manager(denied)
    with writer:
        if name == "lock":
            with pytest.raises(SaveError, match=r"cannot lock .*read_only=True"):
                writer.restore_latest()
        else:
            assert writer.restore_latest().step == 3


def test_a_pipe_in_the_place_of_the_lock_does_not_make_the_doctor_wait(local: Root) -> None:
    make(local.url)
    place = Path(local.url, ".checkpointer", "lock")
    place.unlink()
    os.mkfifo(place)
    assert Doctor(Repository(open_storage(local.url))).examine().checkpoints == 3


# ------------------------------------------------------------------------------- on every storage, each reason


@pytest.mark.parametrize("code", ["EACCES", "ESTALE", "ENODEV"])
def test_on_each_storage_one_that_cannot_be_read_blocks_restore_latest_alone(root: Root, code: str) -> None:
    make(root.url, options=root.options)
    with refusing("checkpoint-2/*", code):
        writer, _ = manager(root.url, options=root.options, require_resume=False)
    with writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)  # an object store has no lock
        with pytest.raises(UnreadableCheckpointError, match=r"checkpoint-2/manifest.json cannot.*restore\(step"):
            writer.restore_latest()
        assert [info.step for info in writer.checkpoints()] == [1, 3]
        assert writer.restore(3).step == 3
        writer.save(4)
    reader, _ = manager(root.url, read_only=True, options=root.options)
    assert [info.step for info in reader.checkpoints()] == [1, 2, 3, 4]


def test_the_name_of_one_that_cannot_be_read_is_not_written_over(root: Root) -> None:
    make(root.url, options=root.options)
    with refusing("checkpoint-2/manifest.json"):
        writer, state = manager(root.url, options=root.options)
    with writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        writer.restore(1)
        state["value"] = 20
        writer.save(2)
    reader, state = manager(root.url, read_only=True, options=root.options)
    assert [info.step for info in reader.checkpoints()] == [1, 2, 3, 2]
    assert reader.restore_latest().step == 2
    assert state["value"] == 20
    assert reader.verify().ok


def test_a_bad_sector_under_a_manifest_is_damage_that_is_passed_over_and_overtaken(local: Root) -> None:
    make(local.url)
    with refusing("checkpoint-3/manifest.json", "EIO"):
        writer, _ = manager(local.url)
    with writer:
        with pytest.warns(CheckpointerWarning, match="skipping a damaged checkpoint"):
            assert writer.restore_latest().step == 2
        assert writer.save(3).result().sequence > SEQUENCE_LEAP
    reader, _ = manager(local.url, read_only=True)
    assert len(reader.checkpoints()) == 4
    assert reader.restore_latest().checkpoint.sequence > SEQUENCE_LEAP


def test_an_unreadable_checkpoint_is_not_an_empty_run(local: Root) -> None:
    make(local.url, (1,))
    with refusing("checkpoint-1/manifest.json"):
        writer, _ = manager(local.url)
    with writer:
        with pytest.raises(RunNotEmptyError):
            writer.save(1)
        with pytest.raises(UnreadableCheckpointError, match="no other"):
            writer.restore_latest()


def test_a_job_whose_last_checkpoint_cannot_be_read_any_more_shares_nothing_with_it_and_saves_on(local: Root) -> None:
    import torch

    frozen = torch.nn.Linear(200, 200)
    frozen.requires_grad_(requires_grad=False)
    with refusing("checkpoint-1/*") as refusal:
        mgr = CheckpointManager(local.url, config=SYNC, model=frozen)
    refusal.ended = True
    with mgr:
        mgr.save(1)
        refusal.ended = False
        mgr.save(2)
    assert CheckpointManager(local.url, read_only=True, model=frozen).verify().ok


def test_an_outage_of_the_whole_storage_is_not_taken_for_many_unreadable_checkpoints(local: Root) -> None:
    make(local.url)
    with refusing("checkpoint-?/manifest.json", "ETIMEDOUT"):
        reader, _ = manager(local.url, read_only=True)
    with pytest.raises(TimeoutError):
        reader.checkpoints()


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop"])
def test_a_manifest_that_is_no_file_is_damage_and_nobody_waits_for_it(local: Root, kind: str) -> None:
    make(local.url)
    place = Path(local.url, "checkpoint-2", "manifest.json")
    place.unlink()
    {"directory": place.mkdir, "pipe": lambda: os.mkfifo(place), "loop": lambda: place.symlink_to(place)}[kind]()
    reader, _ = manager(local.url, read_only=True)
    with pytest.warns(CheckpointerWarning, match="skipping a damaged checkpoint"):
        assert reader.restore_latest().step == 3
    with pytest.raises(CorruptCheckpointError):
        reader.restore(2)
