"""A position in the data, carried over to another number of ranks: counted in samples, which all ranks saw together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from checkpointer.errors import IncompatibleStateError

_DISTRIBUTED = re.compile(r"DistributedSampler\((.*)\)")
_OF_RANKS = frozenset({"num_replicas", "rank", "num_samples"})
"""Settings of the sampler that another number of ranks changes. The order of an epoch stays: it is drawn from seed and
epoch, and rank r takes each N-th sample of it, from the r-th on."""


def carried_over(state: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any] | None:
    """``state`` as it would be had it been saved by as many ranks as there are now; ``None`` where that is not it.

    ``live`` are the settings of the loader here. The batch size may differ too.

    Raises:
        IncompatibleStateError: what was seen is no whole number of batches here.
    """
    saved = state["settings"]
    path = _differing_sampler(saved, live)
    if path is None or live.get("loader") != "DataLoader" or live.get("dataset") != "map-style":
        return None
    before, now = _fields(saved[path]), _fields(live[path])
    found = {**state, "settings": dict(live)}
    if not state["running"]:
        return found
    seen = min(state["batch"] * saved["batch_size"] * before["num_replicas"], live["length of the dataset"])
    step = live["batch_size"] * now["num_replicas"]
    batches, rest = divmod(seen, step)
    if seen == live["length of the dataset"]:
        batches, rest = -(-now["num_samples"] // live["batch_size"]), 0
    if rest:
        raise IncompatibleStateError(
            f"the loader is not the one that was saved ({path}: saved {saved[path]}, live {live[path]}): "
            f"{before['num_replicas']} ranks had seen {seen} samples of this epoch, and {now['num_replicas']} ranks "
            f"with batches of {live['batch_size']} take {step} at a time, so some would be skipped or repeated. "
            "Choose a batch size that divides it, restore a checkpoint of the end of an epoch, or leave the loader "
            "out: components=[...]"
        )
    return {**found, "batch": batches, "drawn": batches, "exhausted": False, "ended": False}


def _differing_sampler(saved: Mapping[str, Any], live: Mapping[str, Any]) -> str | None:
    """The path of the one sampler that differs by the ranks alone; ``None`` where more differs, or nothing."""
    paths = [name for name in live if name in saved and saved[name] != live[name]]
    paths = [name for name in paths if name != "batch_size" and not str(live[name]).startswith("BatchSampler(")]
    if saved.keys() != live.keys() or len(paths) != 1:
        return None
    before, now = _fields(saved[paths[0]]), _fields(live[paths[0]])
    others = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - _OF_RANKS
    moved = before.get("num_replicas") != now.get("num_replicas")
    return paths[0] if before and now and moved and not others else None


def _fields(text: object) -> dict[str, int]:
    """The settings that ``describe_sampler`` has written of a DistributedSampler."""
    match = _DISTRIBUTED.fullmatch(str(text))
    pairs = (part.partition("=") for part in match[1].split(", ")) if match else ()
    flags = {"True": 1, "False": 0}
    return {name: flags.get(value, int(value) if value.isdecimal() else -1) for name, _, value in pairs}
