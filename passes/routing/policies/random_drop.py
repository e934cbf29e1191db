"""The baseline `random-drop`: slots are dropped by a fixed hash, regardless of their weights."""

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
    """Keeps a slot other than the largest if its hash is below the probability: u_i < probability.

    u_i = x_i - floor(x_i) with x_i = 61.803399 * (h_0 + h_1 + h_2 + h_3) + 0.6180339887 * e_i, where h is the hidden
    state and e_i the slot's expert. u_i is uniform over [0, 1), the same on every run, and depends on that token alone.
    It uses only fp32 additions, multiplications and a floor, without a sine or an integer hash, so that every target
    finds the same slots. The factor magnifies rounding differences between targets, so it is as small as an even
    distribution allows.

    The gain of a policy over this baseline is the value of its choice of slots.

    Attributes:
        probability: Probability of keeping each slot other than the largest.
    """

    name: ClassVar[str] = "random-drop"
    knob: ClassVar[str | None] = "probability"
    bisected: ClassVar[bool] = False

    probability: float = 1.0

    def __post_init__(self) -> None:
        self.require(0 <= self.probability <= 1, f"probability must lie in [0, 1], not {self.probability}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Compute the probability from the budget: the hash is uniform, and one slot of k is always kept."""
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
