"""One writer at a time: refused at once and by name, freed by the owner's death, never in the way of readers."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, RunLockedError, SaveError
from checkpointer.repository.lock import WriterLock, read_owner
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.support.processes import Process
from tests.support.refusals import obeying_modes

REPOSITORY = Path(__file__).parents[3]
SYNC = {"write": {"mode": "sync"}, "require_resume": False}

PRELUDE = """
import json, os, sys, time, warnings
import torch
from checkpointer import CheckpointManager
from checkpointer.errors import RunLockedError
warnings.simplefilter("ignore")
state = {"value": 0, "tensor": torch.zeros(3)}
url, options = sys.argv[1], json.loads(sys.argv[2])
def say(*words): print(*words, flush=True)
def manager():
    settings = {"write": {"mode": "sync"}, "require_resume": False}
    return CheckpointManager(url, storage_options=options, config=settings, state=state)
"""

OWNER = """
mgr = manager()
mgr.restore_latest()
say("locked", os.getpid())
sys.stdin.readline()
mgr.close()
say("released")
sys.stdin.readline()
"""

CONTENDER = """
import fsspec, filelock
open_files = url.partition("://")[0] in ("s3",) and fsspec.filesystem("s3", **options).ls(url.split("/")[2])
mgr = manager()
begin = time.monotonic()
try:
    mgr.restore_latest()
except RunLockedError as error:
    say(json.dumps({"seconds": time.monotonic() - begin, "message": str(error)}))
else:
    say(json.dumps({"seconds": time.monotonic() - begin, "message": None}))
"""

FORKS = """
mgr = manager()
mgr.restore_latest()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
say("locked", child)
sys.stdin.readline()
"""

FEEDS = """
from torch.utils.data import DataLoader
mgr = manager()
mgr.restore_latest()
loader = DataLoader(list(range(1000)), num_workers=1, multiprocessing_context="fork", persistent_workers=True)
batches = iter(loader)
next(batches)
say("locked", batches._workers[0].pid)
sys.stdin.readline()
"""


def start(program: str, root: Root, prefix: Sequence[str]) -> subprocess.Popen[str] | Process:
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + program, root.url, json.dumps(root.options)]
    if not prefix:
        return Process(command)
    return subprocess.Popen(
        [*prefix, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    )


@contextlib.contextmanager
def running(program: str, root: Root, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str] | Process]:
    process = start(program, root, prefix)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):  # a surviving child may hold the other end: nothing to wait for
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


def line(process: subprocess.Popen[str] | Process, seconds: float = 160) -> str:
    """The next line that a process says."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], seconds)[0], "the process says nothing"
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str] | Process) -> None:
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()


def manager(root: Root, **options: Any) -> CheckpointManager:
    state = {"value": 0, "tensor": torch.zeros(3)}
    return CheckpointManager(root.url, storage_options=root.options, config=SYNC, state=state, **options)


def owner_of(root: Root) -> Mapping[str, object] | None:
    return read_owner(Path(root.url, ".checkpointer", "owner.json"))


@pytest.fixture(autouse=True)
def own_temporary_folder(monkeypatch, tmp_path_factory):
    """The lock of an object store lies in the system's temporary folder: not in everybody's."""
    tmp_path_factory.getbasetemp()  # before: else this folder would hold that of all tests, and take it away
    with tempfile.TemporaryDirectory() as short:  # data workers put sockets there, whose paths may not be long
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield


# ------------------------------------------------------------------------------------- another process


def test_a_second_process_is_refused_in_under_a_second_with_host_pid_and_time(local):
    with running(OWNER, local) as owner:
        word, pid = line(owner).split()
        assert word == "locked"
        with running(CONTENDER, local) as contender:
            refusal = json.loads(line(contender))
        assert refusal["seconds"] < 1
        since = owner_of(local)
        assert since is not None
        for part in (f"pid {pid}", f"host {socket.gethostname()}", f"since {since['since']}", "read_only=True"):
            assert part in refusal["message"]
        tell(owner)
        assert line(owner) == "released"
        with running(CONTENDER, local) as contender:
            assert json.loads(line(contender))["message"] is None


