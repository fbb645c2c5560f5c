"""Names inside a run root: read back as they were made, and never leading out of their directory."""

from __future__ import annotations

import ntpath
import posixpath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths

ids = st.text("0123456789abcdef", min_size=32, max_size=32)


@given(st.integers(0, 10**18), st.none() | ids)
def test_the_name_of_a_checkpoint_says_its_step_and_whether_it_is_the_second_name(step, id):
    name = paths.checkpoint_name(step, id)
    assert paths.parse_checkpoint_name(name) == step
    assert paths.is_second_name(name) is (id is not None)
    assert paths.check_relative(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-", "checkpoint-01", "checkpoint--1", "checkpoint-+1", "checkpoint-1 ", " checkpoint-1",
        "checkpoint-1\n", "checkpoint-1-", "checkpoint-1-0123456", "checkpoint-1-012345678", "checkpoint-1-ABCDEF01",
        "checkpoint-1-0123456g", "Checkpoint-1", "checkpoint-\u0661", "checkpoint-1/x", "checkpoint-" + "9" * 20, "",
    ],
)  # fmt: skip
def test_what_is_only_like_the_name_of_a_checkpoint_is_none(name):
    assert paths.parse_checkpoint_name(name) is None
    assert not paths.is_second_name(name)


@given(ids)
def test_an_id_is_32_lower_case_hexadecimal_digits(id):
    assert paths.is_id(id)
    assert not any(map(paths.is_id, (id[:-1], id + "0", f"{id}\n", id[:-1] + "G", id.encode(), None, 3)))


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "../x", "a/..", "a/../b", "a/./b", "/a", "a/", "a//b", "a\\b", "..\\x", "C:x", "C:\\x", "a:b",
        "a\0b", "a\nb", "\x1b[2J", "\ud800", "x" * 1025, None, 3, b"a", ["a"],
    ],
    ids=lambda path: repr(path)[:20],
)  # fmt: skip
def test_a_path_that_leaves_its_directory_on_some_system_is_refused(path: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="not a file name inside a checkpoint") as caught:
        paths.check_relative(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.text(st.sampled_from("ab./\\:\0 ~\u202e\xe9"), max_size=12) | st.text(max_size=12))
def test_whatever_path_is_accepted_stays_inside_on_every_system(path):
    try:
        accepted = paths.check_relative(path)
    except CorruptCheckpointError:
        return
    assert accepted == path
    assert posixpath.normpath(posixpath.join("/root", path)) == f"/root/{path}"
    assert ntpath.normpath(ntpath.join("R:\\root", path)).startswith("R:\\root\\")


@given(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), st.integers(0, 99999), st.integers(1, 20))
def test_files_of_different_components_ranks_and_shards_have_different_names(component, rank, shards):
    names = [paths.tensor_file(component, shard + 1, shards) for shard in range(shards)]
    names += [paths.rank_file(component, rank, shard + 1, shards) for shard in range(shards)]
    names += [paths.shard_index(component), paths.SHARED_TENSORS, paths.shared_tensors(rank, own=True)]
    own = [paths.shared_tensors(rank, own=False)] if rank else []  # that of rank 0 is SHARED_TENSORS
    names += [paths.INDEX, paths.MANIFEST, paths.rank_index(rank), *own]
    assert len({name.lower() for name in names}) == len(names)
    assert all(paths.check_relative(name) == name for name in names)


def test_the_parents_of_a_path_come_from_the_inside_out():
    assert list(paths.parents("a/b/c")) == ["a/b", "a"]
    assert list(paths.parents("a")) == []


@pytest.mark.parametrize(
    "name, kind",
    [
        (".DS_Store", "debris"), ("._.DS_Store", "debris"), ("._model.safetensors", "debris"), ("Thumbs.db", "debris"),
        ("THUMBS.DB", "debris"), ("desktop.ini", "debris"), ("Desktop.ini", "debris"),
        (".nfs000000000001a2b300000004", "open"), (".fuse_hidden0000000400000001", "open"), (".smbdeleteAAA1", "open"),
        (".ds_store", None), ("DS_Store", None), ("._", None), (".", None), (".model", None), ("_model", None),
        ("thumbs.db.txt", None), (".nfs", None), ("nfs0001", None), ("a._b", None), ("", None),
    ],
)  # fmt: skip
def test_what_a_system_leaves_is_known_by_its_name_wherever_it_lies(name: str, kind: str | None) -> None:
    assert paths.left_by_system(name) == kind
    assert paths.left_by_system(f"files/._inner/{name}") == kind
