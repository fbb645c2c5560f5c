"""checkpointer: exact, crash-proof training-resume checkpoints for PyTorch.

Everything that a public call takes, returns or raises can be imported from here. Names are imported when they are first
used, so that ``import checkpointer`` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from checkpointer.version import __version__

if TYPE_CHECKING:
    from checkpointer import data, dcp, errors, migration, retention, testing
    from checkpointer.config import Config, RestorePolicy, WritePolicy
    from checkpointer.errors import (
        CheckpointerError,
        CheckpointerWarning,
        CheckpointNotFoundError,
        ConfigError,
        CorruptCheckpointError,
        FormatVersionError,
        IncompatibleStateError,
        RunLockedError,
        RunNotEmptyError,
        SaveError,
        StepOrderError,
        UnreadableCheckpointError,
        UnsupportedStateError,
    )
    from checkpointer.format.event import Event
    from checkpointer.format.info import CheckpointInfo
    from checkpointer.manager import CheckpointManager
    from checkpointer.policy.retention import BestRule, KeepPolicy, RetentionPlan
    from checkpointer.policy.schedule import SavePolicy
    from checkpointer.repository.verify import CheckpointReport, VerifyReport
    from checkpointer.restore.report import Restored, RestoreReport, Skipped
    from checkpointer.restore.whole_model import load_whole_model
    from checkpointer.save.handle import PendingSave
    from checkpointer.state import Gradients, ModuleComponent, Stateful, WholeModel, register_codec
    from checkpointer.state.protocol import ComponentReport

_MODULES = ("data", "dcp", "errors", "migration", "retention", "testing")
_HOMES = {
    "checkpointer.config": (
        "Config",
        "RestorePolicy",
        "WritePolicy",
    ),
    "checkpointer.errors": (
        "CheckpointNotFoundError",
        "CheckpointerError",
        "CheckpointerWarning",
        "ConfigError",
        "CorruptCheckpointError",
        "FormatVersionError",
        "IncompatibleStateError",
        "RunLockedError",
        "RunNotEmptyError",
        "SaveError",
        "StepOrderError",
        "UnreadableCheckpointError",
        "UnsupportedStateError",
    ),
    "checkpointer.format.event": ("Event",),
    "checkpointer.format.info": ("CheckpointInfo",),
    "checkpointer.manager": ("CheckpointManager",),
    "checkpointer.policy.retention": (
        "BestRule",
        "KeepPolicy",
        "RetentionPlan",
    ),
    "checkpointer.policy.schedule": ("SavePolicy",),
    "checkpointer.repository.verify": (
        "CheckpointReport",
        "VerifyReport",
    ),
    "checkpointer.restore.report": (
        "RestoreReport",
        "Restored",
        "Skipped",
    ),
    "checkpointer.restore.whole_model": ("load_whole_model",),
    "checkpointer.save.handle": ("PendingSave",),
    "checkpointer.state": (
        "Gradients",
        "ModuleComponent",
        "Stateful",
        "WholeModel",
        "register_codec",
    ),
    "checkpointer.state.protocol": ("ComponentReport",),
}
"""Where public names are defined. Each class says ``__module__ = "checkpointer"``, so that pickles outlive a move."""
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        value: object = getattr(import_module(_HOME_OF[name]), name)
    elif name in _MODULES:
        value = import_module(f"checkpointer.{name}")
    else:
        raise AttributeError(f"module 'checkpointer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "BestRule",
    "CheckpointInfo",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointReport",
    "CheckpointerError",
    "CheckpointerWarning",
    "ComponentReport",
    "Config",
    "ConfigError",
    "CorruptCheckpointError",
    "Event",
    "FormatVersionError",
    "Gradients",
    "IncompatibleStateError",
    "KeepPolicy",
    "ModuleComponent",
    "PendingSave",
    "RestorePolicy",
    "RestoreReport",
    "Restored",
    "RetentionPlan",
    "RunLockedError",
    "RunNotEmptyError",
    "SaveError",
    "SavePolicy",
    "Skipped",
    "Stateful",
    "StepOrderError",
    "UnreadableCheckpointError",
    "UnsupportedStateError",
    "VerifyReport",
    "WholeModel",
    "WritePolicy",
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
