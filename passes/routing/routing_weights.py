"""Proves from the router's ops that routing weights are sorted or not negative, so that passes can omit ops."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.compiler.ir.operands import operands
from moec.passes.rewriting import aten, is_call, last_axis, number

_NON_NEGATIVE = frozenset(
    {
        aten._softmax.default,
        aten.sigmoid.default,
        aten.exp.default,
        aten.relu.default,
        aten.softplus.default,
        aten.sqrt.default,
        aten.abs.default,
    }
)
"""Ops whose results are never negative."""
_OF_NON_NEGATIVE = frozenset(
    {
        aten._to_copy.default,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.add.Tensor,
        aten.sum.dim_IntList,
        aten.amax.default,
        aten.gather.default,
        aten.topk.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dims,
        aten.slice.Tensor,
        aten.index.Tensor,
        aten.cat.default,
        operator.getitem,
    }
)
"""Ops whose results are not negative if none of their operands is."""
_INCREASING = (aten.sigmoid.default, aten.exp.default, aten.relu.default, aten.softplus.default, aten.sqrt.default)


def non_negative(value: Any) -> bool:
    """Whether `value`, a node or a number, is provably not negative."""
    return _non_negative(value, {})


def _non_negative(value: Any, seen: dict[fx.Node, bool]) -> bool:
    if isinstance(value, list | tuple):
        return all(_non_negative(item, seen) for item in value)
    if not isinstance(value, fx.Node):
        plain = number(value)
        return plain is not None and plain >= 0
    if value not in seen:
        seen[value] = _result_non_negative(value, seen)
    return seen[value]


def _result_non_negative(node: fx.Node, seen: dict[fx.Node, bool]) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _NON_NEGATIVE:
        return True
    own = operands(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target is aten.clamp.default and own["min"] is not None and own["min"] >= 0:
        return True
    if node.target is aten.full.default:
        return _non_negative(own["fill_value"], seen)
    if node.target is aten.mul.Tensor and own["self"] is own["other"]:
        return True
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.where.self):
        return all(_non_negative(own[name], seen) for name in ("self", "other"))
    if node.target is operator.getitem and node.args[1] != 0:
        return False
    return node.target in _OF_NON_NEGATIVE and _non_negative(node.args[0], seen)


def descending(weights: fx.Node) -> bool:
    """Whether the weights of each row are provably in descending order, as those of a sorted top-k are."""
    source = _skip_increasing(weights)
    if is_call(source, operator.getitem) and source.args[1] == 0:
        return _sorts(source.args[0])
    if not is_call(source, aten.gather.default):
        return False
    chosen = source.args[2]
    if not (is_call(chosen, operator.getitem) and chosen.args[1] == 1 and _sorts(chosen.args[0])):
        return False
    # The weights are gathered from the sorted scores, or from an increasing function of them.
    ranked = chosen.args[0].args[0]
    return _skip_increasing(source.args[0]) is _skip_increasing(ranked)


def _sorts(node: Any) -> bool:
    if not is_call(node, aten.topk.default):
        return False
    own = operands(node)
    return own["largest"] and own["sorted"] and last_axis(own["self"], own["dim"])


def _skip_increasing(value: Any) -> Any:
    """The input of the chain of order-preserving ops that ends in `value`."""
    while isinstance(value, fx.Node) and value.op == "call_function":
        step = _STEPS.get(value.target)
        if step is None or not step(value):
            break
        value = value.args[0]
    return value


def _always(node: fx.Node) -> bool:  # noqa: ARG001
    return True


def _over_last_axis(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and last_axis(source, node.args[1])


def _scales_rows(node: fx.Node) -> bool:
    """Whether the other operand is a factor or divisor that is not negative and equal within each row."""
    factor = node.args[1]
    if not isinstance(factor, fx.Node):
        return non_negative(factor)
    value = factor.meta["val"]
    per_row = value.ndim == 0 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1)
    return per_row and non_negative(factor)


def _adds_number(node: fx.Node) -> bool:
    return number(node.args[1]) is not None


_STEPS: Mapping[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys((aten._to_copy.default, *_INCREASING), _always),
    aten._softmax.default: _over_last_axis,
    aten.mul.Tensor: _scales_rows,
    aten.div.Tensor: _scales_rows,
    aten.add.Tensor: _adds_number,
}
