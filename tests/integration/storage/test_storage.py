"""What each storage promises beyond the contract that all of them keep (``test_contract.py``)."""

from __future__ import annotations

import errno
import gc
import logging
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerError, ConfigError, CorruptCheckpointError, SaveError
from checkpointer.format import paths
from checkpointer.storage import LocalStorage, Storage, open_storage
from checkpointer.storage import local as local_storage
from checkpointer.testing.storage_contract import ODD_NAMES
from tests.conftest import SECRET, Root, S3Server
from tests.support import training

LIMIT = 1 << 20


@pytest.fixture
def local_root(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "run")
    os.mkdir(storage.root)
    return storage


def write(storage: Storage, path: str, data: bytes) -> None:
    storage.write(path, [data], len(data))


# ------------------------------------------------------------------------------------- what all of ours know


def test_the_age_of_a_file_is_known(root):
    storage = open_storage(root.url, root.options)
    write(storage, "a/b", b"1")
    age = storage.age("a/b")
    assert age is not None
    assert -5 < age < 60


def test_an_odd_name_is_taken_by_all(root):
    storage = open_storage(root.url, root.options)
    for name in ODD_NAMES:
        write(storage, f"files/{name}", name.encode())
    assert sorted(entry.name for entry in storage.list_directory("files")) == sorted(ODD_NAMES)


# ------------------------------------------------------------------------------------------- uploads in parts


@pytest.fixture
def in_parts(s3: Root) -> Storage:
    """A run root whose client sends more than 5 MiB in several requests."""
    return open_storage(s3.url, {**s3.options, "default_block_size": 5 << 20})


def test_a_file_that_is_sent_in_parts_is_read_back_whole(in_parts):
    data = os.urandom(11 << 20)
    in_parts.write("big", (data[start : start + (1 << 20)] for start in range(0, len(data), 1 << 20)), len(data))
    assert in_parts.read("big", len(data)) == data


def test_a_write_in_parts_whose_source_fails_completes_no_object(in_parts):
    def pieces() -> Iterator[bytes]:
        yield b"x" * (6 << 20)
        raise ZeroDivisionError

    with pytest.raises((ZeroDivisionError, OSError)):
        in_parts.write("file", pieces(), 12 << 20)
    gc.collect()  # a finalizer of the client's would send what is left
    assert not in_parts.exists("file")


# --------------------------------------------------------------------------------------------------- opening


def test_an_unexpected_failure_of_the_client_is_an_os_error(s3_server):
    options = {**s3_server.options, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}, "max_attempts": 1}
    storage = open_storage("s3://nowhere/run", options)
    with pytest.raises(OSError):
        storage.put("file", b"1")
    for found in storage.read_many(["one", "two"], LIMIT):
        assert isinstance(found, OSError)


@pytest.mark.parametrize(
    "url, reason",
    [("", "path or a URL"), ("  ", "path or a URL"), ("a\0b", "path or a URL"), ("nosuch://host/x", "nosuch")],
)
def test_a_root_that_makes_no_sense_is_a_configuration_error(url, reason):
    with pytest.raises(ConfigError, match=reason):
        open_storage(url)


def test_file_urls_are_local_paths(tmp_path):
    for scheme in ("file", "local"):
        storage = open_storage(f"{scheme}://{tmp_path}/run")
        assert isinstance(storage, LocalStorage)
        assert storage.root == str(tmp_path / "run")


# --------------------------------------------------------------------------------------- local: what is read


def test_reads_follow_no_symbolic_link_below_the_root(local_root, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_bytes(b"secret")
    os.symlink(tmp_path / "outside" / "file", os.path.join(local_root.root, "link"))
    os.symlink(tmp_path / "outside", os.path.join(local_root.root, "directory"))
    for path in ("link", "directory/file", "directory"):
        with pytest.raises(CorruptCheckpointError):
            local_root.read(path, LIMIT)
        with pytest.raises(CorruptCheckpointError):
            local_root.open(path)
        assert isinstance(local_root.read_many([path], LIMIT)[0], CorruptCheckpointError)
    assert {entry.name: (entry.is_dir, entry.is_file) for entry in local_root.list_directory("")} == {
        "link": (False, False),
        "directory": (False, False),
    }


def test_listing_and_removing_follow_no_symbolic_link_below_the_root(local_root, tmp_path):
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "file").write_bytes(b"precious")
    (tmp_path / "outside" / "deep" / "file").write_bytes(b"precious")
    (tmp_path / "outside" / "empty").mkdir()
    os.symlink(tmp_path / "outside", os.path.join(local_root.root, "link"))
    assert local_root.list_directory("link") == []
    assert local_root.list_directory("link/deep") == []
    for path in ("link/file", "link/deep/file"):
        with pytest.raises(OSError):
            local_root.remove(path)
    assert not local_root.remove_directory("link/empty")
    assert not local_root.remove_directory("link")
    assert (tmp_path / "outside" / "file").read_bytes() == b"precious"
    assert (tmp_path / "outside" / "deep" / "file").read_bytes() == b"precious"
    assert (tmp_path / "outside" / "empty").is_dir()
    local_root.remove("link")  # the link itself is a file like any other
    assert not os.path.lexists(os.path.join(local_root.root, "link"))


