"""Opening a run on every rank: the coordinator takes the lock, and all find out whether they share one directory."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence

from checkpointer.distributed.exchange import AS_JSON, Meeting, Ranks
from checkpointer.errors import ConfigError
from checkpointer.format import paths
from checkpointer.format.index import Json
from checkpointer.storage import Storage


def open_run(ranks: Ranks, storage: Storage, take: Callable[[], None]) -> None:
    """Call ``take`` on the coordinator, and let every rank look for a file that it has written.

    Found out now, and not by a restore that finds a part of the checkpoints only.

    Raises:
        RunLockedError: on all ranks, if another job writes to the run.
        ConfigError: on all ranks, if one does not see the coordinator's files.
    """
    probe = f"{paths.TMP}/probe-{secrets.token_hex(8)}"

    def begin(roots: Sequence[Json]) -> Json:
        take()
        if ranks.size > 1:
            storage.put(probe, str(roots[0]).encode())
        return [probe, socket.gethostname()]

    def look() -> Json:
        if ranks.size > 1 and not storage.exists(path):
            raise ConfigError(
                f"this rank, on {socket.gethostname()}, does not see what rank 0, on {host}, has written to "
                f"{storage.url}: the run root has to be one directory for all ranks. Choose a path on a shared file "
                "system (NFS, Lustre, …), the same on every host, or the URL of an object store"
            )
        return None

    def end(seen: Sequence[Json]) -> Json:
        del seen
        if ranks.size > 1:
            storage.remove(probe)
        return None

    where = f"opening {storage.url}"
    told = ranks.meet(Meeting(where, AS_JSON, AS_JSON), lambda: storage.url, begin)
    assert isinstance(told, list)
    path, host = map(str, told)
    try:
        ranks.meet(Meeting(where, AS_JSON, AS_JSON), look, end)
    except BaseException:
        if ranks.rank == 0:
            with contextlib.suppress(OSError):
                storage.remove(probe)
        raise
