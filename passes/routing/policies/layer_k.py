"""The policy `layer-k`: a fixed number of experts per token in each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from moec.passes.routing.calibrate.slot_allocation import layer_ks
from moec.passes.routing.policies.base import Policy, Slots, at_layer

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration


@dataclass(frozen=True)
class LayerK(Policy):
    """Keeps the k_l largest slots in layer l: rank_i < k_l.

    The k_l come from exact dynamic programming over measured sensitivities, as in Alloc-MoE (arXiv:2604.08133). LExI
    (arXiv:2509.02753) searches the same space by evolution. Layers that keep every slot get no node.

    Attributes:
        ks: Number of slots to keep per token, one number per MoE layer.
    """

    name: ClassVar[str] = "layer-k"
    keeps_largest: ClassVar[bool] = True
    sensitivities: ClassVar[frozenset[str]] = frozenset({"k"})

    ks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.require(all(k >= 1 for k in self.ks), f"every k must be at least 1, not {self.ks}")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:
        """Set the k of every layer by dynamic programming."""
        return cls(ks=layer_ks(calibration.k_loss(cls.name), calibration.budget))

    def keep(self, slots: Slots) -> Tensor | None:
        """See `Policy.keep`."""
        k = at_layer(self.ks, slots.layer, default=slots.top_k)
        return None if k >= slots.top_k else slots.rank < k
