"""A file of tests that somebody else might have written, run by pytest in this process."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PLUGINS = (
    "anyio",
    "cacheprovider",
    "faulthandler",
    "hypothesispytest",
    "threadexception",
    "timeout",
    "unraisableexception",
    "xdist",
)
"""What this project's tests have and theirs need not. What a thread or a finalizer raises fails the outer test."""


@dataclass
class Outcomes:
    """What became of each test, by the part of its id that follows the file."""

    passed: set[str] = field(default_factory=set)
    skipped: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    """With what pytest shows of it."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest three times for each test."""
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.failed[name] = report.longreprtext
        elif report.skipped:
            self.skipped.add(name)
        elif report.when == "call":
            self.passed.add(name)


def run(directory: Path, text: str, *arguments: str, names: tuple[str, ...] = ()) -> Outcomes:
    """Run the tests of a file that holds ``text``; warnings are errors in it. ``names`` choose among them.

    In this process, and not by ``pytester``: that would forget all modules that are imported meanwhile, and parts of
    torch cannot be imported twice.
    """
    file = directory / f"test_{secrets.token_hex(4)}.py"
    file.write_text(text, encoding="utf-8")
    (directory / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    without = [argument for name in PLUGINS for argument in ("-p", f"no:{name}")]
    chosen = [f"{file}::{name}" for name in names] or [str(file)]
    outcomes = Outcomes()
    status = pytest.main(
        [
            *without,
            "-c",
            str(directory / "pytest.ini"),
            "-s",
            "-W",
            "error",
            "--import-mode=importlib",
            *arguments,
            *chosen,
        ],
        plugins=[outcomes],
    )
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return outcomes
