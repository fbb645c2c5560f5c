"""Removal in place: where a checkpoint's directory cannot be moved away.

Its manifest goes first, and then it is no checkpoint any more; a record tells the next writer to go on with the rest.
Object stores know nothing else. Local file systems rename, but for directories that they cannot: of a lower layer of
overlayfs, or on another file system than ``trash``.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Sequence
from typing import Any

from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format import paths, strict_json
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.repository.commit.base import clear, is_pinned, own_manifest
from checkpointer.repository.contents import removable, remove_listed
from checkpointer.repository.notes import remove_notes
from checkpointer.storage import Storage
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

RECORD_LIMIT = 2 * paths.MANIFEST_LIMIT
"""Bytes."""


_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.json\.[0-9a-f]{16}")
"""What a process that died while it wrote a record leaves."""


def is_unfinished_record(name: str) -> bool:
    """Whether this is a record that was never written to its end, so that nothing was removed by it."""
    return _UNFINISHED.fullmatch(name) is not None


def record_path(id: str) -> str:
    """Where the record of a removal lies."""
    return f"{paths.TRASH}/{id}.json"


def record_removal(storage: Storage, name: str, manifest: bytes, id: str) -> None:
    """Write down, durably, that the checkpoint ``name`` is about to be removed or replaced."""
    record = {"name": name, "manifest": manifest.decode("utf-8")}
    storage.put(record_path(id), strict_json.seal(record))


def read_record(storage: Storage, path: str) -> dict[str, Any] | None:
    """A record, or ``None`` if it is gone or not one: then nothing is touched."""
    with contextlib.suppress(FileNotFoundError, CorruptCheckpointError):
        return strict_json.unseal(storage.read(path, RECORD_LIMIT), path)
    return None


def recorded_removal(storage: Storage, path: str) -> tuple[str, Manifest] | None:
    """Which checkpoint a record lets go, and its manifest; ``None`` if it is gone or makes no sense."""
    record = read_record(storage, path)
    name, text = (record.get("name"), record.get("manifest")) if record else (None, None)
    if not isinstance(name, str) or not isinstance(text, str) or paths.parse_checkpoint_name(name) is None:
        return None
    with contextlib.suppress(CheckpointerError):  # one of a newer format, too: its writer knows what to do
        return name, parse_manifest(text.encode("utf-8", "replace"), storage.place(path))
    return None


def remove_in_place(storage: Storage, name: str, manifest: Manifest) -> bool:
    """Remove a local checkpoint without moving it; ``False`` if it is pinned, and stays.

    Raises:
        OSError: its index is damaged, so that nobody can tell what is ours; it stays.
    """
    if is_pinned(storage, manifest):
        return False
    if removable(storage, name, manifest).damaged:
        raise damaged_list(storage, name)
    record_removal(storage, name, manifest.to_bytes(), manifest.id)
    storage.remove(f"{name}/{paths.MANIFEST}")
    storage.sync(name)  # before any data goes: after a power cut it would be a checkpoint with holes
    return _finish(storage, name, manifest)


def damaged_list(storage: Storage, name: str) -> OSError:
    """The error of a removal that cannot be, since the index of the checkpoint is damaged."""
    reason = (
        "its index is damaged, so that it cannot be told which files are its own; look at it, and remove it by hand"
    )
    return OSError(errno.EUCLEAN if hasattr(errno, "EUCLEAN") else errno.EIO, reason, storage.place(name))


def recover_in_place(storage: Storage, path: str) -> None:
    """Finish the local removal that a record tells of, unless it has not begun, or is over."""
    recorded = recorded_removal(storage, path)
    if recorded is None:
        return
    name, manifest = recorded
    if not storage.exists(f"{name}/{paths.MANIFEST}"):
        storage.sync(*[name] if storage.exists(name) else [])  # whoever unlinked the manifest may have died before this
        _finish(storage, name, manifest)
        return
    # A manifest with this id: it died before anything was removed. Another one: a later save has the name, under which
    # its files are called as those of the old one were. Neither may be touched. An unreadable one: that is unknown.
    if own_manifest(storage, name) is not None:
        storage.remove(path)


def _finish(storage: Storage, name: str, manifest: Manifest) -> bool:
    """Delete what an unlinked manifest lists; ``False`` if somebody pinned it meanwhile, and it is back."""
    pinned = is_pinned(storage, manifest)
    if pinned:
        storage.create(f"{name}/{paths.MANIFEST}", manifest.to_bytes())
    else:
        # Durably, and before the record goes: without it, a file that came back would be foreign, and in the way.
        remove_listed(storage, name, removable(storage, name, manifest))
        left_open = clear_rest(storage, name)
        storage.sync("")
        remove_notes(storage, manifest.id)
        if left_open:
            return True  # the record stays: by it the directory is found again
    storage.remove(record_path(manifest.id))
    storage.sync(paths.TRASH)  # before a save may take the name
    return not pinned


def clear_rest(storage: Storage, name: str) -> bool:
    """Remove what is left of a directory that was a checkpoint, if that is nothing of anybody's; else say what it is.

    Returns whether a file in it is still open somewhere, so that it cannot go yet.
    """
    if storage.exists(f"{name}/{paths.MANIFEST}"):
        return False
    left = clear(storage, name)
    if left.foreign:
        messages.warn(
            f"{storage.place(name)} was removed, but {len(left.foreign)} files that this library did not write are "
            f"left there: {', '.join(left.foreign[:5])}",
        )
    elif left.open:
        log_open(storage, name, left.open)
    return bool(left.open) and not left.foreign


def log_open(storage: Storage, directory: str, names: Sequence[str]) -> None:
    """Say, to those who look for it, why a directory cannot go yet: that ends by itself."""
    text = "%s goes later: a process has %s of it open"
    messages.log(logger.debug, text, storage.place(directory), ", ".join(names[:5]))
