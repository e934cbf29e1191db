"""Base of policies that estimate the complexity of a token and choose its number of experts accordingly."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from moec.passes.routing.policies.base import Policy, Slots, at_layer

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration

QUARTILES = torch.tensor([0.25, 0.5, 0.75])
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class ComplexityPolicy(Policy):
    """A number of experts per token: k_t = ceil(center + gain * (c_t - location_l) / spread_l), at least 1.

    c_t is the estimated complexity of token t. Calibration sets location_l to its median in layer l, and spread_l to
    its interquartile range, which is negative if tokens of lower complexity need more experts. Slot i is kept if
    rank_i < k_t.

    Attributes:
        center: Number of experts of a token of median complexity; fractions are rounded up.
        gain: Number of additional experts per spread above the median.
        location: One number per MoE layer; empty: 0 in every layer.
        spread: One number per MoE layer, not 0; empty: 1 in every layer.
    """

    knob: ClassVar[str | None] = "center"
    knob_range: ClassVar[tuple[float, float]] = (-1e3, 1e3)
    keeps_largest: ClassVar[bool] = True

    center: float = 1.0
    gain: float = 1.0
    location: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self.require(0.0 not in self.spread, f"no spread may be 0: {self.spread}")
        same = len(self.location) == len(self.spread)
        self.require(same, "location and spread need one number per MoE layer each")

    @staticmethod
    @abstractmethod
    def complexity(slots: Slots) -> Tensor:
        """Estimated complexity of each token: [T, 1] float32."""

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set location and spread to the median and the interquartile range in each layer."""
        quartiles = [cls.complexity(slots).flatten().quantile(QUARTILES) for slots in calibration.layers]
        signs = [cls.direction(slots) for slots in calibration.layers]
        return cls(
            location=tuple(float(values[1]) for values in quartiles),
            spread=tuple(
                sign * max(float(values[2] - values[0]), SMALLEST_SPREAD)
                for sign, values in zip(signs, quartiles, strict=True)
            ),
        )

    @staticmethod
    def direction(slots: Slots) -> float:  # noqa: ARG004 -- only an estimate of unknown sign looks at the text
        """1 if tokens of higher complexity need more experts, -1 if they need fewer."""
        return 1.0

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        slope = self.gain / at_layer(self.spread, slots.layer)
        offset = self.operand(slots) - slope * at_layer(self.location, slots.layer, default=0.0)
        return slots.rank < (self.complexity(slots) * slope + offset).clamp(min=1.0)
