"""The measurements from which policies set their parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.passes.routing.policies.base import Slots


@dataclass(frozen=True)
class Sensitivities:
    """Loss increase when a single MoE layer drops slots, measured on calibration text.

    The measure must be 0 if nothing is dropped and nearly additive over layers. The KL divergence from the pretrained
    model is far less noisy than the difference of the cross entropies.

    Attributes:
        k_loss: [layers][k]: loss with uniform k = 1, 2, ... in that layer; the last entry, its pretrained k, is 0.
        masses: Masses P at which top-p was measured, descending from 1.
        mass_loss: [layers][masses]: loss with top-p at that mass in that layer.
    """

    k_loss: tuple[tuple[float, ...], ...] = ()
    masses: tuple[float, ...] = ()
    mass_loss: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.masses) for row in self.mass_loss):
            raise UsageError(f"sensitivities need one loss per mass in every layer ({len(self.masses)} masses)")
        if self.masses != tuple(sorted(self.masses, reverse=True)) or self.masses[:1] not in ((), (1.0,)):
            raise UsageError(f"the masses of sensitivities must descend from 1, not {self.masses}")


@dataclass(frozen=True)
class Calibration:
    """The data that a policy's parameters may depend on.

    Attributes:
        layers: The replayed slots of every MoE layer.
        budget: Share of slots to keep, above 0 and at most 1.
        sensitivities: Measured losses, or None.
    """

    layers: Sequence[Slots]
    budget: float
    sensitivities: Sensitivities | None = None

    def k_loss(self, name: str) -> tuple[tuple[float, ...], ...]:
        """The table [layers][k] that the policy needs.

        Raises:
            UsageError: The table was not measured, or for another model.
        """
        table = self.sensitivities.k_loss if self.sensitivities else ()
        if tuple(len(row) for row in table) != tuple(slots.top_k for slots in self.layers):
            raise UsageError(
                f"policy {name} needs the loss of every k in each of the {len(self.layers)} MoE layers",
                hint="measure them: moec calibrate",
            )
        return table
