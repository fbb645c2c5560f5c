"""One run of a training loop, in parts, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from checkpointer.errors import ConfigError
from checkpointer.manager import CheckpointManager
from checkpointer.testing.resume.moments import StateAfterStep, Watch

MakeRun: TypeAlias = "Callable[[], tuple[Mapping[str, Any], Callable[[int], Any]]]"


@dataclass(frozen=True)
class Segment:
    """What one process does: restore, train, save."""

    title: str
    restore: int | None
    last: int
    save: bool = False
    trace: int | None = None
    """A step of which every call of a layer is recorded."""


@dataclass
class Record:
    """What one process saw."""

    start: StateAfterStep
    steps: dict[int, StateAfterStep] = field(default_factory=dict)


@dataclass
class Interrupted:
    """The parts of an interrupted run, by the step that each restored; ``None`` for the first."""

    parts: dict[int | None, Record] = field(default_factory=dict)

    @property
    def steps(self) -> dict[int, StateAfterStep]:
        """Every step, whichever part did it."""
        return {number: moment for part in self.parts.values() for number, moment in part.steps.items()}


@dataclass
class Experiment:
    """Runs parts in new processes."""

    make_run: MakeRun | str
    folder: Path
    steps: int
    cuts: tuple[int, ...]

    def run(self, part: Segment) -> Record:
        """Let a new process do one part. Raises ``AssertionError`` with its traceback."""
        out = self.folder / "record"
        out.unlink(missing_ok=True)
        arguments = (self.make_run, str(self.folder / "run"), part, str(out))
        process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
        process.start()
        process.join()
        if not out.exists():
            raise AssertionError(f"{part.title}: the process ended with exit code {process.exitcode}, without a word")
        record: Record
        record, failure = pickle.loads(out.read_bytes())  # noqa: S301 - written by our own child process
        if failure:
            raise AssertionError(f"{part.title} failed:\n{failure}")
        return record

    def run_interrupted(self) -> Interrupted:
        """Every part of the interrupted run, each saved for the next."""
        run = Interrupted()
        before: int | None = None
        for cut in (*self.cuts, None):
            title = "the run before the interruption" if before is None else f"the run resumed after step {before}"
            last = self.steps - 1 if cut is None else cut
            run.parts[before] = self.run(Segment(title, before, last, save=cut is not None))
            before = cut
        return run


def _child(make_run: MakeRun | str, root: str, part: Segment, out: str) -> None:
    """In a new process: do one part and leave its record, or the traceback of its failure."""
    record, failure = None, ""
    try:
        record = do(_resolve(make_run), root, part)
    except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, the parent process shows it
        failure = traceback.format_exc()
    unfinished = Path(f"{out}.part")
    unfinished.write_bytes(pickle.dumps((record, failure)))
    unfinished.rename(out)


def _resolve(make_run: MakeRun | str) -> MakeRun:
    if not isinstance(make_run, str):
        return make_run
    module, _, name = make_run.partition(":")
    found: MakeRun = getattr(import_module(module), name)
    return found


def do(make_run: MakeRun, root: str, part: Segment) -> Record:
    made = make_run()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Mapping) and callable(made[1])):
        raise ConfigError("make_run must return (components, step): a mapping by name, and a function of the step")
    components, step = dict(made[0]), made[1]
    watch = Watch(components, step)
    config = {"write": {"mode": "sync", "durable": False}}
    with CheckpointManager(root, config=config, **components) as manager:
        if part.restore is not None:
            manager.restore(part.restore)
        record = Record(watch.moment())
        first = 0 if part.restore is None else part.restore + 1
        for number in range(first, part.last + 1):
            with watch.forwards(calls=number == part.trace) as (inputs, calls):
                loss = step(number)
            record.steps[number] = watch.moment(loss)
            record.steps[number].inputs, record.steps[number].calls = inputs, calls
        if part.save:
            manager.save(part.last)
    return record
