"""save() and load(): one file for tensors and plain values."""

from __future__ import annotations

import gc
import math
import os
import random
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import stillframe.torch as stillframe
from whole_model import quantised


def same(one: Any, other: Any) -> bool:
    """Equal, of equal types, all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.requires_grad == other.requires_grad
            and torch.equal(one.detach(), other.detach())
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def everything() -> dict[Any, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {
        "model": model.state_dict(),
        "epoch": 3,
        "nested": [1, 2.5, None, (True, "x"), {"deep": [torch.arange(3)]}],
        "complex": torch.randn(3, dtype=torch.complex128),
        "half": torch.randn(2, 2).bfloat16(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.0),
        "strided": torch.randn(4, 6).t()[::2],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "bool": torch.tensor([True, False]),
        3: b"bytes",
        ("a", 1): {"set", "of", "text"},
        "$odd": {"__metadata__": torch.ones(1), "": torch.ones(1), "\x00": torch.ones(1)},
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "inf": math.inf,
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_everything_comes_back_equal_and_of_the_same_type(tmp_path: Path, mmap: bool) -> None:
    saved = everything()
    stillframe.save(saved, tmp_path / "all.pt")
    assert same(saved, stillframe.load(tmp_path / "all.pt", mmap=mmap))
    stillframe.verify(tmp_path / "all.pt")


@pytest.mark.parametrize("saved", [[], {}, None, 3, "text", (), torch.ones(3), OrderedDict()])
def test_the_object_may_be_anything_plain(tmp_path: Path, saved: Any) -> None:
    stillframe.save(saved, tmp_path / "x")
    assert same(saved, stillframe.load(tmp_path / "x"))


def test_safetensors_opens_the_file_and_a_state_dict_keeps_its_names(tmp_path: Path) -> None:
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    stillframe.save(state, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)
    with safe_open(tmp_path / "state.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).load_state_dict(
        stillframe.load(tmp_path / "state.safetensors")
    )


def test_names_lead_to_the_tensors(tmp_path: Path) -> None:
    stillframe.save(
        {"model": {"a.b": torch.ones(1)}, "list": [torch.ones(1)], "model.a.b": torch.zeros(1)},
        tmp_path / "x",
    )
    assert load_file(tmp_path / "x").keys() == {"model.a.b", "list.0", "model.a.b#2"}


def test_tensors_that_are_the_same_memory_are_stored_once_and_stay_so(tmp_path: Path) -> None:
    weight = torch.randn(1000, 1000)
    stillframe.save({"a": weight, "b": weight, "c": weight.view(1000, 1000)}, tmp_path / "x")
    assert os.path.getsize(tmp_path / "x") < 5_000_000
    loaded = stillframe.load(tmp_path / "x")
    loaded["a"][0, 0] = 7
    assert loaded["b"][0, 0] == 7
    assert loaded["c"][0, 0] == 7


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    stillframe.save({"a": torch.randn(700_000), "epoch": 3}, path)
    whole = path.read_bytes()
    seed = random.randrange(2**32)
    generator = random.Random(seed)
    header = whole.index(b"}}") + 2
    places = [
        *range(0, header, 3),
        *(generator.randrange(len(whole)) for _ in range(100)),
        header + 1,
        4095,
        len(whole) - 1,
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(stillframe.DataLoss):
            stillframe.load(path)
            pytest.fail(f"a flipped bit in byte {place} was not found; seed {seed}")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 4095, 4096, 5000, 1_000_000])
def test_a_truncated_file_is_found(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "x"
    stillframe.save({"a": torch.randn(700_000)}, path)
    os.truncate(path, kept)
    with pytest.raises(stillframe.DataLoss):
        stillframe.load(path)
    with pytest.raises(stillframe.DataLoss):
        stillframe.load(path, mmap=True)


def test_a_mapped_file_is_not_checked_until_verify(tmp_path: Path) -> None:
    path = tmp_path / "x"
    stillframe.save({"a": torch.zeros(2_000_000)}, path)
    with path.open("r+b") as file:
        file.seek(5_000_001)
        file.write(b"\x01")
    assert stillframe.load(path, mmap=True)["a"].sum() != 0
    with pytest.raises(stillframe.DataLoss, match="extent 4"):
        stillframe.verify(path)
    with pytest.raises(stillframe.DataLoss, match="extent 4"):
        stillframe.load(path)


def test_what_is_written_to_a_mapped_tensor_stays_in_the_process(tmp_path: Path) -> None:
    stillframe.save({"a": torch.zeros(100)}, tmp_path / "x")
    stillframe.load(tmp_path / "x", mmap=True)["a"].fill_(1)
    assert stillframe.load(tmp_path / "x")["a"].sum() == 0


def test_a_mapped_tensor_outlives_the_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    stillframe.save(torch.zeros(1_000_000), path)
    mapped = stillframe.load(path, mmap=True)
    stillframe.save(torch.ones(1_000_000), path)
    gc.collect()
    assert mapped.sum() == 0
    assert stillframe.load(path).sum() == 1_000_000


def test_files_of_other_writers_load_as_a_dict(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "w": torch.randn(5), "e": torch.empty(0)}
    save_file(tensors, tmp_path / "x", metadata={"who": "else"})
    for mmap in (False, True):
        loaded = stillframe.load(tmp_path / "x", mmap=mmap)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with pytest.raises(stillframe.InvalidArgument, match="no hashes"):
        stillframe.verify(tmp_path / "x")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"a": [torch.empty(3, device="meta")]}, r"a\[0\] is on the meta device"),
        (quantised(), "quantised.*dequantize"),
        ({"s": torch.eye(3).to_sparse()}, "s is a sparse tensor.*to_dense"),
        ({"x": {"y": object()}}, r"x\.y is a builtins\.object"),
        ({"c": torch.ones(2, dtype=torch.complex64).conj()}, "resolve_conj"),
    ],
)
def test_what_has_no_form_is_refused_by_its_place(tmp_path: Path, value: Any, said: str) -> None:
    stillframe.save(1, tmp_path / "x")
    with pytest.raises(stillframe.InvalidArgument, match=said):
        stillframe.save(value, tmp_path / "x")
    assert stillframe.load(tmp_path / "x") == 1


def test_wrong_paths_are_told_apart(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pickle.pt")
    (tmp_path / "text").write_text("this is no safetensors file at all")
    with pytest.raises(stillframe.InvalidArgument, match=r"torch\.save\(\)"):
        stillframe.load(tmp_path / "pickle.pt")
    with pytest.raises(stillframe.InvalidArgument, match="directory"):
        stillframe.load(tmp_path)
    with pytest.raises(stillframe.NotFound):
        stillframe.load(tmp_path / "none")
    with pytest.raises(stillframe.DataLoss):
        stillframe.load(tmp_path / "text")
    with pytest.raises(stillframe.NotFound):
        stillframe.save(1, tmp_path / "none" / "x")
    with pytest.raises(stillframe.InvalidArgument, match="no regular file"):
        stillframe.save(1, tmp_path)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "x")
    stillframe.save(5, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stillframe.load(tmp_path / "there" / "x") == 5


_SAVE_FOR_EVER = """
import sys, torch
import stillframe.torch as stillframe
for number in range(1_000_000):
    stillframe.save({"number": number, "a": torch.full((400_000,), float(number))}, sys.argv[1])
    print(number, flush=True)
