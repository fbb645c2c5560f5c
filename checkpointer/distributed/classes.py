"""Classes of ranks: ranks that have the same tensors, found by digests alone. Pure.

The coordinator forms them from what each rank says of its sections (``distributed/description``). Each rank is told its
seats, from which it computes what it writes, and what the others of the class write. The first rank of a class (of
plain tensors the lowest; of a mesh, that at its first cell) is its describer: it sends names when they have changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from checkpointer.distributed.description import Entry, Section
from checkpointer.errors import UnsupportedStateError
from checkpointer.format.layouts import RankTable

MOST_DOUBTS = 4
"""Sections of which ranks say different things that are looked into: one is enough to say what is wrong."""

ADVICE = (
    "A manager saves each tensor once: a key belongs to ranks that hold the same. Stages of a pipeline need keys that "
    "differ; what several of them hold with one value, as tied embeddings, is declared on each of them: "
    "ModuleComponent(module, replicated=['embed.weight']). Replicas that train apart save with checkpointer.dcp, under "
    "keys that differ. Nothing was written"
)


class SectionReport(NamedTuple):
    """What a rank tells of one of its sections: 34 bytes at most."""

    digest: bytes
    cells: int = 0
    """Of the mesh; 0: there is none."""
    group: int = 0
    cell: int = 0

    @classmethod
    def of(cls, section: Section) -> SectionReport:
        cells = int(np.prod(section.mesh)) if section.mesh else 0
        return cls(section.digest, cells, section.group, section.cell)


class Seat(NamedTuple):
    """Where a rank stands in the class of one of its sections."""

    number: int
    """Of the class."""
    groups: int
    """Meshes in the class; 1 where there is none."""
    cells: int
    """Ranks in each."""
    group: int
    cell: int

    @property
    def describer(self) -> bool:
        """Whether this rank, the first of the class, says what the class has."""
        return self.group == self.cell == 0

    @property
    def position(self) -> int:
        """Among all ranks of the class."""
        return self.group * self.cells + self.cell


@dataclass(frozen=True, eq=False)
class RankClass:
    """Ranks that have the same tensors, each at its cell of a mesh."""

    ranks: RankTable
    """Of shape [meshes, cells]; one mesh where tensors are plain."""
    digests: tuple[bytes, ...]
    """Of all sections that just these ranks have in common."""
    meshed: bool

    @property
    def describer(self) -> int:
        return int(self.ranks[0, 0])


@dataclass(frozen=True)
class Classes:
    """The classes of one job."""

    classes: Sequence[RankClass]
    """In the order of their describers."""
    seats: Sequence[Sequence[Seat]]
    """For each rank, those of its sections, in the order in which it told them."""
    doubts: Sequence[Sequence[int]]
    """Ranks that stand in one mesh and tell different things of it: the lowest of each different opinion."""


def form_classes(reports: Sequence[Sequence[SectionReport]]) -> Classes:
    """Put ranks together that say the same. ``reports``: those of each rank."""
    members: dict[bytes, list[tuple[int, int, int, int]]] = {}
    cells: dict[bytes, int] = {}
    for rank, sections in enumerate(reports):
        for report in sections:
            members.setdefault(report.digest, []).append((rank, report.group, report.cell, report.cells))
            cells[report.digest] = report.cells
    tables: dict[tuple[int, int, bytes], list[bytes]] = {}
    doubts: list[list[int]] = []
    for digest, found in members.items():
        table = _table(np.array(found, np.uint64), cells[digest])
        if table is None:
            doubts += [_who_else(digest, reports)] if len(doubts) < MOST_DOUBTS else []
        else:
            tables.setdefault((cells[digest], len(table), table.tobytes()), []).append(digest)
    if doubts:
        return Classes([], [], doubts)
    classes = sorted((_class(*item) for item in tables.items()), key=lambda c: (c.describer, c.meshed, c.digests))
    return Classes(classes, _seats(classes, reports), [])


def _table(found: NDArray[np.uint64], cells: int) -> RankTable | None:
    """The ranks at each cell of each mesh, the mesh of the lowest rank first; ``None`` where a mesh is not complete."""
    ranks, groups, places, _ = found.T
    if not cells:
        plain: RankTable = ranks.astype(np.int32)[None]
        return plain
    if len(found) % cells:
        return None
    _, at, number = np.unique(groups, return_index=True, return_inverse=True)
    first = at[number]  # members come by rank, so this is the order of the lowest ranks of the meshes
    order = np.lexsort((places, first))
    table: RankTable = ranks[order].astype(np.int32).reshape(-1, cells)
    whole = (places[order].reshape(-1, cells) == np.arange(cells, dtype=np.uint64)).all()
    alone = (first[order].reshape(-1, cells) == first[order].reshape(-1, cells)[:, :1]).all()
    return table if whole and alone else None


def _class(key: tuple[int, int, bytes], digests: list[bytes]) -> RankClass:
    cells, groups, ranks = key
    return RankClass(np.frombuffer(ranks, np.int32).reshape(groups, -1), tuple(sorted(digests)), meshed=cells > 0)


def _seats(classes: Sequence[RankClass], reports: Sequence[Sequence[SectionReport]]) -> list[list[Seat]]:
    by_digest: dict[bytes, tuple[int, int, int, dict[int, int]]] = {}
    for number, one in enumerate(classes):
        positions = {rank: place for place, rank in enumerate(one.ranks.ravel().tolist())}
        by_digest.update(dict.fromkeys(one.digests, (number, *one.ranks.shape, positions)))
    found: list[list[Seat]] = []
    for rank, sections in enumerate(reports):
        seats: list[Seat] = []
        for report in sections:
            number, groups, cells, positions = by_digest[report.digest]
            seats.append(Seat(number, groups, cells, *divmod(positions[rank], cells)))
        found.append(seats)
    return found


def _who_else(digest: bytes, reports: Sequence[Sequence[SectionReport]]) -> list[int]:
    """The lowest rank of each opinion in a mesh about which not all of its ranks say the same."""
    every = [(rank, report) for rank, sections in enumerate(reports) for report in sections if report.cells]
    groups = {report.group for _, report in every if report.digest == digest}
    count: dict[int, int] = {}
    for _, report in every:
        if report.digest == digest:
            count[report.group] = count.get(report.group, 0) + 1
    partial = {report.group for _, report in every if report.group in groups and count[report.group] < report.cells}
    opinions: dict[frozenset[bytes], int] = {}
    for rank, sections in enumerate(reports):
        said = frozenset(report.digest for report in sections if report.group in partial)
        if said:
            opinions.setdefault(said, rank)
    return list(opinions.values())[:4]


# ------------------------------------------------------------------------------------ keys of several classes

Hashes = NDArray[np.uint64]
Kind: TypeAlias = Literal["exclusive", "declared", "own"]
"""A key of one class alone; one that is declared to be the same in several; what each rank may have otherwise."""


class ComponentSummary(NamedTuple):
    """What a class has of a component."""

    kind: str
    cut: bool
    """Whether a tensor is in more than one piece."""
    tensors: int


class Special(NamedTuple):
    """A tensor that several classes may have."""

    name: bytes
    """As :func:`name_digest` has it."""
    spec: int
    """A hash of dtype and shape."""
    kind: Kind


@dataclass(frozen=True, eq=False)
class ClassSummary:
    """What the describer of a class tells the coordinator, once a change."""

    exclusive: Hashes
    """Of each tensor that this class alone should have, the beginning of the digest of its name."""
    special: Sequence[Special]
    """All others."""
    components: Mapping[str, ComponentSummary]

    @property
    def nbytes(self) -> int:
        """About what it takes in a message, beside the components."""
        return self.exclusive.nbytes + 36 * len(self.special)


def summarize(tensors: Iterable[tuple[str, str, Entry]], components: Mapping[str, ComponentSummary]) -> ClassSummary:
    """``tensors``: component, sort of the section, entry."""
    exclusive: list[int] = []
    special: list[Special] = []
    for component, sort, entry in tensors:
        name = name_digest(component, entry.name)
        if sort == "own" or entry.declared:
            spec = xxhash.xxh3_64_intdigest(f"{entry.dtype} {entry.shape}".encode("ascii"))
            special.append(Special(name, spec, "own" if sort == "own" else "declared"))
        else:
            exclusive.append(_beginning(name))
    return ClassSummary(np.array(exclusive, np.uint64), special, components)


def name_digest(component: str, name: str) -> bytes:
    """Names a tensor among those of all classes."""
    return xxhash.xxh3_128_digest(f"{component}\0{name}".encode("utf-8", "surrogatepass"))


def _beginning(name: bytes) -> int:
    return int.from_bytes(name[:8], "little")


@dataclass(frozen=True)
class Verdict:
    """What the coordinator makes of all summaries."""

    by_rank: frozenset[str]
    """Components whose files are called by rank: a tensor is cut, or not all are of one class. Of the others, whole
    tensors lie in files that are numbered over the ranks of the class, as Hugging Face's tools know them."""
    elsewhere: Mapping[int, frozenset[bytes]]
    """For some classes, names of tensors that a class before them writes."""
    clashes: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Beginnings of digests of names that several classes have, with these. Their describers are asked for the names:
    :func:`named`; different ones may begin alike."""


def join(summaries: Sequence[ClassSummary]) -> Verdict:
    """Put together what all classes have, in the order of the classes.

    Raises:
        UnsupportedStateError: a component is of different kinds.
    """
    _check_kinds(summaries)
    elsewhere: dict[int, set[bytes]] = {}
    clashes: dict[int, list[int]] = {}
    claims = _claims(summaries)
    for name, found in _special(summaries).items():
        numbers = sorted(found)
        kinds, specs = {one.kind for one in found.values()}, {one.spec for one in found.values()}
        alike = kinds == {"own"} or (kinds == {"declared"} and len(specs) == 1)
        others = claims.pop(_beginning(name), [])
        if others or (not alike and len(numbers) > 1):
            clashes[_beginning(name)] = sorted({*numbers, *others})
        for number in numbers[1:] if alike else ():
            elsewhere.setdefault(number, set()).add(name)
    clashes.update((hash_, numbers) for hash_, numbers in claims.items() if len(numbers) > 1)
    return Verdict(_by_rank(summaries), {number: frozenset(found) for number, found in elsewhere.items()}, clashes)


def _special(summaries: Sequence[ClassSummary]) -> dict[bytes, dict[int, Special]]:
    """By name, and then by class."""
    found: dict[bytes, dict[int, Special]] = {}
    for number, summary in enumerate(summaries):
        for one in summary.special:
            found.setdefault(one.name, {})[number] = one
    return found


def _claims(summaries: Sequence[ClassSummary]) -> dict[int, list[int]]:
    """Classes that should have a tensor alone, by hash: where there are several, or a special one begins alike."""
    numbers = np.repeat(np.arange(len(summaries)), [len(summary.exclusive) for summary in summaries])
    every = np.concatenate([np.empty(0, np.uint64), *(summary.exclusive for summary in summaries)])
    special = np.array([_beginning(one.name) for summary in summaries for one in summary.special], np.uint64)
    values, count = np.unique(every, return_counts=True)
    wanted = np.isin(every, np.concatenate([values[count > 1], special]))
    found: dict[int, list[int]] = {}
    for hash_, number in zip(every[wanted].tolist(), numbers[wanted].tolist(), strict=True):
        found.setdefault(hash_, []).append(number)
    return found


def _by_rank(summaries: Sequence[ClassSummary]) -> frozenset[str]:
    count: dict[str, int] = {}
    cut: set[str] = set()
    for summary in summaries:
        for name, part in summary.components.items():
            count[name] = count.get(name, 0) + (part.tensors > 0)
            if part.cut:
                cut.add(name)
    return frozenset(cut | {name for name, classes in count.items() if classes > 1})


def _check_kinds(summaries: Sequence[ClassSummary]) -> None:
    known: dict[str, str] = {}
    for summary in summaries:
        for name, part in summary.components.items():
            if known.setdefault(name, part.kind) != part.kind:
                raise UnsupportedStateError(
                    f"component {name!r} is not the same on all ranks: a {known[name]} on some, a {part.kind} on "
                    "others. Register the same components on every rank"
                )


def named(clashes: Iterable[int], sections: Iterable[Section]) -> dict[int, list[str]]:
    """What the clashes are called in the sections of a describer, for the coordinator."""
    wanted, found = set(clashes), dict[int, list[str]]()
    for section in sections:
        for entry in section.entries:
            hash_ = _beginning(name_digest(section.component, entry.name))
            if hash_ in wanted:
                found.setdefault(hash_, []).append(f"{section.component}.{entry.name}")
    return found


def told_clashes(
    clashes: Mapping[int, Sequence[int]], classes: Sequence[RankClass], names: Mapping[int, Mapping[int, Sequence[str]]]
) -> str | None:
    """What to say of names that several classes have; ``None``: only their hashes are equal.

    ``names``: by class, what its describer has answered.
    """
    by_classes: dict[tuple[int, ...], list[str]] = {}
    for hash_, numbers in clashes.items():
        answers = [set(names.get(number, {}).get(hash_, ())) for number in numbers]
        for name in sorted(set().union(*answers)):
            having = tuple(number for number, answer in zip(numbers, answers, strict=True) if name in answer)
            if len(having) > 1:
                by_classes.setdefault(having, []).append(name)
    told = []
    for having, keys in list(by_classes.items())[:4]:
        who = " and ".join(told_ranks(classes[number].ranks.ravel().tolist()) for number in having[:2])
        told.append(f"{len(keys)} on {who}, for example {', '.join(map(repr, keys[:3]))}")
    return f"ranks that hold different modules have keys in common ({'; '.join(told)}). {ADVICE}" if told else None


def told_differences(ranks: Sequence[int], described: Sequence[Sequence[Section]]) -> str:
    """What to say of ranks that stand in one mesh and have different tensors there: sections of the same component."""
    entries = [{(s.component, e.name): e for s in sections for e in s.entries} for sections in described]
    told = []
    for rank, found in zip(ranks, entries, strict=True):
        alone = [key for key, entry in found.items() if any(_unlike(other.get(key), entry) for other in entries)]
        if alone:
            shown = ", ".join(_told_entry(component, found[component, name]) for component, name in alone[:3])
            told.append(f"rank {rank}: {shown}{f' and {len(alone) - 3} more' if len(alone) > 3 else ''}")
    return f"ranks of one mesh have different tensors on it ({'; '.join(told)}). {ADVICE}"


def _unlike(a: Entry | None, b: Entry) -> bool:
    return a is None or a[2:] != b[2:]


def _told_entry(component: str, entry: Entry) -> str:
    return f"{component}.{entry.name} {entry.dtype} {list(entry.shape)}"


def told_ranks(ranks: Iterable[int]) -> str:
    """Numbers of ranks in words, in spans."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    told = [str(first) if first == last else f"{first} to {last}" for first, last in spans[:4]]
    more = f" and {sum(last - first + 1 for first, last in spans[4:])} more" if len(spans) > 4 else ""
    alone = len(spans) == 1 and spans[0][0] == spans[0][1]
    return f"rank{'' if alone else 's'} {', '.join(told)}{more}"
