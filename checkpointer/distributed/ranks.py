"""What the ranks of a job tell each other: small JSON values, through the job's own key-value store.

No collective: those belong to the training thread and to the user's groups, and after one has timed out the group is
of no use. Every exchange has keys of its own, so a rank that is late, or gone, confuses no later one, and each wait has
a limit after which the error names the ranks that were missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, Protocol, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from checkpointer import errors, strictjson
from checkpointer.errors import CheckpointerError, SaveError
from checkpointer.index import Json

PIECE = 4 << 20
"""Bytes of one value: the store takes 8 MiB at most."""

SHORTEST_NAP, LONGEST_NAP = 0.0002, 0.05
"""Seconds between two looks for a key. To block instead would keep the training thread, and torch itself, from using
the same connection."""

Value = TypeVar("Value")
Reply = TypeVar("Reply")


class Form(Protocol[Value]):
    """How a value becomes JSON, and back."""

    def pack(self, value: Value) -> Json: ...

    def unpack(self, raw: Json) -> Value: ...


class AsJson:
    """Values that are JSON already."""

    def pack(self, value: Json) -> Json:
        return value

    def unpack(self, raw: Json) -> Json:
        return raw


AS_JSON = AsJson()


class Meeting(Generic[Value, Reply]):
    """One exchange: every rank contributes, the coordinator decides, and all get its reply, or all the same error."""

    def __init__(self, what: str, contribution: Form[Value], reply: Form[Reply]) -> None:
        """``what`` names it in errors: ``the save of step 5``."""
        self.what = what
        self.contribution = contribution
        self.reply = reply


class Ranks(Protocol):
    """The ranks of this job."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def channel(self) -> str:
        """Exchanges on different channels may overlap; those on one have to be in the same order on every rank."""

    def meet(
        self,
        meeting: Meeting[Value, Reply],
        contribute: Callable[[], Value],
        decide: Callable[[Sequence[Value]], Reply],
    ) -> Reply:
        """Call ``contribute`` on every rank and ``decide`` on the coordinator, with what all of them gave.

        Raises:
            CheckpointerError: on all ranks, if any of the calls failed on any rank: it names the rank, and is of the
                same class where that is one of ours.
        """

    def beside(self, channel: str) -> Ranks:
        """The same ranks, for exchanges that may overlap these."""

    def close(self) -> None: ...


class Alone:
    """A process without others."""

    rank, size, channel = 0, 1, ""

    def meet(
        self,
        meeting: Meeting[Value, Reply],
        contribute: Callable[[], Value],
        decide: Callable[[Sequence[Value]], Reply],
    ) -> Reply:
        del meeting
        return decide([contribute()])

    def beside(self, channel: str) -> Ranks:
        del channel
        return self

    def close(self) -> None:
        """Nothing is held."""


