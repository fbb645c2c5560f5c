"""Whose checkpoint the names of files tell of: this library's, or that of another one. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, TypeAlias

from checkpointer.format import paths

Kind: TypeAlias = Literal[
    "ours", "hugging-face", "accelerate", "lightning", "deepspeed", "dcp", "torch", "empty", "other"
]

LIBRARIES: dict[Kind, str] = {
    "hugging-face": "Hugging Face's Trainer",
    "accelerate": "Accelerate",
    "lightning": "Lightning",
    "deepspeed": "DeepSpeed",
    "dcp": "torch.distributed.checkpoint",
    "torch": "torch.save",
}

_HUGGING_FACE = frozenset({"trainer_state.json", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"})
_HUGGING_FACE_MODEL = frozenset({"config.json", "adapter_config.json", "model.safetensors.index.json"})
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")
_ACCELERATE = re.compile(r"random_states_\d+\.pkl|sampler(_\d+)?\.bin|custom_checkpoint_\d+\.pkl")
_INDEX = re.compile(r"index(-\d+)?\.json")
_STEP_NAME = re.compile(r"checkpoint[-_](\d{1,19})|global_step(\d{1,19})")


def kind_of(files: Collection[str]) -> tuple[Kind, Collection[str]]:
    """What the files in a directory, relative to it, say about who wrote them, and which of them say it."""
    if not files:
        return "empty", ()
    tests: Sequence[tuple[Kind, Collection[str]]] = (
        ("hugging-face", _HUGGING_FACE.intersection(files)),
        ("accelerate", [path for path in files if _ACCELERATE.fullmatch(path)]),
        ("deepspeed", [path for path in files if path == "zero_to_fp32.py" or "zero_pp_rank_" in path]),
        ("dcp", [path for path in files if path.rpartition("/")[2] == ".metadata" or path.endswith(".distcp")]),
        ("ours", [path for path in files if _INDEX.fullmatch(path.rpartition("/")[2])]),
        ("hugging-face", [path for path in files if path in _HUGGING_FACE_MODEL or _SHARD.fullmatch(path)]),
        ("ours", [path for path in files if _may_be_ours(path)]),
        ("hugging-face", [path for path in files if path in _WEIGHTS or path.startswith("pytorch_model")]),
        ("lightning", [path for path in files if path.endswith(".ckpt")]),
        ("torch", [path for path in files if path.endswith((".pt", ".pth", ".bin"))]),
    )
    return next(((kind, telling) for kind, telling in tests if telling), ("other", ()))


def _may_be_ours(path: str) -> bool:
    return path.endswith(".safetensors") and path.rpartition("/")[2] != "adapter_model.safetensors"


def described(kind: Kind, first: str) -> str | None:
    """What such a directory is, as the rest of a sentence; ``first`` is the most telling file. ``None``: unknown."""
    if kind == "ours":
        return f"holds files of a checkpoint ({first}) without {paths.MANIFEST}: it was copied or deleted in part"
    return f"looks like a checkpoint of {LIBRARIES[kind]} ({first})" if kind in LIBRARIES else None


def import_command(kind: Kind, place: str, files: Collection[str], step: int) -> str | None:
    """What takes the contents of such a directory over, and what they are; ``None`` where nothing does."""
    if kind not in LIBRARIES:
        return None
    weights = next((path for path in _WEIGHTS if path in files), None)
    if kind == "hugging-face" and weights is not None:
        return f"'checkpointer import {place}/{weights} NEW_ROOT --step {step}' takes the weights over"
    return f"'checkpointer import FILE NEW_ROOT --step {step}' takes over what torch.save wrote"


def step_in_name(name: str) -> int | None:
    """The step in a name that this or another library gives to one checkpoint; ``None`` if it is no such name."""
    step = paths.parse_checkpoint_name(name)
    if step is not None:
        return step
    found = _STEP_NAME.fullmatch(name)
    return int(found[1] or found[2]) if found else None


__all__ = ["LIBRARIES", "Kind", "described", "import_command", "kind_of", "step_in_name"]
