"""Intervals: they hold what they promise, and say when there are too few samples."""

import math

import numpy as np
import pytest

from moec.compiler.measure.latency.statistics import paired_ratio, quantile, samples_needed


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_interval_of_a_quantile_covers_it_as_often_as_it_says(share: float) -> None:
    random = np.random.default_rng(0)
    truth = -math.log(1 - share)
    intervals = [quantile(random.exponential(size=60).tolist(), share) for _ in range(400)]
    covered = np.mean([interval.low <= truth <= interval.high for interval in intervals])
    assert 0.94 <= covered <= 0.995


def test_a_high_quantile_of_few_samples_has_no_upper_end() -> None:
    assert samples_needed(0.99) == 368
    assert quantile(range(367), 0.99).high == math.inf
    assert quantile(range(368), 0.99).high == 367
    assert quantile([1.0, 2.0], 0.5).high == math.inf


def test_a_ratio_is_found_in_spite_of_disturbed_pairs() -> None:
    random = np.random.default_rng(0)
    ratios = 1.15 * np.exp(0.03 * random.standard_normal(20))
    ratios[[3, 11]] = [4.0, 0.1]
    found = paired_ratio(ratios)
    assert found.value == pytest.approx(1.15, rel=0.02)
    assert 1.09 < found.low < 1.15 < found.high < 1.21


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    intervals = [paired_ratio(np.exp(0.1 * random.standard_t(3, 14))) for _ in range(600)]
    assert np.mean([interval.low <= 1 <= interval.high for interval in intervals]) >= 0.98


def test_few_ratios_prove_nothing() -> None:
    assert paired_ratio([1.0] * 8).high == math.inf
    assert paired_ratio([1.0] * 10).high == 1.0
