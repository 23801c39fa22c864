"""What a checkpoint holds, in memory of its own from which variables take their values."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
import numpy.typing as npt

from stillframe._core.saved import Place, SavedCheckpoint
from stillframe._keras.values import new_buffer

Values = dict[str, npt.NDArray[np.uint8]]

# Of one read: between two of them a reader that nobody wants any more stops.
_READ_BYTES = 256 * 2**20


def read_values(saved: SavedCheckpoint, sections: Sequence[str]) -> Values:
    """The checked values of some parts, by name: flat bytes, aligned for assign().

    Raises:
        DataLoss: an extent is damaged.
    """
    values: Values = {}
    for part in _read_by_turns(saved, sections):
        values.update(part)
    return values


class BackgroundReader:
    """read_values() on a thread, while something else goes on; of a checkpoint without a session.

    Leaving the context stops it.
    """

    def __init__(self, saved: SavedCheckpoint, sections: Sequence[str]) -> None:
        self._saved = saved
        self._sections = sections
        self._values: Values = {}
        self._error: BaseException | None = None
        self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="stillframe-load")

    def __enter__(self) -> BackgroundReader:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_stopped = True
        self._thread.join()

    def wait(self) -> Values:
        """What read_values() gives, or raises."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._values

    def _run(self) -> None:
        try:
            for values in _read_by_turns(self._saved, self._sections):
                self._values.update(values)
                if self._is_stopped:
                    return
        except BaseException as error:
            self._error = error


def _read_by_turns(saved: SavedCheckpoint, sections: Sequence[str]) -> Iterator[Values]:
    for part in saved.parts:
        if part.name not in sections:
            continue
        tensors = saved.tensors[part.name]
        places: list[Place] = []
        values: Values = {}
        left = _READ_BYTES
        for spec in part.tensors:
            values[spec.name] = new_buffer(spec)
            places.append(Place(tensors[spec.name], values[spec.name].ctypes.data, None))
            left -= len(values[spec.name])
            if left <= 0:
                saved.read(places)
                yield values
                places, values, left = [], {}, _READ_BYTES
        if places:
            saved.read(places)
            yield values
