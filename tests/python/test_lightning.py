"""The real Trainer and the stock ModelCheckpoint with StillframeCheckpointIO."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_training as lt
from daemon import kill_daemon, slow_daemon
from stillframe._core.session import list_run
from stillframe._lightning.step_watch import step_watch
from stillframe._lightning.stub import read_stub, write_stub
from stillframe._torch.recipe import checkpoint_recipe
from stillframe.errors import (
    DataLoss,
    InvalidArgument,
    NotFound,
    StillframeError,
    StillframeWarning,
)
from stillframe.lightning import StillframeCheckpointIO, stock_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec"),
    # Lightning's own hints: few workers, no val_dataloader, a long log interval.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
]


@pytest.fixture(autouse=True)
def _no_steps_of_other_tests() -> Iterator[None]:
    yield
    step_watch().forget()


def durable_steps(folder: Path) -> list[int]:
    return [one["step"] for one in list_run(str(folder / "stillframe-run")) if not one["damage"]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


class Loop:
    """A training loop without a Trainer: what one hands to a CheckpointIO, step by step."""

    def __init__(self, folder: Path, width: int = 8, **options: Any) -> None:
        self.folder = folder
        self.io = StillframeCheckpointIO(**options)
        self.model = nn.Linear(width, width)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step = 0

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(1, self.model.in_features)).sum().backward()
        self.optimizer.step()
        self.step += 1

    def save(self, name: str, **more: Any) -> None:
        self.io.save_checkpoint(
            {
                "state_dict": self.model.state_dict(),
                "optimizer_states": [self.optimizer.state_dict()],
                "global_step": self.step,
                **more,
            },
            self.folder / name,
        )

    def train_and_save(self, name: str, **more: Any) -> None:
        self.train()
        self.save(name, **more)

    def load(self, name: str, **options: Any) -> dict[str, Any]:
        return self.io.load_checkpoint(self.folder / name, **options)


def leave_dead_stub(folder: Path, live: str, dead: str, **changes: Any) -> None:
    """What a kill leaves behind: the stub of a save that did not become durable."""
    import dataclasses

    stub = read_stub(folder / live)
    assert stub is not None
    changed = {"sequence": stub.sequence + 1, "step": stub.step + 1, "save_id": "f" * 16, **changes}
    write_stub(folder / dead, dataclasses.replace(stub, state=None, **changed))


def damage(folder: Path, step: int) -> None:
    part = next((folder / "stillframe-run").glob(f"*-step-{step}")) / "model.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)


# --- The real Trainer -----------------------------------------------------------------------------


def test_a_killed_training_goes_on_from_last_bit_for_bit(tmp_path: Path) -> None:
    whole = lt.Net()
    lt.trainer(enable_checkpointing=False, max_steps=40).fit(whole, lt.batches())

    folder = tmp_path / "checkpoints"
    command = [sys.executable, lt.__file__, str(folder), "40"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [*command, "0.02"], stdout=subprocess.PIPE, text=True, env=environment
    ) as killed:
        assert killed.stdout is not None
        assert any(line == "step 21\n" for line in killed.stdout)
        killed.send_signal(signal.SIGKILL)
    resumed = subprocess.run(
        [*command, "0"], capture_output=True, text=True, env=environment, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    first, *_, last = [line for line in resumed.stdout.splitlines() if line[:4] in ("step", "dige")]
    assert 16 <= int(first.split()[1]) <= 24, first
    assert last == f"digest {whole.digest()}"
    kept, last_name = names(folder)
    assert kept.endswith("-step=40.ckpt")
    assert last_name == "last.ckpt"
    assert durable_steps(folder) == [40]


class Watch(Callback):
    """Looks at the folder at each step's start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.durable: list[list[int]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.durable.append(durable_steps(self.folder))


