"""Finds what TensorRT does not support in a Program, before it is lowered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program
from moec.quantize.lazy import Coded, Quantized
from moec.targets.common.refusals import unsupported_formats, unsupported_ops
from moec.targets.tensorrt.lint import check_opset
from moec.targets.tensorrt.lowerings.quantized import FIRST_OPSET, HINT, unsupported_reason

if TYPE_CHECKING:
    from moec.targets.tensorrt.target import TensorrtOptions

TURING = "7.5"


def check_program(program: Program, options: TensorrtOptions, table: Mapping[Any, Any]) -> tuple[Rejection, ...]:
    """Ops that are not in `table`, and weight formats and opset that TensorRT does not support."""

    def unfit(weight: Coded) -> str:
        assert isinstance(weight, Quantized)
        if reason := unsupported_reason(weight):
            return reason
        if weight.format.bits == 4 and TURING in options.compute_capability:
            return f"GPUs of compute capability {TURING} do not support int4"
        return "" if options.opset >= FIRST_OPSET else f"quantized weights need opset {FIRST_OPSET} or later"

    found = (
        *unsupported_ops("tensorrt", table, program.graph.nodes),
        *unsupported_formats("tensorrt", program, unfit, HINT),
    )
    if reason := check_opset(options.opset):
        found += (Rejection("tensorrt", f"--opset {options.opset}", reason),)
    return found
