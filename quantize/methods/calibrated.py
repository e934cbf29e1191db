"""Calibrated rounding: the interpreter accumulates Hessians from text, then GPTQ rounds, a group of tensors at a time.

The Hessian of an expert is accumulated only from the tokens that are routed to it. Each token is weighted by its
squared routing weight, the factor of its squared error in the layer's output.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from moec.compiler.ir.experts import ExpertCall
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.quantize.formats import IntegerFormat
from moec.quantize.methods.gptq import BATCH, GptqOptions, gptq
from moec.quantize.methods.hessian import Hessian
from moec.quantize.methods.rounding import RoundingResult, round_to_nearest
from moec.quantize.methods.scales import ClipSearch
from moec.quantize.methods.tensors import QuantizedTensor
from moec.quantize.plan import QuantizationPlan, TensorClass
from moec.quantize.tensor_classes import LINEAR, Role, format_of, weight_roles

if TYPE_CHECKING:
    from moec.compiler.common.progress import Progress

MEMORY = 1 << 30
"""Bytes of Hessians in memory at a time. Each group of tensors that fits into them needs a pass over the text."""


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        rounded: Tensor name -> result, for all tensors that the plan quantizes.
        tokens: Name of a layer's first tensor of experts -> number of tokens that each expert saw, [E].
    """

    rounded: Mapping[str, RoundingResult]
    tokens: Mapping[str, tuple[int, ...]]


@dataclass
class _Hessians:
    """Hessians of a group of tensors: one per matrix, or one per expert of a stack."""

    by_name: dict[str, list[Hessian]] = field(default_factory=dict)

    def see_linear(self, name: str, inputs: Tensor) -> None:
        if name in self.by_name:
            self.by_name[name][0].add(inputs)

    def see_expert(self, name: str, expert: int, inputs: Tensor, weights: Tensor) -> None:
        if name in self.by_name:
            self.by_name[name][expert].add(inputs, weights.float().square())


def calibrate(
    program: Program,
    plan: QuantizationPlan,
    windows: np.ndarray,
    *,
    options: GptqOptions | None = None,
    memory: int = MEMORY,
    progress: Progress = lambda _what, _done, _total: None,
) -> Calibration:
    """Round every tensor that `plan` quantizes: embeddings to nearest, all others by GPTQ.

    Args:
        program: Float Program after the common passes.
        plan: What to quantize.
        windows: Calibration tokens [n, length].
        options: Options of GPTQ.
        memory: See `MEMORY`.
        progress: Called for windows of text and for tensors.

    Raises:
        UsageError: A block size does not divide a dimension.
        CheckpointError: Weights or inputs hold NaN or infinity.
    """
    options = options or GptqOptions()
    wanted = _wanted(program, plan)
    rounded: dict[str, RoundingResult] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    done = 0
    for group in _groups(program, wanted, memory):
        hessians = _collect(program, group, windows, progress)
        for name in group:
            role, chosen = wanted[name]
            # Rows of an embedding are looked up, not multiplied, so there is no Hessian.
            own = None if role.tensor_class is TensorClass.EMBEDDING else hessians.by_name.pop(name)
            rounded[name] = _rounded(program.weights[name], own, chosen, name, options)
            if own is not None and len(own) > 1:
                tokens[name] = tuple(hessian.tokens for hessian in own)
            done += 1
            progress("rounding", done, len(wanted))
    return Calibration(rounded, tokens)


def _rounded(
    tensor: LazyTensor, hessians: list[Hessian] | None, fmt: IntegerFormat, name: str, options: GptqOptions
) -> RoundingResult:
    """Round a matrix, or a stack a few experts at a time, with the codes in a temporary file."""
    stacked = len(tensor.shape) == 3
    # As many experts as GPTQ rounds together.
    step = max(1, BATCH // math.prod(tensor.shape[1:])) if stacked else tensor.shape[0]
    codes, parts = file_backed_tensor(tensor.shape), list[RoundingResult]()
    for start in range(0, tensor.shape[0], step):
        part = slice(start, min(start + step, tensor.shape[0]))
        weight = tensor.rows(part.start, part.stop)
        if hessians is None:
            result = round_to_nearest(weight, fmt, name=name, clip=ClipSearch())
        else:
            result = gptq(weight, hessians[part] if stacked else hessians, fmt, name=name, options=options)
        codes[part] = result.tensor.codes
        parts.append(replace(result, tensor=replace(result.tensor, codes=codes[part])))
    zero_points = [part.tensor.zero_points for part in parts if part.tensor.zero_points is not None]
    scales = torch.cat([part.tensor.scales for part in parts])
    whole = QuantizedTensor(parts[0].tensor.format, codes, scales, torch.cat(zero_points) if zero_points else None)
    return RoundingResult(whole, tuple(matrix for part in parts for matrix in part.matrices))


def file_backed_tensor(shape: Sequence[int]) -> Tensor:
    """An int8 tensor in an unnamed temporary file, so that the codes may be larger than memory."""
    with tempfile.NamedTemporaryFile(prefix="moec-") as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=torch.int8).view(*shape)


def _wanted(program: Program, plan: QuantizationPlan) -> dict[str, tuple[Role, IntegerFormat]]:
    found = {}
    for name, role in weight_roles(program).items():
        tensor = program.weights[name]
        chosen = format_of(plan, name, role, tensor)
        if isinstance(chosen, IntegerFormat):
            found[name] = (role, chosen.resolve(tensor.shape[-1], name))
    return found


def _groups(
    program: Program, wanted: Mapping[str, tuple[Role, IntegerFormat]], memory: int
) -> Iterator[tuple[str, ...]]:
    group: list[str] = []
    used = 0
    for name in wanted:
        shape = program.weights[name].shape
        size = 4 * shape[-1] ** 2 * math.prod(shape[:-2])
        if group and used + size > memory:
            yield tuple(group)
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield tuple(group)


def _collect(program: Program, group: tuple[str, ...], windows: np.ndarray, progress: Progress) -> _Hessians:
    """Run the text once and accumulate the Hessians of `group`."""
    hessians = _Hessians()
    resolve = program.weights.resolve
    for name in group:
        shape = program.weights[name].shape
        hessians.by_name[name] = [Hessian(shape[-1], f"{name}[{i}]") for i in range(math.prod(shape[:-2]))]

    def on_node(node: fx.Node, args: tuple[Any, ...], _result: Any) -> None:
        if node.target is LINEAR:
            weight = node.args[1]
            assert isinstance(weight, fx.Node)
            hessians.see_linear(resolve(str(weight.target)), args[0])

    def on_expert(node: fx.Node, call: ExpertCall) -> None:
        own = Experts.of(node)
        hessians.see_expert(resolve(str(own.gate_up_proj.target)), call.expert, call.inputs, call.weights)
        hessians.see_expert(resolve(str(own.down_proj.target)), call.expert, call.inner, call.weights)

    runner = ProgramRunner(program, observer=on_node, expert_observer=on_expert)
    for index in range(0, len(windows), 4):
        runner.prefill(windows[index : index + 4])
        progress("calibration text", min(index + 4, len(windows)), len(windows))
    return hessians
