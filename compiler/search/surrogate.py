"""Predicts the loss of a variant and its uncertainty without running the variant.

The divergences of single genes nearly add up: with v_g the square root of the divergence that gene g causes alone, the
additive model predicts S = sum_g v_g^2. A Gaussian process models the ratio of the measured loss to S (Rasmussen and
Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2 and 5) with prior mean 1 and the kernel

    a sum_g f_g f'_g  +  c exp(-|e - e'|^2 / 2 l^2 - (log S - log S')^2 / 2 m^2)  +  n,

with f = v^2 / S and e = v / |v|; after the f_g follow their sums over each kind of gene. The term of a scales the
contribution of single genes and of kinds of genes, the term of c models their interaction and its dependence on the
size of the change, and n is noise.
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
"""Smallest S, nats; the ratio to a smaller S would be meaningless."""
START = np.log([0.1, 0.1, 0.5, 1.0, 0.02])
"""Initial logarithms of a, c, l, m and n."""
BOUNDS = [(-9.0, 3.0)] * 2 + [(-3.0, 2.0), (-2.0, 3.0), (-9.0, 1.0)]
LEAST = 12
"""Number of measured individuals from which the parameters of the kernel are fitted."""
MISLEADS = 0.7
"""Rank correlation below which a surrogate is reported as misleading."""

Array = np.ndarray


@dataclass(frozen=True)
class _Features:
    """Features of n individuals: shares of S [n, G + C], unit directions [n, G] and logarithms of S [n]."""

    shares: Array
    directions: Array
    logs: Array

    @classmethod
    def of(cls, roots: Array, classes: Array | None) -> _Features:
        squares = roots**2
        sums = np.maximum(squares.sum(axis=1, keepdims=True), FLOOR)
        shares = squares / sums
        if classes is not None:
            shares = np.hstack([shares, shares @ np.eye(int(classes.max()) + 1)[classes]])
        return cls(shares, roots / np.sqrt(sums), np.log(sums[:, 0]))


def _kernel(theta: Array, first: _Features, second: _Features) -> Array:
    a, c, length, scale, _ = np.exp(theta)
    cosines = first.directions @ second.directions.T
    norms = (first.directions**2).sum(1)[:, None] + (second.directions**2).sum(1)[None]
    distances = np.maximum(norms - 2 * cosines, 0.0) / (2 * length**2)
    distances = distances + (first.logs[:, None] - second.logs[None]) ** 2 / (2 * scale**2)
    found: Array = a * (first.shares @ second.shares.T) + c * np.exp(-distances)
    return found


class Surrogate:
    """A regression of measured losses on the square roots of the divergences of single genes.

    Args:
        roots: Features of the measured individuals, [n, G].
        losses: Their losses, nats, [n].
        variances: Variances of `losses`, [n]; 0 for individuals that were measured on all windows.
        theta: Parameters of an earlier fit to start from.
        refit: Whether to fit the parameters to these individuals; otherwise `theta` is used as it is.
        classes: The kind of each gene, [G] integers below C; None: all genes are of different kinds.
    """

    def __init__(
        self,
        roots: Array,
        losses: Array,
        variances: Array,
        theta: Array | None = None,
        *,
        refit: bool = True,
        classes: Array | None = None,
    ) -> None:
        self._classes = classes
        self._features = _Features.of(roots, classes)
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
        """Mean and standard deviation of the predicted loss, nats, [n] each, for roots [n, G]."""
        features = _Features.of(roots, self._classes)
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
        """Negative log marginal likelihood (ibid., equation 2.30), up to a constant."""
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
    """Spearman's rank correlation; nan for fewer than three pairs or if one side is constant."""
    if len(predicted) < 3 or len(set(predicted)) < 2 or len(set(measured)) < 2:
        return math.nan
    return float(spearmanr(predicted, measured).statistic)
