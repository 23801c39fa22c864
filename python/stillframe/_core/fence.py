"""The fence: the point before which training must not overwrite what a lazy save still copies.

One capture at a time. Whoever comes first ends it, under the session's lock: the optimizer's step
pre-hook, `fence()`, `Ticket.wait()`, the next save, close(), or the publisher thread, so that a
snapshot becomes CAPTURED without waiting for the next optimizer step.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from stillframe._core.session import Session
from stillframe.errors import StillframeError

# Bounds waiting without progress; copying one's own bytes is progress.
STALL_MS = 50
# The same where a GPU captures: it first ends what training has enqueued before the save.
_GPU_STALL_MS = 60_000
_PUBLISHER_STALL_MS = 1_000


@dataclasses.dataclass(slots=True)
class Capture:
    """A lazy save whose bytes are being copied.

    Attributes:
        aliases: keep the memory alive that the copiers read.
        find_changed: names a tensor whose version counter has moved since the save began.
        is_on_gpus: whether some of that memory is a GPU's.
        is_open: whether open() has let training write again.
    """

    number: int
    aliases: Sequence[Any]
    find_changed: Callable[[], str | None]
    is_on_gpus: bool = False
    is_open: bool = False


class Fence:
    """Ends the lazy captures of one session."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._changed = threading.Condition(session.lock)
        self._capturing: Capture | None = None
        self._publisher: threading.Thread | None = None
        self._is_stopped = False

    def begin(self, capture: Capture) -> None:
        """Watch a capture that sf_save_begin() started. The caller holds the session's lock."""
        self._capturing = capture
        if self._publisher is None:
            self._publisher = threading.Thread(
                target=_publish_all, args=(weakref.ref(self),), name="stillframe", daemon=True
            )
            self._publisher.start()
        self._changed.notify_all()

    def finish(self, *, stall_ms: int = STALL_MS) -> None:
        """Help to copy, then publish; give the snapshot up if nothing moves for `stall_ms`.

        Never raises for what went wrong with the save: its ticket has that.
        """
        capture = self._capturing
        if capture is None:
            return
        if capture.is_on_gpus:
            stall_ms = max(stall_ms, _GPU_STALL_MS)
        if self._wait(capture, stall_ms=stall_ms, help=True):
            self._publish(capture)
        else:
            self.void(f"nothing was copied for {stall_ms} ms while training waited")

    def open(self) -> None:
        """Let training write again: as finish(), but a GPU's work is ordered, not waited for.

        What was enqueued on GPUs is captured beside it, and published by the publisher thread.
        """
        capture = self._capturing
        if capture is None or capture.is_open:
            return
        if not capture.is_on_gpus:
            self.finish()
            return
        try:
            # With check="full", or a ring smaller than the state, this waits for the GPU, which
            # first ends what training has enqueued before the save.
            is_open = self._session.open_fence(capture.number, stall_ms=_GPU_STALL_MS)
        except StillframeError as error:
            self.void(str(error))
            return
        if not is_open:
            self.void(f"nothing was copied for {_GPU_STALL_MS} ms while training waited")
            return
        with self._changed:
            # The counters are compared here: behind this, they move.
            if self._capturing is capture and not self._is_torn(capture):
                capture.is_open = True

    def help(self, number: int, timeout_ms: int) -> None:
        """Like finish() for a caller that is in no hurry: never gives the snapshot up."""
        capture = self._capturing
        if capture is None or capture.number != number:
            return
        if self._wait(capture, stall_ms=timeout_ms, help=True):
            self._publish(capture)

    def void(self, reason: str, *, torn: bool = False) -> None:
        """Give the capture in progress up, if there is one."""
        with self._changed:
            capture, self._capturing = self._capturing, None
            if capture is None:
                return
            try:
                self._session.void(capture.number, reason, torn=torn)
            except StillframeError:
                pass  # Its ticket has failed already, with the reason.

    def stop(self, stall_ms: int) -> None:
        """Finish or void the capture in progress, then end the publisher thread."""
        self.finish(stall_ms=stall_ms)
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()
        if self._publisher is not None and self._publisher is not threading.current_thread():
            self._publisher.join(timeout=2.0)

    def _wait(self, capture: Capture, *, stall_ms: int, help: bool) -> bool:
        try:
            return self._session.capture_wait(capture.number, stall_ms=stall_ms, help=help)
        except StillframeError:
            # The save has failed; publishing it tells the library that the capture is over.
            return True

    def _publish(self, capture: Capture) -> None:
        with self._changed:
            if self._capturing is not capture:
                return
            if not capture.is_open and self._is_torn(capture):
                return
            try:
                self._session.publish(capture.number)
                self._capturing = None
            except StillframeError as error:
                # Torn, or the daemon died: its ticket has the reason. Voiding what is over is
                # harmless, and nothing may be left behind that refuses the next save.
                self.void(str(error))

    def _is_torn(self, capture: Capture) -> bool:
        """Whether a lazy tensor was provably written too early; gives the capture up then."""
        changed = capture.find_changed()
        if changed is not None:
            self.void(
                f"tensor {changed} was written while it was captured; write after the "
                "optimizer's step or checkpointer.fence(), or save with capture='eager'",
                torn=True,
            )
        return changed is not None

    def _publish_next(self) -> bool:
        """One round of the publisher thread; False when it is over."""
        with self._changed:
            capture = self._capturing
            if capture is None and not self._is_stopped:
                self._changed.wait(timeout=_PUBLISHER_STALL_MS / 1000)
            if self._is_stopped:
                return False
            capture = self._capturing
        if capture is not None and self._wait(capture, stall_ms=_PUBLISHER_STALL_MS, help=False):
            self._publish(capture)
        return True


def _publish_all(fence: weakref.ref[Fence]) -> None:
    # Looks the fence up anew each round, so that the thread keeps nothing alive.
    while True:
        current = fence()
        if current is None or not current._publish_next():
            return
        del current


class StepHooks:
    """The step hooks of the optimizers, which make a training loop wait at the fence.

    Copies of an optimizer (deepcopy, pickle) lose their hooks; a save is then eager, and says why.
    """

    def __init__(self, optimizers: Sequence[Any], before: Callable[[], None]) -> None:
        """Call `before` ahead of each step, outside of torch.compile and CUDA graphs."""
        self._fired: set[int] = set()
        self._count = len(optimizers)
        self._handles = []
        for index, optimizer in enumerate(optimizers):
            self._handles.append(
                optimizer.register_step_pre_hook(_pre_hook(self._fired, index, before))
            )

    @property
    def all_fired(self) -> bool:
        """Whether each optimizer has stepped through its hook since reset()."""
        return len(self._fired) == self._count

    def reset(self) -> None:
        """Forget which have fired."""
        self._fired.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def is_recording() -> bool:
    """Whether torch's current stream records a CUDA graph, and does nothing of it yet."""
    import torch

    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return bool(is_used and torch.cuda.is_current_stream_capturing())


def weakly(method: Callable[[], None]) -> Callable[[], None]:
    """Call a bound method while its object lives: an optimizer must not keep it alive."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


def _pre_hook(
    fired: set[int], index: int, before: Callable[[], None]
) -> Callable[[Any, Any, Any], None]:
    from torch.compiler import is_compiling

    def wait_at_fence(optimizer: Any, args: Any, kwargs: Any) -> None:
        # Within torch.compile this does nothing, and leaves `fired` alone: saves are then eager. So
        # where a CUDA graph is recorded: nothing is written yet, and a wait would end up in it.
        if is_compiling() or is_recording():
            return
        fired.add(index)
        before()

    return wait_at_fence
