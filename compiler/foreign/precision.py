"""Which tensors of a file are in which precision, and what rounding alone would cost.

Classes are found by shape, since every exporter has names of its own. A quantized file is compared with a second
reference: the checkpoint with the same classes of weights rounded to nearest, in blocks of the same size. What the file
differs by must be of the order of what this rounding differs by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moec.compiler.ir.program import Program
from moec.passes.quantize import Quantize
from moec.quantize.formats import Format, IntegerFormat
from moec.quantize.plan import QuantizationPlan, TensorClass
from moec.quantize.tensor_classes import weight_roles
from moec.targets.model_files import StoredTensor

EXPERTS, ROUTER, EMBEDDING, MATRIX, OTHER = "experts", "router", "embedding and head", "other matrices", "the rest"
_CLASSES: Mapping[str, tuple[TensorClass, ...]] = {
    EXPERTS: (TensorClass.EXPERTS_GATE_UP, TensorClass.EXPERTS_DOWN),
    EMBEDDING: (TensorClass.EMBEDDING, TensorClass.LM_HEAD),
    MATRIX: (TensorClass.ATTENTION, TensorClass.SHARED_EXPERT),
}


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors of one class in one precision."""

    tensor_class: str
    precision: str
    tensors: int
    nbytes: int


def class_of(tensor: StoredTensor, program: Program) -> str:
    """The class of a tensor, by its shape."""
    shape = tuple(size for size in tensor.shape if size != 1)
    sizes = Counter(shape)
    for layer in program.layers:
        experts, width, inner = layer.num_experts, layer.hidden_size, layer.intermediate_size
        if sizes == Counter((experts, width)) and experts not in (inner, 2 * inner):
            return ROUTER
        if any(sizes in (Counter((width, own)), Counter((experts, width, own))) for own in (inner, 2 * inner)):
            return EXPERTS
        if (
            len(shape) == 2
            and width in shape
            and math.prod(shape) in {experts * width * inner, 2 * experts * width * inner}
        ):
            return EXPERTS
    if len(shape) >= 2 and program.vocab_size in shape:
        return EMBEDDING
    return MATRIX if len(shape) >= 2 else OTHER


def table(tensors: Sequence[StoredTensor], program: Program) -> list[Row]:
    """Count and bytes of the tensors of each class and precision, the largest first."""
    found: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        found.setdefault((class_of(tensor, program), tensor.precision), []).append(tensor.nbytes)
    rows = [Row(kind, precision, len(sizes), sum(sizes)) for (kind, precision), sizes in found.items()]
    return sorted(rows, key=lambda row: -row.nbytes)


def remarks(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What to know about the precisions of a file: class of tensors, and why.

    Args:
        rows: What `table` returned.
    """
    coded = {row.tensor_class for row in rows if "fp" not in row.precision and "bf" not in row.precision}
    floats = {row.tensor_class: row for row in rows if row.tensor_class not in coded}
    found = []
    if ROUTER in coded:
        found.append((ROUTER, "it is quantized, and small errors in router logits send tokens to other experts"))
    if coded - {ROUTER, OTHER} and EXPERTS in floats:
        share = floats[EXPERTS].nbytes / max(1, sum(row.nbytes for row in rows))
        found.append((EXPERTS, f"they are not quantized, though others are, and take {share:.0%} of the bytes"))
    return found


def rounded_like(tensors: Sequence[StoredTensor], program: Program) -> Program | None:
    """The Program with its weights rounded to nearest as coarsely as those of a file; None if it holds no codes.

    Weights of three bits or fewer are rounded to four, so their limit is too low rather than too high.
    """
    formats: dict[TensorClass, Format] = {}
    for kind, members in _CLASSES.items():
        codes = [tensor for tensor in tensors if tensor.quantized and class_of(tensor, program) == kind]
        if codes:
            coarsest = min(codes, key=lambda tensor: tensor.bits)
            formats |= dict.fromkeys(members, _format(coarsest))
    if not formats:
        return None
    return Quantize(_fitting(QuantizationPlan.build(formats), program)).run(program).program


def _format(tensor: StoredTensor) -> IntegerFormat:
    bits: Literal[4, 8] = 4 if tensor.bits < 5 else 8
    if tensor.block is None:
        return IntegerFormat(bits=bits, granularity="channel")
    size = tensor.block
    return IntegerFormat(bits=bits, granularity=32 if size <= 32 else 64 if size <= 64 else 128)


def _fitting(plan: QuantizationPlan, program: Program) -> QuantizationPlan:
    """`plan` with blocks that divide every matrix of their class; else the default block, which does."""
    formats = dict(plan.formats)
    for name, role in weight_roles(program).items():
        chosen, width = formats[role.tensor_class], program.weights[name].shape[-1]
        if isinstance(chosen, IntegerFormat) and isinstance(chosen.granularity, int) and width % chosen.granularity:
            formats[role.tensor_class] = IntegerFormat(bits=chosen.bits)
    return QuantizationPlan.build(formats)
