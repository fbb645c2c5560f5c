"""A model with its architecture, made anew from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from checkpointer.errors import CheckpointNotFoundError, ConfigError
from checkpointer.repository.repository import Repository
from checkpointer.restore.request import RestoreRequest
from checkpointer.restore.restorer import Restorer
from checkpointer.state import RestoreOptions, WholeModelLoader
from checkpointer.state.protocol import MapLocation
from checkpointer.storage import open_storage


def load_whole_model(
    root: str | os.PathLike[str],
    step: int | None = None,
    *,
    component: str = "model",
    trust_pickle: bool = False,
    map_location: MapLocation = "cpu",
    storage_options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Make and fill a module that was saved as :class:`checkpointer.WholeModel`. **Runs code from the checkpoint.**

    Args:
        root: directory or fsspec URL that holds the run's checkpoints.
        step: which checkpoint; the newest that is whole, if ``None``.
        component: the name that the model was registered under.
        trust_pickle: must be ``True``: whoever could write to ``root`` runs code in this process.
        map_location: device of the module.
        storage_options: handed to fsspec.

    Raises:
        ConfigError: ``trust_pickle`` is not ``True``; nothing was read.
        CheckpointNotFoundError: there is no such checkpoint.
        CorruptCheckpointError: it is damaged; found before anything in it is run.
        IncompatibleStateError: it holds no such component, or one without its architecture, or one that cannot be
            loaded here.
    """
    repository = Repository(open_storage(root, storage_options))
    if trust_pickle is not True:
        raise ConfigError(
            f"a whole model is a pickle or an exported program, and loading either runs whatever code it holds. Pass "
            f"trust_pickle=True if you trust everybody who could write to {repository.url}. To restore the weights "
            "alone, which runs nothing, build the model and use CheckpointManager(root, read_only=True, model=model)"
        )
    loader = WholeModelLoader(component)
    options = RestoreOptions(map_location=map_location, partial=True)
    request = RestoreRequest((component,), options, verify="stream", read_only=True)
    restorer = Restorer(repository, {component: loader})
    if step is not None:
        restorer.one(repository.find(step), request)
    elif restorer.latest(request) is None:
        raise CheckpointNotFoundError(f"there are no checkpoints in {repository.url}")
    assert loader.model is not None
    return loader.model
