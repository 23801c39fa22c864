"""Making a Keras model whose variables are about to be loaded, without computing first values."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import keras

from stillframe._keras.state import KerasState
from stillframe._keras.values import byte_count, new_buffer, spec_of, tensor_of
from stillframe.errors import InvalidArgument

# The others cost nothing, and are made as ever.
_BYTES_MIN = 64 * 1024
_METHOD = "_initialize_with_initializer"
# Of Keras's method, which is one for the process.
_replacing = threading.Lock()


class SkipInitialisation:
    """Large variables that this thread makes inside have memory that nobody has written.

    On Keras's TensorFlow backend, where random numbers take longer to draw than a drive takes to
    read as many; on the others, and in a second thread at the same time, it does nothing. A method
    of keras.Variable is replaced meanwhile, and does what it did for every other thread.
    """

    def __init__(self) -> None:
        self._skipped: list[tuple[Any, Callable[..., Any]]] = []
        self._has_replaced = False

    def __enter__(self) -> SkipInitialisation:
        original = getattr(keras.Variable, _METHOD, None)
        if (
            keras.backend.backend() != "tensorflow"
            or original is None
            or _METHOD in vars(keras.Variable)
            or not _replacing.acquire(blocking=False)
        ):
            return self
        thread = threading.get_ident()

        def initialize(variable: Any, initializer: Any) -> None:
            if threading.get_ident() != thread or not self._skip(variable, initializer):
                original(variable, initializer)

        setattr(keras.Variable, _METHOD, initialize)
        self._has_replaced = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._has_replaced:
            # What it inherits is in force again.
            delattr(keras.Variable, _METHOD)
            _replacing.release()

    def initialise_others(self, state: KerasState) -> None:
        """Give their first values to all that `state` does not hold, before that is loaded."""
        loaded = {id(one.holder) for one in state.tensors}
        for variable, initializer in self._skipped:
            if id(variable) not in loaded:
                variable.assign(initializer(variable.shape, dtype=variable.dtype))

    def _skip(self, variable: Any, initializer: Any) -> bool:
        try:
            spec = spec_of("", _Described(variable._dtype, variable._shape))
        except InvalidArgument:
            return False
        if byte_count(spec) < _BYTES_MIN:
            return False
        variable._initialize(lambda: tensor_of(spec, new_buffer(spec)))
        self._skipped.append((variable, initializer))
        return True


class _Described:
    """A variable that has no value yet."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype = dtype
        self.shape = shape
