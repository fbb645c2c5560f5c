"""A job of several ranks, one of which is killed at a given event of its saves; and what has to be true after.

Events are what a rank does that others can see: operations on the disk, and words to the other ranks.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from checkpointer import CheckpointManager
from checkpointer.distributed.rank_report import RankReport
from checkpointer.distributed.store import StoreClient
from checkpointer.distributed.store_ranks import StoreExchange
from checkpointer.repository.commit.by_rename import RenameCommit
from checkpointer.repository.repository import Repository
from checkpointer.storage import Buffer, LocalStorage, open_storage
from tests.support.ranks import launch, run

OPERATIONS = ("write", "sync", "rename", "exchange", "make_directory", "put", "remove", "remove_directory", "link")
CONFIG: dict[str, Any] = {"keep": {"last": 2}}
IMPATIENT: dict[str, Any] = {**CONFIG, "write": {"rank_timeout": "5s"}}
"""Those that survive wait for the dead so long, where the system does not tell."""
STEPS = 4


class Kill(NamedTuple):
    """When a rank dies."""

    rank: int
    event: str = ""
    """The first of this name, once a checkpoint is durable; empty: any."""
    count: int = 1
    """So many events of that name."""


# ------------------------------------------------------------------------------------ the state, and what it should be


def state() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The layer in the middle is frozen, so that its files are shared by hard link from the second save on."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 3))
    if dist.is_initialized():
        fully_shard(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    optimizer.step()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Every number of the parameters and moments."""
    moments = [moment for state in optimizer.state.values() for moment in state.values()]
    tensors = [*model.state_dict().values(), *moments]
    whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]
    return [float(value) for tensor in whole for value in tensor.flatten()]


def expected() -> dict[int, list[float]]:
    """The state after each step, as one process computes it."""
    model, optimizer = state()
    found = {}
    for step in range(1, STEPS + 1):
        stepped(model, optimizer)
        found[step] = values(model, optimizer)
    return found


# ------------------------------------------------------------------------------------ events


