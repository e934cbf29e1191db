"""Faults of quantized weights: codes, scales and zero points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from faults.edits import weight_name
from faults.fault import Change, Fault
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.quantize.lazy import GivenCodes, Quantized
from moec.quantize.methods.tensors import QuantizedTensor

Spoil = Callable[[QuantizedTensor], QuantizedTensor]


@dataclass(frozen=True)
class _Spoiled(GivenCodes):
    """A quantized weight whose codes, scales or zero points are changed as a whole."""

    given: Quantized = None
    spoil: Spoil = None

    def _quantize(self, start: int, stop: int) -> QuantizedTensor:
        whole = self.spoil(self.given._quantize(0, self.shape[0]))
        zero_points = None if whole.zero_points is None else whole.zero_points[start:stop]
        return QuantizedTensor(whole.format, whole.codes[start:stop], whole.scales[start:stop], zero_points)


def in_codes(name: Callable[[Program], str], spoil: Spoil) -> Change:
    """A quantized weight with other codes, scales or zero points."""

    def put(program: Program) -> Program:
        own = program.weights.resolve(name(program))
        given = program.weights[own]
        assert isinstance(given, Quantized), own
        spoiled = _Spoiled(given.name, given.source, given.format, given=given, spoil=spoil)
        return program.replace(weights=program.weights.with_tensors({own: spoiled}))

    return put


def down(program: Program) -> str:
    return str(Experts.of(program.nodes(EXPERTS)[0]).down_proj.target)


def gate_up(program: Program) -> str:
    return str(Experts.of(program.nodes(EXPERTS)[1]).gate_up_proj.target)


def output_projection(program: Program) -> str:
    return weight_name(program, "0.self_attn.o_proj.weight")


def query(program: Program) -> str:
    return weight_name(program, "1.self_attn.q_proj.weight")


def _with(**changes: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(tensor: QuantizedTensor) -> QuantizedTensor:
        return dataclasses.replace(tensor, **{name: change(getattr(tensor, name)) for name, change in changes.items()})

    return spoil


def _pairs_exchanged(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _one_code(codes: Tensor) -> Tensor:
    codes = codes.clone()
    codes.view(-1)[5] += 1 if codes.view(-1)[5] < 1 else -1
    return codes


def _one_scale(scales: Tensor) -> Tensor:
    scales = scales.clone()
    scales.view(-1)[7] *= 1.125
    return scales


def _as_int4_of_another_sign(codes: Tensor) -> Tensor:
    """Codes stored plus 8 and read as two's complement."""
    return ((codes + 8) ^ 8) - 8 if codes.min() >= 0 else torch.where(codes < 0, codes + 8, codes - 8).to(torch.int8)


FAULTS = (
    Fault(
        "quantization",
        "scales of the next block",
        "int4",
        in_codes(gate_up, _with(scales=lambda scales: scales.roll(1, -1))),
    ),
    Fault(
        "quantization",
        "scales of the next row",
        "int8",
        in_codes(down, _with(scales=lambda scales: scales.roll(1, -2))),
    ),
    Fault(
        "quantization",
        "scales of the neighbouring expert",
        "int4",
        in_codes(down, _with(scales=lambda scales: scales.roll(1, 0))),
    ),
    Fault(
        "quantization",
        "codes of the neighbouring expert",
        "int4",
        in_codes(down, _with(codes=lambda codes: codes.roll(1, 0))),
    ),
    Fault("quantization", "halves of a byte exchanged", "int4", in_codes(gate_up, _with(codes=_pairs_exchanged))),
    Fault("quantization", "codes with the wrong zero", "int4", in_codes(down, _with(codes=_as_int4_of_another_sign))),
    Fault("quantization", "one code off by one in an expert", "int8", in_codes(down, _with(codes=_one_code))),
    Fault(
        "quantization",
        "zero points off by one",
        "int4 asymmetric",
        in_codes(down, _with(zero_points=lambda points: (points + 1).clamp(max=7))),
    ),
    Fault(
        "quantization",
        "zero points of the next row",
        "int4 asymmetric",
        in_codes(gate_up, _with(zero_points=lambda points: points.roll(1, -2))),
    ),
    Fault(
        "quantization",
        "scales of the next block in attention",
        "int4",
        in_codes(output_projection, _with(scales=lambda scales: scales.roll(1, -1))),
    ),
    Fault(
        "quantization",
        "halves of a byte exchanged in attention",
        "int4",
        in_codes(output_projection, _with(codes=_pairs_exchanged)),
    ),
    Fault("quantization", "one code off by one in attention", "int8", in_codes(query, _with(codes=_one_code))),
    Fault("quantization", "one scale off by an eighth in attention", "int4", in_codes(query, _with(scales=_one_scale))),
)
