"""What each command shows, collected from the run root as plain data. Nothing is printed here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from checkpointer.config.rules import rules_of, saved_keep
from checkpointer.config.settings import Config
from checkpointer.errors import (
    CheckpointerError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    RunLockedError,
    UnreadableCheckpointError,
)
from checkpointer.format import paths
from checkpointer.format.event import Event
from checkpointer.format.index import Component, FileRecord
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.manifest import Manifest, metric_to_json
from checkpointer.format.trees import spelled_out
from checkpointer.repository.copies import holders
from checkpointer.repository.notes import Note
from checkpointer.repository.repository import Listing, Repository, Unreadable
from checkpointer.storage import ReadFile, Storage, open_storage

if TYPE_CHECKING:
    from checkpointer.policy.retention import KeepPolicy, RetentionPlan
    from checkpointer.repository.doctor import Diagnosis

Json: TypeAlias = "dict[str, Any]"
Status: TypeAlias = Literal["ok", "damaged", "unreadable", "unsupported", "removed"]


@dataclass(frozen=True)
class Row:
    """One checkpoint of a listing, readable or not."""

    step: int
    name: str
    """Its directory."""
    path: str
    info: CheckpointInfo | None
    """``None`` where the manifest cannot be used."""
    status: Status = "ok"
    reason: str | None = None
    """Why the status is not ``ok``."""
    best: tuple[str, ...] = ()
    """The metrics by which it is the best, where the run's rules are asked for."""

    def to_json(self, *, statistics: bool = False) -> Json:
        info = self.info
        cost: Json = {"statistics": dict(info.statistics) if info else None} if statistics else {}
        return {
            "step": self.step,
            "epoch": info.epoch if info else None,
            "sequence": info.sequence if info else None,
            "id": info.id if info else None,
            "parent": info.parent if info else None,
            "created": info.created.isoformat() if info else None,
            "size": info.size if info else None,
            "metrics": {name: metric_to_json(value) for name, value in info.metrics.items()} if info else None,
            "tags": list(info.tags) if info else None,
            "pinned": info.pinned if info else None,
            "finite": info.finite if info else None,
            "note": info.note if info else None,
            "path": self.path,
            "status": self.status,
            "reason": self.reason,
            **cost,
        }


@dataclass(frozen=True)
class Details:
    """One checkpoint with all that its files say about it."""

    row: Row
    manifest: Manifest
    components: Mapping[str, Component] = field(default_factory=dict)
    """Empty where ``problem`` is set; ``files`` then are those that the manifest names."""
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The other checkpoints, in commit order, that lie on the same physical copy of a file; files with none are not in
    it."""
    problem: CheckpointerError | None = None

    def to_json(self) -> Json:
        return {
            **self.row.to_json(),
            "run": self.manifest.run,
            **_members_there(self.manifest),
            "world_size": self.manifest.world_size,
            "environment": dict(self.manifest.environment),
            "statistics": dict(self.manifest.statistics),
            "files": {
                path: {"size": file.size, "xxh3": file.xxh3, "shared_with": list(self.shared.get(path, ()))}
                for path, file in self.files.items()
            },
            "components": {name: _component_to_json(part) for name, part in self.components.items()},
        }


def _members_there(manifest: Manifest) -> Json:
    """Members that most manifests do without, where they are there."""
    members: Json = {
        "rules": dict(manifest.rules),
        "foreign": manifest.foreign,
        "replaces": manifest.replaces,
        "slimmed": list(manifest.slimmed),
    }
    return {name: value for name, value in members.items() if value}


@dataclass(frozen=True)
class Rules:
    """The ``keep`` rules of a run, and who says so."""

    keep: KeepPolicy
    source: str

    def to_json(self) -> Json:
        return {"source": self.source, "keep": rules_of(Config(keep=self.keep))["keep"]}


@dataclass(frozen=True)
class Checked:
    """What ``verify`` found about one checkpoint."""

    row: Row
    problems: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Files that the checkpoint does not list: harmless."""
    bytes_read: int = 0

    def to_json(self) -> Json:
        return {
            "step": self.row.step,
            "path": self.row.path,
            "status": self.row.status,
            "problems": list(self.problems),
            "extra_files": list(self.extra),
            "bytes_read": self.bytes_read,
        }


