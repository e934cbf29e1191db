"""Each policy against its formula in plain Python, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.passes.routing.policies.activation_norm import ActivationNorm
from moec.passes.routing.policies.base import Policy, Slots, selection
from moec.passes.routing.policies.capped import Capped
from moec.passes.routing.policies.entropy import Entropy
from moec.passes.routing.policies.layer_k import LayerK
from moec.passes.routing.policies.margin import Margin
from moec.passes.routing.policies.random_drop import RandomDrop
from moec.passes.routing.policies.ratio import Ratio
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.passes.routing.policies.uniform_k import UniformK

# Multiples of 1/64 add up exactly in float32, so that the formula holds to the last bit.
rows = st.lists(st.integers(0, 20).map(lambda step: step / 64), min_size=1, max_size=6).filter(any)


def kept(policy: Policy, weights: list[float], hidden: list[float] | None = None, layer: int = 0) -> set[int]:
    slots = Slots(
        layer,
        torch.arange(len(weights)).unsqueeze(0),
        torch.tensor([weights], dtype=torch.float32),
        torch.tensor([hidden or [1.0]], dtype=torch.float32),
    )
    mask = selection(policy, slots)
    return set(range(len(weights)) if mask is None else torch.nonzero(mask[0]).flatten().tolist())


def descending(weights: list[float]) -> list[int]:
    return sorted(range(len(weights)), key=lambda slot: (-weights[slot], slot))


def smallest_set(weights: list[float], mass: float) -> set[int]:
    chosen: set[int] = set()
    for slot in descending(weights):
        if chosen and sum(weights[i] for i in chosen) >= mass * sum(weights):
            break
        chosen.add(slot)
    return chosen


@settings(deadline=None)
@given(rows, st.integers(1, 7))
def test_uniform_k(weights: list[float], k: int) -> None:
    assert kept(UniformK(k=k), weights) == set(descending(weights)[:k])


@settings(deadline=None)
@given(rows, st.lists(st.integers(1, 7), min_size=3, max_size=3), st.integers(0, 2))
def test_layer_k(weights: list[float], ks: list[int], layer: int) -> None:
    assert kept(LayerK(ks=tuple(ks)), weights, layer=layer) == set(descending(weights)[: ks[layer]])


@settings(deadline=None)
@given(rows, st.integers(0, 16), st.integers(0, 4))
def test_top_p(weights: list[float], sixteenths: int, slack: int) -> None:
    mass = 1 - (1 - sixteenths / 16) * slack
    assert kept(TopP(mass=sixteenths / 16, slack=(float(slack),)), weights) == smallest_set(weights, mass)


@settings(deadline=None)
@given(rows, st.integers(0, 16), st.integers(1, 7))
def test_capped(weights: list[float], sixteenths: int, cap: int) -> None:
    expected = smallest_set(weights, sixteenths / 16) & set(descending(weights)[:cap])
    assert kept(Capped(mass=sixteenths / 16, caps=(cap,)), weights) == expected


@settings(deadline=None)
@given(rows, st.integers(0, 16), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_threshold(weights: list[float], sixteenths: int, importance: float) -> None:
    policy = Threshold(tau=sixteenths / 16, importance=(importance,))
    reached = {i for i, w in enumerate(weights) if w * importance >= sixteenths / 16 * sum(weights)}
    largest = {i for i, w in enumerate(weights) if w == max(weights)}
    assert kept(policy, weights) == reached | largest


@settings(deadline=None)
@given(rows, st.integers(0, 32), st.sampled_from([0.25, 0.5, 1.0, 2.0]))
def test_threshold_of_the_weights_themselves(weights: list[float], sixteenths: int, importance: float) -> None:
    policy = Threshold(tau=sixteenths / 16, importance=(importance,), absolute=True)
    reached = {i for i, w in enumerate(weights) if w * importance >= sixteenths / 16}
    largest = {i for i, w in enumerate(weights) if w == max(weights)}
    assert kept(policy, weights) == reached | largest


@settings(deadline=None)
@given(rows, st.integers(0, 16), st.sampled_from([0.5, 1.0, 2.0]))
def test_ratio(weights: list[float], sixteenths: int, scale: float) -> None:
    beta = min(sixteenths / 16 * scale, 1.0)
    expected = {i for i, w in enumerate(weights) if w >= beta * max(weights)}
    assert kept(Ratio(beta=sixteenths / 16, scale=(scale,)), weights) == expected


def by_complexity(weights: list[float], complexity: float, center: float) -> set[int]:
    """location 0.25 and spread 0.5, as in the tests below."""
    count = center + 2.0 * (complexity - 0.25) / 0.5
    assume(abs(count - round(count)) > 1e-4)
    return set(descending(weights)[: max(1, math.ceil(count))])


@settings(deadline=None)
@given(rows, st.integers(0, 40))
def test_entropy(weights: list[float], tenths: int) -> None:
    shares = [w / sum(weights) for w in weights]
    entropy = -sum(p * math.log(p) for p in shares if p > 0)
    policy = Entropy(center=tenths / 10, gain=2.0, location=(0.25,), spread=(0.5,))
    assert kept(policy, weights) == by_complexity(weights, entropy, tenths / 10)


@settings(deadline=None)
@given(rows, st.integers(0, 60))
def test_margin(weights: list[float], tenths: int) -> None:
    first, second = sorted([*weights, 0.0], reverse=True)[:2]
    policy = Margin(center=tenths / 10, gain=2.0, location=(0.25,), spread=(0.5,))
    expected = by_complexity(weights, (second - first) / sum(weights), tenths / 10)
    assert kept(policy, weights) == expected


@settings(deadline=None)
@given(rows, st.lists(st.integers(-8, 8), min_size=1, max_size=6), st.integers(0, 40))
def test_activation_norm(weights: list[float], eighths: list[int], tenths: int) -> None:
    hidden = [value / 8 for value in eighths]
    rms = math.sqrt(sum(value * value for value in hidden) / len(hidden))
    policy = ActivationNorm(center=tenths / 10, gain=2.0, location=(0.25,), spread=(0.5,))
    assert kept(policy, weights, hidden) == by_complexity(weights, rms, tenths / 10)


@settings(deadline=None)
@given(rows, st.lists(st.integers(-32, 32), min_size=1, max_size=6), st.integers(0, 16))
def test_random_drop(weights: list[float], eighths: list[int], sixteenths: int) -> None:
    hidden = [value / 8 for value in eighths]
    token = sum(hidden[:4]) * 61.803399
    hashes = [(token + slot * 0.6180339887) % 1.0 for slot in range(len(weights))]
    assume(all(min(h, 1 - h, abs(h - sixteenths / 16)) > 1e-3 for h in hashes))
    expected = {slot for slot, value in enumerate(hashes) if value < sixteenths / 16}
    assert kept(RandomDrop(probability=sixteenths / 16), weights, hidden) == expected | {descending(weights)[0]}


def test_random_drop_keeps_its_share_of_every_slot() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20000, 64, generator=generator)
    indices = torch.stack([torch.randperm(64, generator=generator)[:4] for _ in range(len(hidden))])
    mask = RandomDrop(probability=0.3).keep(Slots(0, indices, torch.ones(20000, 4), hidden))
    torch.testing.assert_close(mask.float().mean(0), torch.full((4,), 0.3), rtol=0, atol=0.015)
    # Two slots of a token are not the same draw.
    assert 0.02 < (mask[:, 0] & mask[:, 1]).float().mean() < 0.16


def test_layers_that_keep_all_need_no_node() -> None:
    slots = Slots(0, torch.zeros(1, 4), torch.ones(1, 4), torch.ones(1, 1))
    assert LayerK(ks=(4,)).keep(slots) is None
    assert UniformK(k=4).keep(slots) is None
    assert UniformK(k=3).keep(slots) is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformK(k=0), "uniform-k: k must be at least 1"),
        (lambda: LayerK(ks=(2, 0)), "layer-k: every k"),
        (lambda: TopP(mass=1.5), "top-p: mass"),
        (lambda: TopP(mass=0.5, slack=(-1.0,)), "top-p: every slack"),
        (lambda: Capped(mass=2.0), "capped: mass"),
        (lambda: Capped(caps=(0,)), "capped: every cap"),
        (lambda: Threshold(tau=-1.0), "threshold: tau"),
        (lambda: Threshold(importance=(0.0,)), "threshold: every importance"),
        (lambda: Ratio(beta=-0.1), "ratio: beta"),
        (lambda: Ratio(scale=(-1.0,)), "ratio: every scale"),
        (lambda: Entropy(location=(1.0,)), "entropy: location and spread"),
        (lambda: Margin(location=(1.0,), spread=(0.0,)), "margin: no spread"),
        (lambda: RandomDrop(probability=1.1), "random-drop: probability"),
    ],
)
def test_parameters_that_make_no_sense(make: type[Policy], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
