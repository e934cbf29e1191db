"""What of a Program TensorRT cannot take, known before anything is lowered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from moec.compiler.common.rejections import Rejection
from moec.compiler.ir.program import Program, module_of
from moec.quantize.formats import IntegerFormat
from moec.quantize.lazy import Quantized
from moec.targets.tensorrt.lint import check_opset
from moec.targets.tensorrt.lowerings.quantized import BLOCKS, HINT, refusal, stored_block

if TYPE_CHECKING:
    from moec.targets.tensorrt.target import TensorrtOptions

TURING = "7.5"
LISTED = 3


def check_program(program: Program, options: TensorrtOptions, table: Mapping[Any, Any]) -> tuple[Rejection, ...]:
    """Ops without a function in `table`, formats of weights, and the opset."""
    found = [
        Rejection("tensorrt", module_of(node), f"no lowering for {node.target}")
        for node in program.graph.nodes
        if node.op == "call_function" and node.target not in table
    ]
    if reason := check_opset(options.opset):
        found.append(Rejection("tensorrt", f"--opset {options.opset}", reason))
    found += _formats(program, options)
    return tuple(found)


def _formats(program: Program, options: TensorrtOptions) -> Iterator[Rejection]:
    """One rejection for each format that is refused, with the first weights that have it."""
    users: dict[tuple[IntegerFormat, int], list[str]] = {}
    for name in program.weight_names():
        tensor = program.weights[name]
        if isinstance(tensor, Quantized):
            users.setdefault((tensor.format, stored_block(tensor)), []).append(name)
    for (form, block), names in users.items():
        reason = refusal(form)
        if not block:
            reason = reason or f"its blocks are no multiples of {BLOCKS[-1]}, or rows are no longer than that"
        if form.bits == 4 and TURING in options.compute_capability:
            reason = reason or f"GPUs of compute capability {TURING} have no int4"
        if reason:
            more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
            yield Rejection("tensorrt", f"{', '.join(names[:LISTED])}{more}", f"format {form}: {reason}. {HINT}")
