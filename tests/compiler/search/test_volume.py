"""Hypervolume, and who would add most to it."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moec.compiler.search.volume import Volume


def test_it_is_the_share_of_the_box() -> None:
    volume = Volume([2.0, 4.0])
    assert volume.of(np.zeros((0, 2))) == 0
    assert volume.of(np.array([[1.0, 2.0]])) == pytest.approx(0.25)
    assert volume.of(np.array([[1.0, 2.0], [1.5, 3.0]])) == pytest.approx(0.25)
    assert volume.of(np.array([[1.0, 2.0], [0.5, 3.0]])) == pytest.approx(0.25 + 0.25 * 0.25)
    assert volume.of(np.array([[1.0, 5.0]])) == 0
    assert volume.of(np.array([[-1.0, 2.0]])) == pytest.approx(0.5)


def test_three_objectives() -> None:
    assert Volume([1.0, 1.0, 1.0]).of(np.array([[0.5, 0.5, 0.5], [0.0, 0.9, 0.9]])) == pytest.approx(0.125 + 0.005)


def test_the_best_are_those_that_add_most_one_after_the_other() -> None:
    random = np.random.default_rng(0)
    volume, front, candidates = Volume([1.0, 1.0, 1.0]), random.random((4, 3)), random.random((12, 3))
    chosen, known = [], front
    for _ in range(3):
        gains = [volume.of(np.vstack([known, row])) - volume.of(known) for row in candidates]
        chosen.append(int(np.argmax(gains)))
        known = np.vstack([known, candidates[chosen[-1]]])
    found = volume.best(front, candidates, 3)
    assert [index for index, _ in found] == chosen
    assert sum(gain for _, gain in found) == pytest.approx(volume.of(known) - volume.of(front))


def test_what_adds_nothing_is_not_chosen() -> None:
    volume = Volume([1.0, 1.0])
    front = np.array([[0.2, 0.2]])
    assert volume.best(front, np.array([[0.3, 0.3], [0.1, 0.9], [2.0, 0.0]]), 3) == [(1, pytest.approx(0.01))]


def test_of_equal_candidates_the_cheapest_is_chosen_and_a_better_one_may_cost_more() -> None:
    volume, front = Volume([1.0, 1.0]), np.array([[0.9, 0.9]])
    candidates = np.array([[0.5, 0.5], [0.5, 0.5], [0.3, 0.3]])
    assert [index for index, _ in volume.best(front, candidates, 1, [1.0, 0.9, 1.5])] == [2]
    assert [index for index, _ in volume.best(front, candidates, 1, [1.0, 0.5, 1.5])] == [1]
    found = volume.best(front, candidates, 3, [1.0, 0.5, 1.5])
    assert found == [(1, pytest.approx(0.25 - 0.01)), (2, pytest.approx(0.49 - 0.25))]


def test_no_pair_beats_the_greedy_choice_by_much() -> None:
    random = np.random.default_rng(1)
    volume, candidates = Volume([1.0, 1.0]), random.random((8, 2))
    found = [index for index, _ in volume.best(np.zeros((0, 2)), candidates, 2)]
    best = max(volume.of(candidates[list(pair)]) for pair in combinations(range(8), 2))
    assert volume.of(candidates[found]) > (1 - 1 / np.e) * best
