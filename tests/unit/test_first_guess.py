"""The file that a first guess opens defines the behaviour: the table of ARCHITECTURE.md, held by imports."""

from __future__ import annotations

import ast
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

FIRST_GUESSES = {
    "the writer's lock": ("repository/lock.py", "WriterLock"),
    "the commit by rename, on disks": ("repository/commit/by_rename.py", "RenameCommit.commit"),
    "the commit by manifest, in buckets": ("repository/commit/by_manifest.py", "ManifestCommit.commit"),
    "which checkpoints stay": ("policy/retention.py", "plan"),
    "when a save is due": ("policy/schedule.py", "due"),
    "signals and the deadline": ("save/preemption.py", "Preemption"),
    "free space, full disks": ("save/space.py", "Space"),
    "the handle of a save": ("save/handle.py", "PendingSave"),
    "errors of background saves": ("save/saver.py", "Saver.raise_errors"),
    "writing a tensor file": ("save/tensor_writer.py", "write_file"),
    "the hook of lazy mode": ("staging/step_hook.py", "StepWatch"),
    "reused memory for copies": ("staging/arena.py", "Arena"),
    "hashes and NaN, on the way out": ("staging/digest.py", "Digest"),
    "hash check on read": ("repository/checkpoint_reader.py", "CheckpointReader.read"),
    "`verify`": ("repository/verify.py", "verify_checkpoint"),
    "pins and annotations": ("repository/notes.py", "add_note"),
    "the run's history": ("repository/journal.py", "Journal"),
    "options of a restore": ("restore/request.py", "RestoreRequest"),
    "what a restore reports": ("restore/report.py", "RestoreReport"),
    "random state": ("state/rng.py", "RngState"),
    "optimizer state by name": ("state/optimizer/match.py", "match_parameters"),
    "buffers outside state_dict": ("state/module/unsaved.py", "describe_unsaved"),
    "Python values as JSON": ("state/tree/encode.py", "encode"),
    "who writes which box": ("distributed/partition.py", "assign_writes"),
    "resharding": ("distributed/read_plan.py", "Reads"),
    "a loader at another world size": ("data/resharding.py", "carried_over"),
    "file names": ("format/paths.py", "checkpoint_name"),
    "the manifest": ("format/manifest.py", "Manifest"),
    "the table of tensors": ("format/table.py", "TensorColumns"),
    "the configuration's keys": ("config/settings.py", "Config"),
    "secrets in messages": ("storage/redact.py", "Redactor"),
    "manifests that need not be read": ("repository/known.py", "KnownManifests"),
    "the sequence of a commit": ("repository/sequence.py", "Sequences"),
    "which files a checkpoint has": ("repository/contents.py", "read_contents"),
}
"""Behaviour: the file, and the name in it that carries the behaviour."""


@pytest.mark.parametrize("behaviour", FIRST_GUESSES)
def test_the_file_of_the_first_guess_defines_the_behaviour(behaviour):
    file, name = FIRST_GUESSES[behaviour]
    value = import_module("checkpointer." + file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        value = getattr(value, part)
    assert callable(value)
    first = name.partition(".")[0]
    tree = ast.parse((REPOSITORY / "checkpointer" / file).read_text("utf-8"))
    assert first in {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


def table() -> str:
    """The rows of the page: two behaviours in each, the second half beside the first."""
    cells = [f"{behaviour} | `{file}`" for behaviour, (file, _) in FIRST_GUESSES.items()]
    half = -(-len(cells) // 2)
    return "\n".join(f"| {left} | {right} |" for left, right in zip_longest(cells[:half], cells[half:], fillvalue="|"))


def test_the_page_on_the_architecture_shows_the_table():
    assert table() in (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
