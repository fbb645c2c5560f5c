"""What a checkpoint was written with: recorded in the manifest, compared by a restore."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from checkpointer.format.index import Json
from checkpointer.system.host import host_name
from checkpointer.system.threads import room_for_a_thread
from checkpointer.version import __version__

logger = logging.getLogger("checkpointer")

GIT_TIMEOUT = 2.0
"""Seconds that git may take, in the background."""

PATIENCE = 0.1
"""Seconds that a save waits for git at most."""

MASK = "***"
MAX_ARGUMENT, MAX_ARGUMENTS = 500, 4096
"""Characters of one argument, and of all, that are recorded: the manifest has to stay small."""

_EXACT = {
    "torch": "another version of torch",
    "numpy": "another version of numpy",
    "platform": "another kind of machine",
    "devices": "other devices",
    "world_size": "another world size",
    "num_threads": "another number of CPU threads",
    "deterministic_algorithms": "another setting of torch.use_deterministic_algorithms",
    "float32_matmul_precision": "another float32 matmul precision",
    "cuda_matmul_tf32": "another setting of TF32 in CUDA matrix products",
    "cudnn_tf32": "another setting of TF32 in cuDNN",
    "cudnn_deterministic": "another setting of torch.backends.cudnn.deterministic",
}
"""What has to be the same for the same bits."""

_NOTED = {
    "checkpointer": "another version of checkpointer",
    "python": "another version of Python",
    "host": "another host",
    "git_commit": "another git commit",
    "argv": "another command line",
}
"""What is worth knowing, and changes no bit by itself."""


@dataclass(frozen=True)
class Differences:
    """How this process differs from the one that saved; each entry is a sentence."""

    exactness: tuple[str, ...]
    """What makes bit-identical continuation impossible here, or a matter of luck."""
    other: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Every sentence, the serious ones first."""
        return [*self.exactness, *self.other]


def environment() -> dict[str, Json]:
    """Versions, platform, host, devices, settings, command line and git commit of this process.

    What the system or torch refuses to tell is left out: that must not fail a save or a restore.
    """
    found: dict[str, Json] = {
        "checkpointer": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": f"{sys.platform}-{platform.machine()}",
        **_told({"host": host_name, "devices": lambda: list(_devices()), "world_size": _world_size}),
        **_told(_SETTINGS),
        "argv": list(command_line(getattr(sys, "argv", None) or ())),
    }
    commit = _git.result(PATIENCE)
    if commit is not None:
        found["git_commit"], found["git_dirty"] = commit
    return found


def differences(saved: Mapping[str, Json], live: Mapping[str, Json]) -> Differences:
    """Compare two environments. What one of them lacks is not compared."""
    exact = [_sentence(name, what, saved, live) for name, what in _EXACT.items() if _differs(name, saved, live)]
    other = [_sentence(name, what, saved, live) for name, what in _NOTED.items() if _differs(name, saved, live)]
    if live.get("cudnn_benchmark") is True and _on_gpu(live):
        exact.append("torch.backends.cudnn.benchmark is on, which chooses algorithms by their speed of the moment")
    return Differences(tuple(exact), tuple(other))


def begin_git_lookup() -> None:
    """Begin to ask git about the working directory, in the background, once a process."""
    _git.start()


def _differs(name: str, saved: Mapping[str, Json], live: Mapping[str, Json]) -> bool:
    if name not in saved or name not in live:
        return False
    before, now = saved[name], live[name]
    if name == "devices" and isinstance(before, list) and isinstance(now, list):
        return set(map(str, before)) != set(map(str, now))  # how many are visible does not matter
    if name == "num_threads":
        return before != now and not (_on_gpu(saved) and _on_gpu(live))
    return before != now


def _sentence(name: str, what: str, saved: Mapping[str, Json], live: Mapping[str, Json]) -> str:
    return f"{what}: saved with {_shown(saved[name])}, running with {_shown(live[name])}"


def _shown(value: Json) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _on_gpu(found: Mapping[str, Json]) -> bool:
    devices = found.get("devices")
    return isinstance(devices, list) and bool(devices) and "cpu" not in devices