class StoreRanks:
    """The ranks of the default process group, through its store."""

    def __init__(self, store: Store, rank: int, size: int, *, timeout: float, channel: str = "main") -> None:
        """``timeout``: seconds that any exchange may take."""
        self.rank, self.size, self.channel = rank, size, channel
        self._store = store
        self._keys = PrefixStore(channel, store)
        self._timeout = timeout
        self._count = 0
        self._answered: list[str] = []
        """The keys of the coordinator's last answer."""

    def meet(
        self,
        meeting: Meeting[Value, Reply],
        contribute: Callable[[], Value],
        decide: Callable[[Sequence[Value]], Reply],
    ) -> Reply:
        self._count += 1
        number, limit = self._count, time.monotonic() + self._timeout
        try:
            value = contribute()
        except BaseException as error:
            self._tell_of_failure(number, meeting.what, error, limit)
            raise
        if self.rank == 0:
            return self._decide(number, meeting, value, decide, limit)
        self._say(f"{number}/{self.rank}", {"value": meeting.contribution.pack(value)})
        return meeting.reply.unpack(_opened(self._listen(f"{number}/reply", [0], meeting.what, limit)))

    def beside(self, channel: str) -> Ranks:
        return StoreRanks(self._store, self.rank, self.size, timeout=self._timeout, channel=channel)

    def close(self) -> None:
        """Nothing is held: keys that are left over go with the job."""

    def _decide(
        self,
        number: int,
        meeting: Meeting[Value, Reply],
        own: Value,
        decide: Callable[[Sequence[Value]], Reply],
        limit: float,
    ) -> Reply:
        try:
            contributions = self._collected(number, meeting, own, limit)
        except BaseException as error:
            self._answer(number, _failure(error))
            raise
        try:
            reply = decide(contributions)
        except BaseException as error:
            self._answer(number, _failure(_joined(meeting.what, {0: _failure(error)}, self.size)))
            raise
        self._answer(number, {"value": meeting.reply.pack(reply)})
        return reply

    def _answer(self, number: int, value: dict[str, Any]) -> None:
        self._answered = self._say(f"{number}/reply", value)

    def _collected(self, number: int, meeting: Meeting[Value, Any], own: Value, limit: float) -> list[Value]:
        """What all ranks have contributed, the coordinator's own first."""
        found: list[Value] = [own]
        failed: dict[int, dict[str, Any]] = {}
        self._await([f"{number}/{rank}" for rank in range(1, self.size)], range(1, self.size), meeting.what, limit)
        for rank in range(1, self.size):
            heard = self._hear(f"{number}/{rank}")
            if "value" in heard:
                found.append(meeting.contribution.unpack(heard["value"]))
            else:
                failed[rank] = heard
        self._forget(*self._answered)  # everybody has heard the answer before, or would not be here
        if failed:
            raise _joined(meeting.what, failed, self.size)
        return found

    def _tell_of_failure(self, number: int, what: str, error: BaseException, limit: float) -> None:
        """Nobody goes on before all know. What goes wrong here matters less than ``error``."""
        heard = _failure(error)
        with contextlib.suppress(CheckpointerError):
            if self.rank == 0:
                self._await([f"{number}/{rank}" for rank in range(1, self.size)], range(1, self.size), what, limit)
                self._answer(number, _failure(_joined(what, {0: heard}, self.size)))
            else:
                self._say(f"{number}/{self.rank}", heard)
                if isinstance(error, Exception):
                    self._listen(f"{number}/reply", [0], what, limit)

    def _listen(self, key: str, ranks: Sequence[int], what: str, limit: float) -> dict[str, Any]:
        self._await([key], ranks, what, limit)
        return self._hear(key, keep=True)

    def _await(self, keys: list[str], ranks: Sequence[int], what: str, limit: float) -> None:
        """Sleep until all keys are there."""
        nap = SHORTEST_NAP
        while not self._there(keys):
            if time.monotonic() > limit:
                missing = [rank for key, rank in zip(keys, ranks, strict=True) if not self._there([key])]
                raise SaveError(
                    f"{what}: rank {', '.join(map(str, missing[:8]))} of {self.size} said nothing for "
                    f"{self._timeout:g} s (write: {{rank_timeout}}): it is dead or stuck. Nothing was committed"
                )
            time.sleep(nap)
            nap = min(nap * 1.5, LONGEST_NAP)

    def _there(self, keys: list[str]) -> bool:
        try:
            return not keys or bool(self._keys.check(keys))
        except (RuntimeError, ConnectionError) as error:
            raise SaveError(f"the store of this job cannot be reached any more: {error}") from error

    def _say(self, key: str, value: dict[str, Any]) -> list[str]:
        """Publish a value; returns the keys that it takes."""
        data = zlib.compress(strictjson.dumps(value).encode("ascii"), 1)
        pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
        for number, piece in enumerate(pieces[1:], start=1):
            self._put(f"{key}+{number}", piece)
        self._put(key, len(pieces).to_bytes(4, "big") + pieces[0])  # the last: whoever sees it finds the others
        return [key, *(f"{key}+{number}" for number in range(1, len(pieces)))]

    def _put(self, key: str, data: bytes) -> None:
        try:
            self._keys.set(key, data)  # type: ignore[arg-type]  # declared for str, takes bytes
        except (RuntimeError, ConnectionError) as error:
            raise SaveError(f"the store of this job cannot be reached any more: {error}") from error

    def _hear(self, key: str, *, keep: bool = False) -> dict[str, Any]:
        first = self._keys.get(key)
        names = [f"{key}+{number}" for number in range(1, int.from_bytes(first[:4], "big"))]
        data = first[4:] + b"".join(self._keys.get(name) for name in names)
        if not keep:
            self._forget(key, *names)
        return strictjson.mapping(strictjson.loads(zlib.decompress(data), "another rank's message"), "message")

    def _forget(self, *keys: str) -> None:
        for key in keys:
            self._keys.delete_key(key)


def ranks_of_job(purpose: str, timeout: timedelta) -> Ranks:
    """All ranks of the default process group; this process alone where there is none.

    ``purpose`` is the same on all ranks: managers that are made for different purposes do not disturb each other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Alone()
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    key = hashlib.sha256(purpose.encode()).hexdigest()[:16]
    count = _made[key] = _made.get(key, 0) + 1
    keys = PrefixStore(f"checkpointer/{key}/{count}", store)
    return StoreRanks(keys, dist.get_rank(), dist.get_world_size(), timeout=timeout.total_seconds())


_made: dict[str, int] = {}
"""How many times ranks have met for each purpose: every time has keys of its own."""


def _failure(error: BaseException) -> dict[str, Any]:
    """An error as JSON: its class by name, which is looked up among ours alone."""
    number = error.errno if isinstance(error, OSError) else None
    kind = type(error).__name__ if isinstance(error, CheckpointerError) else "SaveError"
    told = str(error) if isinstance(error, CheckpointerError) else f"{type(error).__name__}: {error}"
    return {"error": kind, "text": told[:20_000].encode("ascii", "replace").decode(), "errno": number}


def _joined(what: str, failed: dict[int, dict[str, Any]], size: int) -> CheckpointerError:
    """One error for what several ranks have met."""
    kinds = {str(heard.get("error")) for heard in failed.values()}
    told = "; ".join(f"rank {rank} of {size}: {heard.get('text')}" for rank, heard in sorted(failed.items())[:8])
    error = _class_named(kinds.pop() if len(kinds) == 1 else "SaveError")(f"{what} failed: {told}")
    numbers = {heard.get("errno") for heard in failed.values()}
    if isinstance(error, OSError):
        error.errno = numbers.pop() if len(numbers) == 1 else None
    return error


def _class_named(name: str) -> type[CheckpointerError]:
    found = getattr(errors, name, None) if name in errors.__all__ else None
    return found if isinstance(found, type) and issubclass(found, CheckpointerError) else SaveError


def _opened(heard: dict[str, Any]) -> Json:
    if "value" in heard:
        value: Json = heard["value"]
        return value
    error = _class_named(str(heard.get("error")))(str(heard.get("text")))
    if isinstance(error, OSError):
        error.errno = heard.get("errno")
    raise error
