"""A loop over a ResumableLoader goes on where it was saved, to the bit."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
    get_worker_info,
)

import loading
import stillframe.torch as stillframe
from loading import BATCH, SAMPLES, Augmented, AugmentedBatches, Run
from stillframe._core.state_json import Encoder, decode, dumps
from stillframe._loader.resumable_loader import ResumableLoader
from stillframe._torch.rng import encode_rng, restore_rng

PROCESS = Path(__file__).with_name("loader_process.py")
EPOCHS = 3
MakeLoader = Callable[[], DataLoader[Any]]


def through_json(state: Any) -> Any:
    """The state as a checkpoint gives it back."""
    tensors: dict[str, torch.Tensor] = {}

    def lift(path: str, tensor: torch.Tensor) -> str:
        tensors[path] = tensor.clone()
        return path

    text = dumps(Encoder(lift).encode(state, "loader"))
    return decode(json.loads(text), "loader", tensor=tensors.__getitem__)


def restore_global_rng(text: str) -> None:
    restore_rng(decode(json.loads(text), "rng", tensor=lambda name: pytest.fail(name)))


def train(run: Run, *, epochs: int = EPOCHS, stop: int | None = None) -> bool:
    """To the end, or until the run has done `stop` steps; whether it came to the end."""
    for epoch in range(run.loader.epoch, epochs):
        for batch in run.loader:
            run.train_on(epoch, batch)
            if run.step == stop:
                return False
    return True


def resumed(run: Run, make: MakeLoader, *, order: str = "loader first") -> Run:
    """A new run, as a new process would make it, with all of the other's state."""
    state, rng = through_json(run.loader.state_dict()), encode_rng()
    model, optimizer = run.model.state_dict(), run.optimizer.state_dict()
    again = Run(make(), seed=99)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.step = run.step
    if order == "loader first":
        again.loader.load_state_dict(state)
    restore_global_rng(rng)
    if order == "loader last":
        again.loader.load_state_dict(state)
    return again


def check_resumes(
    make: MakeLoader, stops: tuple[int, ...], *, epochs: int = EPOCHS, order: str = "loader first"
) -> None:
    straight = Run(make())
    assert train(straight, epochs=epochs)
    expected = straight.batches, straight.digest()
    run = Run(make())
    batches: list[Any] = []
    for stop in stops:
        train(run, epochs=epochs, stop=stop)
        batches += run.batches
        run = resumed(run, make, order=order)
    train(run, epochs=epochs)
    assert batches + run.batches == expected[0]
    assert run.digest() == expected[1]


def maker(dataset: type = Augmented, **options: Any) -> MakeLoader:
    options = {"batch_size": BATCH, **options}
    return lambda: DataLoader(dataset(), **options)


WORKERS = [
    pytest.param({"num_workers": 0}, id="0 workers"),
    pytest.param({"num_workers": 2, "persistent_workers": False}, id="2 workers"),
    pytest.param({"num_workers": 2, "persistent_workers": True}, id="2 persistent workers"),
]


# --- Bit-identical ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
def test_a_training_resumed_in_the_middle_of_epochs_ends_like_one_that_did_not_stop(
    workers: dict[str, Any],
) -> None:
    check_resumes(maker(shuffle=True, **workers), stops=(2, 6, 9, 17))


def train_in_process(directory: Path, workers: int, persistent: int, stop: int) -> list[str]:
    """What a process of its own printed, which resumed and was stopped after `stop` batches."""
    command = [sys.executable, str(PROCESS), str(directory)]
    command += [str(value) for value in (workers, persistent, 2, stop)]
    # A file: the workers of a process that was stopped keep its pipe open for a while.
    with open(directory.with_suffix(".txt"), "w+") as output:
        subprocess.run(command, stdout=output, check=True)
        output.seek(0)
        return output.read().splitlines()


