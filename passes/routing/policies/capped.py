"""The policy `capped`: a maximum number of experts per layer, and a share of the routing mass below it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from moec.passes.routing.calibrate.slot_allocation import layer_ks
from moec.passes.routing.policies.base import Slots, at_layer
from moec.passes.routing.policies.top_p import TopP

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration


@dataclass(frozen=True)
class Capped(TopP):
    """Keeps slot i if layer-k and top-p both keep it: rank_i < cap_l and mass_before_i < P_l * sum_j w_j.

    It allocates across layers and then across tokens, as Alloc-MoE (arXiv:2604.08133) does. The caps bound the cost of
    the most expensive token, which top-p alone does not.

    Attributes:
        caps: Maximum number of slots per token, one number per MoE layer.
    """

    name: ClassVar[str] = "capped"
    sensitivities: ClassVar[frozenset[str]] = frozenset({"k", "mass"})

    caps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(all(cap >= 1 for cap in self.caps), f"every cap must be at least 1, not {self.caps}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set the caps by dynamic programming for half the saving; the mass, bisected later, saves the rest."""
        k_loss = calibration.k_loss(cls.name)
        slots = sum(len(row) for row in k_loss)
        # Rounded up, since caps below the budget would leave nothing for the mass to adjust.
        half = math.ceil((1.0 + calibration.budget) / 2 * slots - 1e-9)
        caps = layer_ks(k_loss, half / slots)
        return replace(super().prepare(calibration), caps=caps)

    def keep(self, slots: Slots) -> Tensor:
        """See `Policy.keep`."""
        kept = super().keep(slots)
        cap = at_layer(self.caps, slots.layer, default=slots.top_k)
        return kept if cap >= slots.top_k else kept & (slots.rank < cap)
