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
    "even_batches",
    "num_processes",
    "num_replicas",
    "num_samples",
    "process_index",
    "rank",
    "replacement",
    "seed",
    "shuffle",
    "split_batches",
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
_PLAIN = ("DataLoader", "StatefulDataLoader")
_OF_PREPARED: Mapping[str, tuple[type, ...]] = {"count": (int,), "before": (dict, type(None))}


def check_state(state: Any) -> None:
    if not isinstance(state, dict):
        raise CorruptCheckpointError(f"{NAME}: not the state of a ResumableLoader")
    _check_values({key: value for key, value in state.items() if key != "prepared"}, _STATE_TYPES)
    if "prepared" in state or str(state["settings"].get("loader")) not in _PLAIN:  # of accelerate, or of Fabric
        _check_values(state.get("prepared"), _OF_PREPARED)


def _check_values(values: Any, types: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(values, dict) or set(values) != set(types):
        raise CorruptCheckpointError(f"{NAME}: not the state of a ResumableLoader")
    for key, allowed in types.items():
        value = values[key]
        if not isinstance(value, allowed) or (type(value) is int and value < 0 and "epoch" not in key):
            raise CorruptCheckpointError(f"{NAME}[{key!r}]: {value!r} is no state of a ResumableLoader")


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


def type_of(loader: DataLoader[Any]) -> str:
    return "StatefulDataLoader" if is_stateful(loader) else "DataLoader"


def worker_starts_anew(inner: Mapping[str, Any]) -> bool:
    """Whether a ``StatefulDataLoader`` restores a worker's ended dataset as one that has not ended (torchdata 0.11)."""
    workers = inner.get("_snapshot", {}).get("_worker_snapshots", {}).values()
    fetchers = [worker.get("fetcher_state") or {} for worker in workers]
    return any(fetcher.get("fetcher_ended") and fetcher.get("dataset_iter_state") is None for fetcher in fetchers)


def persists(loader: DataLoader[Any]) -> bool:
    return bool(loader.persistent_workers and loader.num_workers)