@functools.cache
def straight_lines() -> list[str]:
    """The same with any number of workers."""
    run = Run(maker(shuffle=True)())
    train(run, epochs=2)
    return [*(f"batch {epoch} {batch}" for epoch, batch in run.batches), f"digest {run.digest()}"]


@pytest.mark.parametrize(("workers", "persistent"), [(0, 0), (2, 0), (2, 1)])
def test_a_fresh_process_goes_on_from_a_checkpoint_like_the_one_that_ended(
    tmp_path: Path, workers: int, persistent: int
) -> None:
    run = tmp_path / "run"
    first = train_in_process(run, workers, persistent, stop=4)
    assert len(first) == 4
    assert first + train_in_process(run, workers, persistent, stop=0) == straight_lines()


@pytest.mark.parametrize("stop", [6, 12])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_save_at_an_epochs_last_batch_resumes_to_the_end_of_that_epoch(
    workers: dict[str, Any], stop: int
) -> None:
    make = maker(shuffle=True, **workers)
    check_resumes(make, stops=(stop,))
    run = Run(make())
    train(run, stop=stop)
    again = resumed(run, make)
    assert again.loader.epoch == stop // 6 - 1
    assert list(again.loader) == []
    assert again.loader.epoch == stop // 6


@pytest.mark.parametrize("order", ["loader first", "loader last"])
def test_the_loader_may_be_restored_before_or_after_the_global_generators(order: str) -> None:
    make = maker(shuffle=True)
    check_resumes(make, stops=(3, 8), order=order)
    own = lambda: DataLoader(  # noqa: E731
        Augmented(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    )
    check_resumes(own, stops=(3, 6, 8), order=order)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_save_between_epochs_resumes_at_the_next(workers: dict[str, Any]) -> None:
    make = maker(shuffle=True, **workers)
    straight = Run(make())
    train(straight)
    first = Run(make())
    train(first, epochs=1)
    second = resumed(first, make)
    assert second.loader.epoch == 1
    train(second)
    assert first.batches + second.batches == straight.batches
    assert second.digest() == straight.digest()


def test_batches_are_the_same_with_any_number_of_workers() -> None:
    runs = []
    for workers in (0, 1, 2):
        run = Run(maker(shuffle=True, num_workers=workers)())
        train(run)
        runs.append((run.batches, run.digest()))
    assert runs[0] == runs[1] == runs[2]


def test_a_training_may_resume_with_another_number_of_workers() -> None:
    replacing = lambda workers: DataLoader(  # noqa: E731
        dataset := Augmented(),
        batch_size=BATCH,
        sampler=RandomSampler(
            dataset, replacement=True, num_samples=120, generator=torch.Generator().manual_seed(3)
        ),
        num_workers=workers,
    )
    straight = Run(replacing(0))
    train(straight)
    first = Run(replacing(2))
    train(first, stop=11)
    second = resumed(first, lambda: replacing(0))
    train(second, stop=40)
    third = resumed(second, lambda: replacing(2))
    train(third)
    assert first.batches + second.batches + third.batches == straight.batches
    assert third.digest() == straight.digest()


# --- Ways to load -------------------------------------------------------------------------------


class Lazy(Sampler[list[int]]):
    """A batch sampler that draws for each batch: from all the global generators and its own."""

    def __init__(self) -> None:
        self.numpy = np.random.default_rng(4)
        self.python = random.Random(5)

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        shift = random.randrange(SAMPLES)
        for _ in range(6):
            yield [
                (shift + int(torch.randint(SAMPLES, ()))) % SAMPLES,
                int(np.random.randint(SAMPLES)),
                int(self.numpy.integers(SAMPLES)),
                self.python.randrange(SAMPLES),
            ]


class Resuming(Sampler[int]):
    """Keeps its own position, also from pass to pass, as samplers over huge data do."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.given % SAMPLES, SAMPLES):
            index = (self.given * 7 + self.given // SAMPLES) % SAMPLES
            self.given += 1
            yield index

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def add_noise(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) * torch.rand(()) + float(np.random.rand()) * random.random()


def own_batches(**options: Any) -> DataLoader[Any]:
    return DataLoader(Augmented(), batch_sampler=Lazy(), **options)


def distributed(**options: Any) -> DataLoader[Any]:
    dataset = Augmented(44)
    sampler = DistributedSampler(dataset, num_replicas=2, rank=1, seed=3)
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler, **options)


def weighted(**options: Any) -> DataLoader[Any]:
    sampler = WeightedRandomSampler([0.1] * 11 + [0.9] * 11, 22)
    return DataLoader(Augmented(), batch_size=BATCH, sampler=sampler, **options)


def several_rounds(**options: Any) -> DataLoader[Any]:
    dataset = Augmented()
    generator = torch.Generator().manual_seed(6)
    sampler = RandomSampler(dataset, num_samples=2 * SAMPLES + 3, generator=generator)
    return DataLoader(dataset, batch_size=BATCH, sampler=sampler, **options)


def shuffled_by_own(**options: Any) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(
        Augmented(), batch_size=BATCH, shuffle=True, generator=generator, drop_last=True, **options
    )


KINDS: dict[str, Callable[..., DataLoader[Any]]] = {
    "__getitems__": lambda **o: DataLoader(AugmentedBatches(), BATCH, shuffle=True, **o),
    "no batching": lambda **o: DataLoader(Augmented(), batch_size=None, shuffle=True, **o),
    "batch as index": lambda **o: DataLoader(
        AugmentedBatches(),
        batch_size=None,
        collate_fn=torch.stack,
        sampler=BatchSampler(RandomSampler(range(SAMPLES)), BATCH, drop_last=False),
        **o,
    ),
    "collate_fn": lambda **o: DataLoader(
        Augmented(), BATCH, shuffle=True, collate_fn=add_noise, **o
    ),
    "lazy batch_sampler": own_batches,
    "distributed": distributed,
    "weighted": weighted,
    "several rounds": several_rounds,
    "own generator, drop_last": shuffled_by_own,
    "sampler with a state": lambda **o: DataLoader(
        Augmented(), BATCH, sampler=Resuming(), drop_last=True, **o
    ),
}
# A dataset that takes a list as its index.
AugmentedBatches.__getitem__ = (  # type: ignore[method-assign]
    lambda self, indices: self.__getitems__(list(indices))
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_way_to_load_resumes_to_the_bit(kind: str, workers: int) -> None:
    make = lambda: KINDS[kind](num_workers=workers)  # noqa: E731
    one_pass = len(make())
    check_resumes(make, stops=(2, one_pass, one_pass + 3), epochs=2)


def test_set_epoch_of_a_distributed_sampler_is_as_the_loop_says() -> None:
    def epochs(run: Run, stop: int = 0) -> None:
        for epoch in range(run.loader.epoch, EPOCHS):
            run.loader.sampler.set_epoch(epoch)
            for batch in run.loader:
                run.train_on(epoch, batch)
                if run.step == stop:
                    return

    straight = Run(distributed())
    epochs(straight)
    first = Run(distributed())
    epochs(first, stop=8)
    second = resumed(first, distributed)
    epochs(second)
    assert first.batches + second.batches == straight.batches
    orders = [[batch for e, batch in straight.batches if e == epoch] for epoch in range(EPOCHS)]
    assert orders[0] != orders[1] != orders[2]


def note_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert type(info.dataset) is Augmented
    info.dataset.offset = 100.0 * (worker + 1)


def with_offset(samples: list[torch.Tensor]) -> torch.Tensor:
    info = get_worker_info()
    assert info is not None
    return torch.stack(samples) * 0 + info.dataset.offset


def test_worker_init_fn_sees_its_own_dataset_and_collate_fn_runs_after_it() -> None:
    data = DataLoader(
        Augmented(),
        batch_size=BATCH,
        num_workers=2,
        worker_init_fn=note_worker,
        collate_fn=with_offset,
    )
    loader = ResumableLoader(data)
    assert sorted({float(batch[0, 0]) for batch in loader}) == [100.0, 200.0]
    assert type(data.dataset) is Augmented
    assert data.collate_fn is with_offset
    assert data.worker_init_fn is note_worker
    assert isinstance(data.batch_sampler, BatchSampler)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_pin_memory_without_an_accelerator_changes_nothing() -> None:
    check_resumes(maker(shuffle=True, pin_memory=True, num_workers=2), stops=(3,), epochs=1)


def test_workers_that_are_spawned_give_the_same_batches() -> None:
    forked = Run(maker(shuffle=True)())
    train(forked, epochs=1)
    spawned = Run(maker(shuffle=True, num_workers=1, multiprocessing_context="spawn")())
    train(spawned, epochs=1)
    assert forked.batches == spawned.batches


def test_indices_of_batches_that_were_given_are_not_loaded_again() -> None:
    make = maker(shuffle=True)
    first = Run(make())
    train(first, stop=4)
    second = resumed(first, make)
    train(second, epochs=1)
    assert len(first.loader.dataset.loaded) == 4 * BATCH
    assert len(second.loader.dataset.loaded) == SAMPLES - 4 * BATCH
    assert sorted(first.loader.dataset.loaded + second.loader.dataset.loaded) == [*range(SAMPLES)]


# --- Datasets that are iterated -----------------------------------------------------------------


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterable_dataset_without_a_state_is_read_again_and_says_so_once(
    workers: dict[str, Any],
) -> None:
    make = maker(loading.Stream, **workers)
    with pytest.warns(stillframe.StillframeWarning, match="3 batches are read again") as noted:
        check_resumes(make, stops=(3,), epochs=2)
    assert len(noted) == 1
    assert noted[0].filename == __file__


@pytest.mark.parametrize("dataset", [loading.StatefulStream, loading.ResettingStream])
@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterable_dataset_with_a_state_goes_on_by_it(
    workers: dict[str, Any], dataset: type
) -> None:
    check_resumes(maker(dataset, **workers), stops=(1, 4, 9, 11), epochs=3)
    check_resumes(maker(dataset, drop_last=True, **workers), stops=(1, 3), epochs=2)
    check_resumes(maker(dataset, batch_size=None, **workers), stops=(5, 23), epochs=2)


@pytest.mark.parametrize("dataset", [loading.StatefulStream, loading.ResettingStream])
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_an_iterable_dataset_with_a_state_saved_between_epochs_begins_the_next(
    workers: dict[str, Any], dataset: type, drop_last: bool
) -> None:
    make = maker(dataset, drop_last=drop_last, **workers)
    straight = Run(make())
    train(straight)
    first = Run(make())
    train(first, epochs=1)
    second = resumed(first, make)
    train(second, epochs=2)
    third = resumed(second, make)
    train(third)
    assert first.batches + second.batches + third.batches == straight.batches


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_workers_with_less_than_a_batch_each_go_on_epoch_after_epoch(
    persistent_workers: bool,
) -> None:
    make = maker(
        lambda: loading.StatefulStream(7),
        batch_size=10,
        num_workers=2,
        persistent_workers=persistent_workers,
    )
    check_resumes(make, stops=(1, 3, 4, 6, 7), epochs=5)


def test_three_workers_of_unequal_shares_go_on_with_the_one_whose_turn_it_is() -> None:
    make = maker(lambda: loading.StatefulStream(10), batch_size=1, num_workers=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # More workers than cores.
        check_resumes(make, stops=(1, 5, 8, 10), epochs=1)


# --- The loop -----------------------------------------------------------------------------------


def test_state_dict_counts_batches_given_not_those_that_workers_have_read_ahead() -> None:
    loader = ResumableLoader(maker(shuffle=True, num_workers=2)())
    for given, _ in enumerate(loader, start=1):
        assert loader.state_dict()["position"]["batches"] == given


def test_a_state_does_not_change_while_the_loop_goes_on() -> None:
    loader = ResumableLoader(maker(loading.StatefulStream)())
    passed = iter(loader)
    next(passed)
    state = loader.state_dict()
    before = repr(state)
    list(passed)
    assert repr(state) == before


def test_the_loop_leaves_the_global_generators_to_the_training() -> None:
    loader = ResumableLoader(maker(shuffle=True)())
    passed = iter(loader)
    before = loading.rng_digest()
    for _ in passed:
        assert loading.rng_digest() == before


def test_a_new_loop_after_a_break_is_a_new_pass_of_the_same_epoch() -> None:
    run = Run(maker(shuffle=True)())
    loader = run.loader
    broken = []
    for batch in loader:
        broken.append(batch.tolist())
        if len(broken) == 2:
            break
    assert loader.epoch == 0
    # Until then the place of the break is what would be saved.
    assert loader.state_dict()["position"]["batches"] == 2
    again = [batch.tolist() for batch in loader]
    assert len(again) == len(loader)
    assert again[:2] != broken
    assert loader.epoch == 1


def test_a_look_at_one_batch_ahead_of_the_loop_takes_none_from_it() -> None:
    loader = ResumableLoader(maker(num_workers=2, persistent_workers=True)())
    look = next(iter(loader))
    batches = list(loader)
    assert len(batches) == len(loader)
    assert torch.equal(batches[0].floor(), look.floor())
    assert loader.epoch == 1


def test_a_loop_that_ends_each_epoch_by_break_says_which_is_next() -> None:
    def epochs(run: Run, stop: int = 0) -> None:
        for epoch in range(run.loader.epoch, 4):
            run.loader.set_epoch(epoch)
            for number, batch in enumerate(run.loader, start=run.step % 2):
                run.train_on(epoch, batch)
                if run.step == stop:
                    return
                if number == 1:
                    break

    make = maker(shuffle=True)
    straight = Run(make())
    epochs(straight)
    first = Run(make())
    epochs(first, stop=5)
    second = resumed(first, make)
    assert second.loader.epoch == 2
    epochs(second)
    assert first.batches + second.batches == straight.batches
    assert second.digest() == straight.digest()


def test_an_older_pass_over_persistent_workers_is_refused() -> None:
    loader = ResumableLoader(maker(num_workers=1, persistent_workers=True)())
    older = iter(loader)
    next(older)
    next(iter(loader))
    with pytest.raises(stillframe.InvalidArgument, match="one at a time"):
        next(older)


class Failing(Augmented):
    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            raise OSError("a bad sector")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_fails_to_load_is_tried_again_unless_the_loop_went_on(workers: int) -> None:
    loader = ResumableLoader(maker(Failing, num_workers=workers)())
    passed = iter(loader)
    next(passed)
    with pytest.raises(OSError, match="a bad sector"):
        next(passed)
    assert loader.state_dict()["position"]["batches"] == 1
    assert int(next(passed)[0, 0]) == 8
    state = loader.state_dict()
    assert state["position"]["batches"] == 3
    again = ResumableLoader(maker(Failing, num_workers=workers)())
    again.load_state_dict(state)
    assert int(next(iter(again))[0, 0]) == 12


def test_everything_else_is_the_dataloaders() -> None:
    data = maker(num_workers=2)()
    loader = ResumableLoader(data)
    assert len(loader) == len(data) == len(iter(loader))
    assert (loader.batch_size, loader.num_workers) == (BATCH, 2)
    assert loader.dataset is data.dataset
    with pytest.raises(AttributeError, match="colour"):
        _ = loader.colour


# --- Bad input ----------------------------------------------------------------------------------


def test_another_dataset_batch_size_or_sampler_in_the_middle_of_an_epoch_is_refused() -> None:
    run = Run(maker(shuffle=True)())
    train(run, stop=2)
    state = through_json(run.loader.state_dict())
    other = ResumableLoader(DataLoader(Augmented(30), batch_size=5, drop_last=True))
    before = repr(other.state_dict())
    with pytest.raises(stillframe.InvalidArgument) as caught:
        other.load_state_dict(state)
    for difference in (
        "dataset length: 22 in the checkpoint, 30 now",
        "batch_size: 4 in the checkpoint, 5 now",
        "drop_last: False in the checkpoint, True now",
        "sampler: 'torch.utils.data.sampler.RandomSampler' in the checkpoint, "
        "'torch.utils.data.sampler.SequentialSampler' now",
    ):
        assert difference in str(caught.value)
    assert repr(other.state_dict()) == before


def test_between_epochs_another_batch_size_is_taken() -> None:
    loader = ResumableLoader(maker()())
    list(loader)
    other = ResumableLoader(maker(batch_size=7)())
    other.load_state_dict(through_json(loader.state_dict()))
    assert (other.epoch, len(list(other))) == (1, 4)


def test_another_number_of_workers_is_refused_where_each_has_its_share() -> None:
    loader = ResumableLoader(maker(loading.StatefulStream)())
    next(iter(loader))
    other = ResumableLoader(maker(loading.StatefulStream, num_workers=2)())
    with pytest.raises(stillframe.InvalidArgument, match="num_workers: 0 in the checkpoint, 2 now"):
        other.load_state_dict(through_json(loader.state_dict()))


def test_a_dataset_that_has_become_shorter_is_noticed() -> None:
    loader = ResumableLoader(maker(loading.Stream)())
    passed = iter(loader)
    for _ in range(5):
        next(passed)
    other = ResumableLoader(maker(lambda: loading.Stream(8))())
    other.load_state_dict(loader.state_dict())
    with pytest.warns(stillframe.StillframeWarning):
        with pytest.raises(stillframe.InvalidArgument, match="ends after 2 batches, but 5"):
            iter(other)
    assert other.state_dict()["position"]["batches"] == 5


@pytest.mark.parametrize(
    "state", [{}, {"version": 1}, {"version": 1, "position": {"batch": 3}}, {"position": None}]
)
def test_what_is_not_a_loaders_state_is_refused(state: dict[str, Any]) -> None:
    loader = ResumableLoader(maker()())
    with pytest.raises(stillframe.InvalidArgument, match="not the state of a ResumableLoader"):
        loader.load_state_dict(state)


def test_what_cannot_be_resumed_is_refused_at_once() -> None:
    with pytest.raises(stillframe.InvalidArgument, match="not a DataLoader"):
        ResumableLoader([1, 2, 3])  # type: ignore[arg-type]
    with pytest.raises(stillframe.InvalidArgument, match="in_order"):
        ResumableLoader(maker(num_workers=2, in_order=False)())

    class Keeping(DataLoader[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with pytest.raises(stillframe.InvalidArgument, match="keeps its own position"):
        ResumableLoader(Keeping(Augmented()))
    with pytest.raises(stillframe.InvalidArgument, match="0 or more"):
        ResumableLoader(maker()()).set_epoch(-1)


def test_a_sampler_that_ends_early_is_noticed() -> None:
    indices = [*range(SAMPLES)]
    loader = ResumableLoader(DataLoader(Augmented(), batch_size=BATCH, sampler=indices))
    passed = iter(loader)
    for _ in range(4):
        next(passed)
    state = loader.state_dict()
    shorter = ResumableLoader(DataLoader(Augmented(), batch_size=BATCH, sampler=indices))
    shorter.load_state_dict(state)
    del indices[8:]
    with pytest.raises(stillframe.InvalidArgument, match="ends after 2 batches, but 4"):
        iter(shorter)


def test_sequential_order_needs_no_generator() -> None:
    data = DataLoader(Augmented(), batch_size=BATCH, sampler=SequentialSampler(range(SAMPLES)))
    state = ResumableLoader(data).state_dict()
    assert state["generators"] == {}
