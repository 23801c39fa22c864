"""Seconds and bytes as people read them."""

from __future__ import annotations


def told_seconds(seconds: float | None) -> str:
    """Two or three digits that matter: 0.8ms, 38ms, 1.2s, 12min; `-` for what is not known."""
    if seconds is None:
        return "-"
    if seconds < 0.01:
        return f"{1e3 * seconds:.1f}ms"
    if seconds < 1:
        return f"{1e3 * seconds:.0f}ms"
    if seconds < 100:
        return f"{seconds:.1f}s"
    return f"{seconds / 60:.0f}min"


def told_bytes(count: float) -> str:
    """In the largest binary unit that leaves at least 1: 512MiB, 1.5GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            break
        count /= 1024
        unit = larger
    return f"{count:.0f}{unit}" if unit == "B" or count >= 10 else f"{count:.1f}{unit}"
