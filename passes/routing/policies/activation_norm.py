"""The policy `activation-norm`: the number of experts depends on the norm of the hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moec.passes.routing.policies.complexity import ComplexityPolicy
from moec.passes.routing.policies.entropy import Entropy

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.policies.base import Slots


@dataclass(frozen=True)
class ActivationNorm(ComplexityPolicy):
    """Complexity is the root mean square of the hidden state, c = sqrt(mean_h x_h^2).

    It is compared with its quartiles over calibration text in the layer, see `ComplexityPolicy`.
    The sign of spread_l is that of the correlation of c with the entropy of the routing weights in the layer, since the
    norm grows with difficulty in some layers and falls in others. REAP (arXiv:2510.13999) weights experts by the norm
    of their output; this policy uses the norm of their input, which is known before they run.
    """

    name: ClassVar[str] = "activation-norm"

    @staticmethod
    def complexity(slots: Slots) -> Tensor:
        """See `ComplexityPolicy.complexity`."""
        return slots.hidden_rms

    @staticmethod
    def direction(slots: Slots) -> float:
        """The sign of the correlation of the norm with the entropy of the routing weights."""
        norm, entropy = slots.hidden_rms.flatten(), Entropy.complexity(slots).flatten()
        return 1.0 if float(((norm - norm.mean()) * (entropy - entropy.mean())).sum()) >= 0 else -1.0
