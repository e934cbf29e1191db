"""Matrix products, attention and normalization against torch and coremltools' value inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from moec.targets.coreml.executor import MilModel

RNG = np.random.default_rng(1)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array)


WEIGHT, BIAS = floats(6, 4), floats(6)
GAMMA, BETA = floats(3, 4), floats(3, 4)
BATCHED = {"x": floats(2, 1, 3, 4), "y": floats(5, 4, 6)}
QKV = {"query": floats(2, 3, 4, 8), "key": floats(2, 3, 7, 8), "value": floats(2, 3, 7, 5)}
KEEP = RNG.random((4, 7)) > 0.3
KEEP[:, 0] = True
Case = tuple[Callable[..., Any], dict[str, np.ndarray[Any, Any]], Callable[..., Any]]

CASES: dict[str, Case] = {
    "linear": (
        lambda mb, x: mb.linear(x=x, weight=WEIGHT, bias=BIAS),
        {"x": floats(2, 3, 4)},
        lambda x: functional.linear(x, tensor(WEIGHT), tensor(BIAS)),
    ),
    "linear_no_bias": (
        lambda mb, x: mb.linear(x=x, weight=WEIGHT),
        {"x": floats(3, 4)},
        lambda x: x @ tensor(WEIGHT).T,
    ),
    "matmul": (lambda mb, x, y: mb.matmul(x=x, y=y), BATCHED, torch.matmul),
    "matmul_transposed": (
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        {"x": floats(2, 4, 3), "y": floats(2, 6, 4)},
        lambda x, y: x.mT @ y.mT,
    ),
    "matmul_vector": (
        lambda mb, x, y: mb.matmul(x=x, y=y),
        {"x": floats(4), "y": floats(4, 6)},
        torch.matmul,
    ),
    "matmul_int": (
        lambda mb, x, y: mb.matmul(x=x, y=y),
        {"x": np.arange(6, dtype=np.int32).reshape(2, 3), "y": np.arange(6, dtype=np.int32).reshape(3, 2)},
        torch.matmul,
    ),
    "einsum": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="bchk,bkhq->bchq"),
        {"x": floats(1, 3, 2, 4), "y": floats(2, 4, 2, 5)},
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x.expand(2, -1, -1, -1), y),
    ),
    "einsum_rank3": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="chw,whr->chr"),
        {"x": floats(3, 2, 4), "y": floats(4, 2, 5)},
        lambda x, y: torch.einsum("chw,whr->chr", x, y),
    ),
    "attention": (
        lambda mb, query, key, value: mb.scaled_dot_product_attention(query=query, key=key, value=value),
        QKV,
        functional.scaled_dot_product_attention,
    ),
    "attention_bool": (
        lambda mb, query, key, value, mask: mb.scaled_dot_product_attention(
            query=query, key=key, value=value, attn_mask=mask
        ),
        {**QKV, "mask": KEEP},
        functional.scaled_dot_product_attention,
    ),
    "attention_float": (
        lambda mb, query, key, value, mask: mb.scaled_dot_product_attention(
            query=query, key=key, value=value, attn_mask=mask
        ),
        {**QKV, "mask": floats(1, 4, 7)},
        functional.scaled_dot_product_attention,
    ),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(x=x, axes=[1, 2], gamma=GAMMA, beta=BETA, epsilon=np.float32(1e-3)),
        {"x": floats(2, 3, 4)},
        lambda x: functional.layer_norm(x, (3, 4), tensor(GAMMA), tensor(BETA), 1e-3),
    ),
    "layer_norm_plain": (
        lambda mb, x: mb.layer_norm(x=x, axes=[-1]),
        {"x": floats(2, 3, 4)},
        lambda x: functional.layer_norm(x, (4,)),
    ),
    "instance_norm": (
        lambda mb, x: mb.instance_norm(x=x, gamma=GAMMA[0], beta=BETA[0], epsilon=np.float32(1e-3)),
        {"x": floats(2, 4, 9)},
        lambda x: functional.instance_norm(x, weight=tensor(GAMMA[0]), bias=tensor(BETA[0]), eps=1e-3),
    ),
    "l2_norm": (
        lambda mb, x: mb.l2_norm(x=x),
        {"x": floats(2, 3, 4)},
        lambda x: x / torch.sqrt((x * x).sum() + 1e-6),
    ),
}
# l2_norm's inference normalizes each row of a rank-3 tensor, against its own formula.
WITHOUT_INFERENCE = {"instance_norm", "l2_norm"}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_torch(name: str, agrees: Callable[..., None]) -> None:
    agrees(name, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name not in WITHOUT_INFERENCE])
def test_agrees_with_value_inference(name: str, agrees: Callable[..., None]) -> None:
    agrees(name, infers=True, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("linear", 2 * 3 * 6 * 4),
        ("matmul", 2 * 5 * 3 * 6 * 4),
        ("matmul_transposed", 2 * 3 * 6 * 4),
        ("einsum", 2 * 3 * 2 * 5 * 4),
        ("attention", 2 * 3 * 4 * 7 * (8 + 5)),
        ("layer_norm", 0),
    ],
)
def test_counts_multiply_accumulates(name: str, macs: int, builder: Any) -> None:
    build, feeds, _ = CASES[name]
    inputs = {key: builder.placeholder(array.shape) for key, array in feeds.items()}
    path = builder.save(inputs, lambda **variables: build(builder.mb, **variables))
    session = MilModel.open(path).session()
    session.predict(feeds)
    session.predict(feeds)
    assert session.counters.total().macs == 2 * macs
