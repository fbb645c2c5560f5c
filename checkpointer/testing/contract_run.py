"""A small training run by which :class:`StorageContract` asks a storage whether checkpoints are safe on it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from checkpointer.format import paths
from checkpointer.manager import CheckpointManager
from checkpointer.storage import Storage, wrapping
from checkpointer.testing.faults import Fault, faulty_storage


class Run:
    """A run on a storage under test, with a model so small that its saves are all storage."""

    def __init__(
        self, make_storage: Callable[[str, Mapping[str, object]], Storage], root: str, options: Mapping[str, object]
    ) -> None:
        self._make_storage = make_storage
        self._root = root
        self._options = options
        self._model = torch.nn.Linear(8, 64)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.1)

    def train(self, steps: int) -> None:
        """Become the state after so many steps, in place: the same bits whenever it is called."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
        self._optimizer.state.clear()
        for _ in range(steps):
            self._optimizer.zero_grad()
            self._model(torch.randn(4, 8, generator=generator, device="cpu")).square().mean().backward()
            self._optimizer.step()

    @contextlib.contextmanager
    def manager(
        self, fault: Fault | None = None, *, at: int, read_only: bool = False, **settings: object
    ) -> Iterator[CheckpointManager]:
        """A manager of the run, whose live objects are those after ``at`` steps."""
        self.train(at)
        storage = self._make_storage(self._root, self._options)
        opened = storage if fault is None else faulty_storage(storage, fault)
        components: dict[str, Any] = {"model": self._model, "optimizer": self._optimizer}
        config: dict[str, Any] = {"write": {"mode": "sync"}, "require_resume": False, **settings}
        options = dict(self._options)
        with wrapping(lambda _: opened):
            made = CheckpointManager(
                self._root, config=config, storage_options=options, read_only=read_only, **components
            )
        with made:
            yield made

    def save_twice(self, fault: Fault) -> None:
        """Save the states after one and after two steps."""
        with self.manager(fault, at=1) as manager:
            manager.save(1)
            manager.prune()  # waits for what follows the commit: operations are counted, and this is in the background
            self.train(2)
            manager.save(2)

    def assert_restores(self, steps: int, *, step: int | None = None) -> None:
        """Fail unless a new manager restores the newest checkpoint, or that of ``step``, as after ``steps`` steps."""
        with self.manager(at=0, read_only=True) as manager:
            restored = manager.restore_latest() if step is None else manager.restore(step)
            assert restored is not None, "there is no checkpoint"
            assert not restored.skipped
            found = self._bits()
        self.train(steps)
        assert found == self._bits(), f"what was restored is not what was saved after {steps} steps"

    def _bits(self) -> dict[str, bytes]:
        """The bytes of every tensor, by name."""
        moments = self._optimizer.state_dict()["state"].items()
        tensors = {f"{number}.{name}": value for number, state in moments for name, value in state.items()}
        tensors.update(self._model.state_dict())
        return {name: value.numpy().tobytes() for name, value in tensors.items()}


def moment_of(operations: list[str], moment: str) -> int:
    """The number, from 1, of the first operation that does not happen where the second save is killed at ``moment``."""
    first, second = (_commit(operations, step) for step in (1, 2))
    if moment == "while data is written":
        return next(number for number in range(first + 1, second) if operations[number - 1].startswith("write("))
    if moment == "between data and commit":
        return second
    part_of_it = f"(checkpoint-2/{paths.MANIFEST})"  # a `create` that has to look first
    return next(number for number in range(second + 1, len(operations)) if part_of_it not in operations[number - 1])


def _commit(operations: list[str], step: int) -> int:
    """The number, from 1, of the operation that commits a step."""
    act = re.compile(rf"rename\(.*checkpoint-{step}\)|create\(checkpoint-{step}/{paths.MANIFEST}\)")
    return next(number for number, text in enumerate(operations, 1) if act.match(text))
