"""The interface of a routing policy, and the one function that applies any of them.

A policy only says which slots to keep. `select` does everything else, so that the contract of `moec::select`
lives in one place: a dropped slot's weight is exactly 0, the slot with the largest weight is never dropped,
and the row sum is preserved unless the policy says otherwise.

Everything here is traced into aten ops that all targets have (compare, where, arithmetic, sum, amax, mean, matmul).
There is no sort, top-k or cumulative sum: k is small, so ranks come from comparing the slots pairwise, which is
also what makes a policy independent of the order in which a router hands over its slots. Where the slots are known to
come in descending order, ranks are constants and the mass before each slot is one product with a constant matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from moec.compiler.common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration

# Weights and row sums below this count as 0. It keeps 0 / 0 and log(0) out of the graph.
EPSILON = 1e-20


@dataclass(frozen=True)
class Slots:
    """What a policy may look at: the routed slots of T tokens in one MoE layer.

    Quantities that several parts of a rule share are computed once, so that they are traced once.

    Attributes:
        layer: Number of the MoE layer, counted from 0.
        indices: [T, k] integers, the expert of each slot.
        weights: [T, k] float32, not negative, in any order.
        hidden: [T, H], the input of the experts.
        budget: Scalar tensor that replaces the policy's knob at run time, or None.
        descending: The weights of each row are known to fall, or stay, from slot to slot.
    """

    layer: int
    indices: Tensor
    weights: Tensor
    hidden: Tensor
    budget: Tensor | None = None
    descending: bool = False

    @property
    def top_k(self) -> int:
        """Slots per token."""
        return int(self.weights.shape[-1])

    @cached_property
    def total(self) -> Tensor:
        """Row sum of the weights: [T, 1] float32."""
        return self.weights.sum(-1, keepdim=True)

    @cached_property
    def largest(self) -> Tensor:
        """Largest weight of each row: [T, 1] float32."""
        if self.descending:
            return self.weights.narrow(1, 0, 1)
        return self.weights.amax(-1, keepdim=True)

    @cached_property
    def second(self) -> Tensor:
        """Second largest weight of each row, 0 where there is one slot: [T, 1] float32."""
        if self.descending and self.top_k > 1:
            return self.weights.narrow(1, 1, 1)
        return torch.where(self.rank == 0, 0.0, self.weights).amax(-1, keepdim=True)

    @cached_property
    def shares(self) -> Tensor:
        """Weights relative to their row sum: [T, k] float32, all 0 in a row of zeros."""
        return self.weights / self.total.clamp(min=EPSILON)

    @cached_property
    def others(self) -> Tensor:
        """The weights laid along the last axis, to be compared with each slot: [T, 1, k] float32."""
        return self.weights.unsqueeze(-2)

    @cached_property
    def before(self) -> Tensor:
        """[T, k, k] bool: slot j comes before slot i in descending order, the first of equals first."""
        other, own = self.others, self.weights.unsqueeze(-1)
        slot = torch.arange(self.top_k, device=self.weights.device)
        earlier = slot.unsqueeze(0) < slot.unsqueeze(1)
        return torch.where(earlier, other >= own, other > own)

    @cached_property
    def rank(self) -> Tensor:
        """Place of each slot in descending order, counted from 0: [T, k] float32, or [1, k] where that is constant."""
        if self.descending:
            return torch.arange(self.top_k, dtype=torch.float32).unsqueeze(0)
        return self.before.to(torch.float32).sum(-1)

    @cached_property
    def mass_before(self) -> Tensor:
        """Sum of the weights that come before each slot in descending order: [T, k] float32."""
        if self.descending:
            return self.weights @ torch.ones(self.top_k, self.top_k).triu(1)
        return torch.where(self.before, self.others, 0.0).sum(-1)

    @cached_property
    def hidden_rms(self) -> Tensor:
        """Root mean square of the hidden state: [T, 1] float32."""
        hidden = self.hidden.to(torch.float32)
        return (hidden * hidden).mean(-1, keepdim=True).sqrt()


@dataclass(frozen=True)
class Policy(ABC):
    """Which experts a token uses, of those that the router gave it.

    A policy is a frozen dataclass: its fields are its parameters (numbers, and tuples with one number per MoE
    layer), so it is hashable, comparable and serialisable. It must be row-independent: a token's slots depend
    on that token alone, never on its batch or its neighbours.

    Attributes:
        renormalize: Scale the kept weights so that the row sum is preserved.
    """

    name: ClassVar[str]
    """Name in recipes and on the command line."""
    knob: ClassVar[str | None] = None
    """The scalar field that calibration bisects and that a `budget` operand replaces; None: there is none."""
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """Values of the knob between which the kept share goes from least to all, or from all to least."""
    bisected: ClassVar[bool] = True
    """Calibration bisects the knob; False: `prepare` sets it."""
    sensitivities: ClassVar[frozenset[str]] = frozenset()
    """What calibration measures for `prepare`: "k" (the loss of every k per layer), "mass" (that of top-p masses)."""
    keeps_largest: ClassVar[bool] = False
    """The rule by itself never drops the largest slot, so that `select` need not add it."""

    renormalize: bool = True

    @abstractmethod
    def keep(self, slots: Slots) -> Tensor | None:
        """Says which slots stay.

        Args:
            slots: The routed slots of one layer.

        Returns:
            [T, k] bool, or None where this layer drops nothing and needs no node.
        """

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:  # noqa: ARG003 -- only some policies have per-layer parameters
        """The policy with its per-layer parameters set from calibration text, before its knob is bisected."""
        return cls()

    def operand(self, slots: Slots) -> Tensor | float:
        """The knob: the run-time operand where there is one, else the constant."""
        return self.knob_value if slots.budget is None else slots.budget

    @property
    def knob_value(self) -> float:
        """Value of the field that is the knob."""
        assert self.knob is not None
        value: float = getattr(self, self.knob)
        return value

    def with_knob(self, value: float) -> Self:
        """The same policy with another value of its knob."""
        assert self.knob is not None
        changed: dict[str, Any] = {self.knob: value}
        return replace(self, **changed)

    def require(self, valid: bool, message: str) -> None:
        """Raises UsageError naming the policy unless the parameters are valid."""
        if not valid:
            raise UsageError(f"policy {self.name}: {message}", hint="See docs/routing.md for its parameters.")


def at_layer(values: Sequence[float], layer: int, default: float = 1.0) -> float:
    """A per-layer parameter; an empty tuple means the default in every layer."""
    if not values:
        return default
    if layer >= len(values):
        raise UsageError(
            f"a routing policy has parameters for {len(values)} MoE layers, but the model has a layer {layer}",
            hint="Calibrate the policy on this model: moec calibrate.",
        )
    return values[layer]


def selection(policy: Policy, slots: Slots) -> Tensor | None:
    """The slots that stay: [T, k] bool with the largest of each row, or None for all.

    Of several equal largest slots at least the first stays.
    """
    kept = policy.keep(slots)
    if kept is None or policy.keeps_largest:
        return kept
    return kept | (slots.rank == 0)


def select(
    policy: Policy,
    layer: int,
    hidden: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    budget: Tensor | None = None,
) -> Tensor:
    """Applies a policy to the routing weights of one MoE layer: what `moec::select` means.

    Args:
        policy: The policy.
        layer: Number of the MoE layer, counted from 0.
        hidden: [T, H], the input of the experts.
        indices: [T, k] integers, the expert of each slot.
        weights: [T, k] floating point, in any order; negative weights count as 0.
        budget: Scalar float32 tensor that replaces the policy's knob at run time.

    Returns:
        [T, k] in the dtype of `weights`: exactly 0 in dropped slots, never 0 in the largest slot of a row that
        has a positive weight.

    Raises:
        UsageError: `budget` is given to a policy without a knob, or the policy was calibrated for fewer layers.
    """
    if budget is not None and policy.knob is None:
        raise UsageError(
            f"policy {policy.name} has no scalar that could be set at run time",
            hint="Drop --routing-input, or choose a policy with a threshold, such as top-p or capped.",
        )
    slots = Slots(layer, indices, weights.to(torch.float32).clamp(min=0.0), hidden, budget)
    mask = selection(policy, slots)
    if mask is None:
        return weights
    kept = torch.where(mask, slots.weights, 0.0)
    if policy.renormalize:
        kept = kept * (slots.total / kept.sum(-1, keepdim=True).clamp(min=EPSILON))
    return kept.to(weights.dtype)
