"""Our reader of safetensors files beside the library's, on files that something has changed."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import stillframe.torch as stillframe

FILE_COUNT = 500
PIECES = (
    *(b"0", b"1", b"-1", b"1.0", b"1e3", b"18446744073709551616", b"null", b'"', b"\\", b"{", b"}"),
    *(b"[", b"]", b",", b":", b" ", b"\n", b"\x00", b"\xff", b"\\u0000", b"\\ud800"),
    *(b'"F32"', b'"BF16"', b'"F8_E4M3"', b'"U128"', b'"shape":[0],', b'"data_offsets":[0,0],'),
    *(b'"__metadata__":{"a":"b"},', b'"__metadata__":{"a":1},', b'"x":{},'),
)


def base_files(directory: Path) -> list[bytes]:
    """Files as the library writes them."""
    torch.manual_seed(0)
    states: list[dict[str, torch.Tensor]] = [
        {"a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.zeros(0, 7)},
        {
            "half": torch.randn(8).half(),
            "bool": torch.tensor([True, False]),
            "zero_d": torch.ones(()),
        },
        {"bf16": torch.randn(2, 2, dtype=torch.bfloat16), "u8": torch.arange(9, dtype=torch.uint8)},
    ]
    files = []
    for number, state in enumerate(states):
        path = directory / f"base{number}"
        save_file(state, path, metadata={"format": "pt"} if number % 2 == 0 else None)
        files.append(path.read_bytes())
    return files


def changed(file: bytes, random_: random.Random) -> bytes:
    """One to three changes; most of the time the length before the header still fits."""
    (length,) = struct.unpack("<Q", file[:8])
    header, data = bytearray(file[8 : 8 + length]), file[8 + length :]
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(len(header) + 1)
        match random_.randrange(5):
            case 0:
                header[at:at] = random_.choice(PIECES)
            case 1:
                del header[at : at + random_.randint(1, 6)]
            case 2 if at < len(header):
                header[at] ^= 1 << random_.randrange(8)
            case 3:
                digits = [i for i, byte in enumerate(header) if 48 <= byte <= 57]
                if digits:
                    header[random_.choice(digits)] = random_.randint(48, 57)
            case _:
                data = data[: random_.randrange(len(data) + 1)] if random_.random() < 0.3 else data
    if random_.random() < 0.1:
        length = random_.choice((0, 1, len(header) - 1, len(header) + 1, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + bytes(header) + data
    return struct.pack("<Q", len(header)) + bytes(header) + data


def test_what_we_accept_the_library_accepts_with_the_same_tensors(tmp_path: Path) -> None:
    """Where we are stricter, we say why; never the other way round."""
    seed = int(os.environ.get("STILLFRAME_SEED", random.randrange(2**32)))
    print(f"STILLFRAME_SEED={seed}")
    random_ = random.Random(seed)
    bases = base_files(tmp_path)
    path = tmp_path / "changed.safetensors"
    both = neither = stricter = 0
    for number in range(FILE_COUNT):
        content = changed(random_.choice(bases), random_)
        path.write_bytes(content)
        try:
            theirs = load_file(path)
        except (SafetensorError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            theirs, their_error = None, repr(error)
        try:
            ours = stillframe.load(path)
        except stillframe.StillframeError:
            if theirs is None:
                neither += 1
            else:
                stricter += 1
            continue
        assert theirs is not None, f"file {number}: we accept what they refuse: {their_error}"
        assert sorted(ours) == sorted(theirs), f"file {number}"
        for name, tensor in theirs.items():
            mine = ours[name]
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), f"{number}: {name}"
            raw = mine.contiguous().view(torch.uint8) if mine.numel() and mine.dim() else mine
            their_raw = (
                tensor.contiguous().view(torch.uint8) if tensor.numel() and tensor.dim() else tensor
            )
            assert torch.equal(raw, their_raw), f"file {number}: {name}"
        both += 1
    print(json.dumps({"both": both, "neither": neither, "stricter": stricter}))
    assert both > FILE_COUNT // 100
    assert neither > FILE_COUNT // 100
