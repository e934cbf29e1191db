"""The table of policies: names, parameters, entry points."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, ClassVar

import pytest

from moec.compiler.common.errors import UsageError
from moec.passes.routing.policies.base import Policy, Slots
from moec.passes.routing.policies.table import BUILT_IN, GROUP, REFUSED, policies, policy
from moec.passes.routing.policies.top_p import TopP

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mine(Policy):
    name: ClassVar[str] = "mine"

    def keep(self, slots: Slots) -> Tensor:
        return slots.weights > 0


class Installed(EntryPoint):
    """An entry point whose object needs no import path."""

    def load(self) -> object:
        return {"mine": Mine, "text": "no class"}[self.value]


def test_names_are_unique_and_documented() -> None:
    names = [built_in.name for built_in in BUILT_IN]
    assert len(set(names)) == len(names)
    assert not set(REFUSED) & set(names)
    for built_in in BUILT_IN:
        assert built_in.__doc__
        assert built_in.__module__.endswith(built_in.name.replace("-", "_"))
        built_in()


def test_policy_takes_lists_for_tuples() -> None:
    assert policy("top-p", mass=0.8, slack=[1.0, 2.0]) == TopP(mass=0.8, slack=(1.0, 2.0))


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("top-p", "mass", "text", "a number"),
        ("top-p", "mass", None, "a number"),
        ("top-p", "mass", float("nan"), "a number"),
        ("top-p", "slack", 1.0, "a list with an entry for each MoE layer"),
        ("top-p", "slack", [1.0, "text"], "a list of numbers"),
        ("uniform-k", "k", [2], "a number"),
        ("uniform-k", "k", 10**400, "a number"),
        ("layer-k", "ks", [1, 2.5], "a list of integers"),
        ("layer-k", "renormalize", 1, "true or false"),
        ("per-layer", "layers", 3, "a list with an entry for each MoE layer"),
    ],
)
def test_a_parameter_of_another_kind_is_named(name: str, key: str, value: object, wanted: str) -> None:
    with pytest.raises(UsageError, match=f"policy {name}: {key} must be {wanted}, not ") as caught:
        policy(name, **{key: value})
    assert caught.value.hint


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown routing policy 'topp'") as error:
        policy("topp")
    assert "did you mean 'top-p'?" in error.value.hint
    with pytest.raises(UsageError, match="no parameter 'mas'") as error:
        policy("top-p", mas=0.5)
    assert "did you mean 'mass'?" in error.value.hint


@pytest.mark.parametrize("name", ["oea", "sere", "sequence-topk", "batch-topk"])
def test_batch_dependent_policies_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UsageError, match="change with the batch"):
        policy(name)


def test_entry_points_add_policies() -> None:
    assert policies([Installed("mine", "mine", GROUP)])["mine"] is Mine


@pytest.mark.parametrize(
    "points",
    [
        [("top-p", "mine")],
        [("oea", "mine")],
        [("mine", "mine"), ("mine", "mine")],
    ],
)
def test_a_clash_is_an_error(points: list[tuple[str, str]]) -> None:
    with pytest.raises(UsageError, match="taken"):
        policies([Installed(name, value, GROUP) for name, value in points])


@pytest.mark.parametrize("point", [("text", "text"), ("other", "mine")])
def test_what_is_no_policy_of_that_name_is_an_error(point: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="does not refer to a Policy"):
        policies([Installed(*point, GROUP)])
