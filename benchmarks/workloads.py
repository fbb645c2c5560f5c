"""What is trained while it is measured: a model, its optimizer, and a real step."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Training:
    """One run's live objects."""

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, backward: Callable[[nn.Module], None]) -> None:
        self.model = model
        self.optimizer = make_optimizer(model)
        self.backward = backward
        """Forward and backward: leaves gradients."""
        self._make_optimizer = make_optimizer

    def step(self, guard: contextlib.AbstractContextManager[object] | None = None) -> None:
        """Train one step. ``guard`` is what a contender wants around the update."""
        self.optimizer.zero_grad(set_to_none=False)  # gradients keep their memory: steps take the same time
        self.backward(self.model)
        with guard or contextlib.nullcontext():
            self.optimizer.step()

    def update(self) -> None:
        """Change everything that a step changes but the buffers, by the gradients of the last one: quicker."""
        self.optimizer.step()

    def fresh(self) -> Training:
        """What a new process would restore into: other objects, other values, no optimizer state; memory touched."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(1)
                if isinstance(tensor, nn.Parameter):
                    tensor.grad = None
        return Training(model, self._make_optimizer, self.backward)


@dataclass(frozen=True)
class Workload:
    """A named training run."""

    name: str
    title: str
    build: Callable[[float], Training]
    """From the scale: 1 is the size of the title, and bytes go with it."""
    successive: int = 0
    """How many checkpoints are saved one after another, to see what they take on disk."""


# ------------------------------------------------------------------------------------------------------------- GPT


class Block(nn.Module):
    """Attention and a feed-forward layer, each with its norm before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = max(1, width // 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same."""
        batch, time, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        y: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y


class GPT(nn.Module):
    """GPT-2 of 124M parameters at width 768. The head is the embedding, by use and not by a second name."""

    def __init__(self, width: int, vocabulary: int, layers: int = 12, context: int = 1024) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, time) of token ids to logits (batch, time, vocabulary)."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


def _language_model(scale: float) -> tuple[GPT, Callable[[nn.Module], None]]:
    """Width and vocabulary grow with the root of the scale, so that the parameters grow with the scale."""
    root = math.sqrt(scale)
    width = max(64, 64 * round(768 * root / 64)) if scale < 1 else 64 * round(12 * root)
    vocabulary = max(64, round(50257 * scale * 768 / width))
    model = GPT(width, vocabulary)
    ids = torch.randint(vocabulary, (1, 33))

    def backward(live: nn.Module) -> None:
        logits = live(ids[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()

    return model, backward


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_trained(model), lr=1e-5)


def gpt(scale: float) -> Training:
    """Model and both moments of AdamW in fp32: 1.5 GB at scale 1."""
    model, backward = _language_model(scale)
    return Training(model, _adamw, backward)


# ------------------------------------------------------------------------------------------------------------ LoRA


class LoRA(nn.Module):
    """A frozen linear layer and a low-rank correction that is trained."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that it wraps."""
        y: torch.Tensor = self.base(x) + functional.linear(functional.linear(x, self.down), self.up)
        return y


def lora(scale: float) -> Training:
    """The language model frozen, with corrections of rank 8 to its attention."""
    model, backward = _language_model(scale)
    model.requires_grad_(requires_grad=False)
    for block in model.blocks:
        assert isinstance(block, Block)
        block.qkv = LoRA(block.qkv)  # type: ignore[assignment]
        block.projection = LoRA(block.projection)  # type: ignore[assignment]
    return Training(model, _adamw, backward)


# --------------------------------------------------------------------------------------------------- many tensors


class Bag(nn.Module):
    """Nothing but parameters."""

    def __init__(self, count: int, length: int) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.randn(length)) for _ in range(count))


def _bag(scale: float, tensors: int) -> Training:
    """``tensors`` of them, half parameters and half momentum; 160 MiB in all at scale 1."""
    model = Bag(tensors // 2, max(1, round(scale * 4096 * 10_000 / tensors)))

    def backward(live: nn.Module) -> None:
        parameters: list[torch.Tensor] = list(live.parameters())
        for parameter, gradient in zip(parameters, torch._foreach_mul(parameters, 1e-3), strict=True):  # noqa: SLF001
            parameter.grad = gradient.detach()

    return Training(model, lambda live: torch.optim.SGD(live.parameters(), lr=0.1, momentum=0.9), backward)


# --------------------------------------------------------------------------------------------------------- ConvNet


class Residual(nn.Module):
    """Two convolutions with batch normalization, and the way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, inputs, h, w) to (batch, outputs, h / stride, w / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.around(x))


def convnet(scale: float) -> Training:
    """Eleven million parameters at scale 1, like ResNet-18; its forward pass changes the running statistics."""
    width = max(4, round(64 * math.sqrt(scale)))
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width, 8 * width, 8 * width]
    blocks = [Residual(a, b, 1 if a == b else 2) for a, b in zip([width, *widths], widths, strict=False)]
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)]
    model = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), *blocks, *head)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))

    def backward(live: nn.Module) -> None:
        functional.cross_entropy(live(images), labels).backward()

    return Training(model, lambda live: torch.optim.SGD(live.parameters(), lr=1e-3, momentum=0.9), backward)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("gpt", "GPT, 124M parameters in fp32, AdamW", gpt),
        Workload("small", "10,000 small tensors, SGD with momentum", lambda scale: _bag(scale, 10_000)),
        Workload("large", "the same bytes in 100 tensors", lambda scale: _bag(scale, 100)),
        Workload("lora", "the GPT frozen, with LoRA of rank 8", lora, successive=20),
        Workload("convnet", "ConvNet with batch normalization, SGD with momentum", convnet),
    )
}
