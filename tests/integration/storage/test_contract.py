"""Every storage of this library keeps the contract, and the contract finds those that do not."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from checkpointer.storage import Storage, open_storage
from checkpointer.storage.remote import FsspecStorage
from checkpointer.testing import StorageContract
from tests.conftest import Root
from tests.support import file_systems, processes, suites


class TestLocal(StorageContract):
    capabilities = ("append", "exclusive", "link", "lock", "rename")

    @pytest.fixture
    def run_root(self, local: Root) -> str:
        return local.url


class TestNotDurable(TestLocal):
    def make_storage(self, run_root: str, storage_options: Mapping[str, object]) -> Storage:
        return open_storage(run_root, storage_options, durable=False)


class TestMemory(StorageContract):
    capabilities = ("exclusive", "link")

    @pytest.fixture
    def run_root(self, memory: Root) -> str:
        return memory.url


class TestRealDirectories(StorageContract):
    """A file system of fsspec whose directories are real, as on SFTP or SMB: the local one, as if it were remote."""

    capabilities = ()
    test_a_reader_sees_a_put_whole_or_not_at_all = None  # this one opens the file, which empties it, and then writes

    @pytest.fixture
    def run_root(self, tmp_path: Path) -> str:
        return str(tmp_path / "run")

    def make_storage(self, run_root: str, storage_options: Mapping[str, object]) -> Storage:
        return FsspecStorage(LocalFileSystem(), run_root, f"other://{run_root}", storage_options)


class TestS3(StorageContract):
    capabilities = ("exclusive", "link")

    @pytest.fixture
    def run_root(self, s3: Root) -> str:
        return s3.url

    @pytest.fixture
    def storage_options(self, s3: Root) -> dict[str, Any]:
        return s3.options


# ------------------------------------------------------------------------------------------- what is written by others

MISTAKES = {
    file_systems.IgnoresRanges: "a_range_of_a_file_is_exactly_that_range",
    file_systems.OverwritesOnCreate: "create_is_exclusive_exactly_where_that_is_declared",
    file_systems.CreatesByItsOwnView: "create_refuses_what_exists",
    file_systems.CachesListings: "nothing_is_answered_from_a_cache",
    file_systems.LosesErrorsAtClose: "an_upload_that_fails_as_the_file_is_closed_is_an_error",
    file_systems.LosesErrorsOfTheServer: "a_write_that_cannot_be_completed_is_an_error[a name of 5,000 bytes]",
    file_systems.Truncates: "a_large_file_is_read_back_whole",
    file_systems.ReplacesInTwoSteps: "a_reader_sees_a_put_whole_or_not_at_all",
    file_systems.RemovesByPrefix: "names_with_a_common_beginning_are_kept_apart",
    file_systems.MissingIsEmpty: "a_missing_file_is_file_not_found[file]",
    file_systems.UnquotesNames: "an_odd_name_is_a_name_like_any_other[%20]",
    file_systems.RoundsSizes: "what_is_read_is_what_was_written[1]",
}
"""A file system with one mistake, and the test of the contract that says which."""


THEIR_TESTS = """
import uuid
import pytest
from checkpointer.testing import StorageContract

class Theirs(StorageContract):
    @pytest.fixture
    def run_root(self):
        return f"{self.protocol}://{uuid.uuid4().hex}/run"
"""


def theirs(kinds: Iterable[type[file_systems.Honest]]) -> str:
    """The file of tests that the authors of these file systems have written."""
    classes = [f"class Test{kind.__name__}(Theirs):\n    protocol = {kind.protocol!r}\n" for kind in kinds]
    return "\n".join([THEIR_TESTS, *classes])


def test_a_file_system_that_somebody_wrote_well_keeps_the_contract(tmp_path):
    found = suites.run(tmp_path, theirs([file_systems.Honest]))
    assert found.failed == {}
    assert found.skipped == set()
    assert {f"TestHonest::test_{name}" for name in MISTAKES.values()} <= found.passed


def test_the_contract_names_the_mistake_of_each_file_system_that_has_one(tmp_path):
    wanted = [f"Test{kind.__name__}::test_{name}" for kind, name in MISTAKES.items()]
    found = suites.run(tmp_path, theirs(MISTAKES), names=tuple(wanted))
    assert found.passed == set()
    assert found.failed.keys() == set(wanted)


def test_what_a_file_system_cannot_do_and_does_not_declare_is_no_mistake(tmp_path):
    text = theirs([file_systems.OverwritesOnCreate]) + "    capabilities = ()\n"
    found = suites.run(tmp_path, text, "-k", "create or declared or replaced or racing")
    assert found.failed == {}
    assert found.skipped == {f"TestOverwritesOnCreate::test_of_racing_creators_exactly_one_wins[{n}]" for n in range(3)}


def test_what_a_file_system_can_do_and_does_not_declare_is_a_failure_that_says_what_to_do(tmp_path):
    text = theirs([file_systems.Honest]) + "    capabilities = ()\n"
    (shown,) = suites.run(tmp_path, text, "-k", "declared").failed.values()
    assert "can do it: add 'exclusive' to the capabilities" in shown


def test_a_subclass_without_a_run_root_is_told_what_is_missing(tmp_path):
    text = "from checkpointer.testing import StorageContract\nclass TestMine(StorageContract):\n    pass\n"
    (shown,) = suites.run(tmp_path, text, "-k", "free_space").failed.values()
    assert "TestMine needs a fixture `run_root` that returns a path or a URL" in shown


def test_whoever_tests_a_loop_and_no_file_system_needs_no_pytest():
    program = (
        "import sys, checkpointer.testing as testing; assert 'pytest' not in sys.modules\n"
        "assert 'StorageContract' in testing.__all__; assert not hasattr(testing, 'Contract')\n"
    )
    processes.run([sys.executable, "-c", program], check=True)


def test_the_assertions_of_the_contract_show_values_as_those_of_a_test_file_do():
    for name in ("storage_contract", "contract_run"):
        assert "@pytest_ar" in vars(sys.modules[f"checkpointer.testing.{name}"])