def _world_size() -> int:
    """Processes that train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _devices() -> Iterator[str]:
    if torch.cuda.is_available():
        yield from (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    elif torch.backends.mps.is_available():
        yield "mps"
    else:
        yield "cpu"


_SETTINGS: Mapping[str, Callable[[], Json]] = {
    "num_threads": lambda: torch.get_num_threads(),  # noqa: PLW0108  # looked up when it is called
    "deterministic_algorithms": lambda: torch.are_deterministic_algorithms_enabled(),  # noqa: PLW0108  # looked up when it is called
    "float32_matmul_precision": lambda: torch.get_float32_matmul_precision(),  # noqa: PLW0108  # looked up when it is called
    "cuda_matmul_tf32": lambda: bool(torch.backends.cuda.matmul.allow_tf32),
    "cudnn_tf32": lambda: bool(torch.backends.cudnn.allow_tf32),
    "cudnn_deterministic": lambda: bool(torch.backends.cudnn.deterministic),
    "cudnn_benchmark": lambda: bool(torch.backends.cudnn.benchmark),
}
"""Settings of torch that decide which bits come out. Looked up when they are read: a build may lack one."""


def _told(readers: Mapping[str, Callable[[], Json]]) -> dict[str, Json]:
    """What the readers say, by name, without those that fail."""
    found: dict[str, Json] = {}
    for name, read in readers.items():
        try:
            found[name] = read()
        except Exception as error:  # noqa: BLE001  # of any kind: drivers, odd builds, mixed names for TF32
            logger.debug("the environment of a checkpoint is recorded without %s: %s", name, error)
    return found


# ------------------------------------------------------------------------------------------------- command line

_NAME = r"(?:token|key|keys|secrets?|password|passwd|passphrase|pwd|credentials?|auth|authorization)"
_WHOLE = re.compile(rf"(-{{0,2}}[\w.\-]*{_NAME})=.*", re.IGNORECASE | re.DOTALL)
_FLAG = re.compile(rf"--?[\w.\-]*{_NAME}", re.IGNORECASE)
_INSIDE = re.compile(rf"""((?<![\w.\-])[\w.\-]*{_NAME}["']?\s*[=:]\s*["']?)[^"'&,;\s}}]+""", re.IGNORECASE)
"""From the beginning of a word alone: to try each of its characters is slow where an argument is one long word."""
_USERINFO = re.compile(r"(\w://)[^/@\s]+@")
_KNOWN = re.compile(
    r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AKIA|ASIA|eyJ)[\w\-]{16,}(?:\.[\w\-]+)*", re.ASCII
)


def command_line(given: Iterable[object]) -> Iterator[str]:
    """The arguments, cut to a size that a manifest can hold, with ``***`` for what looks like a secret.

    Launchers and programs that embed Python put paths and numbers there, too.
    """
    left, hide = MAX_ARGUMENTS, False
    arguments = [_as_text(argument) for argument in given]
    for number, argument in enumerate(arguments):
        text = MASK if hide and not argument.startswith("--") else _masked(argument)
        hide = _FLAG.fullmatch(argument) is not None
        text = text.encode("utf-8", "backslashreplace").decode()  # arguments may hold bytes that are no text
        text = text if len(text) <= MAX_ARGUMENT else f"{text[:MAX_ARGUMENT]}…"
        if len(text) > left:
            yield f"… and {len(arguments) - number} more"
            return
        left -= len(text)
        yield text


def _as_text(argument: object) -> str:
    try:
        return str(argument)
    except Exception:  # noqa: BLE001  # its ``__str__`` is somebody else's
        return f"<{type(argument).__name__}>"


def _masked(argument: str) -> str:
    if whole := _WHOLE.fullmatch(argument):
        return f"{whole[1]}={MASK}"
    argument = _USERINFO.sub(rf"\1{MASK}@", argument)
    argument = _INSIDE.sub(rf"\1{MASK}", argument)
    return _KNOWN.sub(MASK, argument)


# ---------------------------------------------------------------------------------------------------------- git


class _Git:
    """Commit of the working directory, and whether tracked files were changed since."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._found: tuple[str, bool] | None = None
        self._guard = threading.Lock()
        self._pid = os.getpid()

    def start(self) -> None:
        """Ask in the background, once."""
        with self._guard:
            if self._thread is None and room_for_a_thread():
                thread = threading.Thread(target=self._ask, name="checkpointer-git", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be started: the next save asks
                    thread.start()
                    self._thread = thread

    def result(self, patience: float) -> tuple[str, bool] | None:
        """What git said; ``None`` where there is no git, no repository, or no answer yet."""
        self.start()
        if self._thread is not None and self._pid == os.getpid():  # a parent's thread cannot be waited for
            self._thread.join(patience)
        return self._found

    def _ask(self) -> None:
        self._found = git_commit(os.curdir)


_git = _Git()


def git_commit(directory: str) -> tuple[str, bool] | None:
    """Commit that ``directory`` is at, and whether tracked files differ from it. Runs no hook and takes no lock."""
    no_hooks = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    status = ["status", "--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty"]
    try:
        done = subprocess.run(  # noqa: S603
            ["git", "--no-optional-locks", *no_hooks, "-C", directory, *status],  # noqa: S607
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=GIT_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid ")), "")
    if re.fullmatch("[0-9a-f]{40,64}", commit) is None:  # "(initial)": nothing is committed
        return None
    return commit, any(line[:2] in ("1 ", "2 ", "u ") for line in lines)
