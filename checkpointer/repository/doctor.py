"""Looking a whole run root over: what is damaged, left over, in the way or forbidden; and mending what is safe.

An examination writes nothing (but a probe, in an object store) and needs no lock. Each finding says what it is, what it
means and what to do. Mending needs the writer's lock; it deletes only what nobody can restore any more, and moves what
is damaged to where nothing is ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    FormatVersionError,
    RunLockedError,
    UnreadableCheckpointError,
)
from checkpointer.format import paths, strict_json
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest
from checkpointer.repository import debris
from checkpointer.repository.checkpoint_reader import CheckpointReader
from checkpointer.repository.commit import STALE_AFTER, is_unfinished_record, owner_is_dead, recorded_removal
from checkpointer.repository.contents import read_contents
from checkpointer.repository.lock import described
from checkpointer.repository.notes import damaged_notes, noted_ids
from checkpointer.repository.repository import Listing, Repository, name_of
from checkpointer.repository.strangers import Stranger, examine
from checkpointer.repository.verify import extra_files, verify_checkpoint
from checkpointer.storage import Entry

Level: TypeAlias = Literal["problem", "note"]

INTERRUPTED_AFTER = 3600.0
"""Seconds after which a removal that has not ended was interrupted, where no lock tells."""

_FORBIDDEN = (errno.EACCES, errno.EPERM)
_MEND = "--fix {0}, as the next writer will"


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be, or worth knowing."""

    kind: str
    """A word for machines: ``damaged``, ``leftover``, …"""
    path: str
    """Where, for humans."""
    meaning: str
    advice: str
    level: Level = "problem"


@dataclass(frozen=True)
class Diagnosis:
    """What an examination found."""

    checkpoints: int
    """Committed ones, damaged ones included."""
    findings: tuple[Finding, ...]
    """What there is, problems first."""
    fixed: tuple[Finding, ...] = ()
    """What there was before it was mended."""
    deep: bool = False
    """Whether every byte was read; if not, nothing is known of most of them."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not any(finding.level == "problem" for finding in self.findings)

    def verdicts(self) -> list[tuple[str, Finding]]:
        """Each finding under ``problem``, ``note`` or ``fixed``, in this order."""
        return [*((item.level, item) for item in self.findings), *(("fixed", item) for item in self.fixed)]


@dataclass(frozen=True)
class _Verdict:
    """What a check of one checkpoint's files has found."""

    damage: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    unreadable: str | None = None
    """Why its files could not be read, although nothing says that they are damaged."""


@dataclass
class _Chart:
    """What one examination knows of the run root while it goes on."""

    listing: Listing = field(default_factory=Listing)
    read_only: bool = False
    """Whether the run root lies on a file system that is mounted read-only."""
    busy: bool = False
    """Whether a writer is, or may be, at work."""
    debris: set[str] = field(default_factory=set)
    """What lies in the private folders and is worth nothing."""
    unfinished: set[str] = field(default_factory=set)
    """Ids of attempts and removals that are on record."""
    leaving: set[str] = field(default_factory=set)
    """Local directories of checkpoints that are being removed where they lie."""
    sick: list[str] = field(default_factory=list)
    """Directories that are damaged beyond doubt, and not pinned."""
    sound: list[CheckpointInfo] = field(default_factory=list)


