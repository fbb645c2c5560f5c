"""What is public: the list, that it is documented and typed, and that nothing else is needed."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

import pytest

import checkpointer
from checkpointer import CheckpointInfo, CheckpointManager, errors

REPOSITORY = Path(__file__).resolve().parents[2]

PUBLIC_MODULES = {"data", "dcp", "errors", "migration", "retention", "testing"}
PUBLIC_FUNCTIONS = {"load_whole_model", "register_codec"}
PUBLIC_CLASSES = {
    "BestRule", "CheckpointInfo", "CheckpointManager", "CheckpointReport", "ComponentReport", "Config", "Event",
    "Gradients", "KeepPolicy", "ModuleComponent", "PendingSave", "RestorePolicy", "RestoreReport", "Restored",
    "RetentionPlan", "SavePolicy", "Skipped", "Stateful", "VerifyReport", "WholeModel", "WritePolicy",
}  # fmt: skip
PUBLIC_ERRORS = {name for name, value in vars(errors).items() if inspect.isclass(value)}
CLASSES = sorted(PUBLIC_CLASSES | PUBLIC_ERRORS)


def test_these_names_are_public_and_no_others():
    assert set(checkpointer.__all__) == {
        "__version__", *PUBLIC_MODULES, *PUBLIC_FUNCTIONS, *PUBLIC_CLASSES, *PUBLIC_ERRORS,
    }  # fmt: skip
    assert sorted(checkpointer.__all__) == dir(checkpointer)


def test_public_classes_belong_to_the_package_itself():
    for name in CLASSES:
        cls = getattr(checkpointer, name)
        assert (cls.__module__, cls.__qualname__) == ("checkpointer", name)


def test_public_objects_survive_a_pickle_that_names_the_package_alone():
    info = CheckpointInfo(step=3, created=datetime(2026, 1, 2, tzinfo=timezone.utc), metrics={"loss": 0.5})
    data = pickle.dumps([info, errors.SaveError("the disk is full")], protocol=0)
    assert b"checkpointer." not in data
    again, error = pickle.loads(data)
    assert again == info
    assert type(error) is errors.SaveError


def test_public_names_are_documented():
    for name in {*CLASSES, *PUBLIC_FUNCTIONS, *PUBLIC_MODULES}:
        value = getattr(checkpointer, name)
        text = inspect.getdoc(value) or ""
        assert text, name
        assert not text.startswith(f"{name}("), f"{name} has the docstring that dataclass makes"


def test_public_members_of_public_classes_are_documented():
    for name in CLASSES:
        cls = getattr(checkpointer, name)
        members = {key for key, value in vars(cls).items() if callable(value) or isinstance(value, property)}
        assert not {key for key in members if not key.startswith("_") and not inspect.getdoc(getattr(cls, key))}, name


def test_public_modules_are_modules_and_import_as_such():
    for name in PUBLIC_MODULES:
        assert isinstance(getattr(checkpointer, name), ModuleType)
        assert getattr(checkpointer, name) is importlib.import_module(f"checkpointer.{name}")


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = checkpointer.nothing


def _private_types(hint: object) -> set[str]:
    """Classes of this package in a type hint that cannot be imported from the package itself."""
    found: set[str] = set()
    if inspect.isclass(hint) and typing.get_origin(hint) is None:
        home = hint.__module__.split(".")[0]
        found = {hint.__qualname__} if home == "checkpointer" and hint.__name__ not in checkpointer.__all__ else set()
    return found.union(*(_private_types(part) for part in typing.get_args(hint)))


def test_whatever_a_public_call_takes_or_returns_is_public():
    """By the annotations of the manager, and of the fields of what it returns."""
    namespace = {name: getattr(checkpointer, name) for name in CLASSES}
    for name, member in vars(CheckpointManager).items():
        if not name.startswith("_") and inspect.isfunction(member):
            hints = typing.get_type_hints(member, {**member.__globals__, **namespace, **_typing_names()})
            assert not set().union(*map(_private_types, hints.values())), name
    for name in CLASSES:
        cls = getattr(checkpointer, name)
        if dataclasses.is_dataclass(cls):
            hints = typing.get_type_hints(cls, {**vars(_home(name)), **namespace})
            private = set().union(*map(_private_types, [hints[field.name] for field in dataclasses.fields(cls)]))
            assert not private, name


def _home(name: str) -> ModuleType:
    """The module that defines a public class: the class itself says ``checkpointer``."""
    for path in (REPOSITORY / "checkpointer").rglob("*.py"):
        if re.search(rf"^class {name}\b", path.read_text("utf-8"), flags=re.MULTILINE):
            return importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    raise AssertionError(name)


def _typing_names() -> dict[str, object]:
    """What modules import for type checkers alone."""
    import typing_extensions

    return {"Self": typing_extensions.Self}


def test_the_options_of_a_restore_stand_in_its_signature():
    expected = ["strict", "components", "ignore_keys", "rename", "adapt", "map_location", "verify"]
    for method in (CheckpointManager.restore, CheckpointManager.restore_latest, CheckpointManager.restore_best):
        parameters = inspect.signature(method).parameters
        assert [name for name in parameters if name in expected] == expected
        assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in expected)


MENTION = re.compile(r"(?<![\w/.-])checkpointer\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


def _texts() -> Iterator[str]:
    """What users read: the documents, the configurations, and the messages and docstrings of the package."""
    for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("configs/*")]:
        yield path.read_text("utf-8")
    for path in (REPOSITORY / "checkpointer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _mentions() -> set[str]:
    """Dotted names that users are told, as ``checkpointer.data.ResumableLoader``; those of private rooms apart."""
    found = {match for text in _texts() for match in MENTION.findall(text)}
    package = REPOSITORY / "checkpointer"
    modules = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    private = {path.stem for path in package.iterdir()} - set(checkpointer.__all__) | {"program"}
    return {dotted for dotted in found - modules if dotted.partition(".")[0] not in private} | found & PUBLIC_MODULES


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
    tree = ast.parse((REPOSITORY / "checkpointer" / "__init__.py").read_text("utf-8"))
    late = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name for node in late.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(checkpointer.__all__) - {"__version__"}


def _readme_imports() -> set[str]:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    nodes = (node for block in blocks for node in ast.walk(ast.parse(block)))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "checkpointer"}


def test_the_readme_needs_no_private_module():
    for dotted in _readme_imports():
        first = dotted.split(".")[1:2]
        assert not first or first[0] in checkpointer.__all__, dotted
