"""The configuration: what the YAML file says, checked.

Pure but for reading the file. Every error is a :class:`ConfigError` that names the key (``keep.best[0].mode``) and,
for a file, starts with ``path:line:``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from typing import Any, Literal, TypeAlias, TypeVar

from checkpointer.errors import ConfigError
from checkpointer.policy.retention import KeepPolicy
from checkpointer.policy.schedule import SavePolicy
from checkpointer.policy.values import (
    FieldError,
    boolean,
    choice,
    count,
    duration,
    format_duration,
    format_fraction,
    format_size,
    refuse_unknown,
    shown,
)

Mode: TypeAlias = Literal["sync", "async", "lazy"]
Verify: TypeAlias = Literal["stream", "before", "off"]
OnFull: TypeAlias = Literal["error", "prune", "skip"]
_Policy = TypeVar("_Policy")


@dataclass(frozen=True, kw_only=True)
class WritePolicy:
    """How a checkpoint is written. Wrong values raise :class:`ConfigError`."""

    __module__ = "checkpointer"

    mode: Mode = "async"
    """``"sync"``: ``save`` returns when the checkpoint is durable. ``"async"``: it returns once the state is staged.
    ``"lazy"``: it returns at once; parameters and optimizer state are written from live memory, and what is not written
    by the next ``Optimizer.step`` is copied before it."""
    durable: bool = True
    """Whether files and directories are fsynced before the commit. ``False`` only for throw-away runs."""
    share: int | Literal[False] = 8
    """At most how many consecutive checkpoints one physical copy of an unchanged file serves; ``False``: no sharing."""

    threads: int = 2
    """Threads that copy, hash and write. More may be faster; 1 leaves more of the processor to training."""
    on_full: OnFull = "error"
    """Where there is no room for a save. ``"error"``: it fails. ``"prune"``: what retention lets go already is removed,
    then it is tried once more. ``"skip"``: it is left out with a warning, and training goes on."""

    rank_timeout: timedelta | str = timedelta(minutes=30)
    """With several ranks: how long one waits for the others, the writing of their files included, before the save (or
    the restore) fails with an error that names those that are missing."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a value that makes no sense."""
        choice("mode", self.mode, ("sync", "async", "lazy"))
        boolean("durable", self.durable)
        if self.share is not False:
            count("share", self.share, instead="write false to share nothing")
        count("threads", self.threads, instead="write 1, the fewest there can be")
        choice("on_full", self.on_full, ("error", "prune", "skip"))
        object.__setattr__(self, "rank_timeout", self.wait)

    @property
    def wait(self) -> timedelta:
        """``rank_timeout`` as a duration."""
        return duration("rank_timeout", self.rank_timeout)


