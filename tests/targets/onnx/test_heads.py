"""Attention whose operands have their heads side by side, without transpositions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.onnx import lower
from moec.targets.onnx.lowerings.table import onnx_dialect

aten = torch.ops.aten


def graph_of(model: Any) -> ir.Graph:
    return ir.load(model.directory / "model.onnx").graph


def nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def chain(value: Any) -> list[str]:
    """Op types from the node that makes `value` back to a product, along first inputs."""
    found: list[str] = []
    while (node := value.producer()) is not None:
        found.append(node.op_type)
        if node.op_type in ("Split", "MatMul"):
            break
        value = node.inputs[0]
    return found


@pytest.mark.parametrize(
    ("flavor", "kernel"), [("default", "Attention"), ("portable", "Attention"), ("genai", "GroupQueryAttention")]
)
def test_golden_graph(flavor: str, kernel: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """OLMoE, which normalizes query and key before it separates their heads."""
    graph = graph_of(lower_checkpoint(tiny_checkpoint("olmoe"), flavor=flavor))
    found = nodes(graph, kernel)
    norm = "RMSNormalization" if flavor == "portable" else "SimplifiedLayerNormalization"
    for node in found:
        query, key, value = node.inputs[:3]
        for operand in (query, key):
            assert chain(operand) == ["RotaryEmbedding", norm, "Split"]
        assert chain(value) == ["Split"]
        assert [use.node.op_type for use in node.outputs[0].uses()] == ["MatMul"]
    assert len(found) == 2
    assert len(nodes(graph, "Transpose")) == 1  # of the frequencies of the rotary embedding, once for all layers
    if flavor == "default":
        counts = [[node.attributes[name].value for name in ("q_num_heads", "kv_num_heads")] for node in found]
        assert counts == [[4, 2], [4, 2]]
    heads = sorted(node.attributes["num_heads"].value for node in nodes(graph, "RotaryEmbedding"))
    assert heads == [2, 2, 4, 4]


@pytest.mark.parametrize("flavor", ["default", "portable", "genai"])
@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe", "minimax_m2"])
def test_partial_rotation_and_norms_of_heads(
    family: str, flavor: str, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), flavor=flavor)
    graph = graph_of(model)
    for node in nodes(graph, "GroupQueryAttention" if flavor == "genai" else "Attention"):
        for operand in node.inputs[:2]:
            rotary = operand.producer()
            assert rotary.op_type == "RotaryEmbedding"
            part = rotary.attributes.get("rotary_embedding_dim")
            assert (part and part.value) == (None if family == "qwen3_moe" else 8)
            assert "Transpose" not in chain(operand)
    reference = ProgramRunner(model.program)
    ids = np.random.default_rng(1).integers(3, model.program.vocab_size, (2, 12))
    for step, start, stop in ((model.runner.prefill, 0, 10), (model.runner.decode, 10, 11)):
        want = (reference.decode if start else reference.prefill)(ids[:, start:stop])
        assert np.abs(step(ids[:, start:stop]) - want).max() <= 1e-5 * np.abs(want).max()


def test_heads_that_are_made_one_by_one_keep_their_axis(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """Latent attention joins a rotated part, the same for all heads, to the end of each head."""
    graph = graph_of(lower_checkpoint(tiny_checkpoint("deepseek_v3")))
    found = nodes(graph, "Attention")
    assert found
    for node in found:
        assert "q_num_heads" not in node.attributes
        assert node.inputs[0].producer().op_type == "Concat"
        assert [use.node.op_type for use in node.outputs[0].uses()] == ["Transpose"]


def test_other_columns_than_those_that_follow(tiny_checkpoint: Any, program_of: Any) -> None:
    """A rotation whose other columns are the first ones again is no partial rotation."""
    program = program_of(tiny_checkpoint("glm4_moe"))
    graph = program.copy_graph()
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        if node.args[1:3] == (3, 8):
            node.args = (node.args[0], 3, 0, 8, 1)
    model, _ = lower.build(program.replace(graph=graph), onnx_dialect(contrib=True))
    found = nodes(model.graph, "Attention")
    assert found
    for node in found:
        assert [operand.producer().op_type for operand in node.inputs[:2]] == ["Concat", "Concat"]
