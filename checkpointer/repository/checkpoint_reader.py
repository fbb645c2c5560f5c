"""Reading one checkpoint back, trusting nothing: sizes first, then bytes against their hashes."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import xxhash

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.format.boxes import Box
from checkpointer.format.index import Chunk, Chunks, FileRecord, Index, RankPart
from checkpointer.format.manifest import Manifest
from checkpointer.repository.contents import add_files, disk_errors, open_file, read_index, read_part
from checkpointer.repository.open_files import OpenFiles
from checkpointer.repository.parts import Parts
from checkpointer.storage import ReadFile, Storage
from checkpointer.system.threads import Pool

if TYPE_CHECKING:
    from typing_extensions import Self

K = TypeVar("K")
V = TypeVar("V")

READ_BLOCK = 512 * 1024
"""Bytes read and hashed at a time: small enough that the hash finds them in the processor's cache."""

RUN_LENGTH = 256
"""Small chunks that one request fills at most; every system takes so many buffers."""

LARGE = 16 << 20
"""Bytes. Several threads share a larger chunk, so that none is left alone with it at the end."""

PREFETCH = 64 << 20
"""Bytes that the system is asked to read while a restore is prepared: what a fast disk reads in that time."""

SPAN = 4 << 20
"""Bytes of a large chunk that one thread reads at a time: few huge pages are touched by two threads at once."""

READ_THREADS = min(8, max(4, os.cpu_count() or 1))
"""More than cores where those are few: some wait for the disk."""


class Target(Protocol):
    """Where the bytes of one chunk go. Called on a reader's thread."""

    def memory(self) -> memoryview | None:
        """Contiguous unsigned bytes, just the chunk's, or ``None`` where bytes cannot go straight into memory."""

    def blocks(self) -> Iterator[memoryview]:
        """Where they cannot: buffers to fill, one after the other. Each is carried on when the next is asked for."""


class ChunkRead(NamedTuple):
    """A chunk, and where it is read to."""

    name: str
    """Component and key, for errors."""
    chunk: Chunk
    target: Target


class ReadingRank(NamedTuple):
    """Who reads."""

    rank: int
    size: int


ONE_PROCESS = ReadingRank(0, 1)

_OWN_AT_ANY_SIZE = frozenset({"rng", "generator"})
"""Kinds of components of which a rank takes its own state also where the number of ranks has changed: no two ranks are
to draw the same numbers."""