@dataclass(frozen=True, kw_only=True)
class RestorePolicy:
    """How a checkpoint is read. Wrong values raise :class:`ConfigError`."""

    __module__ = "checkpointer"

    verify: Verify = "stream"
    """``"stream"``: hashes are checked while reading. ``"before"``: all of them before any live object is touched.
    ``"off"``: not at all; ``False``, which is what YAML makes of ``off`` without quotes, means the same."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a value that makes no sense."""
        verify: object = self.verify
        if verify is False:
            object.__setattr__(self, "verify", "off")
        else:
            choice("verify", verify, ("stream", "before", "off"))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration. ``Config()`` holds the defaults: each call saves, and everything is kept."""

    __module__ = "checkpointer"

    save: SavePolicy = field(default_factory=SavePolicy)
    """When a save is due."""
    keep: KeepPolicy = field(default_factory=KeepPolicy)
    """Which checkpoints retention keeps."""
    write: WritePolicy = field(default_factory=WritePolicy)
    """How a checkpoint is written."""
    restore: RestorePolicy = field(default_factory=RestorePolicy)
    """How a checkpoint is read."""
    require_resume: bool = True
    """Whether the first save is refused where the run root holds checkpoints that were not restored."""

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for a value of the wrong type."""
        for name, policy in _SECTIONS.items():
            value = getattr(self, name)
            if not isinstance(value, policy):
                raise FieldError(
                    (name,),
                    f"must be a {policy.__name__}, got {shown(value)}; Config.from_mapping takes plain mappings",
                )
        boolean("require_resume", self.require_resume)
        if self.save.on_metric and not self.keep.best:
            raise FieldError(
                ("save", "on_metric"), "has no metric to go by: add keep: {best: {monitor: val_loss, mode: min}}"
            )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Config:
        """Read a YAML file (UTF-8). An empty one gives the defaults.

        Raises :class:`ConfigError`, starting with ``path:line:``, for a file that cannot be read, is not plain YAML,
        or holds an unknown key or a value that makes no sense.
        """
        from checkpointer.config.yaml_file import read_yaml  # PyYAML's 50 ms are for those who have a file

        file = read_yaml(path)
        try:
            return cls.from_mapping({} if file.data is None else file.data)
        except FieldError as error:
            raise ConfigError(f"{file.where(error.key)}: {error}") from None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Config:
        """Take the configuration as a mapping of plain values, as YAML holds it; policy objects are welcome too.

        A section that is missing or ``None`` has its defaults. Raises :class:`ConfigError` for an unknown key or a
        value that makes no sense.
        """
        given: object = mapping
        known = [item.name for item in fields(cls)]
        if not isinstance(given, Mapping):
            raise FieldError((), f"the configuration must be a mapping of {', '.join(known)}; got {shown(given)}")
        refuse_unknown(given, known)
        values = dict(given)
        sections: dict[str, Any] = {
            name: _section(policy, name, values.pop(name, None)) for name, policy in _SECTIONS.items()
        }
        return cls(**sections, **values)

    def to_yaml(self) -> str:
        """YAML text with every key, durations and sizes with units, that reads back as an equal configuration."""
        import yaml  # late, as in from_yaml

        return str(yaml.safe_dump(plain("", self), sort_keys=False, allow_unicode=True))


_SECTIONS: Mapping[str, type] = {
    "save": SavePolicy,
    "keep": KeepPolicy,
    "write": WritePolicy,
    "restore": RestorePolicy,
}


def load_config(config: object) -> Config:
    """What users pass as ``config``: a path, a mapping, a :class:`Config`, or ``None`` for the defaults."""
    if config is None:
        return Config()
    if isinstance(config, Config):
        return config
    if isinstance(config, Mapping):
        return Config.from_mapping(dict(config))
    if isinstance(config, (str, os.PathLike)):
        return Config.from_yaml(config)
    raise ConfigError(f"config must be a path, a mapping, a Config or None, got {type(config).__name__}")


def _section(policy: type[_Policy], name: str, value: object) -> _Policy:
    """One section as its policy; ``None``, a section whose keys are all commented out, has the defaults."""
    if value is None:
        return policy()
    if isinstance(value, policy):
        return value
    known = [item.name for item in fields(policy)]  # type: ignore[arg-type]  # every policy is a dataclass
    if not isinstance(value, Mapping):
        raise FieldError((name,), f"must be a mapping of {', '.join(known)}, got {shown(value)}")
    try:
        refuse_unknown(value, known)
        return policy(**value)
    except FieldError as error:
        raise error.under(name) from None


def plain(name: str, value: Any) -> Any:
    """``value`` as YAML holds it."""
    if is_dataclass(value):
        return {item.name: plain(item.name, getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple):
        return [plain(name, item) for item in value] or None
    if isinstance(value, timedelta):
        return format_duration(value)
    if name == "max_size" and value is not None:
        return format_size(value)
    if name == "max_overhead" and value is not None:
        return format_fraction(value)
    return value


__all__ = ["Config", "KeepPolicy", "RestorePolicy", "SavePolicy", "WritePolicy"]
