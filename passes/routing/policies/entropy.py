"""The policy `entropy`: more experts for tokens whose routing weights have a high entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.passes.routing.policies.base import EPSILON, Slots
from moec.passes.routing.policies.complexity import ComplexityPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entropy(ComplexityPolicy):
    """Complexity is the entropy of the routing weights, c = -sum_i p_i log p_i in nats with p_i = w_i / sum_j w_j.

    arXiv:2403.07652 uses the router's entropy as a measure of how many experts a token needs, and lowers it by a
    training loss. k_t follows from c as in `ComplexityPolicy`.
    """

    name: ClassVar[str] = "entropy"

    @staticmethod
    def complexity(slots: Slots) -> Tensor:
        """See `ComplexityPolicy.complexity`."""
        shares = slots.shares
        return (shares * shares.clamp(min=EPSILON).log()).sum(-1, keepdim=True) * -1.0
