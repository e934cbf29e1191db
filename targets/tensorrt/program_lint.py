"""What of a Program TensorRT cannot take, as far as it is known before anything is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.quantize.lazy import Coded, Quantized
from moec.targets.common.refusals import formats_without_form, ops_without_form
from moec.targets.tensorrt.lint import check_opset
from moec.targets.tensorrt.lowerings.quantized import HINT, inexpressible

if TYPE_CHECKING:
    from moec.targets.tensorrt.target import TensorrtOptions

TURING = "7.5"


def check_program(program: Program, options: TensorrtOptions, table: Mapping[Any, Any]) -> tuple[Rejection, ...]:
    """Ops without a function in `table`, formats of weights, and the opset."""

    def unfit(weight: Coded) -> str:
        assert isinstance(weight, Quantized)
        turing = weight.format.bits == 4 and TURING in options.compute_capability
        return inexpressible(weight) or (f"GPUs of compute capability {TURING} have no int4" if turing else "")

    found = (
        *ops_without_form("tensorrt", table, program.graph.nodes),
        *formats_without_form("tensorrt", program, unfit, HINT),
    )
    if reason := check_opset(options.opset):
        found += (Rejection("tensorrt", f"--opset {options.opset}", reason),)
    return found
