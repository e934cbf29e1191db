"""What the experts of a layer compute: activations, gates, and the reference of `moec::experts`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True, slots=True)
class Gate:
    """How an expert combines the outputs of its first projection.

    If `gated`, the projection is gate and up, concatenated or `interleaved` (gate0, up0, gate1, ...), and the result is
    `act(min(gate, limit)) * (clamp(up, -limit, limit) + up_offset)`. `act` is `activation`, or
    `x * sigmoid(alpha * x)` if `activation` is "silu" and `alpha` is not 1 (gpt-oss). If not gated, the result is
    `activation(x)`. A `limit` of 0 means no clamp. With `limit_activated`, the gate is clamped after the activation
    (Step 3.7): `min(act(gate), limit) * (clamp(up, -limit, limit) + up_offset)`.
    """

    activation: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0
    limit_activated: bool = False

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Split `projected` [..., 2 * I] into gate and up, each [..., I]."""
        if self.interleaved:
            return projected[..., ::2], projected[..., 1::2]
        gate, up = projected.chunk(2, dim=-1)
        return gate, up

    def __call__(self, projected: Tensor) -> Tensor:
        """Apply to `projected` [..., 2 * I] (or [..., I] without gate); return [..., I]."""
        if not self.gated:
            return ACTIVATIONS[self.activation](projected)
        gate, up = self.split(projected)
        if self.limit:
            gate, up = gate if self.limit_activated else gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.activation == "silu" and self.alpha != 1.0:
            activated = gate * torch.sigmoid(self.alpha * gate)
        else:
            activated = ACTIVATIONS[self.activation](gate)
        if self.limit and self.limit_activated:
            activated = activated.clamp(max=self.limit)
        return activated * (up + self.up_offset if self.up_offset else up)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of one expert as operands of `linear`: gate_up [2I or I, H], down [H, I]."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """How a kernel rounds the inputs of an expert's two products: functions of [n, H] and of [n, I]."""

    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]


def _as_they_are(activations: Tensor) -> Tensor:
    return activations


NOT_ROUNDED = ExpertInputs(_as_they_are, _as_they_are)


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """Inputs and outputs of one expert in one layer, for calibration and accounting.

    Attributes:
        expert: Index of the expert.
        tokens: Rows of the layer's input that are routed to it, [n].
        slots: Routing slot of each row, [n].
        weights: Routing weight of each row, [n].
        inputs: The rows, [n, H].
        inner: Input of the second projection, [n, I].
        outputs: Outputs before they are multiplied by the routing weights, [n, H].
    """

    expert: int
    tokens: Tensor
    slots: Tensor
    weights: Tensor
    inputs: Tensor
    inner: Tensor
    outputs: Tensor


Routed = tuple[Tensor, Tensor, Tensor]
"""The operands of one call of a layer's experts: hidden_states [T, H], indices [T, k] and weights [T, k]."""


def run_experts(
    hidden_states: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Gate,
    expert: Callable[[int], ExpertWeights],
    watch: Callable[[ExpertCall], None] | None = None,
    rounded: ExpertInputs = NOT_ROUNDED,
) -> Tensor:
    """Reference of `moec::experts` that fetches the weights of each expert when it is needed.

    Args:
        hidden_states: [T, H].
        indices: Expert of each slot, [T, k], integer. Values outside the experts (padding slots) are dropped.
        weights: Routing weight of each slot, [T, k]. A weight of exactly 0 drops the slot.
        gate: Activation of the experts.
        expert: Index -> weights of the expert; called once per expert that is used.
        watch: Called after each expert, with activations before rounding.
        rounded: How kernels round the inputs of the two products.

    Returns:
        [T, H] in the dtype of `hidden_states`, accumulated in float32 (float64 for float64 input).
    """
    return run_experts_together([(hidden_states, indices, weights)], gate, expert, watch, rounded)[0]


def run_experts_together(
    calls: Sequence[Routed],
    gate: Gate,
    expert: Callable[[int], ExpertWeights],
    watch: Callable[[ExpertCall], None] | None = None,
    rounded: ExpertInputs = NOT_ROUNDED,
) -> list[Tensor]:
    """The results of `run_experts` for several calls, bit by bit, with each expert fetched once for all of them."""
    sums = [torch.zeros(call[0].shape, dtype=torch.promote_types(call[0].dtype, torch.float32)) for call in calls]
    live = [torch.where(weights != 0, indices, -1) for _, indices, weights in calls]
    for index in torch.unique(torch.cat([own[own >= 0] for own in live])).tolist():
        fetched = None
        for (hidden_states, _, weights), own, out in zip(calls, live, sums, strict=True):
            token, slot = torch.where(own == index)
            if not len(token):
                continue
            fetched = fetched or expert(index)
            inputs, share = hidden_states[token], weights[token, slot]
            inner = gate(F.linear(rounded.gate_up(inputs), fetched.gate_up, fetched.gate_up_bias))
            result = F.linear(rounded.down(inner), fetched.down, fetched.down_bias)
            out.index_add_(0, token, result.to(out.dtype) * share[:, None].to(out.dtype))
            if watch is not None:
                watch(ExpertCall(index, token, slot, share, inputs, inner, result))
    return [out.to(call[0].dtype) for out, call in zip(sums, calls, strict=True)]