class CheckpointReader:
    """An open checkpoint. Use as a context manager.

    Opening reads the index and compares the size of every file with the manifest, so that whoever allocates memory
    for tensors afterwards can trust their shapes.

    Raises:
        CorruptCheckpointError: a file is missing, has another size, or fails its check.
        UnreadableCheckpointError: the system does not let a file be read.
        FileNotFoundError: the whole checkpoint has vanished (a writer pruned it).
    """

    def __init__(self, storage: Storage, directory: str, manifest: Manifest, reader: ReadingRank = ONE_PROCESS) -> None:
        """``reader``: one of several ranks finds its own state in ``index``, where it differs from the others'."""
        self._storage = storage
        self._reader = reader
        self._directory = directory
        self.manifest = manifest
        self._records: dict[str, FileRecord] = dict(manifest.index)
        self._checked: set[str] = set()
        """Files whose header, or whole content, is known to be what was written."""
        self._parts: Parts | None = None
        self._known_parts: dict[int, RankPart] = {}
        self._mine: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        """Of tensors that this rank has otherwise than rank 0."""
        self._guard = threading.Lock()
        self._files = OpenFiles(self._open)
        try:
            shared = read_index(storage, directory, manifest)
            self._records |= shared.files
            self._shared = shared
            if shared.placement is not None:
                self._parts = Parts(shared, shared.placement, self._part)
                self._shared = replace(shared, chunks=self._parts)
            self.index = self._with_own(self._shared)
            self._check_sizes()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    def check_metadata(self) -> None:
        """Check what is not tensor data: whole small files, and headers of tensor files.

        Of a checkpoint of several ranks, of the files that are known by now: call again once all chunks are chosen.
        """
        for path, record in list(self._records.items()):
            if path in self._checked or path in self.manifest.index:
                continue
            length, expected = record.header or (record.size, record.xxh3)
            if self._hash(path, 0, length) != expected:
                what = "the header of " if record.header else ""
                raise CorruptCheckpointError(f"{what}{self._place(path)} is damaged: its bytes do not match its hash")
            self._checked.add(path)

    def chunks(self, name: str, key: str, box: Box | None = None) -> Sequence[Chunk]:
        """Where a tensor lies; with ``box``, at least the chunks that share an element with it."""
        if self._parts is None or box is None or (name, key) in self._mine:
            return self.index.chunks[name, key]
        return self._parts.overlapping((name, key), box)

    def known_chunks(self) -> Iterator[tuple[tuple[str, str], Chunk]]:
        """Every chunk of the files that are known by now: component and key, and where it lies."""
        parts = () if self._parts is None else self._parts.read
        for rank in parts:
            assert self._parts is not None
            yield from self._parts.written_by(rank)
        for place, chunks in (self.index.chunks if self._parts is None else self._mine).items():
            yield from ((place, chunk) for chunk in chunks)

    def read_parts(self) -> None:
        """Read the parts of all ranks, so that ``files`` is complete. One process that reads alone has done so."""
        for rank in self._shared.parts:
            self._part(rank)

    def all_chunks(self) -> Iterator[tuple[str, str, Chunk]]:
        """Every chunk of the checkpoint with its name and dtype, those of what ranks have of their own included.

        For a process that is alone.
        """
        components = self.index.components
        for (name, key), chunk in self.known_chunks():
            yield f"{name}.{key}", components[name].tensors[key].dtype, chunk
        for rank in self._shared.parts:
            part = self._part(rank)
            for (name, key), chunks in part.chunks.items():
                yield from ((f"{name}.{key}", part.components[name].tensors[key].dtype, chunk) for chunk in chunks)

    def verified_files(self, tensors: Collection[tuple[str, str]], chunks: Collection[Chunk] = frozenset()) -> set[str]:
        """The tensor files, of those known by now, that hold bytes of these ``tensors`` and ``chunks`` alone."""
        stored = {path for path, record in self._records.items() if record.header is not None}
        if self._parts is None and not chunks:
            components = self.index.components.items()
            rest = [(name, key) for name, part in components for key in part.tensors if (name, key) not in tensors]
            return stored - {
                chunk.file for place in rest for chunk in self.index.chunks[place] if chunk.end > chunk.begin
            }
        for place, chunk in self.known_chunks():
            if place not in tensors and chunk not in chunks and chunk.end > chunk.begin:
                stored.discard(chunk.file)
        return stored

    @property
    def chunks_by_tensor(self) -> Mapping[tuple[str, str], tuple[Chunk, ...]]:
        """Where tensors lie, as far as that is known by now."""
        if self._parts is None:
            return self.index.chunks
        found: dict[tuple[str, str], tuple[Chunk, ...]] = {}
        for place, chunk in self.known_chunks():
            found[place] = (*found.get(place, ()), chunk)
        return found

    def share_of_chunks(self, places: Collection[tuple[str, str]], rank: int, size: int) -> Iterator[tuple[str, Chunk]]:
        """The chunks of ``places`` that one of ``size`` ranks checks, so that together they check all, each once."""
        if self._parts is None:
            wanted = ((f"{name}.{key}", chunk) for name, key in places for chunk in self.index.chunks[name, key])
            yield from itertools.islice(wanted, rank, None, size)
            return
        for writer in range(rank, len(self._shared.parts), size):
            for (name, key), chunk in self._parts.written_by(writer):
                if (name, key) in places and (name, key) not in self._mine:
                    yield f"{name}.{key}", chunk
        for name, key in self._mine.keys() & set(places):
            yield from ((f"{name}.{key}", chunk) for chunk in self._mine[name, key])

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """Every file of the checkpoint but the manifest, as far as it is known: each part that is read adds its own."""
        return self._records

    def read(self, reads: Iterable[ChunkRead], *, verify: bool) -> None:
        """Fill every target, from several threads, in the order of the files."""
        _share(self._tasks(sorted(reads, key=_order), verify=verify))

    def prefetch(self, components: Iterable[str]) -> None:
        """Let the system begin to read the files of ``components``, while the caller prepares. Only a hint."""
        chunks = self.index.chunks
        if self._reader.size > 1 or not isinstance(chunks, Chunks):  # which files it needs is not known yet
            return
        wanted = {file for name in components for file in chunks.files_of(name)}
        left = PREFETCH
        for path in sorted(wanted):
            if left:
                with self._files.using(path) as file:
                    file.prefetch(0, min(left, file.size))
                    left -= min(left, file.size)

    def check_chunks(self, chunks: Iterable[tuple[str, Chunk]]) -> None:
        """Check the hash of each ``(name, chunk)`` without keeping its bytes."""
        _share(partial(self._check_chunk, name, chunk) for name, chunk in chunks)

    def _open(self, path: str) -> ReadFile:
        return open_file(self._storage, self._directory, self.manifest, path, self._records[path])

    def _part(self, rank: int) -> RankPart:
        """The part of one rank, read once. Several threads may ask."""
        with self._guard:
            if rank not in self._known_parts:
                self._known_parts[rank] = self._read_part(rank)
            return self._known_parts[rank]

    def _read_part(self, rank: int) -> RankPart:
        part = read_part(self._storage, self._directory, self.manifest, self._shared, rank)
        add_files(self._records, {paths.rank_index(rank): self._shared.parts[rank]}, self._directory)
        add_files(self._records, part.files, self._directory)
        self._checked.add(paths.rank_index(rank))  # as a whole, when it was read
        return part

    def _check_sizes(self) -> None:
        """Compare the size of every file: one of several ranks only of those that it knows, and opens, by now."""
        if self._reader.size == 1:
            self.read_parts()
            self._check_totals()
        for path, record in self._records.items():
            if record.header is None:
                self._open(path).close()  # there may be many attachments
            else:
                self._files.check(path)

    def _check_totals(self) -> None:
        """The manifest counts what the index lists."""
        manifest = self.manifest
        shared: dict[str, int] = {}
        for record in self._records.values():
            if record.origin is not None:
                shared[record.origin] = shared.get(record.origin, 0) + record.size
        size = sum(record.size for record in self._records.values())
        if (len(self._records), size, shared) != (manifest.files, manifest.size, dict(manifest.shared)):
            said, found = sum(manifest.shared.values()), sum(shared.values())
            raise CorruptCheckpointError(
                f"{self._storage.place(self._directory)}: the manifest counts {manifest.files} files of "
                f"{manifest.size} bytes, {said} of them shared, and the index lists {len(self._records)} of {size}, "
                f"{found} shared"
            )

    @property
    def has_own_state(self) -> bool:
        """Whether this rank's own state was saved, or is the same as rank 0's."""
        return self._reader.rank < self.manifest.world_size

    def _with_own(self, index: Index) -> Index:
        """``index`` with what this rank had otherwise than rank 0."""
        rank = self._reader.rank
        if self._reader.size == 1 or rank not in index.parts:
            return index
        own = self._part(rank)
        same_size = self._reader.size == self.manifest.world_size
        names = {name for name, part in own.components.items() if same_size or part.kind in _OWN_AT_ANY_SIZE}
        components = {
            name: replace(own.components[name], tensors=_Both(own.components[name].tensors, part.tensors))
            if name in names
            else part
            for name, part in index.components.items()
        }
        self._mine = {place: chunks for place, chunks in own.chunks.items() if place[0] in names}
        return replace(index, components=components, chunks=_Both(self._mine, index.chunks))

    def _tasks(self, reads: Iterable[ChunkRead], *, verify: bool) -> Iterator[Callable[[], None]]:
        """What one thread does at a time. Small chunks next to each other are one request, large ones are several."""
        run = _Run()
        for read in reads:
            size = read.chunk.end - read.chunk.begin
            view = read.target.memory()
            if view is not None and size <= READ_BLOCK:
                if not run.takes(read.chunk):
                    yield partial(self._read_run, run, verify=verify)
                    run = _Run()
                run.add(read, view)
            elif view is None:
                yield partial(self._read_blocks, read, verify=verify)
            elif size <= LARGE:
                yield partial(self._read_span, read, view, _Hash(), 0, size, verify=verify)
            else:
                shared = _Hash()
                for start in range(0, size, SPAN):
                    end = min(start + SPAN, size)
                    yield partial(self._read_span, read, view, shared, start, end, verify=verify)
        if run.reads:
            yield partial(self._read_run, run, verify=verify)

    def _read_run(self, run: _Run, *, verify: bool) -> None:
        first = run.reads[0].chunk
        with self._disk_errors(first.file), self._files.using(first.file) as file:
            file.read_many(first.begin, run.views)
        if verify:
            for read, view in zip(run.reads, run.views, strict=True):
                self._compare(read, xxhash.xxh3_128_hexdigest(view))

    def _read_span(
        self, read: ChunkRead, view: memoryview, hashed: _Hash, begin: int, end: int, *, verify: bool
    ) -> None:
        with self._files.using(read.chunk.file) as file:
            for start in range(begin, end, READ_BLOCK):
                block = view[start : min(start + READ_BLOCK, end)]
                self._read_into(file, read.chunk.file, read.chunk.begin + start, block)
                if verify and hashed.add(start, block) == len(view):
                    self._compare(read, hashed.hexdigest())

    def _read_blocks(self, read: ChunkRead, *, verify: bool) -> None:
        hasher = xxhash.xxh3_128()
        offset = read.chunk.begin
        with self._files.using(read.chunk.file) as file:
            for block in read.target.blocks():
                self._read_into(file, read.chunk.file, offset, block)
                offset += len(block)
                if verify:
                    hasher.update(block)
        if verify:
            self._compare(read, hasher.hexdigest())

    def _compare(self, read: ChunkRead, xxh3: str) -> None:
        if xxh3 != read.chunk.xxh3:
            raise self._damaged(read.name, read.chunk)

    def _check_chunk(self, name: str, chunk: Chunk) -> None:
        if self._hash(chunk.file, chunk.begin, chunk.end) != chunk.xxh3:
            raise self._damaged(name, chunk)

    def _damaged(self, name: str, chunk: Chunk) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._place(chunk.file)} is damaged: bytes {chunk.begin} to {chunk.end}, which hold {name}, "
            "do not match their hash"
        )

    def _hash(self, path: str, begin: int, end: int) -> str:
        hasher = xxhash.xxh3_128()
        for block in self.blocks(path, begin, end):
            hasher.update(block)
        return hasher.hexdigest()

    def blocks(self, path: str, begin: int, end: int) -> Iterator[memoryview]:
        """The bytes of a file from ``begin`` to ``end``, in one buffer that is used again for each block."""
        buffer = memoryview(bytearray(min(READ_BLOCK, end - begin)))
        with self._files.using(path) as file:
            for start in range(begin, end, READ_BLOCK):
                block = buffer[: min(READ_BLOCK, end - start)]
                self._read_into(file, path, start, block)
                yield block

    def whole(self, path: str, begin: int, end: int) -> bytes:
        """The bytes of a file from ``begin`` to ``end`` at once."""
        return b"".join([bytes(block) for block in self.blocks(path, begin, end)])  # the blocks are one buffer

    def _read_into(self, file: ReadFile, path: str, offset: int, view: memoryview) -> None:
        with self._disk_errors(path):
            file.read_into(offset, view)

    def _disk_errors(self, path: str) -> AbstractContextManager[None]:
        return disk_errors(self._storage, f"{self._directory}/{self.manifest.place(path)}")

    def _place(self, path: str) -> str:
        return self._storage.place(f"{self._directory}/{self.manifest.place(path)}")


