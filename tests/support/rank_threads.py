"""Ranks as threads of this process, for what they say through a store of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from checkpointer.distributed.exchange import Alone, Ranks
from checkpointer.distributed.session import Session
from checkpointer.distributed.store_ranks import StoreRanks


def on_ranks(size: int, program: Callable[[Ranks], Any], timeout: float = 20, store: Any = None) -> list[Any]:
    """What each rank's program returns, or the error that it raises. Threads are called ``rank 3``."""
    store = store or dist.HashStore()

    def run(rank: int) -> Any:
        threading.current_thread().name = f"rank {rank}"
        session = Session(dist.PrefixStore("job", store), rank, size)
        try:
            return program(Alone() if size == 1 else StoreRanks(session, timeout=timeout))
        except (Exception, KeyboardInterrupt) as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
