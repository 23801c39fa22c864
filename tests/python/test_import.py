"""`stillframe import`: what others have written becomes a checkpoint, or is refused by name."""

from __future__ import annotations

import enum
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import stillframe.torch as stillframe
import training
from command import ok, refused, refused_plan, run
from saved_run import exported, saved

__all__ = ["exported", "saved"]

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def parts_of(checkpoint: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(checkpoint).glob("*.safetensors")}


@pytest.mark.parametrize("form", ["torch", "dcp"])
def test_a_round_trip_gives_back_every_part_bit_by_bit_and_all_the_state(
    saved: Any, exported: Path, tmp_path: Path, form: str
) -> None:
    source, _ = saved
    made = ok("import", exported / form, tmp_path / "again", "--from", form)
    original = next(source.glob("0*"))
    assert parts_of(made["path"]) == parts_of(original)
    assert (made["step"], made["metrics"]) == (4, {"loss": 0.5})
    states = [json.loads((Path(p) / "state.json").read_text()) for p in (original, made["path"])]
    # Other formats do not say whether an object was given by name, nor how the model is made.
    assert states[0].pop("named") == []
    assert "structure" in states[0].pop("recipe")
    assert states[0] == states[1]
    assert run("verify", tmp_path / "again").code == 0


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_a_round_trip_gives_back_the_model_bit_by_bit(
    saved: Any, tmp_path: Path, form: str
) -> None:
    source, _ = saved
    shards = ["--max-shard-size", "1kB"] if form == "hf" else []
    ok("export", source, tmp_path / "out", "--to", form, *shards)
    made = ok("import", tmp_path / "out", tmp_path / "again", "--from", form, "--step", "7")
    original = (next(source.glob("0*")) / "model.safetensors").read_bytes()
    assert parts_of(made["path"]) == {"model.safetensors": original}
    assert made["step"] == 7
    assert run("verify", tmp_path / "again").code == 0


def test_an_imported_run_resumes_and_goes_on_as_the_one_it_came_from(
    saved: Any, exported: Path, tmp_path: Path
) -> None:
    source, _ = saved
    ok("import", exported / "torch", tmp_path / "again", "--from", "torch")
    digests = []
    for path in (shutil.copytree(source, tmp_path / "copy"), tmp_path / "again"):
        other = training.make(seed=9)
        with other.checkpointer(path) as checkpointer:
            restored = checkpointer.resume()
            assert restored is not None
            assert restored.step == 4
            other.step()
            checkpointer.save(5).wait()
        digests.append(other.digest())
    assert digests[0] == digests[1]


def test_an_import_is_the_newest_of_its_run_and_takes_part_in_best(
    saved: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(saved[0], tmp_path / "run")
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    words = ("--from", "safetensors", "--step", "9", "--metric", "loss=0.25", "--metric", "acc=1")
    made = ok("import", tmp_path / "w.safetensors", copy, *words)
    assert made["sequence"] == 2
    listed = ok("ls", copy)["checkpoints"]
    assert [one["sequence"] for one in listed] == [1, 2]
    assert listed[1]["newest"]
    assert listed[1]["metrics"] == {"loss": 0.25, "acc": 1.0}
    manifest = json.loads((Path(made["path"]) / "manifest.json").read_text())
    assert manifest["previous_sequence"] == 1


def test_a_plain_state_dict_and_the_keys_of_the_tutorials_are_understood(tmp_path: Path) -> None:
    made = training.make()
    made.step()
    named = torch.optim.Adam(made.model.named_parameters())
    made.model(torch.randn(4, 12)).sum().backward()
    named.step()
    torch.save(made.model.state_dict(), tmp_path / "bare.pt")
    torch.save(
        {
            "epoch": 3,
            "model_state_dict": made.model.state_dict(),
            "optimizer_state_dict": named.state_dict(),
        },
        tmp_path / "tutorial.pt",
    )
    bare = ok("import", tmp_path / "bare.pt", tmp_path / "a", "--from", "torch")
    tutorial = ok("import", tmp_path / "tutorial.pt", tmp_path / "b", "--from", "torch")
    assert tutorial["notes"] == ["left out: epoch"]
    assert (
        parts_of(bare["path"])["model.safetensors"]
        == (parts_of(tutorial["path"])["model.safetensors"])
    )
    other = training.make(seed=3)
    optimizer = torch.optim.Adam(other.model.parameters())
    with stillframe.Checkpointer(tmp_path / "b", model=other.model, optimizer=optimizer) as saver:
        assert saver.resume(only=["model", "optimizer"]) is not None
    moments = optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moments, named.state_dict()["state"][0]["exp_avg"])