class Doctor:
    """Examines one run root; ``deep`` reads every byte of every checkpoint once, else only what tells the most."""

    def __init__(
        self, repository: Repository, *, deep: bool = False, progress: Callable[[int], object] = lambda _: None
    ) -> None:
        """``progress`` is told the bytes of each checkpoint that has been checked."""
        self._repository = repository
        self._storage = repository.storage
        self._deep = deep
        self._progress = progress
        self._verdicts: dict[str, _Verdict] = {}
        self._chart = _Chart()

    def examine(self) -> Diagnosis:
        """Look everything over. Changes nothing.

        Raises:
            CheckpointNotFoundError: there is no such run root.
        """
        if not self._storage.exists(""):
            raise CheckpointNotFoundError(
                f"there is no run root {self._repository.url}; check the path for typing errors"
            )
        self._chart = _Chart()
        findings = [*self._permissions()]
        if not any(finding.kind == "unreadable" and finding.path == self._storage.place("") for finding in findings):
            findings += [*self._lock(), *self._conditional_writes(), *self._unfinished(), *self._checkpoints()]
            findings += [*self._notes(), *self._history(), *self._space()]
        findings.sort(key=lambda finding: finding.level != "problem")
        count = len(self._chart.listing.checkpoints) + len(self._chart.listing.unreadable)
        return Diagnosis(count, tuple(dict.fromkeys(findings)), deep=self._deep)

    def mend(self) -> Diagnosis:
        """Examine, repair what is safe under the writer's lock, and examine again.

        Raises:
            RunLockedError: a job is writing to the run.
        """
        before = self.examine()
        if self._chart.read_only:
            return before
        if not before.ok or any(finding.kind == "debris" for finding in before.findings):
            self._repair()
        after = self.examine()
        left = {(finding.kind, finding.path) for finding in after.findings}
        fixed = [finding for finding in before.findings if (finding.kind, finding.path) not in left]
        return replace(after, fixed=tuple(fixed))

    def _repair(self) -> None:
        repository = self._repository
        try:
            repository.lock.acquire("the doctor")
        except RunLockedError as error:
            raise RunLockedError(f"{error}. Without --fix, 'checkpointer doctor' needs no lock") from None
        try:
            repository.recover()
            debris.clear_away(self._storage)
            self._chart = _Chart()
            list(self._checked())  # again: what was damaged may have been replaced by a save since
            if self._chart.sound:  # else the run would look empty, and be started from scratch
                for name in self._chart.sick:
                    with contextlib.suppress(OSError):  # what stays where it is, is found again
                        repository.quarantine(name)
        finally:
            repository.release()

    # ----------------------------------------------------------------------------------------- around the run root

    def _permissions(self) -> Iterator[Finding]:
        """What this user may not do. In an object store only trying tells."""
        if not self._storage.can_rename:
            return
        owner = os.stat(self._storage.place("")).st_uid
        read_only: tuple[str, ...] = ()
        for path in self._places():
            place = self._storage.place(path)
            try:
                status = os.lstat(place)
            except OSError:
                continue  # it has just gone
            whose = f"owner {status.st_uid}, mode {status.st_mode & 0o7777:04o}; this is user {_user()}"
            directory = _is_directory(place)
            if not _may(place, os.R_OK | (os.X_OK if directory else 0)):
                yield Finding("unreadable", place, f"this user may not read it ({whose})", "give read access to it")
            elif f"{path}/".startswith(read_only):
                continue
            elif directory and _is_read_only(place):
                read_only += (f"{path}/" if path else "",)
                self._chart.read_only |= not path
                meaning = "the file system is mounted read-only: restores work; saves, pruning and --fix do not"
                advice = "for those who train, mount it writable, and look at the system's log for why it is not"
                yield Finding("read-only", place, meaning, f"{advice}; readers need no more")
            elif directory and not _may(place, os.W_OK | os.X_OK):
                if self._is_unremovable(path):
                    continue  # a finding of its own, with its cure
                meaning = f"this user may not write here, so saves or pruning fail ({whose})"
                for_root = "no right that could be given helps root: is it immutable, or a share that squashes root?"
                advice = "give write access to those who train; readers need none" if _user() else for_root
                yield Finding("unwritable", place, meaning, advice)
            elif status.st_uid != owner:
                meaning = f"it belongs to another user than the run root ({whose})"
                yield Finding("foreign-owner", place, meaning, "harmless as long as it can be read and removed", "note")

    def _is_unremovable(self, path: str) -> bool:
        """Whether a directory in a checkpoint is kept as it is by more than its mode."""
        in_checkpoint = paths.parse_checkpoint_name(path.partition("/")[0]) is not None
        return in_checkpoint and self._storage.obstacle(path) is not None

    def _places(self) -> Iterator[str]:
        """Everything whose permissions matter: directories before what is in them, which may not be reached."""
        yield ""
        names = [
            paths.PRIVATE,
            *(f"{paths.PRIVATE}/{name}" for name in ("lock", "owner.json", "tmp", "trash", "notes")),
        ]
        yield from (name for name in names if self._storage.exists(name))
        for entry in self._entries(""):
            if entry.is_dir and paths.parse_checkpoint_name(entry.name) is not None:
                yield from self._inside(entry.name)

    def _inside(self, directory: str) -> Iterator[str]:
        yield directory
        for entry in self._entries(directory):
            path = f"{directory}/{entry.name}"
            yield from self._inside(path) if entry.is_dir else iter([path])

    def _lock(self) -> Iterator[Finding]:
        """Who writes, and what protects the run from a second writer."""
        lock, place = self._repository.lock, self._storage.place(paths.OWNER)
        owner, taken = lock.owner, lock.taken()
        self._chart.busy = taken or (taken is None and owner is not None)
        if self._storage.lock_path is None and not self._in_memory:
            meaning = "this storage has no lock that a dead owner frees: jobs on two hosts would not be kept apart"
            yield Finding("no-lock", self._repository.url, meaning, "make sure that one host alone writes", "note")
        if taken:
            meaning = f"the run is being written by {described(owner)}"
            yield Finding("busy", self._repository.url, meaning, "what it has not finished is left out here", "note")
        elif taken is None and owner is not None:
            meaning = f"{described(owner)} holds the lock or died with it: this system does not tell which"
            yield Finding("lock-unknown", place, meaning, "the next writer finds out", "note")
        elif owner is not None:
            meaning = f"{described(owner)} ended without closing: killed, or crashed. The lock itself is free"
            yield Finding("orphaned-lock", place, meaning, _MEND.format("removes it"))

    def _conditional_writes(self) -> Iterator[Finding]:
        """An object store is asked by writing a probe, which also tells whether it may be written at all."""
        if self._storage.can_rename:
            return
        try:
            exclusive = self._storage.exclusive
        except OSError as error:
            meaning = f"nothing can be written: {self._storage.redact(str(error))}"
            yield Finding("unwritable", self._repository.url, meaning, "check the credentials; readers need no more")
            return
        if not exclusive:
            meaning = (
                "this storage ignores conditions on writes: two jobs that save at once would not notice each other"
            )
            advice = "make sure that one job alone writes"
            yield Finding("no-conditional-writes", self._repository.url, meaning, advice, "note")

    def _unfinished(self) -> Iterator[Finding]:
        """What dead writers have left half done, and what was moved out of the way."""
        self._chart.debris |= {*debris.in_private_folders(self._storage)}
        save = "a save that never ended: not committed, and invisible to every reader"
        yield from self._records(paths.TMP, "leftover", save, _MEND.format("removes it"))
        removal = "a removal that never ended: retention had let this checkpoint go"
        yield from self._records(paths.TRASH, "half-removed", removal, _MEND.format("finishes it"))
        for directory in (paths.TMP, paths.TRASH):
            for entry in self._entries(directory):
                if entry.is_dir and paths.is_id(entry.name):
                    yield from self._unremovable(f"{directory}/{entry.name}", "what is left of it takes space for ever")
        yield from self._debris()
        for entry in self._entries(paths.QUARANTINE):
            if f"{paths.QUARANTINE}/{entry.name}" in self._chart.debris:
                continue
            meaning = "moved out of the way: it is damaged, or holds files that this library did not write"
            place = self._storage.place(f"{paths.QUARANTINE}/{entry.name}")
            yield Finding("quarantine", place, meaning, "nothing here is ever deleted: look at it, remove it", "note")

    def _debris(self) -> Iterator[Finding]:
        """What is worth nothing, and is in nobody's way; what is in the way of a save is a finding of its own."""
        found = set(self._chart.debris)
        if not self._storage.can_rename:
            found |= {*debris.under_names_of_checkpoints(self._storage)}
        for path in sorted(found):
            meaning = "empty, or nothing but what systems leave behind (.DS_Store, ._*, Thumbs.db, desktop.ini)"
            yield Finding("debris", self._storage.place(path), meaning, "harmless; --fix removes it", "note")

    def _still_open(self, path: str, directory: str) -> Iterator[Finding]:
        """A removal that waits for a process to close a file; that is worth a word only when it takes long."""
        if (self._storage.age(path) or 0.0) > STALE_AFTER:
            meaning = "what is left of a checkpoint: files that some process has had open for more than a day, or had "
            meaning += "when its host died"
            advice = "end that process ('lsof' names it); if there is none, remove the directory"
            yield Finding("still-open", self._storage.place(directory), meaning, advice, "note")

    def _records(self, directory: str, kind: str, meaning: str, advice: str) -> Iterator[Finding]:
        for entry in self._entries(directory):
            place = self._storage.place(f"{directory}/{entry.name}")
            in_place = entry.is_file and (directory == paths.TRASH or not self._storage.can_rename)
            id = entry.name.removesuffix(".json") if in_place else entry.name
            if is_unfinished_record(entry.name):
                continue  # nothing but some bytes, which the next writer removes
            if f"{directory}/{entry.name}" in self._chart.debris:
                continue
            if not paths.is_id(id):
                other = "this library does not know it, and never touches it"
                yield Finding("foreign-file", place, other, "remove it if nobody needs it", "note")
                continue
            self._chart.unfinished.add(id)
            left = f"{directory}/{entry.name}"
            if in_place and directory == paths.TRASH:
                recorded = recorded_removal(self._storage, left)
                left = recorded[0] if recorded else left
                self._chart.leaving |= {left} if recorded and self._storage.can_rename else set()
            if debris.only_open(self._storage, left):
                yield from self._still_open(f"{directory}/{entry.name}", left)
            elif not self._chart.busy and self._is_over(f"{directory}/{entry.name}"):
                yield Finding(kind, place, meaning, advice)

    def _is_over(self, path: str) -> bool:
        """Whether nobody is at work on an attempt or a removal any more; the lock, where it tells, is free."""
        if self._in_memory or (self._storage.can_rename and self._repository.lock.taken() is False):
            return True
        age = self._storage.age(path) or 0.0
        if path.startswith(paths.TRASH):
            return age > INTERRUPTED_AFTER
        with contextlib.suppress(OSError):  # a directory; or gone, or damaged
            if owner_is_dead(strict_json.unseal(self._storage.read(path, paths.MANIFEST_LIMIT), path)):
                return True
        return age > STALE_AFTER

    def _notes(self) -> Iterator[Finding]:
        """Notes that speak of no checkpoint, and such as nobody can read."""
        listing = self._chart.listing
        known = {info.id for info in listing.checkpoints}
        if not listing.notes_known:
            meaning = "nobody can tell which checkpoints are pinned: all count as pinned, and retention removes none"
            advice = "give read access to it to those who train"
            yield Finding("unreadable", self._storage.place(paths.NOTES), meaning, advice)
        with _forbidden_is_nothing():
            for id in sorted(noted_ids(self._storage)):
                for path in damaged_notes(self._storage, id):
                    meaning = "a note that cannot be read: it counts as a pin, and keeps its checkpoint for ever"
                    advice = "make it readable, or remove it and pin or annotate the checkpoint again, if it should be"
                    yield Finding("damaged-note", self._storage.place(path), meaning, advice)
                if not (id in known or id in self._chart.unfinished or listing.unreadable or self._chart.busy):
                    place = self._storage.place(f"{paths.NOTES}/{id}")
                    meaning = "pins or annotations of a checkpoint that is gone"
                    yield Finding("orphaned-notes", place, meaning, _MEND.format("removes them"))

    def _history(self) -> Iterator[Finding]:
        """What keeps the run's history from being read or written; nothing depends on it, so all are notes."""
        place = self._storage.place(paths.JOURNAL)
        harmless = "saves, restores and retention need none of it"
        if self._storage.can_rename and self._storage.exists(paths.JOURNAL) and not self._chart.read_only:
            if not _is_directory(place):
                meaning = "it is no directory, so the history of the run is not written down"
                yield Finding("in-the-way", place, f"{meaning}; {harmless}", "move it away", "note")
            elif not _may(place, os.W_OK | os.X_OK):
                meaning = "this user may not write here, so the history would miss what its jobs do"
                yield Finding("unwritable", place, f"{meaning}; {harmless}", "give write access", "note")
        try:
            damaged = self._repository.journal.read().damaged
        except UnreadableCheckpointError as error:
            yield Finding("unreadable", place, f"{error}; {harmless}", "give read access to it", "note")
            return
        if damaged:
            meaning = f"{damaged} of the records of the run's history cannot be read: they are left out"
            yield Finding("damaged-history", place, meaning, f"nothing has to be done: {harmless}", "note")

    def _space(self) -> Iterator[Finding]:
        """Whether the next save has room."""
        free = self._storage.free_bytes()
        newest = next(reversed(self._chart.listing.checkpoints), None)
        if free is None or newest is None or self._chart.read_only:  # an image has no free bytes, and needs none
            return
        written = newest.statistics.get("bytes_written")
        size = written if isinstance(written, int) else newest.size
        if free < 2 * size:
            level: Level = "problem" if free < size else "note"
            meaning = f"{free} bytes are free, and the newest save took {size}"
            advice = "free some space, or keep fewer checkpoints: 'checkpointer prune' says what retention would remove"
            yield Finding(
                "no-space" if level == "problem" else "little-space", self._repository.url, meaning, advice, level
            )

    # ------------------------------------------------------------------------------------------------- checkpoints

    def _checkpoints(self) -> Iterator[Finding]:
        try:
            verdicts = list(self._checked())
        except OSError as error:
            reason = self._storage.redact(str(error))
            meaning = f"the checkpoints cannot be listed, so neither restored: {reason}"
            yield Finding("unreadable", self._repository.url, meaning, "make every manifest.json readable")
            return
        for entry in self._entries(""):
            if paths.parse_checkpoint_name(entry.name) is not None:
                yield from self._name(entry)
        yield from self._unreadable_manifests()
        for info, verdict in verdicts:
            yield from self._described(info, verdict)

    def _checked(self) -> Iterator[tuple[CheckpointInfo, _Verdict]]:
        """List, check each checkpoint whose manifest is whole, and sort all by what to do with them."""
        self._chart.listing = self._repository.list_checkpoints(anew=True)
        for info in self._chart.listing.checkpoints:
            with contextlib.suppress(CheckpointNotFoundError):  # a writer pruned it meanwhile
                if info.id not in self._verdicts:
                    self._verdicts[info.id] = self._check(info)
                    self._progress(info.size)
                verdict = self._verdicts[info.id]
                if not verdict.damage and not verdict.unreadable and info.damaged is None:
                    self._chart.sound.append(info)
                elif verdict.damage and not info.pinned:
                    self._chart.sick.append(name_of(info))
                yield info, verdict
        for item in self._chart.listing.unreadable:
            if isinstance(item.error, CorruptCheckpointError) and not item.may_return:
                self._chart.sick.append(item.name)

    def _check(self, info: CheckpointInfo) -> _Verdict:
        name, manifest = name_of(info), self._repository.manifest(info)
        try:
            try:
                files: Collection[str] = read_contents(self._storage, name, manifest).files
            except (CorruptCheckpointError, FileNotFoundError):  # which is told below
                files = manifest.index
            missing = tuple(path for path in files if not self._storage.exists(f"{name}/{manifest.place(path)}"))
            extra = tuple(extra_files(self._storage, name, manifest, files)) if len(files) > len(manifest.index) else ()
            damage = missing or tuple(self._damage(info, manifest))
        except OSError as error:
            self._repository.manifest(info)  # it has not been removed while it was read?
            return _Verdict(unreadable=self._storage.redact(str(error)))
        if damage:
            self._repository.manifest(info)
        return _Verdict(damage, missing, extra)

    def _damage(self, info: CheckpointInfo, manifest: Manifest) -> Iterator[str]:
        if self._deep:
            report = verify_checkpoint(self._storage, name_of(info), manifest, info)
            if report.unreadable and not report.damage:
                raise UnreadableCheckpointError(report.unreadable[0])
            yield from report.damage
            return
        try:
            with CheckpointReader(self._storage, name_of(info), manifest) as reader:
                reader.check_metadata()
        except (CorruptCheckpointError, FormatVersionError) as error:
            yield str(error)

    def _described(self, info: CheckpointInfo, verdict: _Verdict) -> Iterator[Finding]:
        if verdict.missing:
            names = ", ".join(verdict.missing[:3])
            meaning = f"{len(verdict.missing)} of its files are gone ({names}): it was deleted or copied in part"
            yield Finding("incomplete", info.path, meaning, self._advice_on_damage(pinned=info.pinned))
        elif verdict.damage:
            yield Finding("damaged", info.path, verdict.damage[0], self._advice_on_damage(pinned=info.pinned))
        elif verdict.unreadable:
            yield Finding("unreadable", info.path, verdict.unreadable, "repair the disk, the mount or the permissions")
        elif info.damaged is not None:
            meaning = f"a restore or 'checkpointer verify' found it damaged: {info.damaged}"
            advice = "retention does not count on it; restore another one. A check that passes takes it back"
            yield Finding("damaged", info.path, meaning, advice)
        if not info.pinned:
            yield from self._unremovable(name_of(info), "retention cannot remove it, and a save cannot replace it")
        others = (path for path in verdict.extra if paths.left_by_system(path) is None)  # that goes with it
        foreign = [path for path in others if path.partition("/")[0] not in self._chart.unfinished]
        if foreign:
            meaning = f"holds {len(foreign)} files that it does not list ({', '.join(foreign[:3])})"
            yield Finding(
                "foreign-file", info.path, meaning, "harmless: restores ignore them, pruning keeps them", "note"
            )

    def _unremovable(self, path: str, consequence: str) -> Iterator[Finding]:
        """What nobody can move or delete, as far as it shows without trying."""
        with _forbidden_is_nothing():
            obstacle = self._storage.obstacle(path)
            if obstacle is not None:
                meaning, _, cure = obstacle.partition(": ")
                advice = f"{cure}. To protect a checkpoint, pin it: 'checkpointer pin'"
                yield Finding("unremovable", self._storage.place(path), f"{meaning}: {consequence}", advice)

    def _unreadable_manifests(self) -> Iterator[Finding]:
        for item in self._chart.listing.unreadable:
            if item.link is not None:
                advice = "move the checkpoint back to this name, or pass the directory that it lies in as the run root"
                yield Finding("link", item.path, f"{item.error}; restores pass over it", advice)
            elif isinstance(item.error, UnreadableCheckpointError):
                meaning = f"{item.error}. What is newest cannot be known, so restore_latest stops here"
                advice = "make it readable for those who train; until then mgr.restore(step) takes another one"
                yield Finding("unreadable", item.path, meaning, advice)
            elif isinstance(item.error, FormatVersionError):
                advice = "update this library: until then restore_latest stops here"
                yield Finding("newer-format", item.path, str(item.error), advice)
            else:
                yield Finding("damaged", item.path, str(item.error), self._advice_on_damage())
                yield from self._unremovable(item.name, "it cannot be moved out of the way of a save")

    def _advice_on_damage(self, *, pinned: bool = False) -> str:
        if not self._chart.sound:
            return "restore a backup; nothing is moved, since no checkpoint of this run is whole"
        others = "restores pass over it"
        if pinned:
            return f"{others}; it is pinned, and so stays where it is"
        return f"{others}; --fix moves it to quarantine" if self._storage.can_rename else others

    def _name(self, entry: Entry) -> Iterator[Finding]:
        """A name of a checkpoint that holds none, or that is not the plain one."""
        place, step = self._storage.place(entry.name), paths.parse_checkpoint_name(entry.name)
        if step is None or any(item.name == entry.name and item.may_return for item in self._chart.listing.unreadable):
            return  # its manifest is a finding of its own
        if not entry.is_dir or not self._storage.exists(f"{entry.name}/{paths.MANIFEST}"):
            yield from self._without_manifest(Stranger(entry.name, place, step, entry.is_dir, entry.link))
        elif paths.is_second_name(entry.name):
            if self._storage.exists(paths.checkpoint_name(step)):
                meaning = f"the second checkpoint of step {step}: another one holds the plain name, and is kept"
                yield Finding("second-name", place, meaning, "both can be restored; retention judges them", "note")
            elif self._storage.can_rename and not self._chart.busy:
                meaning = f"a replacement of step {step} that was interrupted: it can be restored by any reader"
                yield Finding("second-name", place, meaning, _MEND.format("gives it the plain name"))

    def _without_manifest(self, stranger: Stranger) -> Iterator[Finding]:
        """What has the name of a checkpoint and no manifest; the work of a writer that has not ended is none."""
        if stranger.name in self._chart.leaving:
            yield from self._unremovable(stranger.name, "its removal cannot end")
            return
        with _forbidden_is_nothing():
            found = examine(self._storage, stranger)
            if found is None:
                return
            meaning = f"it {found.what}: no reader sees it"
            if self._storage.can_rename:
                meaning += f", and step {stranger.step} cannot be saved"
            ours = found.kind == "ours" and stranger.is_dir
            yield Finding("no-manifest" if ours else "in-the-way", stranger.path, meaning, found.cure)

    # ----------------------------------------------------------------------------------------------------- helpers

    @property
    def _in_memory(self) -> bool:
        return self._repository.url.startswith("memory://")

    def _entries(self, path: str) -> list[Entry]:
        """The names in a directory, in order; none where it may not be read, which is a finding of its own."""
        try:
            return sorted(self._storage.list_directory(path))
        except OSError as error:
            if error.errno not in _FORBIDDEN:
                raise
            return []


@contextlib.contextmanager
def _forbidden_is_nothing() -> Iterator[None]:
    try:
        yield
    except CheckpointerError:
        return
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise


def _is_directory(place: str) -> bool:
    return os.path.isdir(place) and not os.path.islink(place)


def _is_read_only(place: str) -> bool:
    """Whether the file system is mounted read-only: then no right to a file helps."""
    with contextlib.suppress(OSError, AttributeError):  # gone; or Windows, which does not tell
        return bool(os.statvfs(place).f_flag & os.ST_RDONLY)
    return False


def _may(place: str, mode: int) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.path.islink(place) or os.access(place, mode, effective_ids=effective)


def _user() -> object:
    return os.geteuid() if hasattr(os, "geteuid") else "another"


__all__ = ["Diagnosis", "Doctor", "Finding"]
