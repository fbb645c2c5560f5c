"""New processes that need not import torch first: forks of one that has imported it, and has done nothing else.

Importing torch, and what an optimizer imports when it is made, takes seconds in every process. The processes made here
are real: forked from a server that never trained, with memory, descriptors, arguments, environment and working
directory of their own, and ended by the interpreter in its ordinary way. Use ``subprocess`` where the start itself is
tested, where the environment must be there from the start (``PYTHONPATH``), or where hashes must be seeded anew.

A program, too: ``python -m tests.support.processes DESCRIPTOR`` is the server.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from typing_extensions import Self

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST = 1 << 17
"""Bytes of one request."""


# ----------------------------------------------------------------------------------------------- what tests use


class Process:
    """A running program: as much of ``subprocess.Popen`` as tests need. Its text pipes are ``stdin`` and ``stdout``."""

    def __init__(self, arguments: Sequence[str], *, cwd: str | Path = REPOSITORY, env: Any = None) -> None:
        self.args = list(arguments)
        (theirs_in, ours_in), (ours_out, theirs_out) = os.pipe(), os.pipe()
        with open(theirs_in, "rb"), open(theirs_out, "wb"):
            self.pid, self._status = _begin(arguments, cwd, env, (theirs_in, theirs_out, 2))
        self.stdin: IO[str] = os.fdopen(ours_in, "w", encoding="utf-8")
        self.stdout: IO[str] = os.fdopen(ours_out, encoding="utf-8")
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status; ``None`` while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, as ``subprocess`` gives it: negative for a signal."""
        if self.returncode is None:
            self.returncode = _status(self._status, self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, *, timeout: float | None = None) -> tuple[str, None]:
        """What it still says, once it has ended."""
        self.stdin.close()
        said = self.stdout.read()
        self.wait(timeout)
        self.stdout.close()
        return said, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        for pipe in (self.stdin, self.stdout):  # a surviving child may hold the other end: nothing to wait for
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def run(
    arguments: Sequence[str],
    *,
    cwd: str | Path = REPOSITORY,
    env: Any = None,
    timeout: float = 150,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with ``capture_output`` and ``text``; ``arguments`` are ``[sys.executable, "-c", …]``."""
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid, status = _begin(arguments, cwd, env, (nothing.fileno(), out.fileno(), err.fileno()))
        try:
            code = _status(status, arguments, timeout)
        except subprocess.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)
            raise
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    if check and code:
        raise AssertionError(f"the process ended with {code}:\n{said[0]}{said[1]}")
    return subprocess.CompletedProcess(list(arguments), code, *said)


def _begin(arguments: Sequence[str], cwd: str | Path, env: Any, descriptors: tuple[int, int, int]) -> tuple[int, int]:
    """The process, and the descriptor on which its exit status will come."""
    assert arguments[0] == sys.executable, arguments
    environment = dict(os.environ if env is None else env)
    request = json.dumps({"arguments": list(arguments[1:]), "cwd": str(cwd), "env": environment}).encode()
    assert len(request) < LONGEST
    ours, theirs = os.pipe()
    with open(theirs, "wb"):
        channel = _server()
        socket.send_fds(channel, [request], [*descriptors, theirs])
        (pid,) = struct.unpack("i", channel.recv(4))
    return pid, ours


def _status(descriptor: int, arguments: Sequence[str], timeout: float | None) -> int:
    if not select.select([descriptor], [], [], timeout)[0]:
        raise subprocess.TimeoutExpired(list(arguments), timeout or 0)
    with open(descriptor, "rb") as file:
        return int(struct.unpack("i", file.read())[0])


@functools.cache
def _server() -> socket.socket:
    """The connection to the server of this process, which starts with the first request."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.processes", str(theirs.fileno())]
    server = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd=REPOSITORY)
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


# --------------------------------------------------------------------------------------------------- the server


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request, and tell how the children ended. Returns in each child, and in the server at its end."""
    ended, waker = os.pipe()
    for end in (ended, waker):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    statuses: dict[int, int] = {}
    sources: list[Any] = [channel, ended]
    while True:
        ready = select.select(sources, [], [])[0]
        if ended in ready:
            os.read(ended, 4096)
            _tell_statuses(statuses)
        if channel in ready:
            request, descriptors, _, _ = socket.recv_fds(channel, LONGEST, 4)
            if not request:
                return None
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number, descriptor in enumerate(descriptors[:3]):
                    os.dup2(descriptor, number)
                for descriptor in (*descriptors, *statuses.values(), ended, waker):
                    os.close(descriptor)
                channel.close()
                return dict(json.loads(request))
            statuses[pid] = descriptors[3]
            for descriptor in descriptors[:3]:
                os.close(descriptor)
            channel.send(struct.pack("i", pid))


def _tell_statuses(statuses: dict[int, int]) -> None:
    """Pass on how children have ended to whoever may still want to know."""
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with open(statuses.pop(pid), "wb") as file, contextlib.suppress(BrokenPipeError):
            file.write(struct.pack("i", os.waitstatus_to_exitcode(status)))
            file.flush()


def _become(request: dict[str, Any]) -> list[str]:
    """Make this process what was asked for; the rest of the command line, after the options of the interpreter."""
    import numpy as np
    import torch

    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "TZ" in os.environ:
        time.tzset()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    np.random.seed()  # as in a new process; Python's own generator does so by itself
    torch.seed()
    arguments: list[str] = request["arguments"]
    warnings.resetwarnings()
    while arguments[0] == "-W":
        warnings.simplefilter(arguments[1])  # type: ignore[arg-type]
        arguments = arguments[2:]
    return arguments


def _execute(kind: str, *rest: str) -> None:
    """As the interpreter does: ``-c CODE …``, ``-m MODULE …`` or ``FILE …``."""
    if kind == "-m":
        sys.argv[:] = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv[:] = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = [kind, *rest]
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    import s3fs  # noqa: F401
    import torch._dynamo  # noqa: F401  # what making the first optimizer imports

    import checkpointer.manager  # noqa: F401

    gc.collect()
    gc.freeze()  # else each child copies the pages of all these objects when it looks for garbage
    asked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if asked is not None:
        _execute(*_become(asked))
