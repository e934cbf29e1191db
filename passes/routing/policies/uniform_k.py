"""The baseline `uniform-k`: the same number of experts for every token in every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from moec.passes.routing.policies.base import Policy, Slots

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration


@dataclass(frozen=True)
class UniformK(Policy):
    """Keeps the k largest slots: rank_i < k.

    This is the effect of a lower `num_experts_per_tok` in the config, and the baseline that every other policy must
    beat at the same number of executed experts.

    Attributes:
        k: Number of slots to keep per token. At run time it may be fractional, and is rounded up.
    """

    name: ClassVar[str] = "uniform-k"
    knob: ClassVar[str | None] = "k"
    bisected: ClassVar[bool] = False
    keeps_largest: ClassVar[bool] = True

    k: float = 1

    def __post_init__(self) -> None:
        self.require(self.k >= 1, f"k must be at least 1, not {self.k}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set k to the largest integer within the budget, at least 1."""
        top_k = max(slots.top_k for slots in calibration.layers)
        return cls(k=max(1, int(calibration.budget * top_k + 1e-9)))

    def keep(self, slots: Slots) -> Tensor | None:
        """See `Policy.keep`."""
        if slots.budget is None and self.k >= slots.top_k:
            return None
        return slots.rank < (self.k if slots.budget is None else slots.budget.clamp(min=1.0))
