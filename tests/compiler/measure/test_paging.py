"""Reuse distances against a memory that is simulated step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.common.recency import RecentExperts
from moec.compiler.measure.paging import drawn_sequence, reuse_distances

Sequences = list[list[list[int]]]


class Naive:
    """A list of experts, the one that was used last at its end."""

    def __init__(self, sizes: Sequence[int], memory: int) -> None:
        self.sizes, self.memory, self.held = sizes, memory, list[tuple[int, int]]()

    def use(self, layer: int, experts: Iterable[int]) -> tuple[list[int], list[tuple[int, int]]]:
        used = [(layer, expert) for expert in experts]
        missing = [expert for one, expert in used if (one, expert) not in self.held]
        self.held = [key for key in self.held if key not in used] + used
        dropped = []
        while sum(self.sizes[one] for one, _ in self.held) > self.memory:
            dropped.append(self.held.pop(0))
        return missing, dropped


@st.composite
def cases(draw: st.DrawFn) -> tuple[Sequences, list[int], list[int]]:
    """A sequence [layer][token][slot], the number of experts and the size of an expert of each layer."""
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(1, 6), min_size=layers, max_size=layers))
    sizes = draw(st.lists(st.integers(1, 9), min_size=layers, max_size=layers))
    rows = [
        [draw(st.lists(st.integers(0, count - 1), unique=True, max_size=4)) for _ in range(tokens)] for count in counts
    ]
    return rows, counts, sizes


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 120), st.booleans())
def test_distances_are_those_of_a_simulated_memory(
    case: tuple[Sequences, list[int], list[int]], memory: int, from_start: bool
) -> None:
    layers, counts, sizes = case
    simulated, fast = Naive(sizes, memory), RecentExperts(sizes, memory)
    for layer, count in [] if from_start else reversed(list(enumerate(counts))):
        for expert in reversed(range(count)):
            assert simulated.use(layer, [expert]) == fast.use(layer, [expert])
    hits, read = [0] * len(layers), 0
    for token in range(len(layers[0])):
        for layer, rows in enumerate(layers):
            missing, dropped = simulated.use(layer, rows[token])
            assert (missing, dropped) == fast.use(layer, rows[token])
            hits[layer] += len(rows[token]) - len(missing)
            read += len(missing) * sizes[layer]
        assert fast.held == sum(sizes[layer] for layer, _ in simulated.held) <= memory
    found = reuse_distances(layers, counts, sizes, warm_up=0, from_start=from_start)
    uses = [sum(map(len, rows)) for rows in layers]
    assert found.hit_rates(memory) == tuple(
        pytest.approx(hit / use) if use else 1.0 for hit, use in zip(hits, uses, strict=True)
    )
    assert found.hit_rate(memory) == pytest.approx(sum(hits) / sum(uses) if sum(uses) else 1.0)
    assert found.read(memory) == pytest.approx(read / len(layers[0]))


@settings(max_examples=60, deadline=None)
@given(cases(), st.lists(st.integers(0, 150), min_size=2, max_size=6))
def test_more_memory_never_reads_more(case: tuple[Sequences, list[int], list[int]], memories: list[int]) -> None:
    layers, counts, sizes = case
    found = reuse_distances(layers, counts, sizes)
    reads = [found.read(memory) for memory in sorted(memories)]
    assert reads == sorted(reads, reverse=True)
    assert found.read(sum(count * size for count, size in zip(counts, sizes, strict=True))) == 0
    assert found.read(0) == found.used


def test_the_warm_up_does_not_count() -> None:
    """Two tokens use all of four experts, the others one: only that one is looked at."""
    layers = [[[0, 1], [2, 3], [0], [0], [0], [0], [0], [0]]]
    found = reuse_distances(layers, [4], [10])
    assert (found.tokens, found.hit_rate(20), found.read(0)) == (6, pytest.approx(5 / 6), 10)


def test_drawn_tokens_have_the_wanted_experts() -> None:
    uses = [np.array([8.0, 4.0, 4.0, 0.0]), np.ones(16)]
    first, second = drawn_sequence(uses, [1.5, 4], tokens=2000)
    assert all(len(set(row)) == len(row) for row in (*first, *second))
    assert np.mean([len(row) for row in first]) == pytest.approx(1.5, abs=0.05)
    assert {len(row) for row in second} == {4}
    counted = np.bincount(np.concatenate(first).astype(int), minlength=4)
    assert counted[3] == 0
    assert counted[0] > 1.2 * counted[1]
    assert np.bincount(np.concatenate(second).astype(int)) == pytest.approx(500, rel=0.2)
    assert drawn_sequence(uses, [1.5, 4], tokens=50) == drawn_sequence(uses, [1.5, 4], tokens=50)
