"""The environment that ``scripts/test``, ``scripts/demo`` and ``scripts/bench`` run in: made once, then found again.

It lies in ``.venv`` of the repository, or where ``CHECKPOINTER_VENV`` says. A stamp in it names what it was made
for. While that stays the same nothing is installed; an environment without a stamp is half-made and is made
anew. A lock beside it keeps the runs that use it apart from the one that changes it.

Standard library only, and readable for Python 3.7: a Python that is too old still has to say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
STAMP = "checkpointer-stamp"
MARK = "made-by-checkpointer-scripts"
"""A folder without this file is somebody else's, and stays as it is."""

SLOW_IMPORTS = "hypothesis, mlxtend.data, moto.server, s3fs, torch._dynamo, transformers"

TORCH = "torch>=2.6"  # as in pyproject.toml
TORCH_WHEEL = "torch==2.13.0"  # pinned: a folder of wheels may hold a newer one that is built for CUDA
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""For programs that fork processes after they have imported torch: it must not have started threads."""

SEVERAL_PROCESSES = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
"""For programs that keep the cores busy by processes."""


class SetupError(Exception):
    """The environment cannot be made. The message says what to do."""


class Recipe(NamedTuple):
    """An environment beside the usual one, with other versions in it."""

    name: str
    base: str
    """The interpreter it is made from."""
    made_by: str
    """Asks for a new environment when it changes."""
    install: Callable[[str], None]
    """Fills the environment of the given Python."""


def exit_with(program: Callable[[Sequence[str]], int]) -> None:
    """Run ``program`` on the command line's arguments and leave with the status that it returns."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: child processes end too
    try:
        sys.exit(program(sys.argv[1:]))
    except SetupError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def runs(module: str, *, extra: str = "", options: Mapping[str, str] | None = None) -> Callable[[Sequence[str]], int]:
    """A program that is ``python -m module`` in the environment, from the root of the repository.

    ``options``: environment variables; they hold whatever the caller's say.
    """

    def program(arguments: Sequence[str]) -> int:
        with environment(extra) as python:
            return subprocess.call([python, "-m", module, *arguments], cwd=ROOT, env={**os.environ, **(options or {})})

    return program


@contextlib.contextmanager
def environment(extra: str = "", recipe: Recipe | None = None) -> Iterator[str]:
    """The Python of a complete environment, which nobody changes inside the ``with`` block.

    ``extra`` names one of pyproject.toml's that has to be there too; it is added where it is missing. ``recipe``: an
    environment of its own, whose folder has the recipe's name behind that of the usual one.
    """
    usual = Path(os.environ.get("CHECKPOINTER_VENV") or ROOT / ".venv").absolute()
    venv = usual if recipe is None else Path(f"{usual}-{recipe.name}")
    base = _find_interpreter() if recipe is None else recipe.base
    wanted = _stamp_for(base, recipe)
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{venv}.lock", "w", encoding="utf-8") as lock:
        _lock(lock.fileno(), exclusive=False)
        while any(_read_stamp(venv, part) != wanted for part in ("", extra)):
            _lock(lock.fileno(), exclusive=True)  # gives up the shared lock first: two runs can't wait for each other
            if _read_stamp(venv) != wanted:
                _set_up(venv, base, wanted, recipe.install if recipe else _install)
            if _read_stamp(venv, extra) != wanted:
                _add(venv, extra, wanted)
            _lock(lock.fileno(), exclusive=False)
        yield _python_of(venv)


def _find_interpreter() -> str:
    """A Python that is new enough: the running one, else the first on the PATH."""
    if sys.version_info >= OLDEST:
        return getattr(sys, "_base_executable", None) or sys.executable  # not the one of a venv that may be removed
    for name in (*(f"python3.{minor}" for minor in (13, 12, 11, 10, 14)), "python3", "python"):
        found = shutil.which(name)
        if found and version_of(found) >= OLDEST:
            return found
    running = ".".join(map(str, sys.version_info[:3]))
    raise SetupError(f"this is Python {running} and no Python 3.10 or newer is on the PATH; install one")


def version_of(python: str) -> tuple[int, ...]:
    """Version of an interpreter; empty if it is missing or does not start (shims of version managers often don't)."""
    ask = "import sys; print(*sys.version_info[:3])"
    try:
        answer = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ()
    return tuple(map(int, answer.stdout.split()))


def _stamp_for(base: str, recipe: Recipe | None) -> str:
    """First line: what asks for a new environment when it changes. Second line: what asks for another install."""
    version = sys.version_info[:3] if recipe is None and sys.version_info >= OLDEST else version_of(base)
    made_by = f"Python {'.'.join(map(str, version))}, _env.py {digest(__file__)}"
    if recipe:
        made_by = f"{made_by}, {recipe.made_by}"
    made_for = f"pyproject.toml {digest(ROOT / 'pyproject.toml')}"
    return f"{made_by}\n{made_for}"


