"""Lightning's Trainer, which owns the loop."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from tests.campaign.crash.peers.adapters import KEEP, Hooks, Peer, newest_first, random_numbers, set_random_numbers
from tests.campaign.crash.trainee import Trainee
from tests.support.vision import make_importable


class Lightning(Peer):
    """https://lightning.ai/docs/pytorch/stable/common/checkpointing_intermediate.html, the newest k by step."""

    name, title, module = "lightning", "Lightning `ModelCheckpoint`", "lightning.pytorch"
    holds = KEEP + 1
    how = (
        "`ModelCheckpoint(dirpath=…, monitor='step', mode='max', save_top_k=2, save_last=True, "
        "every_n_train_steps=1)`; `Trainer.fit(…, ckpt_path='last')`; random numbers in `on_save_checkpoint` and "
        "`on_load_checkpoint`"
    )

    @classmethod
    def installed(cls) -> bool:
        """It imports torchvision, if that is there."""
        make_importable()
        return super().installed()

    def checkpoints(self) -> list[str]:
        found = newest_first(path.name for path in self.root.glob("epoch*.ckpt"))
        return [*(["last.ckpt"] if self.path("last.ckpt").exists() else []), *found]

    def restore(self, name: str) -> None:
        raise NotImplementedError  # the Trainer does it, in ``fit``

    save = restore  # type: ignore[assignment]

    def run(self, name: str | None, hooks: Hooks) -> None:
        """The Trainer's own loop. One epoch, in the middle of which it resumes."""
        pytorch: Any = importlib.import_module(self.module)

        class Telling(pytorch.Callback):  # type: ignore[misc, name-defined]
            """Comes before the callback that saves: the Trainer puts that one last."""

            def on_train_batch_end(self, *_: object) -> None:
                hooks.saving(trainee.trained - 1)

        trainee = self.trainee
        newest = pytorch.callbacks.ModelCheckpoint(
            dirpath=self.root, monitor="step", mode="max", save_top_k=KEEP, save_last=True, every_n_train_steps=1
        )
        trainer = pytorch.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[Telling(), newest], logger=False, default_root_dir=self.root,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        rows = torch.utils.data.DataLoader(range(self.steps), generator=torch.Generator())  # type: ignore[arg-type]
        path = "last" if name == "last.ckpt" else name and str(self.path(name))
        trainer.fit(_module(pytorch.LightningModule, self.trainee, hooks), rows, ckpt_path=path)


def _module(kind: Any, trainee: Trainee, hooks: Hooks) -> nn.Module:
    """The trainee as Lightning wants it."""

    class Module(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = trainee.model
            self.loaded = False

        def configure_optimizers(self) -> Any:
            schedule = {"scheduler": trainee.scheduler, "interval": "step"}
            return {"optimizer": trainee.optimizer, "lr_scheduler": schedule}

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint.update(position=dict(trainee.position), random=random_numbers())

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            trainee.position.update(checkpoint["position"])
            set_random_numbers(checkpoint["random"])
            self.loaded = True

        def on_train_batch_start(self, batch: Any, number: int) -> None:
            if self.loaded:
                self.loaded = False
                hooks.restored()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return trainee.loss()

        def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
            """After the callbacks, of which the last saves."""
            hooks.saved(trainee.trained - 1)

    return Module()
