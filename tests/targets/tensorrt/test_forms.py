"""Every form of the experts against the interpreter, by the model from which the engine is built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.ir.program import EXPERTS
from moec.compiler.ir.weights import Constant
from moec.targets.tensorrt.forms import ExpertShape, Form, choose, moved_bytes
from tests.support.checks import assert_recorded

FORMS = [Form.GATHER, Form.LOOP_IF, Form.DENSE]
LIMITS = {torch.float32: 1e-5, torch.float16: 6e-3}


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_every_form_computes_the_same(
    family: str, tiny_checkpoint: Any, program_of: Any, lower: Any, assert_same: Any
) -> None:
    program = program_of(tiny_checkpoint(family))
    for form in FORMS:
        model = lower(program, experts=form)
        assert model.lowered.facts["experts"] == form
        assert_same(model, LIMITS[torch.float32])


@pytest.mark.parametrize("attention", ["decomposed", "fused"])
def test_half_precision(
    attention: str, tiny_checkpoint: Any, program_of: Any, lower: Any, assert_same: Callable[..., None]
) -> None:
    program = program_of(tiny_checkpoint("mixtral"), torch.float16)
    model = lower(program, attention=attention)
    assert ("Attention" in model.lowered.facts["ops"]) is (attention == "fused")
    assert_same(model, LIMITS[torch.float16])


def test_older_operators(tiny_checkpoint: Any, program_of: Any, lower: Any, assert_same: Callable[..., None]) -> None:
    model = lower(program_of(tiny_checkpoint("mixtral")), opset=21, attention="fused")
    assert not {"RMSNormalization", "RotaryEmbedding", "Attention"} & set(model.lowered.facts["ops"])
    assert "Attention needs opset 23 or later" in model.lowered.rejections[0].reason
    assert_same(model, LIMITS[torch.float32])


def test_golden_model(golden_model: Path, program_of: Any, lower: Any) -> None:
    """Recorded logits of transformers in float32, and the tokens that it chose."""
    assert_recorded(lower(program_of(golden_model)).runner, golden_model, prompts=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_slot_of_weight_zero_is_dropped_even_if_its_expert_yields_nan(
    form: Form, tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    program = program_of(tiny_checkpoint("mixtral"))
    node = program.nodes(EXPERTS)[0]
    name = program.weights.resolve(str(node.args[3].target))
    broken = program.weights[name].read().clone()
    broken[0] = torch.nan
    graph = program.copy_graph()
    experts = graph.find_nodes(op="call_function", target=EXPERTS)[0]
    with graph.inserting_before(experts):
        index = experts.args[1]
        weights = experts.args[2]
        alive = graph.call_function(torch.ops.aten._to_copy.default, (index,), {"dtype": torch.bool})
        alive.meta = {"val": index.meta["val"].bool(), "module": "router"}
        kept = graph.call_function(torch.ops.moec.select.default, (weights, alive, False))
        kept.meta = {"val": weights.meta["val"], "module": "router"}
    experts.args = (*experts.args[:2], kept, *experts.args[3:])
    changed = program.replace(graph=graph, weights=program.weights.with_tensors({name: Constant(broken)}))
    model = lower(changed, experts=form)
    assert np.isfinite(model.runner.prefill(np.arange(3, 40)[None])).all()


def test_auto_counts_bytes() -> None:
    few, many = ExpertShape(8, 2, 1 << 20), ExpertShape(64, 2, 1 << 10)
    assert moved_bytes(Form.GATHER, few, 1) == 6 << 20
    assert moved_bytes(Form.LOOP_IF, few, 100) < moved_bytes(Form.GATHER, few, 100)
    assert choose(Form.AUTO, [few], 1, 128, dynamic=False) is Form.LOOP_IF
    assert choose(Form.AUTO, [many], 1, 4, dynamic=False) is Form.GATHER
    assert choose(Form.AUTO, [many], 1, 4, dynamic=True) is Form.LOOP_IF
    assert choose(Form.DENSE, [few], 1, 128, dynamic=True) is Form.DENSE
