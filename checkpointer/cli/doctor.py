"""The command that looks a whole run root over, and mends what is safe."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import click

from checkpointer.cli import output
from checkpointer.cli.base import FINE, PROBLEM, common
from checkpointer.cli.output import emit, emit_json


@click.command("doctor", short_help="Find what is wrong with a run root, and mend what is safe.")
@click.argument("root")
@click.option("--fix", is_flag=True, help="Mend what is safe; takes the writer's lock.")
@click.option("--deep", is_flag=True, help="Read every byte, as 'verify' does.")
@common
def doctor_command(*, root: str, fix: bool, deep: bool, as_json: bool, storage_options: Mapping[str, object]) -> int:
    """Look a run root over: damaged, incomplete and half-removed checkpoints, leftovers of dead writers, directories
    without a manifest, orphaned locks and notes, missing space, wrong permissions, what protects it from two writers.

    One line for each finding: what it means, and what to do. Without --deep it reads manifests, indexes, headers and
    sizes, and "healthy" means no more than that. Exit code 0: healthy, notes aside; 1: there are problems.

    --fix removes what dead writers have left, finishes their removals, clears away empty directories and what systems
    leave behind (.DS_Store, ._*, Thumbs.db, desktop.ini) where no checkpoint is, and moves damaged checkpoints to
    quarantine, where nothing else is ever deleted. It is refused while a job writes to the run.

    \b
    --json: {"root", "ok", "checkpoints": number, "deep", "findings": [{"level",
      "kind", "path", "meaning", "advice"}]}
    "deep" says whether every byte was read.
    "level" is "problem", "note", or "fixed" for what --fix has mended.
    """
    from checkpointer.cli import gather, render

    with gather.opened(root, storage_options) as repository:
        size = gather.checks(repository, None).bytes if deep and not repository.list_checkpoints().empty else 0
        with output.progress(size, "reading") as advance:
            diagnosis = gather.diagnosed(repository, advance, fix=fix, deep=deep)
    if as_json:
        emit_json({"root": repository.url, "ok": diagnosis.ok, **gather.diagnosis_to_json(diagnosis)})
    elif output.is_terminal(sys.stdout) and (diagnosis.findings or diagnosis.fixed):
        emit(render.rich_table(render.diagnosis_table(diagnosis)))
        emit(render.diagnosis_summary(diagnosis))
    else:
        emit(render.diagnosis_lines(diagnosis))
        emit(render.diagnosis_summary(diagnosis))
    return FINE if diagnosis.ok else PROBLEM