def test_a_second_process_on_this_host_is_refused_on_an_object_store_too(s3):
    with running(OWNER, s3) as owner:
        pid = line(owner).split()[1]
        with running(CONTENDER, s3) as contender:
            refusal = json.loads(line(contender))
        assert refusal["seconds"] < 1
        assert f"pid {pid}" in refusal["message"]


@pytest.mark.parametrize("program", [OWNER, FORKS, FEEDS], ids=["alone", "with a forked child", "with a data worker"])
def test_the_lock_is_free_within_a_second_after_its_owner_was_killed(local, program):
    with running(program, local) as owner:
        survivor = int(line(owner).split()[1])
        with pytest.raises(RunLockedError):
            manager(local).restore_latest()
        try:
            owner.kill()
            owner.wait()
            if survivor != owner.pid:
                os.kill(survivor, 0)  # it is alive, or this raises
            deadline = time.monotonic() + 1
            mine = manager(local)
            while True:
                try:
                    mine.restore_latest()
                    break
                except RunLockedError:
                    assert time.monotonic() < deadline, "still locked a second after its owner's death"
            mine.save(1)
            mine.close()
        finally:
            if survivor != owner.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(survivor, signal.SIGKILL)


# ------------------------------------------------------------------------------------------ forked children

CHILD = """
import gc
mgr = manager()
mgr.save(1)
child = os.fork()
if child == 0:
    assert not mgr._repository.lock.held
    for work in (mgr.restore_latest, lambda: mgr.save(2), mgr.wait, lambda: mgr.pin(1)):
        try:
            work()
        except Exception as error:
            assert "forked child" in str(error), error
        else:
            os._exit(3)
    mgr.close()
    mgr._repository.lock.release()
    try:
        manager().save(2)
    except RunLockedError:
        pass
    else:
        os._exit(4)
    del mgr
    gc.collect()
    sys.exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
say("child", status, mgr._repository.lock.held)
sys.stdin.readline()
mgr.save(3)
mgr.close()
say("released")
"""


def test_a_forked_child_neither_owns_the_lock_nor_frees_it_by_closing_collecting_or_ending(local):
    with running(CHILD, local) as owner:
        assert line(owner) == "child 0 True"
        with pytest.raises(RunLockedError):
            manager(local).restore_latest()
        tell(owner)
        assert line(owner) == "released"
    with manager(local) as mine:
        mine.restore_latest()
        assert [info.step for info in mine.checkpoints()] == [1, 3]


# --------------------------------------------------------------------------------------- the same process


def test_an_older_manager_of_the_same_process_is_refused_and_told_which_one_writes(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        old, new = manager(root), manager(root)
        new.save(1)
        with pytest.raises(RunLockedError, match=r"by the manager made at .*test_lock\.py:\d+, .* which is newer"):
            old.restore_latest()
        with pytest.raises(RunLockedError):
            old.save(2)
        new.close()
        old.restore_latest()
        old.save(2)
        old.close()


def test_a_lock_can_be_taken_again_after_it_was_released(local):
    for step in (1, 2, 3):
        with manager(local) as mine:
            mine.restore_latest()
            mine.save(step)
            assert owner_of(local) is not None
        assert owner_of(local) is None


def test_a_manager_that_is_forgotten_frees_the_lock_with_its_last_reference(local):
    first = manager(local)
    first.restore_latest()
    del first
    gc.collect()
    with manager(local) as second:
        second.restore_latest()


def test_the_lock_is_taken_at_the_first_restore_or_save_and_not_before(local):
    first = manager(local)
    assert not Path(local.url).exists()
    first.checkpoints()
    first.latest()
    first.verify()
    assert not Path(local.url).exists()
    with manager(local) as second:
        second.save(1)
        first.checkpoints()
        first.verify()
    first.restore_latest()
    first.close()


def test_releasing_a_lock_that_was_replaced_leaves_the_new_owner_its_name(local):
    first, second = manager(local), manager(local)
    first.restore_latest()
    Path(local.url, ".checkpointer", "lock").unlink()
    with pytest.warns(CheckpointerWarning, match="has taken the run over"):
        second.restore_latest()
    first.close()
    assert owner_of(local) is not None
    with pytest.raises(RunLockedError, match=f"pid {os.getpid()}"):
        Repository(open_storage(local.url)).lock.acquire()
    second.save(1)
    second.close()


def test_a_lock_is_taken_and_freed_where_nobody_can_say_whose_it_is(local):
    """As on a disk that is full when a job starts, or read-only by the time it ends."""
    owner = Path(local.url, ".checkpointer", "owner.json")
    owner.mkdir(parents=True)  # neither written nor unlinked
    with CheckpointManager(local.url, config=SYNC, state={"value": 1}) as mgr:
        mgr.save(1)
        assert mgr._repository.lock.held
        with pytest.raises(RunLockedError):
            CheckpointManager(local.url, state={"value": 1}).restore_latest()
    assert owner.is_dir()
    with CheckpointManager(local.url, state={"value": 1}) as mgr:
        assert mgr.restore_latest().step == 1


def test_a_lock_whose_owner_has_not_said_who_it_is_is_still_a_lock(local):
    first = manager(local)
    first.restore_latest()
    for content in (None, "", "{", "[1]", "null"):
        place = Path(local.url, ".checkpointer", "owner.json")
        place.unlink(missing_ok=True)
        if content is not None:
            place.write_text(content)
        with pytest.raises(RunLockedError, match="has not said who it is"):
            Repository(open_storage(local.url)).lock.acquire()
    first.close()


def test_processes_that_ask_at_the_same_time_make_one_owner(local):
    os.makedirs(local.url)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_try_lock, [local.url] * 6, chunksize=1) == [1] * 6


