"""Faults of experts, routers, shared experts, routing policies and pruning."""

from __future__ import annotations

from torch import Tensor, fx

from faults.edits import (
    applied,
    argument,
    aten,
    calls,
    chained,
    exchanged,
    in_experts,
    nth,
    operand_through,
    rewritten,
    rolled,
    skipped,
    through,
    weighted,
    where,
    with_argument,
    with_operands,
)
from faults.fault import Fault
from moec.compiler.ir.operands import Experts, Select
from moec.compiler.ir.program import EXPERTS, RMS_NORM, SELECT, Program
from moec.passes.experts.prune_experts import SelectedRows
from moec.passes.rewriting import Rewrite, call


def zero_expert(stack: Tensor) -> Tensor:
    stack[3] = 0
    return stack


def zero_row(stack: Tensor) -> Tensor:
    stack[5, 7] = 0
    return stack


def _norm_of_router(graph: fx.Graph) -> fx.Node:
    return calls(graph, RMS_NORM)[1]


def one_value(stack: Tensor) -> Tensor:
    stack[6, 1, 2] *= 1.01
    return stack


def next_expert(graph: fx.Graph, indices: fx.Node) -> fx.Node:
    """Expert e + 1 for expert e, and 0 for the last: (e + 1) - 8 * floor((e + 1) / 8)."""
    more = call(graph, aten.add.Tensor, indices, 1, like=indices)
    rounds = call(graph, aten.floor_divide.default, more, 8, like=indices)
    whole = call(graph, aten.mul.Tensor, rounds, 8, like=indices)
    return call(graph, aten.sub.Tensor, more, whole, like=indices)


def renormalised(graph: fx.Graph, weights: fx.Node) -> fx.Node:
    total = call(graph, aten.sum.dim_IntList, weights, [1], True, like=weights)
    return call(graph, aten.div.Tensor, weights, total, like=weights)


def without_shared_expert(state: Rewrite) -> None:
    """The sum of routed and shared experts becomes the routed experts alone."""
    total = next(user for user in calls(state.graph, EXPERTS)[0].users if user.target is aten.add.Tensor)
    total.replace_all_uses_with(calls(state.graph, EXPERTS)[0])


def policy_off(state: Rewrite) -> None:
    """All slots are kept: the experts get the weights before the policy."""
    node = calls(state.graph, SELECT)[0]
    node.replace_all_uses_with(Select.of(node).weights)


def policy_of_another_layer(state: Rewrite) -> None:
    """The threshold of layer 1 becomes that of layer 0, which is half of it."""
    graph = state.graph
    (bound,) = [node for node in graph.nodes if node.op == "call_function" and 0.4 in node.args]
    bound.args = tuple(0.2 if item == 0.4 else item for item in bound.args)


def expert_that_was_pruned(program: Program) -> Program:
    """Expert 0 of layer 0 has the weights of expert 1, which was removed."""
    changed = {}
    for node in Experts.of(program.nodes(EXPERTS)[0]).stacks.values():
        name = program.weights.resolve(str(node.target))
        kept = program.weights[name]
        assert isinstance(kept, SelectedRows)
        changed[name] = SelectedRows(kept.source, (1, *kept.indices[1:]))
    return program.replace(weights=program.weights.with_tensors(changed))


def expert_that_stays(program: Program) -> Program:
    """The router of layer 0 has the row of the removed expert in place of that of expert 2."""
    name = next(name for name in program.weight_names() if name.endswith("layers.0.mlp.gate.weight"))
    kept = program.weights[program.weights.resolve(name)]
    assert isinstance(kept, SelectedRows)
    rows = SelectedRows(kept.source, (kept.indices[0], 1, *kept.indices[2:]))
    return program.replace(weights=program.weights.with_tensors({program.weights.resolve(name): rows}))


def _uses_softmax(graph: fx.Graph) -> fx.Node:
    return calls(graph, aten._softmax.default)[0]


WEIGHTS, INDICES = argument(EXPERTS, "weights"), argument(EXPERTS, "indices")
GROUPS = where(aten.topk.default, lambda node: node.args[0].target is aten.sum.dim_IntList)

