"""StillframeCheckpointIO: Lightning's checkpoints through the Stillframe daemon."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stillframe._core.arguments import check_choice, checked_metrics, checked_step
from stillframe._core.saver import SaverOptions
from stillframe._core.session import AttachOptions
from stillframe._core.warn import log, warn
from stillframe._lightning.folder import Folder, Request
from stillframe._lightning.load import load, load_directory, move
from stillframe._lightning.step_watch import step_watch
from stillframe._lightning.stub import read_stub
from stillframe.errors import InvalidArgument

# last.ckpt, OnExceptionCheckpoint's and a requeued Slurm job's: names of the newest state.
_NEWEST_NAMES = re.compile(r"(last|on_exception|hpc_ckpt_)")
# With another error on its way, teardown() does not wait for ever.
_TEARDOWN_SECONDS = 30.0


class StillframeCheckpointIO:
    """Saves Lightning's checkpoints asynchronously, and loads them.

        trainer = Trainer(plugins=[StillframeCheckpointIO()], callbacks=[ModelCheckpoint(...)])
        trainer.fit(model, ckpt_path="last")

    Parameters and optimizer state are copied while training goes on, and the next optimizer step
    waits until that is done; all else is copied before save_checkpoint() returns. The file that
    Lightning names becomes a small stub at once; the checkpoint that it names appears in the
    folder's run, `stillframe-run`, when it is durable. There `model.safetensors` opens with the
    plain safetensors library. What ModelCheckpoint displaces is removed once the save that
    displaced it, or a newer one, is durable. The first checkpoint of a run, and one taken outside
    of training, is durable when save_checkpoint() returns.

    A failed save raises at the next call, or when the Trainer tears down, which waits for the last
    save. With Fabric, call teardown() yourself.

    `ckpt_path="last"` (and on_exception.ckpt, hpc_ckpt_N.ckpt) falls back to the newest durable
    checkpoint with a StillframeWarning if the training was killed before the last save was durable,
    or if its bytes are damaged. Any other path raises then. Checkpoints of torch.save() load as
    ever. Model.load_from_checkpoint() reads files by itself: give it stock_file(path).

    Sharded strategies (FSDP with state_dict_type="sharded", ModelParallelStrategy) write their
    files past every CheckpointIO, and so past this one. In a job of several processes the first one
    saves, as Lightning has it.

    Args:
        capture: "auto" copies later what only an optimizer's step writes, where that is safe;
            "eager" copies everything before save_checkpoint() returns. Take it if anything else
            than the optimizer writes to the parameters during training.
        check: "sample" compares up to 256 blocks of what was copied later with the training's
            memory before it counts; "full" all of it.
        allow_pickle: pickle values of the checkpoint that have no other form (callbacks' state,
            hyper-parameters), and load such pickles. They can run any code when they are loaded.
        busy_timeout: seconds that a save waits for a free slot before it fails.
        arena_bytes_max: cap on the daemon's memory for a folder's run; None takes the daemon's own.
        force_filesystem: accept a network file system.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        *,
        capture: Literal["auto", "eager"] = "auto",
        check: Literal["sample", "full"] = "sample",
        allow_pickle: bool = False,
        busy_timeout: float = 60.0,
        arena_bytes_max: int | None = None,
        force_filesystem: bool = False,
    ) -> None:
        check_choice("capture", capture, ("auto", "eager"))
        check_choice("check", check, ("sample", "full"))
        if not 0 < busy_timeout <= 86_400:
            raise InvalidArgument(f"busy_timeout is {busy_timeout}, not 0 to 86400 seconds")
        self._capture = capture
        self._allow_pickle = allow_pickle
        self._how = SaverOptions(busy_timeout=busy_timeout, checks_all=check == "full")
        self._options = AttachOptions(
            directory="",
            force_filesystem=force_filesystem,
            arena_bytes_max=arena_bytes_max or 0,
            framework=f"torch {torch.__version__}",
            python_version=platform.python_version(),
        )
        self._pid = os.getpid()
        self._folders: dict[Path, Folder] = {}
        self._begin()

    def _begin(self) -> None:
        _become_checkpoint_io(type(self))
        # From here on, so that it knows the optimizers before the first save.
        step_watch()

    def __getstate__(self) -> dict[str, Any]:
        # Another process attaches by itself.
        return {**self.__dict__, "_folders": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    # --- Saving -----------------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save; returns as soon as training may go on.

        Args:
            checkpoint: as Trainer.dump_checkpoint() makes it.
            path: becomes a stub, atomically.
            storage_options: not supported.

        Raises:
            InvalidArgument: a value has no form in a checkpoint (its path is named), or the folder
                cannot hold a run.
            TypeError: `storage_options` was given.
            StillframeError: the failure of an earlier save, raised once; nothing was saved now. Or
                this save could not begin.
        """
        if storage_options is not None:
            raise TypeError("StillframeCheckpointIO takes no storage_options")
        target = _local_path(path)
        if target.name.startswith("."):
            # How Lightning's launchers hand weights from process to process: no checkpoint.
            _stock_io().save_checkpoint(checkpoint, path)
            return
        step = _step_of(checkpoint)
        watch = step_watch()
        watch.trust(step)
        is_lazy, capture = self._choose_capture(checkpoint)
        request = Request(
            checkpoint=checkpoint,
            step=step,
            metrics=_metrics_of(checkpoint, target),
            is_lazy=is_lazy,
            capture=capture,
            is_newest=_means_newest(target) or _is_last_of(checkpoint, target),
            # No teardown() may follow, so nobody would be told.
            waits=not watch.has_stepped,
            allow_pickle=self._allow_pickle,
        )
        self._folder(target).save(target.name, request)

    def _choose_capture(
        self, checkpoint: Mapping[str, Any]
    ) -> tuple[Callable[[Tensor], bool] | None, str]:
        if self._capture == "eager":
            return None, "eager: as asked for"
        watch = step_watch()
        if not watch.has_stepped or torch.compiler.is_compiling():
            return None, "eager: no optimizer has stepped through its hook"
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            # ModelCheckpoint does so when it saves a module's saved_models, with manual
            # optimization, and puts the weights back as soon as the save returns.
            return None, "eager: within torch.no_grad(), where the caller may write the weights"
        if "current_model_state" in checkpoint:
            return None, "eager: WeightAveraging swaps the weights in place for validation"
        return watch.is_behind_step(), "lazy: the optimizer's step() waits for it"

    # --- Loading ----------------------------------------------------------------------------------

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Load a checkpoint of this class, or one of torch.save().

        Args:
            path: a stub, a link to one, a checkpoint's directory in a run, or a stock file.
            map_location: as for torch.load(); None gives CPU tensors.
            weights_only: as for torch.load(), for stock files; True also refuses what
                `allow_pickle` let into a checkpoint of this class.

        Returns:
            A dictionary equal to the saved one. Its tensors are new and own their memory.

        Raises:
            FileNotFoundError: nothing is there.
            NotFound: the save never became durable.
            DataLoss: it is damaged.
            InvalidArgument: it holds pickles, which were not allowed; or it is a sharded
                checkpoint, which only its strategy loads.
        """
        target = _local_path(path)
        allow_pickle = self._allow_pickle and not weights_only
        if target.is_dir():
            return move(load_directory(target, allow_pickle=allow_pickle), map_location)
        stub = read_stub(target) if target.exists() else None
        if stub is None:
            mapped = {} if map_location is None else {"map_location": map_location}
            loaded = _stock_io().load_checkpoint(path, **mapped, weights_only=weights_only)
            assert isinstance(loaded, dict)
            return loaded
        tree = load(
            target,
            stub,
            _settle_together(lambda: self._folder(target.resolve()).settle()),
            falls_back=stub.is_newest or _means_newest(target),
            allow_pickle=allow_pickle,
        )
        return move(tree, map_location)

    # --- Removing ---------------------------------------------------------------------------------

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, once the newest save of its folder is durable.

        One that a tag protects stays; one behind a save that fails goes behind the next.
        """
        target = _local_path(path)
        if target.is_symlink():
            target.unlink()
            return
        if not target.exists():
            return
        stub = None if target.is_dir() else read_stub(target)
        if stub is None:
            _stock_io().remove_checkpoint(path)
            return
        self._folder(target).remove(target.name, stub)

    def teardown(self) -> None:
        """Wait until the last save is durable, remove what is queued, let the daemon go.

        A later save attaches again.

        Raises:
            StillframeError: a save has failed that nobody was told of. Only a warning while another
                error ends the training.
        """
        folders = self._current()
        self._folders = {}
        if folders:
            step_watch().forget()
        is_failing = sys.exc_info()[0] is not None
        errors: list[Exception] = []
        for folder in folders.values():
            errors += folder.close(_TEARDOWN_SECONDS if is_failing else None)
        if is_failing:
            for error in errors:
                warn(f"while another error ended the training: {error}")
        elif errors:
            for error in errors[1:]:
                warn(str(error))
            raise errors[0]

    def _folder(self, path: Path) -> Folder:
        folders = self._current()
        parent = path.parent.resolve()
        if parent not in folders:
            folders[parent] = Folder(parent, self._options, self._how)
        return folders[parent]

    def _current(self) -> dict[Path, Folder]:
        if self._pid != os.getpid():
            # A fork: what the parent holds is the parent's.
            self._pid = os.getpid()
            self._folders = {}
        return self._folders


def stock_file(path: str | os.PathLike[str]) -> Any:
    """A checkpoint as the file that torch.save() would have made, in memory.

    For what reads files by itself: `Model.load_from_checkpoint(stock_file(path))`.

    Args:
        path: as for StillframeCheckpointIO.load_checkpoint(); without pickles.

    Returns:
        A binary file object; it needs the checkpoint's memory twice.

    Raises:
        StillframeError: as load_checkpoint().
    """
    import io

    checkpoint_io = StillframeCheckpointIO()
    try:
        checkpoint = checkpoint_io.load_checkpoint(path)
    finally:
        checkpoint_io.teardown()
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return file


def _settle_together(settle: Callable[[], str | None]) -> Callable[[], str | None]:
    """Folder.settle(); with several processes, which all load, done now, by the first one.

    So that all of them then find the same checkpoints.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return settle
    if distributed.get_world_size() == 1:
        return settle
    reason = settle() if distributed.get_rank() == 0 else None
    distributed.barrier()
    return lambda: reason


def _local_path(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise InvalidArgument(f"{text}: Stillframe saves to local paths only")
    if "\0" in text:
        raise InvalidArgument(f"{text!r} has a NUL in it")
    return Path(os.path.abspath(text))


def _means_newest(path: Path) -> bool:
    return _NEWEST_NAMES.match(path.name) is not None


def _callback_states(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    states = checkpoint.get("callbacks")
    values = states.values() if isinstance(states, dict) else ()
    return [state for state in values if isinstance(state, dict)]


def _is_last_of(checkpoint: Mapping[str, Any], path: Path) -> bool:
    """Whether a ModelCheckpoint saves this as its last, whatever it calls it."""
    return any(
        isinstance(state.get("last_model_path"), str)
        and state["last_model_path"] != ""
        and Path(os.path.abspath(state["last_model_path"])) == path
        for state in _callback_states(checkpoint)
    )


def _metrics_of(checkpoint: Mapping[str, Any], path: Path) -> list[tuple[str, float]]:
    """The score that a ModelCheckpoint has given this file, for `stillframe ls` and @best."""
    metrics: dict[str, Any] = {}
    for state in _callback_states(checkpoint):
        monitor, scores = state.get("monitor"), state.get("best_k_models")
        if isinstance(monitor, str) and isinstance(scores, dict) and str(path) in scores:
            metrics[monitor] = scores[str(path)]
    try:
        checked = checked_metrics(metrics)
    except InvalidArgument as error:
        log.info("no metrics are stored: %s", error)
        return []
    # Lightning puts an infinity in the place of a NaN.
    return [(name, value) for name, value in checked if abs(value) != float("inf")]


def _step_of(checkpoint: Mapping[str, Any]) -> int:
    for key in ("global_step", "step", "iteration"):
        value = checkpoint.get(key)
        if isinstance(value, int):
            return checked_step(value)
    return 0


def _fabric_roots() -> list[str]:
    """Lightning comes as `lightning`, or as `pytorch_lightning` with `lightning_fabric`."""
    names = {"lightning": "lightning.fabric", "lightning_fabric": "lightning_fabric"}
    imported = [root for name, root in names.items() if name in sys.modules]
    return imported or list(names.values())


def _become_checkpoint_io(kind: type) -> None:
    """Make `kind` count as a CheckpointIO of each Lightning that is in use."""
    for root in _fabric_roots():
        try:
            module = importlib.import_module(f"{root}.plugins.io.checkpoint_io")
        except ImportError:
            continue
        module.CheckpointIO.register(kind)


def _stock_io() -> Any:
    """Lightning's own CheckpointIO."""
    problem: ImportError | None = None
    for root in _fabric_roots():
        try:
            return importlib.import_module(f"{root}.plugins.io.torch_io").TorchCheckpointIO()
        except ImportError as error:
            problem = error
    raise InvalidArgument(f"Lightning is not installed: {problem}") from problem
