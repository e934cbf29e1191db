"""The policy `per-layer`: another policy, or none, in each MoE layer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from moec.compiler.common.errors import UsageError
from moec.passes.routing.policies.base import Policy, Slots, selection

if TYPE_CHECKING:
    from torch import Tensor

    from moec.passes.routing.calibrate.sensitivities import Calibration


@dataclass(frozen=True)
class PerLayer(Policy):
    """Keeps in layer l what the policy of that layer keeps; all slots where it has none.

    Which rule serves a layer best, and how much it may save, differs from layer to layer; `moec search` looks for both.
    A policy with numbers per MoE layer has one of each here, for the layer that it stands in. Kept weights are scaled
    where this policy and that of the layer say so.

    Attributes:
        layers: A policy per MoE layer, or None. In a recipe: `{policy: top-p, mass: 0.9}`.
    """

    name: ClassVar[str] = "per-layer"
    keeps_largest: ClassVar[bool] = True

    layers: tuple[Policy | None, ...] = ()

    def __post_init__(self) -> None:
        for own in self.layers:
            self.require(own is None or isinstance(own, Policy), f"{own!r} is no policy: write {{policy: NAME, ...}}")
            self.require(not isinstance(own, PerLayer), "a layer has one policy, not one for each layer")

    @classmethod
    def prepare(cls, calibration: Calibration) -> Self:  # noqa: ARG003 -- see `Policy.prepare`
        """Refuses: which policy each layer gets is searched, not fitted.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "policy per-layer is not fitted to a budget: each layer has a policy with parameters of its own",
            hint="moec search finds them; a recipe gives them as routing.parameters",
        )

    def renormalizes(self, layer: int) -> bool:
        """See `Policy.renormalizes`."""
        own = self.layers[layer] if self.layers else None
        return self.renormalize and (own is None or own.renormalize)

    def compensates(self, layer: int) -> int:
        """See `Policy.compensates`."""
        own = self.layers[layer] if layer < len(self.layers) else None
        return 0 if own is None else own.compensation or self.compensation

    def keep(self, slots: Slots) -> Tensor | None:
        """See `Policy.keep`."""
        if self.layers and slots.layer >= len(self.layers):
            raise UsageError(
                f"policy per-layer has {len(self.layers)} layers, but the model has a MoE layer {slots.layer}",
                hint="moec search finds the policies of this model",
            )
        own = self.layers[slots.layer] if self.layers else None
        return None if own is None else selection(own, replace(slots, layer=0))


def in_layer(policy: Policy, layer: int) -> Policy | None:
    """What `policy` is in one MoE layer, as `PerLayer` holds it: one number in place of a tuple with one per layer."""
    if isinstance(policy, PerLayer):
        return policy.layers[layer] if policy.layers else None
    values = {field.name: getattr(policy, field.name) for field in fields(policy)}
    own: dict[str, Any] = {
        name: (value[layer],) for name, value in values.items() if isinstance(value, tuple) and value
    }
    return replace(policy, **own)
