"""From a checkpoint back into live objects: choose, check, read, apply. In this order; nothing live changes before."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import NamedTuple

from checkpointer.distributed.exchange import Alone, Exchange, Ranks
from checkpointer.distributed.job import Job
from checkpointer.distributed.read_plan import Reads, needed_chunks
from checkpointer.environment import differences, environment
from checkpointer.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    FormatVersionError,
    IncompatibleStateError,
    UnreadableCheckpointError,
)
from checkpointer.format.index import Chunk, Component
from checkpointer.format.info import CheckpointInfo
from checkpointer.policy.reuse import ReuseSource
from checkpointer.repository.checkpoint_reader import CheckpointReader, ReadingRank
from checkpointer.repository.known import Checkpoints
from checkpointer.repository.notes import Note
from checkpointer.repository.repository import Listing, Repository, Unreadable
from checkpointer.restore.report import Restored, RestoreReport, Skipped
from checkpointer.restore.request import RestoreRequest
from checkpointer.state import Adapter, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.dtensor import local_part
from checkpointer.state.modes import outside_inference_mode, refuse_to_restore, wait_for_devices
from checkpointer.system import messages
from checkpointer.system.gc import collector_paused

logger = logging.getLogger("checkpointer")

RNG = "rng"
MAX_RELISTS = 10
"""How often a listing is repeated because checkpoints vanish while they are opened."""


@dataclass(frozen=True)
class _Prepared:
    """A restore that has changed nothing yet."""

    reader: CheckpointReader
    plans: dict[str, RestorePlan]
    report: RestoreReport
    reads: Reads
    inexact: bool
    """Whether it is one of all components, so that what makes training inexact is worth a warning."""
    shared_check: bool = False
    """Whether a rank reads parts of chunks, which have no hash: then all ranks together check all chunks."""


class _Seen(NamedTuple):
    """What a rank sees in the run root, or all ranks do."""

    ids: list[str]
    """Of the checkpoints that may be restored, the newest first."""
    empty: bool
    """Whether there is nothing at all, as far as the coordinator sees."""


def _agreed(exchange: Exchange, seen: _Seen) -> _Seen:
    """What all ranks see. Nearly always that is the same: then nobody sends the list."""
    digests = exchange.gather(hashlib.sha256(repr(seen).encode()).digest()[:16], bytes)
    if exchange.broadcast(None if digests is None else len(set(digests)) == 1, bool):
        return seen
    of_ranks = exchange.gather(seen, _Seen)
    return exchange.broadcast(None if of_ranks is None else _seen_by_all(of_ranks), _Seen)


def _seen_by_all(seen: list[_Seen]) -> _Seen:
    others = [set(one.ids) for one in seen if not one.empty]
    return _Seen([id for id in seen[0].ids if all(id in ids for ids in others)], seen[0].empty)


class Restorer:
    """Restores the registered components from a repository."""

    def __init__(self, repository: Repository, adapters: Mapping[str, Adapter], job: Job | None = None) -> None:
        """``job``: whose ranks all restore together."""
        self._repository = repository
        self._job = job
        self._adapters = adapters
        self.source: ReuseSource | None = None
        """The checkpoint restored last, with the files whose every byte was verified: later saves may share them."""
        self.listing: Listing | None = None
        """What ``latest`` has found in the run root; ``None`` if no listing is that fresh."""

    @property
    def _ranks(self) -> Ranks:
        return Alone() if self._job is None else self._job.ranks

    def latest(self, request: RestoreRequest, *, finite: bool = False) -> Restored | None:
        """The newest checkpoint that is whole; ``None`` if there is none at all.

        ``finite``: the newest that holds no NaN and no infinities.

        Raises:
            CheckpointNotFoundError: ``finite``, and all that are whole hold some.
            CorruptCheckpointError: there are some, and all are damaged.
            FormatVersionError: one was written by a newer library, so what is newest cannot be known.
            UnreadableCheckpointError: the system does not let one be read, with the same effect.
        """
        skipped: dict[str, Skipped] = {}
        for _ in range(MAX_RELISTS):
            candidates = self._candidates(skipped, finite=finite)
            if candidates is None:
                return None
            try:
                restored = self._first_whole(candidates, request, skipped)
            except CheckpointNotFoundError:
                continue  # a writer pruned it while it was opened: list again
            if restored is None:
                raise self._none_valid(skipped)
            return restored
        raise CheckpointNotFoundError(f"checkpoints in {self._repository.url} keep vanishing while they are opened")

    def _candidates(self, skipped: dict[str, Skipped], *, finite: bool) -> Checkpoints | None:
        """What to try, the newest first, the same on every rank; ``None`` where there is nothing at all."""
        with self._ranks.exchange(f"looking for a checkpoint in {self._repository.url}") as exchange:
            self.listing = listing = self._repository.list_checkpoints()
            found = self._usable(listing, skipped, finite=finite)
            agreed = _agreed(exchange, _Seen(list(found.ids), listing.empty))
        return None if agreed.empty else found.of(agreed.ids)

    def _usable(self, listing: Listing, skipped: dict[str, Skipped], *, finite: bool) -> Checkpoints:
        for item in listing.unreadable:
            if isinstance(item.error, FormatVersionError):
                raise item.error
            if isinstance(item.error, UnreadableCheckpointError):
                raise self._newest_unknown(item, listing)
            if item.path not in skipped:
                self._repository.journal.add("damage", step=item.step, reason=str(item.error))
            kind = "damaged checkpoint" if item.link is None else "link in the place of a checkpoint"
            self._skip(skipped, item.path, item.step, str(item.error), kind)
        candidates = listing.checkpoints[::-1]
        if skipped:
            candidates = candidates.where(lambda info: info.path not in skipped)
        if finite:
            candidates = candidates.where(lambda info: info.finite is not False)
            if not candidates and len(skipped) < len(listing.checkpoints) + len(listing.unreadable):
                raise CheckpointNotFoundError(f"every checkpoint in {self._repository.url} holds NaN or infinities")
        return candidates

    def one(self, info: CheckpointInfo, request: RestoreRequest) -> Restored:
        """Restore just this checkpoint.

        Raises:
            CorruptCheckpointError: it is damaged.
            IncompatibleStateError: it does not fit the live objects.
            CheckpointNotFoundError: it has been removed.
        """
        self.source = None
        try:
            with collector_paused(), outside_inference_mode(), ExitStack() as stack:
                prepared = self._prepared(info, request, stack)
                report, verified = self._restore(prepared, request)
                reader = prepared.reader
                data, chunks = reader.manifest.data, reader.chunks_by_tensor
                self.source = ReuseSource.of(info, data, reader.files, chunks, verified)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"{info.path} was removed while it was read") from error
        except UnreadableCheckpointError as error:
            self._repository.remember_refusal(info, [str(error)])
            raise
        except CorruptCheckpointError as error:
            self._repository.manifest(info)  # raises CheckpointNotFoundError if it was replaced under us
            self._remember(info, str(error))
            raise
        self._repository.remember_refusal(info, [])
        if info.damaged is not None:
            self._remember(info, "")
            info = replace(info, damaged=None)
        return Restored(info.step, info.epoch, info.metrics, info, (), report)

    def _first_whole(
        self, candidates: Iterable[CheckpointInfo], request: RestoreRequest, skipped: dict[str, Skipped]
    ) -> Restored | None:
        for info in candidates:
            try:
                restored = self.one(info, request)
            except CorruptCheckpointError as error:
                self._skip(skipped, info.path, info.step, str(error))
            else:
                return replace(restored, skipped=tuple(skipped.values()))
        return None

    def _skip(
        self, skipped: dict[str, Skipped], path: str, step: int, reason: str, kind: str = "damaged checkpoint"
    ) -> None:
        if path not in skipped:
            skipped[path] = Skipped(step, path, reason)
            messages.warn(f"skipping a {kind}: {reason}")

    def _newest_unknown(self, item: Unreadable, listing: Listing) -> UnreadableCheckpointError:
        steps = ", ".join(str(info.step) for info in listing.checkpoints[-10:])
        others = f"Or go on from one that can be read, with mgr.restore(step): there are {steps}, in commit order"
        error = UnreadableCheckpointError(
            f"which checkpoint of {self._repository.url} is the newest cannot be known: {item.error}. "
            + (others if steps else "There is no other for mgr.restore(step) either")
        )
        error.errno = item.error.errno if isinstance(item.error, OSError) else None
        return error

    def _none_valid(self, skipped: Mapping[str, Skipped]) -> CorruptCheckpointError:
        steps = ", ".join(str(item.step) for item in skipped.values())
        url = self._repository.url
        return CorruptCheckpointError(
            f"no valid checkpoint in {url} ({len(skipped)} damaged: {steps}); "
            f"run 'checkpointer verify {url}' for the reasons. "
            "Unless verify is 'before', live objects may now hold parts of a damaged one"
        )

    def _remember(self, info: CheckpointInfo, reason: str) -> None:
        """Note damage beside the checkpoint, so that retention, in any process, does not count on it."""
        if self._ranks.rank:
            return
        try:
            self._repository.note(info, Note(damaged=reason[:1000]))
        except OSError as error:
            messages.warn(f"could not note damage of {info.path}: {error}")

    def _prepared(self, info: CheckpointInfo, request: RestoreRequest, stack: ExitStack) -> _Prepared:
        """Open, match and check, on every rank: nothing live is changed before all of them have succeeded."""
        with self._ranks.exchange(f"the restore of step {info.step} from {self._repository.url}") as exchange:
            refuse_to_restore(info.path)
            reader = stack.enter_context(self._repository.open(info, ReadingRank(self._ranks.rank, self._ranks.size)))
            prepared = self._prepare_all(reader, request)
            partial = exchange.gather(prepared.reads.partial, bool)
            shared_check = exchange.broadcast(None if partial is None else any(partial), bool)
        return replace(prepared, shared_check=shared_check)

    def _prepare_all(self, reader: CheckpointReader, request: RestoreRequest) -> _Prepared:
        names, report = self._choose(reader.index.components, request)
        options = request.options
        if report.missing or report.unexpected:
            options = replace(options, partial=True)
        if RNG in names and not reader.has_own_state:
            names.remove(RNG)
            report.missing.append(RNG)
        if request.verify != "off":
            reader.check_metadata()  # first: behind the rest it would wait for all that the disk was asked for
        reader.prefetch(names)
        plans = self._prepare(reader, names, replace(options, rng=RNG in names))
        reads = Reads.of(reader, plans)
        if request.verify != "off":
            reader.check_metadata()  # of the files of other ranks that turned out to be needed
        if request.verify == "before":
            reader.check_chunks((f"{name}.{key}", chunk) for (name, key), chunk in _chunks(reader, plans))
        return _Prepared(reader, plans, report, reads, inexact=not options.partial)

    def _restore(self, prepared: _Prepared, request: RestoreRequest) -> tuple[RestoreReport, set[str]]:
        """Also returns which tensor files were verified as a whole."""
        reader, plans, report = prepared.reader, prepared.plans, prepared.report

        verify = request.verify != "off"
        with self._ranks.exchange(f"reading {self._repository.url}, step {reader.manifest.step}") as exchange:
            targets = [local_part(tensor) for plan in plans.values() for tensor in plan.reads.values()]
            wait_for_devices(targets)  # the threads that read give their copies to other streams than the caller's
            prepared.reads.carry_out(reader, verify=verify)
            wait_for_devices(targets)
            if verify and prepared.shared_check:
                wanted = {(name, key) for name, plan in plans.items() for key in plan.reads}
                reader.check_chunks(reader.share_of_chunks(wanted, self._ranks.rank, self._ranks.size))
            exchange.barrier()
        for name, plan in plans.items():
            plan.apply()
            report.components[name] = plan.report
        self._tell_settings(reader, plans)
        has_none = RNG not in reader.index.components  # a rank beyond those that saved has none of its own
        if RNG in report.missing and has_none and not request.read_only:
            messages.warn(
                f"the checkpoint of step {reader.manifest.step} holds no state of the random generators (imported ones "
                "never do): they are left as they are, so training does not go on bit for bit",
            )
        found = differences(reader.manifest.environment, environment())
        report.changed += found.all
        report.changed += _world_changed(reader.manifest.world_size, self._ranks.size)
        if found.exactness and prepared.inexact and not request.read_only:
            self._warn_inexact(reader, found.exactness)
        return report, _verified(prepared, request)

    def _tell_settings(self, reader: CheckpointReader, plans: Mapping[str, RestorePlan]) -> None:
        """Log which settings of the script the checkpoint has replaced, which would show in the loss curve first."""
        told = [f"{name}: {'; '.join(plan.settings)}" for name, plan in plans.items() if plan.settings]
        if told and self._ranks.rank == 0:
            messages.log(
                logger.warning,
                "the checkpoint of step %d has replaced settings of this run: %s",
                reader.manifest.step,
                " | ".join(told),
            )

    def _warn_inexact(self, reader: CheckpointReader, reasons: Iterable[str]) -> None:
        messages.warn(
            f"training cannot be relied on to go on bit for bit from step {reader.manifest.step} of "
            f"{self._repository.url}: {'; '.join(reasons)}",
        )

    def _prepare(
        self, reader: CheckpointReader, names: Iterable[str], options: RestoreOptions
    ) -> dict[str, RestorePlan]:
        """Check every component before any is changed; all mismatches are reported in one error."""
        plans: dict[str, RestorePlan] = {}
        mismatches: list[str] = []
        for name in names:
            try:
                plans[name] = self._adapters[name].prepare(SavedState(name, reader.index.components[name]), options)
            except IncompatibleStateError as error:
                mismatches.append(str(error))
        if mismatches:
            raise IncompatibleStateError("\n".join(mismatches))
        return plans

    def _choose(self, saved: Mapping[str, Component], request: RestoreRequest) -> tuple[list[str], RestoreReport]:
        """Which components to restore, the random generators last, and which are left out."""
        if request.components is not None:
            self._check_names(request.components, saved)
            chosen = [name for name in self._adapters if name in request.components]
            return chosen, RestoreReport(unexpected=[name for name in saved if name not in chosen])
        missing = [name for name in self._adapters if name not in saved]
        lacking = [name for name in missing if name != RNG]  # no one registers it, so no one can leave it out
        unexpected = [name for name in saved if name not in self._adapters]
        if request.options.strict and (lacking or (unexpected and not request.read_only)):
            raise IncompatibleStateError(_component_mismatch(lacking, unexpected))
        chosen = [name for name in self._adapters if name in saved]
        if unexpected or missing:
            chosen = [name for name in chosen if name != RNG]  # a part of a run does not continue it
            unexpected += [RNG] if RNG in saved else []
        return chosen, RestoreReport(missing=missing, unexpected=unexpected)

    def _check_names(self, names: Iterable[str], saved: Mapping[str, Component]) -> None:
        for name in names:
            if name not in self._adapters:
                raise ConfigError(f"component {name!r} is not registered; registered are {', '.join(self._adapters)}")
            if name not in saved:
                raise IncompatibleStateError(f"the checkpoint has no component {name!r}; it has {', '.join(saved)}")


def _component_mismatch(missing: list[str], unexpected: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"the checkpoint lacks the registered components {', '.join(missing)}")
    if unexpected:
        parts.append(f"the checkpoint holds components that are not registered: {', '.join(unexpected)}")
    return (
        f"{'; '.join(parts)}. Register the same components, name those to restore (components=[...]), "
        "or pass strict=False. Nothing was changed"
    )


def _chunks(reader: CheckpointReader, plans: Mapping[str, RestorePlan]) -> Iterator[tuple[tuple[str, str], Chunk]]:
    """The chunks that this rank reads, all or some of their bytes, each with component and key."""
    for name, plan in plans.items():
        for key, tensor in plan.reads.items():
            for chunk in needed_chunks(reader, name, key, tensor):
                yield (name, key), chunk


def _verified(prepared: _Prepared, request: RestoreRequest) -> set[str]:
    """The tensor files of which this rank, or all ranks together, have checked every byte."""
    if request.verify == "off":
        return set()
    wanted = {(name, key) for name, plan in prepared.plans.items() for key in plan.reads}
    if prepared.shared_check:
        return prepared.reader.verified_files(wanted)
    if request.verify == "before":
        sharded = prepared.reads.sharded
        checked = {chunk for place, chunk in _chunks(prepared.reader, prepared.plans) if place in sharded}
    else:
        checked = prepared.reads.checked
    return prepared.reader.verified_files(wanted - prepared.reads.sharded, checked)


def _world_changed(saved: int, live: int) -> list[str]:
    if saved == live:
        return []
    told = (
        f"saved by {saved} ranks, restored by {live}: each rank below {saved} goes on with the random numbers of the "
        "rank of its number, others keep theirs; a position in the data is carried over as samples seen where the "
        "loader can, else it is that of rank 0"
    )
    return [told]
