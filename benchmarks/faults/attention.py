"""Faults of attention, its mask, its cache, rotary embedding and the indexer."""

from __future__ import annotations

import torch
from torch import fx

from faults.edits import (
    applied,
    aten,
    calls,
    exchanged,
    nth,
    operand_through,
    placeholder,
    rewritten,
    rolled,
    skipped,
    through,
    where,
    with_argument,
    with_operands,
    with_weight,
)
from faults.fault import Change, Fault
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, INDEXER, ROTARY, Program
from moec.passes.rewriting import Rewrite, call


def positions_late_in_decode(state: Rewrite) -> None:
    """Add 1 to the positions of every step after the first: 1 if the first new slot is not 0."""
    graph = state.graph
    node = placeholder("position_ids")(graph)
    slot = placeholder("cache_position")(graph)
    users = list(node.users)
    last = [item for item in graph.nodes if item.op == "placeholder"][-1]
    with graph.inserting_before(last.next):
        first = call(graph, aten.slice.Tensor, slot, 0, 0, 1, 1, like=node)
        zero = call(graph, aten.sub.Tensor, first, first, like=node)
        later = call(graph, aten.gt.Tensor, first, zero, like=node)
        offset = call(graph, aten._to_copy.default, later, like=node, dtype=torch.int64)
        new = call(graph, aten.add.Tensor, node, offset, like=node)
    for user in users:
        user.replace_input_with(node, new)


def one_slot_late(graph: fx.Graph, key: fx.Node) -> fx.Node:
    """The first of the new keys twice, and the last one not at all."""
    first = call(graph, aten.slice.Tensor, key, 2, 0, 1, 1, like=key)
    rest = call(graph, aten.slice.Tensor, key, 2, 0, -1, 1, like=key)
    return call(graph, aten.cat.default, [first, rest], 2, like=key)


def caches_of_two_layers(state: Rewrite) -> None:
    """Layer 1 reads the keys that layer 0 wrote in earlier steps."""
    first, second = (Attention.of(node) for node in calls(state.graph, ATTENTION)[:2])
    node = calls(state.graph, ATTENTION)[1]
    node.replace_input_with(second.past_key, first.past_key)


def selection_of_another_layer(state: Rewrite) -> None:
    """Layer 1 attends to the tokens that the indexer of layer 0 selects."""
    first, second = calls(state.graph, ATTENTION)[:2]
    second.replace_input_with(Attention.of(second).selected, Attention.of(first).selected)


def _factor(graph: fx.Graph, op: object) -> fx.Node:
    """The product that scales the table of `op` (cosines or sines) by the attention factor of YaRN."""
    return next(iter(calls(graph, op)[0].users))


def tables(change: Change, *more: Change) -> Change:
    """Several changes, one after the other."""

    def put(program: Program) -> Program:
        for item in (change, *more):
            program = item(program)
        return program

    return put


def evens_first(graph: fx.Graph, node: fx.Node) -> fx.Node:
    evens = call(graph, aten.slice.Tensor, node, 3, 0, 2**63 - 1, 2, like=node)
    odds = call(graph, aten.slice.Tensor, node, 3, 1, 2**63 - 1, 2, like=node)
    return call(graph, aten.cat.default, [evens, odds], 3, like=node)


SWAPPED_HALVES = rolled(3, 16, 8)
GROWING = ("onnx", "tensorrt")
"""Targets whose caches are operands like any other; those of the other targets are written in place."""

