"""The interface of a routing policy, and the one function that applies any of them.

A slot is one of the k experts that the router selected for a token. A policy only decides which slots to keep.
`select` does everything else, so that the contract of `moec::select` is in one place: the weight of a dropped slot is
exactly 0, the slot with the largest weight is never dropped, and the row sum is preserved unless the policy says
otherwise.

Everything here is traced into aten ops that all targets support (compare, where, arithmetic, sum, amax, mean, matmul).
There is no sort, top-k or cumulative sum: since k is small, ranks are computed by comparing slots pairwise, so that a
policy does not depend on the order of the router's slots. If slots are known to be in descending order, ranks are
constants, and the mass before each slot is one product with a constant matrix.
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

# Weights and row sums below this count as 0, which avoids 0 / 0 and log(0).
EPSILON = 1e-20


@dataclass(frozen=True)
class Slots:
    """The input of a policy: the slots of T tokens in one MoE layer.

    Cached properties are computed once, so that they are traced once.

    Attributes:
        layer: Index of the MoE layer.
        indices: [T, k] integers, the expert of each slot.
        weights: [T, k] float32, not negative, in any order.
        hidden: [T, H], the input of the experts.
        budget: Scalar tensor that replaces the policy's knob at run time, or None.
        descending: Whether the weights of each row are known to be in descending order.
    """

    layer: int
    indices: Tensor
    weights: Tensor
    hidden: Tensor
    budget: Tensor | None = None
    descending: bool = False

    @property
    def top_k(self) -> int:
        """Number of slots per token, k."""
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
        """Second largest weight of each row, 0 if there is a single slot: [T, 1] float32."""
        if self.descending and self.top_k > 1:
            return self.weights.narrow(1, 1, 1)
        return torch.where(self.rank == 0, 0.0, self.weights).amax(-1, keepdim=True)

    @cached_property
    def shares(self) -> Tensor:
        """Weights divided by their row sum: [T, k] float32; 0 in a row of zeros."""
        return self.weights / self.total.clamp(min=EPSILON)

    @cached_property
    def others(self) -> Tensor:
        """The weights as [T, 1, k] float32, to compare each slot with all others."""
        return self.weights.unsqueeze(-2)

    @cached_property
    def before(self) -> Tensor:
        """[T, k, k] bool, indexed [t, i, j]: slot j comes before slot i in descending order; ties by position."""
        other, own = self.others, self.weights.unsqueeze(-1)
        slot = torch.arange(self.top_k, device=self.weights.device)
        earlier = slot.unsqueeze(0) < slot.unsqueeze(1)
        return torch.where(earlier, other >= own, other > own)

    @cached_property
    def rank(self) -> Tensor:
        """Rank of each slot in descending order, from 0: [T, k] float32, or [1, k] if it is constant."""
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
    """Decides which of the router's experts a token uses.

    A policy is a frozen dataclass: its fields are its parameters (numbers, or tuples with one number per MoE layer), so
    it is hashable, comparable and serialisable. It must be row-independent: which slots a token keeps depends on that
    token alone, never on its batch or its neighbours.

    Attributes:
        renormalize: Whether to scale the kept weights so that the row sum is preserved.
        compensation: Rank of the linear map that, with the mean output of each expert, stands in for dropped experts;
            0: nothing does. See `moec.passes.routing.compensation`.
    """

    name: ClassVar[str]
    """Name in recipes and on the command line."""
    knob: ClassVar[str | None] = None
    """Scalar field that calibration bisects and that the run-time `budget` replaces; None: no such field."""
    knob_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """Range of the knob, over which the kept share goes from its minimum to 1, or from 1 to its minimum."""
    bisected: ClassVar[bool] = True
    """Whether calibration bisects the knob; if False, `prepare` sets it."""
    sensitivities: ClassVar[frozenset[str]] = frozenset()
    """Measurements that `prepare` needs: "k" (the loss of every k per layer), "mass" (the loss of top-p masses)."""
    keeps_largest: ClassVar[bool] = False
    """Whether the rule itself never drops the largest slot, so that `select` need not add it."""

    renormalize: bool = True
    compensation: int = 0

    @abstractmethod
    def keep(self, slots: Slots) -> Tensor | None:
        """Decide which slots to keep.

        Args:
            slots: The slots of one layer.

        Returns:
            [T, k] bool, or None if the policy drops nothing in this layer, which then needs no node.
        """

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:  # noqa: ARG003 -- only some policies have per-layer parameters
        """The policy with its per-layer parameters set from calibration text; its knob is bisected afterwards."""
        return cls()

    def operand(self, slots: Slots) -> Tensor | float:
        """The knob: the run-time budget if there is one, else the policy's own value."""
        return self.knob_value if slots.budget is None else slots.budget

    @property
    def knob_value(self) -> float:
        """Value of the knob."""
        assert self.knob is not None
        value: float = getattr(self, self.knob)
        return value

    def with_knob(self, value: float) -> Self:
        """The policy with another value of its knob."""
        assert self.knob is not None
        changed: dict[str, Any] = {self.knob: value}
        return replace(self, **changed)

    def renormalizes(self, layer: int) -> bool:  # noqa: ARG002 -- some policies differ from layer to layer
        """Whether the kept weights of an MoE layer are scaled."""
        return self.renormalize

    def compensates(self, layer: int) -> int:  # noqa: ARG002 -- some policies differ from layer to layer
        """The rank of the compensation of an MoE layer; 0: none."""
        return self.compensation

    def require(self, valid: bool, message: str) -> None:
        """Raise a UsageError that names the policy unless `valid` is true."""
        if not valid:
            raise UsageError(f"policy {self.name}: {message}", hint="see docs/routing.md for its parameters")


def at_layer(values: Sequence[float], layer: int, default: float = 1.0) -> float:
    """The value of a per-layer parameter in a layer; an empty tuple means the default in every layer."""
    if not values:
        return default
    if layer >= len(values):
        raise UsageError(
            f"a routing policy has parameters for {len(values)} MoE layers, but the model has a layer {layer}",
            hint="calibrate the policy on this model: moec calibrate",
        )
    return values[layer]


def selection(policy: Policy, slots: Slots) -> Tensor | None:
    """The slots to keep, always including the largest of each row: [T, k] bool, or None for all.

    Among several equal largest slots, at least the first is kept.
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
    """Apply a policy to the routing weights of one MoE layer. This defines the semantics of `moec::select`.

    Args:
        policy: The policy.
        layer: Index of the MoE layer.
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
            f"policy {policy.name} has no parameter that can be set at run time",
            hint="drop --routing-input, or choose a policy with a threshold, such as top-p or capped",
        )
    slots = Slots(layer, indices, weights.to(torch.float32).clamp(min=0.0), hidden, budget)
    mask = selection(policy, slots)
    if mask is None:
        return weights
    kept = torch.where(mask, slots.weights, 0.0)
    if policy.renormalizes(layer):
        kept = kept * (slots.total / kept.sum(-1, keepdim=True).clamp(min=EPSILON))
    return kept.to(weights.dtype)
