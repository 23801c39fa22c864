"""Accelerate's save_state() and load_state() through Stillframe, by their own hooks.

The save hook gets the list of weights that save_state() is about to write, and empties it, which is
what the hook is made for. The optimizers are not handed to it. But save_state() and load_state()
(accelerate 1.15) read `accelerator._optimizers` into a local name before they call the hooks, and
pass that list on. So the hooks put a copy in its place and empty the list itself: the accelerator
keeps its optimizers, and this one call sees none. Should a later version copy the list, then
save_state() writes optimizer.bin besides, which is slower but harmless.

The folder gets a link to the checkpoint's weights, as a Trainer's does; schedulers, samplers, the
scaler, random number generators and register_for_checkpointing() objects stay Accelerate's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from stillframe._core.ticket import Ticket
from stillframe._core.warn import warn
from stillframe._huggingface.folders import WEIGHTS_NAME, linked_sequence, make_link
from stillframe._huggingface.support import bare_optimizer
from stillframe._torch.checkpointer import Checkpointer
from stillframe.errors import InvalidArgument, NotFound, StillframeError

# What load_state() does not take for weights: with several models, one file holds all of them.
_LINK_NAME = "stillframe.safetensors"
_SERVED = ("NO", "MULTI_CPU", "MULTI_GPU")


class AcceleratedRun:
    """What register() returns: the run that save_state() saves to; a context manager.

    Attributes:
        last_ticket: of the newest save_state(), or None.
    """

    def __init__(
        self, accelerator: Any, directory: str | os.PathLike[str], options: dict[str, Any]
    ) -> None:
        self.last_ticket: Ticket | None = None
        self._accelerator = accelerator
        self._path = Path(directory)
        self._options = options
        self._checkpointer: Checkpointer | None = None
        self._objects: list[Any] = []
        self._saves = 0
        self._handles = [
            accelerator.register_save_state_pre_hook(self._before_save),
            accelerator.register_load_state_pre_hook(self._before_load),
        ]

    def __enter__(self) -> AcceleratedRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        self._unhook()
        if self._checkpointer is not None:
            self._checkpointer.__exit__(kind, error, traceback)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the newest save_state() is durable.

        Args:
            timeout: seconds; None waits until it has ended one way or the other.

        Raises:
            TimeoutError: it is not in that time.
            StillframeError: it has failed.
        """
        if self.last_ticket is not None:
            self.last_ticket.wait("durable", timeout)

    def close(self, timeout: float | None = None) -> None:
        """Wait as wait() does, take the hooks off, let the daemon go. Twice is harmless.

        Args:
            timeout: seconds; None waits until the last save has ended one way or the other.

        Raises:
            TimeoutError: the last save is not durable in that time; the daemon goes on with it.
            StillframeError: the last save has failed.
        """
        self._unhook()
        checkpointer, self._checkpointer = self._checkpointer, None
        if checkpointer is not None:
            checkpointer.close(timeout)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_save(self, models: list[nn.Module], weights: list[Any], output_dir: str) -> None:
        reason = self._reason_against()
        if reason is not None:
            warn(f"Accelerate itself writes {output_dir}, not Stillframe: {reason}")
            return
        folder = Path(output_dir)
        link = folder / (WEIGHTS_NAME if len(models) == 1 else _LINK_NAME)
        if linked_sequence(link, self._path) is not None:
            # An older save to the same folder, whose file nobody may write to.
            link.unlink()
        step = _step_of(folder, self._saves)
        try:
            ticket = self._open(models).save(step)
        except StillframeError as error:
            if self._options.get("on_error") == "raise":
                raise
            warn(f"Accelerate itself writes {output_dir}, not Stillframe: {error}")
            return
        self._saves += 1
        self.last_ticket = ticket
        weights.clear()
        self._hide_optimizers()
        if ticket.sequence is not None:
            make_link(link, self._path, ticket.sequence, step, WEIGHTS_NAME)

    def _before_load(self, models: list[nn.Module], input_dir: str) -> None:
        links = [Path(input_dir, WEIGHTS_NAME), Path(input_dir, _LINK_NAME)]
        link = next((link for link in links if link.is_symlink()), None)
        if link is None:
            return  # Accelerate wrote it all.
        sequence = linked_sequence(link, self._path)
        if sequence is None:
            raise InvalidArgument(
                f"{link} leads to {os.readlink(link)}, not into the run that was registered, "
                f"{self._path}"
            )
        try:
            self._open(models).resume(str(sequence), on_damage="raise", only=["model", "optimizer"])
        except NotFound as error:
            raise InvalidArgument(
                f"{input_dir} cannot be loaded: its save failed, or the process ended before it "
                "was durable; load an older one"
            ) from error
        models.clear()
        self._hide_optimizers()

    def _hide_optimizers(self) -> None:
        seen_by_caller = self._accelerator._optimizers
        self._accelerator._optimizers = list(seen_by_caller)
        seen_by_caller.clear()

    def _reason_against(self) -> str | None:
        kind = getattr(self._accelerator.distributed_type, "value", "NO")
        if kind not in _SERVED:
            return f"{kind} saves in its own way"
        count = self._accelerator.num_processes
        return None if count == 1 else f"{count} processes train, and this version serves one"

    def _open(self, models: Sequence[nn.Module]) -> Checkpointer:
        """The Checkpointer of these models and of the optimizers that were prepared by now."""
        optimizers = [bare_optimizer(one) for one in self._accelerator._optimizers]
        objects = [*models, *optimizers]
        known = self._checkpointer
        is_same = list(map(id, self._objects)) == list(map(id, objects))
        if known is not None and is_same:
            return known
        if known is not None:
            try:
                known.close()
            except StillframeError:
                pass  # It was warned of.
        self._objects = objects
        self._checkpointer = Checkpointer(
            self._path,
            model=_one_or_named("model", models),
            optimizer=_one_or_named("optimizer", optimizers) if optimizers else None,
            **{"keep_last": None, **self._options},
        )
        return self._checkpointer


