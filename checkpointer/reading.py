"""Reading one checkpoint back, trusting nothing: sizes first, then bytes against their hashes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import xxhash

from checkpointer import layout
from checkpointer.errors import CorruptCheckpointError
from checkpointer.index import Chunk, Index, parse_index
from checkpointer.manifest import Manifest
from checkpointer.storage import ReadFile, Storage

if TYPE_CHECKING:
    from typing_extensions import Self

READ_BLOCK = 512 * 1024
"""Bytes read and hashed at a time: small enough that the hash finds them in the processor's cache."""

BATCH = 4 << 20
"""Bytes that one task of a reading thread reads at least, unless it reads ``BATCH_LENGTH`` chunks."""

BATCH_LENGTH = 512

READ_THREADS = min(8, max(2, os.cpu_count() or 1))

T = TypeVar("T")


class Target(Protocol):
    """Where the bytes of one chunk go. Both methods are called on a reader's thread, in this order."""

    def open(self) -> memoryview:
        """Contiguous unsigned bytes of just the chunk's size; allocated only now where it is not live memory."""

    def finish(self) -> None:
        """The bytes are there and verified."""


class ChunkRead(NamedTuple):
    """A chunk, and where it is read to."""

    name: str
    """Component and key, for errors."""
    chunk: Chunk
    target: Target


class CheckpointReader:
    """An open checkpoint. Use as a context manager.

    Opening reads the index and compares the size of every file with the manifest, so that whoever allocates memory
    for tensors afterwards can trust their shapes.

    Raises:
        CorruptCheckpointError: a file is missing, has another size, or fails its check.
        FileNotFoundError: the whole checkpoint has vanished (a writer pruned it).
    """

    def __init__(self, storage: Storage, directory: str, manifest: Manifest) -> None:
        self._storage = storage
        self._directory = directory
        self.manifest = manifest
        self._stack = ExitStack()
        try:
            self._files: dict[str, ReadFile] = {}
            self.index = self._read_index()
            for path in manifest.files:
                self._check_size(path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._stack.close()

    def check_metadata(self) -> None:
        """Check what is not tensor data: whole small files, and the headers of safetensors files."""
        for path, record in self.manifest.files.items():
            header = self.index.headers.get(path)
            length, expected = header or (record.size, record.xxh3)
            if self._hash(path, 0, length) != expected:
                what = "the header of " if header else ""
                raise CorruptCheckpointError(f"{what}{self._place(path)} is damaged: its bytes do not match its hash")

    def read(self, reads: Sequence[ChunkRead], *, verify: bool) -> None:
        """Fill every target, from several threads; the largest first."""

        def read_batch(batch: Sequence[ChunkRead]) -> None:
            for read in batch:
                self._read_chunk(read, verify=verify)

        _in_parallel(read_batch, list(_batches(reads)))

    def check_chunks(self, chunks: Iterable[tuple[str, Chunk]]) -> None:
        """Check the hash of each ``(name, chunk)`` without keeping its bytes."""
        _in_parallel(lambda item: self._check_chunk(*item), list(chunks))

    def _open(self, path: str) -> ReadFile:
        record = self.manifest.files[path]
        place = f"{self._directory}/{self.manifest.place(path)}"
        try:
            file = self._storage.open(place)
        except FileNotFoundError as error:
            if not self._storage.exists(f"{self._directory}/{layout.MANIFEST}"):
                raise  # the whole checkpoint is gone, not one file of it
            raise CorruptCheckpointError(f"{self._place(path)} is missing") from error
        if file.size != record.size:
            file.close()
            raise CorruptCheckpointError(f"{self._place(path)} has {file.size} bytes, {record.size} were written")
        return file

    def _check_size(self, path: str) -> None:
        """Open a file, which compares its size; those with tensors stay open, there are few of them."""
        file = self._open(path)
        if path in self.index.headers:
            self._files[path] = file
            self._stack.callback(file.close)
        else:
            file.close()

    def _read_index(self) -> Index:
        path = layout.INDEX
        if path not in self.manifest.files:
            raise CorruptCheckpointError(f"{self._storage.place(self._directory)} lists no {path}")
        size = self.manifest.files[path].size
        if size > layout.INDEX_LIMIT:
            raise CorruptCheckpointError(f"{self._place(path)} is larger than {layout.INDEX_LIMIT} bytes")
        data = self.whole(path, 0, size)
        if xxhash.xxh3_128_hexdigest(data) != self.manifest.files[path].xxh3:
            raise CorruptCheckpointError(f"{self._place(path)} is damaged: its bytes do not match its hash")
        sizes = {file: record.size for file, record in self.manifest.files.items()}
        return parse_index(data, sizes, self._place(path))

    def _read_chunk(self, read: ChunkRead, *, verify: bool) -> None:
        hasher = xxhash.xxh3_128()
        view = read.target.open()
        file = self._files[read.chunk.file]
        for start in range(0, len(view), READ_BLOCK):
            block = view[start : start + READ_BLOCK]
            self._read_into(file, read.chunk.file, read.chunk.begin + start, block)
            if verify:
                hasher.update(block)
        if verify and hasher.hexdigest() != read.chunk.xxh3:
            raise self._damaged(read.name, read.chunk)
        read.target.finish()

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
        file = self._files.get(path) or self._open(path)
        try:
            for start in range(begin, end, READ_BLOCK):
                block = buffer[: min(READ_BLOCK, end - start)]
                self._read_into(file, path, start, block)
                yield block
        finally:
            if path not in self._files:
                file.close()

    def whole(self, path: str, begin: int, end: int) -> bytes:
        """The bytes of a file from ``begin`` to ``end`` at once."""
        return b"".join([bytes(block) for block in self.blocks(path, begin, end)])  # the blocks are one buffer

    def _read_into(self, file: ReadFile, path: str, offset: int, view: memoryview) -> None:
        try:
            file.read_into(offset, view)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise CorruptCheckpointError(f"{self._place(path)} cannot be read: {error}") from error

    def _place(self, path: str) -> str:
        return self._storage.place(f"{self._directory}/{self.manifest.place(path)}")


def _batches(reads: Sequence[ChunkRead]) -> Iterator[Sequence[ChunkRead]]:
    """The largest chunks first and one by one; small ones together, for handing work to a thread costs more."""
    batch: list[ChunkRead] = []
    size = 0
    for read in sorted(reads, key=lambda read: read.chunk.begin - read.chunk.end):
        batch.append(read)
        size += read.chunk.end - read.chunk.begin
        if size >= BATCH or len(batch) == BATCH_LENGTH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_parallel(function: Callable[[T], None], items: Sequence[T]) -> None:
    """Call ``function`` for each item on a few threads; the first error is raised and the rest is not begun."""
    if len(items) < 2:
        for item in items:
            function(item)
        return
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="checkpointer-read") as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
