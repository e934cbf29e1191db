"""Integrity: the artifact holds the final Program's experts, every one of them, in the format of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.ir.program import EXPERTS, Program
from moec.targets.base import ExpertReader

GATE = "integrity"
EXIT_CODE = 5
EXPERT_ARGUMENTS = (3, 4, 5, 6)  # gate_up_proj, gate_up_bias, down_proj, down_bias of moec::experts
LISTED = 4

ROUNDING = 1e-6
"""Dequantized values may differ by this share of the largest: (code - zero) * scale in float32, in another order."""

OVERHEAD = 1.25
"""Quantized experts may take this much more than the plan says: padding, and scales that a target repeats for blocks.

Weights that stayed in a wider format take twice the bytes or more.
"""


@dataclass(frozen=True)
class Comparison:
    """One expert tensor: its name, how many of its experts differ and the largest difference, relative."""

    name: str
    experts: int
    wrong: tuple[int, ...]
    error: float


def expert_weights(program: Program) -> dict[str, torch.dtype]:
    """Name of every weight of the experts of `program` -> dtype in the graph, in the order of the layers.

    Raises:
        ArtifactError: A weight is computed in the graph, so that no tensor of the artifact stands for it.
    """
    found: dict[str, torch.dtype] = {}
    for node in program.nodes(EXPERTS):
        for position in EXPERT_ARGUMENTS:
            argument = node.args[position]
            if argument is None:
                continue
            if not isinstance(argument, torch.fx.Node) or argument.op != "get_attr":
                raise ArtifactError(
                    f"{node.name}: argument {position} of moec::experts is computed in the graph",
                    hint="constant folding turns it into a weight: run the common passes",
                )
            found[program.weights.resolve(str(argument.target))] = argument.meta["val"].dtype
    return found


def check_integrity(
    program: Program,
    readers: Mapping[str, ExpertReader],
    *,
    tensor_bytes: Mapping[str, int] | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Compare every expert of every tensor, one at a time.

    Args:
        program: The final Program.
        readers: `Target.expert_tensors` of the artifact.
        tensor_bytes: Name of an expert tensor -> the bytes that the artifact spends on it, codes, scales and zero
            points together; a target states it in its facts. Needed where the plan quantizes.
        progress: Told about every tensor.

    Raises:
        ArtifactError: A weight is computed in the graph.
    """
    names = expert_weights(program)
    missing = [name for name in names if name not in readers]
    comparisons = []
    for index, (name, dtype) in enumerate(names.items()):
        progress(GATE, index, len(names))
        if name in readers:
            comparisons.append(_compare(program, name, dtype, readers[name]))
    progress(GATE, len(names), len(names))
    wrong = [item for item in comparisons if item.wrong]
    left_float, unknown = _left_float(program, names, tensor_bytes or {})
    problems = [
        *_listed("missing from the artifact", missing),
        *_listed("different", [f"{item.name} experts {_numbers(item.wrong)}" for item in wrong]),
        *_listed("larger than its format", left_float),
    ]
    total = sum(item.experts for item in comparisons)
    figures = _figures(comparisons, missing, left_float, unknown)
    if problems:
        return Verdict(GATE, Status.FAIL, "; ".join(problems), EXIT_CODE, figures)
    if unknown:
        reason = f"values are right, but the target states no bytes for {len(unknown)} tensors that the plan quantizes"
        return Verdict(GATE, Status.NOT_RUN, reason, EXIT_CODE, figures)
    summary = f"{total} experts in {len(comparisons)} tensors equal the plan's"
    return Verdict(GATE, Status.PASS, summary, EXIT_CODE, figures)


def _compare(program: Program, name: str, dtype: torch.dtype, reader: ExpertReader) -> Comparison:
    tensor = program.weights[name]
    exact = _format(program, name) is None
    wrong, worst = [], 0.0
    for index in range(tensor.shape[0]):
        # Codes times scales is computed in float32, whatever the graph computes in.
        want = tensor.rows(index, index + 1)[0].to(dtype if exact else torch.float32).float().numpy()
        error = _error(np.asarray(reader(index)), want)
        worst = max(worst, error)
        if not error <= (0.0 if exact else ROUNDING):
            wrong.append(index)
    return Comparison(name, tensor.shape[0], tuple(wrong), worst)


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite for another shape or NaN."""
    if got.shape != want.shape:
        return float("inf")
    error = float(np.abs(got.astype(np.float32) - want).max(initial=0.0)) / max(
        float(np.abs(want).max(initial=0.0)), float(np.finfo(np.float32).tiny)
    )
    return error if np.isfinite(error) else float("inf")


def _format(program: Program, name: str) -> Any:
    """The integer format that the plan gives to a weight, or None where it stays float."""
    planned = getattr(program.weights[name], "format", None)
    return planned if getattr(planned, "bits", None) is not None else None


def _left_float(
    program: Program, names: Mapping[str, torch.dtype], tensor_bytes: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """Quantized weights that take more bytes than their format, and those whose bytes the target does not state."""
    larger, unknown = [], []
    for name in names:
        planned = _format(program, name)
        if planned is None:
            continue
        if name not in tensor_bytes:
            unknown.append(name)
        elif tensor_bytes[name] > OVERHEAD * planned.planned_bytes(program.weights[name].shape):
            larger.append(f"{name} ({tensor_bytes[name]} bytes)")
    return larger, unknown


def _figures(
    comparisons: list[Comparison], missing: list[str], left_float: list[str], unknown: list[str]
) -> dict[str, Any]:
    return {
        "tensors": [
            {"name": item.name, "experts": item.experts, "wrong": list(item.wrong), "max_error": item.error}
            for item in comparisons
        ],
        "missing": missing,
        "left_float": left_float,
        "bytes_not_stated": unknown,
    }


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        yield f"{what}: {', '.join(names[:LISTED])}{more}"


def _numbers(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts[:LISTED])) + (", ..." if len(experts) > LISTED else "")
