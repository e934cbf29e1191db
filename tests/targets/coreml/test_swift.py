"""The flavor for swift-transformers: called as the library calls it, and as callers do that count exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import LoweringError, UsageError
from moec.compiler.common.validation import validate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.uniform_k import UniformK
from moec.targets.base import Phase
from moec.targets.coreml.executor import MilModel
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.flavors import Flavor
from moec.targets.coreml.package import PACKAGE
from moec.targets.coreml.target import CoremlOptions, CoremlTarget
from tests.support.checks import exported

SWIFT = CoremlOptions(flavor=Flavor.SWIFT)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Any, program_of: Any) -> Program:
    program: Program = program_of(tiny_checkpoint("olmoe"), torch.float16)
    return program


@pytest.fixture(scope="module")
def swift(tiny: Program, lower: Any) -> Any:
    return lower(tiny, context=48, flavor="swift-transformers")


def prompt(program: Program, length: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, program.vocab_size, (1, length)).astype(np.int32)


def test_golden_model(golden: Callable[[str], Any], golden_model: Path, lower: Any) -> None:
    """Recorded logits and greedy tokens of transformers, with the prompt in one piece and single tokens after it."""
    with np.load(golden_model / "golden_logits.npz") as recorded:
        ids, want, greedy = (recorded[f"3.{name}"] for name in ("input_ids", "logits", "greedy"))
    runner = lower(golden("fp16").program, context=192, flavor="swift-transformers").runner()
    found = runner.prefill(ids[None])
    assert np.abs(found[0, -len(want) :] - want).max() <= 2e-2 * np.abs(want).max()
    chosen = []
    for token in greedy[:16]:
        chosen.append(int(found[0, -1].argmax()))
        found = runner.decode(token.reshape(1, 1))
    assert chosen == greedy[:16].tolist()


@pytest.mark.parametrize("family", ["olmoe", pytest.param("llama4_text", marks=pytest.mark.slow)])
def test_callers_that_count_exactly_get_the_same(
    family: str, tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    """A mask as long as the sequence, as wide as the new tokens and full of anything: only its length is read."""
    program = program_of(tiny_checkpoint(family), torch.float16)
    lowered = lower(program, context=40, flavor="swift-transformers")
    model, ids = MilModel.open(lowered.directory / PACKAGE), prompt(program, 40)
    state, runner, past = model.new_state(), lowered.runner(), 0
    session = model.session(state=state)
    for new in (17, 1, 5, 1, 15, 1):
        piece = ids[:, past : past + new]
        masks = np.full((1, 1, new, past + new), -1e4, np.float16)
        found = session.predict({"inputIds": piece, "causalMask": masks})["logits"]
        past += new
        if past < 40:
            want = runner.decode(piece)
            assert np.abs(found - want).max() <= 1e-2 * np.abs(want).max()
    with pytest.raises(UsageError, match="40 tokens exceed the 39"):
        runner.decode(ids[:, -1:])


def test_names_and_ranges_are_those_of_the_library(tiny: Program, lower: Any) -> None:
    lowered = lower(tiny, context=48, flavor="swift-transformers", hub_name="allenai/OLMoE-1B-7B-0924")
    description = load_spec(model_file(lowered.directory / PACKAGE)).description
    assert not description.functions
    assert [item.name for item in description.input] == ["inputIds", "causalMask"]
    assert [item.name for item in description.state] == ["keyCache", "valueCache"]
    assert [item.name for item in description.output] == ["logits"]
    ids, mask = (item.type.multiArrayType for item in description.input)
    assert [(item.lowerBound, item.upperBound) for item in ids.shapeRange.sizeRanges] == [(1, 1), (1, 48)]
    assert [(item.lowerBound, item.upperBound) for item in mask.shapeRange.sizeRanges] == [(1, 1)] * 2 + [(1, 48)] * 2
    assert ids.ArrayDataType.Name(ids.dataType) == "INT32"
    assert mask.ArrayDataType.Name(mask.dataType) == "FLOAT16"
    assert all(item.shortDescription for item in (*description.input, *description.output, *description.state))
    assert description.metadata.userDefined["co.huggingface.exporters.name"] == "allenai/OLMoE-1B-7B-0924"
    assert lowered.facts["flavor"] == "swift-transformers"


def test_a_single_token_skips_the_experts_that_it_does_not_need(tiny: Program, swift: Any, lower: Any) -> None:
    target = CoremlTarget()
    assert target.capabilities(SWIFT, Phase.DECODE).skips_experts
    assert "computed for all its tokens" in target.capabilities(SWIFT, Phase.PREFILL).reason
    routed = DynamicRouting(UniformK(k=1)).run(tiny).program
    macs = []
    for lowered in (swift, lower(routed, context=48, flavor="swift-transformers")):
        runner = lowered.runner()
        runner.prefill(prompt(tiny, 5))
        before = runner.facts()["executed"]["main"]["expert_macs"]
        runner.decode(prompt(tiny, 1))
        macs.append(runner.facts()["executed"]["main"]["expert_macs"] - before)
    assert {layer.top_k for layer in tiny.layers} == {2}
    assert macs[1] * 2 == macs[0] > 0
    ids = prompt(tiny, 6)
    want = ProgramRunner(routed).prefill(ids)
    assert np.abs(runner.prefill(ids) - want).max() <= 2e-2 * np.abs(want).max()


def test_what_does_not_fit_the_library_is_refused(
    tiny: Program, tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    several = program_of(tiny_checkpoint("mimo_v2_flash"), torch.float16)
    (refused,) = CoremlTarget().lint(several, SWIFT)
    assert "KV caches that differ between layers" in refused.reason
    assert "keyCache0" in refused.where
    with pytest.raises(LoweringError, match="KV caches that differ between layers"):
        lower(several, context=48, flavor="swift-transformers")
    budget = DynamicRouting(UniformK(k=1), runtime_budget=True).run(tiny).program
    (refused,) = CoremlTarget().lint(budget, SWIFT)
    assert (refused.where, "feeds no such input" in refused.reason) == ("input routing_budget", True)
    assert not CoremlTarget().lint(budget, CoremlOptions())
    with pytest.raises(UsageError, match="at least 4 tokens"):
        validate(CoremlOptions, {"flavor": "swift-transformers", "context": 3}, where="options")


def test_an_export_with_all_gates(tiny_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--flavor", "swift-transformers", "--context", "160")
    verdicts = exported(tiny_checkpoint("olmoe"), "coreml", out, *flags)
    assert {verdicts[gate] for gate in ("parity: artifact", "coverage", "integrity")} == {"pass"}
    signature = json.loads((out / "moec.json").read_text())["signature"]
    assert [item["name"] for item in signature["main"]["inputs"]] == ["inputIds", "causalMask"]
