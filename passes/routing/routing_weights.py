"""What the graph says about the routing weights of an experts node: whether they are sorted, and not negative.

Every finding is a proof from the ops of the router, so that a pass may leave out what it proves needless.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from moec.passes.rewriting import aten, is_call, last_axis, number

_COPIES = (
    aten._to_copy.default,
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.detach.default,
)
_NON_NEGATIVE = (
    aten.softmax.int,
    aten._softmax.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.relu.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.abs.default,
    aten.linalg_vector_norm.default,
)
"""Their results are not negative, whatever they are given."""
_OF_NON_NEGATIVE = (
    *_COPIES,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.gather.default,
    aten.topk.default,
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.cat.default,
    operator.getitem,
)
"""Their results are not negative if no tensor and no factor that they are given is."""
_ALONG_LAST = (aten.softmax.int, aten._softmax.default)
_INCREASING = (aten.sigmoid.default, aten.exp.default, aten.relu.default, aten.softplus.default, aten.sqrt.default)


def non_negative(value: Any) -> bool:
    """Whether no element of `value`, a node or a number, can be negative."""
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
    if node.target in (aten.clamp.default, aten.clamp_min.default) and (number(_argument(node, 1)) or -1.0) >= 0:
        return True
    if node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor):
        return all(_non_negative(argument, seen) for argument in node.args[:2])
    if node.target in (aten.masked_fill.Scalar, aten.where.ScalarOther):
        return _non_negative(node.args[0 if node.target is aten.masked_fill.Scalar else 1], seen) and _non_negative(
            node.args[2], seen
        )
    if node.target is operator.getitem and node.args[1] != 0:
        return False
    return node.target in _OF_NON_NEGATIVE and _non_negative(node.args[0], seen)


def descending(weights: fx.Node) -> bool:
    """Whether the slots of each row provably come with falling weights, as a sorted top-k hands them over."""
    source = _before_increasing(weights)
    if is_call(source, operator.getitem) and source.args[1] == 0:
        return _sorts(source.args[0])
    if not is_call(source, aten.gather.default):
        return False
    chosen = source.args[2]
    if not (is_call(chosen, operator.getitem) and chosen.args[1] == 1 and _sorts(chosen.args[0])):
        return False
    # Gathered from the scores that were sorted, or from what rises with them.
    ranked = chosen.args[0].args[0]
    return _before_increasing(source.args[0]) is _before_increasing(ranked)


def _sorts(node: Any) -> bool:
    if not is_call(node, aten.topk.default):
        return False
    _, _, axis, largest, ordered = [*node.args, *(-1, True, True)[len(node.args) - 2 :]][:5]
    return bool(largest) and bool(ordered) and last_axis(node.args[0], axis)


def _before_increasing(value: Any) -> Any:
    """The node that `value` is made of by steps which keep the order within each row."""
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
    """A factor or divisor that is not negative and the same for the whole row."""
    factor = node.args[1]
    if not isinstance(factor, fx.Node):
        return non_negative(factor)
    value = factor.meta["val"]
    per_row = value.ndim == 0 or (isinstance(value.shape[-1], int) and value.shape[-1] == 1)
    return per_row and non_negative(factor)


def _adds_number(node: fx.Node) -> bool:
    return number(node.args[1]) is not None


_STEPS: Mapping[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys((*_COPIES, *_INCREASING), _always),
    **dict.fromkeys(_ALONG_LAST, _over_last_axis),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar), _scales_rows),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _adds_number),
}


def _argument(node: fx.Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else None


def same_dtype(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether the value of `node` has the dtype."""
    have: torch.dtype = node.meta["val"].dtype
    return have == dtype
