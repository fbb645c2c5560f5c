"""Peers that are bad on purpose, each in one way, so that every verdict is known to be reachable."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from tests.campaign.crash.peers.adapters import Peer, TorchSaveRename
from tests.campaign.crash.trainee import Trainee


class Forgetful(TorchSaveRename):
    """Does not restore random numbers."""

    name, title = "forgetful", "forgets random numbers"

    def restore(self, name: str) -> None:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        super().restore(name)
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])


class Hasty(TorchSaveRename):
    """Returns at once, and writes at the next save what it was given at the last one."""

    name, title = "hasty", "calls a save done before it is"

    def __init__(self, root: Path, trainee: Trainee, steps: int) -> None:
        super().__init__(root, trainee, steps)
        self._given: bytes | None = None

    def save(self, step: int) -> None:
        super().save(step)
        path = self.path("checkpoint.pt")
        given, self._given = self._given, path.read_bytes()
        if given is None:
            path.unlink()
        else:
            path.write_bytes(given)


CONTROLS: dict[str, type[Peer]] = {kind.name: kind for kind in (Forgetful, Hasty)}
