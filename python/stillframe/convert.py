"""Converts checkpoints to and from formats of PyTorch and Keras.

`stillframe export` and `stillframe import` run it:

    python -m stillframe.convert export --to torch --run=RUN --sequence=12 --target=FILE
    python -m stillframe.convert plan --from dcp --source=DIRECTORY

`export` writes the file or directory, synced, under the name that it is given, which is a
temporary one; the command renames it. `plan` checks a foreign file and says where its tensors
lie; the command commits the checkpoint from there. Both print one JSON document and need at most
256 MiB of anonymous memory, whatever the model: tensors stay in mapped files. Exit codes are those
of the command.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from stillframe.errors import DataLoss, NotFound, StillframeError

if TYPE_CHECKING:
    from torch import Tensor

    from stillframe._convert.files import Plan
    from stillframe._convert.state import Imported

_SCRATCH_FD = 3
_DRAW_SECONDS = 0.1
_BAR_CELLS = 24


def main(arguments: list[str]) -> int:
    """Run one conversion.

    Args:
        arguments: of the command line, without the program.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 not found, 4 damage found.
    """
    parser = argparse.ArgumentParser(prog="stillframe.convert")
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write a checkpoint for PyTorch or Keras")
    export.add_argument("--to", choices=["torch", "dcp", "keras"], required=True)
    export.add_argument("--run", required=True)
    export.add_argument("--sequence", type=int, required=True)
    export.add_argument("--target", required=True)
    export.add_argument("--only", choices=["model"])
    plan = commands.add_parser("plan", help="say where the tensors of a foreign file lie")
    plan.add_argument("--from", dest="format", choices=["torch", "dcp", "keras"], required=True)
    plan.add_argument("--source", required=True)
    plan.add_argument("--only", choices=["model"])
    given = parser.parse_args(arguments)
    # Standard error is the user's: one line when it fails, and nothing of what torch deprecates.
    warnings.simplefilter("ignore")
    wants_keras = "keras" in (getattr(given, "to", None), getattr(given, "format", None))
    export_it, plan_it = (_export_keras, _plan_keras) if wants_keras else (_export, _plan)
    try:
        answer = export_it(given) if given.command == "export" else plan_it(given)
    except ModuleNotFoundError as error:
        needed = ("keras", "h5py", "tensorflow") if wants_keras else ("torch",)
        if error.name is None or error.name.partition(".")[0] not in (*needed, "numpy"):
            raise
        library = "Keras" if wants_keras else "PyTorch"
        return _complain(
            f"this format needs {library}, and {sys.executable} has no module {error.name}; "
            "install it there, or set STILLFRAME_PYTHON to an interpreter that has it",
            1,
        )
    except NotFound as error:
        return _complain(str(error), 3)
    except DataLoss as error:
        return _complain(str(error), 4)
    except (StillframeError, OSError) as error:
        return _complain(str(error), 1)
    json.dump(answer, sys.stdout)
    return 0


def _export(given: argparse.Namespace) -> dict[str, Any]:
    from stillframe._convert.source import ExportSource

    # As all files of Stillframe: for their owner.
    os.umask(0o077)
    only = frozenset({"model"}) if given.only else None
    with ExportSource(given.run, given.sequence, only=only) as source:
        # PyTorch with it, while the source is being checked.
        from stillframe._convert.state import collect

        root, notes = collect(
            source, has_integer_keys=given.to == "torch", only_model=given.only is not None
        )
        bar = _Bar("export", source.bytes)
        source.progress = bar.add
        if given.to == "torch":
            from stillframe._convert import torch_files

            files = torch_files.write(source, root, given.target)
        else:
            from stillframe._convert import dcp

            files = dcp.write(source, root, given.target)
        bar.end()
        source.finish()
        return {"bytes": bar.done_bytes, "files": files, "notes": notes}


def _hush_tensorflow() -> None:
    """Before it is imported: what it says of itself is not ours to tell."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # On processors with matrix units it speaks of oneDNN whatever that level is. Nothing is
    # computed here.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _export_keras(given: argparse.Namespace) -> dict[str, Any]:
    _hush_tensorflow()
    from stillframe._convert import keras_files
    from stillframe._core.session import list_run

    os.umask(0o077)
    sizes = {one["sequence"]: one["bytes"] for one in list_run(given.run)}
    bar = _Bar("export", sizes.get(given.sequence, 0))
    files, notes = keras_files.write(
        given.run,
        given.sequence,
        given.target,
        only_model=given.only is not None,
        progress=bar.add,
    )
    bar.end()
    return {"bytes": bar.done_bytes, "files": files, "notes": notes}


