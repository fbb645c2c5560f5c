"""What the ranks of a job tell each other: small JSON values, through the job's own key-value store.

No collective: those belong to the training thread and to the user's groups, and after one has timed out the group is
of no use. Every exchange has keys of its own, so a rank that is late, or gone, confuses no later one, and each wait has
a limit after which the error names the ranks that were missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from checkpointer.distributed.absence import Absence
from checkpointer.distributed.errors_on_the_wire import failure, joined, opened
from checkpointer.distributed.mismatch import Board, Purpose
from checkpointer.distributed.session import Session
from checkpointer.distributed.store import StoreClient, in_time
from checkpointer.errors import CheckpointerError, ConfigError, SaveError
from checkpointer.format.index import Json
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

TRAINING = "main"
"""The channel of the training thread."""

LAST_WORDS = 2.0
"""Seconds that the coordinator takes to say what came of an exchange, once its time is over."""

P = ParamSpec("P")
R = TypeVar("R")
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


class StoreRanks:
    """The ranks of the default process group, through its store."""

    def __init__(self, session: Session, *, timeout: float, channel: str = TRAINING) -> None:
        """``timeout``: seconds that a rank which is ready waits for the others."""
        self.rank, self.size, self.channel = session.rank, session.size, channel
        self._session = session
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
        exchange = _Exchange(str(self._count), meeting.what)
        try:
            value = contribute()
        except BaseException as error:
            self._tell_of_failure(exchange.before(self._limit), error)
            raise
        exchange = exchange.before(self._limit)
        if self.rank == 0:
            return self._decide(exchange, meeting, value, decide)
        said = {"value": meeting.contribution.pack(value)}
        return meeting.reply.unpack(opened(self._in_time(exchange.limit, self._contribute, exchange, said)))

    def beside(self, channel: str) -> Ranks:
        return StoreRanks(self._session, timeout=self._timeout, channel=channel)

    @property
    def _limit(self) -> float:
        """Until when to wait, from now on: a bit longer for the coordinator, who waits for others itself."""
        return time.monotonic() + self._timeout + (LAST_WORDS if self.rank else 0)

    def _decide(
        self,
        exchange: _Exchange,
        meeting: Meeting[Value, Reply],
        own: Value,
        decide: Callable[[Sequence[Value]], Reply],
    ) -> Reply:
        try:
            heard = self._in_time(exchange.limit, self._collect, exchange)
            contributions = [own, *map(meeting.contribution.unpack, heard)]
        except BaseException as error:
            self._answer(exchange, failure(error))
            raise
        try:
            reply = decide(contributions)
        except BaseException as error:
            self._answer(exchange, failure(joined(meeting.what, {0: failure(error)}, self.size)))
            raise
        self._answer(exchange, {"value": meeting.reply.pack(reply)})
        return reply

    def _answer(self, exchange: _Exchange, value: dict[str, Any]) -> None:
        """What is decided is done: that nobody can be told any more is an error of the next exchange."""

        def say() -> None:
            self._answered = self._store_client(exchange).say(exchange.reply, value)

        try:
            self._in_time(max(exchange.limit, time.monotonic() + LAST_WORDS), say)
        except ConfigError:  # the others wait for another manager, and find that out by themselves
            return
        except SaveError as error:
            text = "%s: the other ranks could not be told the outcome: %s"
            messages.log(logger.warning, text, exchange.what, error)

    def _collect(self, exchange: _Exchange) -> list[Json]:
        """What the other ranks have contributed."""
        store_client, keys = self._await_all(exchange)
        messages = store_client.hear_all(list(keys.values()))
        # Everybody has heard the answer before, or would not be here.
        keys_heard = [*self._answered, *(key for message in messages for key in message.keys)]
        self._session.forget(store_client, keys_heard, background=self.channel != TRAINING)
        heard = {rank: message.value for rank, message in zip(keys, messages, strict=True)}
        failed = {rank: said for rank, said in heard.items() if "value" not in said}
        if failed:
            raise joined(exchange.what, failed, self.size)
        return [said["value"] for said in heard.values()]

    def _contribute(self, exchange: _Exchange, said: dict[str, Any]) -> dict[str, Any]:
        """Say something to the coordinator, and hear its answer."""
        store_client = self._store_client(exchange)
        store_client.say(exchange.key(self.rank), said)
        self._session.wait(store_client, {0: exchange.reply}, exchange.limit, self._missing(exchange))
        return store_client.hear(exchange.reply)

    def _tell_of_failure(self, exchange: _Exchange, error: BaseException) -> None:
        """Nobody goes on before all know. What goes wrong here matters less than ``error``."""
        heard = failure(error)
        with contextlib.suppress(CheckpointerError):
            if self.rank == 0:
                self._in_time(exchange.limit, self._await_all, exchange)
                self._answer(exchange, failure(joined(exchange.what, {0: heard}, self.size)))
            elif isinstance(error, Exception):
                self._in_time(exchange.limit, self._contribute, exchange, heard)
            else:
                self._in_time(exchange.limit, lambda: self._store_client(exchange).say(exchange.key(self.rank), heard))

    def _await_all(self, exchange: _Exchange) -> tuple[StoreClient, dict[int, str]]:
        store_client, keys = self._store_client(exchange), {rank: exchange.key(rank) for rank in range(1, self.size)}
        self._session.wait(store_client, keys, exchange.limit, self._missing(exchange))
        return store_client, keys

    def _in_time(self, limit: float, talk: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Call ``talk``; where a network may be cut, in a thread that can be left behind, which costs some switches."""
        if self._session.on_one_host:
            return talk(*arguments, **options)
        return in_time(limit, talk, *arguments, **options)

    def _store_client(self, exchange: _Exchange) -> StoreClient:
        return self._session.store_client(self.channel, exchange.limit, self._missing(exchange))

    def _missing(self, exchange: _Exchange) -> Absence:
        return Absence(exchange.what, self.rank, self.size, self._timeout, training=self.channel == TRAINING)


class _Exchange(NamedTuple):
    """One meeting, of this time."""

    number: str
    what: str
    limit: float = 0
    """By ``time.monotonic()``."""

    def before(self, limit: float) -> _Exchange:
        """The same, to be over in time."""
        return self._replace(limit=limit)

    @property
    def reply(self) -> str:
        """The key of the coordinator's answer."""
        return f"{self.number}/reply"

    def key(self, rank: int) -> str:
        """The key of what a rank contributes."""
        return f"{self.number}/{rank}"


def ranks_of_job(purpose: str, timeout: timedelta) -> Ranks:
    """All ranks of the default process group; this process alone where there is none.

    ``purpose`` is the same on all ranks: managers that are made for different purposes do not disturb each other.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Alone()
    store = dist.distributed_c10d._get_default_store()  # noqa: SLF001
    key = hashlib.sha256(purpose.encode()).hexdigest()[:16]
    count = _made[key] = _made.get(key, 0) + 1
    keys, rank = PrefixStore(f"checkpointer/{key}/{count}", store), dist.get_rank()
    board = Board(store, rank, Purpose(purpose, count))
    return StoreRanks(Session(keys, rank, dist.get_world_size(), board), timeout=timeout.total_seconds())


_made: dict[str, int] = {}
"""How many times ranks have met for each purpose: every time has keys of its own."""
