"""What users pass to the manager: converted where it means one thing, refused by name where it does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.config.arguments import (
    MAX_STEP,
    Extras,
    check_attachments,
    check_component_names,
    check_given,
    check_seconds,
    check_step,
    check_tags,
    read_attachments,
)
from checkpointer.errors import ConfigError


@given(st.integers(0, MAX_STEP - 1))
def test_a_step_is_a_whole_number_of_any_library(step: int) -> None:
    for value in (step, np.int64(step), torch.tensor(step)):
        found = check_step(value)
        assert (found, type(found)) == (step, int)


@pytest.mark.parametrize(
    "value",
    [-1, MAX_STEP, 10**40, True, False, 1.0, "1", None, [1], np.float32(1), torch.tensor(1.0), math.nan],
    ids=repr,
)
def test_what_is_no_step_is_refused_with_what_was_given(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_step(value, "epoch")
    assert str(caught.value).startswith("epoch must be an integer")
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [10**5000, -(10**400)], ids=["too long to print", "long"])
def test_a_number_without_end_is_refused_like_any_other(value: int) -> None:
    with pytest.raises(ConfigError, match="step must be an integer from 0 on"):
        check_step(value)
    with pytest.raises(ConfigError, match="interval must be a number of seconds"):
        check_seconds(value, "interval", least=0)


@given(st.integers(1, 10**6) | st.floats(0.5, 1e6))
def test_seconds_are_a_float_of_at_least_the_least(value: float) -> None:
    if value < 1:
        with pytest.raises(ConfigError, match=r"interval must be a number of seconds, 1 or more; got 0\."):
            check_seconds(value, "interval", least=1)
    else:
        assert check_seconds(value, "interval", least=1) == value


@pytest.mark.parametrize("value", [True, "5", None, math.nan, -math.inf, -1, [5]], ids=repr)
def test_what_is_no_number_of_seconds_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="interval must be a number of seconds, 0 or more; got "):
        check_seconds(value, "interval", least=0)


@given(st.lists(st.text(max_size=3)))
def test_tags_keep_their_order_and_come_once(tags: list[str]) -> None:
    found = check_tags(tags)
    assert sorted(found) == sorted(set(tags))
    assert [tags.index(tag) for tag in found] == sorted(tags.index(tag) for tag in found)
    assert check_tags(iter(tags)) == found


def test_no_tags_are_none():
    assert check_tags(None) == check_tags([]) == ()


@pytest.mark.parametrize("tags", ["best", "", ["a", 1], [None], [b"a"], 3, torch.nn.Linear], ids=repr)
def test_a_text_is_not_taken_for_a_sequence_of_tags(tags: Any) -> None:
    with pytest.raises(ConfigError, match="tags must be a sequence of strings, got "):
        check_tags(tags)


def test_attachments_are_bytes_or_the_content_of_a_file_at_this_moment(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"{}")
    changing = bytearray(b"now")
    found = read_attachments({"a": b"1", "b": changing, "c": memoryview(b"3"), "d": path, "deep/e": str(path)})
    path.write_bytes(b"later")
    changing[:] = b"???"
    assert found == {"a": b"1", "b": b"now", "c": b"3", "d": b"{}", "deep/e": b"{}"}
    assert all(type(content) is bytes for content in found.values())


def test_no_attachments_are_none():
    assert check_attachments(None) == read_attachments({}) == {}


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "", ".", "a\\b", "C:x", "a\0", 3, None], ids=repr)
def test_an_attachment_stays_inside_the_checkpoint(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"^files: not a file name inside a checkpoint"):
        check_attachments({name: b""})


@pytest.mark.parametrize(
    "files, message",
    [(["a"], "must be a mapping such as .*, got list"), ({"a": 3}, r"files\['a'\] must be bytes or a path, got int")],
)
def test_attachments_of_another_type_are_refused(files: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_attachments(files)


def test_a_file_that_is_not_there_is_the_error_that_opening_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_attachments({"a": tmp_path / "nowhere"})


def test_everything_beside_the_state_is_checked_in_one_call_that_reads_and_raises_nothing(tmp_path: Path) -> None:
    found = check_given({"loss": 1, "f1": None}, ["a", "a"], {"f": tmp_path / "later"})
    (tmp_path / "later").write_bytes(b"x")
    assert found.read(attachments=True) == Extras({"loss": 1.0}, ("a",), {"f": b"x"})
    assert found.read(attachments=False) == Extras({"loss": 1.0}, ("a",), {})


@pytest.mark.parametrize("wrong", [{"metrics": {"a": "1"}}, {"tags": "a"}, {"files": {"a": 3}}], ids=str)
def test_what_is_wrong_is_known_before_it_is_raised(wrong: dict[str, Any]) -> None:
    found = check_given(**{"metrics": None, "tags": (), "files": None, **wrong})
    assert isinstance(found.fault, ConfigError)
    with pytest.raises(ConfigError, match=next(iter(wrong))[:-1]):
        found.read(attachments=True)


def test_components_have_names_that_can_be_files():
    check_component_names(["model", "model2", "_ema", "Optimizer"], reserved=["rng"])


@pytest.mark.parametrize(
    "names, message",
    [
        (["my model"], "component 'my model' must be named with letters"),
        (["2nd"], "component '2nd' must be named with letters"),
        (["modèle"], "component 'modèle' must be named with letters"),
        ([""], "component '' must be named with letters"),
        (["a/b"], "component 'a/b' must be named"),
        (["model", "rng"], "component 'rng': this name is taken"),
        (["model", "EMA", "ema"], "components 'EMA' and 'ema' differ only in case"),
    ],
)
def test_a_name_that_two_file_systems_would_understand_differently_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_component_names(names, reserved=["rng"])
