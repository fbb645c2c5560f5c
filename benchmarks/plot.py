"""The picture for the README: what saving costs, and what restoring takes, as bars beside the machine's limit."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.measure import Outcome, Result

PANELS = (
    ("blocked", "memcpy", "save blocks"),
    ("excess", "memcpy", "training loses, until durable"),
    ("durable", "write", "durable after"),
    ("warm_step", "warm_read", "restore and first step, cached"),
    ("cold_step", "cold_read", "restore and first step, from disk"),
)
OURS, PEER, CEILING = "#1a7f5a", "#9aa5b1", "#c0392b"


def draw(result: Result, stem: Path) -> list[Path]:
    """``stem.svg`` and ``stem.png``; nothing where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    matplotlib: Any = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "checkpointer", "font.size": 8, "axes.titlesize": 9})
    plots: Any = importlib.import_module("matplotlib.pyplot")
    outcomes = [outcome for outcome in result.outcomes if outcome.valid and outcome.samples]
    figure, axes = plots.subplots(1, len(PANELS), figsize=(2.6 * len(PANELS) + 1.6, 0.24 * len(outcomes) + 1.3))
    for number, (axis, (name, ceiling, title)) in enumerate(zip(axes, PANELS, strict=True)):
        _bars(axis, result, outcomes, name, ceiling)
        axis.set_title(title)
        axis.set_yticks(
            range(len(outcomes)), [item.title for item in outcomes] if number == 0 else [""] * len(outcomes)
        )
    figure.suptitle(
        f"{result.title}: {result.size / 1e6:,.0f} MB of state. Seconds, less is better; red: the machine's limit"
    )
    figure.tight_layout()
    paths = [stem.with_suffix(".svg"), stem.with_suffix(".png")]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix == ".svg" else None)
    plots.close(figure)
    return paths


def _bars(axis: Any, result: Result, outcomes: list[Outcome], name: str, ceiling: str) -> None:
    for row, outcome in enumerate(outcomes):
        value = outcome.median(name)
        if value is None:
            continue
        value = max(0.0, value)
        samples = outcome.samples[name]
        spread = [[max(0.0, value - max(0.0, min(samples)))], [max(0.0, max(samples) - value)]]
        color = OURS if outcome.name.startswith("checkpointer") else PEER
        axis.barh(row, value, color=color, xerr=spread, error_kw={"elinewidth": 0.8, "ecolor": "#444444"})
        axis.annotate(f" {value:.2f}" if value >= 0.1 else f" {value:.3f}", (value + spread[1][0], row), va="center")
    best = result.ceiling(ceiling)
    if best is not None:
        axis.axvline(best[1], color=CEILING, linewidth=1, linestyle="--")
    axis.set_ylim(len(outcomes) - 0.5, -0.5)
    axis.margins(x=0.2)
    axis.set_xlim(left=0)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
