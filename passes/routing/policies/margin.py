"""The policy `margin`: fewer experts where the router is confident of its first choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.passes.routing.policies.base import EPSILON, Slots
from moec.passes.routing.policies.complexity import ComplexityPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Margin(ComplexityPolicy):
    """Complexity is the router's lack of confidence, c = -(w_(1) - w_(2)) / sum_j w_j, w_(1) >= w_(2) the largest two.

    The margin between the first two classes is the classic measure of confidence for early exit (BranchyNet,
    arXiv:1709.01686, uses the entropy in its place). k_t follows the rule of `ComplexityPolicy`.
    """

    name: ClassVar[str] = "margin"

    @staticmethod
    def complexity(slots: Slots) -> Tensor:
        """See `ComplexityPolicy.complexity`."""
        return (slots.second - slots.largest) / slots.total.clamp(min=EPSILON)
