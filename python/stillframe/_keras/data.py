"""The position of a running fit() in its data, and how to get back to it.

Keras gives callbacks no access to its data iterator, so the iterator is taken from the frame of the
fit() that calls. An epoch that was finished elsewhere is passed through it without data, or with
its first batch alone: iterators are made and dropped, which is what advances a seeded shuffle. Of
an epoch that was begun elsewhere the batches done are read and dropped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import keras
from keras.src.trainers import data_adapters

from stillframe._keras.rng import set_rng
from stillframe.errors import InvalidArgument


def running_iterator() -> Any:
    """The epoch iterator of the fit() that calls us.

    Raises:
        InvalidArgument: no fit() of Keras is on the stack.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "fit" and "epoch_iterator" in frame.f_locals:
            return frame.f_locals["epoch_iterator"]
        frame = frame.f_back  # type: ignore[assignment]
    raise InvalidArgument("BackupAndRestore works in Model.fit() only, as one of its callbacks")


def unreproducible(iterator: Any) -> str | None:
    """Why the order of the data will not be the same again; None if it will be.

    What a user's own dataset class or generator function does cannot be seen from here.
    """
    adapter = iterator.data_adapter
    if isinstance(adapter, data_adapters.GeneratorDataAdapter):
        return "a Python generator cannot be entered again"
    if keras.backend.backend() != "tensorflow":
        return None  # Arrays are shuffled by generators whose states are restored.
    if _global_seed() is not None:
        return None
    if isinstance(adapter, data_adapters.ArrayDataAdapter) and adapter._shuffle:
        return "the arrays are shuffled without a seed; call keras.utils.set_random_seed()"
    if isinstance(adapter, data_adapters.TFDatasetAdapter) and _has_unseeded(adapter._dataset):
        return "the tf.data shuffle has no seed; pass seed= or call keras.utils.set_random_seed()"
    return None


class DataPosition:
    """Where a fit() is in its data.

    Attributes:
        batches_done: of the running epoch.
        batches_per_epoch: of the epochs finished so far; 0 before the first is.
    """

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator
        self.batches_done = 0
        self.batches_per_epoch = 0

    def end_epoch(self) -> None:
        """Note that the running epoch is over."""
        self.batches_per_epoch = self.batches_done
        self.batches_done = 0

    def pass_epochs(self, count: int, batches: int) -> None:
        """Leave the iterator as `count` epochs of `batches` each would."""
        for _ in range(count):
            self._pass_epoch(batches)
        self.batches_per_epoch = batches

    def skip(self, batches: int, rng: dict[str, Any]) -> None:
        """Let the epoch that begins next start behind its first `batches`, with generators `rng`.

        The order of an epoch may be drawn when its iterator is made, and augmentation when a batch
        is read: what was drawn for the batches that are skipped has been drawn before.
        """
        iterator = self._iterator
        steps = iterator.steps_per_execution
        original = iterator._enumerate_iterator

        def enumerate_rest() -> Iterator[Any]:
            del iterator._enumerate_iterator  # For this epoch only.
            rest = original()
            done = 0
            while done < batches:
                _, _, source = next(rest)
                for _ in range(min(steps, batches - done)):
                    next(source)
                done += steps
            if batches == 0:
                # The iterator, and with it the order, is made by the first step.
                first = next(rest, None)
                set_rng(rng)
                if first is not None:
                    yield first
            else:
                set_rng(rng)
            yield from rest

        iterator._enumerate_iterator = enumerate_rest
        self.batches_done = batches

    def _pass_epoch(self, batches: int) -> None:
        iterator = self._iterator
        steps = range(0, batches, iterator.steps_per_execution)
        epoch = iterator._enumerate_iterator()
        for step in steps:
            _, _, source = next(epoch)
            # Elsewhere a dataset's iterator is made, and its order drawn, by the first batch.
            if step == 0 and keras.backend.backend() != "tensorflow":
                next(source)
        # The one step more after which Keras knows that the data is at its end.
        if next(epoch, None) is not None:
            epoch.close()
            if iterator._num_batches is None:
                iterator._num_batches = iterator._steps_seen
            iterator._current_iterator = None
            iterator.data_adapter.on_epoch_end()


def sample_batch(iterator: Any) -> Any:
    """Something with the shapes and dtypes of a batch, without reading one; None if unknown."""
    dataset = getattr(iterator, "_distributed_dataset", None)
    return getattr(dataset, "element_spec", None)


def _global_seed() -> int | None:
    from tensorflow.python.eager import context

    seed: int | None = context.global_seed()
    return seed


def _has_unseeded(dataset: Any) -> bool:
    seeds = [getattr(dataset, name) for name in ("_seed", "_seed2") if hasattr(dataset, name)]
    if len(seeds) == 2 and all(int(seed) == 0 for seed in seeds):
        return True
    return any(_has_unseeded(one) for one in dataset._inputs())
