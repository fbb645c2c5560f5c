"""What the user says: the configuration file and the arguments of calls."""

from __future__ import annotations

from checkpointer.config.settings import Config, RestorePolicy, WritePolicy

__all__ = ["Config", "RestorePolicy", "WritePolicy"]
