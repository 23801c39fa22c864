"""What one save of a Checkpointer holds: layout, memory and text, from the objects as they are now.

What did not change since the save before is kept: collecting again costs a walk over the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stillframe._core import fence
from stillframe._core.fence import StepHooks
from stillframe._core.layout import PartSpec
from stillframe._core.saver import Content, Lazy
from stillframe._core.state_json import Json, dumps
from stillframe._torch.live import FORMAT, LiveState
from stillframe._torch.members import Members
from stillframe._torch.sources import Sources
from stillframe._torch.state import encode_state
from stillframe._torch.tensors import spec_of
from stillframe.errors import InvalidArgument


class Collector:
    """Makes the contents of saves. The caller holds the session's lock."""

    def __init__(
        self, members: Members, *, make_recipe: Callable[[], Json | None], allow_pickle: bool
    ) -> None:
        self._members = members
        self._make_recipe = make_recipe
        self._recipe_text = ""
        self._allow_pickle = allow_pickle
        self._live: LiveState | None = None
        self._sources: Sources | None = None

    def forget(self) -> None:
        """After a restore: look at everything anew."""
        self._live = None

    def parts(self) -> list[PartSpec]:
        """The layout of now, but for tensors that lie in state.json's values."""
        return self._collect()[0].parts

    def content(
        self, extra: Any, epoch: int | None, *, is_lazy: bool
    ) -> tuple[Content, Lazy | None]:
        """What to save now. Its sources hold the caller's tensors until release().

        Raises:
            InvalidArgument: something cannot be saved; the message names it.
        """
        live, optimizer_text = self._collect()
        state = encode_state(
            self._members,
            live,
            optimizer_text,
            recipe_text=self._recipe_text,
            extra=extra,
            epoch=epoch,
            allow_pickle=self._allow_pickle,
        )
        parts, sources = self._prepare_sources(live, state.lifted)
        lazy = None
        if is_lazy:
            # The counters come before the copy: a write in between is then seen.
            find_changed = functools.partial(live.first_changed, live.versions())
            lazy = Lazy(live.lazy_aliases, find_changed)
        devices = {*live.devices, *(one.get_device() for _, one in state.lifted)} - {-1}
        streams = [(device, current_stream(device)) for device in sorted(devices)]
        return Content(parts, sources.array, state.text, state.has_pickle, streams), lazy

    def release(self) -> None:
        """Let go of the tensors that were copied before save() returned."""
        if self._sources is not None:
            self._sources.set_extra(())

    def _collect(self) -> tuple[LiveState, str]:
        live = self._live
        if live is not None and live.is_current():
            text, fits = live.encode_optimizers()
            if fits:
                return live, text
        members = self._members
        live = LiveState(
            members.models, members.optimizers, ema=members.ema, allow_pickle=self._allow_pickle
        )
        text, _ = live.encode_optimizers()
        # With the tensors, so that what they are and how the model is made belong together.
        recipe = self._make_recipe()
        self._recipe_text = "" if recipe is None else dumps(recipe)
        self._live = live
        self._sources = None
        return live, text

    def _prepare_sources(
        self, live: LiveState, lifted: Sequence[tuple[str, Tensor]]
    ) -> tuple[list[PartSpec], Sources]:
        ordered = sorted(
            ((spec_of(name, tensor), tensor) for name, tensor in lifted),
            key=lambda pair: pair[0].file_order,
        )
        parts = live.parts
        if ordered:
            specs = tuple(spec for spec, _ in ordered)
            parts = [*parts, PartSpec("extra", specs, (FORMAT,))]
        if self._sources is None or self._sources.extra_count != len(ordered):
            self._sources = Sources(live.tensors, len(ordered))
        self._sources.set_extra([tensor for _, tensor in ordered])
        return parts, self._sources


def check_not_recorded(reason: str) -> None:
    """Raise InvalidArgument(`reason`) where the current stream records a CUDA graph."""
    if fence.is_recording():
        raise InvalidArgument(reason)


def current_stream(device: int) -> int:
    """The CUstream that torch uses on a GPU now.

    Raises:
        InvalidArgument: what is enqueued there is recorded into a CUDA graph, not done.
    """
    with torch.cuda.device(device):
        check_not_recorded("a save cannot be part of a CUDA graph; save between its replays")
    return int(torch.cuda.current_stream(device).cuda_stream)


def choose_capture(asked: str, hooks: StepHooks, *, has_optimizers: bool) -> tuple[bool, str]:
    """Whether a save is lazy, and for people: which way it is, and why.

    Args:
        asked: "auto", "eager" or "lazy".
        hooks: the optimizers'.
        has_optimizers: whether there are any.
    """
    if asked == "eager":
        return False, "eager: as asked for"
    if not has_optimizers:
        return False, "eager: no optimizer was given, so nothing says when training writes"
    if torch.compiler.is_compiling():
        return False, "eager: inside torch.compile, where the hook of step() does not run"
    if asked == "lazy":
        return True, "lazy: as asked for"
    if not hooks.all_fired:
        return False, "eager: the hook of step() has not run since the save before"
    return True, "lazy: step() waits for it"
