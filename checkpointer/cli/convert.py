"""The commands ``import``, ``export`` and ``consolidate``.

Their library is the manager's side, with torch: loaded when one runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import click

from checkpointer.cli.base import FINE, common, metrics_option, step_argument
from checkpointer.cli.output import clean, complain, emit, emit_json
from checkpointer.policy.values import FieldError, size


def _names(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``old=new`` pairs; keys may hold ``=``, names cannot."""
    pairs = {}
    for text in values:
        old, equals, new = text.rpartition("=")
        if not equals or not old:
            raise click.BadParameter(f"{text!r} must look like old=new")
        pairs[old] = new
    return pairs


def _size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """A size such as ``5GB`` in bytes."""
    try:
        return None if value is None else size("--shard-size", value)
    except FieldError as error:
        raise click.BadParameter(str(error)) from None


@click.command("import", short_help="Make a checkpoint of a torch.save file.")
@click.argument("file")
@click.argument("root")
@click.option("--step", callback=step_argument, metavar="N", help="The step it is of. Default: what the file says.")
@click.option("--epoch", type=click.IntRange(0), metavar="E", help="The epoch. Default: what the file says.")
@click.option(
    "--map",
    "names",
    metavar="KEY=NAME",
    multiple=True,
    callback=_names,
    help="A key of the file becomes the component NAME ('step' and 'epoch': that number); with no NAME it is left out.",
)
@click.option(
    "--kind",
    "kinds",
    metavar="NAME=KIND",
    multiple=True,
    callback=_names,
    help="What a component is restored into, where the guess is wrong: module, optimizer, stateful, container.",
)
@click.option("--metric", "metrics", metavar="NAME=VALUE", multiple=True, callback=metrics_option, help="A metric.")
@click.option("--append", is_flag=True, help="Add to a run root that holds checkpoints; none is replaced.")
@click.option("--dry-run", is_flag=True, help="Only say what would become of the file's content.")
@common
def import_command(
    *,
    file: str,
    root: str,
    step: int | None,
    epoch: int | None,
    names: dict[str, str],
    kinds: dict[str, str],
    metrics: dict[str, float],
    append: bool,
    dry_run: bool,
    as_json: bool,
    storage_options: Mapping[str, object],
) -> int:
    """Make a checkpoint of FILE, which torch.save (or safetensors) wrote, in the run root ROOT.

    The usual names (model_state_dict, net, optim, lr_scheduler, global_step, …), bare state dicts and Lightning's
    .ckpt are recognized. FILE is never unpickled in a way that could run code. Takes the writer's lock.

    \b
    --json: {"root", "dry_run", "step", "epoch", "path", "components": {name:
      {"source", "kind", "stripped"}}, "values": [key], "left_out": {key: reason}}
    "stripped" is a prefix that all keys had ("module."), "values" are kept in
    files/imported.json, "path" is null for a dry run.
    """
    from checkpointer.cli import gather

    library: Any = import_module("checkpointer.migration.importing")
    source = file.replace("\\", "/").rpartition("/")[2]
    plan = library.plan_of(source, library.load(file), step=step, epoch=epoch, naming=names, kinds=kinds)
    path: str | None = None
    with gather.opened(root, storage_options) as repository:
        if not dry_run:
            path = library.write_import(repository, plan, name=source, metrics=metrics, append=append).path
    if as_json:
        emit_json({"root": repository.url, "dry_run": dry_run, "path": path, **_plan_to_json(plan)})
    else:
        emit("\n".join(map(clean, [*_plan_lines(plan), "nothing was written" if path is None else f"imported {path}"])))
    return FINE


def _plan_to_json(plan: Any) -> dict[str, Any]:
    parts = {
        name: {"source": part.source, "kind": part.kind, "stripped": part.stripped} for name, part in plan.parts.items()
    }
    return {
        "step": plan.step,
        "epoch": plan.epoch,
        "components": parts,
        "values": list(plan.values),
        "left_out": dict(plan.left_out),
    }


