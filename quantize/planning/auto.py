"""`--quantize auto`: the formats with the least loss within a size, or with the least size within a loss."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.common.errors import UsageError
from moec.compiler.ir.program import Program
from moec.quantize.plan import QuantizationPlan
from moec.quantize.planning.allocation import Allocation, Candidate, least_bytes, least_loss, trade_off
from moec.quantize.planning.sensitivity import NEAREST, AvailableFormats, Part, Rounding, candidates, plan_of, size_of

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
DIGITS = 4
"""Significant digits in the record: few enough not to depend on the order of summation."""
POINTS = 17


@dataclass(frozen=True)
class Choice:
    """The decision of `auto`.

    Attributes:
        plan: The formats.
        allocation: Bytes and predicted losses of the parts.
        facts: The decision, its sensitivities and the trade-off curve, JSON-able.
    """

    plan: QuantizationPlan
    allocation: Allocation
    facts: Mapping[str, Any]


def choose(
    program: Program,
    windows: np.ndarray,
    offered: AvailableFormats,
    *,
    max_size: str | int | None,
    max_increase: float | None,
    rounding: Rounding = NEAREST,
    progress: Progress = lambda *_: None,
) -> Choice:
    """Measure the sensitivity of the parts of a model on text, and allocate formats exactly.

    Args:
        program: Float Program with activations in fp32.
        windows: Calibration tokens [n, length].
        offered: Formats to choose from.
        max_size: Maximum size of all weights; see `parse_size`.
        max_increase: Maximum predicted relative increase of perplexity: 0.01 is 1 %.
        rounding: How the tensors will be rounded.
        progress: Called with the progress.

    Raises:
        UsageError: No choice of formats meets the limit; the hint says what is possible.
    """
    names = dict.fromkeys(map(program.weights.resolve, program.weight_names()))
    halves = 2 * sum(math.prod(program.weights[name].shape) for name in names)
    limit = None if max_size is None else parse_size(max_size, halves)
    found = candidates(program, windows, offered, rounding, progress)
    quantized = {name for part in found for name in part.names}
    rest = size_of(program, [name for name in names if name not in quantized], None)
    by_name = {part.name: formats for part, formats in found.items()}
    if limit is not None:
        _check_size(by_name, limit, rest)
        allocation = least_loss(by_name, max_bytes=limit - rest)
    else:
        assert max_increase is not None
        allocation = least_bytes(by_name, max_loss=math.log1p(max_increase))
    chosen = dict(allocation.choices)
    plan = plan_of({part: chosen[part.name].format for part in found})
    facts = {
        "limit": {"bytes": limit} if limit is not None else {"perplexity_increase": max_increase},
        "chosen": _point(allocation, rest, halves),
        "parts": {part.name: _part(part, formats, chosen[part.name]) for part, formats in found.items()},
        "trade_off": [_point(point, rest, halves) for point in trade_off(by_name, points=POINTS)],
    }
    return Choice(plan, allocation, facts)


def parse_size(text: str | int, halves: int) -> int:
    """Parse a size in bytes: `300MB`, `1.5GiB`, `0.3x` (times `halves`, the size in fp16) or a plain number.

    Raises:
        UsageError: The text has another form.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", str(text).strip().lower())
    if match and match[2] == "x":
        return int(float(match[1]) * halves)
    if not match or match[2] not in UNITS:
        raise UsageError(f"size {text!r} cannot be read", hint="write 300MB, 1.5GB, or 0.3x of the size in fp16")
    return int(float(match[1]) * UNITS[match[2]])


def _check_size(offered: Mapping[str, list[Candidate]], limit: int, rest: int) -> None:
    least = rest + sum(min(candidate.bytes for candidate in found) for found in offered.values())
    if least > limit:
        raise UsageError(
            f"the weights cannot fit into {limit} bytes (max_size)",
            hint=f"the smallest available formats take {least} bytes, {rest} of them for weights that stay float",
        )


def _point(allocation: Allocation, rest: int, halves: int) -> dict[str, float | int]:
    size = allocation.bytes + rest
    return {
        "bytes": size,
        "share_of_fp16": round_significant(size / halves),
        "predicted_increase": round_significant(math.expm1(allocation.loss)),
    }


def _part(part: Part, found: list[Candidate], chosen: Candidate) -> dict[str, Any]:
    return {
        "tensors": list(part.names),
        "format": str(chosen.format),
        "loss": {str(candidate.format): round_significant(candidate.loss) for candidate in found},
    }


def round_significant(value: float) -> float:
    """`value` with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")
