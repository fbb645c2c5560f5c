"""Random numbers of an item that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from checkpointer.state.modes import outside_inference_mode

T = TypeVar("T")


class SeededDataset(Dataset[T]):
    """A map-style dataset whose items draw the same random numbers for the same (seed, epoch, index).

    While an item is made, the global generators of Python, NumPy and torch (CPU) are seeded from the three; afterwards
    they are as they were. So a random transform gives the same item in every process, after any resume, with any number
    of workers. Generators that the transform owns are not reached. Batched reading (``__getitems__``) is not used, as
    each item has a seed of its own.

    A :class:`ResumableLoader` sets the epoch: the number given to ``loader.set_epoch``, else it counts them from 0.
    Without one call :meth:`set_epoch`, or every epoch gives the same items.
    """

    def __init__(self, dataset: Dataset[T], *, seed: int = 0) -> None:
        """``seed``: any integer; another one gives other random numbers."""
        self._dataset = dataset
        self._seed = operator.index(seed)
        with outside_inference_mode():
            epoch = torch.zeros((), dtype=torch.int64, device="cpu")
        self._epoch = epoch.share_memory_()  # persistent workers see it change

    def __getitem__(self, index: Any) -> T:
        with _seeded_generators(self._seed, int(self._epoch), index):
            return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type] # as for every map-style dataset

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_dataset", "__getitems__"):
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def set_epoch(self, epoch: int) -> None:
        """Make the items of another epoch."""
        self._epoch.fill_(operator.index(epoch))

    def follow(self, epoch: torch.Tensor) -> None:
        """Read the epoch from ``epoch``, a shared int64 scalar, from now on: how a loader tells its workers."""
        self._epoch = epoch


def seeded(dataset: Dataset[T], *, seed: int = 0) -> SeededDataset[T]:
    """``dataset`` with random numbers that depend on (seed, epoch, index) alone; see :class:`SeededDataset`."""
    return SeededDataset(dataset, seed=seed)


@contextmanager
def _seeded_generators(seed: int, epoch: int, index: Any) -> Iterator[None]:
    """Seed the global generators, and put them back."""
    key: object
    try:
        key = operator.index(index)
    except TypeError:
        key = repr(index)
    digest = hashlib.blake2b(repr((seed, epoch, key)).encode(), digest_size=24).digest()
    python, default = random.getstate(), torch.get_rng_state()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - transforms draw from the global one
    try:
        random.seed(digest[:8])
        np.random.seed(np.frombuffer(digest[8:16], dtype="<u4"))  # noqa: NPY002
        torch.default_generator.manual_seed(int.from_bytes(digest[16:], "little") >> 1)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(default)


def seeded_datasets(dataset: Any) -> list[SeededDataset[Any]]:
    """Every seeded dataset inside ``dataset``: through Subset, ConcatDataset and what is built like them."""
    if isinstance(dataset, SeededDataset):
        return [dataset]
    attributes = getattr(dataset, "__dict__", {})
    inner = [attributes["dataset"]] if "dataset" in attributes else attributes.get("datasets", ())
    return [found for item in inner for found in seeded_datasets(item)] if isinstance(inner, (list, tuple)) else []
