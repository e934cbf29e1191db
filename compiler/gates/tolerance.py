"""Tolerances of the parity and coverage gates by precision: one table, each row with its reason.

An error is max |difference| over a position's logits, divided by max |logit| of the reference over the whole case: the
rounding error of a matrix product scales with its largest terms and not with its result, so a logit near 0 has an error
as large as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import Activations, IntegerFormat
from moec.quantize.lazy import Coded

if TYPE_CHECKING:
    from moec.compiler.ir.program import Program


class Precision(StrEnum):
    """The coarsest arithmetic in an artifact."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"
    INT8_DYNAMIC = "int8-dynamic"
    """Quantized weights, and activations that kernels round to int8."""
    INT8_CACHE = "int8-cache"
    """Weights and activations in float32, and keys and values that are kept in int8."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits of one precision.

    Attributes:
        limit: Largest allowed difference relative to the largest logit.
        tie_margin: A router decision is a tie when the two scores that it separates differ by less than this,
            relative to the score (see `moec.compiler.gates.ties`).
        identical_tokens: Whether greedy generation must give the same tokens.
        reason: Justification of the numbers, for the report.
        divergence: Largest allowed mean KL(reference || artifact) of a case, in nats per token; None: not judged.
        agreement: Smallest allowed share of all positions with the same most likely token; None: not judged.
    """

    limit: float
    tie_margin: float
    identical_tokens: bool
    reason: str
    divergence: float | None = None
    agreement: float | None = None


TOLERANCES: Mapping[Precision, Tolerance] = {
    Precision.FP32: Tolerance(
        1e-4,
        1e-4,
        True,
        "correct fp32 implementations differ by 2e-7 to 1e-5 because of the order of summation; "
        "a wrong mask, norm or expert causes 1e-3 or more",
    ),
    Precision.FP16: Tolerance(
        1e-2,
        1e-2,
        False,
        "fp16 rounds each value to 5e-4 and the errors of the layers add up; correct kernels stay below 6e-3",
    ),
    Precision.INT8: Tolerance(
        3e-2,
        5e-2,
        False,
        "the reference has the dequantized weights, so only the rounding of activations to int8 is left: "
        "1.1e-2 to 1.5e-2 for one experts kernel, 2.0e-2 for the worst of 600 positions of a trained model",
    ),
    Precision.INT4: Tolerance(
        3e-2,
        5e-2,
        False,
        "as for int8: the reference has the dequantized weights, and int4 kernels round activations to int8, 1.1e-2",
    ),
    Precision.INT8_DYNAMIC: Tolerance(
        5e-2,
        5e-2,
        False,
        "where float rounding moves an activation across the border of two codes, all that follows differs by about as "
        "much as rounding itself: in 28 artifacts of 14 models by 3e-2 at the worst position (1.1e-2 in a trained "
        "model where no router decision is a tie), with a mean KL of 4e-4 and the same token at 98 % of the positions; "
        "a wrong mask, scale or expert exceeds a limit tenfold, or the gates of coverage and integrity find it, which "
        "compare single experts and codes",
        divergence=5e-3,
        agreement=0.9,
    ),
    Precision.INT8_CACHE: Tolerance(
        3e-3,
        3e-3,
        False,
        "the reference rounds keys and values as kernels do, so only those are left that float rounding moves across "
        "the border of two codes: by less than 2e-3 in 19 of 20 tiny models, with a mean KL of 2e-5 and the same token "
        "at 99.8 % of the positions or more; codes that are cut off in place of rounded are off by 1e-2, new tokens "
        "that are read as floats by 4e-2",
        divergence=1e-4,
        agreement=0.98,
    ),
}

EXPERT_LIMITS: Mapping[Precision, float] = {
    Precision.FP32: 1e-4,
    Precision.FP16: 1e-2,
    Precision.INT8: 5e-2,
    Precision.INT4: 5e-2,
    Precision.INT8_DYNAMIC: 5e-2,
}
"""Largest difference of the outputs of one expert that is run alone, relative to its largest output, by
`weight_precision`: experts read no cache.

The limits for floating point are those of logits, for the same reasons. int8 and int4 kernels round the activations of
both products to int8, with a scale from the largest value of a row or block: outliers in a hidden state increase the
error, and it is not averaged with other experts as in the logits. A wrong expert, or wrong scales, are off by more than
half.
"""

ROUNDED_EXPERT_LIMIT = 1e-2
"""The limit for int8 and int4 kernels if the reference rounds activations as they do.

A difference then arises only if float32 rounding moves an activation across the border between two codes: one step,
which is 1/255 of the range of its row. Otherwise LiteRT's kernels differ by less than 1e-6.
"""


def expert_limit(precision: Precision, *, rounding_known: bool) -> float:
    """Largest allowed relative difference of one expert's outputs.

    Args:
        precision: Precision of the artifact.
        rounding_known: Whether the reference rounds activations as the kernels do (`Target.activation_rounding`).
    """
    limit = EXPERT_LIMITS[precision]
    return min(limit, ROUNDED_EXPERT_LIMIT) if rounding_known else limit


TOKEN_TIE = 1e-5
"""Two logits that differ by less than this share of the largest logit may be ordered either way by fp32 rounding."""


def precision_of(program: Program) -> Precision:
    """The coarsest precision in `program`: `weight_precision`, or that of its KV cache if all else is float32.

    Half precision has a larger limit of its own, and what it moves across a border is explained by noise.

    Raises:
        UsageError: As for `weight_precision`.
    """
    found = weight_precision(program)
    coded = any(not state.input.dtype.is_floating_point for state in program.caches)
    return Precision.INT8_CACHE if coded and found is Precision.FP32 else found


def weight_precision(program: Program) -> Precision:
    """The precision of the quantized weights of `program` if it has any, else its activation dtype.

    If kernels may round the activations of a product with any weight, that is the coarsest.

    Raises:
        UsageError: There is no tolerance for its activation dtype.
    """
    tensors = (program.weights[name] for name in program.weight_names())
    forms = [tensor.format for tensor in tensors if isinstance(tensor, Coded)]
    if any(isinstance(form, IntegerFormat) and form.activations is Activations.INT8_DYNAMIC for form in forms):
        return Precision.INT8_DYNAMIC
    if bits := [form.bits for form in forms]:
        return Precision.INT4 if min(bits) <= 4 else Precision.INT8
    by_dtype = {torch.float32: Precision.FP32, torch.float16: Precision.FP16}
    if program.dtype not in by_dtype:
        raise UsageError(f"no parity tolerance is defined for activations in {program.dtype}", hint="use fp32 or fp16")
    return by_dtype[program.dtype]
