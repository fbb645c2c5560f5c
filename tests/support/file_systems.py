"""File systems for fsspec that somebody might have written: one that is right, and others with one mistake each."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, ClassVar
from urllib.parse import unquote

import fsspec
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

LOCK = threading.Lock()


class Upload(AbstractBufferedFile):  # type: ignore[misc]  # fsspec ships no types
    """A file that is sent when it is closed."""

    def _initiate_upload(self) -> None:
        self.sent = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        self.sent += self.buffer.getvalue()
        if final:
            self.fs.store_file(self.path, self.sent)
        return True


class Honest(MemoryFileSystem):  # type: ignore[misc]  # as above
    """A server: its files are shared by all clients of this process, and nothing is kept by a client."""

    protocol: ClassVar[Any] = "honest"
    upload: ClassVar[type[Upload]] = Upload

    def __init_subclass__(cls, **_: Any) -> None:
        cls.protocol = cls.__name__.lower()
        cls.store, cls.pseudo_dirs = {}, [""]
        fsspec.register_implementation(cls.protocol, cls, clobber=True)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix(f"{cls.protocol}://")))

    def store_file(self, path: str, data: bytes) -> None:
        """Keep what a client has sent."""
        self.store[path] = MemoryFile(self, path, data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        with LOCK:
            if mode == "create" and self.exists(path):
                raise FileExistsError(path)
            self.store_file(self._strip_protocol(path), bytes(value))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return self.upload(self, path, mode) if mode == "wb" else super()._open(path, mode, **options)


fsspec.register_implementation("honest", Honest, clobber=True)


class IgnoresRanges(Honest):
    """Whoever asks for a part is sent the whole file."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return bytes(super().cat_file(path))


class OverwritesOnCreate(Honest):
    """A server that does not know the condition."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        super().pipe_file(path, value)


class CreatesByItsOwnView(Honest):
    """It knows the condition, but asks the client, which has seen its own files."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        seen = self.__dict__.setdefault("seen", set())
        if mode == "create" and path in seen:
            raise FileExistsError(path)
        seen.add(path)
        super().pipe_file(path, value)


class CachesListings(Honest):
    """A directory is listed as this client has seen it first; what the client itself writes clears that."""

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        listed = self.__dict__.setdefault("listed", {})
        if path not in listed:
            listed[path] = super().ls(path, detail=True)
        return listed[path] if detail else [item["name"] for item in listed[path]]

    def store_file(self, path: str, data: bytes) -> None:
        self.__dict__.setdefault("listed", {}).clear()
        super().store_file(path, data)


class LosesErrorsAtClose(Honest):
    """What goes wrong as the last bytes are sent is nobody's business."""

    class Careless(Upload):
        def close(self) -> None:
            with contextlib.suppress(OSError):
                super().close()

    upload = Careless


class LosesErrorsOfTheServer(Honest):
    """The server refuses long names; the client does not look at its answer."""

    def store_file(self, path: str, data: bytes) -> None:
        if len(path) < 1024:
            super().store_file(path, data)


class Truncates(Honest):
    """The last part of a file in several parts is not sent."""

    def store_file(self, path: str, data: bytes) -> None:
        part = 5 << 20
        super().store_file(path, data if len(data) < part else data[: len(data) // part * part])


class ReplacesInTwoSteps(Honest):
    """A file is emptied, and then filled."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "overwrite":
            super().pipe_file(path, b"")
            time.sleep(0.005)
        super().pipe_file(path, value, mode)


class RemovesByPrefix(Honest):
    """It removes all that begins with the name."""

    def _rm(self, path: str) -> None:
        super()._rm(path)
        for name in [name for name in self.store if name.startswith(self._strip_protocol(path))]:
            del self.store[name]


class MissingIsEmpty(Honest):
    """What is not there has no bytes."""

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return bytes(super().cat_file(path, start, end)) if self._strip_protocol(path) in self.store else b""


class UnquotesNames(Honest):
    """A path is a URL to it."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(unquote(path))


class RoundsSizes(Honest):
    """A size is a number of blocks."""

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **options)
        return {**found, "size": -(-found["size"] // 512) * 512}
