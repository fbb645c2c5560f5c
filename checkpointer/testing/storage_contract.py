"""What a run root needs of a file system, as a suite of tests: see :class:`StorageContract`."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fsspec.spec import AbstractBufferedFile

from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.storage import Buffer, Entry, ReadFile, Storage, open_storage
from checkpointer.storage.remote import FsspecStorage
from checkpointer.testing.contract_run import Run, moment_of
from checkpointer.testing.faults import Fault

CAPABILITIES = ("append", "exclusive", "link", "lock", "rename")
"""What only some storages can do; see :class:`StorageContract`."""

LIMIT = 1 << 20
"""Bytes that the tests read of a small file at most."""

LARGE = 11 << 20
"""Bytes of a large file: most clients upload that in several parts, and all in several pieces."""

ODD_NAMES = (
    "with space", ".hidden", "名前-ä", "100%", "%20", "a+b", "a#b", "a?b", "a=b&c", "[ab]*", "{x}", "~", "a..b", "'",
)  # fmt: skip
"""Names that attached files may have, and that a URL, a shell or a pattern would read as something else."""


class StorageContract:
    """Every promise that checkpoints rely on, as a test: does *your* file system keep it?

    Whoever writes a file system for `fsspec`_, or runs a server that speaks a known protocol, makes a subclass whose
    name begins with ``Test``, says where an empty run root is, and runs pytest:

    ```python
    # test_storage.py
    import uuid

    import pytest

    from checkpointer.testing import StorageContract


    class TestMyFileSystem(StorageContract):
        capabilities = ("exclusive", "link")

        @pytest.fixture
        def run_root(self):
            return f"memory://{uuid.uuid4().hex}/run"       # your protocol; another, empty place for each test

        @pytest.fixture
        def storage_options(self):
            return {}                                       # what your users pass as storage_options=
    ```

    Both are ordinary fixtures: they may use others (``tmp_path``, a server), clean up after a ``yield``, and have
    parameters. State has to be shared by all instances of the file system, as it is by all clients of a server.

    ``capabilities`` are what only some storages can do. What is declared has to be true, and what is not declared has
    to be refused cleanly:

    ========= =======================================================================================================
    append    a file grows (the local file system)
    exclusive ``pipe_file(mode="create")`` has one winner, whoever races. Declared unless you say otherwise. Without it
              checkpoints are safe, but jobs that save to one run do not notice each other, and a warning says so
    link      one file becomes another without passing through this process: hard links, ``cp_file`` of S3, GCS, memory
    rename    a directory is renamed atomically (the local file system)
    lock      the run root holds a file that the operating system locks (the local file system)
    ========= =======================================================================================================

    The seam between checkpoints and file systems, ``checkpointer.storage.Storage``, is private and may change; a file
    system of fsspec is the way to add one. What the tests call goes through it, and so is exactly what a manager does.

    .. _fsspec: https://filesystem-spec.readthedocs.io
    """

    capabilities: ClassVar[Collection[str]] = ("exclusive",)

    pytestmark: ClassVar[list[pytest.MarkDecorator]] = [
        pytest.mark.filterwarnings("ignore:.*so only jobs of this user on this host:UserWarning"),
        pytest.mark.filterwarnings("ignore:.*does not honour conditional writes:UserWarning"),
    ]

    # --------------------------------------------------------------------------------------------- to be supplied

    @pytest.fixture
    def run_root(self) -> str:
        """A path or URL at which nothing exists; another one for each test. A subclass MUST supply it."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `run_root` that returns a path or a URL")

    @pytest.fixture
    def storage_options(self) -> Mapping[str, object]:
        """What is handed to fsspec with ``run_root``."""
        return {}

    def make_storage(self, run_root: str, storage_options: Mapping[str, object]) -> Storage:
        """Open the run root. Only this library's own storages have a reason to do it in another way."""
        return open_storage(run_root, storage_options)

    # -------------------------------------------------------------------------------------------------- fixtures

    @pytest.fixture
    def storage(self, run_root: str, storage_options: Mapping[str, object]) -> Storage:
        """The run root, opened."""
        return self.make_storage(run_root, storage_options)

    @pytest.fixture
    def second_client(self, run_root: str, storage_options: Mapping[str, object]) -> Storage:
        """The same run root, opened by a client that shares no cache with the first: so would another process."""
        return self.make_storage(run_root, {**storage_options, "skip_instance_cache": True})

    # -------------------------------------------------------------------------------------- what is read and written

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    def test_what_is_read_is_what_was_written(self, storage: Storage, second_client: Storage, size: int) -> None:
        data = os.urandom(size)
        pieces: list[Buffer] = [
            data[: size // 3],
            bytearray(data[size // 3 : size // 2]),
            memoryview(data)[size // 2 :],
        ]
        seconds = storage.write("a/b/c", iter(pieces), size)
        assert seconds >= 0
        for client in (storage, second_client):
            assert client.read("a/b/c", max(size, 1)) == data, f"{size} bytes were written"
            assert _whole(client, "a/b/c") == data, f"{size} bytes were written"

    def test_a_large_file_is_read_back_whole(self, storage: Storage, second_client: Storage) -> None:
        data = os.urandom(LARGE)
        storage.write("large", (data[start : start + (1 << 20)] for start in range(0, LARGE, 1 << 20)), LARGE)
        found = _whole(second_client, "large")
        assert len(found) == LARGE
        assert found == data, "the file has the right size and other bytes"

    def test_a_range_of_a_file_is_exactly_that_range(self, storage: Storage) -> None:
        data = os.urandom(100_000)
        _write(storage, "file", data)
        with _opened(storage, "file") as file:
            for start, end in ((0, 1), (0, 100_000), (1, 2), (99_999, 100_000), (12_345, 54_321), (7, 7)):
                view = bytearray(end - start)
                file.read_into(start, memoryview(view))
                assert view == data[start:end], f"the bytes from {start} to {end}"
            views = [bytearray(10), bytearray(0), bytearray(1000)]
            file.prefetch(500, 1010)
            file.read_many(500, [memoryview(view) for view in views])
            assert b"".join(views) == data[500:1510]

    def test_a_read_beyond_the_end_is_an_error(self, storage: Storage) -> None:
        _write(storage, "file", b"0123456789")
        with _opened(storage, "file") as file:
            for offset, length in ((7, 4), (10, 1), (100, 5)):
                _refused(OSError, file.read_into, offset, memoryview(bytearray(length)))

    def test_one_open_file_is_read_by_many_threads_at_once(self, storage: Storage) -> None:
        data = os.urandom(1 << 20)
        _write(storage, "file", data)
        with _opened(storage, "file") as file:

            def read(number: int) -> None:
                view = bytearray(1 << 16)
                for _ in range(5):
                    file.read_into(number << 17, memoryview(view))
                    assert view == data[number << 17 :][: len(view)], "bytes of another place were read"

            assert _in_threads(8, read) == [None] * 8

    def test_many_files_are_read_in_order_with_errors_in_their_places(self, storage: Storage) -> None:
        _write(storage, "a", b"1")
        _write(storage, "b", b"22")
        _write(storage, "empty", b"")
        _write(storage, "large", b"x" * 100)
        found = storage.read_many(["b", "missing", "large", "a", "empty"], 10)
        assert [found[0], found[3], found[4]] == [b"22", b"1", b""]
        assert isinstance(found[1], FileNotFoundError)
        assert isinstance(found[2], CorruptCheckpointError)
        assert storage.read_many([], 10) == []

    def test_a_file_that_has_its_stamp_still_is_the_file_that_was_read(self, storage: Storage) -> None:
        names = ["same", "changed", "replaced", "gone", "missing", "folder"]
        for name in (*names[:4], "folder/file"):
            _write(storage, name, b"12345678")
        time.sleep(0.1)
        before = storage.stamps(names)
        if before == [None] * 6:
            return  # only reading tells
        assert None not in before[:4]
        assert len(set(before[:4])) == 4, "two files have one stamp"
        assert before[4:] == [None, None]
        storage.remove("changed")
        _write(storage, "changed", b"87654321")
        storage.put("replaced", b"87654321")
        storage.remove("gone")
        time.sleep(0.1)
        after = storage.stamps(names)
        assert after[0] == before[0]
        assert after[3] is None
        assert None not in after[1:3]
        assert not {after[1], after[2]} & set(before), "a changed file has the stamp of another"
        assert storage.stamps([]) == []

    def test_a_file_larger_than_the_limit_is_refused(self, storage: Storage) -> None:
        _write(storage, "file", b"x" * 11)
        assert storage.read("file", 11) == b"x" * 11
        _refused(CorruptCheckpointError, storage.read, "file", 10)

    def test_a_write_of_another_size_than_announced_leaves_no_whole_file(self, storage: Storage) -> None:
        _refused(AssertionError, storage.write, "file", [b"abc"], 4)
        if storage.exists("file"):  # part of an attempt that failed, and that is never committed
            assert storage.read("file", LIMIT) in (b"", b"abc")

    def test_a_write_whose_source_fails_passes_the_error_on(self, storage: Storage) -> None:
        def pieces() -> Iterator[bytes]:
            yield b"x" * 1000
            raise ZeroDivisionError

        _refused((ZeroDivisionError, OSError), storage.write, "file", pieces(), 2000)
        if storage.exists("file"):
            assert len(storage.read("file", LIMIT)) <= 1000

    @pytest.mark.parametrize("path", ["file/below", "n" * 5000], ids=["below a file", "a name of 5,000 bytes"])
    def test_a_write_that_cannot_be_completed_is_an_error(self, storage: Storage, path: str) -> None:
        """Some can, and then the file is there; to say nothing and write nothing loses a checkpoint."""
        _write(storage, "file", b"mine")
        for write in (_write, _put):
            try:
                write(storage, path, b"data")
            except OSError:
                continue
            assert storage.read(path, LIMIT) == b"data", "the write returned as if it were done"
            storage.remove(path)
        assert storage.read("file", LIMIT) == b"mine"

    def test_an_upload_that_fails_as_the_file_is_closed_is_an_error(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Most clients send the last bytes only then, and a full disk or a lost connection shows only then."""

        def fail(*, final: bool = False) -> bool:
            raise OSError(errno.EIO, f"injected fault: the connection was lost, final={final}")

        def open_and_fail(*arguments: Any, **keywords: Any) -> Any:
            file = really_open(*arguments, **keywords)
            if not isinstance(file, AbstractBufferedFile):
                pytest.skip(f"{type(file).__name__} sends its bytes in a way of its own")
            setattr(file, "_upload_chunk", fail)  # noqa: B010 - the method that each client implements, for this file
            return file

        if not isinstance(storage, FsspecStorage):
            pytest.skip("no file system of fsspec")
        really_open = storage.fs.open
        with monkeypatch.context() as patch:
            patch.setattr(storage.fs, "open", open_and_fail)
            _refused(OSError, _write, storage, "file", b"x" * 1000)
        assert not storage.exists("file")

    # ------------------------------------------------------------------------------------------------- directories

    def test_what_does_not_exist_lists_as_empty(self, storage: Storage) -> None:
        assert storage.list_directory("") == []
        assert storage.list_directory("a/b") == []
        assert not storage.exists("a")

    def test_a_listing_names_files_and_directories_of_one_level(self, storage: Storage) -> None:
        _write(storage, "file", b"1")
        _write(storage, "directory/inner", b"1")
        _write(storage, "directory/deeper/inner", b"1")
        assert sorted(storage.list_directory("")) == [Entry("directory", True, False), Entry("file", False, True)]
        assert sorted(storage.list_directory("directory")) == [
            Entry("deeper", True, False),
            Entry("inner", False, True),
        ]

    def test_names_with_a_common_beginning_are_kept_apart(self, storage: Storage) -> None:
        for path in ("step/1", "step-1/a", "step-10/b", "step-100", "step.txt", "other/step-1/c"):
            _write(storage, path, path.encode())
        assert _names(storage, "step") == ["1"]
        assert _names(storage, "step-1") == ["a"]
        assert _names(storage, "") == ["other", "step", "step-1", "step-10", "step-100", "step.txt"]
        storage.remove("step-1/a")
        assert storage.remove_directory("step-1")
        assert _names(storage, "") == ["other", "step", "step-10", "step-100", "step.txt"]
        assert not storage.exists("step-1")
        assert storage.read("step-10/b", LIMIT) == b"step-10/b"
        _write(storage, "other/step", b"1")
        storage.remove("other/step")
        assert storage.read("other/step-1/c", LIMIT) == b"other/step-1/c"

    def test_a_deeply_nested_file_is_found_level_by_level(self, storage: Storage) -> None:
        parts = [f"level-{number}" for number in range(8)]
        _write(storage, "/".join(parts), b"1")
        for depth in range(len(parts)):
            assert _names(storage, "/".join(parts[:depth])) == [parts[depth]]

    def test_a_listing_of_a_hundred_names_is_complete(self, storage: Storage) -> None:
        names = sorted(f"file-{number}" for number in range(100))

        def write(number: int) -> None:
            for name in names[number::4]:
                storage.put(f"many/{name}", b"")

        assert _in_threads(4, write) == [None] * 4
        assert _names(storage, "many") == names

    def test_a_listing_follows_each_write_and_each_removal_at_once(self, storage: Storage) -> None:
        for number in range(3):
            _write(storage, f"a/{number}", b"1")
            assert _names(storage, "a") == [str(item) for item in range(number + 1)]
            assert storage.exists(f"a/{number}")
        for number in range(3):
            storage.remove(f"a/{number}")
            assert _names(storage, "a") == [str(item) for item in range(number + 1, 3)]
            assert not storage.exists(f"a/{number}")

    def test_nothing_is_answered_from_a_cache(self, storage: Storage, second_client: Storage) -> None:
        """Another process writes, replaces and removes what this client has looked at just before."""
        storage.put("a/first", b"1")
        storage.put("a/changed", b"before")
        assert _names(storage, "a") == ["changed", "first"]
        assert not storage.exists("a/second")
        assert storage.read("a/changed", LIMIT) == b"before"
        second_client.put("a/second", b"2")
        second_client.put("a/changed", b"afterwards")
        second_client.remove("a/first")
        assert _names(storage, "a") == ["changed", "second"]
        assert storage.exists("a/second")
        assert not storage.exists("a/first")
        assert storage.read("a/changed", LIMIT) == b"afterwards"
        assert _whole(storage, "a/changed") == b"afterwards"
        assert isinstance(storage.read_many(["a/first"], LIMIT)[0], FileNotFoundError)
        _refused(FileNotFoundError, storage.read, "a/first", LIMIT)

    @pytest.mark.parametrize("name", ODD_NAMES)
    def test_an_odd_name_is_a_name_like_any_other(self, storage: Storage, name: str) -> None:
        """It may be refused, as Windows refuses some; then no file of that name can be attached to a checkpoint."""
        if (error := _error_of(_write, storage, f"files/{name}/{name}", b"inner")) is not None:
            pytest.skip(f"it is refused: {error}")
        storage.put("files/a", b"another")
        assert _names(storage, "files") == sorted(["a", name])
        assert _names(storage, f"files/{name}") == [name]
        assert storage.read(f"files/{name}/{name}", LIMIT) == b"inner"
        assert storage.read_many([f"files/{name}/{name}"], LIMIT) == [b"inner"]
        storage.remove(f"files/{name}/{name}")
        assert not storage.exists(f"files/{name}/{name}")
        assert storage.read("files/a", LIMIT) == b"another"

    def test_only_an_empty_directory_is_removed(self, storage: Storage) -> None:
        _write(storage, "a/b", b"1")
        assert not storage.remove_directory("a")
        assert storage.read("a/b", LIMIT) == b"1"
        storage.remove("a/b")
        assert storage.remove_directory("a")
        assert not storage.exists("a")
        assert storage.remove_directory("a"), "it is gone, as asked"

    def test_a_directory_that_was_made_takes_files(self, storage: Storage) -> None:
        storage.make_directory("a/b")
        storage.make_directory("a/b")
        _write(storage, "a/b/c", b"1")
        assert storage.read("a/b/c", LIMIT) == b"1"

    # ------------------------------------------------------------------------------------------------------ errors

    @pytest.mark.parametrize("path", ["file", "there/other", "nowhere/file", "there/file/below"])
    def test_a_missing_file_is_file_not_found(self, storage: Storage, path: str) -> None:
        _write(storage, "there/file", b"1")
        kinds = (FileNotFoundError, CorruptCheckpointError) if path.endswith("below") else FileNotFoundError
        errors = [_error_of(storage.read, path, LIMIT), _error_of(storage.open, path)]
        if "link" in self.capabilities:
            errors.append(_error_of(storage.link, path, "target"))
        for error in errors:
            assert isinstance(error, kinds), f"{error!r}"
            assert error.errno == errno.ENOENT or isinstance(error, CorruptCheckpointError), f"{error!r} has no errno"
        assert not storage.exists(path)
        assert storage.age(path) is None
        assert not storage.exists("target")

    def test_a_directory_is_no_file(self, storage: Storage) -> None:
        _write(storage, "directory/file", b"1")
        _refused((CorruptCheckpointError, FileNotFoundError), storage.read, "directory", LIMIT)
        _refused((CorruptCheckpointError, FileNotFoundError), storage.open, "directory")
        found = storage.read_many(["directory", "directory/file"], LIMIT)
        assert isinstance(found[0], OSError)
        assert found[1] == b"1"

    def test_a_file_is_no_directory(self, storage: Storage) -> None:
        _write(storage, "file", b"1")
        assert storage.list_directory("file") == []
        storage.remove_directory("file")
        assert storage.read("file", LIMIT) == b"1"

    def test_removing_a_file_that_is_gone_is_no_error(self, storage: Storage, second_client: Storage) -> None:
        _write(storage, "a/b", b"1")
        second_client.remove("a/b")
        assert not storage.exists("a/b")
        storage.remove("a/b")
        storage.remove("nowhere/file")

    # ------------------------------------------------------------------------------- small files that decide something

    def test_put_creates_and_replaces(self, storage: Storage, second_client: Storage) -> None:
        for data in (b"first", b"2nd", b"", b"the third, and longer"):
            storage.put("a/b", data)
            assert storage.read("a/b", LIMIT) == data
            assert second_client.read("a/b", LIMIT) == data
            assert _names(storage, "a") == ["b"], "a file of the replacement is left"

    def test_a_reader_sees_a_put_whole_or_not_at_all(self, storage: Storage, second_client: Storage) -> None:
        versions = [bytes([number]) * 50_000 for number in range(1, 9)]
        storage.put("file", versions[0])
        done = threading.Event()
        torn: list[str] = []

        def read() -> None:
            while not done.is_set():
                try:
                    data = second_client.read("file", LIMIT)
                except OSError as error:
                    torn.append(repr(error))
                else:
                    if data not in versions:
                        torn.append(f"{len(data)} bytes of {sorted(set(data))}")

        reader = threading.Thread(target=read)
        reader.start()
        try:
            for data in versions:
                storage.put("file", data)
        finally:
            done.set()
            reader.join()
        assert torn == []

    def test_create_refuses_what_exists(self, storage: Storage, second_client: Storage) -> None:
        storage.create("a/b", b"first")
        for client in (storage, second_client):
            error = _error_of(client.create, "a/b", b"second")
            assert isinstance(error, FileExistsError), f"{error!r}"
            assert error.errno == errno.EEXIST, f"{error!r} has no errno"
        assert storage.read("a/b", LIMIT) == b"first"
        assert _names(storage, "a") == ["b"]

    def test_create_is_exclusive_exactly_where_that_is_declared(self, storage: Storage) -> None:
        if "exclusive" in self.capabilities:
            assert storage.exclusive, (
                f"{storage.url}: pipe_file(mode='create') replaces what exists, or looks first and writes then; mend "
                "it, or leave 'exclusive' out: then jobs that save to one run do not notice each other"
            )
        else:
            assert not storage.exclusive, f"{storage.url} can do it: add 'exclusive' to the capabilities"
        assert storage.list_directory(paths.TMP) == [], "the question has left a file"

    @pytest.mark.parametrize("attempt", range(3))
    def test_of_racing_creators_exactly_one_wins(
        self, run_root: str, storage_options: Mapping[str, object], attempt: int
    ) -> None:
        if "exclusive" not in self.capabilities:
            pytest.skip("create is not declared to be exclusive")
        clients = [self.make_storage(run_root, storage_options) for _ in range(4)]
        assert all(client.exclusive for client in clients)
        path = f"{attempt}/b"
        errors = _in_threads(4, lambda number: clients[number].create(path, f"creator {number}".encode()))
        winners = [number for number, error in enumerate(errors) if error is None]
        assert len(winners) == 1, errors
        assert [type(error) for error in errors if error is not None] == [FileExistsError] * 3
        assert clients[0].read(path, LIMIT) == f"creator {winners[0]}".encode()

    def test_replace_changes_only_what_holds_the_expected_bytes(self, storage: Storage, second_client: Storage) -> None:
        storage.put("file", b"first")
        storage.replace("file", b"second", b"first")
        assert second_client.read("file", LIMIT) == b"second"
        for expected in (b"first", b"other!", b"secon", b""):
            kinds = (FileExistsError, CorruptCheckpointError)
            _refused(kinds, second_client.replace, "file", b"third", expected)
        assert storage.read("file", LIMIT) == b"second"
        _refused(FileNotFoundError, storage.replace, "missing", b"third", b"first")
        assert not storage.exists("missing")

    def test_writers_of_different_files_do_not_disturb_each_other(
        self, storage: Storage, second_client: Storage
    ) -> None:
        def write(number: int) -> None:
            client = (storage, second_client)[number % 2]
            for item in range(3):
                _write(client, f"new/directory/{item}/{number}", f"{item} of {number}".encode() * 1000)

        assert _in_threads(6, write) == [None] * 6
        for item in range(3):
            assert _names(storage, f"new/directory/{item}") == list("012345")
            for number in range(6):
                assert storage.read(f"new/directory/{item}/{number}", LIMIT) == f"{item} of {number}".encode() * 1000

    # ------------------------------------------------------------------------------------- what only some storages can

    def test_every_capability_that_is_declared_is_known(self) -> None:
        assert set(self.capabilities) <= set(CAPABILITIES)

    def test_files_are_linked_exactly_where_that_is_declared(self, storage: Storage) -> None:
        _write(storage, "a/source", b"data")
        linked = storage.link("a/source", "b/deep/target")
        if "link" not in self.capabilities:
            assert not linked, f"{storage.url} can do it: add 'link' to the capabilities"
            assert not storage.exists("b/deep/target"), "`link` has answered no, and made a file all the same"
            return
        assert linked, f"{storage.url} does not link or copy files"
        _write(storage, "other", b"data")
        known = [storage.identity(path) for path in ("a/source", "b/deep/target", "other", "missing")]
        assert known[0] == known[1] or "rename" not in self.capabilities
        assert known[0] is None or known[2] not in known[:2], "two files of their own are taken for one"
        assert known[3] is None
        assert storage.read("b/deep/target", LIMIT) == b"data"
        storage.remove("a/source")
        assert storage.read("b/deep/target", LIMIT) == b"data", "the file went with the one that it was made of"
        assert storage.link("b/deep/target", "again")
        storage.remove("again")
        assert storage.read("b/deep/target", LIMIT) == b"data", "the file went with one that was made of it"

    def test_a_directory_is_not_linked(self, storage: Storage) -> None:
        _write(storage, "a/inner", b"1")
        error = _error_of(storage.link, "a", "target")
        expected = (CorruptCheckpointError, FileNotFoundError)
        assert isinstance(error, expected) if "link" in self.capabilities else error is None
        assert not storage.exists("target/inner")

    def test_directories_are_renamed_exactly_where_that_is_declared(self, storage: Storage) -> None:
        _write(storage, "old/a/b", b"1")
        _write(storage, "taken/c", b"2")
        assert storage.can_rename is ("rename" in self.capabilities)
        if not storage.can_rename:
            _refused((AssertionError, OSError), storage.rename, "old", "new")
            _refused((AssertionError, OSError), storage.exchange, "old", "taken")
        else:
            _refused(FileExistsError, storage.rename, "old", "taken")
            storage.rename("old", "new")
            assert not storage.exists("old")
            assert storage.read("new/a/b", LIMIT) == b"1"
            swapped = storage.exchange("new", "taken")
            assert storage.exists("new/c") is swapped
            assert storage.exists("taken/a/b") is swapped
            storage.rename("taken" if swapped else "new", "old")
        assert storage.read("old/a/b", LIMIT) == b"1"
        assert storage.read("new/c" if storage.exists("new/c") else "taken/c", LIMIT) == b"2"

    def test_files_grow_exactly_where_that_is_declared(self, storage: Storage, second_client: Storage) -> None:
        _write(storage, "a/file", b"one,")
        assert storage.can_append is ("append" in self.capabilities)
        if not storage.can_append:
            _refused((AssertionError, OSError), storage.append, "a/file", b"two")
            _refused((AssertionError, OSError), storage.append, "new/file", b"two")
            assert not storage.exists("new/file")
            assert storage.read("a/file", LIMIT) == b"one,"
            return
        for client in (storage, second_client):
            client.append("a/file", b"two,")
            client.append("new/directory/file", b"three,")
        assert storage.read("a/file", LIMIT) == b"one,two,two,"
        assert storage.read("new/directory/file", LIMIT) == b"three,three,"
        _refused(OSError, storage.append, "a", b"a directory does not grow")
        _refused(OSError, storage.append, "a/file/below", b"nor is a file one")

    def test_there_is_a_lock_file_exactly_where_that_is_declared(self, storage: Storage) -> None:
        assert (storage.lock_path is not None) is ("lock" in self.capabilities)
        if storage.lock_path is not None:
            storage.make_directory(paths.PRIVATE)
            assert os.path.isabs(storage.lock_path)
            assert Path(storage.lock_path).parent.is_dir()

    def test_names_are_made_durable_on_request(self, storage: Storage) -> None:
        _write(storage, "a/b/c", b"1")
        storage.sync("a/b", "a", "")
        assert storage.read("a/b/c", LIMIT) == b"1"

    def test_the_age_of_a_file_is_counted_in_seconds_from_its_last_change(self, storage: Storage) -> None:
        _write(storage, "a/b", b"1")
        age = storage.age("a/b")
        assert age is None or -60 < age < 600, "where the time of the last change is not known, there must be none"

    def test_free_space_is_a_number_of_bytes_or_unknown(self, storage: Storage) -> None:
        free = storage.free_bytes()
        assert free is None or free >= 0

    def test_what_humans_are_shown_holds_no_secret(
        self, storage: Storage, storage_options: Mapping[str, object]
    ) -> None:
        shown = [storage.url, storage.place(""), storage.place("a/b"), str(_error_of(storage.read, "a/b", LIMIT))]
        assert storage.place("a/b").replace("\\", "/").endswith("a/b")
        for name in ("secret", "password", "token"):
            secret = storage_options.get(name)
            if isinstance(secret, str) and len(secret) >= 12:  # "test" may stand anywhere
                assert not [text for text in shown if secret in text], f"the option {name!r} is shown"

    # ------------------------------------------------------------------------------------------------- end to end

    def test_a_manager_restores_every_bit_of_what_it_saved(
        self, run_root: str, storage_options: Mapping[str, object]
    ) -> None:
        run = Run(self.make_storage, run_root, storage_options)
        with run.manager(at=1) as manager:
            manager.save(1, metrics={"loss": 0.5}, files={"notes/odd name #1.txt": b"attached"})
        with run.manager(at=1) as manager:
            restored = manager.restore_latest()
            assert restored is not None
            run.train(2)
            manager.save(2)
            manager.wait()
            assert [info.step for info in manager.checkpoints()] == [1, 2]
            assert manager.verify().ok
        run.assert_restores(2)
        run.assert_restores(1, step=1)

    def test_a_checkpoint_that_is_replaced_is_the_new_one(
        self, run_root: str, storage_options: Mapping[str, object]
    ) -> None:
        run = Run(self.make_storage, run_root, storage_options)
        with run.manager(at=1) as manager:
            manager.save(5)
            run.train(2)
            manager.save(5, overwrite=True)
            manager.wait()
            assert [info.step for info in manager.checkpoints()] == [5]
            assert manager.verify().ok
        run.assert_restores(2)

    def test_a_checkpoint_that_is_pruned_is_gone_and_the_others_are_whole(
        self, run_root: str, storage_options: Mapping[str, object]
    ) -> None:
        run = Run(self.make_storage, run_root, storage_options)
        with run.manager(at=0, keep={"last": 2}) as manager:
            for step in (1, 2, 3, 4):
                run.train(step)
                manager.save(step)
        storage = self.make_storage(run_root, storage_options)
        left = [name for name in _names(storage, "") if name.startswith("checkpoint-")]
        assert left == ["checkpoint-3", "checkpoint-4"]
        run.assert_restores(3, step=3)
        run.assert_restores(4)

    def test_a_save_that_fails_leaves_the_one_before_and_the_next_one_works(
        self, run_root: str, storage_options: Mapping[str, object]
    ) -> None:
        run = Run(self.make_storage, run_root, storage_options)
        # For good: what tidies up after the save before may make room, and then the save tries once more.
        fault = Fault("short write", path="*.safetensors", forever=True)
        fault.end()
        with run.manager(fault, at=1) as manager:
            manager.save(1)
            fault.restart()
            run.train(2)
            _refused(CheckpointerError, manager.save, 2)
            assert fault.hits
            fault.end()
            assert [info.step for info in manager.checkpoints()] == [1]
            run.assert_restores(1)
            run.train(2)
            manager.save(2)
            assert manager.verify().ok
        run.assert_restores(2)

    @pytest.mark.parametrize("moment", ["while data is written", "between data and commit", "right after the commit"])
    def test_a_writer_that_is_killed_loses_no_checkpoint(
        self, run_root: str, storage_options: Mapping[str, object], moment: str
    ) -> None:
        """Killed: from one operation on, none reaches the storage any more."""
        rehearsal = Fault("EIO", at=1 << 30)
        Run(self.make_storage, f"{run_root}/rehearsal", storage_options).save_twice(rehearsal)
        at = moment_of(rehearsal.operations, moment)
        run = Run(self.make_storage, f"{run_root}/run", storage_options)
        killed = Fault("EIO", at=at, forever=True)
        with contextlib.suppress(CheckpointerError, OSError):
            run.save_twice(killed)
        assert killed.hits
        newest = 2 if moment == "right after the commit" else 1
        run.assert_restores(newest)
        with run.manager(at=0) as manager:
            assert manager.restore_latest() is not None
            run.train(3)
            manager.save(3)
            assert [info.step for info in manager.checkpoints()] == [*range(1, newest + 1), 3]
            assert manager.verify().ok
        run.assert_restores(3)


def _write(storage: Storage, path: str, data: bytes) -> None:
    storage.write(path, [data], len(data))


def _put(storage: Storage, path: str, data: bytes) -> None:
    storage.put(path, data)


def _names(storage: Storage, path: str) -> list[str]:
    return sorted(entry.name for entry in storage.list_directory(path))


@contextlib.contextmanager
def _opened(storage: Storage, path: str) -> Iterator[ReadFile]:
    file = storage.open(path)
    try:
        yield file
    finally:
        file.close()


def _whole(storage: Storage, path: str) -> bytes:
    """A file as checkpoints are read: opened, and then filled into memory."""
    with _opened(storage, path) as file:
        data = bytearray(file.size)
        file.read_into(0, memoryview(data))
        return bytes(data)


def _error_of(function: Callable[..., object], *arguments: object) -> OSError | None:
    """The error that a call raises, or ``None``."""
    try:
        function(*arguments)
    except OSError as error:
        return error
    return None


def _refused(
    kinds: type[BaseException] | tuple[type[BaseException], ...], function: Callable[..., object], *arguments: object
) -> None:
    """Fail unless the call raises one of these errors."""
    try:
        answer = function(*arguments)
    except kinds:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is not what was promised
        pytest.fail(f"{error!r} was raised, not {kinds}", pytrace=True)
    pytest.fail(f"nothing was raised, but {answer!r} answered; {kinds} was promised", pytrace=True)


def _in_threads(count: int, function: Callable[[int], object]) -> list[BaseException | None]:
    """What ``function`` raised, called with each number at the same time; ``None`` where it raised nothing."""
    errors: list[BaseException | None] = [None] * count
    barrier = threading.Barrier(count)

    def call(number: int) -> None:
        barrier.wait()
        try:
            function(number)
        except BaseException as error:  # noqa: BLE001 - the test compares whatever it is
            errors[number] = error

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
