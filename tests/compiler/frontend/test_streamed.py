"""Parameters whose values are read when they are used."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moec.compiler.frontend import streamed
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.streamed import Streamed
from moec.compiler.gates.source import load_source, open_source, stream_source
from moec.compiler.ir.weights import Constant, LazyTensor

STACK = torch.arange(24, dtype=torch.bfloat16).reshape(4, 3, 2)


class Noted(LazyTensor):
    """A tensor that notes which rows are read."""

    def __init__(self, inner: LazyTensor) -> None:
        self.shape, self.dtype, self._inner = inner.shape, inner.dtype, inner
        self.read_rows: list[tuple[int, int]] = []

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self.read_rows.append((start, stop))
        return self._inner.rows(start, stop)


@pytest.fixture
def noted() -> Noted:
    return Noted(Constant(STACK))


@pytest.fixture
def parameter(noted: Noted) -> Streamed:
    return Streamed.of(torch.empty(STACK.shape, device="meta"), noted, (0, 0))


def test_shape_and_dtype_need_no_values(parameter: Streamed, noted: Noted) -> None:
    assert parameter.shape == (4, 3, 2)
    assert parameter.dtype == torch.float32
    assert parameter.device.type == "cpu"
    assert (parameter.ndim, parameter.dim(), parameter.size(1), len(parameter)) == (3, 3, 3, 4)
    assert noted.read_rows == []


@pytest.mark.parametrize("index", [2, -2, torch.tensor(2), torch.tensor(2, dtype=torch.int32)])
def test_one_expert_is_read_alone(parameter: Streamed, noted: Noted, index: int | torch.Tensor) -> None:
    row = parameter[index]
    assert type(row) is torch.Tensor
    assert torch.equal(row, STACK[2].float())
    assert noted.read_rows == [(2, 3)]


@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False]), ...])
def test_other_indices_read_all(parameter: Streamed, index: object) -> None:
    assert torch.equal(parameter[index], STACK.float()[index])  # type: ignore[index]


def test_functions_get_values(parameter: Streamed) -> None:
    x = torch.ones(4, 1, 2)
    assert torch.equal(torch.bmm(x, parameter.transpose(1, 2)), x @ STACK.float().transpose(1, 2))
    assert torch.equal(F.linear(x[0], parameter[1]), x[0] @ STACK[1].float().T)
    assert torch.equal(torch.cat([parameter, parameter]), torch.cat([STACK.float()] * 2))
    assert torch.equal(parameter.mT, STACK.float().mT)


FAMILIES = ["olmoe", "qwen3_next", "jamba", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text", "dbrx", "lfm2_moe"]
"""Stacked experts, scans, latent attention, biases, tied heads, and blocks that bypass the registries."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits_as_the_loaded_model(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(streamed, "SMALLEST", 1024)
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    random, vocab = np.random.default_rng(0), checkpoint.config.get_text_config().vocab_size
    ids = [random.integers(0, vocab, shape) for shape in ((2, 12), (1, 30), (1, 7))]
    sequences = [(ids[0], ()), (ids[1], (30,)), (ids[2], (3, 2, 2))]
    model = stream_source(checkpoint)
    assert any(isinstance(parameter, Streamed) for parameter in model._decoder.parameters())
    want = load_source(checkpoint).logits(sequences)
    for got in (model.logits(sequences), model.logits(sequences, apart=True)):
        for own, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(own, other)


def test_size_decides(tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint("mixtral"))
    assert not open_source(checkpoint).together
    assert open_source(checkpoint, 1000).together
