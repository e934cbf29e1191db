"""The end of a search: what it says of a member's choices."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.search.space import RULES
from moec.compiler.search.truth import _described
from moec.passes.routing.calibrate.sensitivities import Calibration
from moec.passes.routing.policies.base import Slots
from moec.passes.routing.policies.table import policy, policy_type


@pytest.mark.parametrize("name", sorted({rule.name for rule in RULES}))
def test_every_rule_of_a_layer_can_be_described(name: str) -> None:
    weights = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).sort(-1, descending=True).values
    slots = Slots(0, torch.arange(4).expand(50, 4), weights, torch.ones(50, 1))
    fitted = policy_type(name).prepare(Calibration([slots], 0.6))
    assert _described(fitted).split()[0] == name


def test_numbers_per_layer_are_listed() -> None:
    assert _described(policy("ratio", beta=0.5, scale=[0.25, 2])) == "ratio beta=0.5 scale=0.25,2"
    assert _described(None) == ""
