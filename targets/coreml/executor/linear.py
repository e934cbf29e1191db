"""Kernels of matrix products and attention, with their multiply-accumulates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moec.targets.coreml.executor.activation import softmax
from moec.targets.coreml.executor.kernel import Args, Kernel

if TYPE_CHECKING:
    from moec.targets.coreml.executor.dtypes import Array

_EINSUM_FORMS = (((0, 1, 2, 3), (0, 3, 2, 4), (0, 1, 2, 4)), ((0, 1, 2), (2, 1, 3), (0, 1, 3)))


def _linear(args: Args) -> Array:
    product = args.array("x") @ args.array("weight").T
    bias = args.optional("bias")
    return product if bias is None else product + bias


def _linear_macs(args: Args, result: Array) -> int:
    return result.size * int(args.array("weight").shape[-1])


def _operand(args: Args, name: str, transpose: str) -> Array:
    value = args.array(name)
    return value.swapaxes(-1, -2) if args.flag(transpose) and value.ndim > 1 else value


def _matmul(args: Args) -> Array:
    x, y = _operand(args, "x", "transpose_x"), _operand(args, "y", "transpose_y")
    return np.asarray(x @ y)


def _matmul_macs(args: Args, result: Array) -> int:
    return result.size * int(_operand(args, "x", "transpose_x").shape[-1])


def _canonical(equation: str) -> tuple[tuple[int, ...], ...]:
    """Labels numbered by first appearance, for each operand and the result."""
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    numbers: dict[str, int] = {}
    return tuple(tuple(numbers.setdefault(label, len(numbers)) for label in term) for term in terms)


def _einsum(args: Args) -> Array:
    """`nchw,nwhu->nchu` and `chw,whu->chu`, the only forms of this op, as a batched matmul."""
    equation = args.text("equation", "")
    if _canonical(equation) not in _EINSUM_FORMS:
        raise ValueError(f"MIL has no einsum of the form {equation!r}")
    x, y = args.arrays("values")
    return (x.swapaxes(-3, -2) @ y.swapaxes(-3, -2)).swapaxes(-3, -2)


def _einsum_macs(args: Args, result: Array) -> int:
    return result.size * int(args.arrays("values")[0].shape[-1])


def _attention(args: Args) -> Array:
    """softmax(query key^T / sqrt(E) + mask) value, rounded once; a boolean mask is true where visible."""
    query, key, value = args.array("query"), args.array("key"), args.array("value")
    scores = (query @ key.swapaxes(-1, -2)) * query.dtype.type(1.0 / np.sqrt(query.shape[-1]))
    mask = args.optional("attn_mask")
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
    result: Array = softmax(scores, -1) @ value
    return result


def _attention_macs(args: Args, result: Array) -> int:
    query, key = args.array("query"), args.array("key")
    keys = int(key.shape[-2])
    return query.size * keys + result.size * keys


KERNELS: dict[str, Kernel] = {
    "linear": Kernel(_linear, macs=_linear_macs),
    "matmul": Kernel(_matmul, macs=_matmul_macs),
    "einsum": Kernel(_einsum, macs=_einsum_macs),
    "scaled_dot_product_attention": Kernel(_attention, macs=_attention_macs),
}
