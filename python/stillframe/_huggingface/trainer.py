"""StillframeTrainerMixin: what of transformers.Trainer saves, loads and rotates, in another way.

The Trainer's own methods go on to decide when to save, what is best and what comes next, and they
write the small files of a checkpoint folder. Weights, optimizer, scheduler and generators go
through a TrainerRun. Whatever Stillframe does not serve falls through to the stock method.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from stillframe._core.state_json import decode
from stillframe._core.warn import log, warn
from stillframe._huggingface.folders import (
    Folder,
    in_order,
    read_folder,
    remove_stock_state,
    unlink_weights,
)
from stillframe._huggingface.run import TrainerRun, settled_folders
from stillframe._huggingface.support import bare_optimizer, reason_against
from stillframe._torch.rng import encode_rng, restore_rng
from stillframe.errors import DataLoss, InvalidArgument, NotFound, StillframeError

if TYPE_CHECKING:
    from stillframe._huggingface.seam import Trainer as _Trainer
else:
    _Trainer = object


class StillframeTrainerMixin(_Trainer):
    """Put before a transformers.Trainer, saves its checkpoints through Stillframe.

        class MyTrainer(StillframeTrainerMixin, Trainer):
            pass

    All else stays as it is: arguments (`save_strategy`, `save_total_limit`,
    `load_best_model_at_end`, ...), callbacks, `resume_from_checkpoint`, and `from_pretrained()` on
    a `checkpoint-N`. Training goes on while a checkpoint is written: `model.safetensors` in its
    folder is a link into `output_dir/_stillframe`, which leads somewhere once the save is durable.
    Optimizer, scheduler, gradient scaler and random number generators are in there too, and not in
    the folder.

    What differs: old checkpoints are removed behind a newer durable one only, in the order in
    which they were saved; `resume_from_checkpoint=True` passes over folders whose save was not
    durable when the process ended, and over damaged ones, with a warning; the newest checkpoint
    stays at the end of a training with `save_total_limit=1`, too. A failed save is warned of, its
    folder is removed, and training goes on.

    Where Stillframe cannot serve (DeepSpeed, FSDP, PEFT, several processes, quantized models, and
    models that save_pretrained() writes under other names) it warns why, and saves in the stock
    way. Checkpoints of the stock Trainer are resumed from as ever. The other way round, a Trainer
    without the mixin finds the weights of these folders, and no optimizer.

    Attributes:
        stillframe_options: arguments for the Checkpointer, such as {"check": "full"}; with
            {"on_error": "raise"} the failure of a save ends the training at the next save.
    """

    stillframe_options: ClassVar[Mapping[str, Any]] = {}

    _stillframe_run: TrainerRun | None = None
    _stillframe_trial: Any = None
    # Whether the stock way is taken, and for which model that was found out.
    _stillframe_verdict: tuple[nn.Module, str | None] | None = None
    # What the restored checkpoint has for later: `extra` as given to save(), and generators.
    _stillframe_extra: Mapping[str, Any] = {}
    _stillframe_rng: str | None = None
    # The newest evaluation: its step and its numbers.
    _stillframe_metrics: tuple[int, dict[str, float]] = (-1, {})
    # While the stock _save_checkpoint() runs for us: the user's save_total_limit.
    _stillframe_is_saving = False
    _stillframe_limit: int | None = None
    _stillframe_wants_push = False

    def wait_until_durable(self, timeout: float | None = None) -> None:
        """Wait until all saves so far are durable, or have failed: for callbacks that copy folders.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            TimeoutError: one is not in that time.
        """
        if self._stillframe_run is not None:
            self._stillframe_run.drain(timeout)

    # --- Training ---------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train as transformers.Trainer does.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest that is durable.
            trial: of a hyper-parameter search.
            ignore_keys_for_eval: as for the stock Trainer.

        Returns:
            The stock TrainOutput.

        Raises:
            InvalidArgument: the folder's save never became durable; or its state does not fit
                model, optimizer or scheduler, and the message lists what differs.
            DataLoss: the checkpoint is damaged; with True: all of them.
            TimeoutError: a save of an earlier process does not become durable.
        """
        self._stillframe_trial = trial
        self._stillframe_verdict = None
        try:
            if resume_from_checkpoint is True:
                output = self._stillframe_train_from_newest(trial, ignore_keys_for_eval)
            elif not resume_from_checkpoint:
                output = super().train(None, trial, ignore_keys_for_eval)
            else:
                folder = os.fspath(resume_from_checkpoint)
                _check_durable(Path(folder))
                output = super().train(folder, trial, ignore_keys_for_eval)
        except BaseException:
            run, self._stillframe_run = self._stillframe_run, None
            if run is not None:
                run.leave()
            raise
        self._stillframe_end_run()
        return output

    def _stillframe_train_from_newest(self, trial: Any, ignored: list[str] | None) -> Any:
        folders, entries = settled_folders(Path(self.args.output_dir))
        if not folders:
            return super().train(True, trial, ignored)  # Says that there is none.
        passed_over: list[str] = []
        for folder in reversed(in_order(folders)):
            problem = _problem(folder, entries)
            if problem is None:
                if passed_over:
                    warn(f"resuming from {folder.path} instead of {'; '.join(passed_over)}")
                try:
                    return super().train(os.fspath(folder.path), trial, ignored)
                except _DamagedFolder as error:
                    problem = str(error)
            passed_over.append(f"{folder.path.name}: {problem}")
        what = f"no checkpoint of {self.args.output_dir} can be resumed from: "
        raise DataLoss(
            f"{what}{'; '.join(passed_over)}. To start afresh, leave resume_from_checkpoint out"
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.args.save_strategy != "no":
            # Now, so that the optimizer's steps are seen from the first one on.
            run = self._stillframe_run_for_saving()
            if run is not None:
                run.prepare()
        return prepared

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        run = self._stillframe_run
        if run is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        run.drain()
        best = self.state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            warn(f"the save of {best}, the best checkpoint, has failed: the model stays the newest")
            self.state.best_model_checkpoint = best = None
        run.rotate(self.args.save_total_limit, best, waits=True)
        # The stock Trainer would remove even the newest now if the limit is 1.
        with _held(self.args, "save_total_limit", None):
            return super()._finalize_training(trial, num_train_samples, start_time)

    # --- Saving -----------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, Real)}
        self._stillframe_metrics = (self.state.global_step, numbers)
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = self._stillframe_run_for_saving()
        if run is None:
            super()._save_checkpoint(model, trial)
            return
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial), f"checkpoint-{step}")
        run.begin_folder()
        self._stillframe_limit = self.args.save_total_limit
        self._stillframe_is_saving, self._stillframe_wants_push = True, False
        try:
            # Its rotation goes by the folders' times, and waits for nothing.
            with _held(self.args, "save_total_limit", None):
                super()._save_checkpoint(model, trial)
        finally:
            self._stillframe_is_saving = False
        metrics_step, metrics = self._stillframe_metrics
        scaler = getattr(self.accelerator, "scaler", None)
        extra = {
            "is_whole": not self.args.save_only_model,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        try:
            run.save(step, folder, metrics if metrics_step == step else {}, extra)
        except StillframeError as error:
            if self.stillframe_options.get("on_error") == "raise":
                raise
            warn(f"the stock Trainer writes the checkpoints, not Stillframe: {error}")
            self._stillframe_verdict = (self.model, str(error))
            self._stillframe_complete(folder)
        run.rotate(self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._stillframe_wants_push:
            run.drain()
            super()._push_from_checkpoint(os.fspath(folder))

    def _stillframe_complete(self, folder: Path) -> None:
        """Make one of the stock Trainer out of a folder that lacks weights and state."""
        super()._save(os.fspath(folder), None)
        if not self.args.save_only_model:
            super()._save_optimizer_and_scheduler(os.fspath(folder))
            super()._save_scaler(os.fspath(folder))
            super()._save_rng_state(os.fspath(folder))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if output_dir is not None:
            # Written through the link, the weights would overwrite the checkpoint behind it.
            unlink_weights(Path(output_dir))
        if output_dir is None or not self._stillframe_is_saving:
            super()._save(output_dir, state_dict)
            return
        # training_args.bin says what the user gave.
        with _held(self.args, "save_total_limit", self._stillframe_limit):
            # No tensors: no file of a PreTrainedModel, an empty one of another module.
            super()._save(output_dir, {})
        remove_stock_state(Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._stillframe_is_saving:
            super()._save_optimizer_and_scheduler(output_dir)

    def _save_scaler(self, output_dir: str) -> None:
        if not self._stillframe_is_saving:
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        if not self._stillframe_is_saving:
            super()._save_rng_state(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._stillframe_is_saving:
            self._stillframe_wants_push = True  # Once there are weights to push.
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    # --- Loading ----------------------------------------------------------------------------------

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = read_folder(Path(resume_from_checkpoint))
        if folder is None or folder.sequence is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._stillframe_restore_model(folder, model or self.model)
        if not self.is_in_train:
            self._stillframe_end_run()

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        folder = read_folder(best)
        if folder is None or folder.sequence is None:
            super()._load_best_model()
            return
        log.info("loading the best model from %s (score: %s)", best, self.state.best_metric)
        try:
            self._stillframe_restore_model(folder, self.model)
        except _DamagedFolder as error:
            # Not one that makes train() begin again from an older checkpoint.
            raise DataLoss(
                f"the best checkpoint is damaged, and the model may hold a part of it: {error}"
            ) from error

    def _stillframe_restore_model(self, folder: Folder, model: nn.Module) -> None:
        if self.args.world_size > 1:
            raise InvalidArgument(
                f"{folder.path} comes from one process, and {self.args.world_size} cannot resume "
                "from it in this version; start from its weights by from_pretrained() instead"
            )
        run = self._stillframe_run
        if run is None or not run.is_of(folder.directory, model):
            run = self._stillframe_open(folder.directory, model, is_whole=False)
        self._stillframe_extra = _restore(run, folder, ["model"]) or {}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = read_folder(Path(checkpoint)) if checkpoint is not None else None
        if folder is None or folder.sequence is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self._stillframe_rng = None
        if not self._stillframe_extra.get("is_whole"):
            log.warning("%s has no optimizer, by save_only_model: it starts afresh", checkpoint)
            return
        run = self._stillframe_open(folder.directory, self.model, is_whole=True)
        current = encode_rng()
        _restore(run, folder, ["optimizer", "scheduler", "rng"])
        # The Trainer sets them later, when it has skipped the batches that were trained on.
        self._stillframe_rng = encode_rng()
        _set_rng(current)

    def _load_scaler(self, checkpoint: str | None) -> None:
        folder = read_folder(Path(checkpoint)) if checkpoint is not None else None
        if folder is None or folder.sequence is None:
            super()._load_scaler(checkpoint)
            return
        state = self._stillframe_extra.get("scaler")
        scaler = getattr(self.accelerator, "scaler", None)
        if state is not None and scaler is not None:
            scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        folder = read_folder(Path(checkpoint)) if checkpoint is not None else None
        if folder is None or folder.sequence is None:
            super()._load_rng_state(checkpoint)
        elif self._stillframe_rng is not None:
            _set_rng(self._stillframe_rng)

    # --- The run ----------------------------------------------------------------------------------

    def _stillframe_run_for_saving(self) -> TrainerRun | None:
        """The run that saves go to; None for the stock way, which was warned of."""
        if self._stillframe_verdict is None or self._stillframe_verdict[0] is not self.model:
            reason = reason_against(self)
            if reason is not None:
                warn(f"the stock Trainer writes the checkpoints, not Stillframe: {reason}")
            self._stillframe_verdict = (self.model, reason)
        if self._stillframe_verdict[1] is not None:
            self._stillframe_end_run()
            return None
        directory = Path(os.path.realpath(self._get_output_dir(self._stillframe_trial)))
        return self._stillframe_open(directory, self.model, is_whole=not self.args.save_only_model)

    def _stillframe_open(self, directory: Path, model: nn.Module, *, is_whole: bool) -> TrainerRun:
        optimizer = bare_optimizer(self.optimizer) if is_whole else None
        scheduler = self.lr_scheduler if is_whole else None
        run = self._stillframe_run
        if run is not None and run.serves(directory, model, optimizer, scheduler):
            return run
        self._stillframe_end_run()
        options: dict[str, Any] = {}
        metric = self.args.metric_for_best_model
        if metric is not None:
            name = metric if metric.startswith("eval_") else f"eval_{metric}"
            options["best"] = (name, "max" if self.args.greater_is_better else "min", 1)
        self._stillframe_run = TrainerRun(
            directory,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            options={**options, **self.stillframe_options},
        )
        return self._stillframe_run

    def _stillframe_end_run(self) -> None:
        run, self._stillframe_run = self._stillframe_run, None
        if run is not None:
            try:
                run.close()
            except StillframeError:
                # The last save has failed: that was warned of.
                if self.stillframe_options.get("on_error") == "raise":
                    raise


class _DamagedFolder(DataLoss):
    """Found while its checkpoint was read, before the training began."""


def _restore(run: TrainerRun, folder: Folder, sections: list[str]) -> Any:
    """Restore sections of the checkpoint behind a folder; return its `extra`."""
    assert folder.sequence is not None
    try:
        return run.restore(folder.sequence, sections).extra
    except DataLoss as error:
        raise _DamagedFolder(str(error)) from error
    except NotFound as error:
        raise _not_durable(folder.path) from error


def _check_durable(path: Path) -> None:
    folder = read_folder(path)
    if folder is None or folder.is_stock:
        return  # The stock Trainer says what is wrong with it, if anything is.
    _, entries = settled_folders(folder.directory)
    if folder.sequence not in entries:
        raise _not_durable(path)


def _not_durable(path: Path) -> InvalidArgument:
    return InvalidArgument(
        f"{path} cannot be resumed from: its save failed, or the process ended before it was "
        "durable; resume_from_checkpoint=True takes the newest one that can"
    )


def _problem(folder: Folder, entries: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Why it cannot be resumed from; None if nothing is known against it."""
    if folder.is_stock:
        return None
    if folder.sequence is None or folder.sequence not in entries:
        return "its save was not durable when the process ended"
    damage = entries[folder.sequence]["damage"]
    return None if damage is None else str(damage)


def _set_rng(text: str) -> None:
    def no_tensor(name: str) -> Any:
        raise DataLoss(f"rng refers to a tensor, {name}")

    restore_rng(decode(json.loads(text), "rng", tensor=no_tensor))


@contextlib.contextmanager
def _held(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an attribute another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
