"""The optional input `num_logits_to_keep`: a step that computes the logits of its last tokens alone.

A prompt needs only the logits after its last token, and the head of a small model takes a seventh of the products of a
prefill. The input is an int64 number, 0 by default, which keeps all tokens, as `logits_to_keep` does in transformers:

    hidden [B, S, H] -> Slice [:, -n:] -> head -> logits [B, n, V]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from moec.compiler.ir.program import Program
from moec.targets.common.arguments import rank
from moec.targets.onnx.context import Context
from moec.targets.onnx.lowerings import elementwise
from moec.targets.onnx.runner import NUM_LOGITS

aten = torch.ops.aten


def head_of(program: Program) -> tuple[fx.Node, ...]:
    """The nodes from the head to the logits, in order; empty unless each token's logits depend on its row alone.

    They are a linear whose input [B, S, H] nothing else uses, and elementwise ops with weights and numbers.
    """
    found: list[fx.Node] = []
    node = program.outputs()["logits"]
    while rank(node) == 3:
        found.append(node)
        if node.target is aten.linear.default:
            hidden = node.args[0]
            alone = isinstance(hidden, fx.Node) and hidden.op == "call_function" and len(hidden.users) == 1
            return tuple(reversed(found)) if alone else ()
        operands = [item for item in node.args if isinstance(item, fx.Node) and item.op != "get_attr"]
        if node.target not in (*elementwise.TABLE, aten._to_copy.default) or len(operands) != 1:
            return ()
        (node,) = operands
        if len(node.users) != 1:
            return ()
    return ()


def keep_last(ctx: Context, head: Sequence[fx.Node]) -> ir.Value:
    """Cut the input of `head` to the last tokens, before it is lowered, and return the new input of the model."""
    hidden = head[0].args[0]
    assert isinstance(hidden, fx.Node)
    count = ir.Value(name=NUM_LOGITS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    # An initializer of the same name as an input is the default value of that input.
    count.const_value = ir.Tensor(np.asarray(0, np.int64), name=NUM_LOGITS)
    # From -0, a slice keeps everything.
    start = ctx.op("Reshape", ctx.op("Neg", count), ctx.ints(1))
    kept = ctx.op("Slice", ctx.tensor(hidden), start, ctx.ints(sys.maxsize), ctx.ints(1))
    ctx.cut |= {hidden, *head}
    ctx.set(hidden, kept)
    return count
