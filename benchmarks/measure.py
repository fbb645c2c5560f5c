"""The rounds: in each, the ceilings and every contender have their turn, in an order that is shuffled anew.

A figure is a list with one sample a round. All are of the same state, which a training step changes between any two
saves. Before anything is timed the file system is idle, and garbage is collected.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import shutil
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks import memory, pagecache
from benchmarks.buffers import Buffer, Reference
from benchmarks.ceilings import Ceilings, finish_device_work
from benchmarks.contenders import Contender, Pending, Unavailable
from benchmarks.workloads import Training, Workload

COLD = 0.01
"""At most this share of a checkpoint may still be cached when a cold restore begins."""

FIGURES = {
    "blocked": "`save` blocks",
    "first": "the first `save` blocks",
    "first_excess": "the same, with what the step after it takes longer",
    "durable": "durable after",
    "blocked_workers": "`save` blocks, loader workers alive",
    "durable_workers": "durable after, loader workers alive",
    "excess": "excess step time until durable",
    "step": "a step without a save",
    "held": "training thread held, longest",
    "held_idle": "the same without a save",
    "warm": "restore, warm",
    "warm_step": "restore and first step, warm",
    "cold": "restore, cold",
    "cold_step": "restore and first step, cold",
    "save_memory": "extra memory of saves",
    "restore_memory": "extra memory of a restore",
    "written": "bytes that a save allocates on disk",
    "io_written": "bytes that the process hands to the disk in a save",
}
"""Seconds or bytes."""


@dataclass(frozen=True)
class Plan:
    """How to measure."""

    folder: Path
    """On the file system to measure; its contents are ours."""
    scale: float = 1.0
    rounds: int = 5
    seed: int = 0
    loader_workers: int = 0
    device: str = "cpu"
    """Where the model and its optimizer live."""
    contenders: tuple[type[Contender], ...] = ()
    steps: int = 4
    """Steps before each save, for the time of a step without one."""
    listen: float = 0.5
    """Seconds of the idle loop that "held" is compared with."""
    tell: Callable[[str], object] = print


@dataclass
class Outcome:
    """What one contender did."""

    name: str
    title: str
    fsyncs: bool = True
    status: str = ""
    """Empty if all is well; else why it was not measured, or what makes its timing void."""
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    successive: dict[str, float] = field(default_factory=dict)
    """Of many checkpoints one after another: see ``measure_successive``."""

    @property
    def valid(self) -> bool:
        """Whether its timings count."""
        return not self.status

    def add(self, figure: str, value: float) -> None:
        """One more sample."""
        self.samples.setdefault(figure, []).append(value)

    def median(self, figure: str) -> float | None:
        """``None`` if it was not measured, or is void."""
        samples = self.samples.get(figure)
        return statistics.median(samples) if samples and self.valid else None


@dataclass
class Result:
    """What one workload gave."""

    name: str
    title: str
    size: int
    """Bytes of the state's tensors."""
    tensors: int
    optimizer_size: int
    ceilings: dict[str, dict[str, list[float]]]
    """Seconds, by ceiling and by the way that it was done."""
    outcomes: list[Outcome]
    left_cached: float

    def ceiling(self, name: str) -> tuple[str, float] | None:
        """The best way and its median."""
        ways = {way: statistics.median(samples) for way, samples in self.ceilings.get(name, {}).items()}
        return min(ways.items(), key=lambda item: item[1]) if ways else None


def measure(workload: Workload, plan: Plan, after_round: Callable[[Result], object] = lambda _: None) -> Result:
    """All rounds of one workload. ``after_round`` gets what is measured by then: a long run may be ended early."""
    torch.manual_seed(plan.seed)
    with _folder(plan.folder / workload.name) as folder:
        bench = _Bench(workload, plan, folder)
        try:
            bench.warm_up()
            for number in range(plan.rounds):
                bench.round(number)
                after_round(bench.result())
            if workload.successive:
                bench.successive()
        finally:
            bench.close()
        return bench.result()


