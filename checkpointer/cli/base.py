"""What every command is made of: the group they belong to, exit codes, errors as one line, and common arguments."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import click

from checkpointer.cli.output import complain
from checkpointer.errors import CheckpointerError, CheckpointerWarning, CheckpointNotFoundError, ConfigError
from checkpointer.version import __version__

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


def step_argument(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    text = value.removeprefix("checkpoint-")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise click.BadParameter(f"{value!r} is no step: give a whole number from 0 on, such as 500")
    return int(text)


def metrics_option(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    return dict(map(_metric, values))


def _metric(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        if not name:
            raise ValueError
        value = float(number)
    except ValueError:
        raise click.BadParameter(f"{text!r} must look like val_loss=0.25") from None
    if math.isinf(value) and "inf" not in number.lower():
        raise click.BadParameter(f"{text!r} is too large for a float")
    return name, value


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


def common(function: F) -> F:
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


@click.group(cls=_Cli, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="checkpointer")
def cli() -> None:
    """Look at, check, compare, tidy and convert the checkpoints of a training run.

    ROOT is a run root: the directory or URL that holds one run's checkpoints. On a terminal the output is a table,
    in a pipe it is plain aligned text, complete and without colours. NO_COLOR and COLUMNS are honoured.
    """
