"""Reading tensors into their places: all at once, or piece by piece under a bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from stillframe._core.progress import byte_bar
from stillframe._core.saved import Place, SavedCheckpoint

# Between two movements of the bar. Extents at the seams are read twice: 1 MiB of each piece.
_PIECE_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class ReadStats:
    """What was read, and whether all of it was in the daemon's memory."""

    bytes: int = 0
    is_from_memory: bool | None = None

    def __add__(self, other: ReadStats) -> ReadStats:
        if other.is_from_memory is None or self.is_from_memory is None:
            from_memory = self.is_from_memory or other.is_from_memory
        else:
            from_memory = self.is_from_memory and other.is_from_memory
        return ReadStats(self.bytes + other.bytes, from_memory)


def read_places(saved: SavedCheckpoint, places: Sequence[Place], what: str) -> ReadStats:
    """Fill the places, each extent checked against its hash; shows a bar where one is due.

    Raises:
        DataLoss: an extent is damaged; the places may hold unverified bytes.
    """
    stats = ReadStats()
    if not places:
        return stats
    with byte_bar(what, sum(place.saved.bytes for place in places)) as bar:
        for piece in [places] if bar is None else _pieces(saved, places):
            read = saved.read(piece)
            stats += ReadStats(int(read.bytes), bool(read.from_memory))
            if bar is not None:
                bar(sum(place.saved.bytes for place in piece))
    return stats


def _pieces(saved: SavedCheckpoint, places: Sequence[Place]) -> Iterator[list[Place]]:
    """Runs of places that lie side by side in their file."""
    order = {
        (index, spec.name): position
        for index, part in enumerate(saved.parts)
        for position, spec in enumerate(part.tensors)
    }
    piece: list[Place] = []
    size = 0
    for place in sorted(
        places,
        key=lambda one: (one.saved.part_index, order[one.saved.part_index, one.saved.spec.name]),
    ):
        piece.append(place)
        size += place.saved.bytes
        if size >= _PIECE_BYTES:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
