"""The commands and their arguments. Each collects, renders, prints, and returns its exit code."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from checkpointer.cli import output
from checkpointer.cli.output import complain, emit, emit_json
from checkpointer.errors import CheckpointerError, CheckpointerWarning, CheckpointNotFoundError, ConfigError
from checkpointer.version import __version__

if TYPE_CHECKING:
    from checkpointer.cli.gather import Row
    from checkpointer.cli.render import Table
    from checkpointer.notes import Note

FINE, PROBLEM, USAGE, NOTHING_THERE, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """\b
Exit codes:
  0  fine
  1  a problem was found: damaged, locked by another job, or failed
  2  usage: bad arguments or a bad configuration
  3  nothing there: no such run root, no checkpoints, no such step
  130  interrupted
Errors are one line on stderr, and then stdout holds no JSON document.
"""

_CODES: Mapping[type[BaseException], int] = {
    CheckpointNotFoundError: NOTHING_THERE,
    ConfigError: USAGE,
    click.ClickException: USAGE,
    click.Abort: INTERRUPTED,
    KeyboardInterrupt: INTERRUPTED,
    CheckpointerError: PROBLEM,
    OSError: PROBLEM,
    RecursionError: PROBLEM,
}
"""The exit code for an error is that of the first class here that it belongs to."""

F = TypeVar("F", bound=Callable[..., Any])


class _Cli(click.Group):
    """Turns whatever goes wrong into one line on stderr and the documented exit code."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **__: Any) -> NoReturn:
        """Run and exit. ``args`` default to ``sys.argv``."""
        given = list(sys.argv[1:] if args is None else args)
        with _plain_warnings():
            code = self._run(given or ["--help"])
        sys.exit(code if given else code or USAGE)

    def _run(self, args: list[str]) -> int:
        try:
            code: int | None = super().main(args, prog_name="checkpointer", standalone_mode=False)
            return code or FINE
        except tuple(_CODES) as error:
            complain("error", _message(error))
            return next(code for kind, code in _CODES.items() if isinstance(error, kind))