def test_the_best_k_stay_and_what_they_displace_goes_behind_a_durable_one(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    best = ModelCheckpoint(tmp_path, monitor="score", save_top_k=2, save_last=True)
    net = lt.Net()
    trainer = lt.trainer(best, watch, max_epochs=6)
    trainer.fit(net, lt.batches(), lt.batches())
    # Scores 5 3 4 2 6 1: epochs 3 and 5 are the best.
    assert names(tmp_path) == ["epoch=3-step=32.ckpt", "epoch=5-step=48.ckpt", "last.ckpt"]
    assert durable_steps(tmp_path) == [32, 48]
    after_first = watch.durable[lt.EPOCH_STEPS :]
    assert all(after_first), "at no time was there none"
    assert max(map(len, after_first)) < 6, "some went on the way"
    metrics = [one["metrics"] for one in list_run(str(tmp_path / "stillframe-run"))]
    assert metrics == [{"score": 2.0}, {"score": 1.0}]

    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for path in ("best", "last", str(tmp_path / "epoch=5-step=48.ckpt")):
        for parameter in net.parameters():
            parameter.data.zero_()
        trainer.validate(net, lt.batches(), ckpt_path=path, verbose=False)
        assert all(torch.equal(net.state_dict()[name], weights[name]) for name in weights)
    assert best.best_model_path == str(tmp_path / "epoch=5-step=48.ckpt")

    loaded = lt.Net.load_from_checkpoint(stock_file(best.best_model_path))
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)


def test_save_last_link_and_versions_work_as_with_files(tmp_path: Path) -> None:
    for _ in range(2):
        saves = ModelCheckpoint(tmp_path, filename="same", save_last="link", save_top_k=1)
        lt.trainer(saves, max_epochs=2).fit(lt.Net(), lt.batches())
    # As with stock files: the second training takes other names.
    assert {"same.ckpt", "same-v1.ckpt", "last.ckpt"} <= set(names(tmp_path))
    assert (tmp_path / "last.ckpt").is_symlink()
    loaded = StillframeCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")
    assert loaded["global_step"] == 2 * lt.EPOCH_STEPS


def test_a_save_on_exception_is_durable_and_the_trainings_error_is_seen(tmp_path: Path) -> None:
    net = lt.Net()

    def fail(step: int) -> None:
        if step == 5:
            raise RuntimeError("the training's own")

    net.on_step = fail
    saves = ModelCheckpoint(tmp_path, save_on_exception=True)
    with pytest.raises(RuntimeError, match="the training's own"):
        lt.trainer(saves, max_epochs=1).fit(net, lt.batches())
    assert durable_steps(tmp_path) == [5]


def test_hyper_parameters_without_a_form_are_named_and_pickled_only_when_asked(
    tmp_path: Path,
) -> None:
    saves = ModelCheckpoint(tmp_path)
    with pytest.raises(InvalidArgument, match=r"hyper_parameters\.note .*allow_pickle=True"):
        lt.trainer(saves, max_epochs=1).fit(lt.Net(note=1j), lt.batches())
    assert names(tmp_path) == []

    saves = ModelCheckpoint(tmp_path)
    allowing = StillframeCheckpointIO(allow_pickle=True)
    lt.trainer(saves, plugin=allowing, max_epochs=1).fit(lt.Net(note=1j), lt.batches())
    path = saves.best_model_path
    assert allowing.load_checkpoint(path)["hyper_parameters"]["note"] == 1j
    for plugin, only in ((StillframeCheckpointIO(), None), (allowing, True)):
        with pytest.raises(InvalidArgument, match="is a pickle"):
            plugin.load_checkpoint(path, weights_only=only)


def test_what_manual_optimization_saves_from_before_its_step_is_not_torn(tmp_path: Path) -> None:
    class Manual(lt.Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = self.net
            self.saved_models: dict[int, Any] = {}

        def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
            before = {name: value.clone() for name, value in self.layer.state_dict().items()}
            self.saved_models = {self.global_step + 1: before}
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(torch.ones(16, 8)).sum())
            optimizer.step()

    net = Manual()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    lt.trainer(saves, max_steps=8).fit(net, lt.batches())
    saved = StillframeCheckpointIO().load_checkpoint(tmp_path / "epoch=0-step=8.ckpt")
    for name, value in net.saved_models[8].items():
        assert torch.equal(saved["state_dict"][f"layer.{name}"], value), name