def _plan_keras(given: argparse.Namespace) -> dict[str, Any]:
    _hush_tensorflow()
    from stillframe._convert import keras_files

    return keras_files.plan(given.source, only_model=given.only is not None)


def _plan(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    with torch.no_grad():
        return _plan_without_grad(given)


def _plan_without_grad(given: argparse.Namespace) -> dict[str, Any]:
    from stillframe._convert.files import Plan
    from stillframe._convert.state import interpret

    only_model = given.only is not None
    plan = Plan(_SCRATCH_FD)
    if given.format == "torch":
        from stillframe._convert import torch_files

        root = torch_files.read(given.source)
        mapped = torch_files.MappedFile(given.source, plan)
        imported = _interpret(given.source, root, only_model, mapped.identity, interpret)
        return _answer(plan, imported, mapped.segments)

    from stillframe._convert import dcp

    root, chunks, notes = dcp.read(given.source)
    imported = _interpret(given.source, root, only_model, id, interpret)
    imported.notes += notes
    return _answer(plan, imported, lambda tensor: chunks[id(tensor)].segments(plan))


def _interpret(source: str, root: Any, only_model: bool, identity: Any, interpret: Any) -> Imported:
    try:
        found: Imported = interpret(root, only_model=only_model, identity=identity)
    except StillframeError as error:
        raise type(error)(f"{source}: {error}") from error
    return found


def _answer(plan: Plan, imported: Imported, segments: Any) -> dict[str, Any]:
    import torch

    from stillframe._convert.files import tensor_entry

    def entry(name: str, tensor: Tensor) -> dict[str, Any]:
        return tensor_entry(name, tensor, segments(tensor))

    return {
        "parts": [
            {
                "name": part,
                "metadata": {"format": "pt", **(imported.aliases if part == "model" else {})},
                "tensors": [entry(name, tensor) for name, tensor in tensors.items()],
            }
            for part, tensors in imported.parts.items()
        ],
        "files": plan.files,
        "state": imported.state,
        "step": imported.step,
        "metrics": [[name, repr(value)] for name, value in imported.metrics.items()],
        "framework": f"torch {torch.__version__}",
        "python_version": platform.python_version(),
        "notes": imported.notes,
    }


class _Bar:
    """One line on standard error that says how far it is; only on a terminal."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self.done_bytes = 0
        self._what = what
        self._total_bytes = max(1, total_bytes)
        self._begin = time.monotonic()
        self._drawn = 0.0
        self._is_shown = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """So many bytes more are done."""
        self.done_bytes += count
        now = time.monotonic()
        if not self._is_shown or now - self._drawn < _DRAW_SECONDS:
            return
        self._drawn = now
        done = min(self.done_bytes, self._total_bytes)
        rate = done / max(now - self._begin, 1e-6)
        cells = "#" * (_BAR_CELLS * done // self._total_bytes)
        sys.stderr.write(
            f"\r{self._what} [{cells:<{_BAR_CELLS}}] {done / 2**20:.0f} of "
            f"{self._total_bytes / 2**20:.0f} MiB, {rate / 1e9:.2f} GB/s, "
            f"{(self._total_bytes - done) / max(rate, 1):.0f} s left\x1b[K"
        )
        sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._is_shown and self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _complain(text: str, code: int) -> int:
    line = "".join(char if char.isprintable() else "?" for char in text)
    sys.stderr.write(f"stillframe: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
