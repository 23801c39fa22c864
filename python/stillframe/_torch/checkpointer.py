"""Checkpointer: saves and restores the state of one PyTorch training process."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from stillframe._core.arguments import check_choice, checked_metrics, checked_step
from stillframe._core.best import BestRule, BestTracker, parse_best
from stillframe._core.fence import StepHooks, weakly
from stillframe._core.report import Report
from stillframe._core.saver import EXIT_SECONDS, Saver
from stillframe._core.session import list_run
from stillframe._core.ticket import Ticket
from stillframe._core.warn import log, warn
from stillframe._torch.boundary import Boundary
from stillframe._torch.collect import Collector, check_not_recorded, choose_capture
from stillframe._torch.members import Stateful, collect_members
from stillframe._torch.options import attach_options, saver_options
from stillframe._torch.policy import Policy
from stillframe._torch.recipe import Factory, recipe_maker
from stillframe._torch.restore import Restored, Restorer
from stillframe._torch.signals import DEFAULT_SIGNALS, EXIT_CODE, StopFlag
from stillframe.errors import StillframeError

# How often step() looks whether a save has ended: looking takes as long as ten steps that do not.
_LOOK_SECONDS = 0.05


class Checkpointer:
    """Saves a training's state through the Stillframe daemon, and gets it back.

    save() returns at once: parameters and optimizer state are copied while forward and backward
    run, and the optimizer's step() waits until that is done. A daemon, started when none runs,
    makes the copy durable. The Checkpointer may be made before or after torch.compile, DDP or
    fully_shard: tensors are read at the first resume() or save().

    Each process that trains makes its own; a forked child cannot use its parent's. Copies of an
    optimizer (deepcopy, pickle) do not carry the hooks that make step() wait: pass the one that
    steps. The random number generators of Python, NumPy, torch and CUDA are always included.

    As a context manager it closes itself. When an exception ends the training, it saves the state
    of the last step() if no optimizer has stepped since; else the checkpoint before stays, and a
    warning says so.

    Args:
        directory: the run; made when absent. One writer at a time.
        model: a module, or a dict of them: names then begin with the dict's key.
        optimizer: the optimizer of the loop, or a dict of them.
        scheduler: anything with state_dict() and load_state_dict(), or a dict of such.
        scaler: a torch.amp.GradScaler, or a dict of them.
        ema: an AveragedModel, or any module or object with state_dict(), or a dict of them.
        generators: a torch.Generator, np.random.Generator, np.random.RandomState or random.Random,
            or a dict of them.
        loader: a ResumableLoader, or what else has state_dict() and load_state_dict(), or a dict.
        state: a dict of any other objects with state_dict() and load_state_dict(); tensors in
            their states are saved as tensors.
        every_steps: step() saves when the step reaches or passes a multiple of it.
        every_seconds: step() saves when so long has passed since the save before.
        every_epochs: step() saves when the completed epochs reach or pass a multiple of it; it is
            told them by its `epoch`, or by `loader.epoch`.
        overhead_target: the share of the training's time that saves may cost, such as 0.01: step()
            measures, chooses the interval, and logs what it chose.
        best: `("val_loss", "min", 3)` keeps the three checkpoints with the least val_loss besides
            the others, or a list of such. NaN never is best; of equal ones the newest is.
        keep_last: how many of the newest checkpoints stay; None keeps all.
        keep_every: those stay too whose step is a multiple of it.
        signals: those after which the next step() saves, waits for "captured" and raises
            SystemExit(143); () for none. None takes SIGTERM and SIGUSR1 if an every_* or
            overhead_target is given. Their handlers are set by the first step(), in the main
            thread only, call those that were there before, and go at close().
        when_busy: what to do when saves come faster than the disk: "wait" for a slot, or "skip" the
            save. None: save() waits; step() skips, but never a new best, nor the last one.
        busy_timeout: seconds that "wait" waits before the save fails.
        capture: "eager" copies before save() returns; "lazy" while training goes on, which needs
            every write of the parameters to be behind the optimizer's step() or fence(); "auto" is
            lazy when the step() hooks have been seen to run.
        check: "sample" compares up to 256 blocks of a lazy save with the training's memory before
            it counts; "full" all of it.
        on_error: "warn" of failed saves, or "raise" at the next save(). wait() and close() always
            raise.
        allow_pickle: pickle values that have no other form, and load such pickles.
        rank: this process's index; only rank 0 of 1 is served so far.
        world_size: number of processes.
        arena_bytes_max: cap on the daemon's memory for this run; None takes the daemon's own.
        config: keyword arguments of the model's class or factory, plain values: with them
            load_model(RUN) makes the model by itself. Not needed where the class takes none, or
            the model is made of torch's own modules.
        factory: an importable function, or "module:name" of one, that makes the model from
            `config`, if its class does not.
        lane: how tensors of GPUs are captured: "pinned", "hbm" or "ipc", where it is possible (the
            guide's page on GPUs); "auto" is "pinned".
        gpu_ring_bytes: the most that lanes "hbm" and "ipc" take of each GPU's memory; None takes
            what is of use, up to half of what is free.
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
        scaler: Stateful | Mapping[str, Stateful] | None = None,
        ema: Stateful | Mapping[str, Stateful] | None = None,
        generators: Any = None,
        loader: Stateful | Mapping[str, Stateful] | None = None,
        state: Mapping[str, Stateful] | None = None,
        every_steps: int | None = None,
        every_seconds: float | None = None,
        every_epochs: int | None = None,
        overhead_target: float | None = None,
        best: BestRule | Sequence[BestRule] | None = None,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        signals: Sequence[int] | None = None,
        when_busy: Literal["wait", "skip"] | None = None,
        busy_timeout: float = 60.0,
        capture: Literal["auto", "eager", "lazy"] = "auto",
        check: Literal["sample", "full"] = "sample",
        on_error: Literal["warn", "raise"] = "warn",
        allow_pickle: bool = False,
        rank: int = 0,
        world_size: int = 1,
        config: Mapping[str, Any] | None = None,
        factory: Factory | str | None = None,
        arena_bytes_max: int | None = None,
        lane: Literal["auto", "pinned", "hbm", "ipc"] = "auto",
        gpu_ring_bytes: int | None = None,
        force_filesystem: bool = False,
    ) -> None:
        check_choice("capture", capture, ("auto", "eager", "lazy"))
        self._members = collect_members(
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            ema=ema,
            loader=loader,
            generators=generators,
            state=state,
        )
        self._policy = Policy(
            every_steps=every_steps,
            every_seconds=every_seconds,
            every_epochs=every_epochs,
            overhead_target=overhead_target,
        )
        self._criteria = parse_best(best)
        if signals is None:
            signals = DEFAULT_SIGNALS if self._policy.decides else ()
        self._stop = StopFlag(signals)
        options = attach_options(
            directory,
            criteria=self._criteria,
            keep_last=keep_last,
            keep_every=keep_every,
            rank=rank,
            world_size=world_size,
            arena_bytes_max=arena_bytes_max,
            force_filesystem=force_filesystem,
            lane=lane,
            gpu_ring_bytes=gpu_ring_bytes,
        )
        how = saver_options(
            when_busy=when_busy, busy_timeout=busy_timeout, check=check, on_error=on_error
        )
        self._saver = Saver(options, how)
        self._best = BestTracker(self._criteria, lambda: list_run(options.directory))
        self._step_when_busy: Literal["wait", "skip"] = when_busy or "skip"
        self._capture = capture
        self._allow_pickle = allow_pickle
        self._collector = Collector(
            self._members,
            make_recipe=recipe_maker(self._members.models, config, factory),
            allow_pickle=allow_pickle,
        )
        self._loader = self._members.stateful.get("loader", {}).get(None)

        self._boundary = Boundary()
        self._next_look = 0.0
        self._wants_layout = False
        self._hooks = StepHooks(list(self._members.optimizers.values()), weakly(self._before_step))
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
            if self._saver.is_usable:
                self._save_boundary(f"{type(error).__name__} has ended the training", EXIT_SECONDS)
            self._close(EXIT_SECONDS)
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
            InvalidArgument: the step, a metric, or a value in a state or in `extra` cannot be
                saved; or, at the first save, the directory cannot be used.
            Unavailable: at the first save: there is no daemon.
            StillframeError: with on_error="raise": the failure of an earlier save.
        """
        return self._save(step, metrics, extra, self._loader_epoch())

    def step(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        extra: Any = None,
        *,
        epoch: int | None = None,
    ) -> Ticket | None:
        """Say that a training step is done; saves if one is due, or if the metrics are a new best.

        Call it after every training step, and after an evaluation with its metrics. Without a save
        it takes a few microseconds.

        Args:
            step: the step that is done; 0 is never due.
            metrics: as for save(); read only if they decide or are saved.
            extra: as for save(), or a function that makes it, called only for a save.
            epoch: the epochs completed so far; kept with the checkpoint.

        Returns:
            The save's ticket, or None if nothing was due.

        Raises:
            SystemExit: a signal has come; what was done is at least "captured".
            InvalidArgument: as save(); a metric of `best=` is not a number; or every_epochs was
                given and neither `epoch` nor a loader tells.
            StillframeError: as save().
        """
        saver = self._saver
        if not saver.is_usable:
            saver.check_usable()
        if epoch is None and self._loader is not None:
            epoch = self._loader_epoch()
        due = self._policy.is_due(step, epoch)
        self._boundary.reached(step, metrics, extra, epoch)
        stop = self._stop
        stop.install()
        is_best = bool(metrics) and self._best.enters(metrics or {})
        ticket = None
        if stop.signal:
            self._stop_training()
        if due or is_best:
            when_busy = "wait" if is_best else self._step_when_busy
            ticket = self._save_step(when_busy=when_busy)
        elif saver.has_outstanding and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _LOOK_SECONDS
            saver.note_ended()
        self._policy.step_ended()
        return ticket

    def _save_step(self, **busy: Any) -> Ticket:
        at = self._boundary
        assert at.step is not None
        return self._save(at.step, at.metrics, at.make_extra(), at.epoch, **busy)

    def _save(
        self,
        step: int,
        metrics: Mapping[str, Any] | None,
        extra: Any,
        epoch: int | None,
        **busy: Any,
    ) -> Ticket:
        begin = time.perf_counter()
        self._saver.check_usable()
        known_step = checked_step(step)
        known_metrics = checked_metrics(metrics)
        with self._saver.attach().lock:
            self._saver.make_ready()
            is_lazy, capture = choose_capture(
                self._capture, self._hooks, has_optimizers=bool(self._members.optimizers)
            )
            content, lazy = self._collector.content(extra, epoch, is_lazy=is_lazy)
            self._hooks.reset()
            self._best.look_before(known_metrics)
            now = time.monotonic()
            try:
                ticket = self._saver.begin(
                    content,
                    step=known_step,
                    metrics=known_metrics,
                    capture=capture,
                    lazy=lazy,
                    **busy,
                )
            finally:
                self._collector.release()
            ticket._call_seconds = time.perf_counter() - begin
        self._boundary.saved(ticket)
        self._best.record(dict(known_metrics), ticket)
        self._policy.saved(ticket, now)
        return ticket

    def _loader_epoch(self) -> int | None:
        epoch = getattr(self._loader, "epoch", None)
        return epoch if type(epoch) is int else None

    # --- Ending -----------------------------------------------------------------------------------

    def _stop_training(self) -> None:
        """A signal has come: save, let the daemon have all of it, and go."""
        number, self._stop.signal = self._stop.signal, 0
        try:
            ticket = self._save_step(when_busy="wait")
            ticket.wait("captured", self._saver.busy_timeout)
            log.info("signal %d: step %d is %s, ending", number, ticket.step, ticket.state)
        except (StillframeError, TimeoutError) as error:
            warn(f"signal {number} ends the training, and its last save has failed: {error}")
        raise SystemExit(EXIT_CODE)

    def _save_boundary(self, why: str, busy_timeout: float) -> None:
        """Save the state of the last step() if it still is, and is not saved already."""
        at = self._boundary
        if at.step is None or at.is_saved:
            return
        lost = at.why_lost()
        if lost is not None:
            warn(f"{why}, and {lost}: the checkpoint before stays")
            return
        ticket = self._save_step(when_busy="wait", busy_timeout=busy_timeout)
        log.info("%s: step %d is %s", why, at.step, ticket.state)

    def close(self, timeout: float | None = None) -> None:
        """Wait until the last save is durable, then let the daemon go. Twice is harmless.

        Args:
            timeout: seconds; None waits until the last save has ended one way or the other.

        Raises:
            TimeoutError: the last save is not durable in that time; the daemon goes on with it.
            StillframeError: the last save has failed.
        """
        self._close(timeout)
        # A signal that no step() has answered does now what it would have done without us.
        self._stop.deliver()

    def _close(self, timeout: float | None) -> None:
        try:
            if self._saver.is_usable:
                if self._boundary.was_skipped:
                    # The last one is never skipped.
                    busy = self._saver.busy_timeout if timeout is None else timeout
                    self._save_boundary("the last save was skipped", busy)
                self._best.warn_of_unreported()
            self._saver.close(timeout)
        finally:
            self._hooks.remove()
            self._stop.remove()

    def fence(self) -> None:
        """Wait until training may write again: for loops that write outside of step().

        Helps to copy. A snapshot that makes no progress for 50 ms is given up; training is not. Of
        GPUs nothing is waited for: what is enqueued from now on to the streams that were current
        when it was saved, such as the replay of a CUDA graph, is held there until it may write.

        Raises:
            InvalidArgument: a CUDA graph is being recorded.
        """
        self._saver.check_usable()
        check_not_recorded("fence() cannot be part of a CUDA graph; call it before a replay")
        self._saver.open_fence()

    def _before_step(self) -> None:
        """Called ahead of every optimizer's step. Must not raise into the training loop."""
        self._boundary.left()
        if not self._saver.is_usable:
            return
        self._saver.open_fence()
        if self._wants_layout and all(one.state for one in self._members.optimizers.values()):
            self._prepare_arena()

    def _prepare_arena(self) -> None:
        """Say what saves will hold, so that the arena is ready for the first one."""
        self._wants_layout = False
        try:
            with self._saver.attach().lock:
                self._saver.register_early(self._collector.parts())
        except StillframeError as error:
            log.info("the layout is not known yet: %s", error)

    # --- Restoring --------------------------------------------------------------------------------

    def resume(
        self,
        which: Literal["latest", "best"] | str | int = "latest",
        *,
        on_damage: Literal["fallback", "raise"] = "fallback",
        strict: bool = True,
        only: str | Sequence[str] | None = None,
        map_names: Mapping[str, str] | Callable[[str], str | None] | None = None,
    ) -> Restored | None:
        """Restore a checkpoint into all that was given, and the random number generators.

        First waits for saves of the run that are captured but not yet durable. Tensors are filled
        in place.

        Args:
            which: "latest"; "best", by the first criterion of `best=`; "best:METRIC", by another; a
                step; or a tag.
            on_damage: "fallback" warns of a damaged checkpoint and takes the one before (of the
                newest) or the next best; "raise" raises DataLoss.
            strict: False skips what only one side has, and tensors whose shapes differ. Dtypes must
                always be equal.
            only: what to restore, one or a list of: "model", "optimizer", "scheduler", "scaler",
                "ema", "loader", "state", "generators", "rng", or prefixes of the model's tensor
                names. None restores all.
            map_names: from names of the checkpoint's model tensors to names of the model's; a
                callable may answer None to leave one out. Optimizer state follows its parameter.

        Returns:
            What was restored, or None, with nothing touched, if the run never had a checkpoint.

        Raises:
            InvalidArgument: names, shapes or dtypes differ: all are listed, nothing was written; or
                an object refused its state: all have their own again.
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
                directory=self._saver.options.directory,
                members=self._members,
                criteria=self._criteria,
                allow_pickle=self._allow_pickle,
                register_layout=self._saver.register_early,
            )
            restored = restorer.restore(
                which,
                falls_back=on_damage == "fallback",
                strict=strict,
                only=only,
                map_names=map_names,
            )
            self._collector.forget()
            self._hooks.reset()
            self._boundary.forget()
            if restored is None:
                # Optimizers make their state in their first step.
                self._wants_layout = True
                if all(one.state for one in self._members.optimizers.values()):
                    self._prepare_arena()
            elif only is None:
                self._policy.resumed(restored.step, restored.epoch)
            return restored

    def load_best(self, metric: str | None = None) -> Restored | None:
        """Restore the models' weights of the best checkpoint, and nothing else.

        Args:
            metric: of `best=`; None takes its first criterion.

        Returns:
            What was restored, or None, with nothing touched, if the run never had a checkpoint.

        Raises:
            InvalidArgument: `best=` has no such criterion; or as resume().
            NotFound: no checkpoint has the metric.
            StillframeError: as resume().
        """
        return self.resume("best" if metric is None else f"best:{metric}", only="model")

    # --- Telling ----------------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        """Lane, copy kernel, slots, socket, saves by result, last error; does not attach."""
        return self._saver.describe()

    def report(self) -> Report:
        """What saving has cost and yielded: prints as a table; see Report for the figures."""
        overhead = self._policy.overhead
        return self._saver.report(overhead.describe() if overhead is not None else None)
