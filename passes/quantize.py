"""Turn a quantization plan into lazy quantized weights. The graph does not change; targets check the weights' type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.passes.base import Pass, PassResult
from moec.quantize.formats import FloatKind, Format, IntegerFormat, PaletteFormat
from moec.quantize.lazy import Float16, palettized, quantized
from moec.quantize.methods.rounding import RoundingResult
from moec.quantize.methods.scales import NO_CLIPPING, ClipSearch
from moec.quantize.plan import QuantizationPlan
from moec.quantize.recorded import Recorded, RecordedCodes
from moec.quantize.tensor_classes import format_of, weight_roles


@dataclass(frozen=True)
class Quantize(Pass):
    """Give each weight the format in the plan for its class and layer.

    ```
    linear(x, @q_proj.weight[N, K] float)
    ->
    linear(x, @q_proj.weight[N, K] int4:32)      the same node; the tensor is a `quantize.lazy.Coded`
    ```

    Attributes:
        plan: Formats by tensor class, with overrides.
        rounded: Tensor name -> result of calibrated rounding; other tensors are rounded to nearest.
        recorded: Tensor name -> codes read back from an artifact, which are used unchanged; for all tensors or none.
        clip: Clip ratios that rounding to nearest tries.
    """

    name: ClassVar[str] = "quantize"
    requires: ClassVar[tuple[str, ...]] = ("fold-weights", "canonical-experts")

    plan: QuantizationPlan = field(default_factory=lambda: QuantizationPlan.build({}))
    rounded: Mapping[str, RoundingResult] = field(default_factory=dict)
    recorded: Mapping[str, RecordedCodes] = field(default_factory=dict)
    clip: ClipSearch = NO_CLIPPING

    def run(self, program: Program) -> PassResult:
        """See the class.

        Raises:
            UsageError: A block size does not divide a dimension, or experts of one tensor have different formats.
            ArtifactError: There are recorded codes, but not for all tensors.
        """
        changed: dict[str, LazyTensor] = {}
        rejections: list[Rejection] = []
        for name, role in weight_roles(program).items():
            source = program.weights[name]
            chosen = format_of(self.plan, name, role, source)
            tensor = self._quantized(name, source, chosen)
            if tensor is not None:
                changed[name] = tensor
            rejections += self._fallbacks(name)
        if not changed:
            return PassResult(program, modified=False)
        weights = program.weights.with_tensors(changed)
        return PassResult(program.replace(weights=weights), True, tuple(rejections))

    def _quantized(self, name: str, source: LazyTensor, chosen: Format) -> LazyTensor | None:
        if isinstance(chosen, IntegerFormat) and self.recorded:
            if name not in self.recorded:
                raise ArtifactError(f"{name}: no codes recorded in moec.json", hint="export the model again")
            return Recorded(name, source, chosen.resolve(source.shape[-1], name), recorded=self.recorded[name])
        if isinstance(chosen, IntegerFormat):
            return quantized(name, source, chosen, self.rounded.get(name), self.clip)
        if isinstance(chosen, PaletteFormat):
            return palettized(name, source, chosen)
        return Float16(source) if chosen.kind is FloatKind.FP16 else None

    def _fallbacks(self, name: str) -> list[Rejection]:
        """A rejection for each expert with too few calibration tokens, which was rounded to nearest."""
        result = self.rounded.get(name)
        reports = result.matrices if result is not None else ()
        return [
            Rejection(self.name, f"{name}[{index}]", f"rounded to nearest: {report.reason}")
            for index, report in enumerate(reports)
            if report.reason
        ]
