"""Is this the state of a loader, and of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from checkpointer.errors import CorruptCheckpointError, IncompatibleStateError

NAME = "loader"
#: What decides which items a sampler gives; compared between save and restore.
_SAMPLER_SETTINGS = (
    "batch_size",
    "drop_last",
    "num_replicas",
    "num_samples",
    "rank",
    "replacement",
    "seed",
    "shuffle",
)
_STATE_TYPES: Mapping[str, tuple[type, ...]] = {
    "settings": (dict,),
    "epoch": (int,),
    "batch": (int,),
    "running": (bool,),
    "label": (int, type(None)),
    "label_given": (bool,),
    "set_epoch": (int, type(None)),
    "drawn": (int,),
    "exhausted": (bool,),
    "ended": (bool,),
    "workers_persist": (bool,),
    "start": (dict, type(None)),
    "now": (dict,),
    "dataset": (object,),
    "inner": (dict, type(None)),
}


def check_state(state: Any) -> None:
    if not isinstance(state, dict) or set(state) != set(_STATE_TYPES):
        raise CorruptCheckpointError(f"{NAME}: not the state of a ResumableLoader")
    for key, types in _STATE_TYPES.items():
        if not isinstance(state[key], types) or (type(state[key]) is int and state[key] < 0 and "epoch" not in key):
            raise CorruptCheckpointError(f"{NAME}[{key!r}]: {state[key]!r} is no state of a ResumableLoader")


def check_settings(saved: Mapping[str, Any], live: Mapping[str, Any]) -> None:
    names = [*live, *(name for name in saved if name not in live)]
    changed = [name for name in names if saved.get(name) != live.get(name)]
    if changed:
        rows = "; ".join(f"{name}: saved {saved.get(name)}, live {live.get(name)}" for name in changed)
        raise IncompatibleStateError(
            f"the loader is not the one that was saved ({rows}), so its position means other data. Build it as it was, "
            "or restore the other components alone: components=[...]"
        )


def describe_sampler(sampler: Any) -> str:
    plain = {name: getattr(sampler, name, None) for name in _SAMPLER_SETTINGS}
    shown = (f"{name}={value}" for name, value in plain.items() if isinstance(value, (bool, int)))
    return f"{type(sampler).__qualname__}({', '.join(shown)})"


def length_of(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def is_stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def worker_starts_anew(inner: Mapping[str, Any]) -> bool:
    """Whether a ``StatefulDataLoader`` restores a worker's ended dataset as one that has not ended (torchdata 0.11)."""
    workers = inner.get("_snapshot", {}).get("_worker_snapshots", {}).values()
    fetchers = [worker.get("fetcher_state") or {} for worker in workers]
    return any(fetcher.get("fetcher_ended") and fetcher.get("dataset_iter_state") is None for fetcher in fetchers)


def persists(loader: DataLoader[Any]) -> bool:
    return bool(loader.persistent_workers and loader.num_workers)
