"""The policy `threshold`: a routing weight times the importance of its layer is compared with one threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from moec.passes.routing.policies.base import Policy, Slots, at_layer

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration

LEAST_IMPORTANCE = 0.01


@dataclass(frozen=True)
class Threshold(Policy):
    """Keeps slot i if its share of the row sum, scaled by the layer's importance, reaches tau (arXiv:2511.15690).

    w_i / sum_j w_j * importance_l >= tau, computed as w_i >= min(tau / importance_l * sum_j w_j, max_j w_j), which
    keeps the largest slot (and equal ones) if no slot reaches the threshold.

    The weights of some routers do not sum to one (`norm_topk_prob` is false). There, a small sum means that the experts
    of the token matter little, which its shares do not show; `absolute` compares w_i * importance_l itself with tau.

    Attributes:
        tau: The threshold.
        importance: One positive number per MoE layer; empty: 1 in every layer.
        absolute: Compare the weights, instead of their shares of the row sum.
    """

    name: ClassVar[str] = "threshold"
    knob: ClassVar[str | None] = "tau"
    keeps_largest: ClassVar[bool] = True
    sensitivities: ClassVar[frozenset[str]] = frozenset({"k"})

    tau: float = 0.0
    importance: tuple[float, ...] = ()
    absolute: bool = False

    def __post_init__(self) -> None:
        self.require(self.tau >= 0, f"tau must be at least 0, not {self.tau}")
        self.require(all(v > 0 for v in self.importance), f"every importance must be above 0: {self.importance}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set the importance to the layer's sum of losses over all k, relative to the most important layer."""
        if calibration.sensitivities is None:
            return cls()
        losses = [max(sum(row), 0.0) for row in calibration.k_loss(cls.name)]
        most = max(losses)
        return cls(importance=tuple(max(loss / most, LEAST_IMPORTANCE) for loss in losses) if most > 0 else ())

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        tau, importance = self.operand(slots), at_layer(self.importance, slots.layer)
        least = tau if importance == 1.0 else tau * (1.0 / importance)
        if not self.absolute:
            return slots.weights >= torch.minimum(slots.total * least, slots.largest)
        if isinstance(least, torch.Tensor):
            return slots.weights >= torch.minimum(slots.largest, least)
        return slots.weights >= slots.largest.clamp(max=least)
