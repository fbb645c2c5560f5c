"""Real storages that fail on command: before an operation, or after it, when only the answer is lost."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from checkpointer.storage import LocalStorage, Storage, open_storage
from checkpointer.storage.remote import FsspecStorage
from tests.conftest import Root

OPERATIONS = (
    "list_directory", "exists", "read", "read_many", "open", "write", "link", "put", "create", "replace", "remove",
    "remove_directory", "make_directory", "rename", "exchange", "sync", "age", "free_bytes",
)  # fmt: skip


class Fault:
    """Fails the ``number``-th operation; with ``forever`` each one from then on."""

    def __init__(self, number: int, *, forever: bool = False, after: bool = False) -> None:
        self.number = number
        self.forever = forever
        self.after = after
        self.count = 0
        self.operations: list[str] = []
        self.hook: Callable[[], None] | None = None
        """Called in place of failing for the first time."""

    @property
    def reached(self) -> bool:
        """Whether there were that many operations."""
        return self.count >= self.number

    def call(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """Count one operation, and fail if it is its turn."""
        self.count += 1
        self.operations.append(f"{name}{tuple(item for item in arguments if isinstance(item, str))}")
        failing = self.count == self.number or (self.forever and self.count > self.number)
        if failing and self.hook is not None:
            hook, self.hook = self.hook, None
            hook()
            failing = False
        if failing and not self.after:
            raise OSError(errno.EIO, "injected fault")
        result = function(*arguments)
        if failing and self.after:
            if hasattr(result, "close"):
                result.close()
            raise OSError(errno.EIO, "injected fault")
        return result


def _breaking(kind: type[Any]) -> type[Any]:
    """A subclass of a storage whose operations go through ``self.fault``."""

    def method(name: str) -> Callable[..., Any]:
        def operation(self: Any, *arguments: Any, **keywords: Any) -> Any:
            function = functools.partial(getattr(super(made, self), name), **keywords)
            return self.fault.call(name, function, arguments)

        return operation

    made = type(f"Breaking{kind.__name__}", (kind,), {name: method(name) for name in OPERATIONS})
    return made


BreakingLocal = _breaking(LocalStorage)
BreakingRemote = _breaking(FsspecStorage)


def breaking_storage(root: Root, fault: Fault, *, durable: bool = True) -> Storage:
    """The storage of ``root``, under ``fault``."""
    real: Any = open_storage(root.url, root.options)
    if isinstance(real, LocalStorage):
        storage: Any = BreakingLocal(root.url, durable=durable)
    else:
        storage = BreakingRemote(real.fs, real._path, root.url, root.options)
    storage.fault = fault
    made: Storage = storage
    return made


def under(fault: Fault) -> AbstractContextManager[None]:
    """Managers made inside use storages that obey ``fault``."""

    @contextmanager
    def patched() -> Any:
        def opened(url: str, options: Mapping[str, Any] | None = None, *, durable: bool = True, **_: Any) -> Storage:
            return breaking_storage(Root("", str(url), dict(options or {})), fault, durable=durable)

        with mock.patch("checkpointer.manager.open_storage", opened):
            yield

    return patched()