class _Both(Mapping[K, V]):
    """Two mappings of which the first counts where both have a key, without a copy of either."""

    def __init__(self, first: Mapping[K, V], second: Mapping[K, V]) -> None:
        self._first, self._second = first, second

    def __getitem__(self, key: K) -> V:
        return self._first[key] if key in self._first else self._second[key]

    def __iter__(self) -> Iterator[K]:
        return iter({**dict.fromkeys(self._second), **dict.fromkeys(self._first)})

    def __len__(self) -> int:
        return len(self._first.keys() | self._second.keys())


class _Run:
    """Small chunks that lie one behind the other in a file."""

    def __init__(self) -> None:
        self.reads: list[ChunkRead] = []
        self.views: list[memoryview] = []
        self._size = 0

    def takes(self, chunk: Chunk) -> bool:
        """Whether ``chunk`` can be added."""
        if not self.reads:
            return True
        last = self.reads[-1].chunk
        fits = len(self.reads) < RUN_LENGTH and self._size + chunk.end - chunk.begin <= READ_BLOCK
        return fits and last.file == chunk.file and last.end == chunk.begin

    def add(self, read: ChunkRead, view: memoryview) -> None:
        self.reads.append(read)
        self.views.append(view)
        self._size += len(view)


class _Hash:
    """The hash of one chunk. Its blocks may come from several threads and out of order."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()
        self._lock = threading.Lock()
        self._waiting: dict[int, memoryview] = {}
        self._done = 0
        self._busy = False

    def add(self, start: int, block: memoryview) -> int:
        """Take the block that begins at ``start``. Returns how many bytes are hashed by now; the whole size only once.

        Whoever brings the block that is due hashes it, and those behind it that wait; nobody waits for another.
        """
        with self._lock:
            self._waiting[start] = block
            if self._busy or self._done not in self._waiting:
                return -1
            self._busy = True
        while True:
            with self._lock:
                due = self._waiting.pop(self._done, None)
                if due is None:
                    self._busy = False
                    return self._done
            self._hasher.update(due)
            self._done += len(due)

    def hexdigest(self) -> str:
        return self._hasher.hexdigest()


def _order(read: ChunkRead) -> tuple[bool, str, int]:
    """That of the files, which disks read fastest; but what one thread has to read alone, and takes long, at first."""
    chunk = read.chunk
    alone = chunk.end - chunk.begin > LARGE and read.target.memory() is None
    return (not alone, chunk.file, chunk.begin)


def _share(tasks: Iterator[Callable[[], None]]) -> None:
    """Carry out ``tasks`` on a few threads. The first error is raised and no task begun after it; none runs on."""
    lock = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        try:
            while not failed.is_set():
                with lock:
                    task = next(tasks, None)
                if task is None:
                    return
                task()
        except BaseException:
            failed.set()
            raise

    with Pool(READ_THREADS, thread_name_prefix="checkpointer-read") as pool:
        workers: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # no further thread can be started
                while len(workers) < READ_THREADS:
                    workers.append(pool.submit(work))
            if not workers:
                work()
            for worker in workers:
                worker.result()
        except BaseException:
            failed.set()
            raise
