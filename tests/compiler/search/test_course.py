"""What a measurement costs after earlier ones, and children that cost little."""

from __future__ import annotations

import numpy as np
import pytest

from moec.compiler.search.course import FIXED, Course
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.incremental import IncrementalRunner
from moec.compiler.search.operators import Moves
from moec.compiler.search.sensitivity import Sensitivities
from moec.compiler.search.space import Genome, Space


@pytest.fixture
def runner(evaluator: Evaluator) -> IncrementalRunner:
    return IncrementalRunner(evaluator.program, evaluator.parts)


@pytest.fixture
def course(space: Space, runner: IncrementalRunner) -> Course:
    return Course(space, runner.course)


def changed(space: Space, kind: str, index: int) -> Genome:
    found = space.unchanged.copy()
    found[space.places[kind, index]] -= 1
    return space.canonical(found)


def test_choices_are_in_the_order_of_the_graph(runner: IncrementalRunner) -> None:
    shares = [share for share, _ in runner.course]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1
    assert shares[-1] > 0
    policies = [index for _, (kind, index) in runner.course if kind == "policy"]
    assert policies == [0, 1]


def test_the_price_is_the_share_of_the_nodes_that_run(
    space: Space, course: Course, runner: IncrementalRunner, evaluator: Evaluator
) -> None:
    ids = evaluator.windows[:4]
    first, last = changed(space, "level", 0), changed(space, "level", 1)
    assert course.price(space.unchanged) == 1

    def executed(genome: Genome) -> int:
        before = runner.executed
        runner.evaluate(space.variant(genome), 0, ids)
        return runner.executed - before

    executed(space.unchanged)
    course.record(space.unchanged)
    whole = executed(changed(space, "format", 0))
    for genome in (first, last):
        share = (course.price(genome) - FIXED) / (1 - FIXED)
        assert share == pytest.approx(executed(genome) / whole, abs=0.05)
    assert course.price(space.unchanged) == FIXED < course.price(last) < course.price(first) < 1


def test_a_child_shares_the_first_choices_with_its_parent(
    space: Space, course: Course, sensitivities: Sensitivities
) -> None:
    random, moves = np.random.default_rng(0), Moves(space, sensitivities)
    parent, other = changed(space, "level", 0), changed(space, "level", 1)
    course.record(parent)
    children = [space.canonical(course.child(parent, other, moves, random)) for _ in range(200)]
    prices = np.array([course.price(child) for child in children])
    assert np.mean([(child != parent).any() for child in children]) > 0.8
    # The first choice that differs is anywhere: half of the children cost less than six tenths of a whole run.
    assert np.median(prices) < 0.6
    assert prices.max() == 1
    assert len({tuple(child) for child in children}) > 50
    # Another individual that differs everywhere gives its genes to the tail alone.
    crossed = np.array([course.child(parent, space.low, moves, random) for _ in range(200)])
    embedding = space.places["format", 0]
    assert np.mean(crossed[:, embedding] != parent[embedding]) < 0.3
