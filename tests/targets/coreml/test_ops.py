"""Every op of the case table, in core ops, lowered and run by moec's executor, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.ir.stages import CORE
from moec.targets.common.table import lookup
from moec.targets.coreml.context import Context, Settings
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.lowerings.table import TABLE
from moec.targets.coreml.weights import WeightPool
from tests.support.one_op import OneOp
from tests.support.op_cases import cases

aten = torch.ops.aten
SIZES = (2, 5)
RICHER = {aten.erf.default}
"""Ops that this target lowers although they are no core ops."""
PLAIN = {np.dtype("float32"), np.dtype("int32")}


@pytest.fixture(scope="module")
def results(builder: Any) -> dict[str, tuple[Any, np.ndarray]]:
    """Id of a case -> what the executor gives, or what went wrong, and what torch gives; one package for all."""
    chosen = {f"c{index}": OneOp(*case.values) for index, case in enumerate(cases())}
    return {name: (found, chosen[name].expected(*SIZES).numpy()) for name, found in run(builder, chosen).items()}


def run(builder: Any, chosen: dict[str, OneOp]) -> dict[str, Any]:
    inputs, feeds, known = {}, {}, dict[str, Any]()
    programs = {name: one.static(*SIZES) for name, one in chosen.items()}
    for name, one in chosen.items():
        for key, array in one.feeds(*SIZES).items():
            fed = array.astype(np.int32) if array.dtype in (np.bool_, np.int64) else array
            feeds[f"{name}_{key}"] = fed
            inputs[f"{name}_{key}"] = builder.placeholder(fed.shape or (1,), fed.dtype)
    mb = builder.mb

    def body(**variables: Any) -> list[Any]:
        outputs = []
        for name, program in programs.items():
            try:
                outputs.append(_lowered(builder, program, name, variables))
            except Exception as error:  # noqa: BLE001 - the case of this op fails, the others run
                known[name] = error
        return outputs

    found = MilModel.open(builder.save(inputs, body)).session().predict(feeds)
    del mb
    return known | {name: found[name] for name in chosen if name not in known}


def _lowered(builder: Any, program: Any, name: str, variables: dict[str, Any]) -> Any:
    mb = builder.mb
    ctx = Context(program, mb, WeightPool(), Settings(context=1, chunk=1, skip_experts=True))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = variables[f"{name}_{node.name}"]
            ctx.set(node, mb.cast(x=value, dtype="bool") if node.meta["val"].dtype is torch.bool else value)
        elif node.op == "call_function":
            ctx.set(node, lookup(TABLE, node, "coreml")(ctx, node))
    (result,) = program.graph.output_node().args[0]
    value = ctx.tensor(result)
    kind = ctx.type_name(value)
    return mb.cast(x=value, dtype="int32", name=name) if kind == "bool" else mb.identity(x=value, name=name)


@pytest.mark.parametrize("case", [pytest.param(f"c{index}", id=str(case.id)) for index, case in enumerate(cases())])
def test_op(case: str, results: dict[str, tuple[Any, np.ndarray]]) -> None:
    got, want = results[case]
    if isinstance(got, Exception):
        raise got
    assert got.shape == want.shape
    scale = float(np.nan_to_num(np.abs(want.astype(np.float64)), posinf=0).max(initial=1))
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=2e-6 * scale)


def test_the_table_holds_the_core_ops() -> None:
    assert set(TABLE) - RICHER == set(CORE)