@contextlib.contextmanager
def opened(root: str, options: Mapping[str, object], *, durable: bool = True) -> Iterator[Repository]:
    """The repository of ``root``. Errors that its file system's library raises lose the secrets they may quote."""
    try:
        storage = open_storage(root, options, durable=durable)
    except (TypeError, AttributeError) as error:  # an option that the file system does not take
        raise ConfigError(f"cannot open the run root with these storage options: {error}") from error
    try:
        yield Repository(storage)
    except CheckpointerError:
        raise
    except OSError as error:
        text = describe(error)
        redacted = storage.redact(text)
        if redacted == text:
            raise
        raise OSError(redacted) from None


def describe(error: BaseException) -> str:
    """An error in one sentence; for those of the operating system, place and reason without the number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def listing(repository: Repository) -> list[Row]:
    """Every checkpoint in commit order, those without a usable manifest (which have no order) last.

    Raises:
        CheckpointNotFoundError: there is none, or no run root.
    """
    return _rows(_listed(repository))


def ranked_listing(repository: Repository) -> tuple[list[Row], Rules | None, str | None]:
    """As ``listing``, the best of them by the rules of the newest one; these, or why they cannot be used."""
    from checkpointer.policy.retention import rank

    rows = listing(repository)
    infos = [row.info for row in rows if row.info is not None]
    try:
        rules, problem = _saved_rules(repository, infos)
    except (CheckpointerError, OSError) as error:  # the list is what was asked for
        rules, problem = None, f"the rules of the run cannot be read: {describe(error)}"
    best: dict[str, list[str]] = {}
    for rule in rules.keep.best if rules else ():
        for info in rank(infos, rule)[:1]:
            best.setdefault(info.id, []).append(rule.monitor)
    return [replace(row, best=tuple(best.get(row.info.id, ()))) if row.info else row for row in rows], rules, problem


def rules_to_prune_by(repository: Repository) -> Rules:
    """Those that the newest checkpoint was saved with.

    Raises:
        CheckpointNotFoundError: there is no checkpoint, or no run root.
        ConfigError: it holds none, or none that can be used.
    """
    rules, problem = _saved_rules(repository, _listed(repository).checkpoints)
    if rules is None:
        reason = problem or f"the newest checkpoint in {repository.url} does not say which rules it was saved with"
        raise ConfigError(f"{reason}. Say what stays with --config FILE")
    return rules


def _saved_rules(repository: Repository, checkpoints: Sequence[CheckpointInfo]) -> tuple[Rules | None, str | None]:
    newest = repository.newest_manifest(checkpoints)
    if newest is None:
        return None, None
    name = paths.checkpoint_name(newest.step)
    saved = saved_keep(newest.rules, name)
    if saved.keep is None:
        return None, saved.problem
    return Rules(saved.keep, name), None


def details(repository: Repository, step: int | None) -> Details:
    """The checkpoint of ``step``, or the newest readable one. Damage behind the manifest is told in ``problem``."""
    found = _listed(repository)
    if step is None and not found.checkpoints:
        raise found.unreadable[-1].error
    info = repository.find(step) if step is not None else found.checkpoints[-1]
    manifest = repository.manifest(info)
    try:
        with repository.open(info) as reader:
            shared = _shared(repository, info, found.checkpoints)
            return Details(_row(info), manifest, reader.index.components, dict(reader.files), shared)
    except (CorruptCheckpointError, FormatVersionError, UnreadableCheckpointError) as error:
        row = replace(_row(info), status=_status_of(error), reason=str(error))
        return Details(row, manifest, files=manifest.index, problem=error)


def _shared(
    repository: Repository, info: CheckpointInfo, checkpoints: Sequence[CheckpointInfo]
) -> dict[str, tuple[str, ...]]:
    """The names of the other checkpoints that lie on the same bytes as each file of ``info``, by what is on disk."""
    on_disk = holders(repository.storage, checkpoints, repository.shared_files)
    mine = {path: bytes_of for (path, id), bytes_of in on_disk.items() if id == info.id}
    found = {
        path: tuple(
            _row(item).name for item in checkpoints if item.id != info.id and on_disk.get((path, item.id)) == own
        )
        for path, own in mine.items()
    }
    return {path: names for path, names in found.items() if names}


def checks(repository: Repository, step: int | None) -> Checks:
    """What ``verify`` is going to check: everything, or every checkpoint of ``step``."""
    rows = [row for row in listing(repository) if step is None or row.step == step]
    if not rows and step is not None:
        repository.find(step)  # raises, and says which there are
    return Checks(repository, rows)


@dataclass(frozen=True)
class Checks:
    """Checkpoints to check, one after the other."""

    repository: Repository
    rows: list[Row]

    @property
    def bytes(self) -> int:
        """How many will be read; indexes, which are read twice, count once."""
        return sum(row.info.size for row in self.rows if row.info)

    def run(self, count: Callable[[int], object]) -> Iterator[Checked]:
        """Read every byte of each, telling ``count`` as it goes; one that is pruned meanwhile is no problem."""
        counting = Repository(cast("Storage", _Counting(self.repository.storage, count)))
        for row in self.rows:
            yield _check(counting, row, row.info) if row.info else Checked(row, (row.reason or "",))


def _check(repository: Repository, row: Row, info: CheckpointInfo) -> Checked:
    try:
        report = repository.verify(info)
        if not report.ok:
            with contextlib.suppress(CorruptCheckpointError, FormatVersionError):
                repository.manifest(info)  # its files are missing because it is gone?
    except CheckpointNotFoundError as error:
        return Checked(replace(row, status="removed", reason=str(error)))
    status: Status = "ok" if report.ok else "damaged" if report.damage else "unreadable"
    problems = report.damage + report.unreadable
    row = replace(row, status=status, reason=problems[0] if problems else None)
    return Checked(row, problems, report.extra, report.bytes_read)


def pruned(repository: Repository, policy: KeepPolicy, *, dry_run: bool) -> tuple[RetentionPlan, list[Row]]:
    """Plan, and unless ``dry_run`` carry it out under the writer's lock. Also the checkpoints that no plan covers."""
    from checkpointer.repository.prune import prune  # only this command needs retention

    unreadable = [row for row in listing(repository) if row.info is None]
    plan = prune(repository, policy, dry_run=True) if dry_run else _prune_locked(repository, policy)
    return plan, unreadable


