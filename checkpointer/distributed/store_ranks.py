"""Exchanges through the job's key-value store."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from checkpointer.distributed.absence import Absence
from checkpointer.distributed.encoding import decode, encode
from checkpointer.distributed.errors_on_the_wire import Failure, as_error, failure, joined
from checkpointer.distributed.exchange import Exchange, Ranks
from checkpointer.distributed.session import Answer, Session
from checkpointer.distributed.store import StoreClient, in_time
from checkpointer.errors import CheckpointerError, ConfigError, SaveError
from checkpointer.system import messages

logger = logging.getLogger("checkpointer")

TRAINING = "main"
"""The channel of the training thread."""

LAST_WORDS = 2.0
"""Seconds that the coordinator takes to say what came of an exchange, once its time is over."""

P = ParamSpec("P")
R = TypeVar("R")
Value = TypeVar("Value")

_VALUE, _FAILURE, _FOR_EACH = b"v", b"f", b"e"
"""The first byte of a message: a value; an error; for each rank another value, under a key of its own."""

_HERE = True
"""What is said where it only matters that something is."""


class StoreRanks:
    """The ranks of the default process group, through its store."""

    def __init__(self, session: Session, *, timeout: float, channel: str = TRAINING) -> None:
        """``timeout``: seconds that a rank which is ready waits for the others."""
        self.rank, self.size, self.channel = session.rank, session.size, channel
        self.session = session
        self.timeout = timeout
        self.answered: list[str] = []
        """The keys of the coordinator's answers that some rank may not have heard yet."""
        self._count = 0

    @contextmanager
    def exchange(self, what: str) -> Iterator[Exchange]:
        self._count += 1
        exchange = StoreExchange(self, self._count, what)
        try:
            yield exchange
        except BaseException as error:
            exchange.fail(error)
            raise
        exchange.end()

    def beside(self, channel: str) -> Ranks:
        return StoreRanks(self.session, timeout=self.timeout, channel=channel)


