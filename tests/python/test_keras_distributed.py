"""Keras on several devices: saved once, restored on all."""

from __future__ import annotations

from pathlib import Path

from script import run_script


def test_a_mirrored_fit_goes_on_to_the_same_bits_on_every_replica(tmp_path: Path) -> None:
    run_script("keras_mirrored.py", tmp_path)