"""


def test_a_killed_save_leaves_the_old_file_or_the_new_one_and_is_swept_up(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for delay_lines in (1, 3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOR_EVER, path], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(delay_lines):
            acknowledged = int(writer.stdout.readline())
        writer.kill()
        writer.wait()
        rest = [acknowledged, *map(int, writer.stdout.read().split())]
        writer.stdout.close()
        loaded = stillframe.load(path)
        assert loaded["number"] in (rest[-1], rest[-1] + 1)
        assert torch.equal(loaded["a"], torch.full((400_000,), float(loaded["number"])))
    (tmp_path / ".stillframe-tmp-0123456789abcdef").write_bytes(b"left by a kill")
    stillframe.save(1, path)
    # The kernel closes what a killed process had under io_uring a while after its end.
    deadline = time.monotonic() + 20
    while os.listdir(tmp_path) != ["x"] and time.monotonic() < deadline:
        time.sleep(0.1)
        stillframe.save(1, path)
    assert os.listdir(tmp_path) == ["x"]


def test_many_tensors_make_a_header_of_many_extents(tmp_path: Path) -> None:
    tensors = {
        f"layer.{i}.a rather long name of a tensor": torch.tensor([i]) for i in range(20_000)
    }
    stillframe.save(tensors, tmp_path / "x")
    loaded = stillframe.load(tmp_path / "x")
    assert all(loaded[name].item() == i for i, name in enumerate(tensors))
