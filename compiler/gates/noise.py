"""How much rounding moves the logits of a model: its Program, run again with errors of that size in its products.

A limit for all models cannot tell a fault from rounding in a model that enlarges rounding: an exchanged expert where
two scores of a router are nearly equal, a recurrent state that grows, a norm of small values. The Program itself can:
uniform noise of the size of the runtime's rounding, relative to the largest value of each row, is added to the outputs
of its linears, experts and embeddings, and the largest change of the logits is what rounding may do at a position.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moec.compiler.gates.reference import Batch, Oracle
from moec.compiler.gates.tolerance import Precision
from moec.compiler.ir.program import Program

SIZES: Mapping[torch.dtype, float] = {torch.float32: 2e-6, torch.float16: 5e-4}
"""Dtype of the activations -> size of the noise.

float16 rounds by up to 2^-11 = 4.9e-4. In float32 the order of a sum of a thousand terms changes it by about 2e-6.
"""

SPREAD = 2.5
"""Rounding explains this multiple of the largest change that was seen in the runs with noise, which are few."""

RUNS = (2, 4, 6, 12)
"""Numbers of runs with noise after each of which a case is judged anew: 24 in all."""


@dataclass
class Noise:
    """A `Disturbance` of the interpreter.

    Args:
        size: Largest error, relative to the largest value of a row.
        seed: Seed of the errors.
    """

    size: float
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, value: Tensor) -> Tensor:
        """Add noise to `value` [..., N]."""
        random = torch.rand(value.shape, generator=self._generator) * 2 - 1
        return value + (random * self.size * value.abs().amax(-1, keepdim=True)).to(value.dtype)


def noise_of(program: Program, precision: Precision) -> float:
    """Size of the noise that stands for the rounding of activations, in `program` or an artifact of `precision`."""
    return max(SIZES[program.dtype], SIZES[torch.float16] if precision is Precision.FP16 else 0.0)


def explained(oracle: Oracle, size: float, batch: Batch) -> Iterator[np.ndarray]:
    """What rounding explains at each position, after ever more runs with noise.

    Args:
        oracle: The reference; its Program runs.
        size: Size of the noise, from `noise_of`.
        batch: The sequences.

    Yields:
        Differences [B, T], relative to the largest logit; each is at least as large as the one before.
    """
    seed = zlib.crc32(batch.input_ids.tobytes())
    plain: np.ndarray | None = None
    largest, scale = np.zeros(batch.input_ids.shape), 1.0
    for count in RUNS:
        noises = [Noise(size, seed + index + 1) for index in range(count)]
        seed += count
        runs = oracle.disturbed(noises if plain is not None else [None, *noises], batch)
        if plain is None:
            plain = next(runs)
            scale = max(float(np.abs(plain).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        for changed in runs:
            np.maximum(largest, np.abs(changed - plain).max(-1) / scale, out=largest)
        yield SPREAD * np.nan_to_num(largest, nan=0.0, posinf=0.0)
