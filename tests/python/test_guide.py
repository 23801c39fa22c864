"""Runs every block of code of docs/guide, page by page, in the order in which it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_PAGES = sorted((Path(__file__).resolve().parents[2] / "docs" / "guide").glob("*.md"))
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_RUN_COMMANDS = (
    "import subprocess; subprocess.run(['bash', '-euo', 'pipefail', '-c', {text!r}], check=True)\n"
)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_works_as_it_stands(page: Path, tmp_path: Path) -> None:
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    assert {kind for kind, _ in blocks} <= {"python", "sh"}
    if page.stem == "README":
        assert not blocks
        return
    assert blocks
    program = tmp_path / "page.py"
    program.write_text(
        "\n".join(text if kind == "python" else _RUN_COMMANDS.format(text=text)
                  for kind, text in blocks),
        encoding="utf-8",
    )  # fmt: skip
    place = tmp_path / "place"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=place,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
