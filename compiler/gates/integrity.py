"""Integrity: the artifact holds the final Program's experts, every one of them, in the format of the plan.

Weights whose codes were read back from the artifact are held against its record and the checkpoint (`examination`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.examination import examine
from moec.compiler.ir.program import EXPERTS, Program
from moec.targets.stored_weights import StoredWeight

GATE = "integrity"
EXIT_CODE = 5
EXPERT_ARGUMENTS = (3, 4, 5, 6)  # gate_up_proj, gate_up_bias, down_proj, down_bias of moec::experts
LISTED = 4

ROUNDING = 1e-6
"""Dequantized values may differ by this share of the largest: (code - zero) * scale in float32, in another order."""


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
    stored: Mapping[str, StoredWeight],
    *,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Compare every expert of every tensor, one at a time.

    Args:
        program: The final Program.
        stored: `Target.stored_weights` of the artifact.
        progress: Told about every tensor.

    Raises:
        ArtifactError: A weight is computed in the graph.
    """
    names = expert_weights(program)
    missing = [name for name in names if name not in stored]
    comparisons = []
    examined = examine(program, GATE, progress)
    for index, (name, dtype) in enumerate(names.items()):
        progress(GATE, index, len(names))
        if name in stored and name not in examined.findings:
            comparisons.append(_compare(program, name, dtype, stored[name]))
    progress(GATE, len(names), len(names))
    wrong = [item for item in comparisons if item.wrong]
    other = _in_other_formats(program, names, stored)
    problems = [
        *_listed("missing from the artifact", missing),
        *_listed("different", [f"{item.name} experts {_numbers(item.wrong)}" for item in wrong]),
        *_listed("in another format than planned", other),
        *_listed("codes that moec.json does not record", examined.not_recorded()),
        *_listed("no rounding of the checkpoint", examined.too_far()),
    ]
    total = sum(item.experts for item in comparisons)
    figures = {**_figures(comparisons, missing, other), "read_back": examined.figures}
    if problems:
        return Verdict(GATE, Status.FAIL, "; ".join(problems), EXIT_CODE, figures)
    equal = f"{total} experts in {len(comparisons)} tensors equal the plan's" if comparisons else ""
    return Verdict(GATE, Status.PASS, "; ".join(filter(None, (equal, examined.summary))), EXIT_CODE, figures)


def _compare(program: Program, name: str, dtype: torch.dtype, stored: StoredWeight) -> Comparison:
    tensor = program.weights[name]
    exact = _format(program, name) is None
    wrong, worst = [], 0.0
    for index in range(tensor.shape[0]):
        # Codes times scales is computed in float32, whatever the graph computes in.
        want = tensor.rows(index, index + 1)[0].to(dtype if exact else torch.float32).float().numpy()
        error = _error(stored.values(index, index + 1)[0], want)
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


def _in_other_formats(
    program: Program, names: Mapping[str, torch.dtype], stored: Mapping[str, StoredWeight]
) -> list[str]:
    """Quantized weights whose codes have another width than the plan's, or that are stored as floats."""
    found = []
    for name in names:
        planned, held = _format(program, name), stored.get(name)
        if planned is not None and held is not None and held.bits != planned.bits:
            found.append(f"{name} ({'floats' if held.bits is None else f'{held.bits} bits'})")
    return found


def _figures(comparisons: list[Comparison], missing: list[str], other: list[str]) -> dict[str, Any]:
    return {
        "tensors": [
            {"name": item.name, "experts": item.experts, "wrong": list(item.wrong), "max_error": item.error}
            for item in comparisons
        ],
        "missing": missing,
        "in_other_formats": other,
    }


def _listed(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        yield f"{what}: {', '.join(names[:LISTED])}{more}"


def _numbers(experts: tuple[int, ...]) -> str:
    return ", ".join(map(str, experts[:LISTED])) + (", ..." if len(experts) > LISTED else "")
