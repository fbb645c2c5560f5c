"""PyTorch's Distributed Checkpoint (DCP) with this library's files: a storage writer and a storage reader for it.

```python
import torch.distributed.checkpoint as dcp
from checkpointer.dcp import SafetensorsReader, SafetensorsWriter

dcp.save(state_dict, storage_writer=SafetensorsWriter("runs/gpt/checkpoint-500"))
dcp.load(state_dict, storage_reader=SafetensorsReader("runs/gpt/checkpoint-500"))
```

DCP plans and reshards; the writer adds what it lacks: stock safetensors files, a hash of every byte, fsync, one atomic
commit after all ranks are done, and no pickle. What it writes is a checkpoint of a run root, like any other: the
command ``checkpointer`` and a :class:`~checkpointer.CheckpointManager` read it.

DCP reports failures as ``CheckpointException``, which is a ``BaseException``: ``except Exception`` misses it. The
functions :func:`save`, :func:`load` and :func:`async_save` here call DCP's and raise ordinary errors.
"""

from __future__ import annotations

from checkpointer.dcp.api import async_save, load, save
from checkpointer.dcp.reader import SafetensorsReader
from checkpointer.dcp.writer import SafetensorsWriter

__all__ = ["SafetensorsReader", "SafetensorsWriter", "async_save", "load", "save"]
