"""A small vision transformer in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that everybody gives it

SIDE = 28
PATCH = 7
CLASSES = 10


class VisionTransformer(nn.Module):
    """Logits ``[batch, 10]`` of images ``[batch, 1, 28, 28]``, which it sees as 16 patches of 7 x 7 pixels."""

    def __init__(self, width: int = 80, depth: int = 2, heads: int = 4, dropout: float = 0.05) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=PATCH, stride=PATCH)
        self.position = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.embed(images).flatten(2).transpose(1, 2)
        tokens = self.blocks(tokens + self.position)
        logits: Tensor = self.head(self.norm(tokens.mean(dim=1)))
        return logits


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each normalized before and added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        attended: Tensor = tokens + self.dropout(self._attend(self.attention_norm(tokens)))
        perceived: Tensor = self.dropout(self.mlp(attended))
        return attended + perceived

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        parts = self.query_key_value(tokens).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width of a head]
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out