def _try_lock(url: str) -> int:
    """Take and free the lock many times; returns how many owners a counter in the root has seen at once."""
    most = 1
    counter = Path(url, "owners")
    for _ in range(20):
        lock = WriterLock(url, os.path.join(url, ".checkpointer", "lock"))
        try:
            lock.acquire()
        except RunLockedError:
            continue
        try:
            descriptor = os.open(counter, os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            most = 2
        else:
            os.close(descriptor)
            counter.unlink()
        lock.release()
    return most


# --------------------------------------------------------------------------------------------- readers


def picture(folder: str) -> dict[str, tuple[int, int, int]]:
    """Mode, size and time of last change of everything below a folder."""
    found = {}
    for directory, folders, files in os.walk(folder):
        for name in (".", *folders, *files):
            path = os.path.join(directory, name)
            status = os.lstat(path)
            found[path] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def read_everything(root: Root) -> None:
    with manager(root, read_only=True) as reader:
        assert reader.restore_latest() is not None
        reader.restore(1)
        assert [info.step for info in reader.checkpoints()] == [1, 2]
        assert reader.latest() is not None
        assert reader.verify().ok
        reader.prune(dry_run=True)
        for forbidden in (lambda: reader.save(3), reader.prune):
            with pytest.raises(SaveError, match="read_only"):
                forbidden()


def test_a_reader_writes_nothing_and_is_not_kept_out_by_a_writer(local):
    with manager(local) as writer:
        writer.save(1)
        writer.save(2)
        writer._saver.wait()
        before = picture(local.url)
        read_everything(local)
        assert picture(local.url) == before


def test_a_reader_makes_no_run_root(local):
    with manager(local, read_only=True) as reader:
        for call in (reader.restore_latest, reader.checkpoints, reader.verify):
            with pytest.raises(CheckpointNotFoundError):
                call()
    assert not Path(local.url).exists()


READ_WHAT_CANNOT_BE_WRITTEN = """
import tests.integration.repository.test_lock as t
from tests.conftest import Root
t.read_everything(Root("local", url))
try:
    manager().restore_latest()
except Exception as error:
    say(type(error).__name__, error)
"""


def test_who_may_only_read_can_restore_and_is_told_what_to_do_when_it_wants_to_write(local):
    without_privileges: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and setpriv is not there to change that")
        without_privileges = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    with manager(local) as writer:
        writer.save(1)
        writer.save(2)
    for directory, _, files in os.walk(local.url, topdown=False):
        for name in files:
            os.chmod(os.path.join(directory, name), 0o444)
        os.chmod(directory, 0o555)
    before = picture(local.url)
    try:
        with running(READ_WHAT_CANNOT_BE_WRITTEN, local, without_privileges) as reader:
            said = line(reader)
        if "setpriv" in said or not said:
            pytest.skip("privileges cannot be dropped here")
        assert said.startswith("SaveError cannot lock")
        assert "read_only=True" in said
        assert picture(local.url) == before
    finally:
        for directory, _, _ in os.walk(local.url):
            os.chmod(directory, 0o755)


@pytest.fixture
def somebody_elses(tmp_path: Path) -> Callable[[int], Path]:
    """A run in a directory that its group may write, made under an umask by another user of this group."""
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    shared = tmp_path / "run"
    shared.mkdir()
    shared.chmod(0o775)

    def make(umask: int) -> Path:
        before = os.umask(umask)
        try:
            with CheckpointManager(shared, config=SYNC, state={"x": 1}) as mgr:
                mgr.save(1)
        finally:
            os.umask(before)
        for place in (shared, *shared.rglob("*")):
            os.chown(place, 65534, -1)
        return shared

    return make


def save_as_another_user(root: Path) -> None:
    with obeying_modes(), CheckpointManager(root, config=SYNC, state={"x": 1}) as mgr:
        mgr.save(2)


def test_the_lock_of_another_user_under_a_umask_of_022_is_refused_with_the_umask_and_its_place(somebody_elses):
    run = somebody_elses(0o022)
    private = run / ".checkpointer"
    with pytest.raises(SaveError) as caught:
        save_as_another_user(run)
    said = str(caught.value)
    assert "make the run root writable" not in said
    for advice in (f"share {private}", f"{private} belongs to user ", "'umask 002'", f"'chmod -R g+w {private}'"):
        assert advice in said
    assert "read_only=True" in said
    private.chmod(0o775)
    with pytest.raises(SaveError, match=f"{private / 'lock'} belongs to user "):
        save_as_another_user(run)
    run.chmod(0o600)  # nothing in it can be looked at
    with pytest.raises(SaveError, match="make the run root writable"):
        save_as_another_user(run)


def test_where_the_group_may_write_the_advice_is_to_join_it(somebody_elses):
    run = somebody_elses(0o002)
    for place in (run, *run.rglob("*")):
        os.chown(place, -1, 65534)
    with pytest.raises(
        SaveError, match=r"join its group: .*\.checkpointer belongs to user .*, and group 65534 may write"
    ):
        save_as_another_user(run)


def test_the_advice_about_the_umask_is_true(somebody_elses):
    run = somebody_elses(0o002)
    save_as_another_user(run)
    with CheckpointManager(run, read_only=True, state={"x": 1}) as reader:
        assert [info.step for info in reader.checkpoints()] == [1, 2]


# ------------------------------------------------------------------------------------------ object stores


def test_an_object_store_has_a_lock_among_the_processes_of_this_host_and_says_so_exactly_once(s3):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with manager(s3) as writer:
            writer.restore_latest()
            writer.save(1)
            writer.save(2)
            writer.restore_latest()
    assert len(warned) == 1
    assert warned[0].category is CheckpointerWarning
    assert "only jobs of this user on this host" in str(warned[0].message)


def test_memory_needs_no_warning(memory):
    with manager(memory) as writer:
        writer.restore_latest()
        writer.save(1)


def test_a_file_system_without_locks_falls_back_to_a_local_lock_and_says_so(local, monkeypatch):
    import errno
    import fcntl

    real = fcntl.flock

    def refuse(fd: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").startswith(local.url):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = manager(local), manager(local)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        first.restore_latest()
        first.save(1)
    assert ["no working OS locks" in str(item.message) for item in warned] == [True]
    assert not first._repository.lock.proven
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        with first, pytest.raises(RunLockedError):
            second.restore_latest()
        second.restore_latest()
        third = manager(local)
        third.restore_latest()
        third.save(2)
        third.close()
        second.close()


def test_the_lock_of_a_repository_is_held_by_no_reader(local):
    repository = Repository(open_storage(local.url))
    repository.list_checkpoints()
    assert not repository.lock.held
    assert not repository.lock.proven
