"""The rules that a manifest holds: those of the configuration, and what is made of them later. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from checkpointer.config.settings import Config, plain
from checkpointer.errors import ConfigError
from checkpointer.policy.retention import KeepPolicy


@dataclass(frozen=True)
class SavedKeep:
    """The ``keep`` rules of a manifest."""

    keep: KeepPolicy | None
    """``None`` where it holds none, or none that can be used."""
    problem: str | None = None
    """Why they cannot be used, in one sentence."""


def rules_of(config: Config) -> dict[str, dict[str, Any]]:
    """The ``save`` and ``keep`` rules of a configuration as YAML spells them, only what is set.

    Both sections are always there: that nothing is set is known, too, and means that everything is kept.
    """
    return {name: _set_of(getattr(config, name)) for name in ("save", "keep")}


def saved_keep(rules: Mapping[str, object], where: str) -> SavedKeep:
    """The ``keep`` rules that a manifest holds as :func:`rules_of`; ``where`` names its checkpoint.

    Anybody may have written them, so they are read as strictly as a configuration: one unknown rule, of a newer version
    perhaps, and none of them counts, for the others alone may keep less.
    """
    if "keep" not in rules:
        return SavedKeep(None)
    try:
        return SavedKeep(Config.from_mapping({"keep": rules["keep"]}).keep)
    except ConfigError as error:
        return SavedKeep(None, f"the rules that {where} was saved with cannot be used: {error}")


def keep_text(policy: KeepPolicy) -> str:
    """The rules as one line of YAML: ``keep: {last: 3}``."""
    import yaml  # 50 ms, which only those spend who print rules

    text = yaml.safe_dump(_set_of(policy), default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return f"keep: {text.strip()}"


def _set_of(policy: object) -> dict[str, Any]:
    return {name: value for name, value in plain("", policy).items() if value is not None and value is not False}


__all__ = ["SavedKeep", "keep_text", "rules_of", "saved_keep"]
