"""Remove ops that do nothing at inference, so that later passes see one form of each computation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moec.compiler.ir.program import Program
from moec.passes.base import Pass, PassResult
from moec.passes.rewriting import Rewrite, aten, is_call, number, replace, tensor_shape

CHECKS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten._assert_async.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
"""Assertions that hold after tracing."""

COPIES = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.detach_.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
    }
)
"""Ops that return their argument unchanged."""

JOINS = frozenset({aten.concat.default, aten.concatenate.default})

_ALIASES = {
    "__and__": "bitwise_and",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    "__lshift__": "bitwise_left_shift",
    "__rshift__": "bitwise_right_shift",
    "absolute": "abs",
    "arctan2": "atan2",
    "clip": "clamp",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "subtract": "sub",
    "true_divide": "div",
}
"""Alias -> op; overloads of an alias correspond to the op's overloads of the same name."""


def _overloads(alias: str, op: str) -> Iterator[tuple[Any, Any]]:
    known = getattr(aten, op).overloads()
    # The overload for a shift by a number is Scalar in the alias and Tensor_Scalar in the op.
    renamed = {"Scalar": "Tensor_Scalar"} if "Scalar" not in known else {}
    for name in getattr(aten, alias).overloads():
        if (own := renamed.get(name, name)) in known:
            yield getattr(getattr(aten, alias), name), getattr(getattr(aten, op), own)


ALIASES = {alias: op for names in _ALIASES.items() for alias, op in _overloads(*names)}
"""The same as `_ALIASES`, by overload."""

CASTS_AS = frozenset({aten.type_as.default, aten.to.dtype, aten.to.other, aten.to.device})

RESHAPES = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})

SQUEEZES = frozenset({aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})

SAME_IF_SHAPE = frozenset(
    {
        aten._to_copy.default,
        aten.expand.default,
        aten.repeat.default,
        aten.slice.Tensor,
        *SQUEEZES,
        *RESHAPES,
    }
)
"""Ops that do nothing if shape and dtype of the result are those of the argument."""

NEUTRAL = {aten.mul.Tensor: 1.0, aten.div.Tensor: 1.0, aten.add.Tensor: 0.0, aten.sub.Tensor: 0.0}
"""Arithmetic op -> its neutral second operand."""

EVAL_DROPOUT = frozenset({aten.dropout.default, aten.feature_dropout.default})


@dataclass(frozen=True)
class Normalize(Pass):
    """Remove assertions, copies, casts to the same dtype and other no-ops; replace all variants of reshape by one.

    Memory layout has no meaning afterwards: `view` becomes `reshape`, and copies that only change strides are removed.

    ```
    %a = view(%x, [-1, 64]); %b = view(%a, [-1, 64]); %c = mul(%b, 1.0); %d = transpose(transpose(%c, 0, 1), 0, 1)
    %e = unsqueeze(squeeze(%d, 1), 1)
    ->
    %a = reshape(%x, [-1, 64])
    ```
    """

    name: ClassVar[str] = "normalize"

    def run(self, program: Program) -> PassResult:
        """See the class."""
        rewrite, modified = Rewrite(program), False
        for node in list(rewrite.graph.nodes):
            if node.op == "call_function":
                # After two reshapes are merged, the result may turn out to be a no-op.
                modified |= _erase_check(node) or _canonical_op(node) | _merge_reshapes(node) | _replace_by_source(node)
        return rewrite.result(modified=modified)


def _erase_check(node: fx.Node) -> bool:
    if node.target not in CHECKS or node.users:
        return False
    node.graph.erase_node(node)
    return True


def _canonical_op(node: fx.Node) -> bool:
    """Turn every cast into `aten._to_copy`, every concatenation into `aten.cat`, and aliases into their ops."""
    if node.target in ALIASES:
        node.target = ALIASES[node.target]
        return True
    if node.target in JOINS:
        node.target = aten.cat.default
        return True
    if node.target not in CASTS_AS:
        return False
    node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}
    return True


def _replace_by_source(node: fx.Node) -> bool:
    source = _source(node)
    if source is None:
        return False
    replace(node, source)
    return True


def _source(node: fx.Node) -> fx.Node | None:
    """The node of the same value that can replace `node`, or None."""
    argument = node.args[0] if node.args else None
    if node.target is aten.cat.default and isinstance(argument, list | tuple) and len(argument) == 1:
        argument = argument[0]
        return argument if isinstance(argument, fx.Node) else None
    if not isinstance(argument, fx.Node):
        return None
    if node.target in COPIES or (node.target in EVAL_DROPOUT and node.args[2] is False):
        return argument
    if node.target is aten.transpose.int:
        return _untransposed(node, argument)
    if node.target is aten.permute.default:
        order = node.args[1]
        return argument if isinstance(order, list | tuple) and list(order) == list(range(len(order))) else None
    if node.target is aten.unsqueeze.default and is_call(argument, *SQUEEZES):
        source = argument.args[0]  # the order of the elements does not change, so equal shapes suffice
        return source if isinstance(source, fx.Node) and _same_type(node, source) else None
    if _is_neutral(node) or node.target in SAME_IF_SHAPE:
        return argument if _same_type(node, argument) else None
    return None


def _untransposed(node: fx.Node, argument: fx.Node) -> fx.Node | None:
    """The source of two successive transpositions of the same axes, or None."""
    rank = node.meta["val"].ndim
    axes = {int(axis) % rank for axis in node.args[1:3]}  # type: ignore[arg-type]
    if len(axes) == 1:
        return argument
    if is_call(argument, aten.transpose.int) and {int(axis) % rank for axis in argument.args[1:3]} == axes:  # type: ignore[arg-type]
        source = argument.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def _is_neutral(node: fx.Node) -> bool:
    if node.target not in NEUTRAL or len(node.args) < 2:
        return False
    return number(node.args[1]) == NEUTRAL[node.target] and not node.kwargs.get("rounding_mode")


def _same_type(node: fx.Node, argument: fx.Node) -> bool:
    value, source = node.meta["val"], argument.meta["val"]
    if not isinstance(source, torch.Tensor) or value.dtype != source.dtype:
        return False
    return tensor_shape(node) == tensor_shape(argument)


def _merge_reshapes(node: fx.Node) -> bool:
    """Turn every reshape into `aten.reshape`, and a chain of them into a single one."""
    if node.target not in RESHAPES:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if is_call(source, *RESHAPES):
        node.args = (source.args[0], *node.args[1:])
    elif node.target is aten.reshape.default:
        return False
    node.target = aten.reshape.default
    return True
