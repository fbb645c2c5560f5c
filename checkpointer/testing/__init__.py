"""Tests for your own training loop: does it resume bit for bit, and what does it do when the disk fails?

``assert_resume_exact`` runs a loop twice, once interrupted, and compares:

```python
# test_resume.py
from checkpointer.testing import assert_resume_exact


def make_run():
    torch.manual_seed(0)
    model, optimizer, loader = ...
    batches = itertools.cycle(loader)

    def train_step(step):
        loss = ...
        return loss

    return {"model": model, "optimizer": optimizer, "loader": loader}, train_step


def test_resume_is_exact():
    assert_resume_exact(make_run, steps=20, interrupt_at=[7, 12])
```

``make_run`` is called in new processes: it lies at the top of a module, and takes no arguments. It builds everything,
as the script does before its loop, and returns the components by name, as :class:`CheckpointManager` takes them, and
the function that trains one step and returns the loss. After it, a resumed process restores the components.

Three things are compared, after each step: the loss; every tensor and every number of every component; and every
module, tensor, optimizer, scheduler or generator that the step can reach (through closures, attributes, and the globals
that it names) and that is *not* a component, such as a forgotten average of the weights, or an optimizer inside an
optimizer.

``Fault`` and ``faulty`` let the storage below a manager fail: see :class:`Fault`.

``StorageContract`` tests a file system, which somebody wrote for fsspec, or a server: see :class:`StorageContract`. It
alone needs pytest, which is imported when it is asked for.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from checkpointer.testing.faults import OPERATIONS, Fault, Kind, faulty, faulty_storage
from checkpointer.testing.resume.check import assert_resume_exact

if TYPE_CHECKING:
    from checkpointer.testing.storage_contract import StorageContract

__all__ = ["OPERATIONS", "Fault", "Kind", "StorageContract", "assert_resume_exact", "faulty", "faulty_storage"]

if "pytest" in sys.modules:  # it shows the values in the contract's assertions, as in those of a test file
    sys.modules["pytest"].register_assert_rewrite(f"{__name__}.storage_contract", f"{__name__}.contract_run")


def __getattr__(name: str) -> Any:
    if name != "StorageContract":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from checkpointer.testing.storage_contract import StorageContract

    return StorageContract
