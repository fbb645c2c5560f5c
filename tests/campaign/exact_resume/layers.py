"""Every layer of ``torch.nn`` that has running state or draws random numbers, and everything that rewrites weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.campaign.exact_resume.runs import Case, Run, noise, train

EXCLUDED = {
    "SyncBatchNorm": "trains on accelerators alone, in a process group",
    "RNNBase": "the base class of RNN, LSTM and GRU",
    "RNNCellBase": "the base class of the cells",
}


def classes() -> dict[str, type[nn.Module]]:
    """Every layer of torch with running statistics, its own random numbers, or a hidden state."""
    families = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd, nn.RNNBase, nn.RNNCellBase)
    found = {name: cls for name, cls in vars(nn).items() if inspect.isclass(cls) and issubclass(cls, nn.Module)}
    return {name: cls for name, cls in found.items() if issubclass(cls, families) or name == "RReLU"}


def parametrization_names() -> set[str]:
    """Every function of ``torch.nn.utils.parametrizations``."""
    functions = vars(parametrizations).items()
    return {name for name, it in functions if inspect.isfunction(it) and it.__module__ == parametrizations.__name__} - {
        name for name, _ in functions if name.startswith("_")
    }


def cases() -> Iterator[Case]:
    """One case for each layer and each way to rewrite a weight."""
    for name, cls in classes().items():
        if name in EXCLUDED:
            continue
        yield Case(name, "layers", partial(_make, cls, {}))
        if issubclass(cls, nn.modules.batchnorm._NormBase):
            yield Case(f"{name}(momentum=None)", "layers", partial(_make, cls, {"momentum": None}), long=True)
            yield Case(f"{name} frozen in mid-run", "layers", partial(_make, cls, {}, frozen=True), long=True)
        elif issubclass(cls, nn.RNNBase):
            options = {"num_layers": 2, "dropout": 0.3, "bidirectional": True}
            yield Case(f"{name} of two layers", "layers", partial(_make, cls, options))
    for name, rewrite in REWRITES.items():
        yield Case(name, "layers", partial(_rewritten, rewrite))


def _make(cls: type[nn.Module], options: dict[str, Any], *, frozen: bool = False) -> Run:
    name = cls.__name__
    if issubclass(cls, nn.modules.batchnorm._NormBase):
        settings: dict[str, Any] = {"track_running_stats": True, "affine": True, **options}
        layer = cls(**settings) if "Lazy" in name else cls(3, **settings)
    elif issubclass(cls, (nn.RNNBase, nn.RNNCellBase)):
        layer = cls(5, 4, **options)
    else:
        layer = cls(**options)
    shape = (4, 3, 5) if isinstance(layer, (nn.RNNBase, nn.modules.dropout._DropoutNd)) else (4, 5)
    if isinstance(layer, nn.modules.batchnorm._NormBase) or name[-2:] in ("1d", "2d", "3d"):
        shape = (4, 3, *(4,) * int(name[-2])) if name != "SyncBatchNorm" else shape
    model = nn.Sequential(layer if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) else _Between(layer, shape[-1]))
    if "Lazy" in name:
        model(noise(*shape))  # the shapes are known from here on

    def freeze(number: int) -> None:
        if frozen and number == 1:
            model.eval()

    return train(
        model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), lambda: noise(*shape), before=freeze
    )


class _Between(nn.Module):
    """A layer between two that learn."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(width, width), layer, nn.Linear(width, 2)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.after(self.layer(self.before(data)))
        return output


class _Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


def _parametrized(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(parametrizations, name)(nn.Linear(4, 4))  # type: ignore[no-any-return]


def _pruned() -> nn.Module:
    model: nn.Module = prune.random_unstructured(nn.Linear(4, 4), "weight", 0.4)
    return model


def _symmetric() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(4, 4), "weight", _Symmetric())


REWRITES: dict[str, Callable[[], nn.Module]] = {
    **{f"parametrizations.{name}": _parametrized(name) for name in sorted(parametrization_names())},
    "utils.spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "utils.weight_norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "prune": _pruned,
    "a parametrization of one's own": _symmetric,
    "Embedding(max_norm)": lambda: _Rows(nn.Embedding(6, 4, max_norm=0.5)),
    "Embedding(scale_grad_by_freq)": lambda: _Rows(nn.Embedding(6, 4, scale_grad_by_freq=True)),
    "EmbeddingBag(max_norm)": lambda: _Rows(nn.EmbeddingBag(6, 4, max_norm=0.5)),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True),
}


class _Rows(nn.Module):
    """Looks rows up: numbers as a batch, rows of a table as output."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.table((data * 100).long().abs() % 6)
        return output


def _rewritten(rewrite: Callable[[], nn.Module]) -> Run:
    model = nn.Sequential(rewrite(), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    return train(model, optimizer, lambda: noise(3, 5, 4)[..., 0 if isinstance(model[0], _Rows) else slice(None)])
