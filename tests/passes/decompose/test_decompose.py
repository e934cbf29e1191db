"""Decomposition keeps what an op means, and leaves core ops alone: the table of op cases, by the interpreter."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.interpreter import Interpreter
from moec.compiler.ir.ops import ATTENTION, EXPERTS
from moec.compiler.ir.stages import CORE, SIZES
from moec.passes.decompose.decompose import RULES, Decompose
from tests.support.one_op import SIZES as RUNS
from tests.support.one_op import OneOp
from tests.support.op_cases import ONE, SEVERAL, cases

aten = torch.ops.aten


@pytest.mark.parametrize(("op", "arguments", "output"), cases())
def test_an_op_in_core_ops_gives_what_torch_gives(op: Any, arguments: Any, output: int | None) -> None:
    one = OneOp(op, arguments, output)
    assert {node.target for node in one.core.graph.nodes if node.op == "call_function"} <= CORE.keys()
    assert not Decompose().run(one.core).modified, "what is in core ops stays as it is"
    for sizes in RUNS:
        want = one.expected(*sizes)
        feeds = {name: torch.from_numpy(value) for name, value in one.feeds(*sizes).items()}
        (got,) = Interpreter(one.core).run(feeds).values()
        assert got.shape == want.shape, sizes
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got.float().numpy(), want.float().numpy(), rtol=1e-5, atol=1e-6)


def test_every_rule_and_every_core_op_has_a_case() -> None:
    undefined = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}
    training = {aten.native_layer_norm.default, aten.log_sigmoid_forward.default, aten.sort.stable}
    elsewhere = {ATTENTION, EXPERTS, INDEXER, operator.getitem, *SIZES, *undefined, *training}
    assert {*RULES, *CORE} - elsewhere - {aten.concat.default} <= {*ONE, *SEVERAL}
