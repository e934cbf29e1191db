"""Drift of routing: found where it was put in, in no more cases than promised where it was not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import ArtifactError
from moec.compiler.measure.drift import distances, holm, layer_drifts
from moec.compiler.measure.expert_use import FILE, ExpertUse, LayerUse

LENGTH, TOP_K = 64, 2


def use(shares: list[list[float]], windows: int, seed: int, sharpness: float = 40.0) -> ExpertUse:
    """Windows of which each has shares of its own around `shares`, as texts have: [layers][experts]."""
    random, layers = np.random.default_rng(seed), []
    for number, row in enumerate(shares):
        own = random.dirichlet(np.array(row) * sharpness, windows)
        counted = np.array([random.multinomial(LENGTH * TOP_K, each) for each in own])
        layers.append(LayerUse(f"layer.{number}", TOP_K, counted))
    return ExpertUse("abc", LENGTH, tuple(layers))


EVEN = [0.25, 0.25, 0.25, 0.25]
UNEVEN = [0.1, 0.3, 0.25, 0.35]


def test_the_layer_that_drifted_is_found_alone() -> None:
    before, now = use([EVEN] * 3, 16, 0), use([EVEN, UNEVEN, EVEN], 32, 1)
    found = layer_drifts(before, now, permutations=999)
    assert [layer.drifted for layer in found] == [False, True, False]
    assert found[1].distance > 1.5 * found[1].usual
    assert (found[1].more, found[1].less, found[1].module) == (3, 0, "layer.1")
    assert found == layer_drifts(before, now, permutations=999)


def test_alarms_without_a_drift_are_as_rare_as_promised() -> None:
    """Tokens of a window depend on each other, so a test that counted tokens would raise an alarm nearly always."""
    alarms = 0
    for seed in range(60):
        found = layer_drifts(use([EVEN] * 4, 16, 2 * seed), use([EVEN] * 4, 12, 2 * seed + 1), permutations=199)
        alarms += any(layer.drifted for layer in found)
    # 60 * 0.05 are expected; 9 or more have a probability of 0.3 %.
    assert alarms < 9


def test_dropped_slots_are_counted_against_the_pretrained_ones() -> None:
    half = LayerUse("m", TOP_K, np.full((4, 2), LENGTH // 2))
    whole = LayerUse("n", TOP_K, np.full((4, 2), LENGTH))
    assert (half.dropped(LENGTH), whole.dropped(LENGTH)) == (0.5, 0.0)
    found = ExpertUse("", LENGTH, (half, whole))
    assert found.kept == 0.75
    (first, _) = layer_drifts(found, ExpertUse("", LENGTH, (whole, whole)), permutations=9)
    assert (first.dropped_before, first.dropped) == (0.5, 0.0)


def test_the_distance_is_0_for_equal_and_1_for_disjoint_uses() -> None:
    found = distances(np.array([[3, 6, 0], [1, 0, 0]]), np.array([[1, 2, 0], [0, 0, 5]]))
    assert found.tolist() == pytest.approx([0.0, 1.0], abs=1e-7)


def test_holm_is_stricter_with_the_smallest_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_traces_and_runners_count_the_same_slots_by_window() -> None:
    indices = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]])
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.0], [0.5, 0.5], [1.0, 0.0]])
    trace: Any = SimpleNamespace(indices=indices, weights=weights)
    windows = np.zeros((2, 2), np.int64)
    found = ExpertUse.of_traces([trace], [("m", 2, 4)], windows, "x")
    assert found.layers[0].tokens.tolist() == [[1, 1, 1, 0], [1, 1, 1, 0]]

    class Runner:
        """Counts on, as artifacts do."""

        def __init__(self) -> None:
            self.expert_tokens = {0: np.array([100, 0, 0, 0])}

        def prefill(self, input_ids: np.ndarray, attention_mask: Any = None) -> np.ndarray:  # noqa: ARG002
            self.expert_tokens[0] += np.array([1, 1, 1, 0])
            return input_ids

    told: list[tuple[int, int]] = []
    counted = ExpertUse.of_runner(Runner(), [("m", 2)], windows, "x", lambda *given: told.append(given))
    assert counted.layers[0].tokens.tolist() == found.layers[0].tokens.tolist()
    assert told == [(1, 2), (2, 2)]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert ExpertUse.read(tmp_path) is None
    kept = use([EVEN, UNEVEN], 5, 0)
    kept.write(tmp_path)
    found = ExpertUse.read(tmp_path)
    assert found is not None
    assert (found.sha256, found.length, found.shapes) == ("abc", LENGTH, {"layer.0": 4, "layer.1": 4})
    assert [layer.tokens.tolist() for layer in found.layers] == [layer.tokens.tolist() for layer in kept.layers]
    data = (tmp_path / FILE).read_bytes()
    found.write(tmp_path)
    assert (tmp_path / FILE).read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("text"),
        lambda content: content["text"].update(windows=4),
        lambda content: content["layers"][0]["tokens"][0].pop(),
        lambda content: content["layers"][0]["tokens"][0].__setitem__(0, -1),
        lambda content: content["layers"][0].update(top_k=0),
        lambda content: content.update(schema_version=2),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, change: Any) -> None:
    use([EVEN, UNEVEN], 5, 0).write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    change(content)
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"expert_use\.json: damaged"):
        ExpertUse.read(tmp_path)
