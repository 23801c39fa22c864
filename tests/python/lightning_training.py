"""A small LightningModule whose batches depend on the step alone; as a script, one that is killed.

    lightning_training.py DIRECTORY STEPS PAUSE

Trains to STEPS with ckpt_path="last", saving at every second step; prints "step N" and at the end
the digest. PAUSE seconds between steps give the killer time.
"""

from __future__ import annotations

import hashlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from stillframe.lightning import StillframeCheckpointIO

EPOCH_STEPS = 8


class Net(pl.LightningModule):
    """BatchNorm, Adam and a MultiStepLR: buffers, optimizer state, a Counter."""

    def __init__(self, width: int = 16, note: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
        self.on_step: Callable[[int], None] = lambda step: None

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.on_step(self.global_step)
        generator = torch.Generator().manual_seed(self.global_step)
        loss: Tensor = self.net(torch.randn(16, 8, generator=generator)).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        # Worse and better by turns, so that the best k change.
        self.log("score", torch.tensor([5.0, 3.0, 4.0, 2.0, 6.0, 1.0])[self.current_epoch % 6])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 30])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def digest(self) -> str:
        """Of weights, buffers and optimizer state."""
        state = hashlib.sha256()
        for tensor in self.net.state_dict().values():
            state.update(tensor.numpy().tobytes())
        for entry in self.trainer.optimizers[0].state_dict()["state"].values():
            for key in sorted(entry):
                state.update(torch.as_tensor(entry[key]).numpy().tobytes())
        return state.hexdigest()


def batches() -> Any:
    """An epoch of EPOCH_STEPS batches, whose content nobody looks at."""
    return torch.utils.data.DataLoader(torch.zeros(EPOCH_STEPS, 1))  # type: ignore[arg-type]


def trainer(*callbacks: Any, plugin: Any = None, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        plugins=[plugin if plugin is not None else StillframeCheckpointIO(check="full")],
        **options,
    )


def main() -> None:
    folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", UserWarning)
    net = Net()

    def on_step(step: int) -> None:
        print("step", step, flush=True)
        time.sleep(pause)

    net.on_step = on_step
    saves = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1, save_last=True)
    trainer(saves, max_steps=steps).fit(net, batches(), ckpt_path="last")
    print("digest", net.digest(), flush=True)


if __name__ == "__main__":
    main()
