"""Predicts what a variant loses without running it, and says how sure it is.

Divergences of single choices add up nearly: with v_g the root of what choice g loses by itself, S = sum_g v_g^2 is the
prediction of the additive model. What was measured is regressed as the ratio to S by a Gaussian process (Rasmussen and
Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 and 5) with prior mean 1 and the kernel

    a sum_g f_g f'_g  +  c exp(-|e - e'|^2 / 2 l^2 - (log S - log S')^2 / 2 m^2)  +  n,

f = v^2 / S, e = v / |v|: a lets single choices count more or less than measured, c lets them help or hurt each other
where they go together, and more or less where much is changed. n is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.stats import spearmanr

FLOOR = 1e-6
"""Nats: least S, where ratios would mean nothing."""
START = np.log([0.1, 0.1, 0.5, 1.0, 0.02])
"""Logarithms of a, c, l, m and n before they are fitted."""
BOUNDS = [(-9.0, 3.0)] * 2 + [(-3.0, 2.0), (-2.0, 3.0), (-9.0, 1.0)]
LEAST = 12
"""Measured individuals before the parameters of the kernel are fitted."""
MISLEADS = 0.7
"""Rank correlation below which a surrogate misleads."""

Array = np.ndarray


@dataclass(frozen=True)
class _Features:
    """Of individuals: shares of S [n, G], directions [n, G], logarithms of S [n]."""

    shares: Array
    directions: Array
    logs: Array

    @classmethod
    def of(cls, roots: Array) -> _Features:
        squares = roots**2
        sums = np.maximum(squares.sum(axis=1, keepdims=True), FLOOR)
        return cls(squares / sums, roots / np.sqrt(sums), np.log(sums[:, 0]))


def _kernel(theta: Array, first: _Features, second: _Features) -> Array:
    a, c, length, scale, _ = np.exp(theta)
    cosines = first.directions @ second.directions.T
    norms = (first.directions**2).sum(1)[:, None] + (second.directions**2).sum(1)[None]
    distances = np.maximum(norms - 2 * cosines, 0.0) / (2 * length**2)
    distances = distances + (first.logs[:, None] - second.logs[None]) ** 2 / (2 * scale**2)
    found: Array = a * (first.shares @ second.shares.T) + c * np.exp(-distances)
    return found


class Surrogate:
    """A regression of measured losses on the roots of what single choices lose.

    Args:
        roots: Of the measured individuals, [n, G].
        losses: What they lose, nats, [n].
        variances: Of `losses`, where they are of some windows only; 0 where they are exact, [n].
        theta: Parameters of an earlier fit to start from.
        refit: Whether the parameters are fitted to these individuals, or taken as they are.
    """

    def __init__(
        self, roots: Array, losses: Array, variances: Array, theta: Array | None = None, *, refit: bool = True
    ) -> None:
        self._features = _Features.of(roots)
        sums = np.exp(self._features.logs)
        self._ratios, self._noise = losses / sums - 1.0, variances / sums**2
        self.theta = START if theta is None else theta
        if refit and len(losses) >= LEAST:
            self.theta = minimize(
                self._surprise, self.theta, method="L-BFGS-B", bounds=BOUNDS, options={"maxiter": 25}
            ).x
        self._factor = cho_factor(self._covariance(self.theta), lower=True)
        self._weights = cho_solve(self._factor, self._ratios)

    def predict(self, roots: Array) -> tuple[Array, Array]:
        """Expected loss and its standard deviation, nats: [n] each, for roots [n, G]."""
        features = _Features.of(roots)
        sums = np.exp(features.logs)
        cross = _kernel(self.theta, features, self._features)
        own = np.array([_kernel(self.theta, one, one)[0, 0] for one in _each(features)])
        solved = solve_triangular(self._factor[0], cross.T, lower=True)
        variance = np.maximum(own - (solved**2).sum(axis=0), 0.0)
        exact = (roots**2).sum(axis=1) < FLOOR
        return np.where(exact, 0.0, sums * (1.0 + cross @ self._weights)), np.where(
            exact, 0.0, sums * np.sqrt(variance)
        )

    def _covariance(self, theta: Array) -> Array:
        noise = np.exp(theta[4]) + self._noise
        found: Array = _kernel(theta, self._features, self._features) + np.diag(noise)
        return found

    def _surprise(self, theta: Array) -> float:
        """Negative logarithm of the marginal likelihood (ibid., equation 2.30), without its constant."""
        try:
            factor = cho_factor(self._covariance(theta), lower=True)
        except np.linalg.LinAlgError:
            return 1e9
        half: float = np.log(np.diag(factor[0])).sum()
        return 0.5 * float(self._ratios @ cho_solve(factor, self._ratios)) + half


def _each(features: _Features) -> list[_Features]:
    rows = range(len(features.logs))
    return [
        _Features(features.shares[i : i + 1], features.directions[i : i + 1], features.logs[i : i + 1]) for i in rows
    ]


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's rank correlation; nan with fewer than three pairs or where one side never changes."""
    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return math.nan
    return float(spearmanr(predicted, measured).statistic)
