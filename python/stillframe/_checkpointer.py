"""Checkpointer: saves and restores the state of one PyTorch training process."""

from __future__ import annotations

import functools
import logging
import operator
import os
import platform
import re
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stillframe._fence import STALL_MS, Capture, Fence, StepHooks
from stillframe._layout import PartSpec
from stillframe._live import FORMAT, LiveState
from stillframe._restore import Restored, Restorer
from stillframe._rng import encode_rng
from stillframe._session import AttachOptions, SaveRequest, Session
from stillframe._sources import Sources
from stillframe._state_json import Encoder, dumps
from stillframe._tensors import check_name, local_tensor, spec_of
from stillframe.errors import (
    Cancelled,
    InvalidArgument,
    ResourceExhausted,
    StillframeError,
    StillframeWarning,
)
from stillframe.ticket import Ticket

_log = logging.getLogger("stillframe")
# Who sets up no logging is told by the warning; twice would be once too often.
_log.addHandler(logging.NullHandler())

_STEP_MAX = 2**63 - 1
_EXIT_SECONDS = 5.0
# docs/FORMAT.md section 4.
_METRIC_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


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
        _check_choice("mode", mode, ("min", "max"))
        _check_choice("when_busy", when_busy, ("wait", "skip"))
        _check_choice("capture", capture, ("auto", "eager", "lazy"))
        _check_choice("check", check, ("sample", "full"))
        _check_choice("on_error", on_error, ("warn", "raise"))
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
            keep_best=keep_best,
            best_metric=monitor,
            best_is_max=mode == "max",
            force_filesystem=force_filesystem,
            arena_bytes_max=arena_bytes_max or 0,
            framework=f"torch {torch.__version__}",
            python_version=platform.python_version(),
        )
        self._when_busy = when_busy
        self._busy_timeout = busy_timeout
        self._capture = capture
        self._checks_all = check == "full"
        self._on_error = on_error
        self._allow_pickle = allow_pickle

        self._pid = os.getpid()
        self._session: Session | None = None
        self._fence: Fence | None = None
        self._closer: weakref.finalize[[Session, Fence, StepHooks], Checkpointer] | None = None
        self._is_closed = False
        self._live: LiveState | None = None
        self._sources: Sources | None = None
        self._registered: list[PartSpec] | None = None
        self._last: Ticket | None = None
        self._outstanding: list[Ticket] = []
        self._unraised: StillframeError | None = None
        self._counts = {"skipped": 0, "failed": 0}
        self._wants_layout = False
        self._hooks = StepHooks(list(self._optimizers.values()), _weakly(self._before_step))

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
            self.close(timeout=_EXIT_SECONDS)
        except (StillframeError, TimeoutError) as other:
            _warn(f"while another error ended the training: {other}")

    # --- Saving -----------------------------------------------------------------------------------

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
        self._check_usable()
        checked_step = _checked_step(step)
        checked_metrics = _checked_metrics(metrics)
        session, fence = self._attach()
        with session.lock:
            fence.finish()
            self._note_failures()
            if self._unraised is not None and self._on_error == "raise":
                error, self._unraised = self._unraised, None
                raise error
            ticket = self._begin(session, fence, checked_step, checked_metrics, extra)
            ticket._call_seconds = time.perf_counter() - begin
            self._last = ticket
            return ticket

    def _begin(
        self,
        session: Session,
        fence: Fence,
        step: int,
        metrics: list[tuple[str, float]],
        extra: Any,
    ) -> Ticket:
        live, optimizer_text = self._collect()
        state_json, lifted, has_pickle = self._encode_state(live, optimizer_text, extra)
        is_lazy, capture = self._choose_capture(live)
        self._hooks.reset()
        request = SaveRequest(
            step=step,
            metrics=metrics,
            state_json=state_json,
            has_pickle=has_pickle,
            is_lazy=is_lazy,
            checks_all=self._checks_all,
            busy_timeout_ms=(
                STALL_MS if self._when_busy == "skip" else round(self._busy_timeout * 1000)
            ),
        )
        try:
            sources = self._prepare_sources(session, live, lifted)
            # The counters come first: a write in between is then seen.
            versions = live.versions() if is_lazy else []
            number, busy_seconds = session.begin_save(request, sources.array)
        except InvalidArgument:
            raise
        except StillframeError as error:
            return self._failed_ticket(step, capture, error)
        finally:
            if self._sources is not None:
                self._sources.set_extra(())
        ticket = Ticket(
            step=step,
            capture=capture,
            session=session,
            number=number,
            finish_capture=_finisher(fence),
        )
        ticket._busy_seconds_before = busy_seconds
        if is_lazy:
            find_changed = functools.partial(live.first_changed, versions)
            fence.begin(Capture(number, live.lazy_aliases, find_changed))
        self._outstanding.append(ticket)
        return ticket

    def _failed_ticket(self, step: int, capture: str, error: StillframeError) -> Ticket:
        is_skipped = self._when_busy == "skip" and isinstance(error, ResourceExhausted)
        ticket = Ticket(step=step, capture=capture, error=error, is_skipped=is_skipped)
        if is_skipped:
            self._counts["skipped"] += 1
            if self._counts["skipped"] == 1:
                _warn(f"the save of step {step} was skipped: {error}")
        else:
            self._report_failure(ticket)
        return ticket

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
        self, session: Session, live: LiveState, lifted: Sequence[tuple[str, Tensor]]
    ) -> Sources:
        ordered = sorted(
            ((spec_of(name, tensor), tensor) for name, tensor in lifted),
            key=lambda pair: pair[0].file_order,
        )
        parts = live.parts
        if ordered:
            specs = tuple(spec for spec, _ in ordered)
            parts = [*parts, PartSpec("extra", specs, (FORMAT,))]
        if self._registered is not parts and self._registered != parts:
            self._registered = None
            session.register_layout(parts)
            self._registered = parts
        if self._sources is None or self._sources.extra_count != len(ordered):
            self._sources = Sources(live.tensors, len(ordered))
        self._sources.set_extra([tensor for _, tensor in ordered])
        return self._sources

    def _choose_capture(self, live: LiveState) -> tuple[bool, str]:
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
        self._check_usable()
        if self._fence is not None:
            self._fence.finish()

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last save is durable, then let the daemon go. Twice is harmless.

        Args:
            timeout: seconds; None waits until the last save has ended one way or the other.

        Raises:
            TimeoutError: the last save is not durable in that time; the daemon goes on with it.
            StillframeError: the last save has failed.
        """
        self._check_process()
        if self._is_closed:
            return
        self._is_closed = True
        last, self._last = self._last, None
        try:
            if last is not None and last.state != "skipped":
                last.wait("durable", timeout)
        finally:
            if self._session is not None:
                self._note_failures()
            if self._closer is not None:
                self._closer()
            self._hooks.remove()

    def _before_step(self) -> None:
        """Called ahead of every optimizer's step. Must not raise into the training loop."""
        if os.getpid() != self._pid or self._is_closed:
            return
        if self._fence is not None:
            self._fence.finish()
        if self._wants_layout and all(one.state for one in self._optimizers.values()):
            self._prepare_arena()

    def _prepare_arena(self) -> None:
        """Say what saves will hold, so that the arena is ready for the first one."""
        self._wants_layout = False
        assert self._session is not None
        try:
            with self._session.lock:
                live, _ = self._collect()
                self._register_early(live.parts)
        except StillframeError as error:
            _log.info("the layout is not known yet: %s", error)

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
        self._check_usable()
        _check_choice("on_damage", on_damage, ("fallback", "raise"))
        session, fence = self._attach()
        fence.finish()
        with session.lock:
            restorer = Restorer(
                session=session,
                options=self._options,
                models=self._models,
                optimizers=self._optimizers,
                schedulers=self._schedulers,
                allow_pickle=self._allow_pickle,
                warn=_warn,
                register_layout=self._register_early,
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

    def _register_early(self, parts: list[PartSpec]) -> None:
        """Let the arena be made ready, or taken over from the trainer before, ahead of a save."""
        assert self._session is not None
        try:
            self._session.register_layout(parts)
            self._registered = parts
        except StillframeError as error:
            # Worth nothing now; a save says it again if it lasts.
            _log.info("the layout was not registered: %s", error)

    @property
    def status(self) -> dict[str, Any]:
        """Lane, copy kernel, slots, socket, saves by result, last error; does not attach."""
        self._check_process()
        known: dict[str, Any] = {
            "directory": self._options.directory,
            "attached": self._session is not None and self._session.is_open,
            "last_capture": self._last.capture if self._last is not None else None,
            "last_error": str(self._unraised) if self._unraised is not None else None,
            **self._counts,
        }
        if self._session is not None and self._session.is_open:
            known.update(self._session.describe())
        return known

    # --- The session ------------------------------------------------------------------------------

    def _attach(self) -> tuple[Session, Fence]:
        if self._session is None or self._fence is None:
            session = Session(self._options)
            fence = Fence(session)
            self._session, self._fence = session, fence
            # Runs at close(), when the Checkpointer is no longer used, or when the interpreter
            # ends.
            self._closer = weakref.finalize(self, _end, session, fence, self._hooks)
            for line in session.warnings():
                _warn(line)
        return self._session, self._fence

    def _check_usable(self) -> None:
        self._check_process()
        if self._is_closed:
            raise Cancelled("the Checkpointer was closed")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise InvalidArgument(
                "this process is a fork of the one that made the Checkpointer; make a new one here"
            )

    def _note_failures(self) -> None:
        """Warn of saves that have failed since the last look, once each."""
        still_open = []
        for ticket in self._outstanding:
            if ticket.state == "failed":
                self._report_failure(ticket)
            elif not ticket.is_final:
                still_open.append(ticket)
        self._outstanding = still_open

    def _report_failure(self, ticket: Ticket) -> None:
        self._counts["failed"] += 1
        error = ticket.error
        if error is not None:
            self._unraised = error
        _warn(f"the save of step {ticket.step} has failed: {error}")


def _end(session: Session, fence: Fence, hooks: StepHooks) -> None:
    """Finish or void the capture, end our threads, detach. Never raises: nobody could catch it."""
    try:
        if os.getpid() == session.pid:
            fence.stop(stall_ms=STALL_MS)
        session.close(_EXIT_SECONDS)
    except StillframeError as error:
        _log.warning("closing the session: %s", error)
    hooks.remove()


def _finisher(fence: Fence) -> Callable[[Ticket, float | None], None]:
    def finish(ticket: Ticket, timeout: float | None) -> None:
        seconds = 10.0 if timeout is None else min(timeout, 10.0)
        fence.help(ticket._number, round(seconds * 1000))

    return finish


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


def _check_choice(what: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise InvalidArgument(f"{what} is {value!r}, not {listed}")


def _checked_step(step: int) -> int:
    try:
        checked = operator.index(step)
    except TypeError:
        raise InvalidArgument(f"step is {step!r}, not an integer") from None
    if not 0 <= checked <= _STEP_MAX:
        raise InvalidArgument(f"step is {checked}; it must be 0 or more, and below 2^63")
    return checked


def _checked_metrics(metrics: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    checked = []
    for name, value in (metrics or {}).items():
        is_text = isinstance(name, str) and _METRIC_NAME.fullmatch(name) is not None
        if not is_text or len(name.encode()) > 256:
            raise InvalidArgument(
                f"the metric name {name!r} is not 1 to 256 bytes of UTF-8 without control "
                "characters"
            )
        try:
            checked.append((name, float(value.item() if hasattr(value, "item") else value)))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidArgument(
                f"the metric {name} is {value!r}, not a number: {error}"
            ) from None
    return checked


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


def _warn(text: str) -> None:
    """Log and warn, with the line of the user's code that called into the package."""
    _log.warning("%s", text)
    package = os.path.dirname(__file__)
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
        level += 1
    warnings.warn(text, StillframeWarning, stacklevel=level)
