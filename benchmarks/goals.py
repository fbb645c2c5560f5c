"""The project's goals, and whether this run meets them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.measure import Outcome, Result

MIB = 1 << 20
OURS = "checkpointer"
WORKERS_MATTER = ("blocked", "durable")


@dataclass(frozen=True)
class Verdict:
    """One goal."""

    goal: str
    holds: bool | None
    """``None``: this run did not measure it."""
    measured: str


def judge(results: Mapping[str, Result]) -> list[Verdict]:
    """Every goal, in the order of the table."""
    verdicts: list[Verdict] = []
    gpt = results.get("gpt")
    if gpt is not None:
        verdicts += [*_saving(gpt), *_restoring(gpt), *_memory(gpt), *_workers(gpt)]
    verdicts += [*_small_tensors(results), *_sharing(results), _intact(results)]
    return verdicts


def _outcome(result: Result, name: str) -> Outcome:
    return next((item for item in result.outcomes if item.name == name), Outcome(name, name, status="not measured"))


def _peers(result: Result, figure: str) -> dict[str, float]:
    """What valid peers took."""
    found = {item.title: item.median(figure) for item in result.outcomes if not item.name.startswith(OURS)}
    return {title: value for title, value in found.items() if value is not None}


def _at_most(goal: str, value: float | None, limit: float | None, show: Callable[[float], str]) -> Verdict:
    if value is None or limit is None:
        return Verdict(goal, None, "not measured")
    return Verdict(goal, value <= limit, f"{show(value)}, limit {show(limit)}")


def _ratio(goal: str, value: float | None, base: float | None, limit: float) -> Verdict:
    if value is None or not base:
        return Verdict(goal, None, "not measured")
    return Verdict(goal, value <= limit * base, f"{value / base:.2f} ×")


def _faster(goal: str, value: float | None, others: Mapping[str, float], times: float = 1.0) -> Verdict:
    """Goals that name peers: faster than the best of them."""
    if value is None or not others:
        return Verdict(goal, None, "not measured")
    best = min(others, key=others.__getitem__)
    return Verdict(goal, value * times < others[best], f"{others[best] / value:.2f} × as fast as {best}")


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _mebibytes(size: float) -> str:
    return f"{size / MIB:.0f} MiB"


def _best(result: Result, name: str) -> float | None:
    found = result.ceiling(name)
    return found[1] if found else None


def _saving(result: Result) -> list[Verdict]:
    sync, asynchronous, lazy = (_outcome(result, f"{OURS}-{mode}") for mode in ("sync", "async", "lazy"))
    durable = sync.median("durable")
    peers = _peers(result, "durable")
    rivals = {title: {title: peers[title]} if title in peers else {} for title in RIVALS}
    return [
        _ratio("`sync` is durable within 1.25 × raw write", durable, _best(result, "write"), 1.25),
        *(
            _faster(f"`sync` is durable 2 × as fast as {title}", durable, rival, 2)
            for title, rival in rivals.items()
        ),
        _ratio(
            "`async`: `save` blocks at most 1.15 × memcpy",
            asynchronous.median("blocked"), _best(result, "memcpy"), 1.15,
        ),
        _at_most(
            "`lazy`: `save` blocks at most 10 ms + 5 µs a tensor",
            lazy.median("blocked"), 0.010 + 5e-6 * result.tensors, _milliseconds,
        ),
        _faster("`lazy`: excess step time below every peer's", lazy.median("excess"), _peers(result, "excess")),
        _at_most("`async`: training thread held at most 5 ms beyond idle", *_held(asynchronous), _milliseconds),
    ]  # fmt: skip


RIVALS = ("torch.save + fsync", "dcp.save")


def _held(outcome: Outcome) -> tuple[float | None, float | None]:
    idle = outcome.median("held_idle")
    return outcome.median("held"), None if idle is None else idle + 0.005


def _restored(result: Result) -> Outcome:
    """What is restored does not tell in which mode it was saved: the samples of all modes together."""
    every = Outcome(OURS, OURS)
    for outcome in result.outcomes:
        if outcome.name.startswith(OURS) and outcome.valid:
            for figure in ("warm", "warm_step", "cold", "cold_step", "restore_memory"):
                every.samples.setdefault(figure, []).extend(outcome.samples.get(figure, []))
    return every


def _restoring(result: Result) -> list[Verdict]:
    ours = _restored(result)
    warm, cold = (_best(result, f"{name}_read") for name in ("warm", "cold"))
    return [
        _ratio("warm restore, verified, within 1.5 × raw warm read", ours.median("warm"), warm, 1.5),
        _ratio("cold restore, verified, within 1.1 × raw cold read", ours.median("cold"), cold, 1.1),
        *(
            _faster(
                f"{name} restore and first step faster than every peer",
                ours.median(f"{name}_step"), _peers(result, f"{name}_step"),
            )
            for name in ("warm", "cold")
        ),
    ]  # fmt: skip


def _memory(result: Result) -> list[Verdict]:
    sync, asynchronous, lazy = (_outcome(result, f"{OURS}-{mode}") for mode in ("sync", "async", "lazy"))
    above = asynchronous.median("save_memory")
    return [
        _at_most("extra memory of `sync` at most 64 MiB", sync.median("save_memory"), 64 * MIB, _mebibytes),
        _at_most(
            "extra memory of a restore at most 64 MiB", _restored(result).median("restore_memory"), 64 * MIB, _mebibytes
        ),
        _at_most("extra memory of `async` at most the state + 64 MiB", above, result.size + 64 * MIB, _mebibytes),
        _at_most("extra memory of `lazy` below that of `async`", lazy.median("save_memory"), above, _mebibytes),
    ]


def _workers(result: Result) -> list[Verdict]:
    verdicts = []
    for outcome in result.outcomes:
        if outcome.name.startswith(OURS):
            for figure in WORKERS_MATTER:
                goal = f"forked loader workers change {figure} of {outcome.title} by at most 10 %"
                with_them, without = outcome.median(f"{figure}_workers"), outcome.median(figure)
                verdicts.append(_ratio(goal, with_them, without, 1.1))
    return verdicts


def _small_tensors(results: Mapping[str, Result]) -> list[Verdict]:
    verdicts = []
    for mode in ("sync", "async", "lazy"):
        for figure in ("durable", "warm"):
            goal = f"10,000 small tensors, {figure} of `{mode}`: at most 1.5 × the same bytes in 100 tensors"
            small, large = (
                _outcome(results[name], f"{OURS}-{mode}").median(figure) if name in results else None
                for name in ("small", "large")
            )
            verdicts.append(_ratio(goal, small, large, 1.5))
    return verdicts


def _sharing(results: Mapping[str, Result]) -> list[Verdict]:
    found = _outcome(results["lora"], f"{OURS}-sync").successive if "lora" in results else {}
    count, changed = found.get("count", 0), found.get("changed")
    room = None if changed is None else found["base"] + count * changed
    return [
        _ratio("LoRA: a save writes at most 1.05 × the changed bytes", found.get("later"), changed, 1.05),
        _ratio("LoRA: 20 checkpoints take at most 1.1 × (base + 20 × changed)", found.get("disk"), room, 1.1),
    ]


def _intact(results: Mapping[str, Result]) -> Verdict:
    """The gate's part of the torn-state goal; the thousand saves under fire are a test."""
    ours = [item for result in results.values() for item in result.outcomes if item.name.startswith(OURS)]
    wrong = [f"{item.title}: {item.status}" for item in ours if item.status.startswith(("void", "failed"))]
    measured = statistics.fmean(len(item.samples.get("excess", [])) for item in ours) if ours else 0
    goal = "what every mode restores is the state at the call, with steps running after it"
    return Verdict(goal, not wrong if measured else None, "; ".join(wrong) or "every bit, in every round")
