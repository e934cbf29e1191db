"""Coverage counts what compared tokens reached and lists the rest."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates import parity
from moec.compiler.gates.cases import Bounds, Prompts
from moec.compiler.gates.coverage import Coverage, judge_coverage
from moec.compiler.gates.parity import ParityOptions, gather_artifact
from moec.compiler.gates.reference import Oracle, Trace
from moec.compiler.gates.search import ExpertSearch, selections
from moec.compiler.gates.tolerance import Precision
from moec.compiler.gates.verdict import Status
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.program import MoeLayer, Program
from moec.targets.base import RunnerLimits

from .conftest import changed, prompts  # noqa: TID252 - tests are no package with a name of its own

Captured = tuple[Checkpoint, Program]

LAYERS = tuple(MoeLayer(i, f"layers.{i}.experts", "", 4, 2, 8, 8, "", "") for i in range(2))


def _trace(*experts: list[list[int]]) -> Trace:
    slots = {layer: np.array([rows], dtype=np.int32) for layer, rows in enumerate(experts)}
    tokens = len(experts[0])
    return Trace(np.zeros((1, tokens, 3), np.float32), np.zeros((1, tokens), dtype=bool), slots)


def test_dropped_slots_and_unproven_positions_do_not_count() -> None:
    coverage = Coverage(LAYERS)
    trace = _trace([[0, 1], [2, 3]], [[0, -1], [1, 2]])
    coverage.add(trace, np.array([[True, False]]))
    assert coverage.unreached() == {"layers.0.experts": [2, 3], "layers.1.experts": [1, 2, 3]}
    assert coverage.share == 3 / 8
    assert coverage.would_reach(trace)
    coverage.add(trace, np.array([[True, True]]))
    assert coverage.unreached() == {"layers.1.experts": [3]}
    assert not coverage.would_reach(trace)
    assert coverage.figures()["layers"][0]["tokens"] == [2, 2, 1, 1]


def test_the_worst_step_is_judged_and_the_experts_are_listed() -> None:
    full, partial = Coverage(LAYERS), Coverage(LAYERS)
    full.add(_trace([[0, 1], [2, 3]], [[0, 1], [2, 3]]), np.ones((1, 2), dtype=bool))
    partial.add(_trace([[0, 1], [2, 3]], [[0, 1], [2, 2]]), np.ones((1, 2), dtype=bool))
    tokens = {"capture": 2, "artifact": 2}
    assert judge_coverage({"capture": full, "artifact": full}, 1.0, tokens).status is Status.PASS
    verdict = judge_coverage({"capture": full, "artifact": partial}, 1.0, tokens)
    assert verdict.status is Status.FAIL
    assert "layers.1.experts 3" in verdict.summary
    assert "--coverage-min" in verdict.summary
    assert verdict.exit_code == 5
    accepted = judge_coverage({"artifact": partial}, 0.8, tokens)
    assert accepted.status is Status.PASS
    assert "layers.1.experts 3" in accepted.summary


def test_nothing_run_is_no_pass() -> None:
    assert judge_coverage({}, 1.0, {}).status is Status.NOT_RUN


def test_inputs_are_extended_until_every_expert_is_reached(mixtral: Captured) -> None:
    program = mixtral[1]
    short = ParityOptions(greedy_tokens=0, max_tokens=1, coverage_tokens=0)
    before = gather_artifact(program, ProgramRunner(program), prompts(program), short, lambda *_: None)
    assert before.coverage.unreached()
    longer = dataclasses.replace(short, coverage_tokens=500)
    after = gather_artifact(program, ProgramRunner(program), prompts(program), longer, lambda *_: None)
    assert not after.coverage.unreached()
    assert any(result.name.startswith("coverage prompt") for result in after.results)
    assert after.tokens < 200


def test_an_expert_that_prompts_hardly_reach_is_found(mixtral: Captured) -> None:
    # A flat row of the router: the expert's score rarely wins.
    name = "model.layers.1.mlp.gate.weight"
    program = changed(mixtral[1], name, lambda weight: weight[4].mul_(0.15))
    searched: list[int] = []
    search = ExpertSearch(program, prompts(program), 100)
    oracle = Oracle(program, 1e-4)

    def reaches(ids: np.ndarray) -> bool:
        searched.append(ids.size)
        return bool((oracle.trace(ids).slots[1] == 4).any())

    found = search.find(1, 4, 4000, reaches)
    assert found is not None
    assert reaches(found)
    assert search.tokens < 4000


def test_an_expert_that_a_bias_hides_from_prompts_is_found_soon(tiny_checkpoint: Callable[[str], Path]) -> None:
    # No position of 12288 random tokens chooses it. A search that mutates sequences anywhere, whichever of their
    # positions is nearest, finds it within 4000 tokens for 3 of these seeds; this one for 7.
    program = capture(Checkpoint.open(tiny_checkpoint("mimo_v2_flash")))
    searches = [ExpertSearch(program, Prompts(program.vocab_size, seed=seed), 100) for seed in range(8)]
    found = [search.find(0, 6, 4000, lambda _: True) for search in searches]
    assert sum(ids is not None for ids in found) >= 6
    oracle = Oracle(program, 1e-4)
    assert all((oracle.trace(ids).slots[0] == 6).any() for ids in found if ids is not None)


def test_a_search_can_be_repeated(mixtral: Captured) -> None:
    name = "model.layers.1.mlp.gate.weight"
    program = changed(mixtral[1], name, lambda weight: weight[4].copy_(weight.mean(0)))
    first, second = (ExpertSearch(program, prompts(program), 100).find(1, 4, 4000, lambda _: True) for _ in range(2))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first, second)


def test_what_one_search_leaves_of_the_budget_goes_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    coverage = Coverage(LAYERS)
    coverage.add(_trace([[0, 1], [2, 2]], [[0, 1], [2, 2]]), np.ones((1, 2), dtype=bool))
    asked: list[tuple[int, int]] = []

    class Search:
        """Reaches the expert of layer 1 at the first token, the one of layer 0 never."""

        def __init__(self, *_: object) -> None:
            self.tokens = 0

        def find(self, layer: int, expert: int, budget: int, reaches: object) -> None:  # noqa: ARG002
            asked.append((layer, budget))
            self.tokens += 1 if layer else budget
            if layer:
                coverage.add(_trace([[0, 1]], [[3, 3]]), np.ones((1, 1), dtype=bool))

    monkeypatch.setattr(parity, "ExpertSearch", Search)
    evidence = parity.Evidence(Precision.FP32, coverage, "")
    nothing: Any = None
    bound = Bounds(RunnerLimits(), 8)
    extension = parity._Extension("", evidence, nothing, nothing, nothing, bound, ParityOptions(), lambda *_: None)
    extension.by_search(nothing, 100)
    assert asked == [(0, 50), (1, 50), (0, 49)]
    assert evidence.tokens == 100


def test_an_expert_that_cannot_be_reached_ends_the_search(mixtral: Captured) -> None:
    name = "model.layers.1.mlp.gate.weight"
    program = changed(mixtral[1], name, lambda weight: weight.zero_())
    search = ExpertSearch(program, prompts(program), 100)
    assert search.find(1, 7, 600, lambda _: False) is None
    assert 600 <= search.tokens < 1000
    assert search.find(99, 0, 600, lambda _: True) is None


def test_the_selection_of_every_layer_is_found(gpt_oss: Captured) -> None:
    assert set(selections(gpt_oss[1])) == set(range(len(gpt_oss[1].layers)))
