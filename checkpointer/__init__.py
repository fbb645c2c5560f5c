"""checkpointer: exact, crash-proof training-resume checkpoints for PyTorch.

Names are imported when they are first used, so that ``import checkpointer`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from checkpointer.version import __version__

if TYPE_CHECKING:
    from checkpointer import data, dcp, errors, migration, retention, testing
    from checkpointer.config import Config
    from checkpointer.format.info import CheckpointInfo
    from checkpointer.manager import CheckpointManager
    from checkpointer.restore.report import Restored
    from checkpointer.restore.whole_model import load_whole_model
    from checkpointer.save.handle import PendingSave
    from checkpointer.state import Gradients, ModuleComponent, Stateful, WholeModel, register_codec

_HOMES = {
    "CheckpointInfo": "checkpointer.format.info",
    "CheckpointManager": "checkpointer.manager",
    "Config": "checkpointer.config",
    "Gradients": "checkpointer.state",
    "ModuleComponent": "checkpointer.state",
    "PendingSave": "checkpointer.save.saver",
    "Restored": "checkpointer.restore.restored",
    "Stateful": "checkpointer.state",
    "WholeModel": "checkpointer.state",
    "load_whole_model": "checkpointer.restore.whole_model",
    "register_codec": "checkpointer.state",
}
_MODULES = ("data", "dcp", "errors", "migration", "retention", "testing")


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(f"checkpointer.{name}")
    else:
        raise AttributeError(f"module 'checkpointer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "CheckpointInfo",
    "CheckpointManager",
    "Config",
    "Gradients",
    "ModuleComponent",
    "PendingSave",
    "Restored",
    "Stateful",
    "WholeModel",
    "__version__",
    "data",
    "dcp",
    "errors",
    "load_whole_model",
    "migration",
    "register_codec",
    "retention",
    "testing",
]