def diagnosed(repository: Repository, count: Callable[[int], object], *, fix: bool, deep: bool) -> Diagnosis:
    """Look the run root over, and with ``fix`` mend what is safe."""
    from checkpointer.repository.doctor import Doctor  # only this command needs it

    doctor = Doctor(repository, deep=deep, progress=count)
    return doctor.mend() if fix else doctor.examine()


def diagnosis_to_json(diagnosis: Diagnosis) -> Json:
    """The findings, those that are mended last."""
    return {
        "checkpoints": diagnosis.checkpoints,
        "deep": diagnosis.deep,
        "findings": [
            {
                "level": level,
                "kind": item.kind,
                "path": item.path,
                "meaning": item.meaning,
                "advice": item.advice,
            }
            for level, item in diagnosis.verdicts()
        ],
    }


def plan_to_json(plan: RetentionPlan) -> Json:
    """Both lists of the plan."""
    decisions = {"keep": plan.keep, "remove": plan.remove}
    return {
        name: [
            {"step": info.step, "id": info.id, "path": info.path, "size": info.size, "reasons": list(reasons)}
            for info, reasons in items
        ]
        for name, items in decisions.items()
    }


def history(repository: Repository) -> list[Event]:
    """What has happened to the run.

    Raises:
        CheckpointNotFoundError: there is no run root.
    """
    if not repository.storage.exists(""):
        raise _no_root(repository)
    return repository.history()


