"""The ranks of a job find each other: those that live now, not those of the same job before it was started again.

``torchrun`` keeps its store when it starts ranks again, with all that their predecessors have said. So the coordinator
names each session anew, and every rank waits until the coordinator has repeated a word that it has just made up.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch.distributed.distributed_c10d import Store

from checkpointer.distributed.encoding import decode, encode
from checkpointer.distributed.host_page import Address, HostPage, PageReader
from checkpointer.distributed.liveness import Liveness, Process, this_process
from checkpointer.distributed.mismatch import Board
from checkpointer.distributed.store import StoreClient
from checkpointer.errors import CheckpointerError, ConfigError
from checkpointer.system.host import host_name
from checkpointer.system.threads import room_for_a_thread

SHORTEST_NAP, BRIEF_NAP, LONGEST_NAP = 0.0002, 0.05, 0.5
"""Seconds between two looks for a key. To block instead would keep the training thread, and torch itself, from using
the same connection; and a wait on a further one that is over without an answer prints two lines to stderr."""

PATIENCE = 50
"""How many times longer than a nap a rank has waited already, once naps are no longer brief."""

LOOKS = 2000
"""Looks a second into one store by all hosts together, about: so many cost a core of the store's host 5 %."""

LOCAL_NAP = 0.02
"""Seconds between two looks at the page of the rank that looks into the store for this host."""

BATCH = 256
"""Keys that one look asks for."""

BETWEEN_LOOKS = 0.5
"""Seconds between two looks whether those that say nothing still run."""

LAST_MOMENTS = 2.0
"""Seconds that the end of the program waits for messages to be removed."""

MOST_HEARD = 1000
"""Keys of messages that the training thread leaves to be removed by others."""


class Missing(Protocol):
    """What to make of ranks that have not come to an exchange."""

    def error(self, silent: list[int], dead: dict[int, int]) -> Exception:
        """For ranks that have said nothing, and for those of them that run no more: their processes."""

    @property
    def reminder_due(self) -> bool:
        """Whether it is time to say who is waited for."""

    def remind(self, silent: list[int], hosts: Mapping[int, str]) -> None:
        """Say that they are waited for, where that is due. ``hosts``: where they run, as far as that is known."""


class Nap:
    """How long to sleep until the next look: at first hardly, then in proportion to what the wait has taken."""

    def __init__(self, lookers: int) -> None:
        """``lookers``: how many ask the same store; 0: this looks at a page of memory, which costs next to nothing."""
        self._began = time.monotonic()
        self._share = 2 if lookers else 8
        self._longest = LONGEST_NAP if lookers else LOCAL_NAP
        self._brief = min(max(BRIEF_NAP, lookers / LOOKS), self._longest)

    def sleep(self) -> None:
        """Sleep for a while."""
        waited = time.monotonic() - self._began
        nap = max(min(waited / self._share, self._brief), waited / PATIENCE, SHORTEST_NAP)
        time.sleep(min(nap, self._longest))


class Words(NamedTuple):
    """What a rank says of itself; never the same twice."""

    word: str
    """Made up."""
    process: Process | None
    host: str
    page: Address | None = None
    """Of what it has to say to the ranks of its host."""

    @property
    def where(self) -> str:
        """The same for all ranks that see each other run; empty where that is not known."""
        return self.process.where if self.process else ""


class Answer(NamedTuple):
    """One of the coordinator's on a channel."""

    key: str
    number: int
    """Larger than those of the answers before."""


