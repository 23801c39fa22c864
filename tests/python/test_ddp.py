"""The training of docs/guide/ddp.md in two processes, killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "ddp.md"
LAST = 5


def write_training(directory: Path, *, dies_before: int | None) -> Path:
    """The page's program; with `dies_before`, rank 0 is killed at that step of its first start."""
    (text,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    if dies_before is not None:
        line = "    optimizer.zero_grad()\n"
        assert text.count(line) == 1
        text = text.replace(
            line,
            f"    if is_saver and start == 0 and step == {dies_before}:\n"
            "        checkpointer.save(step - 1).wait()\n"
            f"        import os; os.kill(os.getpid(), {int(signal.SIGKILL)})\n{line}",
        )
    directory.mkdir()
    program = directory / "train.py"
    program.write_text(text)
    return program


def start(program: Path) -> int:
    """Two ranks, until both have ended; torchrun's exit status."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(program)],
        cwd=program.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=100,
        check=False,
    ).returncode  # fmt: skip


def last_saved(program: Path) -> dict[str, torch.Tensor]:
    """Model and optimizer of the last step."""
    (checkpoint,) = (program.parent / "runs" / "ddp").glob(f"0*-step-{LAST}")
    return {
        name: tensor
        for part in ("model", "optimizer")
        for name, tensor in load_file(checkpoint / f"{part}.safetensors").items()
    }


@pytest.mark.timeout(300)
def test_two_ranks_of_which_one_saves_go_on_after_its_death_as_if_nothing_had_been(
    tmp_path: Path,
) -> None:
    straight = write_training(tmp_path / "straight", dies_before=None)
    assert start(straight) == 0
    killed = write_training(tmp_path / "killed", dies_before=3)
    assert start(killed) != 0
    assert start(killed) == 0
    expected, found = last_saved(straight), last_saved(killed)
    assert expected.keys() == found.keys()
    assert any(".exp_avg" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


SHARDED = """
import sys
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
import stillframe.torch as stillframe

dist.init_process_group("gloo")
net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
fully_shard(net, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
with stillframe.Checkpointer(f"runs/{dist.get_rank()}", model=net) as checkpointer:
    try:
        checkpointer.save(0)
    except stillframe.InvalidArgument as error:
        assert "0.weight is spread over 2 ranks" in str(error), error
    else:
        sys.exit("a part of a model was taken for all of it")
dist.destroy_process_group()
"""


def test_a_model_that_is_sharded_over_ranks_is_refused_by_name(tmp_path: Path) -> None:
    program = tmp_path / "sharded.py"
    program.write_text(SHARDED)
    assert start(program) == 0
    assert not list((tmp_path / "runs").glob("*/0*"))
