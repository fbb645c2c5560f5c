"""Wrong programs: what the campaign has to notice.

Most are made from the record of the right program: had it left out an fsync, it would have done everything else just
the same. The others are protocols with their steps in another order, and are run.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from unittest import mock

from checkpointer.format import paths
from checkpointer.format.manifest import Manifest
from checkpointer.repository.commit.base import Attempt, existing_at
from checkpointer.repository.commit.by_rename import RenameCommit
from checkpointer.repository.contents import Removable, removable
from tests.campaign.crash.power.engine import Failure, look, states
from tests.campaign.crash.power.persistence import Effort
from tests.campaign.crash.power.record import FSYNC, Record

EFFORT = Effort(exhaustive=16, sample=0, pairs=False)
MOST = 300
"""States in which a mutation has a chance to be noticed."""

REDUNDANT: Mapping[str, str] = {
    "storage.local.make_directory": "below .checkpointer/tmp a commit fsyncs the same directories once more, and "
    "nothing is promised before; what is lost with tmp or trash itself is unfinished or being removed",
    "storage.local._settle": "only where a process was killed between making a directory and its fsync",
    "storage.local.link": "only where nobody has fsynced the file before, as in a checkpoint that was copied by hand",
    "storage.local.write": "of the note that pins: one that cannot be read counts as a pin",
    "repository.commit.by_rename._settle": "only where a process was killed between a rename and its fsync",
    "repository.commit.by_rename._move": "a removal at the same time fsyncs the same directory, or nothing hangs on "
    "which of two names (trash or quarantine, second or plain) a checkpoint has",
    "repository.commit.by_rename._replace": "a removal fsyncs the same directory before anything hangs on it",
    "repository.commit.by_rename.commit": "an inner directory's name, which was fsynced when it was made",
    "repository.contents.remove_listed": "the files of a damaged run, some of which stay anyway",
}
"""Why it may go unnoticed that a function leaves out one fsync, though not that it never asks for any."""


@dataclass
class Verdicts:
    """What the campaign says of programs without a single fsync, or without all that one function asks for."""

    noticed: Counter[str] = field(default_factory=Counter)
    """Single fsyncs that cannot be left out, by the function that asks for them."""
    unnoticed: Counter[str] = field(default_factory=Counter)
    """Single fsyncs that can."""
    sites: dict[str, Failure | None] = field(default_factory=dict)
    """What happens where a function never asks for any; ``None``: nothing, in the states that were looked at."""
    odd: list[str] = field(default_factory=list)
    """Single fsyncs that can be left out, for which ``REDUNDANT`` has no word."""

    @property
    def total(self) -> int:
        """Of single fsyncs."""
        return self.noticed.total() + self.unnoticed.total()

    def add(self, other: Verdicts) -> None:
        """Count another record's verdicts, too."""
        self.noticed += other.noticed
        self.unnoticed += other.unnoticed
        self.odd += other.odd
        for site, failure in other.sites.items():
            self.sites[site] = self.sites.get(site) or failure


def judge(run: Record, *, damaged: bool, singles: bool = True, only: Collection[str] | None = None) -> Verdicts:
    """Leave out the fsyncs of a record one by one (with ``singles``), and those of each function."""
    known: set[object] = set()
    for _ in states(run, EFFORT, 0, damaged=damaged, known=known):
        pass
    verdicts = Verdicts()
    by_site: dict[str, list[int]] = {}
    for number, operation in enumerate(run.operations):
        if operation.kind == FSYNC and (only is None or operation.site in only):
            by_site.setdefault(operation.site, []).append(number)
    for site, numbers in by_site.items():
        verdicts.sites[site] = _failure(run.without(*numbers), known, damaged=damaged)
        for number in numbers if singles else ():
            if _failure(run.without(number), known, damaged=damaged) is not None:
                verdicts.noticed[site] += 1
                continue
            verdicts.unnoticed[site] += 1
            if site not in REDUNDANT or (site == "storage.local.write" and "notes" not in run.operations[number].path):
                verdicts.odd.append(str(run.operations[number]))
    return verdicts


def _failure(wrong: Record, known: set[object], *, damaged: bool) -> Failure | None:
    """What the wrong program loses in a state that the right one cannot leave."""
    new = states(wrong, EFFORT, 0, damaged=damaged, known=set(known), latest_first=True)
    return next(iter(look(wrong, itertools.islice(new, MOST), most_failures=1).failures), None)


# ------------------------------------------------------------------------------------------------- other orders


def _commit_before_the_data_is_durable(self: RenameCommit, attempt: Attempt, manifest: Manifest) -> str:
    """The name first, then what it names."""
    data = manifest.to_bytes()
    name = paths.checkpoint_name(attempt.step)
    self._move(attempt.directory, name)
    self._storage.write(f"{name}/{paths.MANIFEST}", [data], len(data))
    self._storage.sync(name)
    return name


def _delete_before_the_commit(self: RenameCommit, attempt: Attempt, manifest: Manifest) -> str:
    """Every older checkpoint goes, then the new one comes."""
    for entry in self._storage.list_directory(""):
        there = existing_at(self._storage, entry.name) if entry.name.startswith("checkpoint-") else None
        if there is not None and there.manifest is not None:
            self.remove(entry.name, there.manifest)
    return _COMMIT(self, attempt, manifest)


def _replace_in_two_steps(self: RenameCommit, attempt: Attempt, name: str, old: Manifest) -> str:
    """The old one goes to trash, then the new one takes its name."""
    self._to_trash(name, old)
    self._move(attempt.directory, name)
    return name


def _remove_in_place(self: RenameCommit, name: str, manifest: Manifest) -> bool:
    """File by file, where everybody looks."""
    listed = removable(self._storage, name, manifest)
    for path in [*listed.data, *listed.index, paths.MANIFEST]:
        self._storage.remove(f"{name}/{path}")
    return self._storage.remove_directory(name)


def _manifest_removed_first(self: RenameCommit, directory: str, listed: Removable) -> None:
    """What says that the files are those of a checkpoint goes before them."""
    self._storage.remove(f"{directory}/{paths.MANIFEST}")
    _DELETE_LISTED(self, directory, listed)


def _index_removed_first(self: RenameCommit, directory: str, listed: Removable) -> None:
    """What says which files are ours goes before them."""
    _DELETE_LISTED(self, directory, Removable(data=listed.index, index=listed.data))


_COMMIT, _DELETE_LISTED = RenameCommit.commit, RenameCommit._delete_listed

ORDERS: Mapping[str, tuple[str, str, Callable[..., object]]] = {
    "commit before the manifest": ("save and prune", "commit", _commit_before_the_data_is_durable),
    "delete before the commit": ("save and prune", "commit", _delete_before_the_commit),
    "replace in two steps": ("overwrite", "_replace", _replace_in_two_steps),
    "remove in place": ("prune", "remove", _remove_in_place),
    "manifest removed first": ("prune", "_delete_listed", _manifest_removed_first),
    "index removed first": ("prune", "_delete_listed", _index_removed_first),
}
"""Name of the mutation: the scenario that shows it, the method that it replaces, and by what."""


@contextlib.contextmanager
def in_another_order(name: str) -> Iterator[str]:
    """The package with the steps of one of ``ORDERS``; yields the scenario that shows it."""
    scenario, method, wrong = ORDERS[name]
    with mock.patch.object(RenameCommit, method, wrong):
        yield scenario
