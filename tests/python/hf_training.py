"""A small transformers training, in this process or in one that a test kills.

    hf_training.py DIRECTORY PAUSE [ARGUMENT=JSON ...]

Trains with the mixin, prints "step N" after each step, "end DIGEST" at the end. PAUSE is how long,
in seconds, each step rests: time for the killer.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from stillframe.huggingface import StillframeTrainerMixin

STEPS = 16


class MyTrainer(StillframeTrainerMixin, Trainer):
    stillframe_options: ClassVar[Any] = {"check": "full"}


class Tokens(torch.utils.data.Dataset):
    """Random tokens, the same for the same index."""

    def __init__(self, count: int, offset: int = 0) -> None:
        self.count, self.offset = count, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.offset + index)
        tokens = torch.randint(0, 64, (12,), generator=generator)
        return {"input_ids": tokens, "labels": tokens}


def make_model(seed: int = 0) -> BertForMaskedLM:
    """A tiny BERT: tied weights, dropout."""
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def arguments(directory: Path, **changes: Any) -> TrainingArguments:
    """Saves and evaluates every 2nd of 16 steps, 6 of them an epoch."""
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 5,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return TrainingArguments(str(directory), **given)


def make(
    directory: Path,
    kind: type[Trainer] = MyTrainer,
    *,
    model: torch.nn.Module | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **changes: Any,
) -> Any:
    """A trainer of the tiny model; `kind` may be the stock one."""
    return kind(
        model=model or make_model(),
        args=arguments(directory, **changes),
        train_dataset=Tokens(24),
        eval_dataset=Tokens(4, offset=1000),
        callbacks=callbacks,
    )


def digest(trainer: Any) -> str:
    """A hash of the weights and the optimizer's state."""
    state = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        state.update(tensor.numpy().tobytes())
    for group in trainer.optimizer.state_dict()["state"].values():
        for key in sorted(group):
            state.update(torch.as_tensor(group[key]).numpy().tobytes())
    state.update(repr(trainer.lr_scheduler.get_last_lr()).encode())
    return state.hexdigest()


class _Teller(TrainerCallback):
    def __init__(self, pause: float) -> None:
        self._pause = pause

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print("step", state.global_step, flush=True)
        time.sleep(self._pause)


def main() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    directory, pause = Path(sys.argv[1]), float(sys.argv[2])
    changes = dict(argument.split("=", 1) for argument in sys.argv[3:])
    changes = {name: json.loads(value) for name, value in changes.items()}
    trainer = make(directory, callbacks=[_Teller(pause)], **changes)
    trainer.train()
    print("end", digest(trainer), flush=True)


if __name__ == "__main__":
    main()
