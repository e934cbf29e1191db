"""A variant that is run incrementally computes what the Program of its recipe computes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moec import passes
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.pipeline.calibration_data import CalibrationData
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import make_recipe
from moec.compiler.search import incremental
from moec.compiler.search.evaluation import Evaluator
from moec.compiler.search.incremental import IncrementalRunner
from moec.compiler.search.variant import Variant
from moec.passes.experts.prune_experts import PruneExperts
from moec.passes.quantize import Quantize
from moec.passes.routing.compensation import CompensateDropped
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.per_layer import PerLayer
from moec.passes.routing.policies.threshold import Threshold
from moec.passes.routing.policies.top_p import TopP
from moec.quantize.formats import parse_format
from moec.quantize.planning.sensitivity import plan_of


@pytest.fixture(scope="module")
def variants(evaluator: Evaluator) -> dict[str, Variant]:
    base = Variant.unchanged(evaluator.program, evaluator.parts)
    layers, parts = len(base.policies), len(base.formats)
    routed = replace(base, policies=(TopP(mass=0.6), *(Threshold(tau=0.3, renormalize=False),) * (layers - 1)))
    ranked = tuple(replace(own, compensation=3) for own in routed.policies if own is not None)
    pruned = replace(base, removed=((1,), *((0, 2),) * (layers - 1)))
    last = ("none",) * (parts - 1)
    return {
        "base": base,
        "routed": routed,
        "last layer": replace(base, policies=(*(None,) * (layers - 1), TopP(mass=0.5))),
        "compensated": replace(routed, policies=ranked),
        "pruned": pruned,
        "rounded": replace(base, formats=("int8:channel",) * parts),
        "palettes": replace(base, formats=("palettize4",) * parts),
        "head": replace(base, formats=(*last, "int4:32")),
        "all": replace(routed, policies=ranked, removed=pruned.removed, formats=("int8:channel",) * parts),
    }


def by_passes(evaluator: Evaluator, variant: Variant, ids: np.ndarray) -> np.ndarray:
    """Logits of the Program that the passes of an export make."""
    chosen = {
        part: parse_format(text) for part, text in zip(evaluator.parts, variant.formats, strict=True) if text != "none"
    }
    policy = PerLayer(layers=variant.policies)
    data = CalibrationData.of(evaluator.checkpoint, evaluator.program, evaluator.subject.text)
    fitted = data.compensations(policy, lambda *_: None)
    added = [None if own is None else own.without(gone) for own, gone in zip(fitted, variant.removed, strict=True)]
    steps = [
        *([PruneExperts(variant.removed)] if any(variant.removed) else []),
        *([DynamicRouting(policy)] if any(variant.policies) else []),
        *([CompensateDropped(tuple(added))] if any(added) else []),
        *([Quantize(plan_of(chosen))] if chosen else []),
    ]
    done = [item.name for item in passes.default_passes()]
    program, _ = passes.run_passes(evaluator.program, steps, completed=done)
    return ProgramRunner(program).prefill(ids)


@pytest.mark.parametrize(
    "name", ["base", "routed", "last layer", "compensated", "pruned", "rounded", "palettes", "head", "all"]
)
def test_it_computes_what_the_passes_make(evaluator: Evaluator, variants: dict[str, Variant], name: str) -> None:
    ids = evaluator.windows[:4]
    runner = IncrementalRunner(evaluator.program, evaluator.parts, None, evaluator.compensations)
    runner.evaluate(variants["base"], 0, ids)
    found = runner.evaluate(variants[name], 0, ids).logits.numpy()
    expected = by_passes(evaluator, variants[name], ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    if name != "base":
        assert np.abs(found - by_passes(evaluator, variants["base"], ids)).max() > 1e-3


def test_what_ran_before_changes_no_bit(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    ids = evaluator.windows[:4]
    given = (evaluator.program, evaluator.parts, None, evaluator.compensations)
    warm = IncrementalRunner(*given)
    for variant in (*variants.values(), *reversed(variants.values())):
        cold = IncrementalRunner(*given).evaluate(variant, 0, ids)
        found = warm.evaluate(variant, 0, ids)
        assert torch.equal(found.logits, cold.logits)
        assert found.kept == cold.kept
        assert all(map(torch.equal, found.tokens, cold.tokens))


def test_only_what_comes_after_the_first_change_is_run(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    runner, ids = IncrementalRunner(evaluator.program, evaluator.parts), evaluator.windows[:4]

    def run(name: str) -> int:
        before = runner.executed
        runner.evaluate(variants[name], 0, ids)
        return runner.executed - before

    whole, last, first, head = (run(name) for name in ("base", "last layer", "routed", "head"))
    assert head < whole / 10
    assert last < first < whole
    assert run("routed") == head


def test_in_order_less_is_run(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    mixed = [variants["base"], variants["rounded"], variants["last layer"], variants["head"], variants["rounded"]]

    def run(listed: list[Variant]) -> int:
        runner = IncrementalRunner(evaluator.program, evaluator.parts, state_bytes=60_000)
        for variant in listed:
            runner.evaluate(variant, 0, evaluator.windows[:4])
        return runner.executed

    order = IncrementalRunner(evaluator.program, evaluator.parts).order
    assert run(sorted(mixed, key=order)) < run(mixed)


def test_batches_do_not_mix(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    runner = IncrementalRunner(evaluator.program, evaluator.parts)
    first, second = (runner.evaluate(variants["base"], batch, evaluator.windows[batch : batch + 4]) for batch in (0, 4))
    assert not torch.equal(first.logits, second.logits)


def test_memory_of_states_is_bounded(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    small = IncrementalRunner(evaluator.program, evaluator.parts, state_bytes=1)
    whole = IncrementalRunner(evaluator.program, evaluator.parts)
    for variant in variants.values():
        same = torch.equal(
            small.evaluate(variant, 0, evaluator.windows[:4]).logits,
            whole.evaluate(variant, 0, evaluator.windows[:4]).logits,
        )
        assert same
    assert small.executed > whole.executed


def test_kept_is_the_share_of_the_pretrained_slots(evaluator: Evaluator, variants: dict[str, Variant]) -> None:
    runner = IncrementalRunner(evaluator.program, evaluator.parts)
    assert set(runner.evaluate(variants["base"], 0, evaluator.windows[:4]).kept) == {1.0}
    found = runner.evaluate(variants["last layer"], 0, evaluator.windows[:4]).kept
    assert set(found[:-1]) == {1.0}
    assert 0.3 < found[-1] < 1


@pytest.mark.parametrize("name", ["base", "routed", "pruned", "rounded", "all"])
def test_the_recipe_of_a_variant_builds_it(evaluator: Evaluator, variants: dict[str, Variant], name: str) -> None:
    variant = variants[name]
    sections = variant.sections(evaluator.parts)
    text = {"routing": {**sections["routing"], "text": evaluator.subject.text}} if "routing" in sections else {}
    assert Variant.of(sections, evaluator.program, evaluator.parts) == variant
    recipe = make_recipe({"checkpoint": evaluator.subject.checkpoint, "target": "onnx", **sections, **text})
    ids = evaluator.windows[:4]
    found = ProgramRunner(build_program(recipe)).prefill(ids)
    expected = by_passes(evaluator, variant, ids)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_use_of_the_experts_is_counted_in_the_numbering_of_the_pretrained_model(
    evaluator: Evaluator, variants: dict[str, Variant]
) -> None:
    tokens = evaluator.windows[:8].size
    before = evaluator.expert_use({}, 2)
    assert [sum(layer) for layer in before] == [4 * tokens] * len(before)
    pruned = evaluator.expert_use(variants["pruned"].sections(evaluator.parts), 2)
    assert [sum(layer) for layer in pruned] == [4 * tokens] * len(before)
    assert (pruned[0][1], pruned[1][0], pruned[1][2]) == (0, 0, 0)
    assert all(count for expert, count in enumerate(pruned[0]) if expert != 1)
    # The first layer sees what it saw before, so its experts keep the tokens that they had.
    assert all(now >= then for expert, (now, then) in enumerate(zip(pruned[0], before[0], strict=True)) if expert != 1)
    routed = evaluator.expert_use(variants["routed"].sections(evaluator.parts), 2)
    assert sum(routed[0]) < sum(before[0])
    assert len(evaluator.expert_use({}, 1)) == len(before)
    assert sum(evaluator.expert_use({}, 1)[0]) == 2 * tokens


def test_states_give_way_to_other_processes(
    evaluator: Evaluator, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(free: int) -> int:
        monkeypatch.setattr(incremental.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
        runner = IncrementalRunner(evaluator.program, evaluator.parts)
        for name in ("base", "head", "routed", "head"):
            runner.evaluate(variants[name], 0, evaluator.windows[:4])
        return runner.executed

    assert run(1 << 40) < run(1 << 16)
