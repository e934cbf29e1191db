"""Whether an expert that no token uses costs anything: the experts that one token computes, counted in products."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from moec.compiler.foreign.model import Cost, Unseen
from moec.compiler.ir.operands import Experts
from moec.compiler.ir.program import EXPERTS, Program
from moec.quantize.tensor_classes import EMBEDDING
from moec.targets.model_files import Product

NEAR = 0.25
"""Experts by which a count may be off, since a part of the model may happen to have the shape of an expert."""


def computed_experts(products: Iterable[Product], program: Program) -> float:
    """Experts that are computed in a layer, the mean over the MoE layers.

    Products count if they have the widths of an expert's. Other weights of the model with such widths, such as those of
    a shared expert, are computed once, and are subtracted.

    Args:
        products: Every product of one token.
        program: The checkpoint's Program.
    """
    shapes = set[tuple[int, int]]()
    for layer in program.layers:
        for width in (layer.intermediate_size, 2 * layer.intermediate_size):
            shapes |= {(layer.hidden_size, width), (width, layer.hidden_size)}
    work = sum(own.rows * own.inner * own.outer for own in products if (own.inner, own.outer) in shapes)
    held = {program.weights.resolve(str(stack.target)) for node in program.nodes(EXPERTS) for stack in _stacks(node)}
    tables = {node.args[0] for node in program.nodes(EMBEDDING)}
    for node in program.graph.find_nodes(op="get_attr"):
        shape = tuple(node.meta["val"].shape)
        if shape in shapes and program.weights.resolve(str(node.target)) not in held and node not in tables:
            work -= math.prod(shape)
    return max(0.0, work / sum(_weights_of_one(node) for node in program.nodes(EXPERTS)))


def per_layer(program: Program) -> tuple[float, float]:
    """Experts that a token chooses in a layer, and experts that there are, the means over the layers."""
    layers = program.layers
    return sum(own.top_k for own in layers) / len(layers), sum(own.num_experts for own in layers) / len(layers)


def _stacks(node: Any) -> list[Any]:
    return [stack for stack in Experts.of(node).stacks.values() if stack.op == "get_attr"]


def _weights_of_one(node: Any) -> int:
    """Values in the matrices of one expert."""
    shapes = [tuple(stack.meta["val"].shape) for stack in Experts.of(node).stacks.values()]
    return sum(math.prod(shape[1:]) for shape in shapes if len(shape) == 3)


def sentence(cost: Cost | Unseen, program: Program) -> str:
    """What an unused expert costs, in one sentence."""
    if isinstance(cost, Unseen):
        return f"not known: {cost.reason}"
    chosen, total = per_layer(program)
    counted = f"one token computes {cost.computed:.3g} of {total:.3g} experts in a layer and chooses {chosen:.3g}"
    if cost.computed < 1 - NEAR:
        return "not known: no product with the widths of an expert was found in a profile"
    if cost.computed <= chosen + NEAR:
        return f"nothing: {counted} ({cost.read})"
    if cost.computed >= total - NEAR:
        return f"as much as one that is used: {counted} ({cost.read})"
    return f"something: {counted} ({cost.read})"
