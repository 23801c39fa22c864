"""Checkpointer: saves and restores the state of one PyTorch training process."""

from __future__ import annotations

import functools
import os
import platform
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stillframe._arguments import check_choice, checked_metrics, checked_step
from stillframe._fence import StepHooks
from stillframe._layout import PartSpec
from stillframe._live import FORMAT, LiveState
from stillframe._restore import Restored, Restorer
from stillframe._rng import encode_rng
from stillframe._saver import EXIT_SECONDS, Content, Lazy, Saver, SaverOptions
from stillframe._session import AttachOptions
from stillframe._sources import Sources
from stillframe._state_json import Encoder, dumps
from stillframe._tensors import check_name, local_tensor, spec_of
from stillframe._warn import log, warn
from stillframe.errors import InvalidArgument, StillframeError
from stillframe.ticket import Ticket


class Stateful(Protocol):
    """A scheduler, or anything else with a state of its own."""

    def state_dict(self) -> Any:
        """Return the state, as plain values and tensors."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take a state back."""


class Checkpointer:
    """Saves a training's state through the Stillframe daemon, and gets it back.

    save() returns at once: parameters and optimizer state are copied while forward and backward
    run, and the optimizer's step() waits until that is done. A daemon, started when none runs,
    makes the copy durable. The Checkpointer may be made before or after torch.compile, DDP or
    fully_shard: tensors are read at the first resume() or save().

    Each process that trains makes its own; a forked child cannot use its parent's. Copies of an
    optimizer (deepcopy, pickle) do not carry the hooks that make step() wait: pass the one that
    steps.

    Args:
        directory: the run; made when absent. One writer at a time.
        model: a module, or a dict of them: names then begin with the dict's key.
        optimizer: the optimizer of the loop, or a dict of them.
        scheduler: anything with state_dict() and load_state_dict(), or a dict of such.
        keep_last: how many of the newest checkpoints stay; None keeps all.
        keep_best: how many of the best stay besides; needs `monitor`.
        monitor: the metric that decides which is best; NaN never is.
        mode: "min" or "max".
        when_busy: "wait" for a slot when saves come faster than the disk, or "skip" the save.
        busy_timeout: seconds that "wait" waits before the save fails.
        capture: "eager" copies before save() returns; "lazy" while training goes on, which needs
            every write of the parameters to be behind the optimizer's step() or fence(); "auto" is
            lazy when the step() hooks have been seen to run.
        check: "sample" compares up to 256 blocks of a lazy save with the training's memory before
            it counts; "full" all of it.
        on_error: "warn" of failed saves, or "raise" at the next save(). wait() and close() always
            raise.
        allow_pickle: pickle values in `extra` that have no other form, and load such pickles.
        rank: this process's index; only rank 0 of 1 is served so far.
        world_size: number of processes.
        arena_bytes_max: cap on the daemon's memory for this run; None takes the daemon's own.
        force_filesystem: accept a network file system.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        scheduler: Stateful | Mapping[str, Stateful] | None = None,
        keep_last: int | None = 3,
        keep_best: int = 0,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        when_busy: Literal["wait", "skip"] = "wait",
        busy_timeout: float = 60.0,
        capture: Literal["auto", "eager", "lazy"] = "auto",
        check: Literal["sample", "full"] = "sample",
        on_error: Literal["warn", "raise"] = "warn",
        allow_pickle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        arena_bytes_max: int | None = None,
        force_filesystem: bool = False,
    ) -> None:
        check_choice("mode", mode, ("min", "max"))
        check_choice("when_busy", when_busy, ("wait", "skip"))
        check_choice("capture", capture, ("auto", "eager", "lazy"))
        check_choice("check", check, ("sample", "full"))
        check_choice("on_error", on_error, ("warn", "raise"))
        if keep_last is not None and keep_last < 1:
            raise InvalidArgument(
                f"keep_last is {keep_last}; it must be 1 or more, or None for all"
            )
        if keep_best < 0 or (keep_best > 0 and monitor is None):
            raise InvalidArgument("keep_best must be 0 or more, and needs monitor=")
        if not 0 < busy_timeout <= 86_400:
            raise InvalidArgument(f"busy_timeout is {busy_timeout}, not 0 to 86400 seconds")
        if (rank, world_size) != (0, 1):
            raise InvalidArgument(
                f"rank {rank} of {world_size}: this version serves one rank; let rank 0 alone save"
            )
        path = os.path.abspath(os.fspath(directory))
        if "\0" in path or "\0" in (monitor or ""):
            raise InvalidArgument(f"{path!r}: directory and monitor must not have a NUL in them")
        self._models = _named("model", model, nn.Module)
        self._optimizers = _named("optimizer", optimizer, Optimizer)
        self._schedulers: dict[str | None, Stateful] = _named("scheduler", scheduler, None)
        if not self._models:
            raise InvalidArgument("model= is an empty dict")
        self._options = AttachOptions(
            directory=path,
            rank=rank,
            world_size=world_size,
            keep_last=keep_last or 0,
            best=() if monitor is None else ((monitor, mode, keep_best),),
            force_filesystem=force_filesystem,
            arena_bytes_max=arena_bytes_max or 0,
            framework=f"torch {torch.__version__}",
            python_version=platform.python_version(),
        )
        self._saver = Saver(
            self._options,
            SaverOptions(
                when_busy=when_busy,
                busy_timeout=busy_timeout,
                checks_all=check == "full",
                on_error=on_error,
            ),
        )
        self._capture = capture
        self._allow_pickle = allow_pickle

        self._live: LiveState | None = None
        self._sources: Sources | None = None
        self._wants_layout = False
        self._hooks = StepHooks(list(self._optimizers.values()), _weakly(self._before_step))
        weakref.finalize(self, self._hooks.remove)

    def __enter__(self) -> Checkpointer:
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
        # The training's own error is the one to see.
        try:
            self.close(timeout=EXIT_SECONDS)
        except (StillframeError, TimeoutError) as other:
            warn(f"while another error ended the training: {other}")

    # --- Saving -----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Find or start the daemon, and have its memory ready before the first save.

        Saves work without; the first then waits for both. resume() does the same.

        Raises:
            InvalidArgument: the directory cannot be used.
            Unavailable: there is no daemon.
        """
        self._saver.check_usable()
        self._saver.attach()
        # Optimizers make their state in their first step.
        self._wants_layout = True

    def save(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        extra: Any = None,
    ) -> Ticket:
        """Save the state of now, as `step`.

        What goes wrong later (the disk, the daemon) is warned of once and stays in the ticket.

        Args:
            step: 0 or more; may repeat after a rollback.
            metrics: numbers by name, stored with the checkpoint; 0-d tensors are taken too.
            extra: plain values, containers, NumPy values and tensors, given back by resume().

        Returns:
            The save's ticket, at least "accepted"; or "skipped", or "failed".

        Raises:
            InvalidArgument: the step, a metric, or a value in `extra` cannot be saved; or, at the
            first
                save, the directory cannot be used.
            Unavailable: at the first save: there is no daemon.
            StillframeError: with on_error="raise": the failure of an earlier save.
        """
        begin = time.perf_counter()
        self._saver.check_usable()
        known_step = checked_step(step)
        known_metrics = checked_metrics(metrics)
        with self._saver.attach().lock:
            self._saver.make_ready()
            ticket = self._begin(known_step, known_metrics, extra)
            ticket._call_seconds = time.perf_counter() - begin
            return ticket

    def _begin(self, step: int, metrics: list[tuple[str, float]], extra: Any) -> Ticket:
        live, optimizer_text = self._collect()
        state_json, lifted, has_pickle = self._encode_state(live, optimizer_text, extra)
        is_lazy, capture = self._choose_capture()
        self._hooks.reset()
        parts, sources = self._prepare_sources(live, lifted)
        lazy = None
        if is_lazy:
            # The counters come before the copy: a write in between is then seen.
            find_changed = functools.partial(live.first_changed, live.versions())
            lazy = Lazy(live.lazy_aliases, find_changed)
        try:
            return self._saver.begin(
                Content(parts, sources.array, state_json, has_pickle),
                step=step,
                metrics=metrics,
                capture=capture,
                lazy=lazy,
            )
        finally:
            sources.set_extra(())

    def _collect(self) -> tuple[LiveState, str]:
        live = self._live
        if live is not None and live.is_current():
            text, fits = live.encode_optimizers()
            if fits:
                return live, text
        live = LiveState(self._models, self._optimizers, allow_pickle=self._allow_pickle)
        text, _ = live.encode_optimizers()
        self._live = live
        self._sources = None
        return live, text

    def _encode_state(
        self, live: LiveState, optimizer_text: str, extra: Any
    ) -> tuple[bytes, list[tuple[str, Tensor]], bool]:
        """state.json, the tensors beside the optimizers' that it names, whether it has a pickle."""
        lifted: list[tuple[str, Tensor]] = []

        def lift(path: str, tensor: Tensor) -> str:
            name = _extra_name(path)
            lifted.append((name, local_tensor(path, tensor.detach())))
            return name

        encoder = Encoder(lift, allow_pickle=self._allow_pickle)
        members = ['"format_version": 1']
        if live.models.stateful:
            states = {
                name: encoder.encode(_plain(module.get_extra_state()), f"model.{name}")
                for name, module in live.models.stateful.items()
            }
            members.append(f'"model": {dumps({"extra_state": states})}')
        if self._optimizers:
            members.append(f'"optimizer": {optimizer_text}')
        if self._schedulers:
            members.append(f'"scheduler": {dumps(self._encode_schedulers(encoder))}')
        members.append(f'"rng": {encode_rng()}')
        if extra is not None:
            members.append(f'"extra": {dumps(encoder.encode(extra, "extra"))}')
        text = f"{{{', '.join(members)}}}\n".encode()
        return text, lifted, encoder.has_pickle or live.has_pickle

    def _encode_schedulers(self, encoder: Encoder) -> Any:
        states = {
            name: encoder.encode(
                _plain(one.state_dict()), "scheduler" if name is None else f"scheduler.{name}"
            )
            for name, one in self._schedulers.items()
        }
        return states.get(None, states)

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

    def _choose_capture(self) -> tuple[bool, str]:
        if self._capture == "eager":
            return False, "eager: as asked for"
        if not self._optimizers:
            return False, "eager: no optimizer was given, so nothing says when training writes"
        if torch.compiler.is_compiling():
            return False, "eager: inside torch.compile, where the hook of step() does not run"
        if self._capture == "lazy":
            return True, "lazy: as asked for"
        if not self._hooks.all_fired:
            return False, "eager: the hook of step() has not run since the save before"
        return True, "lazy: step() waits for it"

    # --- Waiting ----------------------------------------------------------------------------------

    def fence(self) -> None:
        """Wait until training may write again: for loops that write outside of step().

        Helps to copy. A snapshot that makes no progress for 50 ms is given up; training is not.
        """
        self._saver.check_usable()
        self._saver.finish_capture()

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last save is durable, then let the daemon go. Twice is harmless.

        Args:
            timeout: seconds; None waits until the last save has ended one way or the other.

        Raises:
            TimeoutError: the last save is not durable in that time; the daemon goes on with it.
            StillframeError: the last save has failed.
        """
        try:
            self._saver.close(timeout)
        finally:
            self._hooks.remove()

    def _before_step(self) -> None:
        """Called ahead of every optimizer's step. Must not raise into the training loop."""
        if not self._saver.is_usable:
            return
        self._saver.finish_capture()
        if self._wants_layout and all(one.state for one in self._optimizers.values()):
            self._prepare_arena()

    def _prepare_arena(self) -> None:
        """Say what saves will hold, so that the arena is ready for the first one."""
        self._wants_layout = False
        try:
            with self._saver.attach().lock:
                live, _ = self._collect()
                self._saver.register_early(live.parts)
        except StillframeError as error:
            log.info("the layout is not known yet: %s", error)

    # --- Restoring --------------------------------------------------------------------------------

    def resume(
        self,
        which: Literal["latest", "best"] | str | int = "latest",
        *,
        on_damage: Literal["fallback", "raise"] = "fallback",
        strict: bool = True,
        only: Sequence[str] | None = None,
        map_names: Mapping[str, str] | Callable[[str], str | None] | None = None,
    ) -> Restored | None:
        """Restore a checkpoint into the model, optimizer, scheduler and random number generators.

        First waits for saves of the run that are captured but not yet durable. Tensors are filled
        in place.

        Args:
            which: "latest", "best", a step, or a tag.
            on_damage: "fallback" warns of a damaged checkpoint and takes the one before (of the
                newest) or the next best; "raise" raises DataLoss.
            strict: False skips tensors whose names or shapes differ. Dtypes must always be equal.
            only: what to restore: "model", "optimizer", "scheduler", "rng", or prefixes of the
                model's tensor names. None restores all.
            map_names: from names of the checkpoint's model tensors to names of the model's; a
                callable may answer None to leave one out. Optimizer state follows its parameter.

        Returns:
            What was restored, or None, with nothing touched, if the run never had a checkpoint.

        Raises:
            InvalidArgument: names, shapes or dtypes differ: all are listed, nothing was written.
            NotFound: there are checkpoints, but not this one.
            DataLoss: there are checkpoints, but none restores.
            TimeoutError: an earlier save does not become durable.
            Unavailable: there is no daemon.
        """
        self._saver.check_usable()
        check_choice("on_damage", on_damage, ("fallback", "raise"))
        session = self._saver.attach()
        self._saver.finish_capture()
        with session.lock:
            restorer = Restorer(
                session=session,
                options=self._options,
                models=self._models,
                optimizers=self._optimizers,
                schedulers=self._schedulers,
                allow_pickle=self._allow_pickle,
                warn=warn,
                register_layout=self._saver.register_early,
            )
            restored = restorer.restore(
                which,
                falls_back=on_damage == "fallback",
                strict=strict,
                only=only,
                map_names=map_names,
            )
            self._live = None
            self._hooks.reset()
            if restored is None:
                # Optimizers make their state in their first step.
                self._wants_layout = True
                if all(one.state for one in self._optimizers.values()):
                    self._prepare_arena()
            return restored

    @property
    def status(self) -> dict[str, Any]:
        """Lane, copy kernel, slots, socket, saves by result, last error; does not attach."""
        return self._saver.describe()


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call a bound method while its object lives: an optimizer must not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


def _named(what: str, given: Any, kind: type | None) -> dict[str | None, Any]:
    """One object as {None: object}; a dict of them with checked names."""
    if given is None:
        return {}
    # A module may be a mapping itself (nn.ModuleDict is not, but users write such classes).
    is_one = isinstance(given, kind) if kind is not None else hasattr(given, "state_dict")
    if is_one:
        return {None: given}
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{what}= is a {type(given).__qualname__}")
    for name, value in given.items():
        check_name(what, name)
        fits = isinstance(value, kind) if kind is not None else hasattr(value, "state_dict")
        if not fits:
            raise InvalidArgument(f"{what}[{name!r}] is a {type(value).__qualname__}")
    return dict(given)


def _extra_name(path: str) -> str:
    """The tensor name for a path in `extra`, or in another part of the state, which gets a `$`."""
    if not path.startswith("extra"):
        return f"extra.${path}"
    rest = path.removeprefix("extra")
    return f"extra{rest}" if rest.startswith(".") else f"extra.{rest}"


def _plain(value: Any) -> Any:
    """The same with OrderedDict, Counter and their like as the dicts that they are."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) is list:
        return [_plain(item) for item in value]
    return value