def event_to_json(event: Event) -> Json:
    """One event, with every member."""
    return {**event.to_json(), "host": event.host, "pid": event.pid}


def note(repository: Repository, step: int, addition: Note) -> Row:
    """Append a note to the checkpoint of ``step``, and describe it as it is now."""
    _listed(repository)
    info = repository.find(step)
    repository.note(info, addition)
    repository.manifest(info)  # still there: a note on a pruned checkpoint would protect nothing
    return _row(repository.current(repository.find(step)))


def _prune_locked(repository: Repository, policy: KeepPolicy) -> RetentionPlan:
    from checkpointer.repository.prune import prune

    try:
        repository.lock.acquire("a command that writes")
    except RunLockedError as error:
        raise RunLockedError(f"{error}. 'checkpointer prune --dry-run' needs no lock") from None
    try:
        repository.recover()
        return prune(repository, policy)
    finally:
        repository.release()


def _listed(repository: Repository) -> Listing:
    found = repository.list_checkpoints()
    if found.empty:
        if not repository.storage.exists(""):
            raise _no_root(repository)
        strange = [item.name for item in found.strangers]
        about = f"; {', '.join(strange[:3])} cannot be restored: 'checkpointer doctor' says more" if strange else ""
        raise CheckpointNotFoundError(
            f"no checkpoints in {repository.url}; the run root is the directory that holds 'checkpoint-<step>' ones"
            + about
        )
    return found


def _no_root(repository: Repository) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"there is no run root {repository.url}; check the path for typing errors")


def _rows(found: Listing) -> list[Row]:
    return [*map(_row, found.checkpoints), *map(_unreadable_row, found.unreadable)]


def _row(info: CheckpointInfo) -> Row:
    name = info.path.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return Row(info.step, name, info.path, info, "ok" if info.damaged is None else "damaged", info.damaged)


def _unreadable_row(item: Unreadable) -> Row:
    return Row(item.step, item.name, item.path, None, _status_of(item.error), str(item.error))


def _status_of(error: CheckpointerError) -> Status:
    if isinstance(error, UnreadableCheckpointError):
        return "unreadable"
    return "unsupported" if isinstance(error, FormatVersionError) else "damaged"


def _component_to_json(component: Component) -> Json:
    return {
        "kind": component.kind,
        "size": sum(spec.nbytes for spec in component.tensors.values()),
        "tensors": {
            key: {"dtype": spec.dtype, "shape": list(spec.shape), "size": spec.nbytes, "device": spec.device}
            for key, spec in component.tensors.items()
        },
        "tree": spelled_out(component.tree, component.tensors),
        "meta": dict(component.meta),
    }


class _Counting:
    """A storage whose open files report each byte that is read from them."""

    def __init__(self, storage: Storage, count: Callable[[int], object]) -> None:
        self._storage = storage
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def open(self, path: str) -> ReadFile:
        return _CountingFile(self._storage.open(path), self._count)


class _CountingFile:
    def __init__(self, file: ReadFile, count: Callable[[int], object]) -> None:
        self._file = file
        self._count = count
        self.size = file.size
        self.prefetch = file.prefetch
        self.close = file.close

    def read_into(self, offset: int, view: memoryview) -> None:
        self._file.read_into(offset, view)
        self._count(len(view))

    def read_many(self, offset: int, views: Sequence[memoryview]) -> None:
        self._file.read_many(offset, views)
        self._count(sum(map(len, views)))


__all__ = [
    "Checked",
    "Checks",
    "Details",
    "Row",
    "checks",
    "describe",
    "details",
    "diagnosed",
    "diagnosis_to_json",
    "event_to_json",
    "history",
    "listing",
    "note",
    "opened",
    "plan_to_json",
    "pruned",
]
