import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.errors import UsageError
from moec.quantize.formats import parse_format
from moec.quantize.planning.allocation import Allocation, Candidate, least_bytes, least_loss, trade_off

INT4, INT8 = parse_format("int4"), parse_format("int8")
CANDIDATES = st.builds(
    Candidate,
    format=st.sampled_from([INT4, INT8]),
    bytes=st.integers(0, 10**10),
    loss=st.floats(-1e-3, 10).map(lambda loss: round(loss, 6)),
)
PROBLEMS = st.lists(st.lists(CANDIDATES, min_size=1, max_size=3), min_size=1, max_size=4).map(
    lambda rows: {f"tensor {index}": row for index, row in enumerate(rows)}
)


def every(problem: dict[str, list[Candidate]]) -> list[tuple[int, float]]:
    return [
        (sum(choice.bytes for choice in choices), math.fsum(choice.loss for choice in choices))
        for choices in itertools.product(*problem.values())
    ]


def check_sums(problem: dict[str, list[Candidate]], found: Allocation) -> None:
    assert [name for name, _ in found.choices] == list(problem)
    assert all(choice in problem[name] for name, choice in found.choices)
    assert found.bytes == sum(choice.bytes for _, choice in found.choices)
    assert found.loss == math.fsum(choice.loss for _, choice in found.choices)


@given(PROBLEMS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_least_loss_is_exact(problem: dict[str, list[Candidate]], fraction: float) -> None:
    sums = every(problem)
    smallest, largest = min(sums)[0], max(sums)[0]
    limit = smallest + int((largest - smallest) * fraction)
    found = least_loss(problem, max_bytes=limit)
    check_sums(problem, found)
    assert found.bytes <= limit
    assert found.loss == pytest.approx(min(loss for size, loss in sums if size <= limit), rel=1e-9, abs=1e-9)


@given(PROBLEMS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_least_bytes_is_exact(problem: dict[str, list[Candidate]], fraction: float) -> None:
    sums = every(problem)
    losses = [loss for _, loss in sums]
    limit = min(losses) + (max(losses) - min(losses)) * fraction
    found = least_bytes(problem, max_loss=limit)
    check_sums(problem, found)
    assert found.loss <= limit
    # Losses within the solver's tolerance of the limit may be taken for beyond it.
    inner = [size for size, loss in sums if loss <= limit - 1e-9]
    assert found.bytes >= min(size for size, loss in sums if loss <= limit)
    if inner:
        assert found.bytes <= min(inner)


@given(PROBLEMS)
@settings(max_examples=30, deadline=None)
def test_no_point_of_the_curve_is_dominated(problem: dict[str, list[Candidate]]) -> None:
    curve = trade_off(problem, points=9)
    sums = every(problem)
    assert 1 <= len(curve) <= 9
    assert curve[0].bytes == min(sums)[0]
    assert curve[-1].loss == pytest.approx(min(loss for _, loss in sums), abs=1e-9)
    for first, second in itertools.pairwise(curve):
        assert first.bytes < second.bytes
        assert first.loss > second.loss
    for point in curve:
        assert not [pair for pair in sums if pair[0] <= point.bytes and pair[1] < point.loss - 1e-9]


def problem_of(tensors: int) -> dict[str, list[Candidate]]:
    return {
        f"layers.{index}": [
            Candidate(INT4, 4500 + index, 1e-4 * (1 + index * 7919 % 101)),
            Candidate(INT8, 8500 + index, 1e-6 * (1 + index * 104729 % 97)),
        ]
        for index in range(tensors)
    }


def test_a_model_of_many_tensors_is_solved_alike_each_time() -> None:
    problem = problem_of(300)
    limit = 300 * 6000
    first, second = least_loss(problem, max_bytes=limit), least_loss(problem, max_bytes=limit)
    assert first == second
    gains = sorted(((small.loss - large.loss), index) for index, (small, large) in enumerate(problem.values()))
    upgraded = {index for _, index in gains[len(gains) - (limit - sum(4500 + i for i in range(300))) // 4000 :]}
    expected = math.fsum(row[index in upgraded].loss for index, row in enumerate(problem.values()))
    assert first.loss == pytest.approx(expected, rel=1e-9)
    assert first.bytes <= limit


def test_impossible_limits_are_refused_with_what_is_possible() -> None:
    problem = problem_of(2)
    with pytest.raises(UsageError, match="cannot fit into 9000 bytes") as caught:
        least_loss(problem, max_bytes=9000)
    assert "9001 bytes" in caught.value.hint
    with pytest.raises(UsageError, match="at or below 1e-07") as caught:
        least_bytes(problem, max_loss=1e-7)
    assert "6.8e-05" in caught.value.hint


def test_candidates_are_checked() -> None:
    with pytest.raises(ValueError, match="loss nan"):
        Candidate(INT4, 1, float("nan"))
    with pytest.raises(ValueError, match="w has no candidate"):
        least_loss({"w": []}, max_bytes=1)


def test_a_hard_problem_is_solved_to_the_last_bit() -> None:
    """Sizes and gains are nearly proportional, so that greedy choices and rounded relaxations miss the optimum."""
    sizes = [(index * 7919) % 89 + 20 for index in range(40)]
    gains = [size + (index * 104729) % 7 for index, size in enumerate(sizes)]
    problem = {
        f"w{index}": [Candidate(INT4, 0, float(gain)), Candidate(INT8, size, 0.0)]
        for index, (size, gain) in enumerate(zip(sizes, gains, strict=True))
    }
    best = [0] * (sum(sizes) // 2 + 1)
    for size, gain in zip(sizes, gains, strict=True):
        for room in range(len(best) - 1, size - 1, -1):
            best[room] = max(best[room], best[room - size] + gain)
    assert least_loss(problem, max_bytes=len(best) - 1).loss == sum(gains) - best[-1]
