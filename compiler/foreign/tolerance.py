"""How far the logits of a foreign file may be from the checkpoint's.

A file of floats is judged by the tolerances of moec's own artifacts. Where those compare an artifact of codes with the
values of these codes, a foreign file is compared with the checkpoint itself, so the rounding of its weights is part of
the difference. The limits of that are measured: the checkpoint is rounded to nearest as coarsely as the file
(`precision.rounded_like`) and goes through the same cases.
"""

from __future__ import annotations

from collections.abc import Sequence

from moec.compiler.gates.parity import Evidence
from moec.compiler.gates.tolerance import TOLERANCES, Precision, Tolerance
from moec.targets.model_files import StoredTensor

TIMES = 3.0
"""How many times the difference of rounding to nearest a quantizer may cause. Quantizers with searched scales cause
less, those that round activations too, or give fewer bits to some layers, up to twice as much."""

SMALLEST = 2e-3
"""Divergence in nats that is always allowed: rounding activations to int8 causes as much."""

TELLING = 0.3
"""Divergence in nats of rounding alone from which on a limit of a few times as much says little. Random models are as
sensitive as that; trained ones lose 0.01 to 0.1."""

BF16 = Tolerance(
    3e-2,
    5e-2,
    False,
    "bf16 rounds each value to 4e-3, eight times as coarse as fp16, and the errors of the layers add up",
)

CODES = Tolerance(
    0.5,
    5e-2,
    False,
    "the reference has the values of the file's codes, and it is not known how kernels round activations. Where this "
    "changes an expert, a position of a random model differs by 0.1 to 0.2, so the mean divergence is judged: 2e-4 to "
    "1e-2 in right files, 1 where two experts are exchanged. Coverage and integrity judge single experts",
    divergence=2e-2,
    agreement=0.85,
)

CODES_OF_EXPERT = 0.1
"""Largest limit for the median difference of the positions that use an expert, relative to the largest logit, in a file
of codes: 0.01 to 0.02 in right files, 0.10 and 0.15 for experts whose first projection is lost."""

UNLIMITED = Tolerance(1e30, 5e-2, False, "measured, not judged", divergence=1e30, agreement=0.0)
"""For the rounded checkpoint, from which the limits come."""


def float_precision(tensors: Sequence[StoredTensor], computed: str) -> tuple[Precision, Tolerance]:
    """Precision and tolerance of a file without codes.

    Args:
        tensors: Its tensors.
        computed: Precision of its activations, "fp32" or "fp16".
    """
    held = {tensor.precision for tensor in tensors if len(tensor.shape) > 1}
    if any(name.lower() == "bf16" for name in held):
        return Precision.FP16, BF16
    half = computed == "fp16" or any(name.lower() in {"fp16", "f16"} for name in held)
    precision = Precision.FP16 if half else Precision.FP32
    return precision, TOLERANCES[precision]


def quantized_tolerance(rounded: Evidence) -> Tolerance:
    """The tolerance of a file of codes; `rounded` is what rounding to nearest alone causes in the same cases."""
    worst = max((result.error for result in rounded.results), default=0.0)
    nats = max((result.divergence for result in rounded.results), default=0.0)
    positions = sum(result.positions for result in rounded.results) or 1
    agreed = sum(result.agreed for result in rounded.results) / positions
    return Tolerance(
        TIMES * max(worst, 1e-2),
        5e-2,
        False,
        f"{TIMES:g} times what rounding the checkpoint's weights to nearest as coarsely costs in the same cases: "
        f"{worst:.1e} of the largest logit, {nats:.1e} nats, another best token at {1 - agreed:.1%} of the positions",
        divergence=TIMES * max(nats, SMALLEST),
        agreement=max(0.0, 1 - TIMES * max(1 - agreed, 0.02)),
    )
