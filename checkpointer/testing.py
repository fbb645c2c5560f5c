"""A test for your own training loop: interrupted and resumed, does it go on bit for bit?

```python
# test_resume.py
from checkpointer.testing import assert_resume_exact


def make_run():
    torch.manual_seed(0)
    model, optimizer, loader = ...
    batches = itertools.cycle(loader)

    def train_step(step):
        loss = ...
        return loss

    return {"model": model, "optimizer": optimizer, "loader": loader}, train_step


def test_resume_is_exact():
    assert_resume_exact(make_run, steps=20, interrupt_at=[7, 12])
```

``make_run`` is called in new processes: it lies at the top of a module, and takes no arguments. It builds everything,
as the script does before its loop, and returns the components by name, as :class:`CheckpointManager` takes them, and
the function that trains one step and returns the loss. After it, a resumed process restores the components.

Three things are compared, after each step: the loss; every tensor and every number of every component; and every
module, tensor, optimizer, scheduler or generator that the step can reach (through closures, attributes, and the globals
that it names) and that is *not* a component, such as a forgotten average of the weights.
"""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from torch import nn

from checkpointer.errors import CheckpointerError, ConfigError
from checkpointer.manager import CheckpointManager
from checkpointer.state import Captured, RngState, adapter_for
from checkpointer.state.tensors import as_bytes, is_plain

MakeRun: TypeAlias = "Callable[[], tuple[Mapping[str, Any], Callable[[int], Any]]]"
Values: TypeAlias = dict[str, str]
"""What lies at a place, in words: plain values as they are, tensors by dtype, shape and hash."""

