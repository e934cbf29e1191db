"""Routing recorded over calibration text, and the slots that a policy would keep of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moec.passes.routing.policies.base import Policy, Slots, selection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of one MoE layer over calibration text of T tokens.

    Attributes:
        weights: [T, k], the routing weights.
        indices: [T, k] integers, the expert of each slot.
        hidden_rms: [T], the root mean square of the hidden state that enters the experts.
        output_norms: [T, k], the L2 norm of each expert's unweighted output, where it was recorded.
    """

    weights: Tensor
    indices: Tensor
    hidden_rms: Tensor
    output_norms: Tensor | None = None

    def slots(self, layer: int) -> Slots:
        """The trace as input of a policy; hidden states are replaced by their RMS [T, 1], which has the same RMS."""
        weights = self.weights.to(torch.float32).clamp(min=0.0)
        return Slots(layer, self.indices, weights, self.hidden_rms.to(torch.float32).unsqueeze(-1))


def replay(traces: Sequence[RoutingTrace]) -> list[Slots]:
    """The slots of every layer. Reuse them, since they cache ranks and masses."""
    return [trace.slots(layer) for layer, trace in enumerate(traces)]


def kept_per_layer(policy: Policy, layers: Sequence[Slots]) -> tuple[float, ...]:
    """Share of the pretrained router's slots that the policy keeps in each layer.

    A slot whose routing weight is 0 counts as dropped.
    """
    return tuple(_kept(policy, slots) / slots.weights.numel() for slots in layers)


def kept_share(policy: Policy, layers: Sequence[Slots]) -> float:
    """Share of all slots that the policy keeps."""
    return sum(_kept(policy, slots) for slots in layers) / sum(slots.weights.numel() for slots in layers)


def _kept(policy: Policy, slots: Slots) -> int:
    mask, live = selection(policy, slots), slots.weights > 0
    return int((live if mask is None else live & mask).sum())
