"""What systems leave in a run root without being asked, where nothing else is: finding it, and clearing it away.

Inside a checkpoint it goes with the checkpoint. Here is the rest: what lies about in ``.checkpointer`` by itself, and
in directories that were checkpoints, or have the name of one. Empty directories count as such: nothing is lost with
them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from checkpointer.format import paths
from checkpointer.repository.commit import Leftovers, clear, leftovers
from checkpointer.repository.strangers import on_record
from checkpointer.storage import Entry, Storage, is_refusal

PRIVATE = (paths.TMP, paths.TRASH, paths.QUARANTINE, paths.JOURNAL)


def in_private_folders(storage: Storage) -> Iterator[str]:
    """What is worth nothing among unfinished, removed and quarantined work, and beside the journal. Directories of
    attempts and of removals are none: whether anybody is at work on them is for recovery to find out.
    """
    for folder in PRIVATE:
        for entry in _entries(storage, folder):
            path = f"{folder}/{entry.name}"
            if entry.is_file and paths.left_by_system(entry.name) == "debris":
                yield path
            elif entry.is_dir and (folder == paths.QUARANTINE or not paths.is_id(entry.name)):
                yield from [path] if _is_worthless(storage, path) else []


def under_names_of_checkpoints(storage: Storage) -> Iterator[str]:
    """Directories that have the name of a checkpoint, and hold nothing of anybody's."""
    for entry in _entries(storage, ""):
        if not entry.is_dir or paths.parse_checkpoint_name(entry.name) is None:
            continue
        inner = _entries(storage, entry.name)
        if any(item.name == paths.MANIFEST or (item.is_dir and on_record(storage, item.name)) for item in inner):
            continue
        if _is_worthless(storage, entry.name):
            yield entry.name


def clear_away(storage: Storage) -> None:
    """Remove all of it; what cannot be removed is found again. Needs the writer's lock."""
    for path in [*in_private_folders(storage), *under_names_of_checkpoints(storage)]:
        if paths.left_by_system(path) == "debris":
            with contextlib.suppress(OSError):  # a directory may have such a name, too
                storage.remove(path)
        with contextlib.suppress(OSError):
            clear(storage, path)


def only_open(storage: Storage, directory: str) -> bool:
    """Whether a directory holds nothing but removed files that some process has open: it goes with them."""
    found = _leftovers(storage, directory)
    return bool(found.open) and not found.foreign


def _is_worthless(storage: Storage, directory: str) -> bool:
    """Where directories are but prefixes, an empty one is none."""
    found = _leftovers(storage, directory)
    return not (found.open or found.foreign) and (bool(found.debris) or storage.can_rename)


def _leftovers(storage: Storage, directory: str) -> Leftovers:
    """What this user may not look into is somebody's."""
    try:
        return leftovers(storage, directory)
    except OSError as error:
        if not is_refusal(error):
            raise
        return Leftovers(foreign=("",))


def _entries(storage: Storage, directory: str) -> list[Entry]:
    """The names in a directory, in order; none where this user may not list it."""
    try:
        return sorted(storage.list_directory(directory))
    except OSError as error:
        if not is_refusal(error):
            raise
        return []
