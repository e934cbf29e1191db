"""The surrogate ranks what it has not seen, and knows how little it knows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moec.compiler.search.surrogate import Surrogate, rank_correlation

GROUPS = 6


def model(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Individuals, and losses that are quadratic in what choices change, with choices that help or hurt each other."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(GROUPS, GROUPS)) * 0.35 + np.eye(GROUPS)
    coupling = mixing.T @ mixing
    coupling /= np.sqrt(np.outer(np.diag(coupling), np.diag(coupling)))
    roots = random.random((80, GROUPS)) * 0.1
    return roots, np.einsum("ng,gh,nh->n", roots, coupling, roots)


def test_it_ranks_what_the_additive_model_cannot() -> None:
    roots, losses = model(0)
    fresh, truth = model(1)
    surrogate = Surrogate(roots, losses, np.zeros(len(losses)))
    found, _ = surrogate.predict(fresh)
    additive = rank_correlation((fresh**2).sum(axis=1).tolist(), truth.tolist())
    assert rank_correlation(found.tolist(), truth.tolist()) > max(0.95, additive)
    assert np.abs(found - truth).mean() < 0.3 * np.abs((fresh**2).sum(axis=1) - truth).mean()


def test_what_is_measured_of_one_gene_is_believed_of_its_kind() -> None:
    """The second kind loses a third of what the divergences say; its last gene was never measured."""
    classes, random = np.array([0, 0, 0, 1, 1, 1]), np.random.default_rng(0)
    roots = random.random((60, GROUPS)) * 0.1
    roots[:, 5] = 0.0
    weights = np.where(classes, 0.3, 1.0)
    unseen = np.zeros((1, GROUPS))
    unseen[0, 5] = 0.1
    guesses = [
        Surrogate(roots, (roots**2) @ weights, np.zeros(60), classes=given).predict(unseen)[0][0]
        for given in (classes, None)
    ]
    assert abs(guesses[0] - 0.003) < 0.5 * abs(guesses[1] - 0.003)


def test_without_much_it_is_the_additive_model() -> None:
    roots, losses = model(0)
    surrogate = Surrogate(roots[:1], (roots[:1] ** 2).sum(axis=1), np.zeros(1))
    np.testing.assert_allclose(surrogate.predict(roots)[0], (roots**2).sum(axis=1))
    assert losses.shape == (80,)


def test_it_is_surer_where_it_has_measured() -> None:
    roots, losses = model(0)
    surrogate = Surrogate(roots[:40], losses[:40], np.zeros(40))
    _, known = surrogate.predict(roots[:40])
    _, unknown = surrogate.predict(roots[40:])
    assert np.median(known) < np.median(unknown)
    found, deviations = surrogate.predict(roots[40:])
    assert np.mean(np.abs(found - losses[40:]) < 3 * deviations + 1e-6) > 0.8


def test_what_was_read_in_part_counts_less() -> None:
    roots, losses = model(0)
    wrong = losses.copy()
    wrong[0] *= 3
    spread = np.zeros(len(losses))
    spread[0] = (2 * losses[0]) ** 2
    trusted = Surrogate(roots, wrong, np.zeros(len(losses)), refit=False).predict(roots[:1])[0]
    doubted = Surrogate(roots, wrong, spread, refit=False).predict(roots[:1])[0]
    assert abs(doubted[0] - losses[0]) < abs(trusted[0] - losses[0])


def test_the_pretrained_model_loses_nothing() -> None:
    roots, losses = model(0)
    found, deviations = Surrogate(roots, losses, np.zeros(len(losses))).predict(np.zeros((1, GROUPS)))
    assert found.tolist() == [0.0]
    assert deviations.tolist() == [0.0]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1.0, 2.0, 3.0], [1.0, 4.0, 9.0], 1.0), ([1.0, 2.0, 3.0], [9.0, 4.0, 1.0], -1.0), ([1.0], [2.0], math.nan)],
)
def test_rank_correlation(first: list[float], second: list[float], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