class Events:
    """Called at each event of this process, by name; kills it at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.names: list[str] = []
        self._kill = kill
        self._guard = threading.Lock()

    def come(self, name: str, die: Callable[[], object] = lambda: None) -> None:
        """One event; ``die`` is what is still half done then."""
        with self._guard:
            self.names.append(name)
            kill = self._kill
            if kill is None or (kill.event and kill.event != name):
                return
            matching = [found for found in self.names if not kill.event or found == kill.event]
            if len(matching) == kill.count:
                die()
                os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """From now on."""
        for name in OPERATIONS:
            setattr(LocalStorage, name, self._operation(name))
        for name, word in (("_say", "word"), ("_publish", "answer")):
            setattr(StoreExchange, name, self._message(name, word))
        for name, word in (("gather", "word"), ("broadcast", "answer")):
            setattr(StoreExchange, name, remembering(getattr(StoreExchange, name), word))
        say = StoreClient.say

        def saying(client: StoreClient, key: str, data: bytes) -> list[str]:
            if re.fullmatch(r"\d+/.*", key):  # in an exchange, which tells more of it
                return say(client, key, data)
            self.come("before the words of a session")
            keys = say(client, key, data)
            self.come("after the words of a session")
            return keys

        StoreClient.say = saying  # type: ignore[method-assign]

    def _message(self, name: str, word: str) -> Callable[..., Any]:
        real = getattr(StoreExchange, name)

        def call(exchange: StoreExchange, *arguments: Any) -> Any:
            if name == "_say" and exchange._unsaid is None:
                return real(exchange, *arguments)
            told = f"the {word}: {getattr(exchange, word, 'failure')}"
            self.come(f"before {told}")
            found = real(exchange, *arguments)
            self.come(f"after {told}")
            return found

        return call

    def _operation(self, name: str) -> Callable[..., Any]:
        real = getattr(LocalStorage, name)

        def call(storage: LocalStorage, *arguments: Any, **options: Any) -> Any:
            path = arguments[0] if arguments else ""
            told = f"{name} {_general(path)}"
            self.come(f"before {told}")
            if name == "write":
                self.come(f"half of {told}", lambda: Path(storage.place(path)).write_bytes(b"half"))
            return real(storage, *arguments, **options)

        return call


def _general(path: str) -> str:
    """A path without what differs from save to save."""
    return re.sub(r"\d+", "N", re.sub(r"[0-9a-f]{32}", "ID", path)) or "the root"


def remembering(real: Callable[..., Any], word: str) -> Callable[..., Any]:
    """The same, for an exchange that knows what kind of value it says."""

    def call(exchange: StoreExchange, value: Any, kind: type[Any]) -> Any:
        setattr(exchange, word, KINDS.get(kind.__name__, kind.__name__.strip("_").lower()))
        return real(exchange, value, kind)

    return call


KINDS = {"RankReport": "report", "_Outcome": "commit"}


# ------------------------------------------------------------------------------------ jobs


def job(root: str, kill: Kill | None, sabotage: str | None) -> list[str]:
    """Save steps; one rank dies at an event once the first is durable. What the events of this rank were."""
    if sabotage:
        SABOTAGES[sabotage]()
    model, optimizer = state()
    with CheckpointManager(root, config=CONFIG, model=model, optimizer=optimizer) as mgr:
        stepped(model, optimizer)
        mgr.save(1)
    events = Events(kill if kill and dist.get_rank() == kill.rank else None)
    with CheckpointManager(root, config=IMPATIENT, model=model, optimizer=optimizer) as mgr:
        mgr.restore_latest()
        events.watch()
        for step in range(2, STEPS + 1):
            stepped(model, optimizer)
            mgr.save(step).result()
    return events.names


def resume(root: str, sabotage: str | None, *, save: bool = True) -> list[Any]:
    """What is restored, and that saving goes on."""
    if sabotage:
        SABOTAGES[sabotage]()
    model, optimizer = state()
    with CheckpointManager(root, config=CONFIG, read_only=not save, model=model, optimizer=optimizer) as mgr:
        restored = mgr.restore_latest()
        found = values(model, optimizer)
        if save:
            mgr.save(100).result()
    return [restored.step, found, [item.step for item in restored.skipped]]


def look(root: str) -> list[Any]:
    """What is restored, by who may not write."""
    return resume(root, None, save=False)


def events_of(root: Path, world: int) -> list[list[str]]:
    """The names of all events of a job that nobody disturbs, by rank; each once, in order."""
    return [list(dict.fromkeys(names)) for names in run(world, job, str(root), None, None)]


def check_one(root: Path, world: int, kill: Kill, *, other: int = 1, sabotage: str | None = None) -> str:
    """One crash, and what comes after, with as many ranks and with another number; says how far it came.

    Raises:
        AssertionError: a checkpoint is damaged, gone or not exact, or something is left over.
    """
    outcomes = launch(world, job, str(root), kill, sabotage, timeout=60)
    died = outcomes[kill.rank].status == -signal.SIGKILL
    for rank, outcome in enumerate(outcomes):
        told = outcome.error.rstrip().rpartition("\n")[2]
        assert rank == kill.rank or not died or not outcome.error or "SaveError" in told, (
            f"rank {rank}: {outcome.error}"
        )
    repository = Repository(open_storage(root))
    report = repository.verify_all()
    assert report.ok, str(report)
    committed = [info.step for info in repository.list_checkpoints().checkpoints]
    assert committed, "the checkpoint before is gone"
    assert died or committed[-1] == STEPS
    rows = [look(str(root))] if other == 1 else run(other, look, str(root))
    rows += run(world, resume, str(root), sabotage)
    for step, found, skipped in rows:
        assert step == committed[-1]
        assert skipped == []
        assert found == expected()[step], "other bits than were saved"
    left = [str(path) for place in ("tmp", "trash") for path in (root / ".checkpointer" / place).glob("*")]
    assert not left, f"left over: {left}"
    assert repository.verify_all().ok
    return f"killed after {committed[-1]}" if died else "not killed"


# ------------------------------------------------------------------------------------ sabotage


def report_early() -> None:
    """Ranks report files that they have not written yet."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        return
    write = LocalStorage.write

    def write_later(self: LocalStorage, path: str, pieces: Any, size: int, *, steady: bool = False) -> float:
        whole: list[Buffer] = [bytes(piece) for piece in pieces]
        threading.Timer(0.05, write, (self, path, whole, size), {"steady": steady}).start()
        return 0.0

    LocalStorage.write = write_later  # type: ignore[method-assign]


def commit_without_reports() -> None:
    """The coordinator does not wait for the others: it takes what they have reported of the save before."""
    collect = StoreExchange._collect
    last: list[Any] = []

    def hasty(self: StoreExchange, kind: type[Any]) -> list[Any]:
        if kind is RankReport and last:
            threading.Timer(0.05, collect, (self, kind)).start()
            return last
        found = collect(self, kind)
        if kind is RankReport:
            last[:] = found
        return found

    StoreExchange._collect = hasty  # type: ignore[method-assign,assignment]


def leave_leftovers() -> None:
    """The next writer clears nothing away."""
    RenameCommit.recover = lambda self: None  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    "report-early": report_early,
    "commit-without-reports": commit_without_reports,
    "leave-leftovers": leave_leftovers,
}
"""Ways to break the library, each of which a campaign has to notice."""
