"""Names and places inside a run root. Pure: the one file that knows how paths are spelled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, TypeAlias

from checkpointer.errors import CorruptCheckpointError

MANIFEST = "manifest.json"
INDEX = "index.json"
TABLE = "index.safetensors"
ATTACHMENTS = "files"
SHARED_TENSORS = "state.safetensors"

PRIVATE = ".checkpointer"
LOCK = f"{PRIVATE}/lock"
OWNER = f"{PRIVATE}/owner.json"
NOTES = f"{PRIVATE}/notes"
JOURNAL = f"{PRIVATE}/journal"
TMP = f"{PRIVATE}/tmp"
TRASH = f"{PRIVATE}/trash"
QUARANTINE = f"{PRIVATE}/quarantine"

MANIFEST_LIMIT = 64 * 1024
"""Bytes. A manifest is read before anything about the checkpoint is known, so it is bounded."""

INDEX_LIMIT = 512 * 1024 * 1024
"""Bytes of each of the two files of an index."""

_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,18})(?:-([0-9a-f]{8}))?")
_PART = re.compile(r"index-[0-9]{5,10}\.safetensors")
_ID = re.compile(r"[0-9a-f]{32}")
_PATH_LIMIT = 1024


def checkpoint_name(step: int, id: str | None = None) -> str:
    """Directory of the checkpoint of ``step``; with ``id`` the second name, for when the first one is taken."""
    return f"checkpoint-{step}-{id[:8]}" if id else f"checkpoint-{step}"


def parse_checkpoint_name(name: str) -> int | None:
    """Step of a checkpoint directory's name, or ``None`` if it is not one."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def is_second_name(name: str) -> bool:
    """Whether ``name`` is ``checkpoint-<step>-<id8>``."""
    match = _CHECKPOINT.fullmatch(name) if name.count("-") == 2 else None
    return bool(match and match[2])


def is_id(text: object) -> bool:
    """Whether ``text`` is 32 lower-case hexadecimal digits."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def check_relative(path: object) -> str:
    """Return ``path`` if it stays inside the directory that it is relative to, on every operating system.

    Raises:
        CorruptCheckpointError: it is absolute, climbs, is empty, too long, or holds bytes that some system rejects.
    """
    if not isinstance(path, str) or not path or len(path) > _PATH_LIMIT:
        raise CorruptCheckpointError(f"not a file name inside a checkpoint: {str(path)[:100]!r}")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise CorruptCheckpointError(f"not a file name inside a checkpoint: {path[:100]!r} leaves its directory")
    if "\\" in path or ":" in path or any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in path):
        raise CorruptCheckpointError(f"not a file name inside a checkpoint: {path[:100]!r} holds a forbidden character")
    return path


def component_file(component: str) -> str:
    """Stem of a component's own files; of ``state`` that would be the shared file, of ``index`` the table."""
    return f"component-{component}" if component.lower() in ("state", "index") else component


def tensor_file(component: str, shard: int = 1, shards: int = 1) -> str:
    """File of one shard (counted from 1), named as the Hugging Face ecosystem names them."""
    stem = component_file(component)
    return f"{stem}.safetensors" if shards == 1 else f"{stem}-{shard:05d}-of-{shards:05d}.safetensors"


def rank_file(component: str, rank: int, shard: int = 1, shards: int = 1) -> str:
    """File of what one rank holds of a component whose tensors are cut: no tool mistakes it for a whole shard."""
    stem = f"{component_file(component)}-rank-{rank:05d}"
    return f"{stem}.safetensors" if shards == 1 else f"{stem}-{shard:05d}-of-{shards:05d}.safetensors"


def shared_tensors(rank: int, *, own: bool) -> str:
    """File that the small components of one rank of several share; ``own``: what it has otherwise than the others."""
    if own:
        return f"rank-{rank:05d}.safetensors"
    return SHARED_TENSORS if rank == 0 else f"state-rank-{rank:05d}.safetensors"


def rank_index(rank: int) -> str:
    """The index of what one rank has otherwise than the coordinator, with that state itself where it is small."""
    return f"index-{rank:05d}.safetensors"


def is_of_index(name: str) -> bool:
    """Whether this is the name of a file of an index."""
    return name in (INDEX, TABLE) or _PART.fullmatch(name) is not None


def is_reserved(path: str) -> bool:
    """Whether a file of this name belongs to the checkpoint itself, so that nobody else may write it."""
    return path in (MANIFEST, ATTACHMENTS) or path.startswith(("index.", "index-", f"{ATTACHMENTS}/"))


def shard_index(component: str) -> str:
    """The Hugging Face index file of a component that is stored in several shards."""
    return f"{component_file(component)}.safetensors.index.json"


Unasked: TypeAlias = Literal["debris", "open"]
"""What a system leaves in directories without being asked: ``debris``, which is worth nothing; or ``open``, the content
of a file that was removed while a process had it open. The latter goes by itself when that process closes the file."""

_DEBRIS = frozenset({"thumbs.db", "desktop.ini"})
"""Windows' names, on file systems that tell no upper from lower case."""

_OPEN = (".nfs", ".fuse_hidden", ".smbdelete")
"""How the clients of NFS, libfuse and macOS' SMB begin the new name of such a file."""


def left_by_system(path: str) -> Unasked | None:
    """What a file that no manifest lists is by its name, if a system has left it; ``None``: it is somebody's.

    Whoever asks has seen to it that the file is not listed: an attachment is content whatever it is called.
    """
    name = path.rpartition("/")[2]
    if name == ".DS_Store" or (name.startswith("._") and name != "._") or name.lower() in _DEBRIS:
        return "debris"
    return "open" if name.startswith(_OPEN) and name not in _OPEN else None


def parents(path: str) -> Iterator[str]:
    """Directories between ``path`` and its root, the innermost first."""
    while "/" in path:
        path = path.rsplit("/", 1)[0]
        yield path