def digest(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _read_stamp(venv: Path, extra: str = "") -> str | None:
    """What the environment was made for; ``None`` if it is missing, half-made, or its base Python is gone."""
    try:
        return _stamp_in(venv, extra).read_text(encoding="utf-8") if Path(_python_of(venv)).exists() else None
    except FileNotFoundError:
        return None


def _stamp_in(venv: Path, extra: str) -> Path:
    return venv / (f"{STAMP}-{extra}" if extra else STAMP)


def _python_of(venv: Path) -> str:
    return str(venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def _lock(descriptor: int, *, exclusive: bool) -> None:
    """Wait for the lock. Windows has no flock: there, two first runs at the same moment are not kept apart."""
    if sys.platform == "win32":
        return
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        print("waiting for another run that uses the same environment", flush=True)
        fcntl.flock(descriptor, kind)


def _set_up(venv: Path, base: str, wanted: str, install: Callable[[str], None]) -> None:
    """Make or update the environment; the stamp goes first and comes back last."""
    current = _read_stamp(venv)
    with contextlib.suppress(FileNotFoundError):
        (venv / STAMP).unlink()
    if current is not None and current.splitlines()[0] == wanted.splitlines()[0]:
        print(f"updating {venv}, because pyproject.toml has changed", flush=True)
    else:
        print(f"setting up {venv} (once; minutes on a slow network)", flush=True)
        _make_anew(venv, base)
    install(_python_of(venv))
    _write_stamp(venv, "", wanted)


def _write_stamp(venv: Path, extra: str, wanted: str) -> None:
    half_written = venv / f"{STAMP}.new"
    half_written.write_text(wanted, encoding="utf-8")
    half_written.replace(_stamp_in(venv, extra))


def _add(venv: Path, extra: str, wanted: str) -> None:
    """Install an extra, beside the very torch that is there."""
    python = _python_of(venv)
    installer = ["uv", "pip", "install", "--python", python] if _is_installed("uv", python) else ["pip", "install"]
    wheels = [f"{ROOT}[{extra}]", f"torch=={installed_version('torch', python)}"]
    step(f"what [{extra}] asks for", [python, "-m", *installer, "-e", *wheels])
    _write_stamp(venv, extra, wanted)


def _make_anew(venv: Path, base: str) -> None:
    if venv.exists() and any(venv.iterdir()) and not (venv / MARK).exists():
        raise SetupError(f"{venv} was not made by these scripts; move it away, or name another in CHECKPOINTER_VENV")
    venv.mkdir(exist_ok=True)
    (venv / MARK).touch()
    for entry in venv.iterdir():
        if entry.name != MARK:  # stays to the end, so that an interrupted removal can be resumed
            _remove(entry)
    try:
        step("virtual environment", [base, "-m", "venv", str(venv)])
    except SetupError as error:
        raise SetupError(f"{error}\n(on Debian and Ubuntu: apt install python3-venv)") from None


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _install(python: str) -> None:
    """Everything but torch from PyPI, and torch as a CPU build where there is one: CUDA's libraries are gigabytes."""
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    uv = [python, "-m", "uv", "pip", "install", "--python", python]
    try:
        step("uv", [*pip, "uv"])
        fast = uv
    except SetupError:
        print("   no uv to be had: going on with pip, which is slower", flush=True)
        fast = pip
    if not _is_installed("torch", python):
        step(
            "torch",
            [*pip, "--no-index", "--no-deps", TORCH_WHEEL],  # a configured folder of wheels; else fails at once
            [*fast, "--no-deps", "--index-url", TORCH_CPU_INDEX, TORCH],
            [*fast, TORCH],
        )
    step("checkpointer and its tools", [*fast, "-e", f"{ROOT}[dev]"])  # keeps the torch that is there
    _install_torchvision(python, pip, fast)
    if sys.dont_write_bytecode:  # then it is now, or for seconds at each start of each process
        step("bytecode", [python, "-c", f"import sys; sys.dont_write_bytecode = False; import {SLOW_IMPORTS}"])


def _install_torchvision(python: str, pip: Sequence[str], fast: Sequence[str]) -> None:
    """The torchvision that was made for this torch: each release names one, and the newest may ask for another.

    Asking for the installed torch by its whole version ("2.13.0+cpu") keeps it: no index holds another of that name.
    Where there is none (a torch built at night) only the tests that need it fail.
    """
    wanted = ["torchvision", f"torch=={installed_version('torch', python)}"]
    try:
        step(
            "torchvision",
            [*pip, "--no-index", *wanted],  # a configured folder of wheels; else fails at once
            [*fast, "--index-url", TORCH_CPU_INDEX, *wanted],
            [*fast, *wanted],  # its compiled operators may be for CUDA; the tests do without them
        )
    except SetupError as error:
        print(f"   {error}\n   going on: the tests with a torchvision model will fail", flush=True)


def _is_installed(distribution: str, python: str) -> bool:
    return bool(installed_version(distribution, python))


def installed_version(distribution: str, python: str) -> str:
    """Empty if it is not there."""
    ask = f"import importlib.metadata as m; print(m.version({distribution!r}))"
    answer = subprocess.run([python, "-c", ask], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return answer.stdout.decode().strip()


def step(what: str, *alternatives: Sequence[str]) -> None:
    """Run the first of the commands that succeeds; their output is shown only if none does."""
    print(f"   {what} …", end=" ", flush=True)
    begin = time.monotonic()
    outputs = []
    for command in alternatives:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=ROOT)
        if done.returncode == 0:
            print(f"{time.monotonic() - begin:.0f} s", flush=True)
            return
        outputs.append(f"$ {' '.join(command)}\n{done.stdout.decode(errors='replace')}")
    print("failed", flush=True)
    raise SetupError(f"cannot install {what}:\n" + "\n".join(outputs))
