"""torchvision, whichever build of it is installed, also one whose compiled operators do not fit this torch.

``import_resnet()`` gives its ``resnet`` module; ``make_importable()`` lets other libraries import it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from typing import Any

import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # kept, or the declarations go with it


@functools.cache
def make_importable() -> None:
    """See to it that ``import torchvision`` works, if it is installed. ``transformers`` imports it too.

    PyPI's build is for CUDA. Beside a CPU build of torch its compiled operators cannot be loaded, and then its import
    fails at the first of them, which detection needs and classifiers do not: a declaration without a body is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its image decoders, which may not load either
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # operator torchvision::nms does not exist
            _declare_operators()
            importlib.import_module("torchvision")


def import_resnet() -> Any:
    """``torchvision.models.resnet``. Raises :class:`ImportError`, with what to do, where it is not installed."""
    make_importable()
    try:
        return importlib.import_module("torchvision.models.resnet")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}. What is tested here is a real ResNet of torchvision; install the one that was made for this "
            f'torch: pip install torchvision "torch=={torch.__version__}"'
        ) from error


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _OPERATORS:
        library.define(schema)
    _declared.append(library)
