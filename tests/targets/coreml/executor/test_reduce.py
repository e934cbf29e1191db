"""Reductions and ordering against torch and coremltools' value inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

RNG = np.random.default_rng(2)
X = RNG.standard_normal((3, 4, 5)).astype(np.float32)
INTS = RNG.integers(-9, 9, (3, 4)).astype(np.int32)
TIES = np.array([[1, 3, 3, 0, 3], [2, 2, 2, 2, 2]], np.float32)
Case = tuple[Callable[..., Any], dict[str, np.ndarray[Any, Any]], Callable[..., Any]]


def case(name: str, reference: Callable[..., Any], x: np.ndarray[Any, Any] = X, **more: Any) -> Case:
    return (lambda mb, x: getattr(mb, name)(x=x, **more), {"x": x}, reference)


def exclusive(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 1) - x


CASES: dict[str, Case] = {
    "sum": case("reduce_sum", lambda x: x.sum((0, 2)), axes=[0, -1]),
    "sum_all": case("reduce_sum", torch.sum),
    "sum_int": case("reduce_sum", lambda x: x.sum(1), INTS, axes=[1]),
    "mean": case("reduce_mean", lambda x: x.mean(-1, keepdim=True), axes=[-1], keep_dims=True),
    "max": case("reduce_max", lambda x: x.amax(1), axes=[1]),
    "min": case("reduce_min", lambda x: x.amin(1, keepdim=True), axes=[1], keep_dims=True),
    "prod": case("reduce_prod", lambda x: x.prod(2), axes=[2]),
    "l1": case("reduce_l1_norm", lambda x: x.abs().sum(2), axes=[2]),
    "l2": case("reduce_l2_norm", lambda x: x.norm(dim=2), axes=[2]),
    "sum_square": case("reduce_sum_square", lambda x: (x * x).sum(2), axes=[2]),
    "log_sum": case("reduce_log_sum", lambda x: x.sum(2).log(), np.abs(X), axes=[2]),
    "log_sum_exp": case("reduce_log_sum_exp", lambda x: x.logsumexp(1), X * 50, axes=[1]),
    "argmax": case("reduce_argmax", lambda x: x.argmax(1), axis=1),
    "argmin": case("reduce_argmin", lambda x: x.argmin(2, keepdim=True), axis=-1, keep_dims=True),
    "cumsum": case("cumsum", lambda x: x.cumsum(1), axis=1),
    "cumsum_reverse": case("cumsum", lambda x: x.flip(1).cumsum(1).flip(1), axis=1, reverse=True),
    "cumsum_exclusive": case("cumsum", exclusive, axis=1, exclusive=True),
    "cumsum_both": case("cumsum", lambda x: exclusive(x.flip(1)).flip(1), axis=1, exclusive=True, reverse=True),
    "argsort": case("argsort", lambda x: x.argsort(1, descending=True), axis=1),
    "argsort_up": case("argsort", lambda x: x.argsort(2), axis=-1, ascending=True),
    "argsort_ties": case("argsort", lambda x: x.argsort(dim=1, descending=True, stable=True), TIES, axis=1),
    "topk": case("topk", lambda x: x.topk(2, 1), k=2, axis=1),
    "topk_up": case("topk", lambda x: x.topk(3, 2, largest=False), k=3, axis=2, ascending=True),
    "topk_int": case("topk", lambda x: x.topk(2, 0), np.array([-5, 7, 3], np.int32), k=2, axis=0),
    "topk_values": case("topk", lambda x: x.topk(2, 1).values, k=2, axis=1, return_indices=False),
    "topk_uint16": case("topk", lambda x: x.topk(2, 1), k=2, axis=1, output_indices_dtype="uint16"),
}
# Inference of an exclusive cumsum raises TypeError, and of topk without indices yields both results.
WITHOUT_INFERENCE = {"cumsum_exclusive", "cumsum_both", "topk_values"}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, executed: Any) -> None:
    _, feeds, reference = CASES[name]
    expected = reference(torch.from_numpy(feeds["x"]))
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(executed[name]) == len(expected)
    for actual, wanted in zip(executed[name], expected, strict=True):
        assert actual.shape == tuple(wanted.shape)
        np.testing.assert_allclose(actual, wanted.numpy(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_INFERENCE])
def test_agrees_with_value_inference(name: str, executed: Any, inferred: Any) -> None:
    for actual, expected in zip(executed[name], inferred(name), strict=True):
        assert expected is not None
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6)
