"""The command ``diff``: what differs between two checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from checkpointer.cli.base import FINE, PROBLEM, common, step_argument
from checkpointer.cli.output import clean, emit, emit_json
from checkpointer.errors import CheckpointerError, CheckpointNotFoundError

if TYPE_CHECKING:
    from checkpointer.compare import Change, Comparison, TensorChange

SHOWN = 20
"""Lines of each kind, unless all are asked for."""

ABSENT = "(none)"


@click.command("diff", short_help="Compare two checkpoints.")
@click.argument("root")
@click.argument("a", callback=step_argument)
@click.argument("b", callback=step_argument)
@click.option("--all", "everything", is_flag=True, help=f"Print every difference, not the {SHOWN} largest of a kind.")
@common
def diff_command(
    *, root: str, a: int, b: int, everything: bool, as_json: bool, storage_options: Mapping[str, object]
) -> int:
    """Compare the checkpoints of steps A and B: environment, settings, tensors (largest difference first).

    Tensors with the same hashes are not read, the others are read in blocks.

    \b
    Exit codes, as those of diff(1):
      0  the same state, bit for bit (the environment is shown, and does not count)
      1  the state differs
      2  trouble: bad arguments, a damaged checkpoint
      3  nothing there

    \b
    --json: {"root", "a", "b", "equal", "environment": [{"path", "before", "after"}],
      "settings": [the same], "tensors": [{"key", "dtype", "shape", "size",
      "differing_elements", "max_abs_difference", "became_nan", "was_nan"}],
      "equal_tensors"}
    "before" and "after" are values as Python writes them, null where a side has
    none. "max_abs_difference" is null where nothing can be subtracted.
    """
    from checkpointer.cli import gather
    from checkpointer.compare import compare_steps

    try:
        with gather.opened(root, storage_options) as repository:
            gather.listing(repository)
            found = compare_steps(repository, a, b)
    except CheckpointNotFoundError:
        raise
    except (CheckpointerError, OSError) as error:  # 1 would say that they differ
        raise click.ClickException(gather.describe(error)) from error
    if as_json:
        emit_json({"root": repository.url, **_to_json(found)})
    else:
        emit("\n".join(map(clean, _lines(found, sys.maxsize if everything else SHOWN))))
    return FINE if found.equal else PROBLEM


def _to_json(found: Comparison) -> dict[str, Any]:
    return {
        "a": found.a.step,
        "b": found.b.step,
        "equal": found.equal,
        "environment": [change._asdict() for change in found.environment],
        "settings": [change._asdict() for change in found.settings],
        "tensors": [_tensor_to_json(change) for change in found.tensors],
        "equal_tensors": found.equal_tensors,
    }


def _tensor_to_json(change: TensorChange) -> dict[str, Any]:
    return {
        "key": change.key,
        "dtype": change.spec.dtype,
        "shape": list(change.spec.shape),
        "size": change.spec.nbytes,
        "differing_elements": change.elements,
        "max_abs_difference": change.largest,
        "became_nan": change.became_nan,
        "was_nan": change.was_nan,
    }


def _lines(found: Comparison, most: int) -> Iterator[str]:
    yield f"--- {found.a.path}"
    yield f"+++ {found.b.path}"
    yield from _section("environment", map(_change, found.environment), most)
    yield from _section("settings", map(_change, found.settings), most)
    yield from _section("tensors", map(_tensor, found.tensors), most)
    yield ""
    yield _summary(found)


def _section(title: str, lines: Iterable[str], most: int) -> Iterator[str]:
    rows = list(lines)
    if rows:
        yield ""
        yield f"{title} ({len(rows)})"
    yield from (f"  {row}" for row in rows[:most])
    if len(rows) > most:
        yield f"  and {len(rows) - most} more; --all prints them"


def _change(change: Change) -> str:
    sides = (ABSENT if side is None else _value(side) for side in (change.before, change.after))
    return f"{change.path}  {' -> '.join(sides)}"


def _value(text: str) -> str:
    """A long value (a generator's state) is cut, wherever it is printed: there is no end to them."""
    from checkpointer.cli.render import shortened

    return shortened(text)


def _tensor(change: TensorChange) -> str:
    largest = "cannot be subtracted" if change.largest is None else f"max |difference| {change.largest:.6g}"
    count = f"{change.elements} of {_elements(change)} elements"
    nans = [
        f"{number} {what} NaN" for number, what in ((change.became_nan, "became"), (change.was_nan, "were")) if number
    ]
    return ", ".join([f"{change.key}  {change.spec.dtype} {list(change.spec.shape)}  {largest}", count, *nans])


def _elements(change: TensorChange) -> int:
    number = 1
    for size in change.spec.shape:
        number *= size
    return number


def _summary(found: Comparison) -> str:
    if found.equal:
        return f"the same state: all {found.equal_tensors} tensors are equal, bit for bit, and so is all else"
    total = found.equal_tensors + len(found.tensors)
    return f"{len(found.settings)} settings differ; {len(found.tensors)} of {total} tensors differ"


__all__ = ["diff_command"]