class _Bench:
    """One workload's live objects, and the contenders that are ready."""

    def __init__(self, workload: Workload, plan: Plan, folder: Path) -> None:
        self._workload, self._plan, self._folder = workload, plan, folder
        self._order = random.Random(plan.seed)
        with torch.device(plan.device):
            self._training = workload.build(plan.scale)
        self._training.step()  # now there is optimizer state
        self._reference = Reference(self._training)
        scratch = Buffer(self._reference.buffer.size)
        self._ceilings = Ceilings(self._reference.buffer, scratch, folder, torch.device(plan.device))
        self._ceiling_samples: dict[str, dict[str, list[float]]] = {}
        self._ready: dict[str, type[Contender]] = {}
        self._outcomes = {kind.name: Outcome(kind.name, kind.title, kind.fsyncs) for kind in plan.contenders}

    def warm_up(self) -> None:
        """Not timed, so that memory can be watched: from before a contender is made until after its second save."""
        self._ceilings.measure()
        for _ in range(3):
            self._training.step()
        for kind in self._importable():
            outcome = self._outcomes[kind.name]
            self._ready[kind.name] = kind
            with self._failures_of(outcome):
                self._watch_memory(kind, outcome)
            self._tell(outcome, "warmed up")

    def _importable(self) -> list[type[Contender]]:
        """Contenders whose packages are there, shuffled. All are imported before the first is measured."""
        found = []
        for kind in self._plan.contenders:
            outcome = self._outcomes[kind.name]
            with self._failures_of(outcome):
                kind.prepare()
                found.append(kind)
            if not outcome.valid:
                self._tell(outcome, "")
        gc.collect()
        gc.freeze()  # a collection looks at what is measured, not at what was imported
        self._order.shuffle(found)
        return found

    def round(self, number: int) -> None:
        """One turn for the ceilings and for each contender."""
        turns = [None, *self._ready]
        self._order.shuffle(turns)
        for name in turns:
            _settle()
            if name is None:
                self._measure_ceilings()
                continue
            outcome = self._outcomes[name]
            with self._failures_of(outcome), self._opened(self._ready[name]) as contender:
                self._time_first_save(contender, outcome)  # what it reuses from save to save is there now
                self._turn(contender, outcome)
            self._tell(outcome, f"round {number + 1} of {self._plan.rounds}")

    def successive(self) -> None:
        """Many checkpoints, all kept: what each writes, and what they take together."""
        for kind in self._plan.contenders:
            outcome = self._outcomes[kind.name]
            if kind.name in self._ready and kind.times_saves and outcome.valid:
                with self._failures_of(outcome):
                    outcome.successive = self._measure_successive(kind)
                self._tell(outcome, "successive checkpoints")

    def close(self) -> None:
        """Free the threads of the ceilings."""
        self._ceilings.close()

    def result(self) -> Result:
        """Everything that was measured."""
        parameters = sum(tensor.nbytes for tensor in self._training.model.state_dict().values())
        return Result(
            self._workload.name,
            self._workload.title,
            self._reference.size,
            self._reference.count,
            self._reference.size - parameters,
            self._ceiling_samples,
            list(self._outcomes.values()),
            self._ceilings.left_cached,
        )

    # ------------------------------------------------------------------------------------------------- one turn

    def _turn(self, contender: Contender, outcome: Outcome) -> None:
        if contender.times_saves:
            self._time_idle_save(contender, outcome, "", 0)
            if self._plan.loader_workers:
                self._time_idle_save(contender, outcome, "_workers", self._plan.loader_workers)
            self._time_hold(contender, outcome)
            self._time_training(contender, outcome)
        else:
            self._reference.take(self._training)
            contender.save().wait()
        contender.discard_old()
        self._time_restores(contender, outcome)

    def _time_first_save(self, contender: Contender, outcome: Outcome) -> None:
        """Soon after the start, into memory that is new: a contender that postpones its copy pays in the next step."""
        if not contender.times_saves:
            contender.save().wait()
            contender.discard_old()
            return
        base = statistics.median([_seconds(lambda: self._training.step(contender.guard())) for _ in range(3)])
        began = time.perf_counter()
        pending = contender.save()
        blocked = time.perf_counter() - began
        after = _seconds(lambda: self._training.step(contender.guard()))
        pending.wait()
        contender.discard_old()
        outcome.add("first", blocked)
        outcome.add("first_excess", blocked + max(0.0, after - base))

    def _time_idle_save(self, contender: Contender, outcome: Outcome, suffix: str, workers: int) -> None:
        """Nothing else runs: how long ``save`` blocks, and when all is durable."""
        self._training.update()
        inodes = _inodes(contender.folder)
        with loader_workers(workers):
            _settle()
            io = _io_written()
            began = time.perf_counter()
            pending = contender.save()
            blocked = time.perf_counter() - began
            pending.wait()
            if not contender.fsyncs:
                _sync_checkpoint(contender.newest)
            durable = time.perf_counter() - began
        outcome.add(f"blocked{suffix}", blocked)
        outcome.add(f"durable{suffix}", durable)
        if not suffix:
            outcome.add("io_written", _io_written() - io)
            outcome.add("written", _allocated(contender.folder, inodes))
        contender.discard_old()

    def _time_hold(self, contender: Contender, outcome: Outcome) -> None:
        """How long the training thread, busy with Python alone, stands still while a save is written."""
        self._training.update()
        with loader_workers(self._plan.loader_workers):
            _settle()
            began = time.perf_counter()
            idle = _longest_gap(lambda: time.perf_counter() - began > self._plan.listen)
            pending = contender.save()
            if not pending.done():
                outcome.add("held", _longest_gap(pending.done))
                outcome.add("held_idle", idle)
            pending.wait()
        contender.discard_old()

    def _time_training(self, contender: Contender, outcome: Outcome) -> None:
        """What training loses: the block, and what the steps until the end of the save take longer than before it.

        The reference is taken at the call, and the steps after it change everything: this is the torn-state test too.
        """
        training = self._training
        with loader_workers(self._plan.loader_workers):
            training.step(contender.guard())  # after a fork, the first write to each page copies it
            _settle()
            base = statistics.median(
                [_seconds(lambda: training.step(contender.guard())) for _ in range(self._plan.steps)]
            )
            self._reference.take(training)
            began = time.perf_counter()
            pending = contender.save()
            excess = time.perf_counter() - began
            if pending.done():
                training.step(contender.guard())
            else:
                excess += self._train_until_done(contender, pending, base)
            pending.wait()
        outcome.add("excess", excess)
        outcome.add("step", base)

    def _train_until_done(self, contender: Contender, pending: Pending, base: float) -> float:
        excess = 0.0
        while True:
            excess += _seconds(lambda: self._training.step(contender.guard())) - base
            if pending.done():
                return excess

    # -------------------------------------------------------------------------------------------------- restoring

    def _time_restores(self, contender: Contender, outcome: Outcome) -> None:
        files = pagecache.files_under(contender.folder)
        pagecache.load(files)
        self._time_restore(contender, outcome, "warm", compare=True)
        pagecache.load(files)
        self._time_restore(contender, outcome, "warm")
        left = pagecache.evict(files)
        if left > COLD and not outcome.notes:
            outcome.notes.append(f"{left:.0%} of its files stayed in the page cache: cold figures are not cold")
        self._time_restore(contender, outcome, "cold")

    def _time_restore(self, contender: Contender, outcome: Outcome, figure: str, *, compare: bool = False) -> None:
        """Into a fresh run. Where the result is compared there is no step: comparing would read it before the step."""
        target = self._training.fresh()
        restore = contender.restorer(target)
        gc.collect()
        began = time.perf_counter()
        restore()
        finish_device_work()
        live = time.perf_counter()
        if compare:
            self._judge(outcome, target)
            return
        target.step()
        finish_device_work()
        outcome.add(f"{figure}_step", time.perf_counter() - began)
        outcome.add(figure, live - began)

    def _judge(self, outcome: Outcome, target: Training) -> None:
        """The gate: one wrong bit in one round makes all of a contender's figures void."""
        difference = self._reference.difference(target)
        if difference and outcome.valid:
            outcome.status = f"void: {difference}"

    def _watch_memory(self, kind: type[Contender], outcome: Outcome) -> None:
        """Of making the contender and its first two saves, not of the step between them; then of a restore."""
        peak = memory.Peak()
        with contextlib.ExitStack() as stack:
            with peak.watch():
                contender = stack.enter_context(self._opened(kind))
                contender.save().wait()
            self._training.step(contender.guard())
            with peak.watch():
                contender.save().wait()
            outcome.add("save_memory", peak.extra)
            self._watch_restore(contender, outcome)

    def _watch_restore(self, contender: Contender, outcome: Outcome) -> None:
        """Beyond the optimizer's state, which a restore has to make."""
        target = self._training.fresh()
        restore = contender.restorer(target)
        peak = memory.Peak()
        with peak.watch():
            restore()
        new = sum(leaf.nbytes for state in target.optimizer.state.values() for leaf in _tensors(state))
        outcome.add("restore_memory", max(0, peak.extra - new))

    # ------------------------------------------------------------------------------------------- successive saves

    def _measure_successive(self, kind: type[Contender]) -> dict[str, float]:
        """Of this library all; of the others, which write everything each time, three."""
        count = self._workload.successive if kind.name.startswith("checkpointer") else 3
        written: list[int] = []
        changed: list[int] = []
        with self._opened(kind, keep_all=True) as contender:
            for _ in range(count):
                self._training.step(contender.guard())
                changed.append(self._reference.changed(self._training))
                self._reference.take(self._training)
                inodes = _inodes(contender.folder)
                contender.save().wait()
                written.append(_allocated(contender.folder, inodes))
            disk = _allocated(contender.folder, set())
        later, size = statistics.median(written[1:]), statistics.median(changed[1:])
        return {
            "count": count, "first": written[0], "later": later, "changed": size, "disk": disk,
            "base": self._reference.size - size,
        }  # fmt: skip

    # ---------------------------------------------------------------------------------------------------- helpers

    @contextlib.contextmanager
    def _opened(self, kind: type[Contender], *, keep_all: bool = False) -> Iterator[Contender]:
        """A contender in an empty folder. One at a time: each holds memory as large as the state."""
        with _folder(self._folder / kind.name) as folder:
            contender = kind(folder, self._training, keep_all=keep_all)
            try:
                yield contender
            finally:
                contender.close()

    def _measure_ceilings(self) -> None:
        for name, ways in self._ceilings.measure().items():
            for way, samples in ways.items():
                self._ceiling_samples.setdefault(name, {}).setdefault(way, []).extend(samples)

    @contextlib.contextmanager
    def _failures_of(self, outcome: Outcome) -> Iterator[None]:
        """A contender that fails is reported, and the others go on without it."""
        try:
            yield
        except Unavailable as reason:
            outcome.status = str(reason)
        except Exception as error:  # noqa: BLE001  # whatever a peer raises
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            outcome.status = f"failed: {line.replace(str(self._folder), '…')[:200]}"
            self._plan.tell("".join(traceback.format_exception(error)))
        if not outcome.valid and not outcome.status.startswith("void"):
            self._ready.pop(outcome.name, None)

    def _tell(self, outcome: Outcome, what: str) -> None:
        self._plan.tell(f"{self._workload.name}: {outcome.title}: {outcome.status or what}")


