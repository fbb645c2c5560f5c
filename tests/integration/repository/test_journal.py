"""The run's history: what is in it, in which order, and that nothing depends on it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import xxhash

from checkpointer import CheckpointManager, Event
from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, CorruptCheckpointError
from checkpointer.format import paths, strict_json
from checkpointer.format.event import Head
from checkpointer.repository import journal as journal_module
from checkpointer.repository.commit.removal import record_removal
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.journal import FILE_LIMIT, FILES, Journal
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, Storage, open_storage
from checkpointer.testing import Fault, faulty
from checkpointer.testing.faults import faulty_storage
from tests.campaign.crash.kill_points import Killer, in_child
from tests.conftest import Root
from tests.integration.cli.test_cli import document, error_of, invoke
from tests.support.forge import flip
from tests.support.ranks import run

SYNC: dict[str, Any] = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
FOUR_MIB = 4 << 20


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Stores without a lock say so; that is tested where the lock is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*so only jobs of this user on this host", CheckpointerWarning)
        yield


def manager(root: Root, **config: Any) -> CheckpointManager:
    live = {"tensor": torch.ones(3)}
    return CheckpointManager(root.url, storage_options=root.options, config={**SYNC, **config}, state=live)


def reader(root: Root) -> CheckpointManager:
    return CheckpointManager(root.url, storage_options=root.options, read_only=True)


def told(events: list[Event]) -> list[tuple[str, int | None]]:
    return [(event.kind, event.step) for event in events]


def files(root: Root) -> list[Path]:
    return sorted(Path(root.url, paths.JOURNAL).iterdir())


@contextlib.contextmanager
def writing(root: Root | str, storage: Storage | None = None) -> Iterator[Journal]:
    """The journal of whoever holds the lock."""
    url = root if isinstance(root, str) else root.url
    options = {} if isinstance(root, str) else root.options
    repository = Repository(storage or open_storage(url, options, durable=False))
    repository.lock.acquire()
    yield repository.journal
    repository.release()


# ------------------------------------------------------------------------------------------------------ what is in it


def test_the_history_tells_commits_removals_restores_and_branches_in_their_order(root: Root) -> None:
    with manager(root, keep={"last": 2}) as mgr:
        for step in (1, 2, 3):
            mgr.save(step, epoch=7, metrics={"loss": 1 / step})
    with manager(root, keep={"last": 2}) as mgr:
        mgr.restore(2)
        mgr.save(3)
        mgr.save(3, overwrite=True)
    events = reader(root).history()
    assert told(events) == [
        ("commit", 1), ("commit", 2), ("commit", 3), ("removal", 1),
        ("restore", 2), ("removal", 3), ("branch", 3), ("commit", 3), ("removal", 3), ("commit", 3),
    ]  # fmt: skip
    first, removal, branch = events[0], events[3], events[6]
    assert first.metrics == {"loss": 1.0}
    assert first.statistics["mode"] == "sync"
    assert first.statistics["bytes_written"] > 0
    assert (first.details["sequence"], first.details["epoch"], first.details["parent"]) == (1, 7, None)
    assert (removal.id, removal.reason) == (first.id, "no rule keeps it")
    assert events[5].id == events[2].id
    assert events[5].reason == "replaced by a later save of the same step"
    assert branch.reason == "goes on from checkpoint-2 (sequence 2); the newest was checkpoint-3 (sequence 3)"
    assert events[-1].id == reader(root).checkpoints()[-1].id
    assert all(abs(datetime.now(timezone.utc) - event.time) < timedelta(hours=1) for event in events)
    assert {event.pid for event in events} == {os.getpid()}


def test_a_save_without_a_restore_begins_a_branch_where_there_are_checkpoints(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
    with manager(local) as mgr:
        mgr.save(2)
        mgr.save(3)
    events = manager(local).history()
    assert told(events) == [("commit", 1), ("branch", 2), ("commit", 2), ("commit", 3)]
    assert events[1].reason == "goes on from no checkpoint; the newest was checkpoint-1 (sequence 1)"


def test_a_restore_of_the_newest_begins_no_branch(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
        mgr.save(2)
        mgr.restore(1)
        mgr.restore(2)
        mgr.save(3)
    assert [event.kind for event in mgr.history()] == ["commit", "commit", "restore", "restore", "commit"]


def test_damage_that_a_restore_passes_over_is_told_and_that_it_is_whole_again(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
        mgr.save(2)
        mgr.save(3)
    place = Path(local.url, "checkpoint-2", "state.safetensors")
    Path(local.url, "checkpoint-3", paths.MANIFEST).write_bytes(b"{}")
    whole = place.read_bytes()
    flip(place, len(whole) - 1)
    with manager(local) as mgr:
        with pytest.warns(CheckpointerWarning, match="skipping"):
            mgr.restore_latest()
        place.chmod(0o600)
        place.write_bytes(whole)
        assert mgr.verify(2).ok
    events = mgr.history()[3:]
    assert told(events) == [("damage", 3), ("damage", 2), ("restore", 1), ("intact", 2)]
    assert "truncated" in str(events[0].reason)
    assert "state.safetensors" in str(events[1].reason)


def test_what_is_moved_to_quarantine_is_told(root: Root) -> None:
    with manager(root) as mgr:
        mgr.save(1)
        storage = mgr._repository.storage
        storage.put(f"checkpoint-2/{paths.MANIFEST}", b"{}")
        if storage.can_rename:
            with pytest.warns(CheckpointerWarning, match="quarantine"):
                mgr.save(2)
        else:
            mgr.save(2)
    events = reader(root).history()
    assert told(events) == [("commit", 1), ("quarantine", 2), ("commit", 2)]
    assert f"{paths.QUARANTINE}/checkpoint-2-" in str(events[1].reason)


def test_a_signal_is_told_once_by_name_before_the_save_that_follows_it(local: Root) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with manager(local, save={"every_n_steps": 100, "on_signal": ["SIGUSR1"]}) as mgr:
        mgr.save(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        mgr.save(2)
        mgr.save(3)
    events = mgr.history()
    assert told(events)[:2] == [("signal", 2), ("commit", 2)]
    assert [event.reason for event in events if event.kind == "signal"] == ["SIGUSR1 came"]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_that_no_save_follows_is_told_by_close(local: Root) -> None:
    with manager(local, save={"every_n_steps": 100, "on_signal": ["SIGUSR1"]}) as mgr:
        mgr.save(0)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert told(mgr.history()) == [("commit", 0), ("signal", None)]


def test_what_the_command_line_prunes_is_told_too(local: Root, tmp_path: Path) -> None:
    with manager(local) as mgr:
        mgr.save(1)
        mgr.save(2)
    (tmp_path / "keep.yaml").write_text("keep: {last: 1}\n")
    assert invoke("prune", local.url, "--config", tmp_path / "keep.yaml").exit_code == 0
    assert told(mgr.history())[2:] == [("removal", 1)]


def test_a_checkpoint_that_is_pinned_meanwhile_is_not_told_as_removed(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
        mgr.save(2)
        mgr.pin(1)
    with manager(local, keep={"last": 1}) as mgr:
        mgr.prune()
    assert told(mgr.history()) == [("commit", 1), ("commit", 2)]


def test_a_manager_that_takes_over_from_another_loses_none_of_its_events(root: Root) -> None:
    first = manager(root)
    first.save(1)
    second = manager(root)
    with second:
        with pytest.warns(CheckpointerWarning, match="taken the run over"):
            second.restore_latest()
        second.save(2)
    assert told(reader(root).history()) == [("commit", 1), ("restore", 1), ("commit", 2)]


def test_a_removal_that_a_dead_writer_had_begun_is_told_by_the_one_that_finishes_it(root: Root) -> None:
    with manager(root) as mgr:
        for step in (1, 2, 3):
            mgr.save(step)
    storage = mgr._repository.storage
    info = mgr.checkpoints()[0]
    if storage.can_rename:
        storage.make_directory(paths.TRASH)
        storage.rename("checkpoint-1", f"{paths.TRASH}/{info.id}")
    else:
        record_removal(storage, "checkpoint-1", storage.read(f"checkpoint-1/{paths.MANIFEST}", 1 << 20), info.id)
        storage.remove(f"checkpoint-1/{paths.MANIFEST}")
    for _ in range(2):
        with manager(root) as mgr:
            mgr.restore_latest()
    events = [event for event in reader(root).history() if event.kind == "removal"]
    assert [(event.step, event.id, event.reason) for event in events] == [
        (1, info.id, "a writer that died had begun to remove it")
    ]


def saved_by_two(url: str) -> list[str]:
    with CheckpointManager(url, config={"keep": {"last": 1}}, state={"tensor": torch.ones(3)}) as mgr:
        mgr.restore_latest()
        mgr.save(1)
        mgr.save(2)
    return [event.kind for event in mgr.history()]


def test_of_several_ranks_the_coordinator_alone_writes(local: Root) -> None:
    run(2, saved_by_two, local.url)
    assert told(reader(local).history()) == [("commit", 1), ("commit", 2), ("removal", 1)]
    assert len(files(local)) == 1


# --------------------------------------------------------------------------------------------------- who may, and where


def test_nobody_writes_without_the_lock(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
    before = [path.read_bytes() for path in files(local)]
    observer = reader(local)
    assert observer.verify().ok
    observer.pin(1)
    observer.annotate(1, note="from elsewhere")
    observer._repository.journal.add("commit", step=99)
    observer.history()
    observer.close()
    assert [path.read_bytes() for path in files(local)] == before


def test_a_run_root_that_is_not_there_has_no_history(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no run root"):
        CheckpointManager(tmp_path / "missing", read_only=True).history()
    assert CheckpointManager(tmp_path / "missing").history() == []
    assert not (tmp_path / "missing").exists()


def test_an_event_costs_no_fsync_and_no_wait_for_a_server(local: Root, memory: Root) -> None:
    repository = Repository(open_storage(local.url, durable=True))
    repository.lock.acquire()
    with mock.patch.object(os, "fsync", side_effect=AssertionError("an fsync")):
        repository.journal.add("commit", step=1)
        repository.release()
    assert told(repository.history()) == [("commit", 1)]
    fault = Fault(at=10**9)
    with writing(memory, faulty_storage(open_storage(memory.url), fault)) as journal:
        journal.add("commit", step=1)
        journal.add("commit", step=2)
        assert fault.operations == []
        journal.flush()
        assert [text.partition("(")[0] for text in fault.operations] == ["list_directory", "put"]
        journal.flush()
        assert len(fault.operations) == 2
        journal.add("commit", step=3)
    assert told(reader(memory).history()) == [("commit", 1), ("commit", 2), ("commit", 3)]


def test_in_a_bucket_the_events_of_a_save_are_there_once_it_is_tidied_up(object_root: Root) -> None:
    mgr = manager(object_root)
    mgr.save(1)
    mgr._saver.wait()
    assert told(reader(object_root).history()) == [("commit", 1)]
    mgr.restore_latest()
    assert told(mgr.history()) == [("commit", 1), ("restore", 1)]
    mgr.close()


# --------------------------------------------------------------------------------------------- order and length


def test_events_are_in_the_order_in_which_they_happened_whatever_the_clock_says(local: Root) -> None:
    """Three writers, of which the second has a clock that is a year behind, and jumps."""
    now = datetime(2026, 6, 1, tzinfo=timezone.utc)
    clocks = [[0, 1, 2], [-365, -364, -366], [3, 3, 3]]
    for number, days in enumerate(clocks):
        with writing(local) as journal, mock.patch.object(journal_module, "datetime") as clock:
            clock.now.side_effect = [now + timedelta(days=day) for day in days]
            for step in range(3):
                journal.add("commit", step=10 * number + step)
    events = reader(local).history()
    assert [event.step for event in events] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert [event.time for event in events] == [now + timedelta(days=day) for days in clocks for day in days]


def test_a_journal_has_four_mib_at_most_and_keeps_the_newest_events(local: Root) -> None:
    text = "x" * 900
    count = 5000
    with writing(local) as journal:
        for step in range(count):
            journal.add("damage", step=step, reason=text)
    sizes = [path.stat().st_size for path in files(local)]
    assert sum(sizes) <= FOUR_MIB
    assert len(sizes) == FILES
    assert max(sizes) <= FILE_LIMIT
    events = reader(local).history()
    assert [event.step for event in events] == list(range(count - len(events), count))
    assert len(events) > 3500


def test_many_short_writers_leave_no_more_files_than_one_long_one(local: Root) -> None:
    with mock.patch.object(journal_module, "FILES", 5):
        for step in range(12):
            with writing(local) as journal:
                journal.add("commit", step=step)
    assert [event.step for event in reader(local).history()] == [7, 8, 9, 10, 11]
    assert len(files(local)) == 5


def test_in_a_bucket_too_files_are_bounded_and_none_is_sent_for_ever(memory: Root) -> None:
    with writing(memory) as journal:
        for step in range(100):
            journal.add("damage", step=step, reason="x" * 900)
            journal.flush()
    storage = open_storage(memory.url)
    names = [entry.name for entry in storage.list_directory(paths.JOURNAL)]
    assert len(names) > 5
    assert all(len(storage.read(f"{paths.JOURNAL}/{name}", 1 << 20)) <= FILE_LIMIT for name in names)
    assert [event.step for event in reader(memory).history()] == list(range(100))


# -------------------------------------------------------------------------------------------- kills, faults, damage


def three_events(root: str) -> None:
    with writing(root) as journal:
        for step in range(3):
            journal.add("commit", step=step, reason="y" * 300)


@pytest.mark.skipif(sys.platform != "linux", reason="the killer reads /proc")
def test_a_kill_at_any_event_of_an_append_leaves_what_was_told_before_and_the_next_writer_goes_on(
    tmp_path: Path,
) -> None:
    killed = 0
    for number in range(1, 1000):
        root = str(tmp_path / str(number))

        def work(root: str = root, number: int = number) -> None:
            Killer(root, number).install()
            three_events(root)

        status = in_child(work)
        left = CheckpointManager(root).history()
        assert told(left) == [("commit", step) for step in range(len(left))], number
        with writing(root) as journal:
            journal.add("commit", step=100)
        assert told(CheckpointManager(root).history()) == [*told(left), ("commit", 100)], number
        if status == 0:
            assert len(left) == 3
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert killed >= 15


def test_a_file_that_was_cut_anywhere_is_a_shorter_history(local: Root) -> None:
    three_events(local.url)
    (place,) = files(local)
    whole = place.read_bytes()
    lengths = set()
    for end in range(len(whole)):
        place.write_bytes(whole[:end])
        events = reader(local).history()  # a warning would be an error
        assert told(events) == [("commit", step) for step in range(len(events))], end
        lengths.add(len(events))
    assert lengths == {0, 1, 2}


@pytest.mark.parametrize("rest", [b"\0" * 100, b"\xff" * 10, b"{", b"\r"], ids=repr)
def test_a_tail_of_other_bytes_as_a_power_cut_leaves_it_is_a_shorter_history(local: Root, rest: bytes) -> None:
    three_events(local.url)
    (place,) = files(local)
    place.write_bytes(place.read_bytes() + rest)
    assert len(reader(local).history()) == 3


@pytest.mark.parametrize("line", range(4))
def test_a_record_that_is_damaged_is_left_out_and_counted(local: Root, line: int) -> None:
    three_events(local.url)
    (place,) = files(local)
    lines = place.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"', b"'", 1)
    place.write_bytes(b"".join(lines))
    with pytest.warns(CheckpointerWarning, match=r"^1 of the records in .*journal cannot be read"):
        events = reader(local).history()
    assert [event.step for event in events] == [step for step in range(3) if step != line - 1]


def test_a_journal_that_is_gone_costs_nothing_but_the_history(root: Root) -> None:
    mgr = manager(root, keep={"last": 2})
    mgr.save(1)
    mgr._saver.wait()
    storage = mgr._repository.storage
    for entry in storage.list_directory(paths.JOURNAL):
        storage.remove(f"{paths.JOURNAL}/{entry.name}")
    storage.remove_directory(paths.JOURNAL)
    mgr.save(2)
    mgr.save(3)
    mgr.close()
    assert told(reader(root).history())[-3:] == [("commit", 2), ("commit", 3), ("removal", 1)]
    with manager(root) as again:
        restored = again.restore_latest()
        assert restored is not None
        assert restored.step == 3
        assert again.verify().ok


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EACCES"])
def test_a_disk_that_takes_no_event_fails_nothing_and_gets_all_of_them_later(
    root: Root, kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fault = Fault(kind, forever=True, on=["append", "put"], path=f"{paths.JOURNAL}/*")
    with faulty(fault), caplog.at_level(logging.WARNING):
        mgr = manager(root, keep={"last": 1})
    mgr.save(1)
    mgr.save(2)
    mgr.prune()
    assert [info.step for info in mgr.checkpoints()] == [2]
    assert mgr.history() == []
    fault.end()
    mgr.save(3)
    mgr.close()
    assert fault.hits >= 3
    assert sum("the history of" in record.message for record in caplog.records) == 1
    expected = [("commit", 1), ("commit", 2), ("removal", 1), ("commit", 3), ("removal", 2)]
    assert told(reader(root).history()) == expected


def test_a_server_that_writes_and_says_that_it_has_not_does_not_double_events(memory: Root) -> None:
    fault = Fault("EIO", after=True, on=["put"])
    with writing(memory, faulty_storage(open_storage(memory.url), fault)) as journal:
        journal.add("commit", step=1)
        journal.flush()
        journal.add("commit", step=2)
    assert fault.hits == 1
    assert told(reader(memory).history()) == [("commit", 1), ("commit", 2)]


def append_until_full(root: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    storage = LocalStorage(root, durable=False)
    storage.append("grows", b"a" * 150)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(OSError, match="File too large"):
        storage.append("grows", b"b" * 100)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
def test_an_append_that_ends_half_way_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    assert in_child(lambda: append_until_full(str(tmp_path))) == 0
    assert (tmp_path / "grows").read_bytes() == b"a" * 150


def test_a_part_of_a_line_that_cannot_be_taken_back_spoils_no_other(local: Root) -> None:
    """As on a file system that fails to truncate, too."""
    with writing(local) as journal:
        journal.add("commit", step=1)
        real = journal._storage.append

        def half(path: str, data: bytes) -> None:
            real(path, data[: len(data) // 2])
            raise OSError(28, "full")

        with mock.patch.object(journal._storage, "append", half):
            journal.add("commit", step=2)
        journal.add("commit", step=3)
    with pytest.warns(CheckpointerWarning, match="1 of the records"):
        assert told(reader(local).history()) == [("commit", 1), ("commit", 2), ("commit", 3)]


def test_events_that_cannot_be_written_take_no_memory_without_end(local: Root) -> None:
    fault = Fault("ENOSPC", forever=True, on=["append"])
    with writing(local, faulty_storage(open_storage(local.url), fault)) as journal:
        for step in range(3000):
            journal.add("damage", step=step, reason="x" * 500)
        fault.end()
    steps = [event.step for event in reader(local).history()]
    assert steps[-1] == 2999
    assert len(steps) < 1100


# ----------------------------------------------------------------------------------------------------------- hostile


def test_a_link_in_the_place_of_the_journal_is_followed_by_nobody(local: Root, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"00000001-{'a' * 16}.jsonl").write_bytes(Head("evil", 1).to_line() + strict_json.seal_line(GOOD))
    Path(local.url, paths.PRIVATE).mkdir(parents=True)
    Path(local.url, paths.JOURNAL).symlink_to(outside)
    with manager(local) as mgr:
        mgr.save(1)
    assert mgr.history() == []
    assert len(list(outside.iterdir())) == 1
    finding = next(item for item in Doctor(Repository(open_storage(local.url))).examine().findings)
    assert (finding.kind, finding.level) == ("in-the-way", "note")


GOOD: dict[str, Any] = {"kind": "commit", "time": "2026-01-02T12:00:00+00:00", "step": 77}


def hostile(name: str) -> Callable[[Path], object]:
    head = Head("host", 1).to_line()
    makers: dict[str, Callable[[Path], object]] = {
        "too large": lambda path: path.write_bytes(head + b"x" * FILE_LIMIT),
        "a link": lambda path: path.symlink_to("/etc/passwd"),
        "a pipe": os.mkfifo,
        "a directory": lambda path: path.mkdir(),
        "deep": lambda path: path.write_bytes(head + b"[" * 10_000 + b"\n"),
        "long numbers": lambda path: path.write_bytes(head + b'{"step":' + b"9" * 9000 + b"}\n"),
        "nothing but line breaks": lambda path: path.write_bytes(head + b"\n" * 9000),
        "another version": lambda path: path.write_bytes(
            strict_json.seal_line({"journal": 2}) + strict_json.seal_line(GOOD)
        ),
        "no text": lambda path: path.write_bytes(head + b"\xff\xfe\n"),
    }
    return makers[name]


@pytest.mark.parametrize(
    "name, damaged",
    [
        ("too large", 1),
        ("a link", 0),
        ("a pipe", 0),
        ("a directory", 0),
        ("deep", 1),
        ("long numbers", 1),
        ("nothing but line breaks", 0),
        ("another version", 1),
        ("no text", 1),
    ],
)
def test_a_hostile_file_is_passed_over_and_the_others_are_read(local: Root, name: str, damaged: int) -> None:
    three_events(local.url)
    hostile(name)(Path(local.url, paths.JOURNAL, f"99999999-{'f' * 16}.jsonl"))
    with writing(local) as journal:
        journal.add("commit", step=9)
    found = Repository(open_storage(local.url)).journal.read()
    assert (sorted(str(event.step) for event in found.events), found.damaged) == (["0", "1", "2", "9"], damaged)


def test_a_journal_that_may_not_be_read_is_told_apart_from_none(local: Root) -> None:
    three_events(local.url)
    with (
        mock.patch.object(LocalStorage, "list_directory", refusing(LocalStorage.list_directory)),
        pytest.raises(OSError, match="cannot be read"),
    ):
        Repository(open_storage(local.url)).journal.read()


def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
    def list_directory(self: LocalStorage, path: str) -> Any:
        if path == paths.JOURNAL:
            raise PermissionError(13, "Permission denied", path)
        return real(self, path)

    return list_directory


def test_the_page_on_the_format_is_enough_to_read_it(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1, metrics={"loss": 0.5})
    (place,) = files(local)
    head, *events = place.read_bytes().split(b"\n")[:-1]
    for line in (head, *events):
        body, comma, rest = line.rpartition(b',"checksum":"')
        assert comma
        assert rest == xxhash.xxh3_128_hexdigest(body).encode() + b'"}'
    assert json.loads(head)["journal"] == 1
    (event,) = map(json.loads, events)
    assert (event["kind"], event["step"], event["metrics"]) == ("commit", 1, {"loss": 0.5})
    assert "reason" not in event


# ----------------------------------------------------------------------------------------- the doctor, the command line


def test_nothing_takes_the_journal_for_foreign_or_left_over(root: Root) -> None:
    with manager(root) as mgr:
        mgr.save(1)
        mgr.save(2)
    for _ in range(2):
        diagnosis = Doctor(Repository(open_storage(root.url, root.options)), deep=True).mend()
        assert {item.kind for item in diagnosis.findings} <= {"no-lock", "no-conditional-writes"}
        assert diagnosis.fixed == ()
    assert told(reader(root).history()) == [("commit", 1), ("commit", 2)]
    assert all(report.extra == () for report in mgr.verify().checkpoints)


def test_the_doctor_tells_a_damaged_journal_as_a_note(local: Root) -> None:
    three_events(local.url)
    (place,) = files(local)
    flip(place, 50)
    (place.parent / ".DS_Store").write_bytes(b"debris")
    diagnosis = Doctor(Repository(open_storage(local.url))).mend()
    assert diagnosis.ok
    assert [(item.kind, item.level) for item in diagnosis.findings] == [("damaged-history", "note")]
    assert [item.kind for item in diagnosis.fixed] == ["debris"]


def test_the_command_prints_a_table_or_one_array_of_events(local: Root) -> None:
    with manager(local, keep={"last": 1}) as mgr:
        mgr.save(1, metrics={"loss": 0.5})
        mgr.save(2)
    lines = invoke("history", local.url).stdout.splitlines()
    assert lines[0].split() == ["TIME", "EVENT", "STEP", "WHAT", "BY"]
    assert [line.split()[1:3] for line in lines[1:]] == [["commit", "1"], ["commit", "2"], ["removal", "1"]]
    assert "loss=0.5" in lines[1]
    assert "no rule keeps it" in lines[3]
    events = document("history", local.url)
    assert [event["kind"] for event in events] == ["commit", "commit", "removal"]
    members = {"kind", "time", "step", "id", "reason", "metrics", "statistics", "details", "host", "pid"}
    assert all(event.keys() == members for event in events)
    assert events[0]["metrics"] == {"loss": 0.5}


def test_the_command_tells_no_history_from_no_run(local: Root, tmp_path: Path) -> None:
    with manager(local) as mgr:
        mgr.save(1)
    shutil.rmtree(Path(local.url, paths.JOURNAL))
    result = invoke("history", local.url)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing is written down" in result.stderr
    assert document("history", local.url) == []
    missing = invoke("history", tmp_path / "missing")
    assert missing.exit_code == 3
    assert "no run root" in error_of(missing)


def test_the_command_lets_no_byte_of_an_event_command_the_terminal(local: Root) -> None:
    with writing(local) as journal:
        journal.add("com\x1b[31mmit", step=1, reason="first\nsecond \x1b]0;title\x07", details={"size": -5})
    (place,) = files(local)
    place.write_bytes(place.read_bytes() + b"garbage\n")
    result = invoke("history", local.url)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 2
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.startswith("warning: 1 of the records")
    assert json.loads(invoke("history", local.url, "--json").stdout)[0]["reason"].startswith("first")


def test_the_command_needs_neither_torch_nor_the_lock(local: Root) -> None:
    with manager(local) as mgr:
        mgr.save(1)
        code = (
            "import sys; sys.modules['torch'] = None\n"
            "from checkpointer.cli.commands import cli\n"
            f"cli.main(['history', {local.url!r}])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "commit" in done.stdout


def test_a_storage_that_cannot_list_the_journal_breaks_no_save(local: Root) -> None:
    with mock.patch.object(LocalStorage, "list_directory", refusing(LocalStorage.list_directory)):
        with manager(local) as mgr:
            mgr.save(1)
        assert mgr.verify().ok
    with pytest.raises(CorruptCheckpointError):
        mgr._repository.storage.append("checkpoint-1/manifest.json/x", b"")
