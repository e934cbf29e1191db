"""The error of the estimated decode latency relative to the measurement of the latency gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moec.compiler.ir.program import Program
from moec.compiler.measure.estimate.counting import count, formats
from moec.compiler.measure.estimate.speeds import known_speeds
from moec.compiler.measure.latency.timings import CANDIDATE

DECODE = "decode"


def estimate_error(
    program: Program, target: str, dtype: str, kept_share: float, workloads: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Decode workload -> `estimated` and `measured` seconds and the relative `error`; empty without a calibration.

    Args:
        program: The final Program.
        target: Name of its target.
        dtype: Precision of what is not quantized.
        kept_share: Share of the pretrained top-k that decode executes.
        workloads: Figures of the latency gate: workload -> artifact -> clock -> quantiles.
    """
    known = known_speeds(target, dtype, formats(program))
    if known is None:
        return {}
    counts, found = count(program, kept_share), {}
    for name, by_artifact in workloads.items():
        if name.startswith(DECODE):
            measured = float(by_artifact[CANDIDATE]["wall"]["p50"]["value"])
            estimated = known.decode(counts, int(name.removeprefix(DECODE)))
            found[name] = {"estimated": estimated, "measured": measured, "error": estimated / measured - 1}
    return found
