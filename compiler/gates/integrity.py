"""Integrity: the artifact holds every expert, embedding and quantized weight of the final Program as planned.

A text reaches few experts and few rows of an embedding, and one code of a quantized matrix changes logits by less than
the rounding of activations does. So these weights are compared value by value. All other weights take part in every
logit, and the parity gate compares logits; they are compared here too where the target reads them back, as a target
that computes in float16 does, whose rounding hides small errors of a weight. Weights whose codes were read back from
the artifact are checked by `examination` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.progress import Progress
from moec.compiler.common.verdict import Status, Verdict
from moec.compiler.gates.compare import relative_error
from moec.compiler.gates.examination import Examined, examine
from moec.compiler.ir.analysis import lookup_tables
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.quantize.lazy import Coded, CodedFormat
from moec.quantize.recorded import Recorded
from moec.targets.stored_weights import StoredWeight

GATE = "integrity"
EXIT_CODE = 5
LISTED = 4

ROUNDING = 1e-6
"""Largest difference of dequantized values relative to the largest one, from the order of float32 operations."""


ROWS_BYTES = 1 << 25
"""Bytes of float32 values of a matrix that are compared at a time."""


@dataclass(frozen=True)
class Comparison:
    """Result for one weight.

    Attributes:
        name: Its name.
        experts: Number of experts of a stack; 0 for another weight.
        wrong: Indices of the experts that differ; of another weight, the first rows of the slices that do.
        error: Largest relative difference.
    """

    name: str
    experts: int
    wrong: tuple[int, ...]
    error: float


def expert_weights(program: Program) -> dict[str, torch.dtype]:
    """Name of every expert weight of `program` -> its dtype in the graph, in the order of the layers.

    Raises:
        ArtifactError: A weight is computed in the graph, so the artifact has no tensor for it.
    """
    found: dict[str, torch.dtype] = {}
    for node in program.nodes(EXPERTS):
        for operand, stack in Experts.of(node).stacks.items():
            if stack.op != "get_attr":
                raise ArtifactError(
                    f"{node.name}: {operand} of moec::experts is computed in the graph",
                    hint="constant folding turns it into a weight: run the common passes",
                )
            found[program.weights.resolve(str(stack.target))] = stack.meta["val"].dtype
    return found


def other_weights(program: Program, offered: Collection[str] = ()) -> dict[str, torch.dtype]:
    """Name -> dtype in the graph of the weights to compare that are not those of experts.

    Args:
        program: The final Program.
        offered: Names of the weights that the artifact can give back. Embeddings and quantized weights have to be among
            them; other weights are compared if they are, and have rows to compare.
    """
    experts, tables = expert_weights(program), set(map(program.weights.resolve, lookup_tables(program.graph)))
    found: dict[str, torch.dtype] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        name = program.weights.resolve(str(node.target))
        required = name in tables or _format(program, name) is not None
        if name not in experts and (required or (name in offered and program.weights[name].shape)):
            found[name] = node.meta["val"].dtype
    return found


class Comparisons:
    """Compares every expert and the weights of `other_weights` with the artifact's.

    Computing the values of the Program's experts takes most of the time. The reference of the parity gate computes
    them anyway and passes them to `compare`; `judge` computes those that are missing.

    Args:
        program: The final Program.
        stored: `Target.stored_weights` of the artifact.

    Raises:
        ArtifactError: A weight is computed in the graph.
    """

    def __init__(self, program: Program, stored: Mapping[str, StoredWeight]) -> None:
        self._program, self._stored = program, stored
        experts, others = expert_weights(program), other_weights(program, stored.keys())
        self._names = experts | others
        # Codes that were read back from the artifact are equal to it by construction; `examine` checks them.
        own = [name for name in self._names if name in stored and not isinstance(program.weights[name], Recorded)]
        self._errors: dict[str, dict[int, float]] = {name: {} for name in own}
        self._experts = experts.keys() & self._errors.keys()

    def compare(self, name: str, index: int, values: Tensor) -> None:
        """Compare one expert of the tensor `name`, unless it was compared before.

        Args:
            name: Name of a weight; a weight that is not an expert tensor is ignored.
            index: Index of the expert along axis 0.
            values: The values of this expert in the Program.
        """
        if name in self._experts and index not in self._errors[name]:
            self._compare(name, index, values[None])

    def _compare(self, name: str, start: int, values: Tensor) -> None:
        """Compare a slice along axis 0 that begins at `start`."""
        # Weights are dequantized in float32, whatever the dtype of the graph.
        dtype = self._names[name] if _format(self._program, name) is None else torch.float32
        want = values.to(dtype).float().numpy()
        self._errors[name][start] = relative_error(self._stored[name].values(start, start + len(want)), want)

    def judge(self, progress: Progress = lambda *_: None) -> Verdict:
        """Compare what was not compared yet, one expert or some rows at a time, and return the verdict.

        Args:
            progress: Called for every tensor.
        """
        examined = examine(self._program, GATE, progress)
        for done, (name, errors) in enumerate(self._errors.items()):
            progress(GATE, done, len(self._errors))
            tensor = self._program.weights[name]
            for start, stop in self._slices(name):
                if start not in errors:
                    self._compare(name, start, tensor.rows(start, stop))
        progress(GATE, len(self._errors), len(self._errors))
        missing = [name for name in self._names if name not in self._stored]
        found = [self._comparison(name, errors) for name, errors in self._errors.items()]
        return _judge(found, missing, _in_other_formats(self._program, self._names, self._stored), examined)

    def _slices(self, name: str) -> Iterator[tuple[int, int]]:
        """Slices along axis 0: experts, or as many rows of another weight as `ROWS_BYTES` allows."""
        shape = self._program.weights[name].shape
        step = 1 if name in self._experts else max(1, ROWS_BYTES // (4 * torch.Size(shape[1:]).numel()))
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def _comparison(self, name: str, errors: Mapping[int, float]) -> Comparison:
        limit = 0.0 if _format(self._program, name) is None else ROUNDING
        wrong = sorted(index for index, error in errors.items() if not error <= limit)
        experts = len(errors) if name in self._experts else 0
        return Comparison(name, experts, tuple(wrong), max(errors.values(), default=0.0))


def _judge(comparisons: list[Comparison], missing: list[str], other: list[str], examined: Examined) -> Verdict:
    wrong = [item for item in comparisons if item.wrong]
    problems = [
        *_listed("missing from the artifact", missing),
        *_listed("different", [_place(item) for item in wrong]),
        *_listed("in another format than planned", other),
        *_listed("codes that moec.json does not record", examined.not_recorded()),
        *_listed("too far from the checkpoint for a rounding of it", examined.too_far()),
    ]
    total, stacks = sum(item.experts for item in comparisons), sum(item.experts > 0 for item in comparisons)
    figures = {**_figures(comparisons, missing, other), "read_back": examined.figures}
    if problems:
        return Verdict(GATE, Status.FAIL, "; ".join(problems), EXIT_CODE, figures)
    others = len(comparisons) - stacks
    compared = [f"{total} experts in {stacks} tensors"] if stacks else []
    if others:
        compared.append(f"{others} other weight{'s' * (others > 1)}")
    equal = f"{' and '.join(compared)} equal the plan's" if compared else ""
    return Verdict(GATE, Status.PASS, "; ".join(filter(None, (equal, examined.summary))), EXIT_CODE, figures)


def _place(item: Comparison) -> str:
    """A weight that differs, and where."""
    return f"{item.name} {'experts' if item.experts else 'from row'} {_numbers(item.wrong)}"


def _format(program: Program, name: str) -> CodedFormat | None:
    """The format that the plan gives to a weight, or None if it stays float."""
    tensor = program.weights[name]
    return tensor.format if isinstance(tensor, Coded) else None


def _in_other_formats(
    program: Program, names: Mapping[str, torch.dtype], stored: Mapping[str, StoredWeight]
) -> list[str]:
    """Quantized weights whose codes do not have the bits of the plan, or that are stored as floats."""
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
