"""What has been measured: the front, and who is given up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from moec.compiler.search.archive import Archive
from moec.compiler.search.objectives import EXPERT_FLOPS, PERPLEXITY, Objective
from moec.compiler.search.store import Measured

WINDOWS = 8


class Identity:
    """A space whose individuals are costs in percent."""

    def variant(self, genome: np.ndarray) -> Any:
        return int(genome[0])

    def of(self, variant: int, _kept: Any) -> dict[str, float]:
        return {EXPERT_FLOPS.name: variant / 100}


def archive(limits: dict[Objective, float] | None = None) -> Archive:
    reference = Measured((1.0,) * WINDOWS, (0.0,) * WINDOWS, ((1.0,),) * WINDOWS)
    same: Any = Identity()
    return Archive(same, same, reference, (PERPLEXITY, EXPERT_FLOPS), limits or {})


def measured(loss: float, windows: int = WINDOWS, noise: float = 0.0) -> Measured:
    losses = tuple(1 + loss + noise * (-1) ** index for index in range(windows))
    return Measured(losses, (loss,) * windows, ((1.0,),) * windows)


def test_the_front_is_what_nothing_dominates() -> None:
    found = archive()
    for cost, loss in ((100, 0.0), (80, 0.01), (90, 0.02), (60, 0.05), (70, 0.05)):
        found.add((cost,), measured(loss), 0, None)
    assert [item.genome for item in found.front] == [(100,), (80,), (60,)]
    assert found.front[1].values["perplexity"] == pytest.approx(math.expm1(0.01))


def test_limits_are_kept_and_the_nearest_is_known() -> None:
    found = archive({PERPLEXITY: 0.02, EXPERT_FLOPS: 0.5})
    found.add((100,), measured(0.0), 0, None)
    found.add((55,), measured(0.02), 0, None)
    assert not found.front
    nearest = found.nearest()
    assert nearest is not None
    assert nearest.genome == (55,)
    found.add((50,), measured(0.015), 0, None)
    assert [item.genome for item in found.front] == [(50,)]


def test_what_is_dominated_beyond_doubt_is_given_up() -> None:
    found = archive()
    found.add((80,), measured(0.01), 0, None)
    assert found.hopeless((80,), measured(0.03, 4, noise=0.001))
    assert not found.hopeless((80,), measured(0.03, 4, noise=0.05))
    assert not found.hopeless((79,), measured(0.03, 4, noise=0.001))
    assert not found.hopeless((80,), measured(0.005, 4, noise=0.001))
    assert not found.hopeless((80,), measured(0.03, 1))


def test_what_breaks_a_limit_beyond_doubt_is_given_up() -> None:
    found = archive({PERPLEXITY: 0.02})
    assert found.hopeless((10,), measured(0.05, 4, noise=0.001))
    assert not found.hopeless((10,), measured(0.01, 4, noise=0.001))


def test_what_was_given_up_is_not_on_the_front() -> None:
    found = archive()
    found.add((80,), measured(0.01, 4), 0, None)
    assert not found.front
    assert not found.found[80,].complete
