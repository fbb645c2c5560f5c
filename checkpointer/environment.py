"""What a checkpoint was written with: recorded in the manifest, compared by a restore."""

from __future__ import annotations

import platform
import socket
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch

from checkpointer.index import Json
from checkpointer.version import __version__

_COMPARED = {"torch": "another version of torch", "numpy": "another version of numpy", "devices": "other devices"}


def environment() -> dict[str, Json]:
    """Versions, platform, host and devices of this process."""
    return {
        "checkpointer": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": f"{sys.platform}-{platform.machine()}",
        "host": socket.gethostname(),
        "devices": list(_devices()),
    }


def differences(saved: Mapping[str, Json], live: Mapping[str, Json]) -> list[str]:
    """Sentences on what makes bit-identical continuation impossible here."""
    return [
        f"{what}: saved with {saved[name]}, running with {live.get(name)}"
        for name, what in _COMPARED.items()
        if name in saved and saved[name] != live.get(name)
    ]


def _devices() -> Iterator[str]:
    if torch.cuda.is_available():
        yield from (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    elif torch.backends.mps.is_available():
        yield "mps"
    else:
        yield "cpu"
