"""Nothing that the package does to a file system escapes the recorder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.crash.power.engine import scratch
from tests.campaign.crash.power.recorder import Recorder
from tests.campaign.crash.power.scenarios import ROOT, SCENARIOS, prepare, record
from tests.campaign.crash.power.tracing import can_trace, changes, strace, traced

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the recorder reads /proc"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="pathlib of Python 3.10 keeps the functions that it calls"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a place."""
    with scratch() as name:
        yield Path(name)


@pytest.fixture
def tracer() -> None:
    """``strace``, or a skipped test."""
    reason = can_trace()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("tracer")
def test_strace_hears_nothing_below_the_root_that_the_record_lacks_and_the_other_way_round(folder, stride):
    names = list(SCENARIOS) if stride == 1 else ["save large files", "pin and annotate", "quarantine"]
    for name in names:
        (folder / name).mkdir()
        prepare(SCENARIOS[name], str(folder / name))
    for name, (recorded, heard) in traced(names, folder).items():
        assert len(recorded) >= 20, name
        assert recorded == heard, name


@pytest.mark.usefixtures("tracer")
def test_what_strace_hears_of_others_is_told_in_the_same_words(folder):
    (folder / "area").mkdir()
    made = "echo some > $A/a; mkdir $A/d; mv $A/a $A/d/b; ln $A/d/b $A/c; chmod 600 $A/c; truncate -s 2 $A/c; sync $A/c"
    script = f"A={folder}/area; {made}; rm $A/c $A/d/b; rmdir $A/d"
    trace = strace(["sh", "-c", script], folder / "log.txt")
    heard = list(changes(trace, str(folder / "area")))
    for said in (
        "open a", "write a 5", "mkdir d", "rename a -> d/b", "link c", "chmod c", "truncate c", "fsync c", "unlink c",
        "unlink d/b", "rmdir d",
    ):  # fmt: skip
        assert said in heard, (said, heard)


@pytest.mark.parametrize("name", ["overwrite", "save lazy", "save large files", "share with a copy", "quarantine"])
def test_the_operations_of_a_record_lead_to_what_lies_there_afterwards(folder, name):
    prepare(SCENARIOS[name], str(folder))
    run = record(SCENARIOS[name], str(folder))
    tree = run.tree()
    there = Recorder(str(folder), ROOT).record.tree()
    assert {path: tree.files.get(inode) for path, inode in tree.walk()} == {
        path: there.files.get(inode) for path, inode in there.walk()
    }
