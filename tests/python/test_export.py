"""`stillframe export`: what each library's own reader makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import command
import stillframe.torch as stillframe
import training
from command import ok, refused
from saved_run import exported, saved

__all__ = ["exported", "saved"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name])
        for name in wanted
    )


def test_a_safetensors_export_is_the_part_and_opens_with_safetensors(
    saved: Any, tmp_path: Path
) -> None:
    run, made = saved
    target = tmp_path / "model.safetensors"
    answer = ok("export", f"{run}@latest", target, "--to", "safetensors")
    assert answer["bytes"] == target.stat().st_size
    assert same(safetensors.torch.load_file(target), made.model.state_dict())
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    part = next(run.glob("0*")) / "model.safetensors"
    assert target.read_bytes() == part.read_bytes()
    assert list(tmp_path.iterdir()) == [target]


def test_a_hf_export_in_shards_has_the_stock_names_and_index(saved: Any, tmp_path: Path) -> None:
    run, made = saved
    target = tmp_path / "hf"
    answer = ok("export", run, target, "--to", "hf", "--max-shard-size", "1kB")
    index_text = (target / "model.safetensors.index.json").read_text()
    index = json.loads(index_text)
    state = made.model.state_dict()
    assert index_text == json.dumps(index, indent=2, sort_keys=True) + "\n"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert shards == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    found: dict[str, Tensor] = {}
    for shard in shards:
        with safetensors.safe_open(target / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118  # It is no dictionary.
                assert index["weight_map"][name] == shard
                found[name] = file.get_tensor(name)
    assert same(found, state)
    assert sorted(answer["files"]) == sorted(path.name for path in target.iterdir())
    config = json.loads((target / "config.json").read_text())
    assert config == {"model_type": "mlp", "sizes": [12, 32]}


def tiny_gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=64, bos_token_id=0
    )
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.filterwarnings("ignore")
def test_from_pretrained_loads_a_hf_export_of_a_model_with_tied_weights(tmp_path: Path) -> None:
    import transformers

    model = tiny_gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    with stillframe.Checkpointer(tmp_path / "run", model=model, optimizer=optimizer) as saver:
        saver.save(1, extra={"config": model.config.to_dict()}).wait()
    ok("export", tmp_path / "run", tmp_path / "hf", "--to", "hf", "--max-shard-size", "20kB")
    model.save_pretrained(tmp_path / "stock")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert isinstance(loaded, transformers.GPT2LMHeadModel)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    names = set(
        json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    )
    assert names == safetensors.torch.load_file(tmp_path / "stock/model.safetensors").keys()


def test_a_hf_export_says_that_there_is_no_config(tmp_path: Path) -> None:
    with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(2, 2)) as saver:
        saver.save(1).wait()
    answer = ok("export", tmp_path / "run", tmp_path / "hf", "--to", "hf")
    assert answer["files"] == ["model.safetensors"]
    assert "config.json" in answer["notes"][0]


def test_a_torch_export_loads_by_weights_only_mapped_or_not_and_trains_on(
    saved: Any, exported: Path
) -> None:
    _, made = saved
    target = exported / "torch"
    for mmap in (False, True):
        loaded = torch.load(target, weights_only=True, mmap=mmap)
        assert same(loaded["model"], made.model.state_dict())
        assert loaded["step"] == 4
        assert loaded["metrics"] == {"loss": 0.5}
    assert torch.equal(loaded["extra"]["order"], torch.arange(5))

    other = training.make(seed=9)
    other.model.load_state_dict(loaded["model"])
    other.optimizer.load_state_dict(loaded["optimizer"])
    other.scheduler.load_state_dict(loaded["scheduler"])
    found, wanted = other.optimizer.state_dict(), made.optimizer.state_dict()
    for number, state in wanted["state"].items():
        assert same(found["state"][number], state)
    names = [name for name, _ in made.model.named_parameters()]
    assert found["param_groups"][0].pop("param_names") == names
    assert found["param_groups"] == wanted["param_groups"]
    other.optimizer.step()


def test_each_tensor_of_a_torch_export_has_a_storage_of_its_own_but_tied_ones(
    tmp_path: Path,
) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with stillframe.Checkpointer(tmp_path / "run", model=model) as saver:
        saver.save(1).wait()
    ok("export", tmp_path / "run", tmp_path / "m.pt", "--to", "torch", "--only", "model")
    state = torch.load(tmp_path / "m.pt", weights_only=True)["model"]
    assert state.keys() == model.state_dict().keys()
    assert state["a.weight"].data_ptr() == state["b.weight"].data_ptr()
    assert state["a.weight"].untyped_storage().nbytes() == 64
    assert state["a.bias"].untyped_storage().nbytes() == 16


def test_a_dcp_export_loads_by_dcp_with_the_optimizers_stock_names(
    saved: Any, tmp_path: Path
) -> None:
    run, made = saved
    ok("export", run, tmp_path / "dcp", "--to", "dcp")
    assert sorted(path.name for path in (tmp_path / "dcp").iterdir()) == [
        ".metadata",
        "__0_0.distcp",
    ]
    other = training.make(seed=9)
    other.step()
    wanted = get_optimizer_state_dict(made.model, made.optimizer)
    state: dict[str, Any] = {
        "model": other.model.state_dict(),
        "optimizer": get_optimizer_state_dict(other.model, other.optimizer),
        "step": 0,
    }
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    assert same(state["model"], made.model.state_dict())
    assert state["step"] == 4
    for name, values in wanted["state"].items():
        assert same(state["optimizer"]["state"][name], values)
    assert state["optimizer"]["param_groups"] == wanted["param_groups"]


def test_the_stock_tool_turns_a_dcp_export_into_a_file_of_torch_save(
    saved: Any, exported: Path, tmp_path: Path
) -> None:
    _, made = saved
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"),
            *(exported / "dcp", tmp_path / "out.pt"),
        ],
        check=True,
        capture_output=True,
    )
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(loaded["model"], made.model.state_dict())
    assert b".partial" not in (exported / "dcp" / ".metadata").read_bytes()


@pytest.mark.parametrize("form", ["safetensors", "hf", "dcp"])
def test_a_target_that_exists_is_replaced_by_force_only_and_at_once(
    saved: Any, tmp_path: Path, form: str
) -> None:
    run, _ = saved
    target = tmp_path / "target"
    ok("export", run, target, "--to", form)
    before = target.stat().st_ino
    assert "--force" in refused("export", run, target, "--to", form)
    assert target.stat().st_ino == before
    ok("export", run, target, "--to", form, "--force")
    assert target.stat().st_ino != before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("form", ["hf", "dcp"])
def test_force_does_not_replace_a_directory_with_files_of_others(
    saved: Any, tmp_path: Path, form: str
) -> None:
    run, _ = saved
    target = tmp_path / "mine"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    assert "thesis.tex" in refused("export", run, target, "--to", form, "--force")
    assert "not a" in refused("export", run, target, "--to", "torch", "--force")
    assert (target / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("form", ["safetensors", "hf", "torch", "dcp"])
def test_a_flipped_bit_in_the_checkpoint_ends_with_4_and_leaves_nothing(
    saved: Any, tmp_path: Path, form: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(saved[0], run)
    part = next(run.glob("0*")) / "model.safetensors"
    data = bytearray(part.read_bytes())
    data[-10] ^= 1
    part.write_bytes(data)
    message = refused("export", run, tmp_path / "out", "--to", form, code=4)
    assert "model.safetensors extent 0" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_what_is_left_of_a_stopped_export_is_named(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "m.pt.partial").write_bytes(b"half")
    assert "m.pt.partial" in refused("export", saved[0], tmp_path / "m.pt", "--to", "torch")
    assert not (tmp_path / "m.pt").exists()


def test_keras_is_refused_for_a_run_of_torch(saved: Any, tmp_path: Path) -> None:
    assert "torch 2" in refused("export", saved[0], tmp_path / "k.keras", "--to", "keras")


def test_without_torch_or_python_the_error_names_the_interpreter(
    saved: Any, tmp_path: Path
) -> None:
    words = ("export", saved[0], tmp_path / "m.pt", "--to", "torch")
    missing = refused(*words, code=3, STILLFRAME_PYTHON="/nowhere/python")
    assert "/nowhere/python" in missing
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    assert "STILLFRAME_PYTHON" in refused(*words, STILLFRAME_PYTHON=str(bare))


def test_a_dtype_that_readers_lack_travels_as_bytes_and_comes_back(tmp_path: Path) -> None:
    model = nn.Module()
    model.scale = nn.Buffer(torch.arange(7, dtype=torch.uint8).view(torch.float8_e8m0fnu))
    model.weight = nn.Buffer(torch.randn(5))
    with stillframe.Checkpointer(tmp_path / "run", model=model) as saver:
        saver.save(1).wait()
    for form in ("safetensors", "hf", "torch", "dcp"):
        answer = ok("export", tmp_path / "run", tmp_path / form, "--to", form)
        assert any("scale" in note for note in answer["notes"]) == (form in ("safetensors", "hf"))
    loaded = safetensors.torch.load_file(tmp_path / "safetensors")
    assert torch.equal(loaded["scale"], torch.arange(7, dtype=torch.uint8))
    assert torch.equal(loaded["weight"], model.weight)
    part = next((tmp_path / "run").glob("0*")) / "model.safetensors"
    for form in ("safetensors", "hf", "torch", "dcp"):
        made = ok("import", tmp_path / form, tmp_path / f"again-{form}", "--from", form)
        again = Path(made["path"]) / "model.safetensors"
        assert again.read_bytes() == part.read_bytes(), form


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_a_terminal_sees_a_progress_bar_that_goes_away(
    saved: Any, tmp_path: Path, form: str
) -> None:
    ours, theirs = os.openpty()
    words = [command.command_path(), "export", saved[0], tmp_path / "out", "--to", form]
    env = command.environment()
    ended = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "export [" in shown
    assert shown.endswith("\r\x1b[K")
    assert b"every hash checked" in ended.stdout
