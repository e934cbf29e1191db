"""Palettes: how far from the optimum, what is stored, and the lazy tensor that the interpreter and targets read."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from moec.compiler.common.errors import CheckpointError, UsageError
from moec.compiler.ir.weights import Constant
from moec.quantize import lazy
from moec.quantize.formats import PaletteFormat
from moec.quantize.lazy import Palettized, palettized
from moec.quantize.methods.palettize import choose_palettes, palettize

SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "heavy tails": lambda x: x**3,
    "two clusters": lambda x: x + 10 * x.sign(),
}


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(weight: torch.Tensor, fmt: PaletteFormat) -> float:
    found = palettize(weight, choose_palettes(weight, fmt, name="w"), fmt).dequantize()
    return float((found - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_about_as_good_as_the_best_of_several_runs_of_k_means(shape: str) -> None:
    """k-means++ of scipy; both find local optima, which differ by a few percent."""
    weight = SHAPES[shape](random_weight(8, 256))
    values = weight.reshape(-1, 1).double().numpy()
    peers = []
    for seed in range(4):
        centres, labels = kmeans2(values, 16, iter=60, minit="++", rng=np.random.default_rng(seed))
        peers.append(float(((values - centres[labels]) ** 2).sum() / (values**2).sum()))
    assert error(weight, PaletteFormat(rows=8)) <= 1.06 * min(peers)


def test_a_normal_weight_comes_close_to_the_best_quantizer_there_is() -> None:
    """16 levels leave 0.0095 of the variance of a normal source (Max, "Quantizing for minimum distortion", 1960)."""
    assert error(random_weight(64, 1024), PaletteFormat(rows=16)) == pytest.approx(0.0095, rel=0.03)


@given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([1, 2, 4]), scale=st.sampled_from([1e-4, 1.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_every_weight_becomes_the_nearest_entry_of_its_palette(seed: int, rows: int, scale: float) -> None:
    weight, fmt = random_weight(3, 4, 24, seed=seed) * scale, PaletteFormat(rows=rows)
    palettes = choose_palettes(weight, fmt, name="w")
    assert palettes.dtype == torch.float16
    assert bool((palettes.diff(dim=-1) >= 0).all())
    made = palettize(weight, palettes, fmt)
    entries = palettes.float().repeat_interleave(rows, dim=-2).unsqueeze(-2)
    nearest = (weight.unsqueeze(-1) - entries).abs().amin(-1)
    torch.testing.assert_close((made.dequantize() - weight).abs(), nearest, rtol=1e-5, atol=1e-7 * scale)
    assert torch.equal(made[1].dequantize(), made.dequantize()[1])


@pytest.mark.parametrize("values", [torch.zeros(4, 8), torch.arange(32.0).remainder(5).reshape(4, 8)])
def test_few_distinct_values_are_kept_exactly(values: torch.Tensor) -> None:
    assert torch.equal(palettize(values, choose_palettes(values, FOUR, name="w"), FOUR).dequantize(), values)


FOUR = PaletteFormat(rows=4)


@pytest.mark.parametrize("shape", [(32, 16), (3, 8, 16)])
def test_any_slice_reads_the_same_palettes(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PIECE", 8 * 16)
    source = Constant(random_weight(*shape))
    whole = palettized("w", source, FOUR)
    values = whole.read()
    torch.testing.assert_close(
        values, palettize(source.value, choose_palettes(source.value, FOUR, name="w"), FOUR).dequantize()
    )
    for start, stop in ((0, 1), (1, 3), (2, shape[0])):
        assert torch.equal(palettized("w", source, FOUR).rows(start, stop), values[start:stop])
        assert torch.equal(whole.rows(start, stop), values[start:stop])
    made = whole.palettized_rows(0, shape[0])
    assert torch.equal(made.dequantize(), values)
    assert made.codes.nbytes // 2 + made.palettes.nbytes == whole.format.planned_bytes(shape)
    lost = float((values - source.value).square().sum() / source.value.square().sum())
    assert np.mean(whole.errors()) == pytest.approx(lost, rel=0.05)


def test_bad_weights_are_refused_by_name() -> None:
    broken = random_weight(8, 8)
    broken[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match="up: holds NaN"):
        palettized("up", Constant(broken), FOUR).read()
    with pytest.raises(CheckpointError, match="up: its weights are too large for palettes"):
        palettized("up", Constant(random_weight(8, 8) * 1e6), FOUR).read()
    with pytest.raises(UsageError, match="up: palettes of 4 rows do not divide its 6 rows"):
        palettized("up", Constant(random_weight(6, 8)), FOUR)
    with pytest.raises(UsageError, match="only matrices"):
        palettized("norm", Constant(random_weight(8)), FOUR)
    assert isinstance(palettized("up", Constant(random_weight(8, 8)), FOUR), Palettized)
