"""Forks, the end of the interpreter, garbage collection."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import stillframe.torch as stillframe
import training

HERE = Path(__file__).parent


def in_fork(function: object) -> int:
    """Run it in a forked child; return the child's exit status, 0 if it did not raise."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()  # type: ignore[operator]
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    run = training.make()
    with run.checkpointer(tmp_path / "run", capture="lazy", check="full") as checkpointer:
        run.step()
        ticket = checkpointer.save(0)

        def child() -> None:
            for call in (lambda: checkpointer.save(1), checkpointer.fence, checkpointer.resume):
                with pytest.raises(stillframe.InvalidArgument, match="fork"):
                    call()
            with pytest.raises(stillframe.InvalidArgument, match="fork"):
                checkpointer.close()
            run.step()  # The hook is there, and does nothing.

        assert in_fork(child) == 0
        ticket.wait(timeout=30)
        run.step()
        checkpointer.save(1).wait(timeout=30)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_loader_workers_of_a_saving_process_work(tmp_path: Path) -> None:
    run = training.make()
    dataset = torch.utils.data.TensorDataset(torch.randn(32, 12))
    with run.checkpointer(tmp_path / "run", capture="lazy") as checkpointer:
        for step in range(2):
            for _ in torch.utils.data.DataLoader(dataset, batch_size=16, num_workers=1):
                run.step()
                checkpointer.save(step)


LEAVES_WITHOUT_CLOSE = """
import sys, training, torch, threading
run = training.make(width=2048)
run.step()
checkpointer = run.checkpointer(sys.argv[1], capture="lazy")
checkpointer.save(0)
{ending}
"""


@pytest.mark.parametrize(
    "ending",
    ["", "raise SystemExit(0)", "run.optimizer.extra = checkpointer", "del checkpointer"],
    ids=["end", "exit", "cycle", "del"],
)
def test_leaving_without_close_finishes_the_capture(tmp_path: Path, ending: str) -> None:
    script = LEAVES_WITHOUT_CLOSE.format(ending=ending)
    left = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (left.returncode, left.stderr) == (0, "")
    run = training.make(width=2048)
    with run.checkpointer(tmp_path / "run") as checkpointer:
        restored = checkpointer.resume()
    assert restored is not None
    assert restored.step == 0


def test_an_unused_checkpointer_goes_and_keeps_nothing_alive(tmp_path: Path) -> None:
    run = training.make()
    checkpointer = run.checkpointer(tmp_path / "run", capture="lazy")
    run.step()
    checkpointer.save(0)
    alive = [weakref.ref(run.model), weakref.ref(run.optimizer), weakref.ref(checkpointer)]
    del run, checkpointer
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]
    deadline = time.monotonic() + 10
    while any(thread.name == "stillframe" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_close_twice_is_harmless_and_later_calls_say_so(tmp_path: Path) -> None:
    run = training.make()
    checkpointer = run.checkpointer(tmp_path / "run")
    ticket = checkpointer.save(0)
    checkpointer.close()
    checkpointer.close()
    assert ticket.state == "durable"
    assert ticket.times["to_durable"] > 0
    for call in (lambda: checkpointer.save(1), checkpointer.resume, checkpointer.fence):
        with pytest.raises(stillframe.Cancelled):
            call()
    run.step()


def test_the_trainings_own_error_comes_through_the_context_manager(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with stillframe.Checkpointer(tmp_path / "run", model=nn.Linear(1, 1)) as checkpointer:
            checkpointer.save(0)
            raise ZeroDivisionError


def test_a_script_without_a_main_guard_works(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, stillframe.torch as stillframe\n"
        "c = stillframe.Checkpointer(sys.argv[1], model=torch.nn.Linear(1, 1))\n"
        "print(c.resume())\n"
        "c.save(0)\n"
        "c.close()\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "None\n"
