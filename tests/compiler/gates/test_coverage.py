"""Coverage counts what compared tokens reached and lists the rest."""

import dataclasses

import numpy as np

from moec.compiler.checkpoint import Checkpoint
from moec.compiler.gates.coverage import Coverage, judge_coverage
from moec.compiler.gates.parity import ParityOptions, gather_artifact
from moec.compiler.gates.reference import Oracle, Trace
from moec.compiler.gates.search import ExpertSearch, selections
from moec.compiler.gates.verdict import Status
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.program import MoeLayer, Program

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


def test_an_expert_that_cannot_be_reached_ends_the_search(mixtral: Captured) -> None:
    name = "model.layers.1.mlp.gate.weight"
    program = changed(mixtral[1], name, lambda weight: weight.zero_())
    search = ExpertSearch(program, prompts(program), 100)
    assert search.find(1, 7, 600, lambda _: False) is None
    assert 600 <= search.tokens < 1000
    assert search.find(99, 0, 600, lambda _: True) is None


def test_the_selection_of_every_layer_is_found(gpt_oss: Captured) -> None:
    assert set(selections(gpt_oss[1])) == set(range(len(gpt_oss[1].layers)))
