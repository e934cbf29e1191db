"""The policy `top-p`: the smallest set of experts with a given share of the routing mass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Self

from moec.compiler.common.errors import UsageError
from moec.passes.routing.calibrate.slot_allocation import allocate
from moec.passes.routing.calibrate.traces import kept_per_layer
from moec.passes.routing.policies.base import Policy, Slots, at_layer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration, Sensitivities

SMALLEST_MASS = 1e-6
SMALLEST_LOST = 1e-3
STEPS = 4
UNITS = 200


@dataclass(frozen=True)
class TopP(Policy):
    """Keeps slot i if the larger slots hold less than the share P_l of the row sum (arXiv:2403.07652).

    mass_before_i < P_l * sum_j w_j, where mass_before_i is the sum of the weights before slot i in descending order,
    and P_l = 1 - (1 - P) * slack_l: a layer with slack 2 may lose twice the mass.

    Attributes:
        mass: P, the share of the routing mass to keep.
        slack: One number per MoE layer; empty: 1 in every layer.
    """

    name: ClassVar[str] = "top-p"
    knob: ClassVar[str | None] = "mass"
    keeps_largest: ClassVar[bool] = True
    sensitivities: ClassVar[frozenset[str]] = frozenset({"mass"})

    mass: float = 1.0
    slack: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.require(0 <= self.mass <= 1, f"mass must lie in [0, 1], not {self.mass}")
        self.require(all(value >= 0 for value in self.slack), f"every slack must be at least 0, not {self.slack}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set the slack of every layer, if the losses of masses were measured; see `layer_slack`."""
        sensitivities = calibration.sensitivities
        if sensitivities is None or not sensitivities.mass_loss:
            return cls()
        return cls(slack=layer_slack(calibration.layers, calibration.budget, sensitivities))

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        return slots.mass_before < slots.total * mass_at(self.operand(slots), at_layer(self.slack, slots.layer))


def mass_at(mass: Tensor | float, slack: float) -> Tensor | float:
    """The layer's share of mass, 1 - (1 - P) * slack, but above 0, so that the largest slot is always kept."""
    if slack != 1.0:
        mass = 1.0 - (1.0 - mass) * slack
    return max(mass, SMALLEST_MASS) if isinstance(mass, float | int) else mass.clamp(min=SMALLEST_MASS)


def layer_slack(layers: Sequence[Slots], budget: float, sensitivities: Sensitivities) -> tuple[float, ...]:
    """How much more mass each layer may lose than the layer that may lose the least.

    Dynamic programming chooses a mass P_l per layer, with the least sum of the measured losses (interpolated between
    the measured masses) at the budget's share of slots. The result is 1 - P_l, scaled to a minimum of 1.

    Args:
        layers: The replayed slots of every MoE layer.
        budget: Share of slots to keep.
        sensitivities: Losses per layer and mass.

    Raises:
        UsageError: The losses were measured on another number of layers, or no measured mass is low enough.
    """
    if len(sensitivities.mass_loss) != len(layers):
        raise UsageError(f"sensitivities of {len(sensitivities.mass_loss)} MoE layers for a model with {len(layers)}")
    fractions = [step / STEPS for step in range(STEPS)]
    masses = _interpolated(sensitivities.masses, fractions)
    losses = [_interpolated(row, fractions) for row in sensitivities.mass_loss]
    costs = [[math.ceil(UNITS * kept_per_layer(TopP(mass=mass), [slots])[0]) for mass in masses] for slots in layers]
    chosen = allocate(losses, costs, math.floor(UNITS * budget * len(layers)))
    lost = [max(1.0 - masses[option], SMALLEST_LOST) for option in chosen]
    return tuple(value / min(lost) for value in lost)


def _interpolated(values: Sequence[float], fractions: Sequence[float]) -> list[float]:
    """`values` with linearly interpolated values between neighbours."""
    return [a + (b - a) * fraction for a, b in pairwise(values) for fraction in fractions] + [values[-1]]