class Session:
    """One life of a job."""

    def __init__(self, store: Store, rank: int, size: int, board: Board | None = None) -> None:
        """``board``: where ranks see, before they have found each other, that they wait for different managers."""
        self.rank, self.size = rank, size
        self._store = store
        self._board = board
        self._refused: CheckpointerError | None = None
        self._guard = threading.Lock()
        self._id = ""
        self._liveness = Liveness({})
        self.on_one_host = False
        """Whether all ranks are known to run here, where no network comes between them and their store."""
        self._hosts: dict[int, str] = {}
        self._host_count = size
        self._own_page = HostPage()
        self._page: PageReader | None = None
        """Of the rank that looks into the store for this host, where that is another one."""
        self._heard: list[tuple[StoreClient, list[str]]] = []
        """Messages that can be removed."""

    def store_client(self, channel: str, limit: float, missing: Missing) -> StoreClient:
        """What the ranks of this session say on a channel; at the first call, they find each other."""
        with self._guard:
            if not self._id:
                self._id = self._found(limit, missing)
        return StoreClient(self._store, f"{self._id}/{channel}")

    def _found(self, limit: float, missing: Missing) -> str:
        """The session, once the ranks have found each other."""
        if self._refused is not None:
            raise self._refused
        find = self._lead if self.rank == 0 else self._follow
        if self._board is None:
            return find(limit, missing)
        self._board.begin()
        try:
            return find(limit, missing)
        except ConfigError as error:
            self._refused = error
            raise
        finally:
            self._board.end()

    def wait(self, store_client: StoreClient, keys: dict[int, str], limit: float, missing: Missing) -> None:
        """Sleep until each rank has said its key.

        Raises:
            Exception: the error that ``missing`` makes of those that have not.
        """
        nap, look, left = Nap(self._host_count), time.monotonic() + BETWEEN_LOOKS, dict(keys)
        while left:
            batch = dict(itertools.islice(left.items(), BATCH))
            if store_client.there(*batch.values()):
                left = {rank: key for rank, key in left.items() if rank not in batch}
                continue
            look = self._look_now_and_then(store_client, left, look, limit, missing)
            nap.sleep()

    def wait_for_answer(
        self, store_client: StoreClient, channel: str, answer: Answer, limit: float, missing: Missing
    ) -> None:
        """Sleep until the coordinator has given this answer.

        Raises:
            Exception: the error that ``missing`` makes of a coordinator that has not.
        """
        keys = {0: answer.key}
        if self._page is None:
            self.wait(store_client, keys, limit, missing)
            self.answered(channel, answer)
            return
        nap, now = Nap(0), time.monotonic()
        look, own_look, between = now + BETWEEN_LOOKS, now, max(BETWEEN_LOOKS, self.size / LOOKS)
        while True:
            now = time.monotonic()
            if self._page.counted(channel) >= answer.number or now > own_look:  # whoever looks for all may be stuck
                if store_client.there(answer.key):
                    return
                own_look = now + between
            look = self._look_now_and_then(store_client, keys, look, limit, missing)
            nap.sleep()

    def answered(self, channel: str, answer: Answer) -> None:
        """Let the other ranks of this host know that the answer is there."""
        self._own_page.count(channel, answer.number)

    def forget(self, store_client: StoreClient, keys: list[str], *, background: bool) -> None:
        """Remove messages that all have heard: by a thread for which training does not wait."""
        with self._guard:
            self._heard.append((store_client, keys))
            many = sum(len(some) for _, some in self._heard) >= MOST_HEARD
            if not background and not many:
                return
            heard, self._heard = self._heard, []
        if background:
            _forget(heard)
        elif room_for_a_thread():
            thread = threading.Thread(target=_forget, args=(heard,), name="checkpointer-store", daemon=True)
            thread.start()
            _forgetting.add(thread)

    def _look_now_and_then(
        self, store_client: StoreClient, keys: dict[int, str], look: float, limit: float, missing: Missing
    ) -> float:
        """When ``look`` or ``limit`` has come, see what is wrong with those that say nothing; returns the next look."""
        now = time.monotonic()
        late = now > limit
        if not late and now <= look:
            return look
        self._look(store_client, keys, missing, late=late)
        return now + BETWEEN_LOOKS

    def _look(self, store_client: StoreClient, keys: dict[int, str], missing: Missing, *, late: bool) -> None:
        dead = self._liveness.gone(keys)
        finding = self._board is not None and not self._id
        if not (dead or late or finding or missing.reminder_due):
            return
        silent = _silent(store_client, keys)  # last words may have come just now
        dead = {rank: pid for rank, pid in dead.items() if rank in silent}
        if dead or (late and silent):
            raise missing.error(silent, dead)
        if silent:
            self._wait_on(silent, missing)

    def _wait_on(self, silent: list[int], missing: Missing) -> None:
        if self._board is not None and not self._id:
            self._board.look(silent)
        missing.remind(silent, self._hosts)

    def _lead(self, limit: float, missing: Missing) -> str:
        """On the coordinator: begin a session."""
        store_client, id = StoreClient(self._store, "sessions"), secrets.token_hex(8)
        store_client.say("newest", encode(id))
        keys = {rank: f"{id}/{rank}" for rank in range(1, self.size)}
        self.wait(store_client, keys, limit, missing)
        heard = store_client.hear_all(list(keys.values()))
        others = [decode(message.data, Words, f"rank {rank}") for rank, message in zip(keys, heard, strict=True)]
        told = dict(enumerate([self._words(), *others]))
        hosts: dict[str, dict[int, Words]] = {}
        for rank, words in told.items():
            hosts.setdefault(_together(rank, words), {0: told[0]})[rank] = words
        for name, ranks in hosts.items():
            store_client.say(f"{id}/all/{name}", encode(_Found(len(hosts), ranks)))
        self._meet_neighbours(_Found(len(hosts), told))
        return id

    def _follow(self, limit: float, missing: Missing) -> str:
        """On any other rank: answer to each session that is called the newest, until one knows this answer."""
        store_client, words, nap, id = StoreClient(self._store, "sessions"), self._words(), Nap(self.size), ""
        look, found = time.monotonic() + BETWEEN_LOOKS, _together(self.rank, words)
        while True:
            if store_client.there("newest") and (newest := decode(store_client.hear("newest"), str, "rank 0")) != id:
                id = newest
                store_client.say(f"{id}/{self.rank}", encode(words))
            if id and store_client.there(f"{id}/all/{found}"):
                told = decode(store_client.hear(f"{id}/all/{found}"), _Found, "rank 0")
                if told.ranks.get(self.rank) == words:
                    self._meet_neighbours(told)
                    return id
            now = time.monotonic()
            if now > limit:
                raise missing.error([0], {})
            if now > look:
                look = now + BETWEEN_LOOKS
                self._wait_on([0], missing)
            nap.sleep()

    def _words(self) -> Words:
        return Words(secrets.token_hex(8), this_process(), host_name(), self._own_page.address)

    def _meet_neighbours(self, told: _Found) -> None:
        self._liveness = Liveness({rank: words.process for rank, words in told.ranks.items()})
        self._hosts = {rank: words.host for rank, words in told.ranks.items()}
        self._host_count = told.hosts
        self.on_one_host = len(self._liveness.ranks) == self.size
        lowest = min(self._liveness.ranks, default=self.rank)
        if lowest < self.rank:
            self._page = PageReader(told.ranks[lowest].process, told.ranks[lowest].page) or None
            self._own_page.close()


class _Found(NamedTuple):
    """What the coordinator tells the ranks of one host, once all have found each other."""

    hosts: int
    """How many there are."""
    ranks: dict[int, Words]
    """Those of this host, and the coordinator."""


def _together(rank: int, words: Words) -> str:
    """A name of the host, for which a rank that cannot see others run stands alone."""
    return hashlib.sha256(words.where.encode()).hexdigest()[:16] if words.where else str(rank)


def _silent(store_client: StoreClient, keys: dict[int, str]) -> list[int]:
    """Those that have said nothing; where that is true of few, the others are asked for together."""
    found: list[int] = []
    left = iter(keys.items())
    while batch := dict(itertools.islice(left, BATCH)):
        if not store_client.there(*batch.values()):
            found += [rank for rank, key in batch.items() if not store_client.there(key)]
    return found


def _forget(heard: list[tuple[StoreClient, list[str]]]) -> None:
    for store_client, keys in heard:
        store_client.forget(keys)


_forgetting: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_at_exit() -> None:
    """A daemon that is inside torch when the interpreter ends would bring the process down."""
    for thread in list(_forgetting):
        thread.join(LAST_MOMENTS)
