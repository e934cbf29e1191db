"""Integrity: the artifact holds the final Program's experts, every one of them, in the format of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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


class Comparisons:
    """Compares every expert of every tensor with the artifact's, each when somebody makes its values.

    To make them takes longer than anything else here. The gate of coverage makes those of every expert, and hands them
    to `compare` while it has them; `judge` makes what is missing.

    Args:
        program: The final Program.
        readers: `Target.expert_tensors` of the artifact.

    Raises:
        ArtifactError: A weight is computed in the graph.
    """

    def __init__(self, program: Program, readers: Mapping[str, ExpertReader]) -> None:
        self._program, self._readers = program, readers
        self._names = expert_weights(program)
        self._errors: dict[str, dict[int, float]] = {name: {} for name in self._names if name in readers}

    def compare(self, name: str, index: int, values: Tensor) -> None:
        """Compare one expert of the tensor `name`.

        Args:
            name: Where it is no tensor of experts, nothing happens.
            index: The expert.
            values: Its values as the Program has them: one index of the tensor along axis 0.
        """
        if name in self._errors:
            # Codes times scales is computed in float32, whatever the graph computes in.
            dtype = self._names[name] if _format(self._program, name) is None else torch.float32
            want = values.to(dtype).float().numpy()
            self._errors[name][index] = _error(np.asarray(self._readers[name](index)), want)

    def judge(self, tensor_bytes: Mapping[str, int] | None = None, progress: Progress = lambda *_: None) -> Verdict:
        """Compare what has not been compared yet, one expert at a time, and say what was found.

        Args:
            tensor_bytes: Name of an expert tensor -> the bytes that the artifact spends on it, codes, scales and zero
                points together; a target states it in its facts. Needed where the plan quantizes.
            progress: Told about every tensor.
        """
        for done, (name, errors) in enumerate(self._errors.items()):
            progress(GATE, done, len(self._errors))
            tensor = self._program.weights[name]
            for index in range(tensor.shape[0]):
                if index not in errors:
                    self.compare(name, index, tensor.rows(index, index + 1)[0])
        progress(GATE, len(self._errors), len(self._errors))
        missing = [name for name in self._names if name not in self._errors]
        found = [self._comparison(name, errors) for name, errors in self._errors.items()]
        return _judge(found, missing, *_left_float(self._program, self._names, tensor_bytes or {}))

    def _comparison(self, name: str, errors: Mapping[int, float]) -> Comparison:
        limit = 0.0 if _format(self._program, name) is None else ROUNDING
        wrong = sorted(index for index, error in errors.items() if not error <= limit)
        return Comparison(name, len(errors), tuple(wrong), max(errors.values(), default=0.0))


def check_integrity(
    program: Program,
    readers: Mapping[str, ExpertReader],
    *,
    tensor_bytes: Mapping[str, int] | None = None,
    progress: Progress = lambda *_: None,
) -> Verdict:
    """Compare every expert of every tensor, one at a time; see `Comparisons`.

    Raises:
        ArtifactError: A weight is computed in the graph.
    """
    return Comparisons(program, readers).judge(tensor_bytes, progress)


def _judge(comparisons: list[Comparison], missing: list[str], left_float: list[str], unknown: list[str]) -> Verdict:
    wrong = [item for item in comparisons if item.wrong]
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


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite for another shape or NaN."""
    if got.shape != want.shape:
        return float("inf")
    if np.array_equal(got, want):
        return 0.0
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
