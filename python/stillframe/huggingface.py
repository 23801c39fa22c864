"""Stillframe for Hugging Face's Trainer and Accelerate.

from stillframe.huggingface import StillframeTrainerMixin
from transformers import Trainer

class MyTrainer(StillframeTrainerMixin, Trainer):
    pass

MyTrainer(model, args, train_dataset=dataset).train(resume_from_checkpoint=True)

With an Accelerator alone: `run = stillframe.huggingface.register(accelerator, "out/run")`, then
save_state() and load_state() as ever.
"""

from stillframe._huggingface.accelerate import AcceleratedRun, register
from stillframe._huggingface.trainer import StillframeTrainerMixin

__all__ = ["AcceleratedRun", "StillframeTrainerMixin", "register"]
