"""Speeds fitted to measured decode steps, and the cache that keeps them."""

from pathlib import Path

import pytest

from moec.compiler.measure.estimate import speeds
from moec.compiler.measure.estimate.counting import Counts
from moec.compiler.measure.estimate.speeds import Speeds, cached, fit

TRUE = Speeds(operations=2e-6, experts=1e-10, dense=7e-11, states=5e-11, residual=0.0)


def counts(experts: int, dense: int, nodes: int) -> Counts:
    weights = {"experts_down": experts, "attention": dense}
    return Counts(weights, weights, 0.0, 8192, 0.0, 0, 0, nodes)


def test_the_speeds_of_every_kind_of_work_are_found_and_predict_another_shape() -> None:
    shapes = [counts(10**6, 10**6, 100), counts(10**8, 10**6, 100), counts(10**6, 10**8, 50), counts(10**5, 10**5, 400)]
    measured = [(shape, context, TRUE.decode(shape, context)) for shape in shapes for context in (32, 256)]
    found = fit(measured)
    assert found.residual < 1e-6
    other = counts(3 * 10**7, 2 * 10**7, 250)
    assert found.decode(other, 1000) == pytest.approx(TRUE.decode(other, 1000), rel=1e-6)


def test_no_speed_is_negative_and_the_error_is_told() -> None:
    shapes = [counts(10**6, 10**6, 100), counts(10**8, 10**6, 100)]
    found = fit([(shapes[0], 32, 0.01), (shapes[1], 32, 0.001)])
    assert min(found.operations, found.experts, found.dense, found.states) >= 0
    assert found.residual > 0.3


def test_what_was_measured_is_kept_for_its_key_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds.platformdirs, "user_cache_path", lambda _: tmp_path)
    assert cached("speeds", {"version": "1"}, None) is None
    assert cached("speeds", {"version": "1"}, lambda: {"value": 1}) == {"value": 1}
    assert cached("speeds", {"version": "1"}, lambda: {"value": 2}) == {"value": 1}
    assert cached("speeds", {"version": "2"}, lambda: {"value": 3}) == {"value": 3}
    for file in tmp_path.iterdir():
        file.write_text("damaged")
    assert cached("speeds", {"version": "1"}, lambda: {"value": 4}) == {"value": 4}
