"""What was measured, as Markdown for people and JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.ceilings import TITLES
from benchmarks.goals import Verdict
from benchmarks.measure import FIGURES, Outcome, Result

BASELINE = "torch.save+fsync"
"""What each figure is compared with, beside its ceiling."""

SAVE_FIGURES = {"blocked": "memcpy", "excess": "memcpy", "durable": "write"}
RESTORE_FIGURES = {"warm": "warm_read", "warm_step": "warm_read", "cold": "cold_read", "cold_step": "cold_read"}
SIZES = ("save_memory", "restore_memory", "written", "io_written")


def to_json(results: Mapping[str, Result], verdicts: Sequence[Verdict], about: Mapping[str, Any]) -> dict[str, Any]:
    """Every sample; seconds and bytes."""
    return {
        **about,
        "figures": FIGURES,
        "workloads": {name: asdict(result) for name, result in results.items()},
        "goals": [asdict(verdict) for verdict in verdicts],
    }


def to_markdown(results: Mapping[str, Result], about: Mapping[str, Any]) -> str:
    """The tables."""
    parts = ["# Benchmark", _about(about)]
    for result in results.values():
        size = f"{result.size / 2**20:,.1f} MiB in {result.tensors:,} tensors"
        parts += [f"## {result.title}: {size}", _ceilings(result), _saves(result), _restores(result)]
        parts += [table for table in (_first(result), _workers(result), _successive(result), _notes(result)) if table]
    return "\n\n".join(parts) + "\n"


def goals_to_markdown(verdicts: Sequence[Verdict]) -> str:
    """One line a goal."""
    words = {True: "yes", False: "**no**", None: "–"}
    rows = [[verdict.goal, words[verdict.holds], verdict.measured] for verdict in verdicts]
    return "## Against the goals\n\n" + _table(["goal", "holds", "measured"], rows) + "\n"


def _about(about: Mapping[str, Any]) -> str:
    lines = [f"- {key}: {value}" for key, value in about["environment"].items()]
    lines += [f"- {key}: {value}" for key, value in about["run"].items()]
    legend = (
        "Medians over the rounds, with (lowest – highest). Of two ratios the first is to the ceiling, the second to "
        "torch.save + fsync. † does not fsync what it calls done; its time to durable includes an fsync after it."
    )
    return "\n".join(lines) + f"\n\n{legend}"


def _ceilings(result: Result) -> str:
    rows = []
    for name, title in TITLES.items():
        best = result.ceiling(name)
        if best is not None:
            way, median = best
            rate = f"{result.size / median / 2**30:.2f} GiB/s"
            rows.append([title, _spread(result.ceilings[name][way]), rate, way])
    return _table(["ceiling", "s", "", "best way"], rows)


def _saves(result: Result) -> str:
    head = [
        "save", *(f"{FIGURES[figure]}, s" for figure in SAVE_FIGURES), "held, ms (idle)", "extra memory, MiB",
        "written, MiB",
    ]  # fmt: skip
    rows = []
    for outcome in result.outcomes:
        if not outcome.samples.get("blocked"):
            if not outcome.valid:
                rows.append([outcome.title, outcome.status])
            continue
        rows.append(
            [
                _name(outcome),
                *(_timed(result, outcome, figure, ceiling) for figure, ceiling in SAVE_FIGURES.items()),
                _held(outcome),
                _mebibytes(outcome, "save_memory"),
                _mebibytes(outcome, "written"),
            ]
        )
    return _table(head, rows)


def _restores(result: Result) -> str:
    head = [
        "restore",
        *(f"{FIGURES[figure].removeprefix('restore')}, s" for figure in RESTORE_FIGURES),
        "extra memory, MiB",
    ]
    rows = [
        [
            outcome.title,
            *(_timed(result, outcome, figure, ceiling) for figure, ceiling in RESTORE_FIGURES.items()),
            _mebibytes(outcome, "restore_memory"),
        ]
        for outcome in result.outcomes
        if outcome.samples.get("warm")
    ]
    return _table(
        [head[0], *(cell.strip(" ,").replace("and first", "to the end of the first") for cell in head[1:])], rows
    )


def _first(result: Result) -> str:
    """Into memory that nobody has touched, beside the later ones."""
    rows = []
    for outcome in result.outcomes:
        later = outcome.median("blocked")
        found = [outcome.median(figure) for figure in ("first", "first_excess")]
        if later and all(found):
            rows.append([outcome.title, *(f"{value:.3f} · {value / later:.2f} ×" for value in found if value)])
    head = ["first save, three steps after the start", "`save` blocks, s · later ones", "with the step after it"]
    return _table(head, rows) if rows else ""


def _workers(result: Result) -> str:
    """With forked loader workers, as a ratio to the same without."""
    rows = []
    for outcome in result.outcomes:
        row = [outcome.title]
        for figure in ("blocked", "durable"):
            ours, base = outcome.median(f"{figure}_workers"), outcome.median(figure)
            row.append("" if ours is None or not base else f"{ours:.3f} · {ours / base:.2f} ×")
        if any(row[1:]):
            rows.append(row)
    return _table(["with forked loader workers", "`save` blocks, s", "durable after, s"], rows) if rows else ""


def _successive(result: Result) -> str:
    rows = []
    for outcome in result.outcomes:
        found = outcome.successive
        if found and outcome.valid:
            room = found["base"] + found["count"] * found["changed"]
            rows.append([
                outcome.title, f"{found['count']:.0f}",
                f"{found['changed'] / 2**20:.2f}", f"{found['later'] / 2**20:.2f}",
                f"{found['later'] / max(1, found['changed']):.2f} ×", f"{found['disk'] / 2**20:.1f}",
                f"{found['disk'] / max(1, room):.2f} ×",
            ])  # fmt: skip
    head = [
        "successive checkpoints", "count", "changed, MiB a save", "written, MiB a save", "written / changed",
        "on disk, MiB", "on disk / (base + count × changed)",
    ]  # fmt: skip
    return _table(head, rows) if rows else ""


def _notes(result: Result) -> str:
    notes = [f"- {outcome.title}: {note}" for outcome in result.outcomes for note in outcome.notes]
    if result.left_cached > 0.01:
        notes.append(f"- {result.left_cached:.0%} of the ceiling's file stayed in the page cache: not a cold read")
    return "\n".join(notes)


def _name(outcome: Outcome) -> str:
    return outcome.title if outcome.fsyncs else f"{outcome.title} †"


def _timed(result: Result, outcome: Outcome, figure: str, ceiling: str) -> str:
    """Seconds with their spread, and both ratios; or why they do not count."""
    value = outcome.median(figure)
    if value is None:
        return outcome.status
    baseline = next((other.median(figure) for other in result.outcomes if other.name == BASELINE), None)
    bases = [(best[1] if (best := result.ceiling(ceiling)) else None), baseline]
    ratios = " / ".join("–" if not base else f"{value / base:.2f} ×" for base in bases)
    return f"{_spread(outcome.samples[figure])} · {ratios}"


def _spread(samples: Sequence[float]) -> str:
    return f"{statistics.median(samples):.3f} ({min(samples):.3f} – {max(samples):.3f})"


def _held(outcome: Outcome) -> str:
    held, idle = outcome.median("held"), outcome.median("held_idle")
    return "" if held is None or idle is None else f"{held * 1e3:.1f} ({idle * 1e3:.1f})"


def _mebibytes(outcome: Outcome, figure: str) -> str:
    value = outcome.median(figure)
    return "" if value is None else f"{value / 2**20:,.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    filled = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---"] * len(head), *filled]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
