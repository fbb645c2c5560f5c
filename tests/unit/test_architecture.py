"""Imports go one way, importing the package costs next to nothing, and what is public is documented.

Every module belongs to one layer; each layer says what it may import. ARCHITECTURE.md draws the same picture.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

import checkpointer

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "checkpointer"

TORCH = frozenset({"torch", "numpy"})
INPUT_OUTPUT = frozenset({
    "ctypes", "fcntl", "filelock", "fsspec", "glob", "io", "mmap", "multiprocessing", "os", "pathlib", "shutil",
    "signal", "socket", "subprocess", "tempfile", "threading", "urllib",
})  # fmt: skip
STORAGE = frozenset({"filelock", "fsspec"})


@dataclass(frozen=True)
class Layer:
    """Modules (a package stands for all in it), the layers that they may import, and packages that they may not."""

    modules: frozenset[str]
    imports: frozenset[str]
    forbidden: frozenset[str] = frozenset()


def layer(modules: str, imports: str = "", forbidden: frozenset[str] = frozenset()) -> Layer:
    return Layer(frozenset(modules.split()), frozenset(imports.split()), forbidden)


LAYERS = {
    "errors": layer("errors version", "", TORCH | INPUT_OUTPUT),
    "pure": layer(
        "layout info strictjson monitoring index manifest readable tensorfile sharing units cost schedule deadline "
        "retention",
        "errors pure",
        TORCH | INPUT_OUTPUT,
    ),
    "settings": layer("config yamlfile", "errors pure settings", TORCH | STORAGE),
    "blocks": layer("direct memory messages sample threads", "errors blocks"),
    "storage": layer("storage lock notes commit", "errors pure blocks storage", TORCH),
    "repository": layer(
        "doctor reading strangers verification repository pruning watching",
        "errors pure blocks storage repository",
        TORCH,
    ),
    "arguments": layer("arguments", "errors pure", TORCH | STORAGE),
    "comparison": layer("comparison", "errors pure storage repository"),
    "cli": layer("cli __main__", "errors pure settings storage repository arguments comparison cli", TORCH),
    "state": layer(
        "state arena devices digest finite lazy overlap staging stepping targets", "errors pure blocks state", STORAGE
    ),
    "manager": layer(
        "environment snapshot writing space commit_callbacks saving restored restoring whole_model position pacing"
        " preemption due signals manager migration",
        "errors pure settings blocks storage repository arguments state manager distributed",
    ),
    "distributed": layer("distributed", "errors pure blocks storage repository state distributed"),
    "adapters": layer("adapters data dcp testing", "errors pure storage repository state manager distributed adapters"),
}
"""From the bottom up. Modules of a layer may import each other only where the layer names itself."""

EXCEPTIONS = {
    ("schedule", "signal"): "the names of signals are checked; no handler is set",
}


@dataclass
class Imports:
    """What one module imports: of this package by module, of others by top-level name."""

    own: set[str] = field(default_factory=set)
    typing_only: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)


def module_names() -> list[str]:
    """Every module of the package, without ``checkpointer.``; the package itself is ``""``."""
    return sorted(_name(path) for path in PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _path(name: str) -> Path:
    base = PACKAGE.joinpath(*name.split(".")) if name else PACKAGE
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


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
            elif id(node) in hidden:
                found.typing_only.add(_own(imported))
            else:
                found.own.add(_own(imported))
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


def layer_of(name: str) -> str:
    """The layer that a module belongs to."""
    for title, candidate in LAYERS.items():
        if any(name == module or name.startswith(f"{module}.") for module in candidate.modules):
            return title
    raise AssertionError(f"checkpointer.{name} has no layer: add it to LAYERS here and to ARCHITECTURE.md")


MODULES = [name for name in module_names() if name]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["own", "typing_only"])
def test_a_module_imports_only_from_layers_that_its_own_may_use(name, kind):
    allowed = LAYERS[layer_of(name)].imports
    wrong = {
        imported: layer_of(imported)
        for imported in getattr(imports_of(name), kind) - {""}
        if layer_of(imported) not in allowed and _package(imported) != _package(name)
    }
    assert not wrong, f"{name} ({layer_of(name)}) imports {wrong}"


def _package(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_nothing_that_its_layer_forbids(name):
    wrong = imports_of(name).others & LAYERS[layer_of(name)].forbidden
    assert not {other for other in wrong if (name, other) not in EXCEPTIONS}


@pytest.mark.parametrize("name", sorted(LAYERS["errors"].modules | LAYERS["pure"].modules))
def test_a_pure_module_opens_no_file(name):
    calls = (node for node in ast.walk(ast.parse(_path(name).read_text("utf-8"))) if isinstance(node, ast.Call))
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "open"]


def test_the_configuration_leaves_reading_its_file_to_yamlfile():
    tree = ast.parse(_path("config").read_text("utf-8"))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os"}
    assert used <= {"PathLike", "fspath"}
    assert imports_of("config").others & INPUT_OUTPUT <= {"os"}


def test_no_module_takes_part_in_a_cycle_of_imports():
    graph = {name: imports_of(name).own - {"", name} for name in MODULES}
    cycles = list(_cycles(graph))
    assert not cycles, " -> ".join(cycles[0])


def _cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> Iterator[list[str]]:
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            for imported in sorted(graph[name]):
                yield from visit(imported, [*path, name])
            done.add(name)

    for name in graph:
        yield from visit(name, [])


def diagram() -> str:
    """Each layer that has modules, from the top down: its modules, and the layers that they really import."""
    lines = []
    for title in reversed(LAYERS):
        members = [name for name in MODULES if layer_of(name) == title]
        used = {layer_of(imported) for name in members for imported in imports_of(name).own - {""}} - {title}
        names = " ".join(dict.fromkeys(map(_package, members)))
        below = " ".join(sorted(used, key=list(LAYERS).index)) or "-"
        lines += [f"{title:<12}{names}", f"{'':<12}-> {below}"] if members else []
    return "\n".join(lines)


def test_the_page_on_the_architecture_draws_what_the_code_imports():
    page = (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
    assert page.partition("```layers\n")[2].partition("\n```")[0] == diagram()


def test_only_the_manager_side_joins_storage_and_state():
    """No other module reaches both ``storage`` and ``state``, directly or through what it imports."""
    graph = {name: imports_of(name).own - {""} for name in MODULES}
    joining = {name for name in MODULES if {"storage", "state"} <= {_package(item) for item in _closure(graph, name)}}
    assert {layer_of(name) for name in joining} <= {"manager", "distributed", "adapters"}
    assert "manager" in joining


def _closure(graph: dict[str, set[str]], name: str) -> set[str]:
    found, waiting = {name}, [name]
    while waiting:
        new = graph[waiting.pop()] - found
        found |= new
        waiting += new
    return found


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


def test_the_manager_is_imported_from_the_package():
    assert _loaded_after("from checkpointer import CheckpointManager", "torch") == {"torch"}


@pytest.mark.parametrize("name", checkpointer.__all__)
def test_a_public_name_resolves_and_is_documented(name):
    value = getattr(checkpointer, name)
    text = inspect.getdoc(value) or ""
    assert isinstance(value, str) or (text and not text.startswith(f"{name}("))  # the latter is a dataclass's default


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpointer.nothing


@pytest.mark.parametrize("name", [name for name in checkpointer.__all__ if name[0].isupper()])
def test_public_members_of_a_public_class_are_documented(name):
    cls = getattr(checkpointer, name)
    members = {key: value for key, value in vars(cls).items() if not key.startswith("_")}
    methods = {key for key, value in members.items() if callable(value) or isinstance(value, property)}
    assert not {key for key in methods if not inspect.getdoc(getattr(cls, key))}


def _readme_imports() -> set[str]:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return {
        name
        for block in blocks
        for node in ast.walk(ast.parse(block))
        for name in _imported(node)
        if name.partition(".")[0] == "checkpointer"
    }


def test_the_readme_needs_no_private_module():
    """What its code imports of this package is public: a name in ``__all__``, or in a module that is."""
    for dotted in _readme_imports():
        first = dotted.split(".")[1:2]
        assert not first or first[0] in checkpointer.__all__, dotted


MENTION = re.compile(r"(?<![\w/.-])checkpointer\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


def _texts() -> Iterator[str]:
    """What users read: the documents, the configurations, and the messages and docstrings of the package."""
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("configs/*")]:
        yield path.read_text("utf-8")
    for name in module_names():
        for node in ast.walk(ast.parse(_path(name).read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _mentions() -> set[str]:
    """Dotted names that users are told, as ``checkpointer.data.ResumableLoader``; those of private modules apart."""
    found = {match for text in _texts() for match in MENTION.findall(text)}
    modules = set(module_names())
    private = {name for name in modules if "." not in name and name not in checkpointer.__all__} | {"program"}
    told = found - (modules - set(checkpointer.__all__))
    return {dotted for dotted in told if dotted.partition(".")[0] not in private}


def test_every_name_that_users_are_told_is_reached_after_importing_the_package():
    """In a process of its own: here, other tests have imported the modules."""
    mentioned = _mentions()
    assert {"migration.import_checkpoint", "register_codec", "data.ResumableLoader", "dcp"} <= mentioned
    program = (
        "import functools, checkpointer\n"
        f"for dotted in {sorted(mentioned)!r}:\n"
        "    try: functools.reduce(getattr, dotted.split('.'), checkpointer)\n"
        "    except AttributeError: print(dotted)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == ""


def test_type_checkers_see_every_name_that_is_imported_late():
    tree = ast.parse(_path("").read_text("utf-8"))
    nodes = (node for block in _typing_blocks(tree) for node in block.body)
    told = {dotted.rpartition(".")[2] for node in nodes for dotted in _imported(node)}
    assert told == set(checkpointer.__all__) - {"__version__"}
    assert dir(checkpointer) == sorted(checkpointer.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_no_module_catches_the_builtin_timeout_error_of_a_future(name):
    """Before Python 3.11, futures (and asyncio) raise another ``TimeoutError`` than the builtin one."""
    tree = ast.parse(_path(name).read_text("utf-8"))
    caught = [node.type for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type]
    assert not [node.lineno for node in caught if "TimeoutError" in ast.unparse(node).replace("FutureTimeoutError", "")]


def test_public_modules_are_modules():
    for name in checkpointer.__all__:
        if name.islower() and name.isidentifier() and _path(name).is_file():
            assert isinstance(getattr(checkpointer, name), ModuleType)
            assert getattr(checkpointer, name) is importlib.import_module(f"checkpointer.{name}")
