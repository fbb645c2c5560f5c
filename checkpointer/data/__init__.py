"""The position in the data: resume in the middle of an epoch, with the very batches that come next.

```python
loader = ResumableLoader(DataLoader(dataset, batch_size=32, shuffle=True, num_workers=4))
mgr = CheckpointManager("runs/vit", model=model, optimizer=optimizer, loader=loader)
restored = mgr.restore_latest()                    # before iter(loader)
step = restored.step + 1 if restored else 0
with mgr:
    for epoch in range(loader.next_epoch, epochs):
        for batch in loader:
            ...
            mgr.save(step, epoch=epoch)
            step += 1
```

**What makes it exact.** Batches are counted as the loop receives them, so prefetched ones are neither lost nor
repeated. The order of an epoch is drawn when the sampler is first asked, so the state of all random generators at that
moment is kept. A resume sets it, lets the sampler draw the same order again, passes over the *indices* of what was seen
without reading an item, and sets the generators to their state at the save.

**Where an epoch ends.** Saved inside the loop body on the last batch, the resumed epoch is empty, and the code after
the loop runs as it would have; saved after the loop, the next epoch begins. Saved after a ``break``, the rest of that
epoch comes first.

**Random augmentation.** In worker processes the global generators are out of reach: nobody can read their state at the
batch that the loop has just received, as they are ahead of it by what they prefetch, and fresh ones start from a new
seed. So nothing that is drawn from them can be repeated. :class:`SeededDataset` derives the randomness of an item from
(seed, epoch, index) instead: exact, whichever worker handles the item and whatever came before. Without workers the
global generators are those of the training process, and exact anyway.
"""

from __future__ import annotations

from checkpointer.data.augmentation import SeededDataset, seeded
from checkpointer.data.loader import ResumableLoader

__all__ = ["ResumableLoader", "SeededDataset", "seeded"]
