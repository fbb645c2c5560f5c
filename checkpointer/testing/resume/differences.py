"""Where two runs differ first, and the likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpointer.testing.resume.describing import Values
from checkpointer.testing.resume.moments import StateAfterStep
from checkpointer.testing.resume.runs import Experiment, Interrupted, Record, Segment


@dataclass(frozen=True)
class Difference:
    """The first place where two runs are not the same."""

    step: int
    what: str


def first_difference(straight: Record, other: Record | Interrupted) -> Difference | None:
    for number, moment in other.steps.items():
        what = compare(straight.steps[number], moment)
        if what:
            return Difference(number, what)
    return None


def compare(a: StateAfterStep, b: StateAfterStep) -> str:
    """The first difference in words; empty where there is none that matters."""
    lines = []
    if a.loss != b.loss:
        lines.append(f"the loss is {a.loss} uninterrupted, {b.loss} resumed")
    lines += component_differences(a, b)[:1]
    for place in outside_differences(a, b):
        if not lines and (a.kinds.get(place) or b.kinds.get(place)):
            lines.append(f"{place!r} differs, which is no component ({a.kinds.get(place) or b.kinds.get(place)})")
    return "; ".join(lines)


def component_differences(a: StateAfterStep, b: StateAfterStep) -> list[str]:
    found = []
    for name, values in a.components.items():
        other = b.components[name]
        for key in dict.fromkeys((*values, *other)):
            left, right = values.get(key, "missing"), other.get(key, "missing")
            if left != right:
                found.append(f"component {name!r}: {key!r} is {left} uninterrupted, {right} resumed")
    return found


def outside_differences(a: StateAfterStep, b: StateAfterStep) -> list[str]:
    return [place for place in dict.fromkeys((*a.outside, *b.outside)) if a.outside.get(place) != b.outside.get(place)]


# --------------------------------------------------------------------------------------------------------- why


def leave_out_idle_generators(records: Sequence[Record]) -> None:
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


def explain(found: Difference, straight: Record, resumed: Interrupted, experiment: Experiment) -> str:
    again = experiment.run(Segment("the second uninterrupted run", None, experiment.steps - 1, trace=found.step))
    again.start.components["rng"] = _matching(again.start, straight.start)
    for number, moment in again.steps.items():
        moment.components["rng"] = _matching(moment, straight.steps[number])
    repeated = first_difference(straight, again)
    start = compare(straight.start, again.start)
    cut = max((cut for cut in experiment.cuts if cut < found.step), default=None)
    where = f"step {found.step}" if cut is None else f"step {found.step}, resumed after step {cut}"
    if start or repeated is not None:
        cause = _never_the_same(start, repeated, straight, again)
    elif cut is None:
        cause = "not known: it differs before the interruption, though two uninterrupted runs are the same"
    else:
        cause = _cause(straight, resumed, found.step, cut) or _trace(again, experiment, found.step, cut)
    return f"the resumed run is not the uninterrupted one: {where}\n  {found.what}\n  likely cause: {cause}"


def _matching(moment: StateAfterStep, other: StateAfterStep) -> Values:
    """The generators of ``moment`` that ``other`` has."""
    return {key: value for key, value in moment.components["rng"].items() if key in other.components["rng"]}


def _never_the_same(start: str, repeated: Difference | None, straight: Record, again: Record) -> str:
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


def _cause(straight: Record, resumed: Interrupted, step: int, cut: int) -> str:
    """What the records tell; empty if they show no difference that comes before this one."""
    one, other = straight.steps[step], resumed.steps[step]
    restored = resumed.parts[cut].start
    before = straight.steps[cut]
    outside = outside_differences(before, restored)
    forgotten = _named(outside, before, restored)
    incomplete = [line for line in component_differences(before, restored) if step == cut + 1]
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


def _rng(a: StateAfterStep, b: StateAfterStep) -> list[str]:
    return [line for line in component_differences(a, b) if line.startswith("component 'rng'")]


def _named(places: Sequence[str], a: StateAfterStep, b: StateAfterStep) -> str:
    """The objects that places belong to; plain values (counts, logs) only where there is nothing else."""
    stateful = [place for place in places if a.kinds.get(place) or b.kinds.get(place)]
    names: dict[str, str] = {}
    for place in stateful or places:
        name, _, key = place.partition(": ")
        kind = a.kinds.get(place) or b.kinds.get(place) or f"{a.outside.get(place)} before, {b.outside.get(place)} now"
        names.setdefault(name, f"{name!r} ({kind}{f', first {key}' if key else ''})")
    return ", ".join(list(names.values())[:5])


def _trace(again: Record, experiment: Experiment, step: int, cut: int) -> str:
    """Compare every call of a layer in the step, in a resume of its own."""
    last = min((other for other in experiment.cuts if other > cut), default=experiment.steps - 1)
    part = Segment("the traced resume", cut, min(step, last), trace=step)
    one, other = again.steps[step].calls, experiment.run(part).steps[step].calls
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