def test_the_root_itself_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk", tmp_path / "run")
    storage = LocalStorage(tmp_path / "run")
    write(storage, "a/b", b"1")
    assert storage.read("a/b", LIMIT) == b"1"
    assert (tmp_path / "disk" / "a" / "b").read_bytes() == b"1"


@pytest.mark.timeout(20)
def test_a_pipe_or_socket_in_the_place_of_a_file_does_not_block(local_root, monkeypatch):
    os.mkfifo(os.path.join(local_root.root, "pipe"))
    monkeypatch.chdir(local_root.root)  # the path of a socket is limited to 107 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(CorruptCheckpointError):
                local_root.read(name, LIMIT)
            assert isinstance(local_root.read_many([name], LIMIT)[0], CorruptCheckpointError)


def test_a_write_never_replaces_an_existing_file_or_follows_a_link(local_root, tmp_path):
    write(local_root, "file", b"first")
    with pytest.raises(FileExistsError):
        write(local_root, "file", b"second")
    os.symlink(tmp_path / "target", os.path.join(local_root.root, "link"))
    with pytest.raises(FileExistsError):
        write(local_root, "link", b"second")
    assert local_root.read("file", LIMIT) == b"first"
    assert not (tmp_path / "target").exists()


# ---------------------------------------------------------------------------------------------------- links


def test_linked_files_are_one_file_that_nobody_writes_to(local_root):
    write(local_root, "source", b"data")
    assert local_root.link("source", "target")
    first, second = (os.stat(local_root.place(name)) for name in ("source", "target"))
    assert first.st_ino == second.st_ino
    assert first.st_mode & 0o222 == 0


def test_a_link_replaces_nothing(local_root):
    write(local_root, "source", b"data")
    write(local_root, "target", b"mine")
    with pytest.raises(FileExistsError):
        local_root.link("source", "target")
    assert local_root.read("target", LIMIT) == b"mine"


def test_links_follow_no_symbolic_link_below_the_root(local_root, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"secret")
    os.symlink(outside / "file", local_root.place("file"))
    os.symlink(outside, local_root.place("directory"))
    write(local_root, "source", b"data")
    for path in ("file", "directory/file"):
        with pytest.raises(CorruptCheckpointError):
            local_root.link(path, "target")
    with pytest.raises(CorruptCheckpointError):
        local_root.link("source", "directory/target")
    assert os.listdir(outside) == ["file"]
    assert not local_root.exists("target")
    assert (outside / "file").stat().st_mode & 0o200


@pytest.mark.parametrize("call", ["link", "fchmod"])
@pytest.mark.parametrize("code", ["EPERM", "EACCES", "EMLINK", "EXDEV", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"])
def test_where_the_file_system_has_no_links_the_answer_is_no(local_root, monkeypatch, call, code):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(getattr(errno, code), "refused")

    write(local_root, "source", b"data")
    monkeypatch.setattr(os, call, refuse)
    monkeypatch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, os.link})
    assert not local_root.link("source", "target")
    assert not local_root.exists("target")


def test_an_error_that_says_nothing_about_links_is_passed_on(local_root, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "broken")

    write(local_root, "source", b"data")
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "supports_dir_fd", {*os.supports_dir_fd, os.link})
    with pytest.raises(OSError, match="broken"):
        local_root.link("source", "target")


def test_without_directory_descriptors_there_are_no_links(local_root, monkeypatch):
    write(local_root, "source", b"data")
    monkeypatch.setattr(os, "supports_dir_fd", set())
    assert not local_root.link("source", "target")


def test_where_the_bytes_would_pass_through_this_process_nothing_is_copied(tmp_path):
    from fsspec.implementations.local import LocalFileSystem

    from checkpointer.storage.remote import FsspecStorage

    storage = FsspecStorage(LocalFileSystem(), str(tmp_path), f"other://{tmp_path}", {})
    write(storage, "source", b"data")
    assert not storage.link("source", "target")
    assert not storage.exists("target")


# ------------------------------------------------------------------------------- local: rename and exchange


