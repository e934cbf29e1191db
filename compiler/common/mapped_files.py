"""Files that this process has mapped: what of them stays in memory, is read ahead, or is given back. Linux only.

Imports nothing heavy.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

MAPS = Path("/proc/self/maps")
PAGE = 4096
READ_AHEAD = 128 << 10
"""Bytes that are asked for at a time. The kernel reads no more for one call than the device reads ahead, and this is
what most devices do at least."""
_ON_FAULT = 1
"""`MLOCK_ONFAULT`: lock pages when they are read. Plain `mlock` writes to a private mapping, which makes copies."""


class Advice(IntEnum):
    """Advice for `madvise` (2)."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    DONTNEED = 4


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapped range of a file.

    Attributes:
        address: Where it begins in memory.
        offset: Where it begins in the file.
        length: Its number of bytes.
    """

    address: int
    offset: int
    length: int


class MappedFile:
    """A file that is mapped into this process, as a whole or in parts.

    Args:
        path: The file.

    Raises:
        OSError: The file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)
        self.mappings = tuple(_mappings(path.resolve()))
        self._library = ctypes.CDLL(None, use_errno=True)
        self._library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def address(self, offset: int, length: int) -> int | None:
        """The address of a range of the file; None if it is not mapped as a whole."""
        for one in self.mappings:
            if one.offset <= offset and offset + length <= one.offset + one.length:
                return one.address + offset - one.offset
        return None

    def advise(self, offset: int, length: int, advice: Advice) -> None:
        """Give advice on the pages of a range; a range that is not mapped is left alone."""
        if (address := self.address(offset, length)) is not None:
            start = address // PAGE * PAGE
            self._library.madvise(start, address + length - start, advice)

    def read_ahead(self, offset: int, length: int) -> None:
        """Begin to read a range into memory, in large pieces, and do not wait for it."""
        stop = offset + length
        while offset < stop:
            self.advise(offset, min(READ_AHEAD, stop - offset), Advice.WILLNEED)
            offset += READ_AHEAD

    def give_back(self, offset: int, length: int, *, cache: bool) -> None:
        """Take the pages that lie in a range as a whole out of this process.

        Args:
            offset: Where the range begins in the file.
            length: Its number of bytes.
            cache: Whether to take them out of the page cache, too; else the kernel keeps them as long as it has room.
        """
        start, stop = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
        for one in self.mappings:  # the range may lie in several
            first, last = max(start, one.offset), min(stop, one.offset + one.length)
            if first < last:
                self.advise(first, last - first, Advice.DONTNEED)
        if cache and start < stop:
            os.posix_fadvise(self._file, start, stop - start, os.POSIX_FADV_DONTNEED)

    def lock(self, offset: int, length: int) -> str:
        """Keep a range in memory and read it now.

        Returns:
            Why it could not be locked; it has been read nevertheless. Empty if it is locked.
        """
        address = self.address(offset, length)
        if address is None:
            return ""
        start = address // PAGE * PAGE
        span, reason = address + length - start, ""
        if not hasattr(self._library, "mlock2"):
            reason = "the C library has no mlock2"
        elif self._library.mlock2(ctypes.c_void_p(start), ctypes.c_size_t(span), _ON_FAULT):
            reason = os.strerror(ctypes.get_errno() or errno.ENOMEM)
        self.read_ahead(offset, length)
        for page in range(start, start + span, PAGE):
            ctypes.c_ubyte.from_address(page).value  # noqa: B018 - reading it is what matters
        return reason


def _mappings(path: Path) -> Iterator[Mapping]:
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == str(path):
            start, stop = (int(item, 16) for item in fields[0].split("-"))
            yield Mapping(start, int(fields[2], 16), stop - start)
