"""What a power cut may leave of a peer's run: its operations are recorded, and states made of them.

The persistence model is that of ``tests.campaign.crash.power``. What is written by code that is not Python's is
written by Python instead, with the same bytes and as many fsyncs; a record that still lacks anything is refused.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.campaign.crash.peers.adapters import Hooks, Peer
from tests.campaign.crash.peers.campaign import ROOT, Run
from tests.campaign.crash.peers.life import EnoughError
from tests.campaign.crash.power.persistence import Effort, cuts, fingerprint
from tests.campaign.crash.power.record import MARK, Record, Tree
from tests.campaign.crash.power.recorder import Recorder, scan
from tests.campaign.crash.power.state_checks import materialise
from tests.campaign.crash.trainee import Book, Plan, Trainee

PLAN = Plan(0, "sync", 2, wide=False, steps=5)
SAVES = 4
EFFORT = Effort(exhaustive=64, sample=16, pairs=False)


class Unheard(Exception):  # noqa: N818  # a state, not a fault
    """The recorder does not hear all that this peer does."""


class _Marks(Hooks):
    """Written into the record."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def restored(self) -> None:
        raise AssertionError("there was nothing to restore")

    def saving(self, step: int) -> None:
        if step == SAVES:
            raise EnoughError

    def saved(self, step: int) -> None:
        self._recorder.mark("saved", step)


def cut(kind: type[Peer], folder: Path, most: int, seed: int) -> Counter[str]:
    """Look at so many different states, drawn from all, and count verdicts. Raises :class:`Unheard`."""
    area = folder / "recorded"
    run = Run(kind, PLAN, area, folder / "unused")
    record_in = folder / "record"
    run.root.mkdir()  # where runs are made is there, durably, before the first one begins
    run.do(lambda: _record(kind, area, record_in))
    if not record_in.exists():
        raise Unheard
    record = pickle.loads(record_in.read_bytes())
    if fingerprint(scan(str(area))) != fingerprint(record.tree()):
        raise Unheard
    rng = random.Random(f"{seed} {kind.name}")
    found = list(_states(record, rng))
    counts: Counter[str] = Counter()
    for number, (tree, acknowledged) in enumerate(rng.sample(found, min(most, len(found)))):
        counts[_verdict(kind, tree, acknowledged, folder / f"state-{number}")] += 1
    return counts


def _record(kind: type[Peer], area: Path, to: Path) -> None:
    """Nothing is written ``to`` where the recorder meets a file of which it knows nothing."""
    recorder = Recorder(str(area), ROOT)
    with contextlib.suppress(KeyError):
        with recorder.listening(), _python_writes():
            peer = kind(area / ROOT, Trainee(PLAN), PLAN.steps)
            with contextlib.suppress(EnoughError):
                peer.run(None, _Marks(recorder))
            peer.finish()
        to.write_bytes(pickle.dumps(recorder.record))


@contextlib.contextmanager
def _python_writes() -> Iterator[None]:
    """``torch.save`` to a path writes in C++, and the builtin ``open`` in C: neither is heard."""
    save = torch.save

    def heard(state: object, file: Any, *arguments: Any, **keywords: Any) -> None:
        if not isinstance(file, (str, os.PathLike)):
            save(state, file, *arguments, **keywords)
            return
        with io.open(file, "wb") as opened:  # noqa: UP020  # the one that is listened to
            save(state, opened, *arguments, **keywords)

    with mock.patch.object(torch, "save", heard), mock.patch.object(builtins, "open", io.open):
        yield


def _states(record: Record, rng: random.Random) -> Iterator[tuple[Tree, int | None]]:
    """Different ones, each with the last step that had been acknowledged by then."""
    seen = set()
    for moment in cuts(record):
        marks = [operation.mark for operation in record.operations[: moment.end] if operation.kind == MARK]
        acknowledged = int(str(marks[-1][1])) if marks else None
        for tree in moment.states(EFFORT, rng):
            key = fingerprint(tree), acknowledged
            if key not in seen:
                seen.add(key)
                yield tree, acknowledged


def _verdict(kind: type[Peer], tree: Tree, acknowledged: int | None, folder: Path) -> str:
    folder.mkdir()
    materialise(tree, str(folder))
    book = folder.with_suffix(".book")
    if acknowledged is not None:
        Book(book).write("saved", acknowledged)
    verdict = Run(kind, PLAN, folder, book).look()
    shutil.rmtree(folder)
    return verdict
