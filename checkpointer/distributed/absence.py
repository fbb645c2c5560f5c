"""What is said of ranks that have not come to an exchange."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from checkpointer.errors import SaveError

logger = logging.getLogger("checkpointer")

FIRST_REMINDER = 60.0
"""Seconds after which the log says whom an exchange waits for."""


class Absence:
    """What is said of ranks that have not come to an exchange: in the log while it waits, then as an error."""

    def __init__(self, what: str, rank: int, size: int, timeout: float, *, training: bool) -> None:
        """``what`` is waited for by ``rank`` of ``size``, for ``timeout`` seconds, if ``training`` in a user's call."""
        self._what = what
        self._rank, self._size = rank, size
        self._timeout = timeout
        self._training = training
        self._began = time.monotonic()
        self._next = FIRST_REMINDER

    @property
    def reminder_due(self) -> bool:
        """Whether it is time to say who is waited for."""
        return time.monotonic() - self._began >= self._next

    def remind(self, silent: list[int], hosts: Mapping[int, str]) -> None:
        """Log who is waited for: after a minute, then each time that this has taken three times as long."""
        waited = time.monotonic() - self._began
        if waited < self._next:
            return
        self._next = 3 * waited
        level = logging.WARNING if self._training else logging.INFO
        told = self._who(silent, hosts)
        logger.log(level, "%s: rank %d has waited %.0f s for %s", self._what, self._rank, waited, told)

    def error(self, silent: list[int], dead: dict[int, int]) -> SaveError:
        """For those that have said nothing in time, or never will."""
        if dead:
            ended = ((rank, f"its process {pid} has ended") for rank, pid in dead.items())
            told = ", ".join(f"rank {rank} of {self._size} is dead: {how}" for rank, how in ended)
        else:
            told = (
                f"rank {_numbers(silent)} of {self._size} said nothing for {self._timeout:g} s "
                "(write: {rank_timeout}): it is dead or stuck, or has not made this call, which every rank has to make"
            )
        outcome = "Nothing was committed" if self._rank == 0 else "If rank 0 has committed, restore_latest will tell"
        return SaveError(f"{self._what}: {told}. {outcome}")

    def _who(self, silent: list[int], hosts: Mapping[int, str]) -> str:
        places = sorted({hosts[rank] for rank in silent if rank in hosts})
        where = f" (on {', '.join(places[:8])})" if places else ""
        limit = f"It goes on waiting until {self._timeout:g} s are over (write: {{rank_timeout}})"
        if not self._training:
            return f"rank {_numbers(silent)} of {self._size}{where} to write its part. {limit}"
        if self._rank:  # it hears of the others from rank 0 alone
            told = "which has not come to this call, or waits for other ranks itself: then its log names them"
        else:
            told = "which has not come to this call"
        return (
            f"rank {_numbers(silent)} of {self._size}{where}, {told}. Every rank has to call save, and restore_latest, "
            f"at the same steps: not rank 0 alone. {limit}"
        )


def _numbers(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return ", ".join(map(str, ranks[:8])) + more