FAULTS = (
    Fault("experts", "gate and up exchanged", "mixtral", in_experts("gate_up_proj", lambda stack: stack.roll(48, 1))),
    Fault("experts", "gate and up taken for interleaved", "mixtral", with_operands(EXPERTS, interleaved=True)),
    Fault("experts", "interleaved gate and up taken for halves", "gpt_oss", with_operands(EXPERTS, interleaved=False)),
    Fault("experts", "GELU in place of SiLU", "mixtral", with_operands(EXPERTS, activation="gelu")),
    Fault("experts", "GELU by tanh in place of SiLU", "mixtral", with_operands(EXPERTS, activation="gelu_tanh")),
    Fault("experts", "alpha of the gate dropped", "gpt_oss", with_operands(EXPERTS, alpha=1.0)),
    Fault("experts", "limit of the gate dropped", "gpt_oss", with_operands(EXPERTS, limit=0.0)),
    Fault("experts", "limit of the gate twice as high", "gpt_oss", with_operands(EXPERTS, limit=14.0)),
    Fault("experts", "offset of up dropped", "gpt_oss", with_operands(EXPERTS, up_offset=0.0)),
    Fault("experts", "bias of the first projection dropped", "gpt_oss", with_operands(EXPERTS, gate_up_bias=None)),
    Fault("experts", "bias of the second projection dropped", "gpt_oss", with_operands(EXPERTS, down_bias=None)),
    Fault(
        "experts", "bias of the neighbouring expert", "gpt_oss", in_experts("down_bias", lambda stack: stack.roll(1, 0))
    ),
    Fault(
        "experts",
        "first projection of the neighbouring expert",
        "mixtral",
        in_experts("gate_up_proj", lambda stack: stack.roll(1, 0)),
    ),
    Fault(
        "experts",
        "second projection of the neighbouring expert",
        "mixtral",
        in_experts("down_proj", lambda stack: stack.roll(1, 0), layer=1),
    ),
    Fault("experts", "one expert is zero", "mixtral", in_experts("down_proj", zero_expert)),
    Fault("experts", "one row of one expert is zero", "mixtral", in_experts("gate_up_proj", zero_row)),
    Fault("experts", "one weight is off by 1 %", "mixtral", in_experts("down_proj", one_value)),
    Fault(
        "experts",
        "second projection of another layer",
        "mixtral",
        exchanged("0.mlp.experts.down_proj", "1.mlp.experts.down_proj"),
    ),
    Fault(
        "experts",
        "rows of the second projection reversed",
        "mixtral",
        in_experts("down_proj", lambda stack: stack.flip(1)),
    ),
    Fault("router", "expert index off by one", "mixtral", operand_through(EXPERTS, "indices", next_expert)),
    Fault("router", "weights of the slots exchanged", "mixtral", operand_through(EXPERTS, "weights", rolled(1, 2, 1))),
    Fault("router", "one expert per token less", "mixtral", operand_through(EXPERTS, "weights", weighted(1, 0))),
    Fault(
        "router",
        "all slots weigh the same",
        "mixtral",
        operand_through(EXPERTS, "weights", chained(applied(aten.mul.Tensor, 0.0), applied(aten.add.Tensor, 0.5))),
    ),
    Fault("router", "the smallest scores chosen", "mixtral", with_argument(nth(aten.topk.default), 3, False)),
    Fault(
        "router",
        "weights not renormalised",
        "qwen3_moe",
        skipped(where(aten.div.Tensor, lambda node: node.args[1].target is aten.sum.dim_IntList)),
    ),
    Fault(
        "router", "weights renormalised where they are not", "olmoe", operand_through(EXPERTS, "weights", renormalised)
    ),
    Fault("router", "softmax twice", "olmoe", through(_uses_softmax, applied(aten._softmax.default, 1, False))),
    Fault(
        "router",
        "softmax in place of sigmoid",
        "deepseek_v3",
        operand_through(EXPERTS, "weights", applied(aten._softmax.default, 1, False)),
    ),
    Fault(
        "router",
        "scaling factor dropped",
        "deepseek_v3",
        skipped(where(aten.mul.Tensor, lambda node: node.args[1] == 2.5)),
    ),
    Fault(
        "router",
        "selection bias dropped",
        "deepseek_v3",
        skipped(where(aten.add.Tensor, lambda node: "correction_bias" in str(node.args[1]))),
    ),
    Fault(
        "router",
        "selection bias joins the weights",
        "deepseek_v3",
        with_argument(
            nth(aten.gather.default),
            0,
            lambda scores: next(user for user in scores.users if user.target is aten.add.Tensor),
        ),
    ),
    Fault("router", "groups ranked by their smallest sum", "deepseek_v3", with_argument(GROUPS, 3, False)),
    Fault(
        "router",
        "bias dropped",
        "gpt_oss",
        with_argument(where(aten.linear.default, lambda node: "router" in str(node.args[1])), 2, None),
    ),
    Fault(
        "router", "weights of another layer's router", "mixtral", exchanged("0.mlp.gate.weight", "1.mlp.gate.weight")
    ),
    Fault(
        "router",
        "jitter threshold twice as high",
        "phimoe",
        with_argument(where(aten.full.default, lambda node: node.args[1] == 0.02), 1, 0.04),
    ),
    Fault("router", "reads the hidden states before the norm", "mixtral", skipped(_norm_of_router)),
    Fault("shared expert", "dropped", "qwen2_moe", rewritten(without_shared_expert)),
    Fault(
        "shared expert",
        "gate dropped",
        "qwen2_moe",
        skipped(where(aten.mul.Tensor, lambda node: node.args[0].target is aten.sigmoid.default), argument=1),
    ),
    Fault(
        "shared expert",
        "of another layer",
        "qwen2_moe",
        exchanged("1.mlp.shared_expert.up_proj.weight", "2.mlp.shared_expert.up_proj.weight"),
    ),
    Fault(
        "routing policy",
        "drops the largest slot",
        "routed",
        operand_through(SELECT, "keep", lambda graph, keep: call(graph, aten.logical_not.default, keep, like=keep)),
    ),
    Fault("routing policy", "ignored", "routed", rewritten(policy_off)),
    Fault("routing policy", "threshold of another layer", "routed", rewritten(policy_of_another_layer)),
    Fault("routing policy", "kept weights not renormalised", "routed", with_operands(SELECT, renormalize=False)),
    Fault("pruning", "an expert that was pruned stays in place of another", "pruned", expert_that_was_pruned),
    Fault("pruning", "the router still has the row of a pruned expert", "pruned", expert_that_stays),
)
