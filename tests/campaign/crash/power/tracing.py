"""The same run, heard by ``strace`` from outside: what a recorder has missed shows here.

A program, too: ``python -m tests.campaign.crash.power.tracing OUTPUT FOLDER SCENARIO…`` carries scenarios out,
recorded, whose beginnings lie in folders of their names below ``FOLDER``, and writes what the recorders
heard to ``OUTPUT``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[4]

_LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+|0x[0-9a-f]+|\?)")
_UNFINISHED = re.compile(r"(?P<pid>\d+) +(?P<begin>.*) <unfinished \.\.\.>$")
_RESUMED = re.compile(r"(?P<pid>\d+) +<\.\.\. \w+ resumed>(?P<rest>.*)$")
_FD = re.compile(r"(?:AT_FDCWD|\d+)<(?P<path>[^>]*)>")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')

_KINDS = {
    "open": "open", "openat": "open", "openat2": "open", "creat": "open", "write": "write", "pwrite64": "write",
    "fsync": "fsync", "fdatasync": "fsync", "mkdir": "mkdir", "mkdirat": "mkdir", "rename": "rename",
    "renameat": "rename", "renameat2": "rename", "link": "link", "linkat": "link", "unlink": "unlink",
    "unlinkat": "unlink", "rmdir": "rmdir", "chmod": "chmod", "fchmod": "chmod", "fchmodat": "chmod",
    "ftruncate": "truncate", "truncate": "truncate", "fallocate": "fallocate",
}  # fmt: skip
"""What a recorder hears, by the name of the system call."""

_HARMLESS = frozenset({
    "read", "pread64", "readv", "preadv", "preadv2", "lseek", "close", "stat", "fstat", "lstat", "newfstatat", "statx",
    "access", "faccessat", "faccessat2", "readlink", "readlinkat", "getdents64", "getdents", "statfs", "fstatfs",
    "fcntl", "flock", "ioctl", "fadvise64", "chdir", "getcwd", "execve", "dup", "dup2", "dup3", "readahead", "fchdir",
    "sync_file_range", "getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr", "epoll_ctl",
    "select", "pselect6", "inotify_add_watch",
})  # fmt: skip
"""Calls that change neither bytes nor names nor what is durable."""

_OPEN = r"O_(CREAT|TRUNC|WRONLY|RDWR)"
_WRITING = {"open": _OPEN, "openat": _OPEN, "mmap": r"PROT_WRITE.*MAP_SHARED"}
"""Calls that do so only with some arguments."""


def can_trace() -> str | None:
    """Why ``strace`` cannot be used here; ``None`` if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    tried = subprocess.run(["strace", "-e", "trace=none", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()[:200]}"


def traced(scenarios: Sequence[str], folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """What the recorder, and what ``strace``, heard of one run of each scenario, begun in a folder of its name."""
    heard = folder / "heard.json"
    program = [sys.executable, "-m", "tests.campaign.crash.power.tracing", str(heard), str(folder), *scenarios]
    trace = strace(program, folder / "strace.txt")
    recorded = json.loads(heard.read_text())
    return {name: (recorded[name], list(changes(trace, str(folder / name)))) for name in scenarios}


def strace(program: Sequence[str], log: Path) -> list[str]:
    """Every call that has to do with files, by a program and the threads and processes that it starts."""
    options = ["-f", "--seccomp-bpf", "-y", "-s", "1", "-e", "trace=file,desc", "-e", "signal=none", "-o", str(log)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(["strace", *options, *program], cwd=REPOSITORY, env=alone, check=True)
    return log.read_text(errors="replace").splitlines()


def changes(trace: list[str], area: str) -> Iterator[str]:
    """Every call that could have changed something below ``area`` and succeeded, in the words of a recorder."""
    for line in _whole_lines(trace):
        match = _LINE.match(line)
        if match is None or match["result"].startswith("-") or area not in line:
            continue
        call, arguments = match["call"], match["arguments"]
        if call in _HARMLESS or (call in _WRITING and not re.search(_WRITING[call], arguments)):
            continue
        places = (path for path in _paths(call, arguments) if path == area or path.startswith(area + os.sep))
        paths = [os.path.relpath(path, area) for path in places]
        if paths:
            yield _described(call, arguments, paths, match["result"])


def _described(call: str, arguments: str, paths: list[str], result: str) -> str:
    kind = _KINDS.get(call, call)  # an unknown one is in no record, and so shows
    if call == "unlinkat" and "AT_REMOVEDIR" in arguments:
        kind = "rmdir"
    if "RENAME_EXCHANGE" in arguments:
        kind = "exchange"
    if kind in ("rename", "exchange"):
        return f"{kind} {paths[0]} -> {paths[1]}"
    if kind == "link":
        return f"{kind} {paths[1]}"
    return f"{kind} {paths[0]}" + (f" {result}" if kind == "write" else "")


def _paths(call: str, arguments: str) -> Iterator[str]:
    """Whole paths of what a call is about, in the order of its arguments."""
    strings = [] if call in ("write", "pwrite64") else _STRING.findall(arguments)
    if not strings:
        yield from (match["path"] for match in _FD.finditer(arguments))
        return
    directory = os.sep
    for match in re.finditer(rf"{_FD.pattern}|{_STRING.pattern}", arguments):
        if match["path"] is not None:
            directory = match["path"]
        else:
            yield os.path.normpath(os.path.join(directory, match[2]))


def _whole_lines(trace: list[str]) -> Iterator[str]:
    """The lines of a trace, in the order in which the calls ended; those cut in two put together."""
    begun: dict[str, str] = {}
    for line in trace:
        if unfinished := _UNFINISHED.match(line):
            begun[unfinished["pid"]] = unfinished["begin"]
        elif resumed := _RESUMED.match(line):
            yield f"{resumed['pid']} {begun.pop(resumed['pid'], '')}{resumed['rest']}"
        else:
            yield line


def main() -> None:
    import torch

    from tests.campaign.crash.power.recorder import Recorder
    from tests.campaign.crash.power.scenarios import ROOT, SCENARIOS, record

    output, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    heard = {}
    for name in names:
        recorder = Recorder(os.path.join(folder, name), ROOT)
        record(SCENARIOS[name], recorder.area, recorder=recorder)
        heard[name] = recorder.calls
    Path(output).write_text(json.dumps(heard))


if __name__ == "__main__":
    main()
