"""The policy `ratio`: each weight is compared with the largest of its token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from moec.passes.routing.policies.base import EPSILON, Policy, Slots, at_layer

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration

SMALLEST_SCALE = 1e-4


@dataclass(frozen=True)
class Ratio(Policy):
    """Keeps slot i if w_i >= beta_l * max_j w_j (NAEE, arXiv:2402.14800, for the second of two experts).

    beta_l = beta * scale_l. NAEE uses the median of w_2 / w_1 over calibration text as beta_l; calibration sets `scale`
    to this median, and beta scales all layers together. A beta_l above 1 counts as 1.

    Attributes:
        beta: The ratio.
        scale: One number per MoE layer; empty: 1 in every layer.
    """

    name: ClassVar[str] = "ratio"
    knob: ClassVar[str | None] = "beta"
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0 / SMALLEST_SCALE)
    keeps_largest: ClassVar[bool] = True

    beta: float = 0.0
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.require(self.beta >= 0, f"beta must be at least 0, not {self.beta}")
        self.require(all(value >= 0 for value in self.scale), f"every scale must be at least 0, not {self.scale}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set the scale to the median of w_2 / w_1 in each layer."""
        return cls(scale=tuple(_median_ratio(slots) for slots in calibration.layers))

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        beta, scale = self.operand(slots), at_layer(self.scale, slots.layer)
        if scale != 1.0:
            beta = beta * scale
        beta = min(beta, 1.0) if isinstance(beta, float | int) else beta.clamp(max=1.0)
        return slots.weights >= slots.largest * beta


def _median_ratio(slots: Slots) -> float:
    """Median over tokens of the second largest weight divided by the largest."""
    return max(float((slots.second / slots.largest.clamp(min=EPSILON)).median()), SMALLEST_SCALE)
