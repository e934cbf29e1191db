"""The policy `margin`: fewer experts for tokens whose largest routing weight is far above the second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.passes.routing.policies.base import EPSILON, Slots
from moec.passes.routing.policies.complexity import ComplexityPolicy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Margin(ComplexityPolicy):
    """Complexity is the negative margin, c = -(w_(1) - w_(2)) / sum_j w_j, with the largest two weights w_(1) >= w_(2).

    The margin between the first two classes is a classic measure of confidence for early exit (BranchyNet,
    arXiv:1709.01686, uses the entropy instead). k_t follows from c as in `ComplexityPolicy`.
    """

    name: ClassVar[str] = "margin"

    @staticmethod
    def complexity(slots: Slots) -> Tensor:
        """See `ComplexityPolicy.complexity`."""
        return (slots.second - slots.largest) / slots.total.clamp(min=EPSILON)
