"""The control `random-drop`: slots are dropped by a fixed hash, whatever their weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from moec.passes.routing.policies.base import Policy, Slots

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration

COMPONENTS = 4
HIDDEN_FACTOR = 61.803399
EXPERT_FACTOR = 0.6180339887


@dataclass(frozen=True)
class RandomDrop(Policy):
    """Keeps a slot besides the largest if its hash lies below the probability: u_i < probability.

    u_i = x_i - floor(x_i) with x_i = 61.803399 * (h_0 + h_1 + h_2 + h_3) + 0.6180339887 * e_i, h the hidden state
    and e_i the slot's expert: uniform over [0, 1), the same on every run, and of that token alone. It uses fp32
    additions, multiplications and a floor, no sine and no integer hash, so that every target finds the same slots;
    the factor is as small as an even spread allows, since it magnifies the rounding differences between targets.
    What a policy gains over this control is what its choice of slots is worth.

    Attributes:
        probability: Of each slot but the largest to stay.
    """

    name: ClassVar[str] = "random-drop"
    knob: ClassVar[str | None] = "probability"
    bisected: ClassVar[bool] = False

    probability: float = 1.0

    def __post_init__(self) -> None:
        self.require(0 <= self.probability <= 1, f"probability must lie in [0, 1], not {self.probability}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """The hash is uniform, so the probability follows from the budget: 1 slot of k always stays."""
        slots = sum(slots.top_k for slots in calibration.layers)
        always = len(calibration.layers)
        probability = 1.0 if slots == always else (calibration.budget * slots - always) / (slots - always)
        return cls(probability=min(max(probability, 0.0), 1.0))

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        token = (
            slots.hidden.narrow(1, 0, min(COMPONENTS, slots.hidden.shape[1])).to(torch.float32).sum(-1, keepdim=True)
            * HIDDEN_FACTOR
        )
        mixed = token + slots.indices.to(torch.float32) * EXPERT_FACTOR
        return mixed - mixed.floor() < self.operand(slots)
