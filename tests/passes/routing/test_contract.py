"""What holds of every policy: the contract of `moec::select`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.passes.routing.policies.activation_norm import ActivationNorm
from moec.passes.routing.policies.base import Policy, Slots, select
from moec.passes.routing.policies.capped import Capped
from moec.passes.routing.policies.entropy import Entropy
from moec.passes.routing.policies.layer_k import LayerK
from moec.passes.routing.policies.margin import Margin
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.random_drop import RandomDrop
from moec.passes.routing.policies.ratio import Ratio
from moec.passes.routing.policies.table import BUILT_IN
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.passes.routing.policies.uniform_k import UniformK

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 5
EXPERTS = 16


@dataclass(frozen=True)
class DropAll(Policy):
    """A third party's policy that forgets the largest slot."""

    name: ClassVar[str] = "drop-all"

    def keep(self, slots: Slots) -> Tensor:
        return slots.weights < 0


POLICIES: dict[str, Policy] = {
    "layer-k": LayerK(ks=(2, 1)),
    "top-p": TopP(mass=0.7, slack=(1.0, 1.5)),
    "threshold": Threshold(tau=0.2, importance=(1.0, 0.5)),
    "threshold of weights": Threshold(tau=0.1, importance=(1.0, 0.5), absolute=True),
    "capped": Capped(mass=0.8, caps=(3, 2)),
    "ratio": Ratio(beta=0.4, scale=(1.0, 1.5)),
    "entropy": Entropy(center=2.0, location=(0.7, 0.7), spread=(0.3, 0.3)),
    "margin": Margin(center=2.0, location=(-0.3, -0.3), spread=(0.3, 0.3)),
    "activation-norm": ActivationNorm(center=2.0, location=(1.0, 1.0), spread=(0.3, -0.3)),
    "uniform-k": UniformK(k=2),
    "random-drop": RandomDrop(probability=0.5),
    "per-layer": PerLayer(layers=(TopP(mass=0.7), Threshold(tau=0.2))),
    "drop-all": DropAll(),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def for_every_policy(**drawn: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A property that holds of every policy for whatever is drawn."""
    return lambda test: every_policy(settings(max_examples=30, deadline=None)(given(**drawn)(test)))


@st.composite
def routed(draw: st.DrawFn, top_k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, expert indices and weights of a few tokens: unsorted, with ties and zeros.

    Weights are multiples of 1/64, so that sums are exact and a tie is a tie.
    """
    tokens, k = draw(st.integers(1, 6)), top_k or draw(st.integers(1, 6))
    steps = st.lists(st.integers(0, 20), min_size=k, max_size=k)
    weights = torch.tensor([draw(steps) for _ in range(tokens)], dtype=torch.float32) / 64
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    indices = torch.stack([torch.randperm(EXPERTS, generator=generator)[:k] for _ in range(tokens)])
    return hidden, indices, weights


def test_every_built_in_policy_is_tested() -> None:
    assert {policy.name for policy in BUILT_IN} <= POLICIES.keys()


@for_every_policy(slots=routed(), layer=st.integers(0, 1))
def test_dropped_slots_are_zero_and_the_largest_stays(
    policy: Policy, slots: tuple[Tensor, Tensor, Tensor], layer: int
) -> None:
    hidden, indices, weights = slots
    selected = select(policy, layer, hidden, indices, weights)
    assert selected.dtype == weights.dtype
    assert torch.isfinite(selected).all()
    for before, after in zip(weights.tolist(), selected.tolist(), strict=True):
        assert all(new >= old for old, new in zip(before, after, strict=True) if new != 0)
        if max(before) > 0:
            assert after[before.index(max(before))] > 0


@for_every_policy(slots=routed(), layer=st.integers(0, 1))
def test_row_sum_is_preserved(policy: Policy, slots: tuple[Tensor, Tensor, Tensor], layer: int) -> None:
    hidden, indices, weights = slots
    selected = select(policy, layer, hidden, indices, weights)
    torch.testing.assert_close(selected.sum(-1), weights.sum(-1), rtol=1e-6, atol=0)


@for_every_policy(slots=routed())
def test_without_renormalisation_kept_weights_do_not_change(
    policy: Policy, slots: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, indices, weights = slots
    raw = select(type(policy)(**{**vars(policy), "renormalize": False}), 0, hidden, indices, weights)
    scaled = select(policy, 0, hidden, indices, weights)
    assert torch.equal(raw, torch.where(scaled > 0, weights, 0.0))


@for_every_policy(slots=routed(), seed=st.integers(0, 2**31), layer=st.integers(0, 1))
def test_a_token_does_not_see_its_batch(
    policy: Policy, slots: tuple[Tensor, Tensor, Tensor], seed: int, layer: int
) -> None:
    hidden, indices, weights = slots
    whole = select(policy, layer, hidden, indices, weights)
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))
    shuffled = select(policy, layer, hidden[order], indices[order], weights[order])
    assert torch.equal(shuffled, whole[order])
    for row in range(len(weights)):
        one = slice(row, row + 1)
        assert torch.equal(select(policy, layer, hidden[one], indices[one], weights[one]), whole[one])


@for_every_policy(slots=routed(), layer=st.integers(0, 1))
def test_the_order_of_the_slots_does_not_matter(
    policy: Policy, slots: tuple[Tensor, Tensor, Tensor], layer: int
) -> None:
    hidden, indices, weights = slots
    order = torch.argsort(weights, dim=-1, descending=True, stable=True)
    selected = select(policy, layer, hidden, indices, weights)
    by_size = select(policy, layer, hidden, indices.gather(1, order), weights.gather(1, order))
    torch.testing.assert_close(selected.gather(1, order), by_size, rtol=1e-6, atol=0)
    assert torch.equal(selected.gather(1, order) > 0, by_size > 0)


@every_policy
@settings(max_examples=20, deadline=None)
@given(slots=routed(top_k=1))
def test_one_slot_always_stays(policy: Policy, slots: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, indices, weights = slots
    torch.testing.assert_close(select(policy, 0, hidden, indices, weights), weights)


@every_policy
def test_a_row_of_zeros_stays_zero(policy: Policy) -> None:
    selected = select(policy, 0, torch.zeros(2, HIDDEN), torch.arange(4).expand(2, 4), torch.zeros(2, 4))
    assert torch.equal(selected, torch.zeros(2, 4))


@every_policy
def test_negative_weights_count_as_zero(policy: Policy) -> None:
    hidden, indices = torch.ones(1, HIDDEN), torch.arange(4).unsqueeze(0)
    weights = torch.tensor([[0.5, -3.0, 0.25, -0.25]])
    clipped = select(policy, 0, hidden, indices, weights.clamp(min=0))
    # A layer without a node hands its weights on untouched; what takes them ignores negative ones.
    assert torch.equal(select(policy, 0, hidden, indices, weights).clamp(min=0), clipped)


@every_policy
def test_half_precision_weights_keep_their_type(policy: Policy) -> None:
    weights = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float16)
    selected = select(policy, 0, torch.ones(1, HIDDEN), torch.arange(4).unsqueeze(0), weights)
    assert selected.dtype == torch.float16
    torch.testing.assert_close(selected.sum(), weights.sum(), rtol=2e-3, atol=0)


KNOBS = {
    "top-p": [0.0, 0.3, 0.5, 0.9, 1.0],
    "threshold": [1.0, 0.4, 0.2, 0.05, 0.0],
    "threshold of weights": [1.0, 0.4, 0.2, 0.05, 0.0],
    "capped": [0.0, 0.3, 0.5, 0.9, 1.0],
    "ratio": [2.0, 1.0, 0.5, 0.1, 0.0],
    "entropy": [-9.0, 1.0, 2.0, 3.5, 99.0],
    "margin": [-9.0, 1.0, 2.0, 3.5, 99.0],
    "activation-norm": [-9.0, 1.0, 2.0, 3.5, 99.0],
    "uniform-k": [1.0, 2.0, 3.0, 4.0, 9.0],
    "random-drop": [0.0, 0.2, 0.5, 0.8, 1.0],
}
"""Values of the knob from the greatest saving to none; beyond its range it must still be safe."""


@pytest.mark.parametrize("name", KNOBS)
@settings(max_examples=25, deadline=None)
@given(slots=routed(), layer=st.integers(0, 1))
def test_kept_slots_are_monotone_in_the_knob(name: str, slots: tuple[Tensor, Tensor, Tensor], layer: int) -> None:
    hidden, indices, weights = slots
    kept = [select(POLICIES[name].with_knob(value), layer, hidden, indices, weights) > 0 for value in KNOBS[name]]
    for fewer, more in pairwise(kept):
        assert (fewer <= more).all()
    if name not in ("capped", "activation-norm"):
        assert torch.equal(kept[-1], weights > 0)


@pytest.mark.parametrize("name", KNOBS)
@settings(max_examples=25, deadline=None)
@given(slots=routed(), layer=st.integers(0, 1), place=st.integers(0, 4))
def test_the_run_time_operand_replaces_the_knob(
    name: str, slots: tuple[Tensor, Tensor, Tensor], layer: int, place: int
) -> None:
    hidden, indices, weights = slots
    value = KNOBS[name][place]
    fixed = select(POLICIES[name].with_knob(value), layer, hidden, indices, weights)
    fed = select(POLICIES[name], layer, hidden, indices, weights, budget=torch.tensor(value))
    torch.testing.assert_close(fed, fixed)


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("value", [-5.0, 0.0, 7.0])
def test_no_operand_can_drop_the_largest_slot(name: str, value: float) -> None:
    weights = torch.tensor([[0.1, 0.5, 0.3, 0.1]])
    selected = select(
        POLICIES[name], 0, torch.ones(1, HIDDEN), torch.arange(4)[None], weights, budget=torch.tensor(value)
    )
    assert selected[0, 1] >= 0.5


def test_an_operand_needs_a_knob() -> None:
    with pytest.raises(UsageError, match="layer-k has no parameter"):
        select(
            LayerK(ks=(1,)),
            0,
            torch.ones(1, 1),
            torch.zeros(1, 1),
            torch.ones(1, 1),
            budget=torch.tensor(1.0),
        )


def test_parameters_of_too_few_layers_are_an_error() -> None:
    with pytest.raises(UsageError, match="2 MoE layers"):
        select(POLICIES["layer-k"], 2, torch.ones(1, 1), torch.zeros(1, 3), torch.ones(1, 3))


def test_of_equal_largest_slots_the_first_stays() -> None:
    weights = torch.tensor([[0.1, 0.3, 0.3, 0.3]])
    selected = select(UniformK(k=1), 0, torch.ones(1, 1), torch.zeros(1, 4), weights)
    assert (selected > 0).tolist() == [[False, True, False, False]]
    assert torch.equal(select(DropAll(), 0, torch.ones(1, 1), torch.zeros(1, 4), weights), selected)


def test_nothing_dropped_changes_no_bit() -> None:
    weights = torch.rand(50, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    for policy in (Ratio(beta=0.0), Threshold(tau=0.0), RandomDrop(probability=1.0)):
        assert torch.equal(select(policy, 0, torch.ones(50, 1), torch.zeros(50, 8), weights), weights)
