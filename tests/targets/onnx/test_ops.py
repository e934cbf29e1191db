"""Every op of the case table, in core ops, lowered alone and run at several sizes, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moec.compiler.ir.program import RMS_NORM, ROTARY
from moec.compiler.ir.stages import CORE
from moec.targets.onnx.lowerings.table import TABLE
from tests.support.op_cases import ONE, RECURRENCES, cases, flags, whole, x

aten = torch.ops.aten
STANDARD = (RMS_NORM, ROTARY, aten.linear.default)
"""Ops whose form depends on whether ONNX Runtime's own operators may be used."""
RICHER = {
    aten.erf.default: [lambda d: (x(d.b, d.s),)],
    aten.bitwise_and.Tensor: [lambda d: (whole(d.b, d.s), whole(d.b, d.s, seed=1))],
    aten.bitwise_or.Tensor: [lambda d: (whole(d.b, d.s), whole(d.b, d.s, seed=1))],
    aten.bitwise_not.default: [lambda d: (whole(d.b, d.s),), lambda d: (flags(d.b, d.s),)],
}
"""Ops that this target lowers although they are no core ops."""


@pytest.mark.parametrize(("op", "arguments", "output"), cases())
def test_op(op: Any, arguments: Any, output: int | None, check_op: Any) -> None:
    check_op(op, arguments, output)


@pytest.mark.parametrize("op", RICHER, ids=str)
def test_richer_op(op: Any, check_op: Any) -> None:
    for arguments in RICHER[op]:
        check_op(op, arguments)


@pytest.mark.parametrize("op", STANDARD, ids=str)
def test_op_in_standard_ops_alone(op: Any, check_op: Any) -> None:
    for arguments in ONE[op]:
        session = check_op(op, arguments, contrib=False)
        assert "SimplifiedLayerNormalization" not in session.op_types


@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("op", RECURRENCES, ids=str)
def test_recurrence_in_standard_ops_alone(op: Any, output: int, check_op: Any) -> None:
    for arguments in RECURRENCES[op]:
        session = check_op(op, arguments, output, contrib=False)
        assert not {"LinearAttention", "CausalConvWithState"} & set(session.op_types)


def test_the_table_holds_the_core_ops() -> None:
    assert set(TABLE) - set(RICHER) == set(CORE)
