"""One process's part of a peer's run, and what it finds of the process that was killed before it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from torch.distributed.checkpoint.api import CheckpointException

from tests.campaign.crash.peers.adapters import Hooks, Peer, quiet
from tests.campaign.crash.trainee import Book, Plan, Trainee

RESTORED = "restored"
"""The documented way restores the last checkpoint that was acknowledged or a newer one, bit for bit."""
BY_HAND = "by-hand"
"""The documented way fails; once somebody has removed what does not load, it restores as above."""
ROLLED_BACK = "rolled-back"
"""Only one older than the last acknowledged restores."""
WRONG = "wrong"
"""What is restored is the state of no step, and nothing says so."""
LOST = "lost"
"""Nothing restores, although a save had been acknowledged."""
NOTHING = "nothing"
"""Nothing restores, and nothing had been acknowledged."""

VERDICTS = (RESTORED, BY_HAND, ROLLED_BACK, WRONG, LOST)

FAILURES = (Exception, CheckpointException)
"""What a peer raises. That of torch.distributed.checkpoint is no ``Exception``."""


class EnoughError(Exception):
    """This process was only to look."""


class Finding(Hooks):
    """Judges the first thing that restores, and writes down what goes on from there."""

    goes_on: ClassVar[bool] = True
    """Whether training begins anew where there is nothing to restore."""

    def __init__(self, book: Book, hashes: Sequence[str]) -> None:
        self._book = book
        self._hashes = hashes
        self._acknowledged = acknowledged(book)
        self.verdict = ""
        self.failed: list[str] = []
        """What did not load."""
        self.reasons: list[str] = []
        self.peer: Peer | None = None

    def attempt(self, peer: Peer) -> None:
        self.peer = peer

    def restored(self) -> None:
        assert self.peer is not None
        step = self.peer.trainee.trained - 1
        self.verdict = self._judge(step, self.peer.trainee.digest())
        for name in self.failed:
            self.peer.discard(name)
        self._book.write(self.verdict, step)

    def nothing(self) -> None:
        self.verdict = NOTHING if self._acknowledged is None else LOST
        self._book.write(self.verdict)

    def _judge(self, step: int, digest: str) -> str:
        if not 0 <= step < len(self._hashes) or digest != self._hashes[step]:
            return WRONG
        if self._acknowledged is not None and step < self._acknowledged:
            return ROLLED_BACK
        return BY_HAND if self.failed else RESTORED

    def saving(self, step: int) -> None:
        self._book.write("saving", step)

    def saved(self, step: int) -> None:
        self._book.write("saved", step)


class Look(Finding):
    """Nothing more than that."""

    goes_on = False

    def restored(self) -> None:
        super().restored()
        raise EnoughError


class Before(Finding):
    """Goes on, and does something before each save."""

    def __init__(self, book: Book, hashes: Sequence[str], act: Callable[[Peer, int], None]) -> None:
        super().__init__(book, hashes)
        self._act = act

    def saving(self, step: int) -> None:
        assert self.peer is not None
        self._act(self.peer, step)
        super().saving(step)


class Training(Finding):
    """Goes on, and says after some saves that it may be killed now."""

    def __init__(self, book: Book, hashes: Sequence[str], rng: random.Random, ready: Callable[[float], None]) -> None:
        super().__init__(book, hashes)
        self._ready = ready
        self._left = self._saves = rng.randrange(4)
        self._began = time.monotonic()
        self._saved = 0

    def restored(self) -> None:
        super().restored()
        self._began = time.monotonic()

    def saving(self, step: int) -> None:
        if self._left == 0:
            self._ready((time.monotonic() - self._began) / max(self._saves, 1))  # about one step and one save
        self._left -= 1
        super().saving(step)

    def saved(self, step: int) -> None:
        super().saved(step)
        self._saved += 1
        if self._saved == 2 and self.peer is not None:  # by then whatever tidies up has done so
            self._book.write("left", self.peer.leftovers())


def acknowledged(book: Book) -> int | None:
    """The step of the last save that had returned, or of what the run has gone on from since."""
    steps = [int(line[1]) for line in book.lines() if line[0] in ("saved", *VERDICTS) and len(line) > 1]
    return steps[-1] if steps else None


def resume(kind: type[Peer], plan: Plan, root: Path, finding: Finding) -> None:
    """Resume as documented; where that fails, with what can be had by hand; then train, or begin anew.

    A run of which something acknowledged is lost ends here.
    """
    quiet()
    for name in kind(root, Trainee(plan), plan.steps).checkpoints():
        peer = kind(root, Trainee(plan), plan.steps)
        finding.attempt(peer)
        try:
            peer.run(name, finding)
        except EnoughError:
            return
        except FAILURES as error:
            if finding.verdict:  # it was restored, and then something else went wrong
                raise
            finding.failed.append(name)
            finding.reasons.append(f"{name}: {type(error).__name__}: {error}")
        else:
            return
    finding.nothing()
    if finding.verdict == NOTHING and finding.goes_on:
        peer = kind(root, Trainee(plan), plan.steps)
        for name in finding.failed:
            peer.discard(name)
        finding.attempt(peer)
        peer.run(None, finding)
