"""The budget of a page: for a share of the routing slots, the value of the policy's threshold that leaves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from moec.compiler.common.errors import ArtifactError
from moec.compiler.text.corpus import read_text
from moec.compiler.text.tokenizer import encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from moec.targets.base import BrowserModel

BUDGET = "routing_budget"
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STEPS, CLOSE = 12, 0.01
"""Largest number of bisections for each share, and the distance from it that suffices: the text is short anyway."""
TOKENS = 48


def budget_curve(manifest: Mapping[str, Any], model: BrowserModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure on a short text how many slots are used at which threshold.

    Returns:
        `input`, its name; `full`, the threshold at which every slot is used; `default_share`, the share at the
        artifact's own threshold; and `curve`, pairs of share and threshold in ascending order of shares.
    """
    from moec.passes.routing.policies.table import policy_type

    ids = encode(tokenizer, read_text()[:2000], ArtifactError, special=False)[:TOKENS]
    share = model.kept_shares(ids, BUDGET)
    low, high = policy_type(str(manifest["recipe"]["routing"]["policy"])).knob_range
    least, most = sorted(((share(value), value) for value in (low, high)), key=lambda pair: pair[0])
    curve = {least[0]: least[1], most[0]: most[1]}
    for wanted in SHARES:
        _bisect(share, curve, wanted)
    return {
        "input": BUDGET,
        "full": most[1],
        "default_share": share(model.scalars[BUDGET]),
        "curve": [list(pair) for pair in sorted(curve.items())],
    }


def _bisect(share: Callable[[float], float], curve: dict[float, float], wanted: float) -> None:
    """Add points near the share `wanted` to a curve of share -> threshold, which has a smaller and a larger one."""
    for _ in range(STEPS):
        below = max((known for known in curve if known <= wanted), default=None)
        above = min((known for known in curve if known >= wanted), default=None)
        if below is None or above is None or min(wanted - below, above - wanted) <= CLOSE:
            return
        middle = (curve[below] + curve[above]) / 2
        found = share(middle)
        if found in curve:  # a step of the policy: no threshold gives a share in between
            return
        curve[found] = middle
