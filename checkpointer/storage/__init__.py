"""File systems, behind one seam: :class:`LocalStorage`, and :class:`FsspecStorage` for everything else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from checkpointer.errors import ConfigError
from checkpointer.format import paths
from checkpointer.storage import roots
from checkpointer.storage.base import (
    Buffer,
    Entry,
    ReadFile,
    Stamp,
    Storage,
    blocks,
    is_refusal,
    refusals_typed,
    unreadable,
)
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
        ConfigError: an empty root, an unknown protocol, a file system whose package is not installed, or a root that
            is not what was meant: a file, a checkpoint, a mistyped URL, a variable that nothing has replaced.
    """
    text = roots.text_of(root)
    roots.check_spelling(text, root)
    storage = _open(text, options, durable=durable, threads=threads)
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
    if text.startswith(("file://", "local://")):
        text = text.partition("://")[2]
        roots.check_spelling(text, text)
    if "://" in text:
        return _open_remote(text, dict(options or {}))
    storage = LocalStorage(text, durable=durable, threads=threads)
    roots.check_place(storage.root)
    return storage


def _open_remote(url: str, options: dict[str, object]) -> Storage:
    from fsspec.core import url_to_fs  # imported late: a local run root needs none of it

    from checkpointer.storage.redact import Redactor, without_credentials
    from checkpointer.storage.remote import FsspecStorage

    try:
        fs, path = url_to_fs(url, **options)
    except (ValueError, TypeError, ImportError) as error:
        reason = Redactor(url, options).redact(str(error))
        raise ConfigError(f"cannot open {without_credentials(url)}: {reason}") from error
    storage = FsspecStorage(fs, path, url, options)

    def at(folder: str) -> FsspecStorage:
        return FsspecStorage(fs, folder, url, options)

    with suppress(OSError):  # of the network: the first call that has to read will say what is wrong
        roots.check_url(
            storage.url,
            path,
            read=lambda folder: at(folder).read(paths.MANIFEST, paths.MANIFEST_LIMIT),
            files_in=lambda folder: [entry.name for entry in at(folder).list_directory("") if entry.is_file],
            is_run=lambda folder: _holds_a_run(at(folder)),
        )
    return storage


def _holds_a_run(storage: Storage) -> bool:
    """Whether checkpoints lie here. In a bucket a run has a private directory only while there is something in it."""
    names = [entry.name for entry in storage.list_directory("") if entry.is_dir]
    checkpoints = [name for name in names if paths.parse_checkpoint_name(name) is not None]
    return paths.PRIVATE in names or any(storage.exists(f"{name}/{paths.MANIFEST}") for name in checkpoints[:3])


__all__ = [
    "Buffer",
    "Entry",
    "LocalStorage",
    "ReadFile",
    "Stamp",
    "Storage",
    "blocks",
    "is_refusal",
    "open_storage",
    "refusals_typed",
    "unreadable",
    "wrapping",
]