def _message(error: BaseException) -> str:
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "checkpointer"
        return f"{error.format_message().rstrip('.')}; see '{command} --help'"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted"
    if isinstance(error, RecursionError):
        return "the state is nested too deeply to show; 'checkpointer verify' checks it all the same"
    from checkpointer.cli.gather import describe

    return describe(error)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Our warnings as lines on stderr, other people's not at all."""

    def show(message: Warning | str, *_: object) -> None:
        complain("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CheckpointerWarning)
        warnings.showwarning = show  # type: ignore[assignment]  # catch_warnings puts the old one back
        yield


# ---------------------------------------------------------------------------------------------------- arguments


def _step(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    text = value.removeprefix("checkpoint-")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise click.BadParameter(f"{value!r} is no step: give a whole number from 0 on, such as 500")
    return int(text)


def _metrics(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    return dict(map(_metric, values))


def _metric(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        if not name:
            raise ValueError
        return name, float(number)
    except ValueError:
        raise click.BadParameter(f"{text!r} must look like val_loss=0.25") from None


def _storage_options(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """``client_kwargs.endpoint_url=…`` and its like as nested mappings. Values may be secret: none is repeated."""
    options: dict[str, Any] = {}
    for text in values:
        dotted, equals, value = text.partition("=")
        *outer, last = dotted.split(".")
        if not equals or not all([*outer, last]):
            raise click.BadParameter("must look like key=value, or outer.inner=value for nested keys")
        inner = options
        for key in outer:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise click.BadParameter(f"{dotted}: {key} has a value already")
        inner[last] = _json_or_text(value)
    return options


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _common(function: F) -> F:
    """The options that every command takes."""
    decorators = (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document for machines (see above)."),
        click.option(
            "--storage-option",
            "storage_options",
            multiple=True,
            metavar="KEY=VALUE",
            callback=_storage_options,
            help="Option for fsspec, for remote run roots; repeatable. Dots nest (client_kwargs.endpoint_url=URL), "
            "values are JSON where they can be.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


# ----------------------------------------------------------------------------------------------------- commands


@click.group(cls=_Cli, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="checkpointer")
def cli() -> None:
    """Look at, check and tidy the checkpoints of a training run.

    ROOT is a run root: the directory or URL that holds one run's checkpoints. On a terminal the output is a table,
    in a pipe it is plain aligned text, complete and without colours. NO_COLOR and COLUMNS are honoured.
    """


@cli.command("ls", short_help="List all checkpoints, damaged ones too.")
@click.argument("root")
@_common
def list_command(*, root: str, as_json: bool, storage_options: Mapping[str, object]) -> int:
    r"""List all checkpoints in commit order; damaged ones too.

    Those whose manifest cannot be read have no order: they come last.

    \b
    --json: {"root", "checkpoints": [{"step", "epoch", "sequence", "id", "parent",
      "created", "size", "metrics", "tags", "pinned", "finite", "note", "path",
      "status", "reason"}]}
    Times are ISO 8601 in UTC, sizes bytes, metrics numbers or "nan", "inf", "-inf".
    "status" is "ok", "damaged", or "unsupported" for a newer format; only
    "step", "path", "status" and "reason" are never null then.
    """
    from checkpointer.cli import gather, render

    with gather.opened(root, storage_options) as repository:
        rows = gather.listing(repository)
    if as_json:
        emit_json({"root": repository.url, "checkpoints": [row.to_json() for row in rows]})
    else:
        _print_table(render.listing_table(rows, _now()))
        _warn_of_damage(rows)
    return FINE


@cli.command("show", short_help="Show what one checkpoint holds.")
@click.argument("root")
@click.argument("step", callback=_step, required=False)
@_common
def show_command(*, root: str, step: int | None, as_json: bool, storage_options: Mapping[str, object]) -> int:
    r"""Show what one checkpoint holds: its manifest, files, tensors and plain values. Default: the newest.

    \b
    --json: as one of the checkpoints of "ls", and "world_size", "environment",
      "statistics", "files": {path: {"size", "xxh3"}},
      "components": {name: {"kind", "size", "tensors": {key: {"dtype", "shape",
      "size", "device"}}, "tree", "meta"}}
    "tree" and "meta" are the stored state as FORMAT.md describes it.
    """
    from checkpointer.cli import gather, render

    with gather.opened(root, storage_options) as repository:
        details = gather.details(repository, step)
    if as_json:
        emit_json(details.to_json())
    elif output.is_terminal(sys.stdout):
        emit(render.rich_details(details, _now()))
    else:
        emit(render.plain_details(details, _now()))
    if details.problem is not None:
        complain("error", str(details.problem))
        return PROBLEM
    return FINE


@cli.command("verify", short_help="Check every byte against its hash.")
@click.argument("root")
@click.argument("step", callback=_step, required=False)
@_common
def verify_command(*, root: str, step: int | None, as_json: bool, storage_options: Mapping[str, object]) -> int:
    r"""Read every byte of one checkpoint, or of all, and compare it with its hash. Prints each problem.

    \b
    --json: {"root", "ok", "checkpoints": [{"step", "path", "status", "problems",
      "extra_files", "bytes_read"}]}
    "status" is "ok", "damaged", "unsupported", or "removed" for one that was
    pruned meanwhile.
    """
    from checkpointer.cli import gather, render

    results = []
    with gather.opened(root, storage_options) as repository:
        checks = gather.checks(repository, step)
        with output.progress(checks.bytes, "verifying") as advance:
            for checked in checks.run(advance):
                results.append(checked)
                if not as_json:
                    emit(render.checked_lines(checked))
    bad = sum(bool(checked.problems) for checked in results)
    if as_json:
        emit_json({"root": repository.url, "ok": not bad, "checkpoints": [checked.to_json() for checked in results]})
    else:
        emit(render.verify_summary(results))
    return PROBLEM if bad else FINE


@cli.command("prune", short_help="Apply retention now, or say what it would do.")
@click.argument("root")
@click.option("--config", required=True, metavar="FILE", help="The run's configuration (YAML): keep: says what stays.")
@click.option("--dry-run", is_flag=True, help="Only print the plan; needs no lock.")
@_common
def prune_command(
    *, root: str, config: str, dry_run: bool, as_json: bool, storage_options: Mapping[str, object]
) -> int:
    r"""Apply retention now: print which checkpoints stay and which go, with the reasons, and remove the latter.

    Takes the writer's lock, so it is refused while a job trains. Damaged checkpoints are never removed.

    \b
    --json: {"root", "dry_run", "keep": [{"step", "id", "path", "size", "reasons"}],
      "remove": [the same]}
    """
    from checkpointer.cli import gather, render
    from checkpointer.config import Config

    policy = Config.from_yaml(config)
    with gather.opened(root, storage_options, durable=policy.write.durable) as repository:
        plan, left_alone = gather.pruned(repository, policy.keep, dry_run=dry_run)
    if as_json:
        emit_json({"root": repository.url, "dry_run": dry_run, **gather.plan_to_json(plan)})
    else:
        _print_table(render.plan_table(plan, _now()))
        emit(render.plan_summary(plan, dry_run=dry_run))
        _warn_of_damage(left_alone)
    return FINE


@cli.command("pin", short_help="Protect a checkpoint from retention.")
@click.argument("root")
@click.argument("step", callback=_step)
@_common
def pin_command(*, root: str, step: int, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Protect a checkpoint from retention until "unpin". Needs no lock.

    --json: as one of the checkpoints of "ls".
    """
    from checkpointer.notes import Note

    return _note(root, storage_options, step, Note(pinned=True), "pinned", as_json=as_json)


@cli.command("unpin", short_help="Take a pin back.")
@click.argument("root")
@click.argument("step", callback=_step)
@_common
def unpin_command(*, root: str, step: int, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Take a pin back. Needs no lock.

    --json: as one of the checkpoints of "ls".
    """
    from checkpointer.notes import Note

    return _note(root, storage_options, step, Note(pinned=False), "unpinned", as_json=as_json)


@cli.command("annotate", short_help="Add metrics, tags or a note.")
@click.argument("root")
@click.argument("step", callback=_step)
@click.option(
    "--metric",
    "metrics",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_metrics,
    help="A metric; replaces one of this name.",
)
@click.option("--tag", "tags", multiple=True, help="A word to find the checkpoint by.")
@click.option("--note", "text", help="Free text; replaces the last note.")
@_common
def annotate_command(
    *,
    root: str,
    step: int,
    metrics: dict[str, float],
    tags: tuple[str, ...],
    text: str | None,
    as_json: bool,
    storage_options: Mapping[str, object],
) -> int:
    """Add metrics, tags or a note to a checkpoint. Needs no lock; retention sees them.

    --json: as one of the checkpoints of "ls".
    """
    from checkpointer.arguments import check_tags
    from checkpointer.notes import Note

    if not metrics and not tags and text is None:
        raise click.UsageError("nothing to add: give --metric, --tag or --note", click.get_current_context())
    note = Note(metrics=metrics, tags=check_tags(tags), text=text)
    return _note(root, storage_options, step, note, "annotated", as_json=as_json)


def _note(root: str, options: Mapping[str, object], step: int, note: Note, verb: str, *, as_json: bool) -> int:
    from checkpointer.cli import gather

    with gather.opened(root, options) as repository:
        row = gather.note(repository, step, note)
    if as_json:
        emit_json(row.to_json())
    else:
        emit(output.clean(f"{verb} {row.path}"))
    return FINE


def _print_table(table: Table) -> None:
    from checkpointer.cli import render

    emit(render.rich_table(table) if output.is_terminal(sys.stdout) else render.plain_table(table))


def _warn_of_damage(rows: list[Row]) -> None:
    for row in rows:
        if row.reason is not None:
            complain("warning", f"{row.name} is {row.status}: {row.reason}")


def _now() -> datetime:
    return datetime.now(timezone.utc)
