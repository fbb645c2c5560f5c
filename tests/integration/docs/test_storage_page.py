"""The suites of docs/storage.md, and of the docstring of StorageContract, are run as they stand there."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from checkpointer.testing import StorageContract
from checkpointer.testing.storage_contract import CAPABILITIES
from tests.conftest import S3Server
from tests.support import suites

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "storage.md").read_text("utf-8")


def block(text: str, name: str) -> str:
    return text.partition(f"```python{name}\n")[2].partition("\n```")[0]


def test_the_suite_for_a_file_system_of_ones_own_passes_as_it_stands_on_the_page(tmp_path):
    found = suites.run(tmp_path, block(PAGE, " mine"), "-k", "not (large or odd_name or killed)")
    assert found.failed == {}
    assert len(found.passed) > 40


def test_the_suite_for_a_server_passes_and_leaves_nothing_in_the_bucket(
    tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_server.new_bucket()
    monkeypatch.setenv("ACCESS_KEY", s3_server.options["key"])
    monkeypatch.setenv("SECRET_KEY", s3_server.options["secret"])
    monkeypatch.setenv("ENDPOINT", s3_server.endpoint)
    monkeypatch.setenv("BUCKET", bucket)
    found = suites.run(tmp_path, block(PAGE, " server"), "-k", "declared or replaced")
    assert found.failed == {}
    assert len(found.passed) >= 5
    assert s3_server.keys(bucket) == []


def test_the_example_of_the_class_passes_as_it_stands_in_its_docstring(tmp_path):
    suite = block(inspect.cleandoc(str(StorageContract.__doc__)), "")
    found = suites.run(tmp_path, suite, "-k", "declared or replaced")
    assert found.failed == {}
    assert len(found.passed) >= 5


def test_the_page_names_every_capability_and_tells_no_other():
    table = PAGE.partition("| capability |")[2].partition("\n\n")[0]
    told = {line.split("`")[1] for line in table.splitlines() if line.startswith("| `")}
    assert told == set(CAPABILITIES)