def _plan_lines(plan: Any) -> Iterator[str]:
    yield f"step {plan.step}" + ("" if plan.epoch is None else f", epoch {plan.epoch}")
    for part in plan.parts.values():
        stripped = f", {part.stripped!r} removed from every key" if part.stripped else ""
        yield f"  component {part.name}  ({part.kind}) from {part.source}{stripped}"
    if plan.values:
        yield f"  kept in files/imported.json: {', '.join(plan.values)}"
    for key, reason in plan.left_out.items():
        yield f"  left out: {key} ({reason})"


@click.command("export", short_help="Write a checkpoint as one .pt or .safetensors file.")
@click.argument("root")
@click.argument("step", callback=step_argument)
@click.argument("out")
@click.option("--component", metavar="NAME", help="Only this one. Default: the model for .safetensors, else all.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@common
def export_command(
    *,
    root: str,
    step: int,
    out: str,
    component: str | None,
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, object],
) -> int:
    """Write the checkpoint of STEP to the local file OUT; every byte is checked against its hash on the way.

    OUT ends in .safetensors (the tensors of one component), .pt or .pth (what torch.save makes of its state_dict, or
    without --component of {"model": …, "optimizer": …, "step": …}, the random generators left out).

    \b
    --json: {"root", "step", "path", "components", "left_out", "size", "weights_only"}
    "weights_only" says whether torch.load reads it without unpickling.
    """
    from checkpointer.cli import gather

    library: Any = import_module("checkpointer.migration.exporting")
    with gather.opened(root, storage_options) as repository:
        gather.listing(repository)
        done = library.export_step(repository, step, out, component=component, overwrite=force)
    if as_json:
        emit_json(
            {
                "root": repository.url,
                "step": step,
                "path": done.path,
                "components": list(done.components),
                "left_out": list(done.left_out),
                "size": done.size,
                "weights_only": done.safe,
            }
        )
    else:
        rest = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
        emit(clean(f"exported {', '.join(done.components)} of step {step} to {done.path}{rest}"))
    if not done.safe:
        complain("warning", f"{done.path} holds values that torch.load reads only with weights_only=False")
    return FINE


@click.command("consolidate", short_help="Make one plain model of a checkpoint of any number of ranks.")
@click.argument("root")
@click.argument("step", callback=step_argument)
@click.argument("out")
@click.option("--component", metavar="NAME", help="Which one. Default: the model.")
@click.option("--shard-size", metavar="SIZE", callback=_size, help="Bytes in one file at most, such as 5GB.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@common
def consolidate_command(
    *,
    root: str,
    step: int,
    out: str,
    component: str | None,
    shard_size: int | None,
    force: bool,
    as_json: bool,
    storage_options: Mapping[str, object],
) -> int:
    """Write the model of STEP as plain safetensors to OUT, however many ranks have saved it.

    OUT ends in .safetensors (one file), or becomes a directory as the Hugging Face tools read it: model.safetensors,
    or shards with their index, and the files that were attached to the checkpoint. Every byte is checked against its
    hash first. A piece of one tensor is in memory at a time.

    \b
    --json: {"root", "step", "path", "component", "files", "tensors", "size", "left_out"}
    "left_out" are entries of the model's state that are no tensors.
    """
    from checkpointer.cli import gather

    library: Any = import_module("checkpointer.migration.consolidating")
    with gather.opened(root, storage_options) as repository:
        gather.listing(repository)
        done = library.consolidate_step(
            repository, step, out, component=component, shard_size=shard_size, overwrite=force
        )
    if as_json:
        emit_json(
            {
                "root": repository.url,
                "step": step,
                "path": done.path,
                "component": done.component,
                "files": list(done.files),
                "tensors": done.tensors,
                "size": done.size,
                "left_out": list(done.left_out),
            }
        )
    else:
        rest = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
        emit(clean(f"wrote {done.tensors} tensors of {done.component}, step {step}, to {done.path}{rest}"))
    return FINE


__all__ = ["consolidate_command", "export_command", "import_command"]