# --- Stubs ----------------------------------------------------------------------------------------


def test_a_stub_is_there_at_once_and_names_a_directory_that_appears_when_durable(
    tmp_path: Path,
) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    assert durable_steps(tmp_path) == [1], "the first of a run is waited for"
    loop.train_and_save("b.ckpt")
    stub = read_stub(tmp_path / "b.ckpt")
    assert stub is not None
    assert (tmp_path / "b.ckpt").read_text().startswith('{"stillframe_stub": 1,')
    loop.io.teardown()
    assert (tmp_path / stub.run / stub.directory_name / "manifest.json").exists()
    assert torch.equal(loop.load("b.ckpt")["state_dict"]["weight"], loop.model.weight)


def test_last_after_a_kill_loads_the_newest_durable_one_loudly_and_a_path_raises(
    tmp_path: Path,
) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    loop.train_and_save("b.ckpt")
    loop.io.teardown()
    leave_dead_stub(tmp_path, "b.ckpt", "last.ckpt")
    leave_dead_stub(tmp_path, "b.ckpt", "c.ckpt")
    with pytest.warns(StillframeWarning, match="names step 3, which is not durable.*step 2 inst"):
        assert loop.load("last.ckpt")["global_step"] == 2
    with pytest.raises(NotFound, match=r"names step 3.*newest durable one is .*step-2"):
        loop.load("c.ckpt")
    # The next training sweeps what holds nothing.
    loop.train_and_save("d.ckpt")
    assert "c.ckpt" not in names(tmp_path)
    # A sequence that is given again is not the one of the stub.
    leave_dead_stub(tmp_path, "d.ckpt", "e.ckpt", sequence=3, step=3)
    loop.io.teardown()
    with pytest.raises(NotFound):
        loop.load("e.ckpt")


