"""What a process does that is killed, or whose storage fails, and what the next one must find then."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeAlias

import torch

from checkpointer import CheckpointInfo, CheckpointManager
from checkpointer.errors import CheckpointNotFoundError
from tests.support.successor import succeed

Live: TypeAlias = dict[str, Any]
Make: TypeAlias = Callable[..., CheckpointManager]
"""Makes a manager of one run root, which saves what is given: ``make(live, read_only=False, **config)``."""


def state(value: int) -> Live:
    """What is saved: a number, and a tensor full of it."""
    return {"value": value, "tensor": torch.full((3,), float(value))}


def maker(root: str, options: dict[str, Any] | None = None, *, durable: bool = True) -> Make:
    """Makes managers of ``root`` that write before ``save`` returns."""
    base = {"write": {"mode": "sync", "durable": durable}, "require_resume": False}

    def make(live: Live, *, read_only: bool = False, **config: Any) -> CheckpointManager:
        changed = {**base, **config}
        return CheckpointManager(root, storage_options=options, config=changed, read_only=read_only, state=live)

    return make


# ------------------------------------------------------------------------------------------------- beforehand


def empty(make: Make) -> None:
    """No checkpoint at all."""


def two(make: Make) -> None:
    """Steps 1 and 2, with the values 1 and 2."""
    live = state(0)
    with make(live) as first:
        for step in (1, 2):
            live.update(state(step))
            first.save(step, files={"notes/a.txt": b"attached"})


def two_and_pinned(make: Make) -> None:
    two(make)
    with make(state(0), read_only=True) as evaluator:
        evaluator.pin(2)


# ------------------------------------------------------------------------------------------- what is interrupted


def first_save(make: Make) -> None:
    live = state(1)
    with make(live) as first:
        first.save(1, files={"notes/a.txt": b"attached"})


def save_and_prune(make: Make) -> None:
    live = state(0)
    with make(live, keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        live.update(state(3))
        second.save(3)


def overwrite(make: Make) -> None:
    live = state(0)
    with make(live) as second:
        second.restore_latest(components=["state"])
        live.update(state(22))
        second.save(2, overwrite=True)


def branch(make: Make) -> None:
    live = state(0)
    with make(live) as second:
        second.restore(1, components=["state"])
        live.update(state(22))
        second.save(2)


def prune(make: Make) -> None:
    with make(state(0), keep={"last": 1}) as second:
        second.prune()


def share(make: Make) -> None:
    """Step 3 is step 2 again, on the same bytes; then 2 goes."""
    with make(state(0), keep={"last": 1}) as second:
        second.restore_latest(components=["state"])
        succeed(second._repository, second._repository.find(2), 3)
        second.prune()


def annotate(make: Make) -> None:
    with make(state(0), read_only=True) as evaluator:
        evaluator.pin(1)
        evaluator.annotate(2, metrics={"score": 1.0}, note="good")
        evaluator.unpin(1)


class Scenario(NamedTuple):
    """What lies there before, what is interrupted, and the values that the newest checkpoint may have afterwards."""

    prepare: Callable[[Make], None]
    act: Callable[[Make], None]
    allowed: Collection[int | None]
    """``None``: there may be no checkpoint."""


SCENARIOS = {
    "first save": Scenario(empty, first_save, {None, 1}),
    "save that prunes": Scenario(two, save_and_prune, {2, 3}),
    "overwriting save": Scenario(two, overwrite, {2, 22}),
    "save over an abandoned branch": Scenario(two, branch, {2, 22}),
    "save beside a pinned checkpoint": Scenario(two_and_pinned, branch, {2, 22}),
    "pruning": Scenario(two, prune, {2}),
    "save that shares its files": Scenario(two, share, {2}),
    "pins and annotations": Scenario(two, annotate, {2}),
}


# -------------------------------------------------------------------------------------------------- afterwards


def check_newest(make: Make, allowed: Collection[int | None], what: str) -> list[CheckpointInfo]:
    """The newest checkpoint is a whole old or new one, and a new writer saves. Returns what there is then."""
    live = state(0)
    try:
        with make(live, read_only=True) as reader:
            restored = reader.restore_latest(components=["state"])
            assert (None if restored is None else live["value"]) in allowed, (what, restored, live)
            if restored is not None:
                assert restored.skipped == (), what
                assert torch.equal(live["tensor"], torch.full((3,), float(live["value"]))), (what, live)
            report = reader.verify()
            assert report.ok, f"{what}\n{report}"
    except CheckpointNotFoundError:  # a run that has not even begun has no root
        assert None in allowed, what
    with make(live) as writer:
        writer.restore_latest(components=["state"])
        live.update(state(9))
        writer.save(9)
        assert writer.verify().ok, what
        left = writer.checkpoints()
    assert left[-1].step == 9, what
    return left
