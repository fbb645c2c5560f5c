"""Small messages in the key-value store of a job."""

from __future__ import annotations

import contextlib
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import NamedTuple, ParamSpec, TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from checkpointer.errors import SaveError
from checkpointer.system.threads import room_for_a_thread

P = ParamSpec("P")
R = TypeVar("R")

PIECE = 4 << 20
"""Bytes of one value: the store takes 8 MiB at most."""

WORTH_PACKING = 512
"""Bytes from which a message is compressed."""

GRACE = 0.5
"""Seconds that a call may take beyond its limit, in which it says itself what was missing."""


class Received(NamedTuple):
    """One message."""

    data: bytes
    keys: tuple[str, ...]
    """That it takes."""


class StoreClient:
    """What ranks have said, by key."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._keys = PrefixStore(prefix, store)

    def there(self, *keys: str) -> bool:
        """Whether all of them have been said."""
        return not keys or bool(self._asked(self._keys.check, list(keys)))

    def say(self, key: str, data: bytes) -> list[str]:
        """Publish a message; returns the keys that it takes."""
        packed = zlib.compress(data, 1) if len(data) >= WORTH_PACKING else data
        pieces = [packed[start : start + PIECE] for start in range(0, len(packed), PIECE)] or [b""]
        for number, piece in enumerate(pieces[1:], start=1):
            self._put(f"{key}+{number}", piece)
        head = len(pieces).to_bytes(2, "big") + bytes([packed is not data])
        self._put(key, head + pieces[0])  # the last: whoever sees it finds the others
        return [key, *(f"{key}+{number}" for number in range(1, len(pieces)))]

    def hear(self, key: str) -> bytes:
        """What was said."""
        return self.hear_all([key])[0].data

    def hear_all(self, keys: Sequence[str]) -> list[Received]:
        """Everything that was said; one question for all, where the store takes such."""
        if self._keys.has_extended_api():  # type: ignore[attr-defined]  # every store has it, the stubs do not
            first = self._asked(self._keys.multi_get, list(keys))
        else:
            first = [self._asked(self._keys.get, key) for key in keys]
        return [self._whole(key, data) for key, data in zip(keys, first, strict=True)]

    def forget(self, keys: Iterable[str]) -> None:
        """Remove what nobody has to hear any more."""
        with contextlib.suppress(SaveError):  # it goes with the job
            for key in keys:
                self._asked(self._keys.delete_key, key)

    def _whole(self, key: str, first: bytes) -> Received:
        names = [f"{key}+{number}" for number in range(1, int.from_bytes(first[:2], "big"))]
        data = first[3:] + b"".join(self._asked(self._keys.get, name) for name in names)
        if first[2:3] == b"\x01":
            with contextlib.suppress(zlib.error):  # whoever decodes it knows whose message it is, and says so
                data = zlib.decompress(data)
        return Received(data, (key, *names))

    def _put(self, key: str, data: bytes) -> None:
        self._asked(self._keys.set, key, data)  # type: ignore[arg-type]  # declared for str, takes bytes

    def _asked(self, function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except (RuntimeError, ConnectionError) as error:
            raise SaveError(f"the store of this job cannot be reached any more: {error}") from error


def in_time(limit: float, function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Call ``function``, and do not wait for it much beyond ``limit``, by ``time.monotonic()``.

    A call of the store has no limit of its own: it waits for an answer that a host that is cut off will never get.

    Raises:
        SaveError: it has not returned. It goes on in a thread of its own, and nobody waits for that.
    """
    if not room_for_a_thread():
        return function(*arguments, **options)
    future: Future[R] = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001  handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=work, name="checkpointer-store", daemon=True).start()
    try:
        return future.result(max(limit - time.monotonic(), 0.0) + GRACE)
    except FutureTimeoutError:  # before Python 3.11 not the builtin one
        if future.done():  # what the call itself has raised, or it has returned just now
            return future.result()
        raise SaveError(
            "the store of this job does not answer: this host is cut off from the one where it is, or that is gone. "
            "What was committed before is whole; restore_latest finds the newest"
        ) from None