class StoreExchange:
    """One exchange of one rank. What it says, and what it hears from the coordinator, is numbered from 1."""

    def __init__(self, ranks: StoreRanks, number: int, what: str) -> None:
        self.what = what
        self._ranks = ranks
        self._number = number
        self._gathers = 0
        self._answers = 0
        self._limit = self._time_from_now()
        """Until when to wait, by ``time.monotonic()``."""
        self._unsaid: tuple[str, bytes] | None = None
        """Key and message of this rank that go out when it waits for the answer: two waits would take two threads."""
        self._known: BaseException | None = None
        """What was raised by the exchange itself: the others know of it, or cannot be told."""

    def gather(self, value: Value, kind: type[Value]) -> list[Value] | None:
        said = _VALUE + encode(value)
        self.end()
        self._gathers += 1
        if self._ranks.rank:
            self._unsaid = self._key(self._ranks.rank), said
            return None
        return [value, *self._by_the_store(self._collect, kind)]

    def broadcast(self, value: Value | None, kind: type[Value]) -> Value:
        if self._ranks.rank:
            return self._answer_heard(kind)
        self._answer(_VALUE + encode(value))
        return value  # type: ignore[return-value]  # None only where that is what is said

    def scatter(self, values: Sequence[Value] | None, kind: type[Value]) -> Value:
        if self._ranks.rank:
            return self._answer_heard(kind)
        assert values is not None
        assert len(values) == self._ranks.size, "the coordinator has a value for each rank"
        self._answer(_FOR_EACH, [_VALUE + encode(value) for value in values[1:]])
        return values[0]

    def arrive(self) -> None:
        self.gather(_HERE, bool)

    def release(self) -> None:
        self.broadcast(_HERE, bool)

    def barrier(self) -> None:
        self.arrive()
        self.release()

    def end(self) -> None:
        """Say what has not been said yet."""
        if self._unsaid is not None:
            self._by_the_store(self._say)

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error: nobody goes on before all know. What goes wrong here matters less than it."""
        if self._ranks.rank == 0:
            self._fail_all(error)
        elif error is not self._known:
            with contextlib.suppress(CheckpointerError):
                self._fail_as_one(error)

    def _fail_all(self, error: BaseException) -> None:
        """On the coordinator."""
        if not self._gathers:  # no rank has been waited for
            self._gathers += 1
            with contextlib.suppress(CheckpointerError):
                self._by_the_store(self._await_all)
        names_ranks = error is self._known and isinstance(error, CheckpointerError)
        told = error if names_ranks else joined(self.what, {0: failure(error)}, self._ranks.size)
        self._answer(_FAILURE + encode(failure(told)))

    def _fail_as_one(self, error: BaseException) -> None:
        """On any other rank."""
        if self._unsaid is None:  # else this takes the place of what it wanted to say
            self._gathers += 1
        self._unsaid = self._key(self._ranks.rank), _FAILURE + encode(failure(error))
        self.end()
        if isinstance(error, Exception) and not self._answers:  # else nothing more may have been asked for
            self._answer_heard(object)

    def _say(self) -> StoreClient:
        store_client, unsaid = self._store_client(), self._unsaid
        if unsaid is not None:
            store_client.say(*unsaid)
            self._unsaid = None
        return store_client

    def _collect(self, kind: type[Value]) -> list[Value]:
        """What the other ranks have said."""
        store_client, keys = self._await_all()
        heard = store_client.hear_all(list(keys.values()))
        # Everybody has heard the answers before, or would not be here.
        keys_heard = [*self._ranks.answered, *(key for message in heard for key in message.keys)]
        self._ranks.answered = []
        self._ranks.session.forget(store_client, keys_heard, background=self._ranks.channel != TRAINING)
        said = {rank: message.data for rank, message in zip(keys, heard, strict=True)}
        failed = {rank: self._decoded(data, Failure, rank) for rank, data in said.items() if data[:1] == _FAILURE}
        if failed:
            raise joined(self.what, failed, self._ranks.size)
        return [self._decoded(data, kind, rank) for rank, data in said.items()]

    def _await_all(self) -> tuple[StoreClient, dict[int, str]]:
        store_client, keys = self._store_client(), {rank: self._key(rank) for rank in range(1, self._ranks.size)}
        self._ranks.session.wait(store_client, keys, self._limit, self._absence())
        return store_client, keys

    def _answer(self, said: bytes, for_each: Sequence[bytes] = ()) -> None:
        """What is decided is done: that nobody can be told any more is an error of the next exchange."""
        self._answers += 1
        key = self._awaited.key
        messages_said = [*((f"{key}/{rank}", data) for rank, data in enumerate(for_each, start=1)), (key, said)]
        self._limit = max(self._limit, time.monotonic() + LAST_WORDS)
        try:
            self._in_time(self._publish, messages_said)
        except ConfigError:  # the others wait for another manager, and find that out by themselves
            return
        except SaveError as error:
            text = "%s: the other ranks could not be told the outcome: %s"
            messages.log(logger.warning, text, self.what, error)

    def _publish(self, messages_said: Sequence[tuple[str, bytes]]) -> None:
        store_client = self._store_client()
        for key, data in messages_said:
            self._ranks.answered += store_client.say(key, data)
        self._ranks.session.answered(self._ranks.channel, self._awaited)

    def _answer_heard(self, kind: type[Value]) -> Value:
        """What the coordinator says to this rank."""
        self._answers += 1
        said = self._by_the_store(self._await_answer)
        return self._decoded(said, kind, 0)

    def _await_answer(self) -> bytes:
        store_client, answer = self._say(), self._awaited
        session, channel = self._ranks.session, self._ranks.channel
        session.wait_for_answer(store_client, channel, answer, self._limit, self._absence())
        said = store_client.hear(answer.key)
        if said[:1] == _FAILURE:
            raise as_error(self._decoded(said, Failure, 0))
        return store_client.hear(f"{answer.key}/{self._ranks.rank}") if said == _FOR_EACH else said

    def _decoded(self, data: bytes, kind: type[Value], rank: int) -> Value:
        return decode(data[1:], kind, f"{self.what}: rank {rank} of {self._ranks.size}")

    def _by_the_store(self, talk: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Call ``talk``, which waits for others from now on."""
        self._limit = self._time_from_now()
        try:
            return self._in_time(talk, *arguments, **options)
        except BaseException as error:
            self._known = error
            raise

    def _time_from_now(self) -> float:
        """A bit more for those that wait for the coordinator, which waits for others itself."""
        return time.monotonic() + self._ranks.timeout + (LAST_WORDS if self._ranks.rank else 0)

    def _in_time(self, talk: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Call ``talk``; where a network may be cut, in a thread that can be left behind, which costs some switches."""
        if self._ranks.session.on_one_host:
            return talk(*arguments, **options)
        return in_time(self._limit, talk, *arguments, **options)

    def _store_client(self) -> StoreClient:
        return self._ranks.session.store_client(self._ranks.channel, self._limit, self._absence())

    def _absence(self) -> Absence:
        ranks = self._ranks
        return Absence(self.what, ranks.rank, ranks.size, ranks.timeout, training=ranks.channel == TRAINING)

    @property
    def _awaited(self) -> Answer:
        """The coordinator's answer that is the next, or was the last."""
        return Answer(f"{self._number}/{self._answers}/answer", (self._number << 16) + self._answers)

    def _key(self, rank: int) -> str:
        """The key of what a rank says now."""
        return f"{self._number}/{self._gathers}/{rank}"
