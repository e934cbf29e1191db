"""Fits a policy to a budget, from traces of calibration text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.compiler.common.errors import UsageError
from moec.passes.routing.calibrate.sensitivities import Calibration, Sensitivities
from moec.passes.routing.calibrate.traces import RoutingTrace, kept_share, replay
from moec.passes.routing.policies.table import policy_type

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moec.passes.routing.policies.base import Policy, Slots

TOLERANCE = 0.005
BISECTIONS = 60


def fit(
    name: str,
    traces: Sequence[RoutingTrace],
    budget: float,
    sensitivities: Sensitivities | None = None,
) -> Policy:
    """Find the parameters with which a policy keeps the share `budget` of the slots of calibration text.

    Args:
        name: The policy's name.
        traces: One trace per MoE layer, in order.
        budget: Share of the pretrained router's slots to keep; above 0 and at most 1.
        sensitivities: Measured losses; `layer-k` and `capped` need them, `top-p` and `threshold` use them.

    Returns:
        The policy, which meets the budget within half a percent of all slots. `uniform-k` and `layer-k` use integer
        numbers of experts, and keep as many slots as the budget allows.

    Raises:
        UsageError: The budget cannot be reached, or something that the policy needs is missing.
    """
    if not 0 < budget <= 1:
        raise UsageError(f"an expert budget is a share of the pretrained top-k in (0, 1], not {budget}")
    chosen = policy_type(name)
    layers = replay(traces)
    start = chosen.prepare(Calibration(layers, budget, sensitivities))
    return bisect_knob(start, layers, budget) if chosen.bisected and chosen.knob else start


def bisect_knob(start: Policy, layers: Sequence[Slots], budget: float) -> Policy:
    """Set the policy's knob by bisection so that it keeps the share `budget` of the slots.

    Args:
        start: The policy, with its per-layer parameters set.
        layers: The replayed slots of every MoE layer.
        budget: Share of slots to keep.

    Raises:
        UsageError: No value of the knob comes within half a percent.
    """
    best, kept = nearest_knob(start, layers, budget)
    if abs(kept - budget) > TOLERANCE:
        least, most = sorted(kept_share(start.with_knob(value), layers) for value in start.knob_range)
        raise UsageError(
            f"policy {start.name} cannot keep {budget:.1%} of the slots of this text: the nearest is {kept:.1%}",
            hint=f"it can keep between {least:.1%} and {most:.1%}; every token keeps at least one expert per layer",
        )
    return best


def nearest_knob(
    start: Policy, layers: Sequence[Slots], budget: float, *, steps: int = BISECTIONS
) -> tuple[Policy, float]:
    """The policy whose knob comes nearest to keeping the budget's share of the slots, and the share that it keeps.

    The kept share is monotone in the knob; its values at the two ends of the range show whether it rises or falls.

    Args:
        start: The policy, with its per-layer parameters set.
        layers: The replayed slots of every MoE layer.
        budget: Share of slots to keep.
        steps: Bisections.
    """
    low, high = start.knob_range
    less, more = start.with_knob(low), start.with_knob(high)
    kept_less, kept_more = kept_share(less, layers), kept_share(more, layers)
    if kept_less > kept_more:
        (low, high), (less, more), (kept_less, kept_more) = (high, low), (more, less), (kept_more, kept_less)
    for _ in range(steps):
        middle = (low + high) / 2
        candidate = start.with_knob(middle)
        kept = kept_share(candidate, layers)
        if kept < budget:
            low, less, kept_less = middle, candidate, kept
        else:
            high, more, kept_more = middle, candidate, kept
    return (more, kept_more) if kept_more - budget <= budget - kept_less else (less, kept_less)