def test_an_optimizer_that_counts_its_parameters_is_refused_or_left_out(tmp_path: Path) -> None:
    made = training.make()
    made.step()
    torch.save(
        {"model": made.model.state_dict(), "optimizer": made.optimizer.state_dict()},
        tmp_path / "m.pt",
    )
    assert "named_parameters" in refused_plan("torch", tmp_path / "m.pt")
    ok("import", tmp_path / "m.pt", tmp_path / "run", "--from", "torch", "--only", "model")


def test_views_of_any_strides_arrive_in_the_order_of_their_elements(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "turned": whole.t(),
        "row": whole[2],
        "column": whole[:, 1],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "half": torch.randn(5).to(torch.bfloat16),
    }
    torch.save(tensors, tmp_path / "m.pt")
    dcp.save({"model": tensors}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for form, name in (("torch", "m.pt"), ("dcp", "dcp")):
        made = ok("import", tmp_path / name, tmp_path / f"run-{form}", "--from", form)
        found = safetensors.torch.load_file(Path(made["path"]) / "model.safetensors")
        assert found.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor), (form, key)


def test_tied_tensors_of_a_file_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    torch.save({"a": weight, "b": weight, "c": weight.clone()}, tmp_path / "m.pt")
    made = ok("import", tmp_path / "m.pt", tmp_path / "run", "--from", "torch")
    with safetensors.safe_open(Path(made["path"]) / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["a", "c"]
        assert file.metadata() == {"format": "pt", "b": "a"}


def test_shards_of_several_ranks_become_whole_tensors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import filesystem, metadata

    wanted = torch.randn(5, 4)
    directory = tmp_path / "dcp"
    directory.mkdir()
    boxes = [((0, 0), (2, 4)), ((2, 0), (3, 1)), ((2, 1), (3, 3))]
    storage, chunks = {}, []
    for rank, (offsets, sizes) in enumerate(boxes):
        name = f"__{rank}_0.distcp"
        rows = slice(offsets[0], offsets[0] + sizes[0])
        columns = slice(offsets[1], offsets[1] + sizes[1])
        torch.save(wanted[rows, columns].clone(), directory / name)
        size = (directory / name).stat().st_size
        index = metadata.MetadataIndex("model.w", torch.Size(offsets))
        storage[index] = filesystem._StorageInfo(name, 0, size)
        chunks.append(metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    entry = metadata.TensorStorageMetadata(
        metadata.TensorProperties(torch.float32), torch.Size([5, 4]), chunks
    )

    def describe(entry: Any) -> None:
        described = metadata.Metadata(
            {"model.w": entry}, {"model.w": ("model", "w")}, storage, metadata.StorageMeta()
        )
        (directory / ".metadata").write_bytes(pickle.dumps(described))

    describe(entry)
    made = ok("import", directory, tmp_path / "run", "--from", "dcp")
    found = safetensors.torch.load_file(Path(made["path"]) / "model.safetensors")
    assert torch.equal(found["w"], wanted)

    entry.chunks = chunks[:1] + chunks[2:]  # Stock readers leave the old bytes there, silently.
    describe(entry)
    assert "tile" in refused_plan("dcp", directory, code=4)
    (directory / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in refused_plan("dcp", directory, code=3)


class _Python311Pickler(pickle.Pickler):
    """Pickles enumerations as Python 3.11.0 to 3.11.3 does, Debian 12's among them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, enum.Enum):
            return (getattr, (type(obj), obj.name))
        return NotImplemented


def test_a_dcp_checkpoint_of_an_early_python_3_11_is_imported(tmp_path: Path) -> None:
    dcp.save({"model": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    described = pickle.loads((tmp_path / "dcp" / ".metadata").read_bytes())
    with (tmp_path / "dcp" / ".metadata").open("wb") as file:
        _Python311Pickler(file).dump(described)
    assert b"getattr" in (tmp_path / "dcp" / ".metadata").read_bytes()
    made = ok("import", tmp_path / "dcp", tmp_path / "run", "--from", "dcp")
    found = safetensors.torch.load_file(Path(made["path"]) / "model.safetensors")
    assert torch.equal(found["w"], torch.ones(3))


class _Attribute:
    """Pickled as an attribute of what is no enumeration."""

    def __reduce__(self) -> Any:
        return (getattr, (torch.distributed.checkpoint.metadata.Metadata, "__init__"))


class _Evil:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


def test_a_pickle_in_a_foreign_file_is_never_run(tmp_path: Path) -> None:
    evil = _Evil(tmp_path / "was-here")
    torch.save({"model": {"w": torch.ones(2)}, "extra": evil}, tmp_path / "m.pt")
    message = refused("import", tmp_path / "m.pt", tmp_path / "run", "--from", "torch")
    assert "weights_only=False is not offered" in message
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(evil))
    assert "is not offered" in refused_plan("dcp", tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(_Attribute()))
    assert "builtins.getattr" in refused_plan("dcp", tmp_path / "dcp")
    dcp.save({"model": {"w": evil}}, checkpoint_id=tmp_path / "item", no_dist=True)
    assert "is not offered" in refused_plan("dcp", tmp_path / "item")
    assert not (tmp_path / "was-here").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")
def test_dtypes_that_a_part_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    quantised = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    bad = {
        "wide": torch.ones(2, dtype=torch.complex128),
        "few": torch.eye(3).to_sparse(),
        "good": torch.ones(1),
        "coarse": quantised,
    }
    torch.save(bad, tmp_path / "m.pt")
    message = refused_plan("torch", tmp_path / "m.pt")
    assert "wide (torch.complex128" in message
    assert "coarse (quantised" in message
    assert "few (" in message
    assert "good" not in message
    torch.save({"model": {"a\nb": torch.ones(1)}}, tmp_path / "n.pt")
    assert "control" in refused("import", tmp_path / "n.pt", tmp_path / "run", "--from", "torch")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", ["safetensors", "hf", "torch", "dcp"])
def test_truncated_and_corrupt_files_are_refused_before_the_run_is_touched(
    exported: Path, tmp_path: Path, form: str
) -> None:
    target = tmp_path / "out"
    copy = shutil.copytree if (exported / form).is_dir() else shutil.copy
    copy(exported / form, target)
    victim = {"hf": target / "model.safetensors", "dcp": target / "__0_0.distcp"}.get(form, target)
    whole = victim.read_bytes()

    def message() -> str:
        if form in ("torch", "dcp"):
            return refused_plan(form, target, code=4)
        return refused("import", target, tmp_path / "run", "--from", form, code=4)

    for size in (0, 5, len(whole) // 2, len(whole) - 1):
        victim.write_bytes(whole[:size])
        assert victim.name in message(), size
    damaged = bytearray(whole)
    # Of a header where there is one; files of torch have checksums of their data.
    damaged[20 if form in ("safetensors", "hf") else len(whole) // 2] ^= 0x80
    victim.write_bytes(damaged)
    assert victim.name in message()
    assert not (tmp_path / "run").exists()


def test_an_index_without_one_of_its_shards_is_refused(saved: Any, tmp_path: Path) -> None:
    ok("export", saved[0], tmp_path / "hf", "--to", "hf", "--max-shard-size", "1kB")
    shard = sorted((tmp_path / "hf").glob("model-00002-of-*.safetensors"))[0]
    index_path = tmp_path / "hf" / "model.safetensors.index.json"
    moved = shutil.move(shard, tmp_path / "elsewhere")
    message = refused("import", tmp_path / "hf", tmp_path / "run", "--from", "hf", code=3)
    assert shard.name in message
    shutil.move(moved, shard)
    index = json.loads(index_path.read_text())
    index["weight_map"]["0.bias"] = shard.name
    index_path.write_text(json.dumps(index))
    assert "0.bias" in refused("import", tmp_path / "hf", tmp_path / "run", "--from", "hf", code=4)
    index["weight_map"]["0.bias"] = "../../etc/passwd"
    index_path.write_text(json.dumps(index))
    refused("import", tmp_path / "hf", tmp_path / "run", "--from", "hf", code=4)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_being_trained_is_not_written_by_an_import(tmp_path: Path) -> None:
    made = training.make()
    safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    words = ("import", tmp_path / "w.safetensors", tmp_path / "run", "--from", "safetensors")
    with made.checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1).wait()
        assert "training has closed" in refused(*words)
    assert ok(*words)["sequence"] == 2


def test_wrong_words_are_usage_errors(tmp_path: Path) -> None:
    words = ("import", tmp_path / "a", tmp_path / "run", "--from")
    refused(*words, "zip", code=2)
    refused(*words, "torch", "--metric", "loss", code=2)
    refused(*words, "torch", "--step", "-1", code=2)
    refused(*words, "safetensors", code=3)
    refused(*words, "hf", code=3)
    for form in ("torch", "dcp"):
        refused_plan(form, tmp_path / "a", code=3)
    refused(*words, "keras", code=3)


def test_the_optimizer_of_a_stock_dcp_save_is_imported_by_name(tmp_path: Path) -> None:
    made = training.make()
    made.step()
    optimizer = get_optimizer_state_dict(made.model, made.optimizer)
    state = {"model": made.model.state_dict(), "optimizer": optimizer}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ok("import", tmp_path / "dcp", tmp_path / "run", "--from", "dcp")
    other = training.make(seed=5)
    saver = stillframe.Checkpointer(tmp_path / "run", model=other.model, optimizer=other.optimizer)
    with saver:
        assert saver.resume(only=["model", "optimizer"]) is not None
    for number, values in made.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(other.optimizer.state_dict()["state"][number][key], value)
