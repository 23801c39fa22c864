"""transformers.Trainer and Accelerate, saved through Stillframe: the real ones, a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
)

import hf_training
import stillframe.huggingface
from daemon import kill_daemon
from hf_training import STEPS, MyTrainer, digest, make, make_model
from stillframe._core.session import Session, list_run
from stillframe._huggingface.folders import Folder, choose_removals, in_order, make_link
from stillframe._huggingface.support import published_names, reason_against
from stillframe.errors import (
    DataLoss,
    InvalidArgument,
    ResourceExhausted,
    StillframeWarning,
    Unavailable,
)

SCRIPT = Path(hf_training.__file__)


def folders(directory: Path) -> list[str]:
    return sorted((path.name for path in directory.glob("checkpoint-*")), key=lambda n: int(n[11:]))


def saved_steps(directory: Path) -> list[int]:
    return [entry["step"] for entry in list_run(str(directory / "_stillframe"))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Scripted(MyTrainer):
    """Its evaluations find what the test wants them to find, step by step."""

    losses: dict[int, float] = {}  # noqa: RUF012

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": self.losses.get(self.state.global_step, 9.0)}
        self.log(metrics)
        return metrics


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """An uninterrupted training of the stock Trainer, its three newest checkpoints."""
    directory = tmp_path_factory.mktemp("stock")
    trainer = make(directory, Trainer, save_total_limit=3)
    trainer.train()
    yield directory, trainer


def test_a_training_killed_by_sigkill_ends_like_one_that_was_not(tmp_path: Path) -> None:
    changes = {"save_total_limit": 2, "load_best_model_at_end": True}
    straight = make(tmp_path / "straight", **changes)
    straight.train()
    killed = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), str(killed), "0.05"]
    command += [f"{name}={json.dumps(value)}" for name, value in changes.items()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        for line in trainer.stdout:
            if line == "step 9\n":
                trainer.kill()
                break
    assert 0 < max(saved_steps(killed)) <= 8
    again = make(killed, model=make_model(seed=5), **changes)
    again.train(resume_from_checkpoint=True)
    assert digest(again) == digest(straight)
    assert again.state.best_model_checkpoint == str(
        killed / Path(straight.state.best_model_checkpoint).name
    )
    assert folders(killed) == folders(tmp_path / "straight")
    assert [f"checkpoint-{step}" for step in saved_steps(killed)] == folders(killed)


def test_folders_are_those_of_the_stock_trainer_and_load_with_from_pretrained(
    tmp_path: Path, stock: tuple[Path, Any]
) -> None:
    trainer = make(tmp_path, save_total_limit=3)
    trainer.train()
    assert digest(trainer) == digest(stock[1])
    assert (
        folders(tmp_path)
        == folders(stock[0])
        == ["checkpoint-12", "checkpoint-14", "checkpoint-16"]
    )
    for name in folders(tmp_path):
        ours, theirs = tmp_path / name, stock[0] / name
        large = {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert set(os.listdir(ours)) == set(os.listdir(theirs)) - large
        assert equal(weights(ours), weights(theirs))
        state = json.loads((ours / "trainer_state.json").read_text())
        assert state["global_step"] == int(name[11:])
        assert torch.load(ours / "training_args.bin", weights_only=False).save_total_limit == 3
    loaded = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-16")
    assert equal(loaded.state_dict(), trainer.model.state_dict())
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_names_are_those_of_save_pretrained_or_it_saves_in_the_stock_way(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    llama = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    llama.save_pretrained(tmp_path / "llama")
    assert published_names(llama) == set(weights(tmp_path / "llama"))
    assert reason_against(make(tmp_path / "a", model=llama)) is None

    # Fused in memory, one tensor an expert in the file.
    mixtral = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))
    trainer = make(tmp_path / "mixtral", model=mixtral, max_steps=2)
    with pytest.warns(StillframeWarning, match="under other names"):
        trainer.train()
    assert published_names(mixtral) == set(weights(tmp_path / "mixtral" / "checkpoint-2"))
    assert (tmp_path / "mixtral" / "checkpoint-2" / "optimizer.pt").exists()
    assert not (tmp_path / "mixtral" / "_stillframe").exists()


# Of peft about transformers.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_saves_its_adapters_in_the_stock_way_and_resumes(tmp_path: Path) -> None:
    def adapted() -> Any:
        return get_peft_model(make_model(), LoraConfig(r=2, target_modules=["query", "value"]))

    trainer = make(tmp_path, model=adapted(), max_steps=2)
    with pytest.warns(StillframeWarning, match="a PEFT model saves its adapters alone"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert not (tmp_path / "_stillframe").exists()
    again = make(tmp_path, model=adapted(), max_steps=4)
    with pytest.warns(StillframeWarning, match="a PEFT model saves its adapters alone"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_two_processes_save_in_the_stock_way_and_say_why(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [
            *(sys.executable, *launch, "--nnodes=1", "--nproc-per-node=2"),
            *(str(SCRIPT), str(tmp_path), "0", "max_steps=2", 'ddp_backend="gloo"'),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes train, and this version serves one" in done.stderr
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").is_symlink()
    assert not (tmp_path / "_stillframe").exists()


def test_rotation_goes_by_the_order_of_saving_and_spares_the_best(tmp_path: Path) -> None:
    class Toucher(TrainerCallback):
        """Makes the oldest folder look like the newest."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.utime(tmp_path / folders(tmp_path)[0], (2e9, 2e9))
            for name in folders(tmp_path)[1:]:
                os.utime(tmp_path / name, (1e9, 1e9))

    Scripted.losses = {4: 0.5}
    trainer = make(
        tmp_path,
        Scripted,
        callbacks=[Toucher()],
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert folders(tmp_path) == ["checkpoint-4", "checkpoint-16"]
    assert saved_steps(tmp_path) == [4, 16]
    assert os.readlink(tmp_path / "_stillframe" / "best") == "00000002-step-4"
    # The weights of step 4 came back, not those of the last step.
    best = BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert equal(trainer.model.state_dict(), best)
    assert list_run(str(tmp_path / "_stillframe"))[0]["metrics"]["eval_loss"] == 0.5


def test_save_strategies_best_and_epoch_save_when_the_stock_trainer_does(tmp_path: Path) -> None:
    Scripted.losses = {4: 0.5, 6: 0.7, 10: 0.2}
    best = make(tmp_path / "best", Scripted, save_strategy="best", metric_for_best_model="loss")
    best.train()
    # The first evaluation is the best so far.
    assert folders(tmp_path / "best") == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert saved_steps(tmp_path / "best") == [2, 4, 10]
    epoch = make(tmp_path / "epoch", save_strategy="epoch", save_total_limit=1)
    epoch.train()
    assert folders(tmp_path / "epoch") == ["checkpoint-16"]


def test_what_never_became_durable_is_passed_over_loudly(
    tmp_path: Path, stock: tuple[Path, Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, callbacks=[StopAt(5)]).train()
    # As a kill leaves them: with a link to nothing, and before there was one.
    for step, linked in ((6, True), (8, False)):
        stub = tmp_path / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "checkpoint-4", stub, symlinks=True)
        (stub / "model.safetensors").unlink()
        if linked:
            make_link(stub / "model.safetensors", tmp_path / "_stillframe", 99, step, "model")
        with pytest.raises(InvalidArgument, match=f"checkpoint-{step} cannot be resumed from"):
            make(tmp_path).train(resume_from_checkpoint=str(stub))
    again = make(tmp_path, model=make_model(seed=5), save_total_limit=2)
    with pytest.warns(StillframeWarning, match="checkpoint-4 instead of checkpoint-.*not durable"):
        again.train(resume_from_checkpoint=True)
    assert digest(again) == digest(stock[1])
    assert folders(tmp_path) == ["checkpoint-14", "checkpoint-16"]

    shutil.rmtree(tmp_path / "_stillframe")
    with pytest.raises(DataLoss, match="no checkpoint of .*start afresh"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_damaged_newest_gives_way_to_the_one_before(
    tmp_path: Path, stock: tuple[Path, Any]
) -> None:
    make(tmp_path, max_steps=STEPS, callbacks=[]).train()
    kill_daemon()
    for part, step in (("model", 16), ("optimizer", 14)):
        (path,) = (tmp_path / "_stillframe").glob(f"*-step-{step}/{part}.safetensors")
        flip_last_byte(path)
    with pytest.raises(DataLoss, match="checkpoint 8"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    again = make(tmp_path, model=make_model(seed=5))
    with pytest.warns(StillframeWarning) as caught:
        again.train(resume_from_checkpoint=True)
    texts = [str(one.message) for one in caught]
    assert len(texts) == 2
    assert "checkpoint-14 instead of checkpoint-16: " in texts[0]
    assert "checkpoint-12 instead of checkpoint-16: " in texts[1]
    assert "; checkpoint-14: " in texts[1]
    assert digest(again) == digest(stock[1])


def flip_last_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def test_a_damaged_best_is_an_error_and_not_trained_again(tmp_path: Path) -> None:
    class Damager(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == STEPS:
                (path,) = (tmp_path / "_stillframe").glob("*-step-4/model.safetensors")
                flip_last_byte(path)

    Scripted.losses = {4: 0.5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Scripted, callbacks=[StopAt(7)], **best).train()
    trainer = make(tmp_path, Scripted, callbacks=[Damager()], **best)
    with pytest.raises(DataLoss, match="the best checkpoint is damaged"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert saved_steps(tmp_path) == [2, 4, 6, 8, 10, 12, 14, 16]


def test_checkpoints_of_the_stock_trainer_are_resumed_from_and_rotated(
    tmp_path: Path, stock: tuple[Path, Any]
) -> None:
    for name in ("checkpoint-12", "checkpoint-14"):
        shutil.copytree(stock[0] / name, tmp_path / name)
    make(tmp_path, model=make_model(seed=5), max_steps=14).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-12")
    )
    # Nothing of the older save stays beside the new one's link.
    assert not (tmp_path / "checkpoint-14" / "optimizer.pt").exists()
    shutil.rmtree(tmp_path / "checkpoint-14")
    again = make(tmp_path, model=make_model(seed=5), save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert digest(again) == digest(stock[1])
    assert folders(tmp_path) == ["checkpoint-16"]


def test_a_step_that_is_trained_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, max_steps=8).train()
    assert saved_steps(tmp_path) == [2, 4, 6, 8]
    again = make(tmp_path, model=make_model(seed=5), max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert saved_steps(tmp_path) == [2, 4, 6, 8]
    # The user's own export to a checkpoint folder does not write through its link.
    make(tmp_path, model=make_model(seed=7)).save_model(str(tmp_path / "checkpoint-6"))
    assert not (tmp_path / "checkpoint-6" / "model.safetensors").is_symlink()
    last = make(tmp_path, model=make_model(seed=5), max_steps=8)
    last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert equal(last.model.state_dict(), again.model.state_dict())


def test_save_only_model_saves_the_weights_alone(tmp_path: Path) -> None:
    make(tmp_path, max_steps=4, save_only_model=True).train()
    (newest,) = (tmp_path / "_stillframe").glob("*-step-4")
    assert not (newest / "optimizer.safetensors").exists()
    again = make(tmp_path, model=make_model(seed=5), max_steps=6)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    (newest,) = (tmp_path / "_stillframe").glob("*-step-6")
    assert (newest / "optimizer.safetensors").exists()


def test_a_failed_save_is_warned_of_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_save = Session.begin_save

    def full(self: Session, request: Any, sources: Any) -> Any:
        if request.step == 4:
            raise ResourceExhausted("the drive is full")
        return begin_save(self, request, sources)

    monkeypatch.setattr(Session, "begin_save", full)
    Scripted.losses = {4: 0.5}
    trainer = make(
        tmp_path,
        Scripted,
        max_steps=8,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    with pytest.warns(StillframeWarning) as caught:
        trainer.train()
    texts = [str(one.message) for one in caught]
    assert sum("the save of step 4 has failed: the drive is full" in text for text in texts) == 1
    assert any("the best checkpoint, has failed" in text for text in texts)
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]

    class Strict(MyTrainer):
        stillframe_options = {"on_error": "raise"}  # noqa: RUF012

    with pytest.warns(StillframeWarning), pytest.raises(ResourceExhausted):
        make(tmp_path / "strict", Strict, max_steps=8).train()


def test_without_a_daemon_it_saves_in_the_stock_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: Session, options: Any) -> None:
        raise Unavailable("no daemon")

    monkeypatch.setattr(Session, "__init__", none)
    trainer = make(tmp_path, max_steps=6, save_total_limit=2)
    with pytest.warns(StillframeWarning, match="writes the checkpoints, not Stillframe: no daemon"):
        trainer.train()
    assert folders(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "checkpoint-4" / "optimizer.pt").exists()
    assert (tmp_path / "checkpoint-6" / "rng_state.pth").exists()


def test_a_push_to_the_hub_waits_for_the_weights(tmp_path: Path) -> None:
    pushed = []

    class Pusher(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            pushed.append((Path(checkpoint_folder) / "model.safetensors").exists())

    class Pushing(stillframe.huggingface.StillframeTrainerMixin, Pusher):
        pass

    trainer = make(tmp_path, Pushing, max_steps=4)
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [True, True]


class Plain(torch.nn.Module):
    """No PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 8)
        self.head = torch.nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.embedding(input_ids))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


class Scaled(MyTrainer):
    """Has a gradient scaler when it saves and loads: on a CPU none is used for training."""

    scaler: Any = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.accelerator.scaler = self.scaler
        super()._save_checkpoint(model, trial)
        self.accelerator.scaler = None

    def _load_scaler(self, checkpoint: str | None) -> None:
        self.accelerator.scaler = self.scaler
        super()._load_scaler(checkpoint)
        self.accelerator.scaler = None


def test_any_module_and_the_gradient_scaler_come_back(tmp_path: Path) -> None:
    def scaled(scale: float) -> Any:
        trainer = make(tmp_path, Scaled, model=Plain(), max_steps=8, eval_strategy="no")
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return trainer

    first = scaled(8.0)
    first.train()
    assert equal(weights(tmp_path / "checkpoint-8"), first.model.state_dict())
    again = scaled(2.0)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert again.scaler.state_dict()["scale"] == 8.0
    assert digest(again) == digest(first)


def folder(step: int, sequence: int | None) -> Folder:
    return Folder(Path(f"/out/checkpoint-{step}"), step, sequence, is_stock=sequence is None)


def entry(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "damage": None, "tags": [], **changes}


def test_a_run_that_starts_over_at_a_lower_step_keeps_what_is_new() -> None:
    found = [folder(30, 3), folder(10, 4), folder(20, 5), folder(5, None), folder(25, None)]
    assert [one.step for one in in_order(found)] == [5, 25, 30, 10, 20]
    entries = {3: entry(30), 4: entry(10), 5: entry(20)}
    removals = choose_removals(found, entries, limit=2, best=None, in_flight=())
    assert [one.step for one in removals.folders] == [5, 25, 30]


def test_tags_damage_and_saves_under_way_are_left_alone() -> None:
    found = [folder(1, 1), folder(2, 2), folder(3, 3), folder(4, 4), folder(5, 5)]
    entries = {1: entry(1, tags=["paper"]), 2: entry(2, damage="torn"), 3: entry(3), 4: entry(4)}
    removals = choose_removals(found, entries, limit=1, best=None, in_flight={5})
    assert [one.step for one in removals.folders] == [3]
    # Nothing goes while nothing newer is durable.
    removals = choose_removals(found, {2: entries[2]}, limit=1, best=None, in_flight={5})
    assert removals.folders == []


class Counter:
    """A user's own object with a state."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("model_count", [1, 2])
def test_accelerate_saves_and_loads_its_state_through_the_hooks(
    tmp_path: Path, model_count: int
) -> None:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout()) for _ in range(model_count)
    ]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 2)
    models = [accelerator.prepare(model) for model in models]
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    scheduler = accelerator.prepare(scheduler)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)

    def train(steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = sum(model(torch.randn(2, 4)).square().sum() for model in models)
            accelerator.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            counter.count += 1
            losses.append(loss.item())
        return losses

    with stillframe.huggingface.register(accelerator, tmp_path / "run", check="full") as run:
        train(3)
        accelerator.save_state(tmp_path / "step_3")
        assert len(accelerator._optimizers) == model_count
        expected = train(4)
        run.wait(timeout=30)
        assert run.last_ticket is not None
        assert (run.last_ticket.step, run.last_ticket.state) == (3, "durable")
        assert not (tmp_path / "step_3" / "optimizer.bin").exists()
        accelerator.load_state(tmp_path / "step_3")
        assert len(accelerator._optimizers) == model_count
        assert counter.count == 3
        assert train(4) == expected
        if model_count == 1:
            assert weights(tmp_path / "step_3").keys() == models[0].state_dict().keys()

        # Not durable: a link to nothing.
        (link,) = (path for path in (tmp_path / "step_3").iterdir() if path.is_symlink())
        make_link(link, tmp_path / "run", 77, 3, "model.safetensors")
        with pytest.raises(InvalidArgument, match="cannot be loaded"):
            accelerator.load_state(tmp_path / "step_3")
        make_link(link, tmp_path / "other", 1, 3, "model.safetensors")
        with pytest.raises(InvalidArgument, match="not into the run"):
            accelerator.load_state(tmp_path / "step_3")
    # Without the hooks it is Accelerate's again.
    accelerator.save_state(tmp_path / "own")
    assert (tmp_path / "own" / "optimizer.bin").exists()
    with stillframe.huggingface.register(accelerator, tmp_path / "run"):
        accelerator.load_state(tmp_path / "own")
