"""`per-layer`: each MoE layer has a policy of its own."""

from __future__ import annotations

import json

import pytest
import torch

from moec.compiler.common.errors import UsageError
from moec.passes.routing.calibrate.fit import fit
from moec.passes.routing.calibrate.traces import RoutingTrace
from moec.passes.routing.policies.base import Policy, select
from moec.passes.routing.policies.capped import Capped
from moec.passes.routing.policies.layer_k import LayerK
from moec.passes.routing.policies.per_layer import PerLayer, in_layer
from moec.passes.routing.policies.table import parameters_of, policy
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP

HIDDEN, INDICES = torch.ones(3, 5), torch.arange(4).expand(3, 4)
WEIGHTS = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.1, 0.6, 0.2, 0.1]])
MIXED = PerLayer(layers=(None, TopP(mass=0.6), Capped(mass=0.95, caps=(2,))))


def chosen(given: Policy, layer: int) -> torch.Tensor:
    return select(given, layer, HIDDEN, INDICES, WEIGHTS)


def test_each_layer_has_its_own_rule() -> None:
    assert torch.equal(chosen(MIXED, 0), WEIGHTS)
    assert torch.equal(chosen(MIXED, 1), chosen(TopP(mass=0.6), 0))
    assert torch.equal(chosen(MIXED, 2), chosen(Capped(mass=0.95, caps=(4, 4, 2)), 2))


@pytest.mark.parametrize(
    "whole",
    [LayerK(ks=(3, 1)), TopP(mass=0.7, slack=(1.0, 1.9)), Threshold(tau=0.2, importance=(1.0, 0.5)), MIXED],
    ids=lambda whole: whole.name,
)
def test_a_layer_of_any_policy_stands_alone(whole: Policy) -> None:
    mixed = PerLayer(layers=(in_layer(whole, 0), in_layer(whole, 1)))
    for layer in (0, 1):
        assert torch.equal(chosen(mixed, layer), chosen(whole, layer))
    assert not torch.equal(chosen(whole, 0), chosen(whole, 1))


def test_a_layer_may_leave_its_kept_weights_as_they_are() -> None:
    mixed = PerLayer(layers=(TopP(mass=0.6), TopP(mass=0.6, renormalize=False)))
    assert torch.equal(chosen(mixed, 0), chosen(TopP(mass=0.6), 0))
    assert torch.equal(chosen(mixed, 1), chosen(TopP(mass=0.6, renormalize=False), 0))
    assert not torch.equal(chosen(mixed, 0), chosen(mixed, 1))


def test_json_holds_it() -> None:
    plain = json.loads(json.dumps(parameters_of(MIXED)))
    assert plain["layers"][0] is None
    assert plain["layers"][2]["policy"] == "capped"
    assert policy("per-layer", **plain) == MIXED


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"policy": "top-q"}], "unknown routing policy 'top-q'"),
        ([{"policy": "top-p", "mas": 0.5}], "no parameter 'mas'"),
        (["top-p"], "'top-p' is no policy"),
        ([{"policy": "per-layer"}], "a layer has one policy"),
    ],
)
def test_what_is_wrong_in_a_layer_is_said(layers: list[object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        policy("per-layer", layers=layers)


def test_a_layer_too_many_is_refused() -> None:
    with pytest.raises(UsageError, match="has 3 layers, but the model has a MoE layer 3"):
        chosen(MIXED, 3)


def test_it_is_not_fitted() -> None:
    with pytest.raises(UsageError, match="not fitted to a budget") as error:
        fit("per-layer", [RoutingTrace(WEIGHTS, INDICES, torch.ones(3))], 0.5)
    assert "moec search" in error.value.hint