FAULTS = (
    Fault(
        "mask",
        "a token sees the next one",
        "mixtral",
        operand_through(ATTENTION, "cache_position", applied(aten.add.Tensor, 1)),
    ),
    Fault(
        "mask",
        "a token does not see itself",
        "mixtral",
        operand_through(ATTENTION, "cache_position", applied(aten.sub.Tensor, 1)),
    ),
    Fault("mask", "window one longer", "gpt_oss", with_operands(ATTENTION, window=13)),
    Fault("mask", "window one shorter", "gpt_oss", with_operands(ATTENTION, window=11)),
    Fault("mask", "window dropped", "gpt_oss", with_operands(ATTENTION, kind="causal", window=0)),
    Fault("mask", "window where attention is full", "gpt_oss", with_operands(ATTENTION, 1, kind="sliding", window=12)),
    Fault("mask", "chunk one longer", "llama4", with_operands(ATTENTION, window=17)),
    Fault("mask", "chunk one shorter", "llama4", with_operands(ATTENTION, window=15)),
    Fault("mask", "a window in place of a chunk", "llama4", with_operands(ATTENTION, kind="sliding")),
    Fault(
        "mask",
        "padded tokens leak into attention",
        "mixtral",
        with_operands(ATTENTION, None, attention_mask=None),
        targets=("onnx", "tensorrt"),
    ),
    Fault(
        "mask",
        "padded tokens leak into one layer",
        "qwen3_moe",
        with_operands(ATTENTION, 2, attention_mask=None),
        targets=("onnx", "tensorrt"),
    ),
    Fault("attention", "sinks dropped", "gpt_oss", with_operands(ATTENTION, sinks=None)),
    Fault("attention", "sinks of another layer", "gpt_oss", exchanged("0.self_attn.sinks", "2.self_attn.sinks")),
    Fault("attention", "logits not scaled", "mixtral", with_operands(ATTENTION, scale=1.0)),
    Fault("attention", "a softcap where there is none", "mixtral", with_operands(ATTENTION, softcap=5.0)),
    Fault(
        "attention",
        "key and value exchanged",
        "mixtral",
        with_operands(ATTENTION, key=lambda own: own.value, value=lambda own: own.key),
    ),
    Fault("attention", "key heads in another order", "mixtral", operand_through(ATTENTION, "key", rolled(1, 2, 1))),
    Fault("attention", "query heads in another order", "mixtral", operand_through(ATTENTION, "query", rolled(1, 4, 1))),
    Fault(
        "attention",
        "query norm dropped",
        "qwen3_moe",
        skipped(where(torch.ops.moec.rms_norm.default, lambda node: "q_norm" in str(node.args[1]))),
    ),
    Fault(
        "attention",
        "query bias dropped",
        "qwen2_moe",
        with_argument(where(aten.linear.default, lambda node: "q_proj" in str(node.args[1])), 2, None),
    ),
    Fault(
        "attention",
        "output projection of another layer",
        "mixtral",
        exchanged("0.self_attn.o_proj.weight", "1.self_attn.o_proj.weight"),
    ),
    Fault(
        "attention",
        "rotated part of latent keys exchanged with the rest",
        "deepseek_v3",
        operand_through(ATTENTION, "key", rolled(3, 28, 12)),
    ),
    Fault(
        "cache",
        "past keys are zero",
        "mixtral",
        operand_through(ATTENTION, "past_key", applied(aten.mul.Tensor, 0.0), index=1),
        targets=GROWING,
    ),
    Fault(
        "cache",
        "past values are zero",
        "mixtral",
        operand_through(ATTENTION, "past_value", applied(aten.mul.Tensor, 0.0)),
        targets=GROWING,
    ),
    Fault("cache", "past keys of another layer", "mixtral", rewritten(caches_of_two_layers), targets=GROWING),
    Fault("cache", "new keys written one slot late", "mixtral", operand_through(ATTENTION, "key", one_slot_late)),
    Fault("positions", "one too high in decode", "mixtral", rewritten(positions_late_in_decode)),
    Fault("positions", "all 0", "mixtral", through(placeholder("position_ids"), applied(aten.mul.Tensor, 0))),
    Fault("positions", "counted twice", "mixtral", through(placeholder("position_ids"), applied(aten.mul.Tensor, 2))),
    Fault("rotary", "halves exchanged", "mixtral", operand_through(ROTARY, "x", SWAPPED_HALVES)),
    Fault(
        "rotary",
        "turned the wrong way",
        "gpt_oss",
        through(lambda graph: calls(graph, aten.sin.default)[0], applied(aten.neg.default)),
    ),
    Fault("rotary", "keys not rotated", "mixtral", skipped(lambda graph: calls(graph, ROTARY)[1])),
    Fault(
        "rotary",
        "interleaved pairs taken for halves",
        "mixtral",
        operand_through(ROTARY, "x", evens_first),
    ),
    Fault(
        "rotary",
        "attention factor of YaRN dropped",
        "gpt_oss",
        tables(
            skipped(lambda graph: _factor(graph, aten.cos.default)),
            skipped(lambda graph: _factor(graph, aten.sin.default)),
        ),
    ),
    Fault("rotary", "base frequency twice as high", "mixtral", with_weight("inv_freq", lambda value: value * 2)),
    Fault("rotary", "frequencies moved by one", "mixtral", with_weight("inv_freq", lambda value: value.roll(1))),
    Fault(
        "rotary",
        "scaling beyond the original length dropped",
        "longrope",
        tables(skipped(nth(aten.where.self), argument=2), skipped(nth(aten.where.self), argument=2)),
    ),
    Fault(
        "rotary",
        "scaling begins one token late",
        "longrope",
        with_argument(where(aten.full.default, lambda node: node.args[1] == 24), 1, 25),
    ),
    Fault(
        "rotary",
        "scaling below the original length too",
        "longrope",
        tables(skipped(nth(aten.where.self), argument=1), skipped(nth(aten.where.self), argument=1)),
    ),
    Fault("indexer", "selects one token less", "glm_moe_dsa", with_operands(INDEXER, top_k=15)),
    Fault("indexer", "selects one token more", "glm_moe_dsa", with_operands(INDEXER, top_k=17)),
    Fault("indexer", "attention ignores the selection", "glm_moe_dsa", with_operands(ATTENTION, selected=None)),
    Fault("indexer", "selection of another layer", "glm_moe_dsa", rewritten(selection_of_another_layer)),
    Fault(
        "indexer",
        "weights of the heads with the wrong sign",
        "glm_moe_dsa",
        operand_through(INDEXER, "weights", applied(aten.neg.default)),
    ),
    Fault(
        "indexer",
        "past keys are zero",
        "glm_moe_dsa",
        operand_through(INDEXER, "past_key", applied(aten.mul.Tensor, 0.0)),
        targets=GROWING,
    ),
)