# ------------------------------------------------------------------------------------------------------------ tools


@contextlib.contextmanager
def loader_workers(count: int) -> Iterator[None]:
    """Forked workers of a DataLoader, alive meanwhile, and forked just now: they share every page of this process."""
    if not count:
        yield
        return
    loader: DataLoader[int] = DataLoader(
        list(range(1 << 20)),  # type: ignore[arg-type]  # anything with a length and items
        num_workers=count,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    next(batches)
    try:
        yield
    finally:
        del batches


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that is empty at first and gone at the end."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _settle() -> None:
    """Nothing waits to be computed, written or collected."""
    finish_device_work()
    gc.collect()
    os.sync()


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    finish_device_work()
    return time.perf_counter() - began


def _longest_gap(until: Callable[[], bool]) -> float:
    """Longest time between two turns of a loop that does nothing but look at the clock."""
    longest = 0.0
    last = look = time.perf_counter()
    while True:
        now = time.perf_counter()
        longest = max(longest, now - last)
        last = now
        if now - look > 0.002:
            if until():
                return longest
            last = look = time.perf_counter()


def _sync_checkpoint(path: Path) -> None:
    if path.is_dir():
        pagecache.sync_tree(path)
    else:
        pagecache.sync(path)
        pagecache.sync(path.parent)


def _inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in pagecache.files_under(folder)}


def _allocated(folder: Path, before: set[int]) -> int:
    """Bytes on disk of the files that are new; each file once, however many names it has."""
    sizes = {path.stat().st_ino: path.stat().st_blocks * 512 for path in pagecache.files_under(folder)}
    return sum(size for inode, size in sizes.items() if inode not in before)


def _io_written() -> int:
    """Bytes that this process and its children have handed to the disk, or have dirtied."""
    total = 0
    for pid in (os.getpid(), *memory.children()):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/io").read_text(encoding="ascii")
            total += int(text.split("write_bytes:")[1].split()[0])
    return total


def _tensors(state: dict[str, object]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]
