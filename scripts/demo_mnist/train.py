"""Train the vision transformer on MNIST digits; started again after any crash, it goes on where it was.

Nothing in here knows that it will be killed: the lines about checkpoints are the eight that any loop needs.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from digits import ShuffledBatches, augment, load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name that everybody gives it
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from vit import VisionTransformer

from checkpointer import CheckpointManager

HERE = Path(__file__).parent
WARMUP_STEPS = 40


def main() -> None:
    args = parse_arguments()
    args.run.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # another number of threads adds floats in another order

    train_set, test_set = load_digits(args.data)
    batches = ShuffledBatches(*train_set, batch_size=32)
    model = VisionTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    warmup = LinearLR(optimizer, start_factor=0.05, total_iters=WARMUP_STEPS)
    cosine = CosineAnnealingLR(optimizer, T_max=args.steps - WARMUP_STEPS)
    scheduler = SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP_STEPS])

    def train_step() -> float:
        images, labels = batches.next_batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(augment(images)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
        return loss.item()

    mgr = CheckpointManager(
        args.run / "checkpoints",
        config=HERE / "train.yaml",
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=batches,
    )
    restored = mgr.restore_latest()
    start = restored.step + 1 if restored else 0
    log = LossLog(args.run / "losses.txt", start)
    print(f"first step: {start}", flush=True)
    with mgr:
        for step in range(start, args.steps):
            loss = train_step()
            log.append(loss)
            mgr.save(step, epoch=batches.epoch, metrics={"loss": loss})
            if mgr.should_stop():
                return
        mgr.save(args.steps - 1, epoch=batches.epoch, force=True)  # the last step is saved, though no rule fires

    torch.save(
        {
            "model weights": model.state_dict(),
            "optimizer state": optimizer.state_dict(),
            "learning-rate schedule": scheduler.state_dict(),
            "data order and position": batches.state_dict(),
            "random numbers of torch": torch.get_rng_state(),
            "random numbers of Python": random.getstate(),
            "test accuracy": accuracy(model, *test_set),
        },
        args.run / "final.pt",
    )


class LossLog:
    """One loss a line, exact to the last bit. Lines past the restored step go: those steps are done again."""

    def __init__(self, path: Path, start: int) -> None:
        lines = path.read_text(encoding="ascii").splitlines()[:start] if path.exists() else []
        assert len(lines) == start, f"{path} has {len(lines)} lines, but {start} steps are done"
        self._file = open(path, "w", encoding="ascii", buffering=1)  # noqa: SIM115  open as long as the process
        self._file.writelines(f"{line}\n" for line in lines)

    def append(self, loss: float) -> None:
        self._file.write(f"{loss.hex()}\n")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right: Tensor = model(images).argmax(dim=1) == labels
    return right.double().mean().item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run: checkpoints, loss log, final state")
    parser.add_argument("--data", type=Path, default=Path("digits.pt"), help="where the parsed images are kept")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
