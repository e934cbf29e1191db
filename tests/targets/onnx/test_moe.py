"""The expert kernels: what ONNX Runtime does wrong, that the lowering does not meet it, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from moec.compiler.ir.program import EXPERTS, SELECT

EXPERT_COUNT, HIDDEN, INNER, TOP_K = 4, 8, 6, 2


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape, dtype=np.float32)


def experts_arguments(d: Any) -> tuple[Any, ...]:
    """Unsorted distinct experts, weights that do not add up to one, one dropped slot."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(EXPERT_COUNT, generator=generator)[:TOP_K] for _ in range(d.b)])
    weights = torch.rand(d.b, TOP_K, generator=generator) + 0.1
    weights[0, 0] = 0
    up, down = (torch.from_numpy(random(*shape)) for shape in ((EXPERT_COUNT, 2 * INNER, HIDDEN), (4, HIDDEN, INNER)))
    plain = ("silu", True, False, False, 1.0, 0.0, 0.0)
    return (
        torch.randn(d.b, HIDDEN, generator=generator),
        indices,
        weights,
        d.weight(up),
        None,
        d.weight(down),
        None,
        *plain,
    )


def with_gate(*gate: Any, bias: bool = False) -> Callable[[Any], tuple[Any, ...]]:
    """`experts_arguments` with (activation, gated, interleaved, transposed, alpha, limit, up_offset, ...) and biases.

    No stack is transposed any more when a target sees it.
    """

    def arguments(d: Any) -> tuple[Any, ...]:
        values = list(experts_arguments(d))
        width = 2 * INNER if gate[1] else INNER
        up, down = random(EXPERT_COUNT, width, HIDDEN), random(EXPERT_COUNT, HIDDEN, INNER, seed=1)
        values[3], values[5] = d.weight(torch.from_numpy(up)), d.weight(torch.from_numpy(down))
        if bias:
            values[4] = d.weight(torch.from_numpy(random(EXPERT_COUNT, width, seed=2)))
            values[6] = d.weight(torch.from_numpy(random(EXPERT_COUNT, HIDDEN, seed=3)))
        return *values[:7], *gate

    return arguments


GATES = {
    "silu": ("silu", True, False, False, 1.0, 0.0, 0.0),
    "silu-interleaved": ("silu", True, True, False, 1.0, 0.0, 0.0),
    "gpt-oss": ("silu", True, True, False, 1.702, 0.7, 1.0),
    "limit-concatenated": ("silu", True, False, False, 1.0, 0.5, 0.0),
    "limit-activated": ("silu", True, False, False, 1.0, 0.3, 0.0, True),
    "gelu": ("gelu", True, False, False, 1.0, 0.0, 0.0),
    "gelu-tanh": ("gelu_tanh", True, False, False, 1.0, 0.0, 0.0),
    "plain-relu": ("relu", False, False, False, 1.0, 0.0, 0.0),
    "plain-relu2": ("relu2", False, False, False, 1.0, 0.0, 0.0),
    "plain-silu": ("silu", False, False, False, 1.0, 0.0, 0.0),
    "plain-gelu": ("gelu", False, False, False, 1.0, 0.0, 0.0),
    "plain-sigmoid": ("sigmoid", False, False, False, 1.0, 0.0, 0.0),
    "plain-tanh": ("tanh", False, False, False, 1.0, 0.0, 0.0),
    "plain-identity": ("identity", False, False, False, 1.0, 0.0, 0.0),
}
KERNEL = {"silu", "silu-interleaved", "gpt-oss", "limit-concatenated"}
KERNEL |= {"plain-relu", "plain-silu", "plain-identity"}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("contrib", [True, False], ids=["default", "portable"])
@pytest.mark.parametrize("name", GATES)
def test_experts(name: str, contrib: bool, bias: bool, check_op: Any) -> None:
    session = check_op(EXPERTS, with_gate(*GATES[name], bias=bias), contrib=contrib)
    in_kernel = contrib and name in KERNEL
    assert ("MoE" in session.op_types) == in_kernel
    reasons = [rejection.reason for rejection in session.context.rejections]
    assert bool(reasons) == (contrib and not in_kernel)
    said = (
        "but this model clamps its output"
        if name == "limit-activated"
        else name.removeprefix("plain-").replace("-", "_")
    )
    assert all(said in reason for reason in reasons)


def test_an_expert_that_is_not_used_may_yield_nan(check_op: Any) -> None:
    def arguments(d: Any) -> tuple[Any, ...]:
        values = list(experts_arguments(d))
        values[1] = torch.tensor([[0, 1]]).repeat(d.b, 1)
        values[2] = torch.tensor([[0.0, 0.7]]).repeat(d.b, 1)
        values[3].value[0] = torch.nan
        return tuple(values)

    for contrib in (True, False):
        check_op(EXPERTS, arguments, contrib=contrib)


def test_select(check_op: Any) -> None:
    def arguments(d: Any) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(d.b)
        weights = torch.rand(d.b, 4, generator=generator)
        keep = torch.rand(d.b, 4, generator=generator) > 0.6
        weights[0] = 0
        return weights, keep, True

    check_op(SELECT, arguments)
    check_op(SELECT, lambda d: (*arguments(d)[:2], False))


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_the_lowering_is_immune(family: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    """The MoE nodes of a model stand in the very situation of the fault, and are right."""
    model = lower_checkpoint(tiny_checkpoint(family), experts="kernel")
    graph = onnx.load(model.directory / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MoE"]
    assert len(nodes) == len(model.program.layers)
    consumers = [name for node in graph.node for name in node.input]
    outputs = {output.name for output in graph.output}
    situation = [
        node
        for node in nodes
        if node.output[0] not in outputs and node.input[0] in {o for n in graph.node for o in n.output}
    ]
    assert situation == nodes
    assert all(consumers.count(node.output[0]) == 1 for node in nodes)
    for node in nodes:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes["normalize_routing_weights"] == 1


def test_rejection_of_an_activation_without_kernel(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint("gemma4_text"))
    assert [rejection.where for rejection in model.lowered.rejections] == [
        layer.module for layer in model.program.layers
    ]
    assert {rejection.reason for rejection in model.lowered.rejections} == {
        "the kernel has no gated gelu_tanh: each expert runs as two matrix products"
    }


def test_experts_are_read_back(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    from moec.targets.onnx.target import OnnxTarget

    for family, experts in (("olmoe", "kernel"), ("gpt_oss", "kernel"), ("gpt_oss", "grouped")):
        model = lower_checkpoint(tiny_checkpoint(family), experts=experts)
        stored = OnnxTarget().stored_weights(model.directory)
        nodes = [node for node in model.program.graph.nodes if node.name in {x.node for x in model.program.layers}]
        names = {argument.target for node in nodes for argument in node.args[3:] if isinstance(argument, torch.fx.Node)}
        assert set(stored) == {*names, "model.embed_tokens.weight"}
        for name, weight in stored.items():
            want = model.program.weights.read(name)
            for index in range(want.shape[0]):
                np.testing.assert_array_equal(weight.values(index, index + 1)[0], want[index].numpy())


def test_reference_of_the_contract() -> None:
    """The comparison above is against the op itself; this pins the op."""
    hidden = torch.ones(1, 2)
    eye = torch.eye(2)[None]
    out = torch.ops.moec.experts(
        hidden,
        torch.tensor([[0]]),
        torch.tensor([[0.5]]),
        eye,
        None,
        eye,
        None,
        "identity",
        False,
        False,
        False,
        1,
        0,
        0,
    )
    assert out.tolist() == [[0.5, 0.5]]
