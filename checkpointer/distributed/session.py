"""The ranks of a job find each other: those that live now, not those of the same job before it was started again.

``torchrun`` keeps its store when it starts ranks again, with all that their predecessors have said. So the coordinator
names each session anew, and every rank waits until the coordinator has repeated a word that it has just made up.
"""

from __future__ import annotations

import atexit
import secrets
import threading
import time
import weakref
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch.distributed.distributed_c10d import Store

from checkpointer.distributed.encoding import decode, encode
from checkpointer.distributed.liveness import Liveness, Process, this_process
from checkpointer.distributed.mismatch import Board
from checkpointer.distributed.store import StoreClient
from checkpointer.errors import CheckpointerError, ConfigError
from checkpointer.system.host import host_name
from checkpointer.system.threads import room_for_a_thread

SHORTEST_NAP, LONGEST_NAP = 0.0002, 0.05
"""Seconds between two looks for a key. To block instead would keep the training thread, and torch itself, from using
the same connection."""

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

    def remind(self, silent: list[int], hosts: Mapping[int, str]) -> None:
        """Say that they are waited for, where that is due. ``hosts``: where they run, as far as that is known."""


class Words(NamedTuple):
    """What a rank says of itself; never the same twice."""

    word: str
    """Made up."""
    process: Process | None
    host: str


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
        self._hosts: dict[int, str] = {}
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

    @property
    def on_one_host(self) -> bool:
        """Whether all ranks are known to run here, where no network comes between them and their store."""
        return self._liveness.ranks >= frozenset(range(self.size))

    def wait(self, store_client: StoreClient, keys: dict[int, str], limit: float, missing: Missing) -> None:
        """Sleep until each rank has said its key.

        Raises:
            Exception: the error that ``missing`` makes of those that have not.
        """
        nap, look = SHORTEST_NAP, time.monotonic() + BETWEEN_LOOKS
        while not store_client.there(*keys.values()):
            now = time.monotonic()
            late = now > limit
            if late or now > look:
                look = now + BETWEEN_LOOKS
                self._look(store_client, keys, missing, late=late)
            time.sleep(nap)
            nap = min(nap * 1.5, LONGEST_NAP)

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

    def _look(self, store_client: StoreClient, keys: dict[int, str], missing: Missing, *, late: bool) -> None:
        dead = self._liveness.gone(keys)
        silent = [
            rank for rank, key in keys.items() if not store_client.there(key)
        ]  # last words may have come just now
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
        told = [_words(), *others]
        store_client.say(f"{id}/all", encode(told))
        self._meet_neighbours(told)
        return id

    def _follow(self, limit: float, missing: Missing) -> str:
        """On any other rank: answer to each session that is called the newest, until one knows this answer."""
        store_client, words, nap, id = StoreClient(self._store, "sessions"), _words(), SHORTEST_NAP, ""
        look = time.monotonic() + BETWEEN_LOOKS
        while True:
            if store_client.there("newest") and (newest := decode(store_client.hear("newest"), str, "rank 0")) != id:
                id = newest
                store_client.say(f"{id}/{self.rank}", encode(words))
            if id and store_client.there(f"{id}/all"):
                told = decode(store_client.hear(f"{id}/all"), list[Words], "rank 0")
                if words in told:
                    self._meet_neighbours(told)
                    return id
            now = time.monotonic()
            if now > limit:
                raise missing.error([0], {})
            if now > look:
                look = now + BETWEEN_LOOKS
                self._wait_on([0], missing)
            time.sleep(nap)
            nap = min(nap * 1.5, LONGEST_NAP)

    def _meet_neighbours(self, told: list[Words]) -> None:
        self._liveness = Liveness({rank: words.process for rank, words in enumerate(told)})
        self._hosts = {rank: words.host for rank, words in enumerate(told)}


def _forget(heard: list[tuple[StoreClient, list[str]]]) -> None:
    for store_client, keys in heard:
        store_client.forget(keys)


_forgetting: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _wait_at_exit() -> None:
    """A daemon that is inside torch when the interpreter ends would bring the process down."""
    for thread in list(_forgetting):
        thread.join(LAST_MOMENTS)


def _words() -> Words:
    return Words(secrets.token_hex(8), this_process(), host_name())
