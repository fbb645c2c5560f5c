"""Every error and warning that this package raises on purpose.

All errors share :class:`CheckpointerError`; each is also the builtin that a caller would expect, so
``except FileNotFoundError`` keeps working. A message says what happened, where, and what to do next.

```
CheckpointerError
├── ConfigError (ValueError)                 the configuration or an argument makes no sense
├── CheckpointNotFoundError (FileNotFoundError)   no such checkpoint
├── CorruptCheckpointError (OSError)         bytes on disk are not the bytes that were written
├── UnreadableCheckpointError (OSError)      the system does not let it be read; nothing says that it is damaged
├── FormatVersionError (OSError)             written by a newer version of the format
├── IncompatibleStateError (ValueError)      the checkpoint does not fit the live objects
├── UnsupportedStateError (TypeError)        a value that cannot be stored without pickle
├── StepOrderError (ValueError)              a step below the tip
├── RunLockedError (OSError)                 another process writes to this run
├── RunNotEmptyError (OSError)               the run root holds checkpoints that were not restored
└── SaveError (OSError)                      a save failed; older checkpoints are untouched
```
"""

from __future__ import annotations


class CheckpointerError(Exception):
    """Base of every error of this package."""

    __module__ = "checkpointer"


class ConfigError(CheckpointerError, ValueError):
    """The configuration, or an argument of the manager, makes no sense."""

    __module__ = "checkpointer"


class CheckpointNotFoundError(CheckpointerError, FileNotFoundError):
    """The checkpoint that was asked for does not exist."""

    __module__ = "checkpointer"


class CorruptCheckpointError(CheckpointerError, OSError):
    """The bytes on disk are not the bytes that were written, or were never a valid checkpoint."""

    __module__ = "checkpointer"


class UnreadableCheckpointError(CheckpointerError, OSError):
    """The system does not let a checkpoint, or the run root, be read; nothing says that it is damaged.

    Permissions, a stale handle, a disk that is not mounted: it may be readable again once the cause is gone.
    """

    __module__ = "checkpointer"


class FormatVersionError(CheckpointerError, OSError):
    """The checkpoint was written in a newer version of the format than this library reads."""

    __module__ = "checkpointer"


class IncompatibleStateError(CheckpointerError, ValueError):
    """The checkpoint is intact but does not fit the live objects; nothing was changed."""

    __module__ = "checkpointer"


class UnsupportedStateError(CheckpointerError, TypeError):
    """The state holds a value that cannot be stored without pickle; the message names its key path."""

    __module__ = "checkpointer"


class StepOrderError(CheckpointerError, ValueError):
    """A step below the newest checkpoint of this branch was saved."""

    __module__ = "checkpointer"


class RunLockedError(CheckpointerError, OSError):
    """Another process, or another manager of this one, holds the writer's lock of the run root."""

    __module__ = "checkpointer"


class RunNotEmptyError(CheckpointerError, OSError):
    """The run root holds checkpoints that this manager did not restore from."""

    __module__ = "checkpointer"


class SaveError(CheckpointerError, OSError):
    """A save failed. Whatever was committed before it is untouched."""

    __module__ = "checkpointer"


class CheckpointerWarning(UserWarning):
    """Something worth a look that loses nothing: a skipped checkpoint, a file left alone, a missing lock."""

    __module__ = "checkpointer"


__all__ = [
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
]
