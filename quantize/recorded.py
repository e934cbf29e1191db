"""Codes from calibration, read back from an artifact, and compared with the checkpoint.

Calibration takes minutes to hours and chooses codes other than the nearest ones, so only the digest that it recorded
can show that codes are right. Comparing them with the checkpoint shows whether they are a rounding of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.common.digest import sha256_of_chunks
from moec.quantize.formats import IntegerFormat
from moec.quantize.lazy import GivenCodes
from moec.quantize.methods.scales import CHUNK, NO_CLIPPING, choose_scales
from moec.quantize.methods.tensors import QuantizedTensor, grouped

MATRIX_LIMIT, ROW_LIMIT = 1.0, 2.0
"""Maximum distance of a matrix, and of each of its rows, from the checkpoint: root mean square, in steps.

A step is the scale that covers the range of a block without clipping. The distance of rounding to nearest is 0.3.
GPTQ on the golden model (int8 and int4, with and without zero points, 6 to 24 windows of text) is at most 0.63 steps
per matrix and 1.14 per row. The root mean square of the weights is at least 2.3 steps in 4 bits (54 in 8 bits), so
the distance of another matrix is about 3.3.
"""

Codes = Callable[[int, int, IntegerFormat], QuantizedTensor]
"""Start and stop along axis 0, and the format -> codes of the slice."""


@dataclass(frozen=True)
class Finding:
    """Result of checking a weight that was read back.

    Attributes:
        recorded: Whether its codes have the digest that the export recorded.
        near: Whether its distance from the checkpoint is within `MATRIX_LIMIT` and `ROW_LIMIT`.
        error: Largest distance of a matrix from the checkpoint, in steps.
    """

    recorded: bool
    near: bool
    error: float


@dataclass(frozen=True)
class RecordedCodes:
    """Codes of a tensor in an artifact, and the digest that the export recorded; see `sha256_of`."""

    rows: Codes
    sha256: str


@dataclass(frozen=True)
class RecordedCalibration:
    """What calibration chose for an artifact, read back from it.

    Attributes:
        codes: Weight name -> its codes; empty if no weight was rounded by calibration.
        cache_scales: Input name of a state -> scales of its channels, [heads, width] float32; empty if the KV cache
            holds floats.
    """

    codes: Mapping[str, RecordedCodes] = field(default_factory=dict)
    cache_scales: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded(GivenCodes):
    """`source` with the codes of an artifact."""

    recorded: RecordedCodes | None = None

    def examine(self) -> Finding:
        """Compare the codes with the recorded digest and with the checkpoint.

        Memory holds the codes of one matrix, and the floats of one expert or of some rows of another matrix.

        Raises:
            ArtifactError: The artifact does not hold codes of the plan's format.
        """
        assert self.recorded is not None
        errors: list[tuple[float, float]] = []

        def matrices() -> Iterator[QuantizedTensor]:
            for index, codes in enumerate(self._matrices()):
                errors.append(self._error(index, codes))
                yield codes

        same = sha256_of(matrices()) == self.recorded.sha256
        near = all(matrix <= MATRIX_LIMIT and row <= ROW_LIMIT for matrix, row in errors)
        return Finding(same, near, max(matrix for matrix, _ in errors))

    def _matrices(self) -> Iterator[QuantizedTensor]:
        if len(self.shape) == 2:
            yield self._quantize(0, self.shape[0])
            return
        for index in range(self.shape[0]):
            yield self._quantize(index, index + 1)[0]

    def _error(self, index: int, codes: QuantizedTensor) -> tuple[float, float]:
        """Distance of a matrix from its source, and that of its worst row, in steps."""
        rows, columns = codes.shape
        squares = torch.empty(rows, dtype=torch.float64)
        step = max(1, CHUNK // columns)
        whole = self.source.rows(index, index + 1)[0] if len(self.shape) == 3 else None
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            source = self.source.rows(part.start, part.stop) if whole is None else whole[part]
            squares[part] = _squares(source, _rows(codes, part))
        return math.sqrt(float(squares.mean())), math.sqrt(float(squares.max()))

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        assert self.recorded is not None
        return self.recorded.rows(start, stop, self.format)


def _rows(codes: QuantizedTensor, part: slice) -> QuantizedTensor:
    zero_points = None if codes.zero_points is None else codes.zero_points[part]
    return QuantizedTensor(codes.format, codes.codes[part], codes.scales[part], zero_points)


def _squares(source: Tensor, codes: QuantizedTensor) -> Tensor:
    """Mean squared distance of each row, in squared steps, [N]."""
    groups = grouped(source.to(torch.float32), codes.block)
    steps = choose_scales(groups, codes.format, NO_CLIPPING)[0].unsqueeze(-1)
    distance = (grouped(codes.dequantize(), codes.block) - groups) / steps
    return distance.square_().mean((-2, -1))


def sha256_of(matrices: Iterable[QuantizedTensor]) -> str:
    """SHA-256 of codes, scales and zero points of the matrices of a tensor, in order.

    Scales are hashed in half precision, since targets may store them in half or single precision.
    """
    parts = (part for m in matrices for part in (m.codes, m.scales.to(torch.float16), m.zero_points))
    return sha256_of_chunks(
        part.contiguous().view(-1).view(torch.uint8).numpy().data for part in parts if part is not None
    )


def matrices_of(tensor: QuantizedTensor) -> list[QuantizedTensor]:
    """The matrices of a stack, or the matrix itself."""
    return [tensor] if tensor.codes.ndim == 2 else [tensor[index] for index in range(len(tensor.codes))]
