"""What a script has given an optimizer, beside what training has made of it: a learning rate that the loop sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from checkpointer.errors import CheckpointerError, CorruptCheckpointError
from checkpointer.format.index import Json
from checkpointer.state.protocol import RestoreOptions
from checkpointer.state.settings import group_key, moved_since, settings_of_group
from checkpointer.state.tree.decode import decode
from checkpointer.state.tree.encode import encode

GIVEN = "given"
"""The member of an optimizer's meta that lists, by group, settings that were given and are others now."""


class Given:
    """The settings of each group as they were when the optimizer became a component: the script's own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] = []
        self._same: list[dict[str, Any]] = []
        """The live objects of each group that are as given."""
        self._look()

    def _look(self) -> None:
        """Groups that were added since are taken as they are now."""
        groups = self._optimizer.param_groups
        new = groups[len(self._groups) :]
        self._groups = [*self._groups[: len(groups)], *map(settings_of_group, new)]
        self._same = [*self._same[: len(groups)], *({} for _ in new)]

    def meta(self) -> dict[str, Json]:
        """The member of the meta; none where nothing has moved."""
        self._look()
        rows = zip(self._groups, self._optimizer.param_groups, self._same, strict=True)
        moved = [moved_since(*row) for row in rows]
        return {GIVEN: encode(moved, GIVEN)[0]} if any(moved) else {}

    def of(self, number: int) -> dict[str, Any]:
        """Those of one group."""
        self._look()
        return self._groups[number]

    def restored(self, component: str, number: int, saved: Mapping[str, Any], options: RestoreOptions) -> None:
        """From now on a group has the settings of the script that ``saved`` is of, but those that stay."""
        taken = {key: value for key, value in saved.items() if not options.ignored(component, group_key(number, key))}
        self._groups[number] = {**self._groups[number], **taken}
        self._same[number] = {}


def saved_given(name: str, meta: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """What :meth:`Given.meta` has recorded, for each of ``count`` groups. Raises :class:`CorruptCheckpointError`."""
    if GIVEN not in meta:
        return [{} for _ in range(count)]
    try:
        found = decode(meta[GIVEN], {}, place=name)
    except CheckpointerError as error:
        raise CorruptCheckpointError(f"{name}: the settings that were given are not well formed: {error}") from error
    if type(found) is not list or len(found) != count or not all(type(group) is dict for group in found):
        raise CorruptCheckpointError(f"{name}: the settings that were given are not well formed")
    return found