def test_damage_falls_back_loudly_for_last_and_raises_for_a_path(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    loop.train_and_save("b.ckpt")
    loop.save("last.ckpt")
    loop.io.teardown()
    damage(tmp_path, step=2)
    with pytest.raises(DataLoss, match="names step 2, which is damaged"):
        loop.load("b.ckpt")
    with pytest.warns(StillframeWarning) as told:
        assert loop.load("last.ckpt")["global_step"] == 1
    assert "loading step 1 instead" in str(told[-1].message)


def test_two_names_for_one_state_are_one_checkpoint_each_with_its_own_text(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt", note="a")
    loop.train()
    loop.save("b.ckpt", note="b")
    loop.save("last.ckpt", note="last")
    loop.save("other.ckpt", note="other", score=torch.tensor(1.0))
    loop.io.remove_checkpoint(tmp_path / "b.ckpt")
    loop.io.teardown()
    assert durable_steps(tmp_path) == [1, 2, 2], "other tensors make another checkpoint"
    assert names(tmp_path) == ["a.ckpt", "last.ckpt", "other.ckpt"]
    for name in ("a", "last", "other"):
        assert loop.load(f"{name}.ckpt")["note"] == name
    assert torch.equal(loop.load("last.ckpt")["state_dict"]["weight"], loop.model.weight)


# --- Removal and errors ---------------------------------------------------------------------------


def begin_a_save_that_fails(loop: Loop, name: str) -> None:
    with slow_daemon():
        loop.train_and_save(name)
        kill_daemon()
    stub = read_stub(loop.folder / name)
    assert stub is not None
    assert not (loop.folder / stub.run / stub.directory_name).exists()


@pytest.mark.filterwarnings("ignore::stillframe.StillframeWarning")
def test_what_a_failed_save_displaced_stays_until_the_next_one_is_durable(tmp_path: Path) -> None:
    loop = Loop(tmp_path, width=3000)
    loop.train_and_save("a.ckpt")
    begin_a_save_that_fails(loop, "b.ckpt")
    loop.io.remove_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(StillframeError, match=r"b\.ckpt \(step 2\) has failed"):
        loop.train_and_save("c.ckpt")
    assert loop.load("a.ckpt")["global_step"] == 1
    loop.train_and_save("d.ckpt")  # It is said once; another daemon takes over.
    loop.io.teardown()
    assert durable_steps(tmp_path) == [4]
    assert "a.ckpt" not in names(tmp_path)


@pytest.mark.filterwarnings("ignore::stillframe.StillframeWarning")
def test_teardown_raises_what_nobody_was_told(tmp_path: Path) -> None:
    loop = Loop(tmp_path, width=3000)
    loop.train_and_save("a.ckpt")
    begin_a_save_that_fails(loop, "b.ckpt")
    with pytest.raises(StillframeError, match=r"b\.ckpt \(step 2\) has failed"):
        loop.io.teardown()
    loop.io.teardown()


def test_a_removal_that_the_daemon_had_no_time_for_is_asked_for_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    for _ in range(40):
        # Faster than checkpoints are removed, of which the daemon takes three at a time.
        loop.train_and_save("a.ckpt")
        loop.save("last.ckpt")
    loop.io.teardown()
    assert durable_steps(tmp_path) == [40]


def test_what_was_queued_at_a_kill_is_removed_by_the_next_training(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    loop.train_and_save("b.ckpt")
    loop.io.teardown()
    stub, other = read_stub(tmp_path / "b.ckpt"), read_stub(tmp_path / "a.ckpt")
    assert stub is not None
    assert other is not None
    leave_dead_stub(
        tmp_path,
        "b.ckpt",
        "b.ckpt",
        sequence=stub.sequence,
        step=stub.step,
        save_id=stub.save_id,
        displaced=(lt_displaced(other.sequence, other.save_id),),
    )
    loop.train_and_save("c.ckpt")
    loop.io.teardown()
    assert names(tmp_path) == ["b.ckpt", "c.ckpt"]
    assert durable_steps(tmp_path) == [2, 3]


def lt_displaced(sequence: int, save_id: str) -> Any:
    from stillframe._lightning.stub import Displaced

    return Displaced(sequence, save_id, "a.ckpt")


def test_a_weight_written_before_the_capture_ends_fails_the_save(tmp_path: Path) -> None:
    loop = Loop(tmp_path, width=2000, check="full")
    loop.train_and_save("a.ckpt")
    loop.train_and_save("b.ckpt")
    with torch.no_grad():
        loop.model.weight.zero_()
    try:
        loop.io.teardown()
    except DataLoss as error:
        assert "weight" in str(error)  # noqa: PT017
    except StillframeWarning as told:
        assert "weight" in str(told)  # noqa: PT017
    else:
        # It was captured before the write: then it holds the old weights.
        assert loop.load("b.ckpt")["state_dict"]["weight"].abs().sum() > 0


# --- Other files and places -----------------------------------------------------------------------


def test_stock_files_load_and_are_removed_as_ever(tmp_path: Path) -> None:
    stock = tmp_path / "stock.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "odd": Path("x")}, stock)
    plugin = StillframeCheckpointIO()
    assert torch.equal(
        plugin.load_checkpoint(stock, weights_only=False)["state_dict"]["w"], torch.ones(2)
    )
    with pytest.raises(pickle.UnpicklingError):
        plugin.load_checkpoint(stock, weights_only=True)
    plugin.remove_checkpoint(stock)
    assert not stock.exists()
    with pytest.raises(FileNotFoundError):
        plugin.load_checkpoint(stock)
    # What Lightning's launchers pass between processes.
    plugin.save_checkpoint({"w": torch.ones(1)}, tmp_path / ".temp.ckpt")
    assert torch.load(tmp_path / ".temp.ckpt")["w"].item() == 1
    assert not (tmp_path / "stillframe-run").exists()


def test_a_stock_file_is_replaced_only_by_a_durable_checkpoint(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    torch.save({}, tmp_path / "b.ckpt")
    loop.train_and_save("b.ckpt")
    assert durable_steps(tmp_path) == [1, 2]
    loop.io.teardown()


def test_map_location_moves_tensors_as_torch_load_does(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    loop.io.teardown()
    for where in ("meta", torch.device("meta"), {"cpu": "meta"}):
        weight = loop.load("a.ckpt", map_location=where)["state_dict"]["weight"]
        assert weight.is_meta, where
    for keep in (None, "cpu", lambda storage, location: storage):
        loaded = loop.load("a.ckpt", map_location=keep)
        assert torch.equal(loaded["state_dict"]["weight"], loop.model.weight)
    moments = loop.load("a.ckpt")["optimizer_states"][0]["state"][0]["momentum_buffer"]
    moments.add_(1)  # Nobody else's memory: what is loaded again is what was saved.
    directory = next((tmp_path / "stillframe-run").glob("*-step-1"))
    again = loop.io.load_checkpoint(directory)["optimizer_states"][0]["state"][0]
    assert torch.equal(again["momentum_buffer"] + 1, moments)


def test_wrong_paths_and_options_are_refused_by_name(tmp_path: Path) -> None:
    plugin = StillframeCheckpointIO()
    with pytest.raises(InvalidArgument, match="local paths only"):
        plugin.save_checkpoint({}, "s3://bucket/a.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint({}, tmp_path / "a.ckpt", storage_options={})
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / ".metadata").touch()
    with pytest.raises(InvalidArgument, match="sharded.*FSDPStrategy"):
        plugin.load_checkpoint(tmp_path / "sharded.ckpt")
    with pytest.raises(InvalidArgument, match="capture is 'lazy'"):
        StillframeCheckpointIO(capture="lazy")  # type: ignore[arg-type]
    assert not (tmp_path / "stillframe-run").exists()


# --- The fence ------------------------------------------------------------------------------------


def test_a_step_with_a_closure_waits_behind_the_backward_pass() -> None:
    order: list[str] = []
    weight = nn.Parameter(torch.ones(1))
    watch = step_watch()

    def closure() -> torch.Tensor:
        order.append("backward")
        loss = weight.sum()
        loss.backward()
        return loss

    class Eager(torch.optim.SGD):
        """Somebody's own: it may write before its closure."""

    for kind, expected in ((torch.optim.SGD, ["backward", "wait"]), (Eager, ["wait", "backward"])):
        for positional in (True, False):
            optimizer = kind([weight], lr=0.1)
            watch.wait_before_step(lambda: order.append("wait"))
            optimizer.step(closure) if positional else optimizer.step(closure=closure)
            assert order == expected
            order.clear()


def test_only_what_a_watched_step_writes_is_copied_later() -> None:
    watch = step_watch()
    watch.forget()
    stepped, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.Adam(stepped.parameters())
    stepped(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    watch.trust(1)
    is_lazy = watch.is_behind_step()
    assert is_lazy(stepped.weight.detach())
    assert is_lazy(optimizer.state[stepped.weight]["exp_avg"])
    assert not is_lazy(other.weight)
    watch.trust(1)
    assert watch.is_behind_step()(stepped.weight), "the same step again"
    watch.trust(2)
    assert not watch.is_behind_step()(stepped.weight), "no hook ran between: perhaps compiled"


def test_the_plugin_is_pickled_without_what_it_holds(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.train_and_save("a.ckpt")
    loop.io.teardown()
    copy = pickle.loads(pickle.dumps(loop.io))
    assert copy.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1
    copy.teardown()


def test_a_model_that_lightnings_compile_has_wrapped_says_how_it_is_made() -> None:
    # Importing Lightning replaces torch.compile by one that leaves a mark on the module.
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 2)))
    recipe = checkpoint_recipe(compiled)
    assert recipe is not None
    assert "structure" in recipe
