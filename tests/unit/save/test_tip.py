"""Where a manager stands in its run: which first save is refused, which steps, and what the schedule goes by."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import RunNotEmptyError, StepOrderError
from checkpointer.format.index import FileRecord
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest
from checkpointer.policy.schedule import RECENT
from checkpointer.repository.repository import Repository
from checkpointer.save.tip import Tip
from checkpointer.storage import LocalStorage

START = datetime(2026, 3, 1, tzinfo=timezone.utc)
Commit = Callable[[int], CheckpointInfo]


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(LocalStorage(str(tmp_path)))


@pytest.fixture
def commit(repository: Repository, tmp_path: Path) -> Commit:
    """Lays a manifest down, as a save of any process does; all that listing a run looks at."""

    def write(step: int) -> CheckpointInfo:
        sequence = 1 + max((info.sequence for info in repository.list_checkpoints().checkpoints), default=0)
        manifest = Manifest(
            id=f"{sequence:032x}",
            parent=None,
            sequence=sequence,
            step=step,
            epoch=None,
            created=START + timedelta(minutes=sequence),
            index={name: FileRecord(1, "0" * 32) for name in ("index.json", "index.safetensors")},
            files=2,
            size=2,
        )
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        (place / "manifest.json").write_bytes(manifest.to_bytes())
        return repository.find(step)

    return write


def test_the_first_save_of_an_empty_run_is_welcome(repository: Repository) -> None:
    Tip(repository, require_resume=True).check_first_save()


def test_a_first_save_without_a_restore_is_refused_where_there_are_checkpoints(
    repository: Repository, commit: Commit
) -> None:
    commit(5)
    position = Tip(repository, require_resume=True)
    for _ in range(2):  # a refusal does not wear off
        with pytest.raises(RunNotEmptyError, match=r"the newest is checkpoint-5 \(sequence 1\).*restore_latest"):
            position.check_first_save()
    Tip(repository, require_resume=False).check_first_save()


def test_a_run_of_which_nothing_can_be_read_is_not_taken_for_an_empty_one(
    repository: Repository, commit: Commit, tmp_path: Path
) -> None:
    commit(5)
    (tmp_path / "checkpoint-5" / "manifest.json").write_bytes(b"{}")
    with pytest.raises(RunNotEmptyError, match="the newest is damaged"):
        Tip(repository, require_resume=True).check_first_save()


def test_a_save_after_a_restore_is_welcome_and_checked_once(repository: Repository, commit: Commit) -> None:
    position = Tip(repository, require_resume=True)
    position.restored(commit(5))
    position.check_first_save()
    commit(6)  # the lock keeps others out from here on: whoever looks again pays for nothing
    position.check_first_save()


@pytest.mark.parametrize("empty", [True, False])
def test_a_run_that_another_job_continued_since_the_restore_is_refused(
    repository: Repository, commit: Commit, empty: bool
) -> None:
    position = Tip(repository, require_resume=True)
    position.restored(None if empty else commit(5))
    commit(6)
    for _ in range(2):
        with pytest.raises(RunNotEmptyError, match=r"moved on.*checkpoint-6 .*it was sequence [01]\b"):
            position.check_first_save()


def test_whoever_restores_again_is_checked_again(repository: Repository, commit: Commit) -> None:
    position = Tip(repository, require_resume=True)
    position.restored(commit(5))
    position.check_first_save()
    position.restored(commit(6))
    commit(7)
    with pytest.raises(RunNotEmptyError, match="moved on"):
        position.check_first_save()
    position.restored(repository.find(7))
    position.check_first_save()


def test_a_run_in_which_an_older_checkpoint_was_restored_may_be_continued_from_it(
    repository: Repository, commit: Commit
) -> None:
    old = commit(5)
    commit(6)
    position = Tip(repository, require_resume=True)
    position.restored(old)
    position.check_first_save()
    assert position.info == position.restored_from == old


def test_the_tip_is_the_last_commit_or_restore_and_the_first_commit_ends_the_protection(
    repository: Repository, commit: Commit
) -> None:
    position = Tip(repository, require_resume=True)
    assert (position.info, position.restored_from) == (None, None)
    position.restored(None)
    assert (position.info, position.restored_from) == (None, None)
    first = commit(5)
    position.restored(first)
    assert (position.info, position.restored_from) == (first, first)
    second = commit(6)
    position.committed(second)
    assert (position.info, position.restored_from) == (second, None)
    position.restored(None)  # a restore that found nothing changes no live object, and so not the tip
    assert position.info == second


def test_the_schedule_goes_by_the_newest_commits_of_the_run_whoever_made_them(
    repository: Repository, commit: Commit
) -> None:
    position = Tip(repository, require_resume=True)
    assert (position.recent, position.newest_created) == ((), None)
    others = [commit(step) for step in range(RECENT - 1)]
    assert list(position.recent) == others  # looked up, as long as this manager has neither restored nor saved
    position.restored(others[-1])
    own = []
    for step in range(100, 104):
        own.append(commit(step))
        position.committed(own[-1])
        assert list(position.recent) == [*others, *own][-RECENT:]
        assert position.recent == repository.list_checkpoints().checkpoints[-RECENT:]
        assert position.newest_created == own[-1].created


@given(st.integers(0, 10**18), st.none() | st.integers(0, 10**18))
def test_a_step_may_not_go_back(step: int, last: int | None) -> None:
    position = Tip(Repository(LocalStorage("nowhere")), require_resume=True)
    if last is None or step >= last:
        position.check_order(step, last)
    else:
        with pytest.raises(StepOrderError, match=rf"step {step} is below step {last}\b.*nowhere"):
            position.check_order(step, last)
