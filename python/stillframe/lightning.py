"""Stillframe for Lightning.

from stillframe.lightning import StillframeCheckpointIO

trainer = Trainer(
    plugins=[StillframeCheckpointIO()],
    callbacks=[ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True)],
)
trainer.fit(model, ckpt_path="last")
"""

from stillframe._lightning.checkpoint_io import StillframeCheckpointIO, stock_file
from stillframe.errors import DataLoss, NotFound, StillframeError, StillframeWarning

__all__ = [
    "DataLoss",
    "NotFound",
    "StillframeCheckpointIO",
    "StillframeError",
    "StillframeWarning",
    "stock_file",
]
