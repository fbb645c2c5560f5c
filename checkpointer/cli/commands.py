"""The commands that look at, check and tidy a run root. Each collects, renders, prints, and returns its exit code."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import click

from checkpointer.cli import output
from checkpointer.cli.base import FINE, PROBLEM, cli, common, metrics_option, step_argument
from checkpointer.cli.convert import consolidate_command, export_command, import_command
from checkpointer.cli.diff import diff_command
from checkpointer.cli.doctor import doctor_command
from checkpointer.cli.output import complain, emit, emit_json

if TYPE_CHECKING:
    from checkpointer.cli.gather import Row
    from checkpointer.cli.render import Table
    from checkpointer.repository.notes import Note


for _command in (consolidate_command, diff_command, doctor_command, export_command, import_command):
    cli.add_command(_command)


@cli.command("ls", short_help="List all checkpoints, damaged ones too.")
@click.argument("root")
@click.option("--stats", is_flag=True, help="What each save has cost, instead.")
@common
def list_command(*, root: str, stats: bool, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """List all checkpoints in commit order; damaged ones too.

    Those whose manifest cannot be read have no order: they come last. "best" names the metrics by which one is the
    best, of the rules that the newest one was saved with (keep: best).

    --stats: seconds that the call waited for the previous save, that it held training (stall), that writing took, and
    fsync in it; bytes written, and bytes shared with an earlier checkpoint.

    \b
    --json: {"root", "rules": {"source", "keep"}, "best": {metric: id},
      "checkpoints": [{"step", "epoch", "sequence", "id", "parent", "created",
      "size", "metrics", "tags", "pinned", "finite", "note", "path", "status",
      "reason"}]}
    "rules" are those that the newest was saved with ("source" names it), or null.
    Times are ISO 8601 in UTC, sizes bytes, metrics numbers or "nan", "inf", "-inf".
    "status" is "ok", "damaged", "unreadable" for what this user may not read, or
    "unsupported" for a newer format; only
    "step", "path", "status" and "reason" are never null then. With --stats each
    has "statistics" too, as FORMAT.md describes them, or null.
    """
    from checkpointer.cli import gather, render

    with gather.opened(root, storage_options) as repository:
        rows, rules, problem = gather.ranked_listing(repository)
    if as_json:
        best = {metric: row.info.id for row in rows if row.info for metric in row.best}
        known = {"rules": rules.to_json() if rules else None, "best": best}
        checkpoints = [row.to_json(statistics=stats) for row in rows]
        emit_json({"root": repository.url, **known, "checkpoints": checkpoints})
    else:
        _print_table(render.statistics_table(rows) if stats else render.listing_table(rows, _now()))
        _warn_of_damage(rows)
    if problem is not None:
        complain("warning", f"{problem}. They are ignored, so the best checkpoints are not known")
    return FINE


@cli.command("show", short_help="Show what one checkpoint holds.")
@click.argument("root")
@click.argument("step", callback=step_argument, required=False)
@common
def show_command(*, root: str, step: int | None, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Show what one checkpoint holds: its manifest, files, tensors and plain values. Default: the newest.

    \b
    --json: as one of the checkpoints of "ls", and "run", "rules", "foreign",
      "replaces", "slimmed" (these four where they are there), "world_size",
      "environment", "statistics", "files": {path: {"size", "xxh3", "shared_with"}},
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


@cli.command("history", short_help="List what has happened to the run.")
@click.argument("root")
@common
def history_command(*, root: str, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """List what has happened to the run, in order: commits with their cost, removals with their reasons, restores,
    branches, damage, quarantine, signals.

    It comes from a journal of 4 MiB at most: the oldest events go, and those of the last moments before a crash may be
    missing. Pins and annotations are not in it: "show" has them. Needs no lock.

    \b
    --json: [{"kind", "time", "step", "id", "reason", "metrics", "statistics",
      "details", "host", "pid"}]
    One array. "kind" is "commit", "removal", "restore", "branch", "damage",
    "intact", "quarantine", "signal", or a word of a newer version. "statistics"
    is what a commit has cost, as FORMAT.md describes it. What is not known is null.
    """
    from checkpointer.cli import gather, render

    with gather.opened(root, storage_options) as repository:
        events = gather.history(repository)
    if as_json:
        emit_json([gather.event_to_json(event) for event in events])
    elif events:
        _print_table(render.history_table(events))
    else:
        complain("note", f"nothing is written down of what has happened to {repository.url}")
    return FINE


@cli.command("verify", short_help="Check every byte against its hash.")
@click.argument("root")
@click.argument("step", callback=step_argument, required=False)
@common
def verify_command(*, root: str, step: int | None, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Read every byte of one checkpoint, or of all, and compare it with its hash. Prints each problem.

    What it finds is noted beside the checkpoint, where this user may write: retention does not count on a damaged one,
    until a check passes.

    \b
    --json: {"root", "ok", "checkpoints": [{"step", "path", "status", "problems",
      "extra_files", "bytes_read"}]}
    "status" is "ok", "damaged", "unreadable", "unsupported", or "removed" for one
    that was pruned meanwhile.
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
@click.option("--config", metavar="FILE", help="A configuration (YAML): its keep: says what stays.")
@click.option("--dry-run", is_flag=True, help="Only print the plan; needs no lock.")
@common
def prune_command(
    *, root: str, config: str | None, dry_run: bool, as_json: bool, storage_options: Mapping[str, object]
) -> int:
    """Apply retention now: print which checkpoints stay and which go, with the reasons, and remove the latter.

    The rules are those of FILE, else those that the newest checkpoint was saved with; they are printed, too.

    Takes the writer's lock, so it is refused while a job trains. Damaged checkpoints are never removed.

    \b
    --json: {"root", "dry_run", "rules": {"source", "keep"}, "keep": [{"step", "id",
      "path", "size", "reasons"}], "remove": [the same]}
    """
    from checkpointer.cli import gather, render
    from checkpointer.config.settings import Config

    given = None if config is None else Config.from_yaml(config)
    with gather.opened(root, storage_options, durable=given is None or given.write.durable) as repository:
        rules = gather.rules_to_prune_by(repository) if given is None else gather.Rules(given.keep, str(config))
        plan, left_alone = gather.pruned(repository, rules.keep, dry_run=dry_run)
    if as_json:
        document = {"root": repository.url, "dry_run": dry_run, "rules": rules.to_json(), **gather.plan_to_json(plan)}
        emit_json(document)
    else:
        _print_table(render.plan_table(plan, _now()))
        emit(render.rules_line(rules))
        emit(render.plan_summary(plan, dry_run=dry_run))
        _warn_of_damage(left_alone)
    return FINE


@cli.command("pin", short_help="Protect a checkpoint from retention.")
@click.argument("root")
@click.argument("step", callback=step_argument)
@common
def pin_command(*, root: str, step: int, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Protect a checkpoint from retention until "unpin". Needs no lock.

    --json: as one of the checkpoints of "ls".
    """
    from checkpointer.repository.notes import Note

    return _note(root, storage_options, step, Note(pinned=True), "pinned", as_json=as_json)


@cli.command("unpin", short_help="Take a pin back.")
@click.argument("root")
@click.argument("step", callback=step_argument)
@common
def unpin_command(*, root: str, step: int, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Take a pin back. Needs no lock.

    --json: as one of the checkpoints of "ls".
    """
    from checkpointer.repository.notes import Note

    return _note(root, storage_options, step, Note(pinned=False), "unpinned", as_json=as_json)


@cli.command("annotate", short_help="Add metrics, tags or a note.")
@click.argument("root")
@click.argument("step", callback=step_argument)
@click.option(
    "--metric",
    "metrics",
    metavar="NAME=VALUE",
    multiple=True,
    callback=metrics_option,
    help="A metric; replaces one of this name.",
)
@click.option("--tag", "tags", multiple=True, help="A word to find the checkpoint by.")
@click.option("--note", "text", help="Free text; replaces the last note.")
@common
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
    from checkpointer.config.arguments import check_tags
    from checkpointer.repository.notes import Note

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


__all__ = ["cli"]
