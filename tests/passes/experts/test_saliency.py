"""Expert saliency and super experts."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.common.errors import UsageError
from moec.passes.experts.saliency import reap_saliency, super_experts


def test_saliency_is_the_mean_over_routed_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(40, 3, generator=generator)
    weights[3, 1] = 0.0
    norms = torch.rand(40, 3, generator=generator) * 10
    norms[3, 1] = float("nan")
    indices = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(40)])
    found = reap_saliency(indices, weights, norms, 6)
    for expert in range(6):
        products = [
            weights[t, s].item() * norms[t, s].item()
            for t in range(40)
            for s in range(3)
            if indices[t, s] == expert and weights[t, s] > 0
        ]
        mean = sum(products) / len(products) if products else 0.0
        assert found[expert].item() == pytest.approx(mean)
    assert found[5] == 0


def test_saliency_refuses_what_does_not_fit() -> None:
    with pytest.raises(UsageError, match="names expert 7"):
        reap_saliency(torch.tensor([[7]]), torch.ones(1, 1), torch.ones(1, 1), 4)
    with pytest.raises(UsageError, match="equal shapes"):
        reap_saliency(torch.zeros(1, 2), torch.ones(1, 1), torch.ones(1, 1), 4)


def test_super_experts_are_extreme_over_all_layers() -> None:
    peaks = [torch.ones(128) + torch.arange(128) / 1000, torch.ones(128)]
    peaks[0][5] = 400.0
    peaks[1][9] = 100.0
    assert super_experts(peaks, quantile=0.99) == ((0, 5), (1, 9))
    assert super_experts(peaks, quantile=0.99, fraction=0.5) == ((0, 5),)
    assert super_experts(peaks, quantile=0.999) == ((0, 5),)
    assert super_experts([]) == ()


def test_super_experts_refuse_what_is_not_finite() -> None:
    with pytest.raises(UsageError, match="not finite"):
        super_experts([torch.tensor([1.0, float("inf")])])
    with pytest.raises(UsageError, match="must lie in"):
        super_experts([torch.ones(2)], quantile=2.0)
