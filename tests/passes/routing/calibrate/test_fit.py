"""Fitting policies to a budget, the dynamic programme and the search."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.passes.routing.calibrate.fit import TOLERANCE, fit
from moec.passes.routing.calibrate.search import largest_saving
from moec.passes.routing.calibrate.sensitivities import Sensitivities
from moec.passes.routing.calibrate.slot_allocation import allocate, layer_ks
from moec.passes.routing.calibrate.traces import RoutingTrace, kept_per_layer, kept_share, replay
from moec.passes.routing.policies.capped import Capped
from moec.passes.routing.policies.entropy import Entropy
from moec.passes.routing.policies.random_drop import RandomDrop
from moec.passes.routing.policies.ratio import Ratio
from moec.passes.routing.policies.table import parameters_of, policy
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.passes.routing.policies.uniform_k import UniformK

K_LOSS = ((9.0, 3.0, 1.0, 0.0), (5.0, 1.0, 0.2, 0.0))
MASSES = (1.0, 0.9, 0.7, 0.5, 0.2)
SENSITIVITIES = Sensitivities(K_LOSS, MASSES, ((0.0, 0.4, 2.0, 5.0, 9.0), (0.0, 0.1, 0.4, 1.0, 5.0)))


def traces(layers: int = 2, tokens: int = 3000, top_k: int = 4) -> list[RoutingTrace]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for layer in range(layers):
        logits = torch.randn(tokens, 16, generator=generator) * (1.5 + layer)
        weights, indices = logits.softmax(-1).topk(top_k, dim=-1)
        made.append(RoutingTrace(weights, indices, torch.rand(tokens, generator=generator) + 1.0))
    return made


BISECTED = ("top-p", "threshold", "capped", "ratio", "entropy", "margin", "activation-norm")


@pytest.mark.parametrize("name", BISECTED)
@pytest.mark.parametrize("budget", [0.9, 0.6, 0.4])
@pytest.mark.parametrize("sensitivities", [None, SENSITIVITIES])
def test_fit_hits_the_budget(name: str, budget: float, sensitivities: Sensitivities | None) -> None:
    if name == "capped" and sensitivities is None:
        return
    text = traces()
    fitted = fit(name, text, budget, sensitivities)
    assert abs(kept_share(fitted, replay(text)) - budget) <= TOLERANCE
    assert fit(name, text, budget, sensitivities) == fitted
    assert policy(name, **parameters_of(fitted)) == fitted


def test_random_drop_hits_the_budget_where_the_hash_is_uniform() -> None:
    assert fit("random-drop", traces(), 0.7) == RandomDrop(probability=(0.7 * 4 - 1) / 3)


def test_whole_numbers_of_experts_stay_within_the_budget() -> None:
    assert fit("uniform-k", traces(), 0.75) == UniformK(k=3)
    assert fit("uniform-k", traces(), 0.74) == UniformK(k=2)
    assert parameters_of(fit("layer-k", traces(), 0.75, SENSITIVITIES))["ks"] == (4, 2)


def test_capped_saves_half_by_its_caps() -> None:
    fitted = fit("capped", traces(), 0.5, SENSITIVITIES)
    assert isinstance(fitted, Capped)
    assert fitted.caps == layer_ks(K_LOSS, 0.75) == (4, 2)


def test_threshold_spares_the_sensitive_layer() -> None:
    fitted = fit("threshold", traces(), 0.6, SENSITIVITIES)
    assert isinstance(fitted, Threshold)
    assert fitted.importance == pytest.approx((1.0, 6.2 / 13.0))


def test_top_p_lets_the_insensitive_layer_lose_more() -> None:
    fitted = fit("top-p", traces(), 0.6, SENSITIVITIES)
    assert isinstance(fitted, TopP)
    assert fitted.slack[0] == 1.0 < fitted.slack[1]
    first, second = kept_per_layer(fitted, replay(traces()))
    assert first > second


def test_ratio_scales_by_the_median_ratio() -> None:
    fitted = fit("ratio", traces(), 0.6)
    assert isinstance(fitted, Ratio)
    expected = [float((t.weights[:, 1] / t.weights[:, 0]).median()) for t in traces()]
    assert fitted.scale == pytest.approx(expected)


def test_complexity_is_held_against_the_quartiles() -> None:
    fitted = fit("entropy", traces(), 0.6)
    assert isinstance(fitted, Entropy)
    shares = [t.weights / t.weights.sum(-1, keepdim=True) for t in traces()]
    entropies = [-(p * p.log()).sum(-1) for p in shares]
    assert fitted.location == pytest.approx([float(e.quantile(0.5)) for e in entropies], rel=1e-4)
    spreads = [float(e.quantile(0.75) - e.quantile(0.25)) for e in entropies]
    assert fitted.spread == pytest.approx(spreads, rel=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_activation_norm_follows_the_entropy(sign: float) -> None:
    text = traces(layers=1)
    p = text[0].weights / text[0].weights.sum(-1, keepdim=True)
    rms = 5.0 - sign * (p * p.log()).sum(-1)
    fitted = fit("activation-norm", [RoutingTrace(text[0].weights, text[0].indices, rms)], 0.6)
    assert parameters_of(fitted)["spread"][0] * sign > 0


def test_slots_of_weight_zero_are_not_kept() -> None:
    trace = RoutingTrace(torch.tensor([[0.5, 0.5, 0.0, 0.0]]), torch.arange(4)[None], torch.ones(1))
    assert kept_share(UniformK(k=4), replay([trace])) == 0.5
    assert kept_share(UniformK(k=3), replay([trace])) == 0.5


def test_what_cannot_be_reached_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"top-p cannot keep 10.0% .* the nearest is 25.0%"):
        fit("top-p", traces(), 0.1)
    with pytest.raises(UsageError, match="expert budget"):
        fit("top-p", traces(), 1.2)
    with pytest.raises(UsageError, match="layer-k needs the loss"):
        fit("layer-k", traces(), 0.5)
    with pytest.raises(UsageError, match="capped needs the loss"):
        fit("capped", traces(layers=3), 0.5, SENSITIVITIES)
    with pytest.raises(UsageError, match="sensitivities of 2 MoE layers"):
        fit("top-p", traces(layers=3), 0.5, SENSITIVITIES)
    with pytest.raises(UsageError, match="need at least 2"):
        fit("layer-k", traces(), 0.2, SENSITIVITIES)
    with pytest.raises(UsageError, match="must descend from 1"):
        Sensitivities(masses=(0.5, 0.9))
    with pytest.raises(UsageError, match="one loss per mass"):
        Sensitivities(masses=(1.0, 0.9), mass_loss=((0.0,),))


tables = st.integers(1, 4).flatmap(
    lambda options: st.lists(
        st.lists(st.tuples(st.integers(0, 20), st.integers(0, 6)), min_size=options, max_size=options),
        min_size=1,
        max_size=4,
    )
)


@settings(deadline=None)
@given(tables, st.integers(0, 16))
def test_allocation_is_exact(table: list[list[tuple[int, int]]], limit: int) -> None:
    choices = itertools.product(*(range(len(row)) for row in table))
    picked = [[row[option] for row, option in zip(table, choice, strict=True)] for choice in choices]
    totals = [(sum(loss for loss, _ in pick), sum(cost for _, cost in pick)) for pick in picked]
    allowed = [total for total in totals if total[1] <= limit]
    assume(allowed)
    chosen = allocate(
        [[float(loss) for loss, _ in row] for row in table], [[cost for _, cost in row] for row in table], limit
    )
    found = [row[option] for row, option in zip(table, chosen, strict=True)]
    assert (sum(f[0] for f in found), sum(f[1] for f in found)) == min(allowed)


def test_layer_ks_uses_the_whole_budget() -> None:
    assert sum(layer_ks(((3.0, 2.0, 1.0, 0.0),) * 4, 0.75)) == 12
    assert layer_ks(((3.0, 2.0, 1.0, 0.0), (9.0, 9.0, 9.0, 0.0)), 0.75) == (2, 4)
    assert layer_ks(((0.0, 0.0),) * 3, 1.0) == (1, 1, 1)


def test_search_finds_the_smallest_budget_within_the_bound() -> None:
    calls: list[float] = []

    def evaluate(chosen: object) -> float:
        assert isinstance(chosen, TopP)
        calls.append(chosen.mass)
        return 1.0 - chosen.mass

    saving = largest_saving(lambda b: TopP(mass=b), evaluate, 0.2, least=0.4, evaluations=8)
    assert len(calls) == 8
    assert saving.policy == TopP(mass=saving.budget)
    assert 0.8 <= saving.budget <= 0.8 + 0.6 / 2**7
    assert [budget for budget, _ in saving.tried] == calls


def test_search_takes_the_least_budget_or_nothing() -> None:
    best = largest_saving(lambda b: TopP(mass=b), lambda _: 0.0, 0.0, least=0.3)
    assert (best.budget, len(best.tried)) == (0.3, 1)
    none = largest_saving(lambda b: TopP(mass=b), lambda _: 1.0, 0.5, least=0.3, evaluations=3)
    assert (none.policy, none.budget, len(none.tried)) == (None, 1.0, 3)
    with pytest.raises(UsageError, match="cannot search"):
        largest_saving(lambda b: TopP(mass=b), lambda _: 0.0, 0.0, least=1.0)