MAX_DEPTH = 5
MAX_BYTES = 64 * 2**20
"""Larger tensors outside components are taken for data sets, and not hashed."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "checkpointer"}


def assert_resume_exact(make_run: MakeRun | str, *, steps: int, interrupt_at: int | Sequence[int]) -> None:
    """Run a training loop twice, once interrupted, and fail on the first difference.

    Each part runs in a new process: the uninterrupted run; the run up to the first interruption, which saves and ends;
    the run that restores and goes on; and so forth. On a difference the uninterrupted run is done once more, to tell a
    resume that is not exact from a run that is never the same twice.

    Args:
        make_run: function at the top of a module, or ``"module:function"``; see the docstring of this module.
        steps: how many steps the whole run has; they are numbered from 0.
        interrupt_at: the last step before an interruption, or several.

    Raises:
        AssertionError: the first step, component and tensor that differ, and the likely cause; or a process failed.
        ConfigError: an argument makes no sense.
    """
    cuts = _check_cuts(steps, interrupt_at)
    _check_picklable(make_run)
    with tempfile.TemporaryDirectory(prefix="checkpointer-") as folder:
        problem = _compare_runs(_Lab(make_run, Path(folder), steps, cuts))
    if problem:
        raise AssertionError(problem)


def _compare_runs(lab: _Lab) -> str:
    """What is wrong with the interrupted run, in words; empty if it is the uninterrupted one."""
    straight = lab.run(_Part("the uninterrupted run", None, lab.steps - 1))
    resumed = lab.run_interrupted()
    _leave_out_idle_generators([straight, *resumed.parts.values()])
    found = _first_difference(straight, resumed)
    return "" if found is None else _explain(found, straight, resumed, lab)


def _check_cuts(steps: int, interrupt_at: int | Sequence[int]) -> tuple[int, ...]:
    cuts = (interrupt_at,) if isinstance(interrupt_at, int) else tuple(interrupt_at)
    if not cuts or list(cuts) != sorted(set(cuts)) or cuts[0] < 0 or cuts[-1] > steps - 2:
        raise ConfigError(
            f"interrupt_at={interrupt_at!r} must name increasing steps from 0 to {steps - 2} of {steps} steps: "
            "the last step before each interruption"
        )
    return cuts


def _check_picklable(make_run: MakeRun | str) -> None:
    if isinstance(make_run, str):
        if ":" not in make_run:
            raise ConfigError(f"make_run={make_run!r} must be 'module:function'")
        return
    try:
        pickle.dumps(make_run)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"make_run is handed to new processes, so it must lie at the top of a module: {error}"
        ) from error


# ---------------------------------------------------------------------------------------------- one run, in parts


@dataclass(frozen=True)
class _Part:
    """What one process does: restore, train, save."""

    title: str
    restore: int | None
    last: int
    save: bool = False
    trace: int | None = None
    """A step of which every call of a layer is recorded."""


@dataclass
class _Moment:
    """The state after a step, or before the first one."""

    loss: str = ""
    components: dict[str, Values] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    """What no component holds, and the step can reach."""
    kinds: dict[str, str] = field(default_factory=dict)
    """For each place in ``outside``: what it is; empty for plain values."""
    inputs: list[str] = field(default_factory=list)
    """What went into registered modules during the step."""
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    """(layer, input, output), of a step that is traced."""


@dataclass
class _Record:
    """What one process saw."""

    start: _Moment
    steps: dict[int, _Moment] = field(default_factory=dict)


@dataclass
class _Interrupted:
    """The parts of an interrupted run, by the step that each restored; ``None`` for the first."""

    parts: dict[int | None, _Record] = field(default_factory=dict)

    @property
    def steps(self) -> dict[int, _Moment]:
        """Every step, whichever part did it."""
        return {number: moment for part in self.parts.values() for number, moment in part.steps.items()}


@dataclass
class _Lab:
    """Runs parts in new processes."""

    make_run: MakeRun | str
    folder: Path
    steps: int
    cuts: tuple[int, ...]

    def run(self, part: _Part) -> _Record:
        """Let a new process do one part. Raises ``AssertionError`` with its traceback."""
        out = self.folder / "record"
        out.unlink(missing_ok=True)
        arguments = (self.make_run, str(self.folder / "run"), part, str(out))
        process = multiprocessing.get_context("spawn").Process(target=_child, args=arguments)
        process.start()
        process.join()
        if not out.exists():
            raise AssertionError(f"{part.title}: the process ended with exit code {process.exitcode}, without a word")
        record: _Record
        record, failure = pickle.loads(out.read_bytes())  # noqa: S301 - written by our own child process
        if failure:
            raise AssertionError(f"{part.title} failed:\n{failure}")
        return record

    def run_interrupted(self) -> _Interrupted:
        """Every part of the interrupted run, each saved for the next."""
        run = _Interrupted()
        before: int | None = None
        for cut in (*self.cuts, None):
            title = "the run before the interruption" if before is None else f"the run resumed after step {before}"
            last = self.steps - 1 if cut is None else cut
            run.parts[before] = self.run(_Part(title, before, last, save=cut is not None))
            before = cut
        return run


def _child(make_run: MakeRun | str, root: str, part: _Part, out: str) -> None:
    """In a new process: do one part and leave its record, or the traceback of its failure."""
    record, failure = None, ""
    try:
        record = _do(_resolve(make_run), root, part)
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


def _do(make_run: MakeRun, root: str, part: _Part) -> _Record:
    made = make_run()
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Mapping) and callable(made[1])):
        raise ConfigError("make_run must return (components, step): a mapping by name, and a function of the step")
    components, step = dict(made[0]), made[1]
    watch = _Watch(components, step)
    config = {"write": {"mode": "sync", "durable": False}}
    with CheckpointManager(root, config=config, **components) as manager:
        if part.restore is not None:
            manager.restore(part.restore)
        record = _Record(watch.moment())
        first = 0 if part.restore is None else part.restore + 1
        for number in range(first, part.last + 1):
            with watch.forwards(calls=number == part.trace) as (inputs, calls):
                loss = step(number)
            record.steps[number] = watch.moment(loss)
            record.steps[number].inputs, record.steps[number].calls = inputs, calls
        if part.save:
            manager.save(part.last)
    return record


# ------------------------------------------------------------------------------------------------- what is there


class _Watch:
    """Describes the state of components and of what lies outside them."""

    def __init__(self, components: Mapping[str, Any], step: Callable[[int], Any]) -> None:
        self._components = components
        self._step = step
        self._modules = {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    def moment(self, loss: Any = None) -> _Moment:
        """The state as it is now."""
        adapters = {name: adapter_for(name, part, self._modules) for name, part in self._components.items()}
        captured = {name: adapter.capture() for name, adapter in {**adapters, "rng": RngState()}.items()}
        outside = _Outside(self._components, self._modules)
        outside.look(self._step)
        value = loss.item() if isinstance(loss, torch.Tensor) and loss.numel() == 1 else loss
        components = {name: _values(state) for name, state in captured.items()}
        return _Moment(_describe(value), components, outside.values, outside.kinds)

    @contextmanager
    def forwards(self, *, calls: bool) -> Iterator[tuple[list[str], list[tuple[str, str, str]]]]:
        """What goes into registered modules; with ``calls``, what goes into and comes out of each of their layers."""
        inputs: list[str] = []
        traced: list[tuple[str, str, str]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: inputs.append(f"{name}({_describe((args, kwargs))})"),
                with_kwargs=True,
            )
            for name, module in self._modules.items()
        ]
        for name, layer in self._layers() if calls else ():

            def record(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                traced.append((name, _describe((args, kwargs)), _describe(output)))

            handles.append(layer.register_forward_hook(record, with_kwargs=True))
        try:
            yield inputs, traced
        finally:
            for handle in handles:
                handle.remove()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._modules.items():
            for path, layer in module.named_modules():
                if not any(layer.children()):
                    yield f"{name}.{path}" if path else name, layer


def _values(captured: Captured) -> Values:
    found = {key: _describe(tensor) for key, tensor in captured.tensors.items()}
    found |= dict(_tree_values(captured.tree))
    found |= {f"({key})": _describe(captured.meta[key]) for key in ("frozen", "eval") if key in captured.meta}
    return found


def _tree_values(tree: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Plain values of an encoded tree by path; a long list (the words of a generator) is one value."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            if key != "$tensor":
                yield from _tree_values(item, path if key.startswith("$") else f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list) and len(tree) < 100:
        for index, item in enumerate(tree):
            yield from _tree_values(item, f"{path}[{index}]")
    else:
        yield path, _describe(tree)


def _describe(value: Any) -> str:
    """Equal for equal bits."""
    if isinstance(value, torch.Tensor):
        if not is_plain(value):
            value = value.to_dense() if value.layout is not torch.strided else value
        digest = xxhash.xxh3_64_hexdigest(as_bytes(value.detach()).numpy().data)
        return f"{str(value.dtype)[6:]}{list(value.shape)} {digest}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)} {xxhash.xxh3_64_hexdigest(value.tobytes())}"
    if isinstance(value, (list, tuple)):
        return _shortened(f"[{', '.join(map(_describe, value))}]")
    if isinstance(value, Mapping):
        return _shortened(f"{{{', '.join(f'{key}: {_describe(item)}' for key, item in value.items())}}}")
    return _shortened(repr(value)) if isinstance(value, (*_PLAIN, np.generic)) else type(value).__qualname__


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:40]}… {xxhash.xxh3_64_hexdigest(text.encode())}"


class _Outside:
    """Finds what a step can reach and no component holds."""

    def __init__(self, components: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> None:
        self.values: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self._modules = modules
        self._seen = {id(part) for part in components.values()}
        parts = [part for module in modules.values() for part in (*module.modules(), *module.parameters())]
        self._seen |= {id(part) for part in parts}
        self._keep: list[Any] = []
        """Holds what was seen, so that no id is given twice."""
        for name, part in components.items():
            self._attributes_beside_state(name, part)

    def look(self, step: Any) -> None:
        """Follow a function, a bound method or a callable object."""
        self._visit("", step, 0, "")

    def _attributes_beside_state(self, name: str, part: Any) -> None:
        """Plain values and tensors that ``state_dict()`` does not hold."""
        if isinstance(part, nn.Module):
            for path, module in part.named_modules():
                where = f"{name}.{path}" if path else name
                for key, value in vars(module).items():
                    if not key.startswith("_") and key != "training" and isinstance(value, (*_PLAIN, torch.Tensor)):
                        self._leaf(f"{where}.{key}", value)
                for key in module._non_persistent_buffers_set:  # noqa: SLF001 - torch has no other way to ask
                    self._leaf(f"{where}.{key}", module._buffers[key])  # noqa: SLF001
        elif not _is_foreign(part):
            for key, value in getattr(part, "__dict__", {}).items():
                if isinstance(value, (*_PLAIN, torch.Tensor, np.ndarray)):
                    self._leaf(f"{name}.{key}", value, kind="")

    def _visit(self, path: str, value: Any, depth: int, module: str) -> None:
        if isinstance(value, (*_PLAIN, torch.Tensor, np.ndarray, np.generic)):
            if id(value) not in self._seen or isinstance(value, _PLAIN):
                self._leaf(path, value)
            return
        if id(value) in self._seen or depth > MAX_DEPTH or isinstance(value, (type, types.ModuleType)):
            return
        self._seen.add(id(value))
        self._keep.append(value)
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            self._callable(path, value, depth, module)
        elif isinstance(value, (list, tuple, Mapping)):
            self._container(path, value, depth, module)
        elif not self._stateful(path, value):
            self._object(path, value, depth, module)

    def _callable(self, path: str, value: Any, depth: int, module: str) -> None:
        if isinstance(value, types.MethodType):
            self._visit(path, value.__func__, depth, module)
            self._visit(path, value.__self__, depth, module or value.__func__.__module__)
        elif isinstance(value, functools.partial):
            self._visit(path, (value.func, value.args, value.keywords), depth, module)
        elif value.__module__ == module or not module:  # helpers of other modules are libraries
            for name, item in _names_of(value):
                self._visit(_join(path if module else "", name), item, depth + 1, value.__module__)

    def _container(self, path: str, value: Any, depth: int, module: str) -> None:
        if len(value) > 1000:
            return  # a data set
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            self._visit(f"{path}[{key!r}]", item, depth + 1, module)

    def _stateful(self, path: str, value: Any) -> bool:
        """Whether the object has a state of its own, which could have been a component's."""
        if isinstance(value, nn.Module) and self._wraps_a_component(value):
            return True
        try:
            captured = adapter_for(path or "it", value, self._modules).capture()
        except (CheckpointerError, AttributeError, TypeError, ValueError):
            return False
        for key, text in _values(captured).items():
            self.values[f"{path}: {key}"] = text
            self.kinds[f"{path}: {key}"] = type(value).__qualname__
        return True

    def _wraps_a_component(self, module: nn.Module) -> bool:
        parameters = [id(parameter) for parameter in module.parameters()]
        return bool(parameters) and self._seen.issuperset(parameters)

    def _object(self, path: str, value: Any, depth: int, module: str) -> None:
        if _is_foreign(value):
            return
        for key, item in getattr(value, "__dict__", {}).items():
            self._visit(_join(path, key), item, depth + 1, module)
        if not path and callable(value):
            self._visit(path, type(value).__call__, depth, module or type(value).__module__)

    def _leaf(self, path: str, value: Any, kind: str | None = None) -> None:
        if isinstance(value, torch.Tensor) and (value.numel() * value.element_size() > MAX_BYTES or value.is_meta):
            return
        default = "" if isinstance(value, (*_PLAIN, np.generic)) else type(value).__qualname__
        self.values[path] = _describe(value)
        self.kinds[path] = default if kind is None else kind


