"""Modules that other processes import by name."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Tied weights, a buffer of each kind, a plain tensor, a frozen parameter, and Python state."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)
        self.cache = torch.arange(3.0)
        self.norm.bias.requires_grad_(False)
        self.history = [1, 2]

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens).mean(1)) * self.scale)


class Hooked(nn.Linear):
    """Takes part in its own loading, so its tensors stay in the pickle."""

    def __init__(self):
        super().__init__(2, 2)
        self.loaded = 0

    def _load_from_state_dict(self, *arguments):
        self.loaded += 1
        super()._load_from_state_dict(*arguments)
