"""What the mixin relies on of transformers.Trainer (5.23): for the type checker, never imported.

The methods that it overrides and calls, and the attributes that it reads. All but train() and
save_model() are private to transformers: whoever moves to another version compares this page.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Trainer:
    """The stock Trainer, as far as we know it."""

    args: Any  # TrainingArguments
    state: Any  # TrainerState: global_step, best_model_checkpoint
    accelerator: Any  # scaler
    model: nn.Module  # The bare one, but for FSDP.
    optimizer: Any  # An accelerate.AcceleratedOptimizer once prepared.
    lr_scheduler: Any
    is_in_train: bool
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool

    def train(
        self, resume_from_checkpoint: Any, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> Any:
        """Train, and return a TrainOutput."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Make optimizer and scheduler, then load their state."""

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        """Load the best model; with save_total_limit=1 remove all others."""

    def _get_output_dir(self, trial: Any) -> str:
        """args.output_dir, or a trial's folder in it."""
        raise NotImplementedError

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether an evaluation is the best so far."""
        raise NotImplementedError

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Call the savers below, write trainer_state.json, push, rotate by mtime."""

    def _save(self, output_dir: str | None, state_dict: Any) -> None:
        """Write weights, configurations, tokenizer and training_args.bin."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write optimizer.pt and scheduler.pt."""

    def _save_scaler(self, output_dir: str) -> None:
        """Write scaler.pt if there is a scaler."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Write rng_state.pth."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Copy the weights up, and begin an upload to the Hub."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None) -> None:
        """Load the weights, before the optimizer exists."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler, when both exist."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the scaler if its file exists."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the generators, after the batches to skip were skipped."""

    def _load_best_model(self) -> None:
        """Load state.best_model_checkpoint into the model."""
