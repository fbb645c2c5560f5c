"""File systems, behind one seam: :class:`LocalStorage`, and :class:`FsspecStorage` for everything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from checkpointer.errors import ConfigError
from checkpointer.storage.base import Buffer, Entry, ReadFile, Storage, blocks
from checkpointer.storage.local import LocalStorage

_wrapper: ContextVar[Callable[[Storage], Storage] | None] = ContextVar("wrapper", default=None)


def open_storage(
    root: str | os.PathLike[str],
    options: Mapping[str, object] | None = None,
    *,
    durable: bool = True,
    threads: int = 2,
) -> Storage:
    """The storage of a run root: a path, or any fsspec URL; ``options`` are handed to fsspec.

    ``durable`` and ``threads`` are for local ones: see :class:`LocalStorage`.

    Raises:
        ConfigError: an empty root, an unknown protocol, or a file system whose package is not installed.
    """
    storage = _open(os.fspath(root), options, durable=durable, threads=threads)
    wrapper = _wrapper.get()
    return storage if wrapper is None else wrapper(storage)


@contextmanager
def wrapping(wrapper: Callable[[Storage], Storage]) -> Iterator[None]:
    """Inside, and in this thread, every storage that is opened is handed to ``wrapper``, whose result is used instead.

    For tests: this is how :mod:`checkpointer.testing` injects faults.
    """
    token = _wrapper.set(wrapper)
    try:
        yield
    finally:
        _wrapper.reset(token)


def _open(text: str, options: Mapping[str, object] | None, *, durable: bool, threads: int) -> Storage:
    if not text.strip() or "\0" in text:
        raise ConfigError(f"the run root must be a path or a URL, got {text!r}")
    if text.startswith(("file://", "local://")):
        return LocalStorage(text.partition("://")[2], durable=durable, threads=threads)
    if "://" not in text and "::" not in text:
        return LocalStorage(text, durable=durable, threads=threads)
    return _open_remote(text, dict(options or {}))


def _open_remote(url: str, options: dict[str, object]) -> Storage:
    from fsspec.core import url_to_fs  # imported late: a local run root needs none of it

    from checkpointer.storage.remote import FsspecStorage, Redactor, without_credentials

    try:
        fs, path = url_to_fs(url, **options)
    except (ValueError, TypeError, ImportError) as error:
        reason = Redactor(url, options).redact(str(error))
        raise ConfigError(f"cannot open {without_credentials(url)}: {reason}") from error
    return FsspecStorage(fs, path, url, options)


__all__ = ["Buffer", "Entry", "LocalStorage", "ReadFile", "Storage", "blocks", "open_storage", "wrapping"]
