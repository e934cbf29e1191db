"""The curve of a page's budget: shares of the slots in order, each with a threshold that leaves about that share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moec.compiler.web import budget


class Encoded:
    ids = tuple(range(500))


class Tokenizer:
    def encode(self, text: str, *, add_special_tokens: bool) -> Encoded:
        assert text
        assert not add_special_tokens
        return Encoded()


class Model:
    """Uses `share(value)` of its slots; `asked` counts the questions."""

    scalars = {"routing_budget": 0.25}  # noqa: RUF012 - as in the protocol

    def __init__(self, share: Callable[[float], float]) -> None:
        self.share, self.asked = share, 0

    def kept_shares(self, ids: Sequence[int], name: str) -> Callable[[float], float]:
        assert (len(ids), name) == (budget.TOKENS, "routing_budget")

        def share(value: float) -> float:
            self.asked += 1
            return self.share(value)

        return share


def curve(policy: str, model: Model) -> dict[str, Any]:
    manifest = {"recipe": {"routing": {"policy": policy}}}
    return budget.budget_curve(manifest, model, Tokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "share", "full"),
    [("top-p", lambda p: 0.125 + 0.875 * p**3, 1.0), ("threshold", lambda tau: 1 - 0.8 * tau, 0.0)],
)
def test_each_share_has_a_threshold(policy: str, share: Callable[[float], float], full: float) -> None:
    model = Model(share)
    found = curve(policy, model)
    assert found["full"] == full
    assert found["default_share"] == pytest.approx(share(0.25))
    shares = [row[0] for row in found["curve"]]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    for known, value in found["curve"]:
        assert known == pytest.approx(share(value))
    for wanted in budget.SHARES:
        assert min(abs(known - wanted) for known in shares) < 0.02
    assert model.asked < 100


def test_a_policy_that_moves_in_steps_ends() -> None:
    model = Model(lambda p: 0.25 if p < 0.4 else 0.5 if p < 0.9 else 1.0)
    assert [row[0] for row in curve("top-p", model)["curve"]] == [0.25, 0.5, 1.0]
