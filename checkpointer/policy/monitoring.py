"""Metrics by their names: which direction is better, and which name was meant.

Pure. A direction is never guessed: the worst checkpoint would be kept as the best, and nobody would notice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal, TypeAlias

Mode: TypeAlias = Literal["min", "max"]

MODES: tuple[Mode, ...] = ("min", "max")

_LOWER_IS_BETTER = frozenset({"loss", "error", "perplexity", "wer"})
_HIGHER_IS_BETTER = frozenset({"acc", "accuracy", "f1", "auc", "iou", "bleu", "reward"})

_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "eval", "evaluation", "dev", "test"})
"""What may follow the word: TensorBoard's own examples write ``Loss/train`` and ``Accuracy/test``."""

_TWISTING = frozenset(
    {"neg", "negative", "negated", "minus", "inv", "inverse", "inverted", "non", "not", "no", "anti", "opposite"}
    | {"diff", "difference", "delta", "change", "gap", "drop", "std", "stddev", "var", "variance"}
)
"""Words that turn a metric round, or make another quantity of it."""

_SHORTEST = 3
"""Letters of a name that another one may begin with and be meant."""

_SEPARATORS = re.compile(r"[/_.:\-\s]+")
_SUBTRACTED = re.compile(r"(?:^|[/_.:\s])(?:1(?:\.0*)?\s*)?-")
"""``-loss`` and ``1-acc``."""


def mode_by_name(monitor: str) -> Mode | None:
    """``"min"`` or ``"max"`` where the name says so, such as ``val/loss`` or ``eval_accuracy``; else ``None``.

    The last word of the name decides, with nothing behind it but the name of a split of the data.
    """
    words = [word for word in _SEPARATORS.split(monitor.lower()) if word]
    while len(words) > 1 and words[-1] in _SPLITS:
        words.pop()
    if not words or _SUBTRACTED.search(monitor) or _TWISTING.intersection(words):
        return None
    lower, higher = _LOWER_IS_BETTER.intersection(words), _HIGHER_IS_BETTER.intersection(words)
    if lower and higher:
        return None
    return "min" if words[-1] in lower else "max" if words[-1] in higher else None


def resolve_mode(monitor: str, *stated: Mode | None) -> Mode | None:
    """The mode of a metric: the first that is ``stated``, most binding first; else what its name says, if anything."""
    return next((mode for mode in stated if mode is not None), None) or mode_by_name(monitor)


def nearest_name(monitor: str, names: Collection[str]) -> str | None:
    """Which of ``names`` was probably meant; ``None`` where none is like it."""
    import difflib  # only a warning needs it, and it is slow to import

    def words(name: str) -> str:
        return " ".join(_SEPARATORS.split(name.lower())).strip()

    by_words = {words(name): name for name in sorted(names, reverse=True)}
    wanted = words(monitor)
    for found, name in sorted(by_words.items()):  # "acc" and "accuracy": too short to be alike by their letters
        if min(len(found), len(wanted)) >= _SHORTEST and (found.startswith(wanted) or wanted.startswith(found)):
            return name
    close = difflib.get_close_matches(wanted, list(by_words), n=1)
    return by_words[close[0]] if close else None


def listed(names: Iterable[str], most: int = 10) -> str:
    """Names for a message, in order, not too many of them."""
    found = sorted(names)
    more = [f"{len(found) - most} more"] if len(found) > most else []
    return ", ".join([*found[:most], *more]) or "none"


__all__ = ["MODES", "Mode", "listed", "mode_by_name", "nearest_name", "resolve_mode"]