def _names_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The closure of a function, and the globals that it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    waiting, names = [function.__code__], dict.fromkeys(function.__code__.co_names)
    while waiting:
        code = waiting.pop()
        names |= dict.fromkeys(code.co_names)
        waiting += [item for item in code.co_consts if isinstance(item, types.CodeType)]
    for name in names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _is_foreign(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in _FOREIGN and type(value).__module__ != "__main__"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# -------------------------------------------------------------------------------------------- what is different


@dataclass(frozen=True)
class _Difference:
    """The first place where two runs are not the same."""

    step: int
    what: str


def _first_difference(straight: _Record, other: _Record | _Interrupted) -> _Difference | None:
    for number, moment in other.steps.items():
        what = _compare(straight.steps[number], moment)
        if what:
            return _Difference(number, what)
    return None


def _compare(a: _Moment, b: _Moment) -> str:
    """The first difference in words; empty where there is none that matters."""
    lines = []
    if a.loss != b.loss:
        lines.append(f"the loss is {a.loss} uninterrupted, {b.loss} resumed")
    lines += _component_differences(a, b)[:1]
    for place in _outside_differences(a, b):
        if not lines and (a.kinds.get(place) or b.kinds.get(place)):
            lines.append(f"{place!r} differs, which is no component ({a.kinds.get(place) or b.kinds.get(place)})")
    return "; ".join(lines)


def _component_differences(a: _Moment, b: _Moment) -> list[str]:
    found = []
    for name, values in a.components.items():
        other = b.components[name]
        for key in dict.fromkeys((*values, *other)):
            left, right = values.get(key, "missing"), other.get(key, "missing")
            if left != right:
                found.append(f"component {name!r}: {key!r} is {left} uninterrupted, {right} resumed")
    return found


def _outside_differences(a: _Moment, b: _Moment) -> list[str]:
    return [place for place in dict.fromkeys((*a.outside, *b.outside)) if a.outside.get(place) != b.outside.get(place)]


# --------------------------------------------------------------------------------------------------------- why


def _leave_out_idle_generators(records: Sequence[_Record]) -> None:
    """Global generators that nobody draws from do not matter, and are seeded by chance in every process."""
    moving = set()
    for record in records:
        begin = record.start.components["rng"]
        for moment in record.steps.values():
            moving |= {_generator(key) for key, value in moment.components["rng"].items() if begin.get(key) != value}
    for record in records:
        for moment in (record.start, *record.steps.values()):
            values = moment.components["rng"].items()
            moment.components["rng"] = {key: value for key, value in values if _generator(key) in moving}


def _generator(key: str) -> str:
    """``numpy`` of ``numpy.state.key``."""
    return key.partition(".")[0].partition("[")[0]


def _explain(found: _Difference, straight: _Record, resumed: _Interrupted, lab: _Lab) -> str:
    again = lab.run(_Part("the second uninterrupted run", None, lab.steps - 1, trace=found.step))
    again.start.components["rng"] = _matching(again.start, straight.start)
    for number, moment in again.steps.items():
        moment.components["rng"] = _matching(moment, straight.steps[number])
    repeated = _first_difference(straight, again)
    start = _compare(straight.start, again.start)
    cut = max((cut for cut in lab.cuts if cut < found.step), default=None)
    where = f"step {found.step}" if cut is None else f"step {found.step}, resumed after step {cut}"
    if start or repeated is not None:
        cause = _never_the_same(start, repeated, straight, again)
    elif cut is None:
        cause = "not known: it differs before the interruption, though two uninterrupted runs are the same"
    else:
        cause = _cause(straight, resumed, found.step, cut) or _trace(again, lab, found.step, cut)
    return f"the resumed run is not the uninterrupted one: {where}\n  {found.what}\n  likely cause: {cause}"


def _matching(moment: _Moment, other: _Moment) -> Values:
    """The generators of ``moment`` that ``other`` has."""
    return {key: value for key, value in moment.components["rng"].items() if key in other.components["rng"]}


def _never_the_same(start: str, repeated: _Difference | None, straight: _Record, again: _Record) -> str:
    title = "the run itself is not deterministic: uninterrupted, it is not the same twice"
    if start:
        return f"{title}, from the start ({start}): seed every generator at the top of make_run"
    assert repeated is not None
    one, other = straight.steps[repeated.step], again.steps[repeated.step]
    if one.inputs != other.inputs:
        return f"{title}, from step {repeated.step} on, whose inputs differ: seed the order of the data"
    return (
        f"{title}, from step {repeated.step} on, with the same inputs: a non-deterministic operator "
        "(torch.use_deterministic_algorithms(True) names it), or a value from outside, such as the time"
    )


def _cause(straight: _Record, resumed: _Interrupted, step: int, cut: int) -> str:
    """What the records tell; empty if they show no difference that comes before this one."""
    one, other = straight.steps[step], resumed.steps[step]
    restored = resumed.parts[cut].start
    before = straight.steps[cut]
    outside = _outside_differences(before, restored)
    forgotten = _named(outside, before, restored)
    incomplete = [line for line in _component_differences(before, restored) if step == cut + 1]
    evidence = f"; not restored, for it is in no component's state: {forgotten}" if forgotten else ""
    generators = sorted({_generator(line.split("'")[3]) for line in _rng(one, other)})
    if incomplete:
        return f"a component does not come back as it was saved: {incomplete[0]}{evidence}"
    if generators:
        return (
            f"random numbers: the resumed step draws others from the global generator of {', '.join(generators)}, for "
            "example because something that is built after the restore draws in its constructor (as the iterator of a "
            f"DataLoader does), or seeds{evidence}"
        )
    if one.inputs != other.inputs:
        return (
            "data order: the batch of this step is another one. Make the loader a component that knows its position "
            f"(checkpointer.data.ResumableLoader){evidence}"
        )
    if forgotten:
        return f"unregistered state: {forgotten}. Make it a component, or part of the state of one"
    return ""


def _rng(a: _Moment, b: _Moment) -> list[str]:
    return [line for line in _component_differences(a, b) if line.startswith("component 'rng'")]


def _named(places: Sequence[str], a: _Moment, b: _Moment) -> str:
    """The objects that places belong to; plain values (counts, logs) only where there is nothing else."""
    stateful = [place for place in places if a.kinds.get(place) or b.kinds.get(place)]
    names: dict[str, str] = {}
    for place in stateful or places:
        name, _, key = place.partition(": ")
        kind = a.kinds.get(place) or b.kinds.get(place) or f"{a.outside.get(place)} before, {b.outside.get(place)} now"
        names.setdefault(name, f"{name!r} ({kind}{f', first {key}' if key else ''})")
    return ", ".join(list(names.values())[:5])


def _trace(again: _Record, lab: _Lab, step: int, cut: int) -> str:
    """Compare every call of a layer in the step, in a resume of its own."""
    last = min((other for other in lab.cuts if other > cut), default=lab.steps - 1)
    part = _Part("the traced resume", cut, min(step, last), trace=step)
    one, other = again.steps[step].calls, lab.run(part).steps[step].calls
    for (name, given, output), (name_now, given_now, output_now) in zip(one, other, strict=False):
        if name != name_now:
            return (
                f"layers run in another order: {name!r} uninterrupted, {name_now!r} resumed, so dropout draws otherwise"
            )
        if given != given_now:
            return f"state that is in no component: the input of {name!r} differs, and no layer before it does"
        if output != output_now:
            return f"a non-deterministic operator, or hidden state, in {name!r}: with the same input its output differs"
    return "state that is in no component, and that only the loss or the optimizer sees"
