"""Names of checkpoints that hold none: whose they look like, what they keep from being saved, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from checkpointer.format import paths
from checkpointer.format.foreign import Kind, described, import_command, kind_of
from checkpointer.repository.commit import sorted_out
from checkpointer.storage import Storage

EXAMINED = 5
"""Strange names that are looked into when a run is opened, the highest steps first: each costs a listing."""

_ACCELERATE_NAME = re.compile(r"checkpoint_\d+")


@dataclass(frozen=True)
class Stranger:
    """Something in a run root that has the name of a checkpoint, and is none that can be listed."""

    name: str
    path: str
    step: int
    is_dir: bool = True
    link: str | None = None
    """Where it leads, if it is a symbolic link."""


@dataclass(frozen=True)
class Examined:
    """What a stranger turned out to be."""

    stranger: Stranger
    kind: Kind
    files: tuple[str, ...]
    """The files in it, relative to it."""

    @property
    def what(self) -> str:
        """Its kind, as the rest of a sentence that begins with its name."""
        if self.stranger.link is not None:
            return f"is a link to {self.stranger.link}, which holds no checkpoint, and links are not followed"
        if not self.stranger.is_dir:
            return "is no directory"
        if self.kind == "empty":
            return f"holds nothing but {self.files[0]}" if self.files else "is empty"
        return described(self.kind, self.files[0]) or f"holds no checkpoint but {self.files[0]}"

    @property
    def cure(self) -> str:
        """What to do."""
        if self.kind == "ours" and self.stranger.is_dir:
            return (
                f"copy it again as a whole, {paths.MANIFEST} last, or put {paths.MANIFEST} back from a copy; the "
                "tensors can be read without it, as safetensors"
            )
        if self.kind == "empty" and self.stranger.is_dir:
            return "'checkpointer doctor --fix' removes it"
        taken_over = import_command(self.kind, self.stranger.path, self.files, self.stranger.step)
        return f"move it away, or choose another run root; {taken_over}" if taken_over else "move it away"


def examine(storage: Storage, stranger: Stranger) -> Examined | None:
    """Look into it.

    ``None`` where it is gone, has been committed meanwhile, is the unfinished work of a writer, or holds nothing but
    removed files that a process has open, with which it goes. What systems leave behind makes a directory no fuller.
    """
    if not stranger.is_dir:
        return Examined(stranger, "other", ()) if storage.exists(stranger.name) else None
    entries = storage.list_directory(stranger.name)
    if any(entry.name == paths.MANIFEST for entry in entries):
        return None
    if not entries and not (storage.can_rename and storage.exists(stranger.name)):
        return None
    recorded = {entry.name for entry in entries if entry.is_dir and on_record(storage, entry.name)}
    found = sorted_out(storage, stranger.name, [entry for entry in entries if entry.name not in recorded])
    files = found.foreign
    if not files:
        unfinished = recorded or found.open or not storage.can_rename
        return None if unfinished else Examined(stranger, "empty", found.debris)
    kind, telling = kind_of(files)
    return Examined(stranger, kind, tuple(sorted(files, key=lambda path: (path not in telling, path))))


def on_record(storage: Storage, id: str) -> bool:
    """Whether a directory in a checkpoint's is that of an attempt, or of a removal, that has not ended."""
    if storage.can_rename or not paths.is_id(id):
        return False
    return any(map(storage.exists, (f"{paths.TMP}/{id}.json", f"{paths.TRASH}/{id}.json")))


def warning_of(storage: Storage, strangers: Sequence[Stranger], others: Sequence[str]) -> str | None:
    """What to say of them when a run is opened; ``None``: nothing. ``others``: of a root without checkpoints."""
    newest = sorted(strangers, key=lambda item: item.step, reverse=True)
    looks = [examine(storage, item) for item in newest[:EXAMINED]]
    # Where a commit is a put, what others have left under a name is in nobody's way.
    found = [look for look in looks if look is not None and (storage.can_rename or look.kind != "other")]
    said = [f"{item.stranger.path} {item.what}; {item.cure}" for item in found]
    if found and storage.can_rename:
        steps = ", ".join(map(str, sorted({item.stranger.step for item in found})))
        said.append(f"Until then saving step {steps} fails")
    if len(newest) > EXAMINED and found:
        said.append(f"and {len(newest) - EXAMINED} more such names ('checkpointer doctor {storage.url}' has them all)")
    said += [f"{storage.place(name)} {what}" for name, what in _foreign_names(others)]
    if not said:
        return None
    return f"not all that looks like a checkpoint in {storage.url} can be restored: {'. '.join(said)}"


def _foreign_names(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first name of each other library's habit."""
    for test, whose in ((_ACCELERATE_NAME.fullmatch, "Accelerate"), (lambda name: name.endswith(".ckpt"), "Lightning")):
        first = next((name for name in sorted(names) if test(name) and not paths.left_by_system(name)), None)
        if first is not None:
            what = f"looks like a checkpoint of {whose}, which this library does not read in place"
            yield first, f"{what}: 'checkpointer import' makes one of a file that torch.save wrote"


__all__ = ["EXAMINED", "Examined", "Kind", "Stranger", "examine", "on_record", "warning_of"]
