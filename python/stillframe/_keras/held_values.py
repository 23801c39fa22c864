"""Saves of values that are held: sources, streams and owners, as Saver.begin() wants them.

A value that is held does not change: TensorFlow copies a variable's buffer on write while somebody
holds it, JAX's arrays never change. So those on GPUs are captured while training runs, without a
fence, and those of the host are copied at once or, where that is asked for, the same way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stillframe._core import library
from stillframe._core.arguments import checked_metrics, checked_step
from stillframe._core.layout import PartSpec
from stillframe._core.saver import Content, Lazy, Saver
from stillframe._core.ticket import Ticket
from stillframe._keras.values import Value

Capture = Literal["eager", "lazy"]


@dataclasses.dataclass(frozen=True)
class HeldValues:
    """One save's values, in the order of its layout.

    Attributes:
        sources: where the library finds them; the values keep that memory.
        streams: of each GPU that has one, its number and a CUstream. A value of a GPU was waited
            for when it was taken, so the default one does.
        capture: for people: which way they are taken.
        lazy: None copies everything before the save returns.
    """

    sources: ctypes.Array[library.Source]
    streams: list[tuple[int, int]]
    capture: str
    lazy: Lazy | None

    @classmethod
    def of(cls, values: Sequence[Value], capture: Capture) -> HeldValues:
        """Those values: the host's by `capture`, a GPU's while training runs."""
        devices = sorted({one.device for one in values if one.device is not None})
        sources = (library.Source * len(values))()
        for source, value in zip(sources, values, strict=True):
            source.data = value.address
            source.lazy = value.is_frozen and (capture == "lazy" or value.device is not None)
            if value.device is not None:
                source.memory = library.MEMORY_CUDA
        if capture == "lazy":
            how = "lazy: of held values"
        elif devices:
            how = "lazy: of held values on GPUs, eager of the CPU's"
        else:
            how = "eager: on the CPU"
        is_lazy = capture == "lazy" or bool(devices)
        lazy = Lazy(values, lambda: None) if is_lazy else None
        return cls(sources, [(device, 0) for device in devices], how, lazy)


class HeldContent(NamedTuple):
    """What one save holds.

    Attributes:
        parts: its layout.
        values: in the order of the layout.
        state: the text of state.json.
    """

    parts: list[PartSpec]
    values: Sequence[Value]
    state: bytes


def save_held(
    saver: Saver,
    make_content: Callable[[], HeldContent],
    *,
    step: int,
    metrics: Mapping[str, Any] | None,
    capture: Capture,
) -> Ticket:
    """Save the values of now; see Checkpointer.save() for tickets and errors.

    Args:
        saver: of the run.
        make_content: called once the daemon can take it.
        step: as for save().
        metrics: as for save().
        capture: of the host's values.
    """
    begin = time.perf_counter()
    saver.check_usable()
    known_step = checked_step(step)
    known_metrics = checked_metrics(metrics)
    with saver.attach().lock:
        saver.make_ready()
        content = make_content()
        held = HeldValues.of(content.values, capture)
        ticket = saver.begin(
            Content(content.parts, held.sources, content.state, streams=held.streams),
            step=known_step,
            metrics=known_metrics,
            capture=held.capture,
            lazy=held.lazy,
        )
        ticket._call_seconds = time.perf_counter() - begin
        return ticket
