"""The specification of the IR: the ops that a graph may have at each stage, and their meaning.

```
CAPTURED   what torch.export traces: any op of aten, and the semantic ops of moec
NORMAL     the semantic ops recognised (moec::rms_norm, moec::rotary), no complex numbers, experts in one layout
CORE       only the ops of this file, which a target lowers
STATIC     CORE with some axes fixed, as a target needs it (moec.compiler.ir.specialise)
```

At CORE every call has all its arguments: positional ones are in `args`, in the order of the op's schema and with its
defaults filled in; of the keyword-only ones only those named here are left. Operands of arithmetic, comparisons and
`where` have the dtype in which the op computes, so a target never promotes. Only the ops in `NUMBERS` take a number in
place of a tensor; elsewhere it is a `full` without axes.

`moec.passes.decompose` brings a graph to CORE. An op that has no rule there and is not listed here stays unchanged: a
target may lower it, and other targets refuse the model. These tables define the ops; those of the targets, with the
same keys, say how a runtime calls them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from moec.compiler.ir.indexer import INDEXER
from moec.compiler.ir.ops import ATTENTION, EXPERTS, RMS_NORM, ROTARY, SELECT
from moec.compiler.ir.recurrences import CAUSAL_CONV, LINEAR_ATTENTION

aten = torch.ops.aten

ELEMENTWISE: Mapping[Any, str] = {
    aten.neg.default: "-x",
    aten.abs.default: "|x|",
    aten.exp.default: "e to the x",
    aten.log.default: "natural logarithm",
    aten.sqrt.default: "square root",
    aten.rsqrt.default: "1 / square root",
    aten.reciprocal.default: "1 / x",
    aten.floor.default: "largest whole number that is not above x",
    aten.ceil.default: "smallest whole number that is not below x",
    aten.round.default: "nearest whole number; halves go to the even one",
    aten.sign.default: "-1, 0 or 1",
    aten.cos.default: "cosine",
    aten.sin.default: "sine",
    aten.tanh.default: "hyperbolic tangent",
    aten.sigmoid.default: "1 / (1 + exp(-x))",
    aten.relu.default: "max(x, 0)",
    aten.silu.default: "x * sigmoid(x)",
    aten.gelu.default: "x * Phi(x); with approximate='tanh' by the tanh formula",
    aten.softplus.default: "log(1 + exp(x)); beta is 1 and the threshold 20",
    aten.logical_not.default: "not x, of bool",
    aten._to_copy.default: "x in the dtype `dtype`",
    aten.clamp.default: "x between the numbers min and max; None is no bound",
}
"""One tensor in, one of the same shape out."""

BINARY: Mapping[Any, str] = {
    aten.add.Tensor: "self + other",
    aten.sub.Tensor: "self - other",
    aten.mul.Tensor: "self * other",
    aten.div.Tensor: "self / other, of floats",
    aten.floor_divide.default: "largest whole number that is not above self / other",
    aten.maximum.default: "the larger one",
    aten.minimum.default: "the smaller one",
    aten.pow.Tensor_Tensor: "self to the other",
    aten.eq.Tensor: "self == other, bool",
    aten.lt.Tensor: "self < other, bool",
    aten.le.Tensor: "self <= other, bool",
    aten.gt.Tensor: "self > other, bool",
    aten.ge.Tensor: "self >= other, bool",
    aten.logical_and.default: "self and other, of bool",
    aten.logical_or.default: "self or other, of bool",
}
"""Two tensors that broadcast against each other."""

NUMBERS = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.floor_divide.default})
"""Of `BINARY`: either operand may be a Python number."""

SELECTION: Mapping[Any, str] = {
    aten.where.self: "self where the condition holds, else other; all three broadcast",
    aten.embedding.default: "rows of a matrix by index",
    aten.index.Tensor: "entries along one axis by an integer tensor of any rank; the other indices are None",
    aten.gather.default: "one entry along an axis for each index of a tensor of the same rank",
    aten.scatter.src: "self with entries along an axis replaced; indices are distinct",
}

REDUCTIONS: Mapping[Any, str] = {
    aten.sum.dim_IntList: "sum over the axes `dim`",
    aten.mean.dim: "mean over the axes `dim`",
    aten.amax.default: "largest value over the axes `dim`",
    aten.amin.default: "smallest value over the axes `dim`",
    aten.argmax.default: "index of the first largest value along the axis `dim`, int64",
    aten._softmax.default: "softmax along the axis `dim`",
    aten.cumsum.default: "cumulative sum along the axis `dim`",
    aten.topk.default: "values and int64 indices of the k largest (or smallest) along the axis `dim`, sorted",
}

SHAPES: Mapping[Any, str] = {
    aten.reshape.default: "the same elements in another shape",
    aten.permute.default: "axes in another order",
    aten.unsqueeze.default: "a new axis of size 1",
    aten.squeeze.dims: "without the axes `dim`, which have size 1",
    aten.expand.default: "axes of size 1 repeated without a copy; -1 keeps a size",
    aten.repeat.default: "the whole repeated along each axis",
    aten.slice.Tensor: "every `step`th element of an axis from `start` to `end`",
    aten.select.int: "one element of an axis, which is removed",
    aten.cat.default: "tensors one after the other along an axis",
    aten.split_with_sizes.default: "pieces of an axis, of the given sizes",
    aten.constant_pad_nd.default: "a number around the last axes; pads come in pairs, the last axis first",
    aten.full.default: "a shape filled with a number, in the dtype `dtype`",
    aten.arange.start_step: "start, start + step, ... below end, in the dtype `dtype`",
}

PRODUCTS: Mapping[Any, str] = {
    aten.linear.default: "x @ weight.T + bias",
    aten.matmul.default: "matrix product over the last two axes of operands of rank 2 or more; the others broadcast",
    aten.conv1d.default: "convolution [B, C, S] with weight [O, C / groups, K]",
    aten.layer_norm.default: "layer norm over the last axes (arXiv 1607.06450)",
}

SEMANTIC: Mapping[Any, str] = {
    EXPERTS: "the experts of a layer; a slot whose weight is 0 contributes nothing",
    SELECT: "the routing weights that a policy keeps, renormalised or not",
    ATTENTION: "attention over a cache to which this step's keys and values are appended",
    INDEXER: "the tokens that sparse attention attends to, selected by scores of an indexer (arXiv 2512.02556)",
    LINEAR_ATTENTION: "a scan over the tokens with a state of one matrix per head (arXiv 2412.06464 and others)",
    CAUSAL_CONV: "a convolution of each channel over its last inputs, which are a state",
    RMS_NORM: "root mean square norm over the last axis (arXiv 1910.07467)",
    ROTARY: "rotation of halves of the last axis by tables of cosines and sines (arXiv 2104.09864)",
}
"""Defined exactly by their references in `moec.compiler.ir.ops`, `experts`, `indexer` and `recurrences`."""

SIZES: Mapping[Any, str] = {
    aten.sym_size.int: "a size of a tensor",
    operator.getitem: "one of several results",
    operator.add: "sum of sizes",
    operator.sub: "difference of sizes",
    operator.mul: "product of sizes",
    operator.floordiv: "quotient of sizes",
    operator.neg: "a size with its sign changed",
}
"""Arithmetic on dynamic sizes; none is left if all axes are fixed."""

CORE: Mapping[Any, str] = {
    **ELEMENTWISE,
    **BINARY,
    **SELECTION,
    **REDUCTIONS,
    **SHAPES,
    **PRODUCTS,
    **SEMANTIC,
    **SIZES,
}
"""Every op of the stage CORE."""
