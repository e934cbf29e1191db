"""Fusions of the lowering: what is joined, what is left alone, and that nothing is stored twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest
import torch

from moec.compiler.ir.program import RMS_NORM
from moec.targets.onnx.lowerings import fusions

aten = torch.ops.aten


def op_types(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(model.directory / "model.onnx").graph)


@pytest.mark.parametrize("flavor", ["default", "genai"])
def test_residual_sums_and_projections(flavor: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """Two layers of mixtral: every norm but the first follows a residual sum; q, k and v are one product."""
    model = lower_checkpoint(tiny_checkpoint("mixtral"), flavor=flavor, experts="kernel")
    found = op_types(model)
    assert found["SkipSimplifiedLayerNormalization"] == 4
    assert found["SimplifiedLayerNormalization"] == 1
    # q+k+v, output projection and router in each layer, and the head.
    assert found["MatMul"] == 7
    assert found["Add"] < 4
    stored = [value.name for value in ir.load(model.directory / "model.onnx").graph.initializers.values()]
    projections = [name for name in stored if "_proj" in str(name) and "self_attn" in str(name)]
    qkv = "+".join(f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert len(projections) == 4
    assert f"{qkv}.T" in projections


def test_portable_takes_standard_norms(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    found = op_types(lower_checkpoint(tiny_checkpoint("mixtral"), flavor="portable"))
    assert found["RMSNormalization"] == 5
    assert not found["SkipSimplifiedLayerNormalization"]


def norm_of_sum(shape: tuple[Any, ...], one_op: Any) -> Any:
    """`rms_norm(x0 + x1) ` where x1 has `shape`."""

    def arguments(d: Any) -> tuple[Any, ...]:
        return torch.ones(d.b, d.s, 8), torch.ones(
            [getattr(d, size) if isinstance(size, str) else size for size in shape]
        )

    program = one_op(aten.add.Tensor, arguments).program
    graph = program.copy_graph()
    (total,) = graph.find_nodes(op="call_function", target=aten.add.Tensor)
    with graph.inserting_after(total):
        norm = graph.call_function(RMS_NORM, (total, None, 1e-5))
    norm.meta = dict(total.meta)
    graph.output_node().args = ((norm,),)
    return program.replace(graph=graph)


@pytest.mark.parametrize(("shape", "fused"), [(("b", "s", 8), True), ((8,), False), (("b", 1, 8), False)])
def test_only_terms_of_the_shape_of_the_sum(shape: Any, fused: bool, one_op: Any) -> None:
    from moec.targets.onnx import lower
    from moec.targets.onnx.lowerings.table import onnx_dialect

    model, _ = lower.build(norm_of_sum(shape, one_op), onnx_dialect(contrib=True))
    found = [node.op_type for node in model.graph]
    assert ("SkipSimplifiedLayerNormalization" in found) is fused
    assert ("Add" in found) is not fused


def test_without_the_fusions_the_numbers_are_the_same(
    tiny_checkpoint: Any, lower_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    from moec.targets.onnx.lowerings import linear, norm

    tokens = np.random.default_rng(0).integers(3, 128, (2, 9))
    fused = lower_checkpoint(tiny_checkpoint("qwen2_moe")).runner.prefill(tokens)
    assert linear.joint_product is fusions.joint_product
    monkeypatch.setattr(linear, "joint_product", lambda *_: None)
    monkeypatch.setattr(norm, "skip_norm", lambda *_: None)
    plain = lower_checkpoint(tiny_checkpoint("qwen2_moe"), flavor="genai").runner.prefill(tokens)
    assert np.abs(fused - plain).max() <= 1e-5 * np.abs(plain).max()
