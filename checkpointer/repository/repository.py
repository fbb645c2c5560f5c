"""One run root: list, write, commit, read, verify, remove. Disk is the truth: what is remembered is held against it."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    SaveError,
    UnreadableCheckpointError,
)
from checkpointer.format import paths
from checkpointer.format.event import Event
from checkpointer.format.index import FileRecord
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.checkpoint_reader import ONE_PROCESS, CheckpointReader, ReadingRank
from checkpointer.repository.commit import Attempt, for_each, obstacle_of, protocol_for, read_manifest
from checkpointer.repository.contents import read_contents
from checkpointer.repository.journal import Journal
from checkpointer.repository.known import NONE_THERE, Checkpoints, Key, Known, KnownManifests, Source
from checkpointer.repository.known_file import WORTH_WRITING
from checkpointer.repository.lock import WriterLock
from checkpointer.repository.newest import RunId, newest_manifest
from checkpointer.repository.notes import (
    Note,
    add_note,
    annotated,
    noted_as_far_as_known,
    noted_ids,
    read_notes,
    remove_notes,
)
from checkpointer.repository.sequence import Sequences
from checkpointer.repository.strangers import Stranger
from checkpointer.repository.verify import CheckpointReport, VerifyReport, verify_checkpoint
from checkpointer.storage import Entry, Storage, is_refusal, refusals_typed, unreadable
from checkpointer.storage.roots import check_content
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")


@dataclass(frozen=True)
class Unreadable:
    """A directory with a manifest that cannot be used."""

    name: str
    path: str
    step: int
    error: CheckpointerError
    """CorruptCheckpointError; FormatVersionError for one that a newer library wrote; UnreadableCheckpointError where
    only the system does not let it be read."""
    link: str | None = None
    """Where it leads, if it is a symbolic link in the place of a checkpoint."""

    @property
    def may_return(self) -> bool:
        """Whether it may be readable some day as it is: then it comes back with the sequence that it has."""
        lies_there = isinstance(self.error, UnreadableCheckpointError) or isinstance(self.error.__cause__, OSError)
        return lies_there or self.link is not None


@dataclass(frozen=True)
class Listing:
    """What a run root holds."""

    checkpoints: Checkpoints = NONE_THERE
    """Committed checkpoints with a readable manifest, in commit order."""
    unreadable: tuple[Unreadable, ...] = ()
    strangers: tuple[Stranger, ...] = ()
    """What has the name of a checkpoint and no manifest: no checkpoint of this library, or not yet, or no more."""
    others: tuple[str, ...] = ()
    """Every other name, where there is no checkpoint."""
    notes_known: bool = True
    """Whether the notes could be listed; if not, every checkpoint counts as pinned."""

    @property
    def empty(self) -> bool:
        return not self.checkpoints and not self.unreadable


class Repository:
    """The checkpoints below one storage's root. Only ``begin`` to ``recover`` need the writer's lock."""

    def __init__(self, storage: Storage, *, must_exist: bool = False) -> None:
        """``must_exist``: for those who only read: a run root that is not there is an error, and not an empty run."""
        self.storage = storage
        self._must_exist = must_exist
        self._shared: dict[str, dict[str, tuple[str, int]]] = {}
        self.lock = WriterLock(storage.url, storage.lock_path, lambda: storage.make_directory(paths.PRIVATE))
        self.journal = Journal(storage, self.lock)
        self._known = KnownManifests(storage, self.lock)
        self._sequences = Sequences(self.lock)
        self._run = RunId(self)
        self._protocol = protocol_for(storage, self.lock, self.journal)
        self._abandoned: list[Attempt] = []
        """Failed attempts whose files could not be removed yet."""
        self._half_removed: list[str] = []
        """The ids of checkpoints whose removal has failed."""
        self.refused: dict[str, str] = {}
        """Why the system did not let the files of these be read when a restore or ``verify`` of this process tried
        last, by id. Not on disk: it says something of this user, mount or day, and nothing of the checkpoint."""

    @property
    def url(self) -> str:
        """The run root for humans: a path, or a URL without credentials."""
        return self.storage.url

    def list_checkpoints(self, *, anew: bool = False) -> Listing:
        """Everything that is committed. Reads the notes, and each manifest that is new or changed since it was read.

        ``anew``: reads all of them, for those who look for damage that no stamp of a file shows.

        Raises:
            CheckpointNotFoundError: there is no run root, and it has to be there.
            ConfigError: the run root is itself a checkpoint, or a file.
            UnreadableCheckpointError: the run root cannot be listed.
        """
        if anew:
            self._known.forget()
        return self._listing(self._entries())

    def _entries(self) -> list[Entry]:
        """What the run root holds."""
        with refusals_typed(self.storage, ""):
            entries = self.storage.list_directory("")
        self._check_root(entries)
        return entries

    def _listing(self, entries: list[Entry], *, whole: bool = True) -> Listing:
        """``whole``: these are all that the run root holds."""
        named = [entry for entry in entries if paths.parse_checkpoint_name(entry.name) is not None]
        names = [entry.name for entry in named if entry.is_dir]
        noted = noted_as_far_as_known(self.storage) if names else set()
        with refusals_typed(self.storage, ""):
            look = self._known.look(names)
            unknown = [name for name in names if name not in look.known]
            files = [f"{name}/{paths.MANIFEST}" for name in unknown]
            manifests = self.storage.read_many(files, paths.MANIFEST_LIMIT) if files else []
        read: dict[str, CheckpointInfo] = {}
        unreadable = [item for entry in named if entry.link is not None and (item := self._behind(entry))]
        strangers = [self._stranger(entry) for entry in named if not entry.is_dir]
        for name, data in zip(unknown, manifests, strict=True):
            try:
                info = self._describe(name, data)
            except (CorruptCheckpointError, FormatVersionError, UnreadableCheckpointError) as error:
                unreadable.append(Unreadable(name, self.storage.place(name), _step_of(name), error))
            else:
                read |= {name: info} if info else {}
                strangers += [] if info else [self._stranger(Entry(name, is_dir=True, is_file=False))]
        self._known.learn(look, read, whole=whole)
        found = sorted([*look.known.values(), *(Known.read(name, info) for name, info in read.items())], key=_order)
        links = {item.name for item in unreadable}
        return Listing(
            self._with_notes(found, noted),
            tuple(sorted(unreadable, key=lambda item: item.step)),
            tuple(item for item in strangers if item.name not in links),
            () if found or unreadable else tuple(entry.name for entry in entries),
            notes_known=noted is not None,
        )

    def _with_notes(self, found: list[Known], noted: set[str] | None) -> Checkpoints:
        """``noted``: the ids of those that have notes; ``None``: perhaps all of them."""
        annotated = [known for known in found if noted is None or known.key[2] in noted]
        source = Source(self.storage.place, self._read_anew)
        infos = {known.name: self.current(known.info(source)) for known in annotated}
        return Checkpoints(found, source, infos)

    def _read_anew(self, name: str) -> CheckpointInfo:
        info = self._describe(name, self.storage.read_many([f"{name}/{paths.MANIFEST}"], paths.MANIFEST_LIMIT)[0])
        if info is None:
            raise CheckpointNotFoundError(f"{self.storage.place(name)} has been removed since it was listed")
        return info

    def next_sequence(self) -> int:
        """The sequence of the next commit: above that of every other, also of those that cannot be read right now.

        The holder of the lock reads what has appeared since the last commit alone; see :class:`Sequences`.
        """
        entries = self._entries()
        new = self._sequences.unseen(entries)
        return self._sequences.next(self._listing(new, whole=new is entries))

    def keep_known(self, *, least: int = WORTH_WRITING) -> None:
        """Write down what later processes need not read again, if ``least`` are new; see :class:`KnownManifests`."""
        self._known.write_file(least=least)

    def committed_beside(self, known: Collection[str]) -> bool:
        """Whether a checkpoint has been committed under a name that is not ``known``; one listing if not."""
        names = [entry.name for entry in self.storage.list_directory("") if entry.is_dir and entry.name not in known]
        listed = [f"{name}/{paths.MANIFEST}" for name in names if paths.parse_checkpoint_name(name) is not None]
        found = self.storage.read_many(listed, paths.MANIFEST_LIMIT) if listed else []
        return any(not isinstance(data, FileNotFoundError) for data in found)

    def find(self, step: int) -> CheckpointInfo:
        """The checkpoint of ``step``: the latest committed, if there are several.

        Raises:
            CheckpointNotFoundError: there is none; names those that there are.
            CorruptCheckpointError, FormatVersionError, UnreadableCheckpointError: there is one, but its manifest cannot
                be used.
        """
        listing = self.list_checkpoints()
        for info in reversed(listing.checkpoints):
            if info.step == step:
                return info
        for item in listing.unreadable:
            if item.step == step:
                raise item.error
        stranger = next((item for item in listing.strangers if item.step == step), None)
        about = f". {stranger.path} is none: 'checkpointer doctor {self.url}' says what it is" if stranger else ""
        raise CheckpointNotFoundError(
            f"no checkpoint of step {step} in {self.url}; there are "
            f"{_some([info.step for info in listing.checkpoints]) or 'none at all'}{about}"
        )

    def current(self, info: CheckpointInfo) -> CheckpointInfo:
        """``info`` with its notes as they are now."""
        return annotated(info, read_notes(self.storage, info.id))

    def manifest(self, info: CheckpointInfo) -> Manifest:
        """The manifest of a listed checkpoint.

        Raises:
            CheckpointNotFoundError: it has been removed since, or replaced.
        """
        name = name_of(info)
        manifest = read_manifest(self.storage, name)
        if manifest is None or manifest.id != info.id:
            self._known.forget()  # if it is not gone, what is known is wrong: then the next listing is right
            raise CheckpointNotFoundError(f"{info.path} has been removed, or replaced, since it was listed")
        return manifest

    def newest_manifest(self, checkpoints: Sequence[CheckpointInfo] | None = None) -> Manifest | None:
        """The manifest of the checkpoint committed last, or of the last of ``checkpoints``; ``None`` where none is."""
        return newest_manifest(self, self.list_checkpoints().checkpoints if checkpoints is None else checkpoints)

    def shared_files(self, info: CheckpointInfo) -> Mapping[str, tuple[str, int]]:
        """The files of a checkpoint that share another one's bytes: its id, and how many. Read once: none ever changes.

        Empty if its index cannot be read: whoever needs its bytes says so.
        """
        if len(info.copies) < 2:
            return {}
        if info.id not in self._shared:
            try:
                files = read_contents(self.storage, name_of(info), self.manifest(info)).files
            except (CheckpointerError, OSError):
                return {}
            self._shared[info.id] = {path: (file.origin, file.size) for path, file in files.items() if file.origin}
        return self._shared[info.id]

    def open(self, info: CheckpointInfo, reader: ReadingRank = ONE_PROCESS) -> CheckpointReader:
        """Open a listed checkpoint for reading.

        Raises:
            CheckpointNotFoundError: it has been removed since: list again.
            CorruptCheckpointError: it is damaged.
        """
        manifest = self.manifest(info)
        try:
            return CheckpointReader(self.storage, name_of(info), manifest, reader)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"{info.path} was removed while it was opened") from error

    def verify(self, info: CheckpointInfo) -> CheckpointReport:
        """Check every byte of a listed checkpoint. Damage is noted beside it, and taken back where there is none.

        Raises:
            CheckpointNotFoundError: it has been removed since, or meanwhile.
        """
        try:
            manifest = self.manifest(info)
            report = verify_checkpoint(self.storage, name_of(info), manifest, info)
        except (CorruptCheckpointError, FormatVersionError, UnreadableCheckpointError) as error:
            report = _unchecked(info.path, info.step, info, error)
            self.remember_refusal(info, report.unreadable)
            return report
        self.remember_refusal(info, report.unreadable)
        if not report.ok:
            self.manifest(info)  # it is not damaged if it has been removed, or replaced, while it was read
        self._remember(info, report)
        return report

    def _remember(self, info: CheckpointInfo, report: CheckpointReport) -> None:
        """Note beside a checkpoint what a check has found, where that is news, so that retention knows it.

        Who may not write here is a reader, and has been told: nobody needs more of them.
        """
        if report.unreadable:
            return  # says nothing of the checkpoint, for or against it
        damaged = "; ".join(report.damage)[:1000]
        try:
            if damaged == (self.current(info).damaged or ""):
                return
            self.note(info, Note(damaged=damaged))
        except (OSError, CheckpointerError) as error:
            messages.log(logger.info, "what the check of %s found is not remembered: %s", info.path, error)

    def verify_all(self) -> VerifyReport:
        """Check every byte of every checkpoint."""
        listing = self.list_checkpoints()
        reports = []
        for info in listing.checkpoints:
            with contextlib.suppress(CheckpointNotFoundError):  # a writer pruned it since it was listed
                reports.append(self.verify(info))
        reports += [_unchecked(item.path, item.step, None, item.error) for item in listing.unreadable]
        return VerifyReport(tuple(reports))

    def remember_refusal(self, info: CheckpointInfo, reasons: Sequence[str]) -> None:
        """Retention does not count on what could not be read a moment ago; no ``reasons``: it could be read."""
        if reasons:
            self.refused[info.id] = reasons[0]
        else:
            self.refused.pop(info.id, None)

    def note(self, info: CheckpointInfo, note: Note) -> None:
        """Append a note; no lock is needed.

        Raises:
            SaveError: it cannot be written.
        """
        if note.damaged is not None:
            self.journal.add("damage" if note.damaged else "intact", info, reason=note.damaged or None)
        try:
            add_note(self.storage, info.id, note)
        except CheckpointerError:
            raise
        except OSError as error:
            reason = self.storage.redact(error.strerror or str(error))
            place = self.storage.place(f"{paths.NOTES}/{info.id}")
            failed = SaveError(
                f"nothing could be noted of {info.path}: {reason} ({place}). Make it writable for this user"
            )
            failed.errno = error.errno
            raise failed from error

    def history(self) -> list[Event]:
        """What has happened to the run, in order. Needs no lock. Warns of records that cannot be read.

        Raises:
            CheckpointNotFoundError, ConfigError, UnreadableCheckpointError: as for ``list_checkpoints``.
        """
        with refusals_typed(self.storage, ""):
            self._check_root(self.storage.list_directory(""))
        self.journal.flush()
        history = self.journal.read()
        if history.damaged:
            messages.warn(
                f"{history.damaged} of the records in {self.storage.place(paths.JOURNAL)} cannot be read, and are left "
                "out of the history. The checkpoints need none of them",
            )
        return list(history.events)

    def release(self) -> None:
        """Free the writer's lock, once what has happened is written down."""
        try:
            self.journal.flush()
        finally:  # Ctrl-C, too
            self.lock.release()

    def begin(self, step: int, size: int) -> Attempt:
        """Start writing a checkpoint of about ``size`` bytes.

        Raises:
            SaveError: there is not enough free space for it.
        """
        self.check_space(step, size)
        return self._protocol.begin(step)

    def join(self, step: int, id: str) -> Attempt:
        """The attempt that the coordinator has begun, for another rank to write its files."""
        return self._protocol.join(step, id)

    def check_space(self, step: int, size: int) -> None:
        """Raise SaveError, with the errno of a full disk, unless ``size`` bytes can be written; quotas are unknown."""
        with contextlib.suppress(OSError):  # logged when it failed first; the space counts as taken
            self._clear_away()
        free = self.storage.free_bytes()
        if free is not None and free < size:
            full = SaveError(
                f"{self.url} has {free} bytes free, the checkpoint of step {step} takes {size}, so {size - free} are "
                "missing; nothing was written. Free some space, or keep fewer checkpoints (keep: in the configuration)"
            )
            full.errno = errno.ENOSPC
            raise full

    def current_source(self, source: ReuseSource) -> ReuseSource | None:
        """``source`` with the notes of this moment; ``None`` if it has been removed, replaced or damaged since."""
        try:
            self.manifest(source.info)
        except (CheckpointNotFoundError, CorruptCheckpointError, FormatVersionError, UnreadableCheckpointError):
            return None
        return replace(source, info=self.current(source.info))

    def can_reuse(self, source: ReuseSource) -> bool:
        """Whether ``source`` is still there, and nothing is known against it."""
        current = self.current_source(source)
        return current is not None and current.info.damaged is None

    def reuse(self, attempt: Attempt, path: str, source: ReuseSource, record: FileRecord) -> bool:
        """Let a file of an attempt share the bytes of the same file of ``source``; ``False``: it has to be written."""
        if not self.can_reuse(source):
            return False
        return attempt.reuse(path, f"{name_of(source.info)}/{source.place(path)}", record)

    def commit(self, attempt: Attempt, manifest: Manifest) -> CheckpointInfo:
        """Make an attempt visible and durable: the one commit point. Gives it the id of the run."""
        manifest = replace(manifest, run=self._run.get())
        with self._sequences.doubted_if_it_fails():
            name = self._protocol.commit(attempt, manifest)
        self._sequences.committed(name, manifest.sequence)
        info = manifest.info(self.storage.place(name))
        self.journal.committed(info)
        return self.current(info)

    def abandon(self, attempt: Attempt) -> None:
        """Remove what a failed attempt has written; what cannot be removed now, before the next one begins.

        A process that lives long would otherwise fill the disk with its failures.
        """
        self._abandoned.append(attempt)
        self._clear_away()

    def remove(self, info: CheckpointInfo) -> bool:
        """Remove a checkpoint; ``False`` if it was pinned meanwhile, and stays."""
        self._shared.pop(info.id, None)
        try:
            manifest = self.manifest(info)
        except CheckpointNotFoundError:
            return True
        self.retry_removals()
        self._sequences.leaves(name_of(info))
        try:
            with self._sequences.doubted_if_it_fails():
                return self._protocol.remove(name_of(info), manifest)
        except OSError:
            if manifest.id not in self._half_removed:
                self._half_removed.append(manifest.id)
            raise

    def why_stuck(self, info: CheckpointInfo, error: Exception) -> str:
        """Why a checkpoint could not be removed, for humans: ``error``, and what shows of its cause."""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        places = (name_of(info), f"{paths.TRASH}/{info.id}")
        found = (self.storage.obstacle(place) for place in places)
        obstacle = next((reason for reason in found if reason), None)
        return self.storage.redact(f"{text} ({obstacle})" if obstacle else text)

    def recover(self) -> None:
        """Remove what dead writers left half done, and finish what they left half removed.

        What cannot be cleared away is a warning: it keeps nobody from saving, or from removing anything else.
        """
        try:
            for_each([self._protocol.recover, self._forget_notes], lambda work: work())
        except (OSError, CheckpointerError) as error:
            obstacle = obstacle_of(self.storage, error) if isinstance(error, OSError) else None
            reason = f"{error} ({obstacle})" if obstacle else str(error)
            messages.warn(
                f"could not clear away all leftovers in {self.url}: {self.storage.redact(reason)}. The next writer "
                f"tries again; 'checkpointer doctor {self.url}' says more",
            )

    def _forget_notes(self) -> None:
        noted = noted_ids(self.storage)
        if not noted:
            return
        listing = self.list_checkpoints()
        if not listing.unreadable:  # an unreadable manifest may belong to any note
            for id in noted.difference(listing.checkpoints.ids):
                remove_notes(self.storage, id)

    def quarantine(self, name: str) -> str | None:
        """Move a damaged checkpoint to where nothing is ever deleted; ``None`` where the storage cannot move."""
        return self._protocol.quarantine(name)

    def _clear_away(self) -> None:
        for_each(self._abandoned.copy(), self._abandon)

    def _abandon(self, attempt: Attempt) -> None:
        self._protocol.abandon(attempt)
        self._abandoned.remove(attempt)

    def retry_removals(self) -> None:
        """Go on with removals that could not end: they had failed, or a process had a file open."""
        with contextlib.suppress(OSError):  # said when it failed first; other removals may succeed all the same
            for_each({*self._half_removed, *self._protocol.waiting}, self._finish_removal)

    def _finish_removal(self, id: str) -> None:
        self._protocol.finish_removal(id)
        if id in self._half_removed:
            self._half_removed.remove(id)

    def _check_root(self, entries: list[Entry]) -> None:
        """Whether this is a run root, by what it holds."""
        if any(entry.name == paths.MANIFEST and entry.is_file for entry in entries):
            with contextlib.suppress(OSError):
                check_content(self.url, self.storage.read(paths.MANIFEST, paths.MANIFEST_LIMIT))
        if entries or not self._must_exist or (self.storage.can_rename and self.storage.exists("")):
            return
        with contextlib.suppress(OSError):
            self.storage.open("").close()
            raise ConfigError(f"the run root {self.url} is a file, and must be a directory")
        raise CheckpointNotFoundError(
            f"there is no run root {self.url}, or nothing is in it; check the path for typing errors. If the job that "
            "writes it has not begun yet, mgr.watch() waits for it"
        )

    def _stranger(self, entry: Entry) -> Stranger:
        return Stranger(entry.name, self.storage.place(entry.name), _step_of(entry.name), entry.is_dir, entry.link)

    def _behind(self, link: Entry) -> Unreadable | None:
        """A link in the place of a checkpoint that leads, or may have led, to one; ``None`` if it leads to no such."""
        leads = self.storage.exists(f"{link.name}/.")
        if leads and not self.storage.exists(f"{link.name}/{paths.MANIFEST}"):
            return None
        place = self.storage.place(link.name)
        what = "a checkpoint that was moved away and linked back" if leads else "no directory that is there"
        error = CorruptCheckpointError(
            f"{place} is a link to {link.link}, {what}: links in a run root are never followed. Move the directory "
            "itself back to this name, or mount it here; a run root may be a link as a whole"
        )
        return Unreadable(link.name, place, _step_of(link.name), error, link.link)

    def _describe(self, name: str, data: bytes | Exception) -> CheckpointInfo | None:
        """The checkpoint in directory ``name``, without its notes; ``None`` if it has no manifest, and so is none."""
        where = self.storage.place(f"{name}/{paths.MANIFEST}")
        if isinstance(data, FileNotFoundError):
            return None
        if isinstance(data, OSError) and data.errno == errno.EIO:
            raise CorruptCheckpointError(f"{where} cannot be read: {data}") from data
        if isinstance(data, OSError) and not isinstance(data, CheckpointerError) and is_refusal(data):
            raise unreadable(self.storage, f"{name}/{paths.MANIFEST}", data) from data
        if isinstance(data, Exception):
            raise data
        manifest = parse_manifest(data, where)
        if manifest.step != _step_of(name):
            raise CorruptCheckpointError(f"{where} is the manifest of step {manifest.step}: files were swapped")
        return manifest.info(self.storage.place(name))


def _unchecked(path: str, step: int, info: CheckpointInfo | None, error: CheckpointerError) -> CheckpointReport:
    """The report of a checkpoint whose manifest cannot be used."""
    if isinstance(error, CorruptCheckpointError):
        return CheckpointReport(path, step, info, (str(error),), (), 0)
    return CheckpointReport(path, step, info, (), (), 0, (str(error),))


def _order(known: Known) -> Key:
    return known.key


def _step_of(name: str) -> int:
    step = paths.parse_checkpoint_name(name)
    assert step is not None, name
    return step


def name_of(info: CheckpointInfo) -> str:
    """The name of a checkpoint's directory in the run root."""
    return info.path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _some(steps: list[int], most: int = 10) -> str:
    shown = ", ".join(map(str, steps[-most:]))
    return f"{len(steps) - most} more, {shown}" if len(steps) > most else shown
