"""Reader of CoreML's weight files (`weights/weight.bin`).

A file is a 64-byte header followed by entries, each a 64-byte record and its data:
`sentinel u32, element type u32, size in bytes u64, data offset u64`, the rest reserved. A program
refers to an entry by the offset of its record.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.common.errors import ArtifactError
from moec.targets.coreml.executor.dtypes import Array, ElementType, packed_bytes, unpack

if TYPE_CHECKING:
    from pathlib import Path

_SENTINEL = 0xDEADBEEF
_RECORD = struct.Struct("<IIQQ")


class BlobFile:
    """A weight file, mapped into memory on first use.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _bytes(self) -> Array:
        try:
            return np.memmap(self.path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"weight file {self.path} cannot be read: {error}", hint="export the model again"
            ) from error

    def read(self, offset: int, element: ElementType, shape: tuple[int, ...]) -> Array:
        """Read one entry.

        Args:
            offset: Position of the entry's record in the file, in bytes.
            element: Element type that the program declares.
            shape: Shape that the program declares.

        Returns:
            Read-only array of `shape`; a view of the file unless the elements are packed.

        Raises:
            ArtifactError: No such entry, or one of another type or size.
        """
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = packed_bytes(count, element.bits)
        start = self._data_offset(offset, element, nbytes)
        data = self._bytes[start : start + nbytes]
        if element.bits < 8:
            return unpack(data, count, element.bits, signed=element.name.startswith("int")).reshape(shape)
        return np.asarray(data).view(element.numpy).reshape(shape)

    def _data_offset(self, offset: int, element: ElementType, nbytes: int) -> int:
        where = f"weight file {self.path}, entry at byte {offset}"
        record = self._bytes[offset : offset + _RECORD.size].tobytes()
        if len(record) < _RECORD.size:
            raise ArtifactError(f"{where}: the file ends before it", hint="export the model again")
        sentinel, code, size, start = _RECORD.unpack(record)
        if sentinel != _SENTINEL:
            raise ArtifactError(f"{where}: no entry starts there", hint="export the model again")
        if code != element.blob_code:
            raise ArtifactError(
                f"{where}: holds element type {code}, the program declares {element.name}",
                hint="export the model again",
            )
        if size < nbytes or start + nbytes > self._bytes.size:
            raise ArtifactError(
                f"{where}: {nbytes} bytes expected, {min(size, max(self._bytes.size - start, 0))} present",
                hint="export the model again",
            )
        return int(start)
