"""Warnings: whose line they point at."""

from __future__ import annotations

from pathlib import Path

import pytest

import stillframe
from stillframe._core.warn import warn


def test_a_warning_points_at_the_line_of_the_user_wherever_that_lies() -> None:
    package = Path(stillframe.__file__).parent
    for file in ("/home/me/train.py", f"{package}_experiments/train.py", f"{package}.py"):
        inside = compile("def call(warn): warn('odd')", str(package / "_core" / "x.py"), "exec")
        outside = compile("\ncall(warn)", file, "exec")
        names = {"warn": warn}
        exec(inside, names)
        with pytest.warns(stillframe.StillframeWarning, match="odd") as caught:
            exec(outside, names)
        assert [(one.filename, one.lineno) for one in caught] == [(file, 2)]
