"""Keep the codes of a checkpoint that is stored quantized. The graph does not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from moec.compiler.common.errors import UsageError
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.passes.base import Pass, PassResult
from moec.quantize.formats import Activations, IntegerFormat
from moec.quantize.keep import ROUNDED_SCALES, Grid, KeptFormat, SupportedFormats, grid_of, kept
from moec.quantize.lazy import quantized
from moec.quantize.plan import ALWAYS_FLOAT
from moec.quantize.tensor_classes import weight_roles

Format = TypeVar("Format", bound=KeptFormat)


@dataclass(frozen=True)
class Decision:
    """What `KeepCodes` does with the weights of a Program.

    Attributes:
        changed: Name -> quantized tensor.
        replaced: Tensor class, grid of the checkpoint, new format, and reason -> number of weights.
        outcomes: Tensor class -> outcome as a text -> number of weights.
    """

    changed: Mapping[str, LazyTensor]
    replaced: Mapping[tuple[str, str, str, str], int]
    outcomes: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class KeepCodes(Pass):
    """Keep the codes of each weight that is stored quantized, if the target supports their grid.

    ```
    linear(x, @q_proj.weight[N, K] float32, decoded from GPTQ)
    ->
    linear(x, @q_proj.weight[N, K] int4:128)     the same node; the tensor is a `quantize.keep.Kept`
    ```
    Other grids are rounded to the nearest format that the target supports, with a rejection. Weights that are stored
    as floats stay float.

    Attributes:
        supported: Formats that the target supports.
        activations: Type to which kernels may round activations.
    """

    name: ClassVar[str] = "keep-codes"
    requires: ClassVar[tuple[str, ...]] = ("fold-weights", "canonical-experts")

    supported: SupportedFormats = field(default_factory=SupportedFormats)
    activations: Activations = Activations.FLOAT

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UsageError: No weight of the checkpoint is stored quantized.
        """
        found = self.decide(program)
        rejections = tuple(
            Rejection(self.name, f"{count} weights of class {tensor_class}", f"{grid} became {form}: {reason}")
            for (tensor_class, grid, form, reason), count in sorted(found.replaced.items())
        )
        weights = program.weights.with_tensors(found.changed)
        return PassResult(program.replace(weights=weights), bool(found.changed), rejections)

    def decide(self, program: Program) -> Decision:
        """Decide what to do with each weight that is stored quantized, without changing the Program.

        Raises:
            UsageError: No weight of the checkpoint is stored quantized.
        """
        changed: dict[str, LazyTensor] = {}
        replaced: Counter[tuple[str, str, str, str]] = Counter()
        classes: dict[str, Counter[str]] = {}
        for name, role in weight_roles(program).items():
            grid = grid_of(program.weights[name])
            if grid is None or role.tensor_class in ALWAYS_FLOAT:
                continue
            tensor_class = role.tensor_class.value
            tensor, reason = self._coded(name, program.weights[name], grid, tensor_class)
            form = "float" if tensor is None else str(tensor.format)
            classes.setdefault(tensor_class, Counter())[_outcome(form, grid, reason)] += 1
            if tensor is not None:
                changed[name] = tensor
            if reason:
                replaced[tensor_class, str(grid), form, reason] += 1
        if not classes:
            raise UsageError(
                "--quantize keep: no weight of this checkpoint is stored quantized",
                hint="name a format, such as int4, or leave --quantize out",
            )
        return Decision(changed, replaced, {key: dict(value) for key, value in classes.items()})

    def _coded(self, name: str, source: LazyTensor, grid: Grid, tensor_class: str) -> tuple[Any, str]:
        """The quantized tensor, or None if it stays float, and why its codes are not those of the checkpoint."""
        for form, rounded in grid.forms():
            fmt = self.supported.kept(tensor_class, self._with_activations(form))
            if fmt is not None:
                return kept(name, source, fmt, exact=not rounded), rounded
        reason = grid.reason or f"the target does not support {grid.format} for this tensor class"
        other = self.supported.nearest(tensor_class, grid, source.shape[-1])
        return (None if other is None else quantized(name, source, self._with_activations(other))), reason

    def _with_activations(self, fmt: Format) -> Format:
        if self.activations is Activations.FLOAT or not isinstance(fmt, IntegerFormat):
            return fmt
        return replace(fmt, activations=self.activations)


def _outcome(form: str, grid: Grid, reason: str) -> str:
    """The outcome for a weight, as a text for the report."""
    if reason and reason != ROUNDED_SCALES:
        return f"{form} in place of {grid}"
    return f"{form}, the codes of the checkpoint" + (" with scales in half precision" if reason else "")