@pytest.fixture(params=["renameat2", "plain rename"])
def without_flags(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Also on a system whose C library has no rename with flags."""
    if request.param == "plain rename":
        monkeypatch.setattr(local_storage, "_special_rename", lambda: None)
    return bool(request.param == "plain rename")


def test_a_directory_is_renamed_with_all_that_is_in_it(local_root, without_flags):
    write(local_root, "old/a", b"1")
    local_root.rename("old", "new")
    assert local_root.read("new/a", LIMIT) == b"1"
    assert not local_root.exists("old")


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory", "dangling link"])
def test_a_rename_onto_something_that_exists_is_refused(local_root, without_flags, kind):
    write(local_root, "old/a", b"1")
    place = os.path.join(local_root.root, "new")
    if kind == "file":
        Path(place).write_bytes(b"")
    elif kind == "dangling link":
        os.symlink("nowhere", place)
    else:
        os.mkdir(place)
        if kind == "directory":
            Path(place, "inner").write_bytes(b"")
    with pytest.raises(FileExistsError):
        local_root.rename("old", "new")
    assert local_root.read("old/a", LIMIT) == b"1"
    assert os.path.lexists(place)


def test_exchange_swaps_two_directories_or_does_nothing(local_root, without_flags):
    write(local_root, "a/file", b"a")
    write(local_root, "b/file", b"b")
    swapped = local_root.exchange("a", "b")
    assert swapped is not without_flags
    assert local_root.read("a/file", LIMIT) == (b"b" if swapped else b"a")
    assert local_root.read("b/file", LIMIT) == (b"a" if swapped else b"b")


def test_exchange_says_false_where_the_file_system_refuses_it(local_root, monkeypatch):
    import ctypes

    def refuse(old: bytes, new: bytes, flag: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(local_storage, "_special_rename", lambda: refuse)
    write(local_root, "a/file", b"a")
    write(local_root, "b/file", b"b")
    assert local_root.exchange("a", "b") is False
    local_root.rename("a", "c")
    assert local_root.read("c/file", LIMIT) == b"a"


# -------------------------------------------------------------------------------------------------- fsync


class Recorder:
    """Calls through to the system and notes what was made durable or renamed, in order."""

    def __init__(self, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._root = root
        fsync, flagged = os.fsync, local_storage._flagged_rename

        def record_fsync(fd: int) -> None:
            self.events.append(("fsync", self._name(os.readlink(f"/proc/self/fd/{fd}"))))
            fsync(fd)

        def record_rename(old: str, new: str, linux: int, macos: int) -> bool:
            self.events.append(("rename", f"{self._name(old)} -> {self._name(new)}"))
            return flagged(old, new, linux, macos)

        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(local_storage, "_flagged_rename", record_rename)

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self._root)


def save(root: str, steps: int = 1, **config: Any) -> None:
    components = training.at(steps, frozen=True).components
    settings = {"write": {"mode": "sync", **config}, "require_resume": False}
    with CheckpointManager(root, config=settings, **components) as manager:
        manager.save(steps, files={"notes/deep/a.txt": b"attached"})


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors come from /proc")
def test_a_commit_fsyncs_data_then_manifest_then_directories_bottom_up_then_renames_then_both_parents(
    tmp_path, monkeypatch
):
    root = str(tmp_path / "new" / "run")
    recorder = Recorder(root, monkeypatch)
    save(root)
    events = recorder.events
    commit = next(i for i, (kind, what) in enumerate(events) if kind == "rename" and what.endswith("-> checkpoint-1"))
    attempt = events[commit][1].partition(" -> ")[0]
    synced = [what for kind, what in events[:commit] if kind == "fsync"]
    committed = Path(root, "checkpoint-1")
    files = sorted(str(path.relative_to(committed)) for path in committed.rglob("*") if path.is_file())
    assert "model-00001-of-00002.safetensors" in files  # every kind of file is there
    assert "files/notes/deep/a.txt" in files
    inside = [os.path.relpath(what, attempt) for what in synced if f"{what}/".startswith(f"{attempt}/")]
    last = {name: len(inside) - 1 - inside[::-1].index(name) for name in set(inside)}
    assert set(files) <= set(last)
    manifest = last.pop("manifest.json")
    directories = ["files/notes/deep", "files/notes", "files", "."]
    assert all(last[name] < manifest for name in files if name != "manifest.json")
    assert [last[name] for name in directories] == sorted(last[name] for name in directories)
    assert all(last[name] > manifest for name in directories)
    assert [what for kind, what in events[commit + 1 : commit + 3] if kind == "fsync"] == [".", ".checkpointer/tmp"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors come from /proc")
def test_new_directories_above_the_root_are_made_durable_too(tmp_path, monkeypatch):
    recorder = Recorder(str(tmp_path), monkeypatch)
    save(str(tmp_path / "a" / "b" / "run"))
    synced = {what for kind, what in recorder.events if kind == "fsync"}
    assert {".", "a", "a/b", "a/b/run"} <= synced


def test_a_directory_whose_name_could_not_be_made_durable_is_not_there_the_next_time(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path / "run")
    fsync = os.fsync

    def broken(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path)):
            raise OSError(errno.EIO, "the disk is broken")
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="the disk is broken"):
            storage.make_directory("a/b")
    assert not (tmp_path / "run").exists()
    recorder = Recorder(str(tmp_path), monkeypatch)
    storage.make_directory("a/b")
    assert [what for kind, what in recorder.events if kind == "fsync"] == [".", "run", "run/a"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors come from /proc")
def test_the_name_of_a_directory_that_a_dead_process_may_have_made_is_made_durable_once(tmp_path, monkeypatch):
    (tmp_path / "run" / "a").mkdir(parents=True)
    storage = LocalStorage(tmp_path / "run")
    recorder = Recorder(str(tmp_path), monkeypatch)
    storage.make_directory("a")
    assert [what for kind, what in recorder.events if kind == "fsync"] == ["run"]
    storage.make_directory("a")
    assert len(recorder.events) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors come from /proc")
def test_a_removal_makes_the_rename_to_the_trash_durable_before_anything_is_deleted(tmp_path, monkeypatch):
    root = str(tmp_path / "run")
    save(root, 1)
    save(root, 2)
    recorder = Recorder(root, monkeypatch)
    unlink = os.unlink

    def record_unlink(path: Any, **options: Any) -> None:
        recorder.events.append(("unlink", os.path.basename(os.fspath(path))))
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", record_unlink)
    with CheckpointManager(root, config={"keep": {"last": 1}}) as manager:
        assert [info.step for info, _ in manager.prune().remove] == [1]
    renamed = next(i for i, (kind, what) in enumerate(recorder.events) if kind == "rename" and "trash" in what)
    deleted = next(i for i, (kind, what) in enumerate(recorder.events) if kind == "unlink" and "safetensors" in what)
    between = [what for kind, what in recorder.events[renamed:deleted] if kind == "fsync"]
    assert {".", ".checkpointer/trash"} <= set(between)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("durable", [True, False])
def test_the_kernel_is_asked_to_fsync_every_file_unless_durable_is_false(tmp_path, durable):
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from checkpointer.storage import LocalStorage\n"
        f"storage = LocalStorage(sys.argv[1], durable={durable})\n"
        "storage.write('a/file', [b'1'], 1); storage.put('b', b'2'); storage.create('c', b'3'); storage.sync('', 'a')\n"
    )
    log = tmp_path / "log"
    command = ["strace", "-f", "-y", "-e", "trace=fsync,fdatasync", "-o", str(log), sys.executable, "-c", program]
    traced = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, check=False)
    if "ptrace" in traced.stderr:
        pytest.skip("this system does not allow tracing")
    assert traced.returncode == 0, traced.stderr
    calls = [line for line in log.read_text().splitlines() if "sync(" in line and str(tmp_path) in line]
    if not durable:
        assert calls == []
        return
    for name in ("/run/a/file>", "/run/.b.", "/run/.c.", "/run/a>", "/run>"):
        assert any(name in call and call.endswith("= 0") for call in calls), (name, calls)


def test_nothing_is_fsynced_where_durable_is_false(tmp_path, monkeypatch):
    recorder = Recorder(str(tmp_path), monkeypatch)
    save(str(tmp_path / "run"), durable=False)
    assert [what for kind, what in recorder.events if kind == "fsync"] == []


@pytest.mark.parametrize("target", ["file", "directory"])
def test_a_failed_fsync_fails_the_save_and_is_not_tried_again(tmp_path, monkeypatch, target):
    root = str(tmp_path / "run")
    save(root, 1)
    fsync = os.fsync
    failed: list[str] = []

    def fail_once(fd: int) -> None:
        place = os.readlink(f"/proc/self/fd/{fd}")
        wanted = place.endswith("model-00001-of-00002.safetensors") if target == "file" else place.endswith("/files")
        if wanted:
            failed.append(place)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", fail_once)
    components = training.at(2, frozen=True).components
    settings = {"write": {"mode": "sync"}, "require_resume": False}
    with CheckpointManager(root, config=settings, **components) as manager:
        with pytest.raises(SaveError, match="step 2"):
            manager.save(2, files={"a": b"1"})
        assert [info.step for info in manager.checkpoints()] == [1]
        monkeypatch.setattr(os, "fsync", fsync)
        manager.save(2, files={"a": b"1"})
        assert [info.step for info in manager.checkpoints()] == [1, 2]
        assert manager.verify().ok
    assert len(failed) == len(set(failed))


# ------------------------------------------------------------------------------------------------ secrets


def everything_below(client: Any, server: S3Server, bucket: str) -> bytes:
    bodies = [client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in server.keys(bucket)]
    return b"".join([*bodies, *map(str.encode, server.keys(bucket))])


def test_no_secret_reaches_a_checkpoint_an_error_or_a_log_record(s3, s3_server, caplog, capsys):
    caplog.set_level(logging.DEBUG, logger="checkpointer")
    components = training.at(1).components
    errors: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with CheckpointManager(s3.url, storage_options=s3.options, **components) as manager:
            handle = manager.save(1, metrics={"loss": 1.0})
            assert handle is not None
            info = handle.result()
            manager.annotate(1, note="fine")
            texts = [repr(manager), repr(info), str(manager.verify()), repr(handle), info.path]
            with pytest.raises(CheckpointerError) as missing:
                manager.restore(7)
            errors.append(repr(missing.value))
        bad = f"s3://no-such-bucket-{os.getpid()}/run"
        with CheckpointManager(bad, storage_options=s3.options, **components) as manager:
            pending = manager.save(1)
            assert pending is not None
            failure = pending.error()
            assert failure is not None
            errors.append(_with_causes(failure))
            with pytest.raises(SaveError):
                manager.wait()
    assert "no-such-bucket" in errors[-1]
    assert not [name for name in s3_server.buckets() if name.startswith("no-such")]
    bucket = s3.url.removeprefix("s3://").partition("/")[0]
    stored = everything_below(s3_server.client(), s3_server, bucket)
    assert b'"steps"' in stored
    captured = capsys.readouterr()
    logged = [record.getMessage() + str(record.exc_text) for record in caplog.records if record.name == "checkpointer"]
    shown = [*texts, *errors, *logged, *(str(warning.message) for warning in warned), captured.out, captured.err]
    for secret in (SECRET, s3.options["key"]):
        assert not [text for text in shown if secret in text]
        assert secret.encode() not in stored


def _with_causes(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ if isinstance(error, CheckpointerError) and error.__cause__ is None else None
    return "\n".join(parts)


@pytest.mark.parametrize(
    "url, plain",
    [
        ("s3://user:hunter22@bucket/run?token=hunter23#x", "s3://bucket/run"),
        ("simplecache::s3://user:hunter22@bucket/run", "simplecache::s3://bucket/run"),
        ("sftp://user:p@ss@host:2222/run", "sftp://host:2222/run"),
        ("memory://run", "memory://run"),
    ],
)
def test_a_url_is_shown_without_its_credentials(url, plain):
    from checkpointer.storage.redact import without_credentials

    assert without_credentials(url) == plain


def test_secrets_of_options_and_urls_are_struck_from_text():
    from fsspec.implementations.memory import MemoryFileSystem

    from checkpointer.storage.remote import FsspecStorage

    nested = {"password": "hunter33", "region": "eu"}
    options = {"secret": "hunter22", "nested": nested, "key": "AKIA99", "endpoint": "e1"}
    storage = FsspecStorage(MemoryFileSystem(), "/x", "memory://me:hunter44@x?sig=hunter55", options)
    text = storage.redact("hunter22 hunter33 AKIA99 hunter44 sig=hunter55 eu e1")
    assert text == "*** *** *** *** *** eu e1"
    assert "hunter" not in storage.url + storage.place("a/b") + storage.place(paths.MANIFEST)


def test_an_unknown_option_is_an_error_without_the_secret():
    with pytest.raises((ConfigError, OSError, TypeError)) as raised:
        open_storage("s3://bucket/run", {"secret": SECRET, "client_kwargs": {"endpoint_url": 7}}).put("a", b"1")
    assert SECRET not in _with_causes(raised.value)


# ------------------------------------------------------------------------------- stores that do less


def test_a_store_that_ignores_the_condition_is_found_out(memory, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    honest: Callable[..., Any] = MemoryFileSystem.pipe_file

    def careless(self: Any, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> Any:
        return honest(self, path, value, **options)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", careless)
    storage = open_storage(memory.url)
    assert not storage.exclusive
    storage.create("a", b"1")
    with pytest.raises(FileExistsError):
        storage.create("a", b"2")
    assert [entry.name for entry in storage.list_directory(paths.TMP)] == []
