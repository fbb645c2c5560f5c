"""The persistence model foresees what file systems do, and no more once fsync has returned."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.campaign.crash.power.persistence import Effort, cuts, fingerprint
from tests.campaign.crash.power.record import AREA, FSYNC, Change, File, Operation, Record, Tree

ALL = Effort(exhaustive=1 << 20, sample=0)
FOLDER, NEW = 1, 2

CREATE = Operation("create", changes=(Change(AREA, "a", NEW),))
WRITE = Operation("write", inode=NEW, data=b"n" * 1500)
SYNC_FILE = Operation(FSYNC, inode=NEW)
SYNC_AREA = Operation(FSYNC, inode=AREA)
SYNC_FOLDER = Operation(FSYNC, inode=FOLDER)
MOVE = Operation("rename", changes=(Change(FOLDER, "b", NEW), Change(AREA, "a", None)))


def left(*operations: Operation, effort: Effort = ALL) -> list[dict[str, bytes | None]]:
    """Every different state after all of the operations; ``None`` stands for a directory."""
    start = Tree({(AREA, "folder"): FOLDER}, {})
    (*_, last) = cuts(Record("", start, operations))
    found = {fingerprint(tree): tree for tree in last.states(effort, random.Random(0))}
    return [
        {path: tree.files[inode].data if inode in tree.files else None for path, inode in tree.walk()}
        for tree in found.values()
    ]


def holds(condition: Callable[[dict[str, bytes | None]], object], *operations: Operation) -> bool:
    return any(condition(state) for state in left(*operations))


def test_what_was_never_fsynced_is_there_empty_zeroed_cut_torn_stale_or_gone():
    found = left(CREATE, WRITE)
    contents = [state["a"] for state in found if "a" in state]
    assert {"folder": None} in found
    whole = b"n" * 1500
    for content in (whole, b"", bytes(1500), whole[:750], whole[:512] + bytes(988), bytes(512) + whole[512:]):
        assert content in contents
    assert any(len(content) == 1500 and not set(content) <= set(b"n\0") for content in contents)


def test_a_file_that_was_fsynced_is_whole_but_may_have_no_name():
    assert left(CREATE, WRITE, SYNC_FILE) == [{"a": b"n" * 1500, "folder": None}, {"folder": None}]


def test_a_name_that_was_fsynced_may_lead_to_an_empty_file():
    assert all("a" in state for state in left(CREATE, WRITE, SYNC_AREA))
    assert holds(lambda state: state["a"] == b"", CREATE, WRITE, SYNC_AREA)


def test_after_both_fsyncs_there_is_one_state():
    assert left(CREATE, WRITE, SYNC_FILE, SYNC_AREA) == [{"a": b"n" * 1500, "folder": None}]


def test_a_rename_is_sure_only_after_both_directories_are_fsynced_and_never_half_done():
    before = (CREATE, SYNC_AREA, SYNC_FILE, MOVE)
    places = [{"a": b"", "folder": None}, {"folder": None, "folder/b": b""}]
    for done in (before, (*before, SYNC_AREA), (*before, SYNC_FOLDER)):
        found = left(*done)
        assert len(found) == 2
        assert all(place in found for place in places)
    assert left(*before, SYNC_AREA, SYNC_FOLDER) == [places[1]]


def test_names_are_lost_in_any_order():
    second = Operation("create", changes=(Change(FOLDER, "z", 3),))
    names = {frozenset(state) for state in left(CREATE, second)}
    assert names == {
        frozenset({"folder"}),
        frozenset({"folder", "a"}),
        frozenset({"folder", "folder/z"}),
        frozenset({"folder", "a", "folder/z"}),
    }


def test_bytes_that_were_fsynced_survive_a_later_write_that_is_torn():
    more = Operation("write", inode=NEW, offset=1500, data=b"m" * 1500)
    for state in left(CREATE, WRITE, SYNC_FILE, SYNC_AREA, more, effort=Effort(exhaustive=0, sample=50)):
        content = state["a"]
        assert content is not None
        assert content[:1500] == b"n" * 1500


def test_a_mode_that_is_lost_takes_no_bytes_with_it():
    mode = Operation("chmod", inode=NEW, mode=0o444)
    assert left(CREATE, WRITE, SYNC_FILE, SYNC_AREA, mode) == [{"a": b"n" * 1500, "folder": None}]


def test_a_state_that_keeps_the_order_is_explained_and_one_with_foreign_bytes_is_not():
    run = Record("", Tree({(AREA, "folder"): FOLDER}, {}), (CREATE, WRITE))
    (*_, last) = cuts(run)
    names = {(AREA, "folder"): FOLDER, (AREA, "a"): NEW}
    assert last.explains(Tree(names, {NEW: File(b"n" * 512 + bytes(512))}))
    assert last.explains(Tree({(AREA, "folder"): FOLDER}, {}))
    assert not last.explains(Tree(names, {NEW: File(b"x" * 1500)}))
    assert not last.explains(Tree({(AREA, "a"): NEW}, {NEW: File()}))
