"""The command `stillframe`, run as a person or a script runs it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import stillframe
from stillframe import convert
from stillframe._core import library


@dataclasses.dataclass
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What --json printed."""
        return json.loads(self.out)


def command_path() -> Path:
    """Beside the library in a build, in bin/ in an installed package."""
    path = library.location()
    beside = path.with_name("stillframe")
    return beside if beside.is_file() else path.parent.parent / "bin" / "stillframe"


def environment(**variables: str) -> dict[str, str]:
    """Ours, with this interpreter and this package for what needs Python."""
    return {
        **os.environ,
        "STILLFRAME_PYTHON": sys.executable,
        "STILLFRAME_LIBRARY": str(library.location()),
        "PYTHONPATH": str(Path(stillframe.__file__).parent.parent),
        **variables,
    }


def run(*words: str | os.PathLike[str], **variables: str) -> Outcome:
    """Run it to its end."""
    ended = subprocess.run(
        [command_path(), *map(os.fspath, words)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def ok(*words: str | os.PathLike[str]) -> Any:
    """Run it with --json; it must succeed, and say nothing else: no bar without a terminal."""
    outcome = run(*words, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    return outcome.json


def refused(*words: str | os.PathLike[str], code: int = 1, **variables: str) -> str:
    """Run it; it must end with this code and one line of error, which is returned."""
    outcome = run(*words, **variables)
    assert outcome.code == code, (outcome.code, outcome.out, outcome.err)
    assert outcome.err.startswith("stillframe: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err


def refused_plan(form: str, source: str | os.PathLike[str], code: int = 1) -> str:
    """As `refused("import", ...)` for torch or dcp, without the start of another Python."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        ended = convert.main(["plan", "--from", form, f"--source={os.fspath(source)}"])
    assert ended == code, (ended, said.getvalue())
    assert said.getvalue().startswith("stillframe: ")
    assert said.getvalue().count("\n") == 1
    return said.getvalue()