def register(accelerator: Any, directory: str | os.PathLike[str], **options: Any) -> AcceleratedRun:
    """Let an Accelerator save models and optimizers through Stillframe.

        run = stillframe.huggingface.register(accelerator, "out/run")
        accelerator.save_state("out/step_100")    # training goes on while it is written
        accelerator.load_state("out/step_100")
        run.close()                               # waits until the last one is durable

    With one model, `model.safetensors` in the folder is a link into the run, and leads to a plain
    safetensors file once the save is durable. What is not a model or an optimizer is saved by
    Accelerate itself, at once. The step of a save is the number at the end of its folder's name,
    else how many there were before. With DeepSpeed, FSDP, Megatron or several processes it warns
    why, and Accelerate saves everything.

    Args:
        accelerator: an accelerate.Accelerator; models and optimizers may be prepared later.
        directory: the run: where the large files go.
        options: for the Checkpointer, such as keep_last=3. Without, every checkpoint stays until
            `stillframe rm` removes it: removing a folder leaves what it links to.

    Returns:
        The run, to be closed at the end.
    """
    unknown = options.keys() & {"model", "optimizer", "scheduler"}
    if unknown:
        raise InvalidArgument(f"{', '.join(sorted(unknown))}: the accelerator says which")
    return AcceleratedRun(accelerator, directory, options)


def _step_of(folder: Path, otherwise: int) -> int:
    digits = re.search(r"(\d{1,18})$", folder.name)
    return int(digits[1]) if digits else otherwise


def _one_or_named(kind: str, objects: Sequence[Any]) -> Any:
    if len(objects) == 1:
        return objects[0]
    return {f"{kind}_{index}": one for index, one in enumerate(objects)}
