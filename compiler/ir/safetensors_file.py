"""A safetensors file that is opened once, so that header, digest and tensors come from the same file.

Format: 8 bytes with the length of the header (little-endian), a JSON object of that length, then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moec.compiler.common.digest import CHUNK_BYTES, sha256_of_chunks
from moec.compiler.common.errors import CheckpointError, first_line

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors dtype name -> dtype. A tensor of another dtype is refused only if it is needed."""

MAX_HEADER = 100_000_000
"""Largest header in bytes, as in the safetensors library."""

_DAMAGED = "download the file again"


class WeightFile:
    """An open safetensors file. It reads the file that was opened, even if another one takes its path later.

    Args:
        path: The file.

    Raises:
        CheckpointError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {first_line(error)}", hint=_DAMAGED) from error
        weakref.finalize(self, self._file.close)  # open for as long as a tensor refers to it
        self._lock = threading.Lock()
        self._state = self._now()
        self.size = os.fstat(self._file.fileno()).st_size

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def read(self, offset: int, count: int) -> Tensor:
        """Read `count` bytes from `offset`: uint8 [count].

        Raises:
            CheckpointError: The file is too short, cannot be read, or was written to after it was opened.
        """
        data = torch.empty(count, dtype=torch.uint8)
        view, done = memoryview(data.numpy().data), 0
        try:
            with self._lock:
                self._file.seek(offset)
                while done < count:
                    got = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                    if not got:
                        break
                    done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {first_line(error)}", hint=_DAMAGED) from error
        if done < count:
            raise CheckpointError(f"{self.path}: truncated while it was read", hint=_DAMAGED)
        self.check_unchanged()
        return data

    def check_unchanged(self) -> None:
        """Check that the file was not written to after it was opened.

        Raises:
            CheckpointError: It was written to.
        """
        if self._now() != self._state:
            raise CheckpointError(
                f"{self.path}: changed while moec read it",
                hint="wait until the checkpoint is written, then export it again",
            )

    def sha256(self) -> str:
        """Hex digest of the opened file.

        Raises:
            CheckpointError: The file was written to after it was opened.
        """
        starts = range(0, self.size, CHUNK_BYTES)
        found = sha256_of_chunks(self.read(start, min(CHUNK_BYTES, self.size - start)).numpy().data for start in starts)
        self.check_unchanged()
        return found

    def entries(self) -> list[StoredEntry]:
        """The tensors, from the header alone.

        Raises:
            CheckpointError: The file is not a safetensors file, or it is damaged.
        """
        prefix = self.read(0, min(8, self.size)).numpy().tobytes()
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > self.size - 8:
            raise self._damaged("not a safetensors file, or truncated in its header")
        if length > MAX_HEADER:
            raise self._damaged(f"its header claims {length} bytes, and at most {MAX_HEADER} are allowed")
        try:
            table = json.loads(self.read(8, length).numpy().tobytes())
        except (ValueError, RecursionError) as error:
            raise self._damaged("not a safetensors file, or truncated in its header") from error
        if not isinstance(table, dict):
            raise self._damaged("its header is not a JSON object")
        table.pop("__metadata__", None)
        entries = [self._entry(name, values, 8 + length) for name, values in table.items()]
        expected = max((entry.offset + entry.count for entry in entries), default=8 + length)
        if self.size != expected:
            raise self._damaged(f"truncated: it has {self.size} bytes, but its header describes {expected}")
        return entries

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}", hint=_DAMAGED)

    def _entry(self, name: str, values: Any, start: int) -> StoredEntry:
        try:
            shape, kind = tuple(values["shape"]), values["dtype"]
            first, last = values["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"the header's entry of tensor {name} is damaged") from error
        numbers = (*shape, first, last)
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or not isinstance(kind, str):
            raise self._damaged(
                f"the header's entry of tensor {name} is damaged: shape {list(shape)}, bytes {first}:{last}"
            )
        dtype = DTYPES.get(kind)
        if last < first or (dtype is not None and last - first != math.prod(shape) * dtype.itemsize):
            raise self._damaged(f"tensor {name}: shape {list(shape)} in {kind} does not take {last - first} bytes")
        return StoredEntry(self, name, shape, kind, start + first, last - first)


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A tensor in a safetensors file.

    Attributes:
        source: The file.
        name: Name in the file.
        shape: Shape.
        kind: Name of its dtype in safetensors.
        offset: Position of its first byte in the file.
        count: Number of bytes.
    """

    source: WeightFile
    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    count: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype.

        Raises:
            CheckpointError: moec cannot read it.
        """
        if self.kind not in DTYPES:
            raise self.unreadable()
        return DTYPES[self.kind]

    def unreadable(self) -> CheckpointError:
        """The error for a needed tensor whose dtype moec does not accept for weights."""
        return CheckpointError(
            f"{self.source.path}: tensor {self.name} has dtype {self.kind}, which moec does not read as a weight",
            hint="save the checkpoint as float32, float16 or bfloat16",
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the slice [start, stop) along axis 0, or the whole tensor if it is a scalar.

        Raises:
            CheckpointError: The file is damaged, has changed, or has a dtype that cannot be read.
        """
        dtype = self.dtype
        if not self.shape:
            return self.source.read(self.offset, self.count).view(dtype).reshape(())
        length = self.shape[0]
        start, stop = min(start, length), min(max(start, stop), length)
        row = self.count // length if length else 0
        data = self.source.read(self.offset + start * row, (stop - start) * row)
        return data.view(dtype).reshape(stop - start, *self.shape[1:])
