"""Zip files of other libraries: checked whole, and their members read where they lie."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import IO, Any

from stillframe.errors import DataLoss


class FileSlice:
    """Some of a file as a file of its own, for readers that seek."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file = file
        self._begin = offset
        self._size = size
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes; all that is left when negative."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._begin + self._position)
        data = self._file.read(wanted)
        self._position += len(data)
        return data

    def readinto(self, target: Any) -> int:
        """Read into a buffer; returns the bytes."""
        data = self.read(len(target))
        target[: len(data)] = data
        return len(data)

    def readline(self, size: int = -1) -> bytes:
        """Needed by the check for what a file-like object is."""
        raise NotImplementedError

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; returns the position."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def seekable(self) -> bool:
        """Yes."""
        return True


def check_zip(name: str, file: Any) -> dict[str, int]:
    """Where each member's bytes begin, after all of them were compared with their CRC-32.

    Raises:
        DataLoss: it is no zip, is truncated, or a member is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            begins = {}
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise DataLoss(f"{name}: the member {info.filename} is compressed")
                begins[info.filename] = _check_member(name, archive, file, info)
            return begins
    except zipfile.BadZipFile as error:
        raise DataLoss(f"{name} is no zip file, or truncated: {error}") from error


def _check_member(name: str, archive: zipfile.ZipFile, file: Any, info: zipfile.ZipInfo) -> int:
    stream = archive.fp if isinstance(file, (str, os.PathLike)) else file
    assert stream is not None
    stream.seek(info.header_offset + 26)
    lengths = stream.read(4)
    begin = (
        info.header_offset
        + 30
        + int.from_bytes(lengths[:2], "little")
        + int.from_bytes(lengths[2:], "little")
    )
    stream.seek(begin)
    left = info.file_size
    checksum = 0
    while left > 0:
        data = stream.read(min(left, 2**20))
        if not data:
            raise DataLoss(f"{name}: ends in the member {info.filename}")
        checksum = zlib.crc32(data, checksum)
        left -= len(data)
    if checksum != info.CRC:
        raise DataLoss(f"{name}: the member {info.filename} fails its CRC-32")
    return begin
