"""The fatbin of the GPU kernels, as NVIDIA's own tool reads it."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

FATBIN = Path(__file__).parents[2] / "build" / "dev" / "gpu_kernels.fatbin"


def test_the_fatbin_serves_a100_h100_and_b200_and_has_ptx_for_the_others() -> None:
    if not FATBIN.exists():
        pytest.skip("built without nvcc")
    tool = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"
    tool.chmod(0o755)  # The wheel leaves it without.
    listed = subprocess.run(
        [tool, "--list-elf", "--list-ptx", FATBIN], capture_output=True, text=True, check=True
    ).stdout
    found = {word.split(".")[-2] for word in listed.split() if word.endswith((".cubin", ".ptx"))}
    assert found == {"sm_80", "sm_90", "sm_100", "sm_75"}, listed
    assert "sm_75.ptx" in listed
