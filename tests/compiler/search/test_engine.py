"""The search itself, on losses that are computed from the genes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from moec.compiler.search import engine
from moec.compiler.search.archive import Archive
from moec.compiler.search.costs import Costs
from moec.compiler.search.course import Course
from moec.compiler.search.engine import Key, Search
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.objectives import DIVERGENCE, EXPERT_FLOPS, SIZE
from moec.compiler.search.sensitivity import Sensitivities
from moec.compiler.search.space import Space
from moec.compiler.search.store import Measured

WINDOWS = 4
POPULATION = 16
MakeSearch = Callable[[int], Search]


@pytest.fixture
def make_search(space: Space, costs: Costs, sensitivities: Sensitivities, evaluator: Evaluator) -> MakeSearch:
    """A search by its seed: the losses of the genes add up, and a little more where both layers drop slots."""

    def measured(key: Key) -> Measured:
        genome = np.array(key)
        kept = space.kept(genome)
        loss = sensitivities.loss(genome) + 0.05 * float(np.prod(1 - kept))
        return Measured((1 + loss,) * WINDOWS, (loss,) * WINDOWS, (tuple(kept.tolist()),) * WINDOWS)

    def measure(keys: Sequence[Key], _hopeless: Callable[[Key, Measured], bool]) -> Mapping[Key, Measured]:
        return {key: measured(key) for key in keys}

    def make(seed: int) -> Search:
        reference = Measured((1.0,) * WINDOWS, (0.0,) * WINDOWS, ((1.0, 1.0),) * WINDOWS)
        archive = Archive(space, costs, reference, (DIVERGENCE, EXPERT_FLOPS, SIZE), {})
        course = Course(space, evaluator.runner.course)
        return Search(
            space, costs, archive, sensitivities, course, measure, population=POPULATION, share=0.2, seed=seed
        )

    return make


def volume(search: Search, generations: int) -> float:
    """Hypervolume after some generations."""
    search.start([search.space.unchanged])
    for _ in range(generations):
        search.step()
    return search.generations[-1].volume


def test_a_search_is_the_same_for_a_seed(make_search: MakeSearch) -> None:
    first, again, other = (make_search(seed) for seed in (0, 0, 1))
    assert volume(first, 4) == volume(again, 4)
    assert list(first.archive.found) == list(again.archive.found)
    volume(other, 4)
    assert list(first.archive.found) != list(other.archive.found)


def test_children_that_promise_most_become_individuals(
    make_search: MakeSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    screened = [volume(make_search(seed), 10) for seed in range(4)]
    monkeypatch.setattr(engine, "SCREENED", 1)
    plain = [volume(make_search(seed), 10) for seed in range(4)]
    assert np.mean(screened) > 1.01 * np.mean(plain)


def test_the_first_of_the_others_follow_those_that_promise(make_search: MakeSearch) -> None:
    search = make_search(0)
    volume(search, 2)
    random = np.random.default_rng(0)
    drawn = {search._key(random.integers(search.space.low, search.space.high + 1)): None for _ in range(40)}
    keys = [key for key in drawn if key not in search.archive.found]
    best = [keys[index] for index in search._promising(keys, search._hoped(keys), len(keys))]
    assert 0 < len(best) < len(keys)
    others = [key for key in keys if key not in best]
    assert search._screened(keys, len(keys) - 1) == [*best, *others][:-1]
    assert search._screened(keys[:5], 5) == keys[:5]


def test_no_more_individuals_are_measured_than_allowed(make_search: MakeSearch) -> None:
    search = make_search(0)
    volume(search, 6)
    last = search.generations[-1]
    assert last.individuals == pytest.approx(7 * POPULATION, abs=POPULATION)
    assert last.measured <= 0.2 * last.individuals
