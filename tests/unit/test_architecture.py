"""The folder listing is the architecture: imports go one way between its rooms, and importing costs next to nothing.

A room is a folder of the package, or one of the modules beside them. ARCHITECTURE.md shows the same listing.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "checkpointer"

ROOMS = {
    "errors": "",
    "version": "",
    "system": "errors",
    "format": "errors system",
    "policy": "errors format",
    "storage": "errors system format",
    "config": "errors format policy",
    "repository": "errors system format policy storage",
    "compare": "errors format storage repository",
    "cli": "errors version format policy storage config repository compare",
    "__main__": "cli",
    "environment": "version system format",
    "state": "errors system format",
    "staging": "errors system format policy state",
    "distributed": "errors system format storage repository state staging",
    "save": "errors system format policy storage config repository state staging distributed",
    "restore": "errors system format policy storage repository environment state distributed",
    "manager": "errors system format policy storage config repository environment state staging distributed save"
    " restore",
    "retention": "policy",
    "data": "errors system format state",
    "dcp": "errors format storage repository environment state staging distributed save",
    "migration": "errors version format policy storage config repository state staging distributed save",
    "testing": "errors format storage state manager",
}
"""Each room, from the bottom up, and the rooms that it imports: no others, and all of these."""

TORCH = frozenset({"torch", "numpy"})
INPUT_OUTPUT = frozenset({
    "ctypes", "fcntl", "filelock", "fsspec", "glob", "io", "mmap", "multiprocessing", "os", "pathlib", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "urllib",
})  # fmt: skip
FILE_SYSTEMS = frozenset({"filelock", "fsspec"})
FORBIDDEN = {
    **dict.fromkeys(("errors", "version", "policy"), TORCH | INPUT_OUTPUT),
    "format": INPUT_OUTPUT | {"torch"},  # tables are read and checked as arrays
    **dict.fromkeys(("storage", "repository", "cli"), TORCH),
    "config": TORCH | FILE_SYSTEMS,
    "state": FILE_SYSTEMS,
    "staging": FILE_SYSTEMS,
}
"""Packages that a room must not import: decisions do no I/O, storage knows no torch, state knows no storage."""
EXCEPTIONS = {
    ("policy.schedule", "signal"): "the names of signals are checked; no handler is set",
}


@dataclass
class Imports:
    """What one module imports: of this package by module, of others by top-level name."""

    own: set[str] = field(default_factory=set)
    typing_only: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(_name(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def _path(name: str) -> Path:
    base = PACKAGE.joinpath(*name.split("."))
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _room(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def imports_of(name: str) -> Imports:
    """Everything that the module imports at its top, inside functions, and for type checkers alone."""
    found = Imports()
    tree = ast.parse(_path(name).read_text("utf-8"))
    hidden = {id(node) for block in _typing_blocks(tree) for node in ast.walk(block)}
    for node in ast.walk(tree):
        for imported in _imported(node):
            if imported.partition(".")[0] != "checkpointer":
                found.others.add(imported.partition(".")[0])
            else:
                (found.typing_only if id(node) in hidden else found.own).add(_own(imported))
    found.own.discard("")
    return found


def _typing_blocks(tree: ast.AST) -> Iterator[ast.If]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield node


def _imported(node: ast.AST) -> Iterator[str]:
    """Dotted names; ``from a import b`` gives ``a.b``, of which ``b`` may be no module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute, so that they can be read and moved"
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own(dotted: str) -> str:
    """The module of this package that a dotted name is, or is in."""
    name = dotted.partition(".")[2]
    while name and not _path(name).is_file():
        name = name.rpartition(".")[0]
    return name


def test_each_room_imports_the_rooms_that_the_listing_says_and_no_others():
    for room, allowed in ROOMS.items():
        members = [name for name in MODULES if _room(name) == room]
        used = {_room(item) for name in members for item in imports_of(name).own} - {room}
        hints = {_room(item) for name in members for item in imports_of(name).typing_only} - {room, ""}
        assert used == set(allowed.split()), f"checkpointer/{room}"
        assert hints <= used, f"checkpointer/{room}: for type checkers alone"
    assert {_room(name) for name in MODULES} == set(ROOMS)


def test_rooms_stand_above_all_that_they_import():
    below: set[str] = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= below, room
        below.add(room)


def test_no_module_takes_part_in_a_cycle_of_imports():
    graph = {name: imports_of(name).own - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_no_module_imports_what_its_room_must_not_know():
    wrong = {
        (name, other) for name in MODULES for other in imports_of(name).others & FORBIDDEN.get(_room(name), frozenset())
    }
    assert wrong == set(EXCEPTIONS)


def test_no_module_catches_the_builtin_timeout_error_of_a_future():
    """Before Python 3.11, futures (and asyncio) raise another ``TimeoutError`` than the builtin one."""
    for name in MODULES:
        tree = ast.parse(_path(name).read_text("utf-8"))
        handlers = (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler))
        caught = [ast.unparse(handler.type) for handler in handlers if handler.type]
        assert not [text for text in caught if "TimeoutError" in text.replace("FutureTimeoutError", "")], name


def test_pure_modules_open_no_file():
    for name in MODULES:
        if _room(name) in ("errors", "format", "policy"):
            calls = (node for node in ast.walk(ast.parse(_path(name).read_text("utf-8"))) if isinstance(node, ast.Call))
            assert not [c.lineno for c in calls if isinstance(c.func, ast.Name) and c.func.id == "open"], name


def test_the_page_on_the_architecture_shows_the_listing_of_the_package():
    page = (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
    listing = page.partition("```text\ncheckpointer/\n")[2].partition("\n```")[0]
    shown = re.findall(r"^  ([a-z_]+)(?:/|\.py)?  ", listing, flags=re.MULTILINE)
    assert shown == [room for room in reversed(ROOMS) if room not in ("__main__", "version")]
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert entries == {
        *(f"{name}.py" if _path(name).name != "__init__.py" else name for name in ROOMS),
        "__init__.py",
        "py.typed",
    }
    assert len(entries) <= 26


def _loaded_after(code: str, *packages: str) -> set[str]:
    program = f"import sys\n{code}\nprint(*({set(packages)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_fsspec():
    heavy = ("torch", "numpy", "fsspec", "filelock", "yaml", "xxhash")
    assert _loaded_after("import checkpointer; checkpointer.__version__; dir(checkpointer)", *heavy) == set()


def test_errors_configuration_and_retention_are_used_without_torch():
    code = "from checkpointer import CheckpointInfo, Config, errors, retention"
    assert _loaded_after(code, "torch", "fsspec") == set()


def test_listing_a_local_run_loads_neither_torch_nor_fsspec(tmp_path):
    code = (
        "from checkpointer.repository.repository import Repository\nfrom checkpointer.storage import open_storage\n"
        f"Repository(open_storage({str(tmp_path)!r})).list_checkpoints()"
    )
    assert _loaded_after(code, "torch", "fsspec") == set()
