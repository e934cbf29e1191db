"""Calibration, its file, the search, accounting and exports with routing, on the golden model with little text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec import passes
from moec.compiler.commands.token_view import coloured, experts_by_token
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import CheckpointError, LoweringError, OutputError, UsageError
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.measure.accounting import account, token_view
from moec.compiler.pipeline import calibration_data, routing
from moec.compiler.pipeline.export import compile_recipe, validate_artifact
from moec.compiler.pipeline.recipe import RoutingRecipe, make_recipe
from moec.compiler.pipeline.stages import silent
from moec.compiler.text.corpus import HELD_OUT, read_text, tokenize, windows
from moec.compiler.text.perplexity import losses
from moec.passes.routing.calibrate.collect import collect, measure_sensitivities
from moec.passes.routing.dynamic_routing import DynamicRouting
from moec.passes.routing.policies.table import policy
from moec.targets.base import Capabilities, Phase


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LENGTH": 32, "WINDOWS": 8, "SENSITIVITY_WINDOWS": 1}.items():
        monkeypatch.setattr(calibration_data, name, value)
    monkeypatch.setattr(routing, "ACCOUNTED_WINDOWS", 2)


@pytest.fixture(scope="module")
def checkpoint(golden_model: Path) -> Checkpoint:
    return Checkpoint.open(golden_model)


@pytest.fixture(scope="module")
def program(program_of: Callable[[str], Program]) -> Program:
    return program_of("golden")


def plan(checkpoint: Checkpoint, program: Program, **fields: Any) -> routing.RoutingPlan:
    return routing.plan_routing(RoutingRecipe(**fields), checkpoint, program, silent)


@pytest.mark.parametrize("name", ["top-p", "layer-k", "ratio"])
def test_calibration_hits_its_budgets_and_is_deterministic(checkpoint: Checkpoint, program: Program, name: str) -> None:
    found = [routing.calibrate(checkpoint, program, name, [0.5, 0.75], progress=silent) for _ in range(2)]
    assert json.dumps(found[0]) == json.dumps(found[1])
    for entry, budget in zip(found[0]["entries"], (0.5, 0.75), strict=True):
        assert entry["kept_share"] <= budget + 0.005
        assert entry["kept_share"] == pytest.approx(np.mean(entry["kept_per_layer"]))
        assert policy(name, **entry["parameters"])
        if name != "layer-k":
            assert entry["kept_share"] == pytest.approx(budget, abs=0.005)


def test_a_calibration_file_serves_its_checkpoint_policy_and_budgets(
    checkpoint: Checkpoint, program: Program, tmp_path: Path
) -> None:
    content = routing.calibrate(checkpoint, program, "ratio", [0.5, 0.75], progress=silent)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(content))
    entry = routing.read_calibration(path, checkpoint, "ratio", 0.75)
    assert entry == content["entries"][1]
    chosen = plan(checkpoint, program, policy="ratio", calibration=str(path), budget=0.5)
    assert isinstance(chosen.passes[0], DynamicRouting)
    assert chosen.passes[0].policy == policy("ratio", **content["entries"][0]["parameters"])
    with pytest.raises(UsageError, match=r"no budget 0\.6") as caught:
        routing.read_calibration(path, checkpoint, "ratio", 0.6)
    assert "0.5, 0.75" in caught.value.hint
    with pytest.raises(UsageError, match="several budgets"):
        routing.read_calibration(path, checkpoint, "ratio", None)
    with pytest.raises(UsageError, match="is for the policy ratio, not top-p"):
        routing.read_calibration(path, checkpoint, "top-p", 0.5)
    path.write_text(json.dumps({**content, "checkpoint": {"config.json": "0"}}))
    with pytest.raises(CheckpointError, match="another checkpoint"):
        routing.read_calibration(path, checkpoint, "ratio", 0.5)
    for wrong, reason in (
        ("[]", "not a JSON object"),
        (json.dumps({**content, "entries": 3}), "not a calibration file: entries"),
        (json.dumps({**content, "entries": [{"budget": "half"}]}), "entries.0.budget"),
        (json.dumps({**content, "checkpoint": {"config.json": 1}}), r"checkpoint.config.json"),
        ("[" * 100_000, "nests too deeply"),
    ):
        path.write_text(wrong)
        with pytest.raises(UsageError, match=reason):
            routing.read_calibration(path, checkpoint, "ratio", 0.5)
    with pytest.raises(UsageError, match="cannot be read"):
        routing.read_calibration(tmp_path / "none", checkpoint, "ratio", 0.5)


def test_what_stands_in_for_dropped_experts_is_fitted_and_recorded(
    checkpoint: Checkpoint, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LENGTH": 256, "WINDOWS": 16}.items():
        monkeypatch.setattr(calibration_data, name, value)
    given: dict[str, Any] = {"policy": "threshold", "parameters": {"tau": 0.25, "renormalize": False}}
    plain = plan(checkpoint, program, **given)
    given["parameters"] |= {"compensation": 16}
    found = plan(checkpoint, program, **given)
    assert found.recorded is not None
    assert plain.recorded is not None
    digest = found.recorded["text_sha256"]
    assert "text_sha256" not in plain.recorded
    assert plan(checkpoint, program, **given, text_sha256=digest).recorded == found.recorded
    (tmp_path / "other.txt").write_text("words and more words. " * 2000)
    with pytest.raises(CheckpointError, match="not the text that the recipe was made with"):
        plan(checkpoint, program, **given, text=str(tmp_path / "other.txt"), text_sha256=digest)
    ids = windows(tokenize(checkpoint.directory, read_text(None, shipped=HELD_OUT)), 256, 12)
    done = [item.name for item in passes.default_passes()]
    base, dropped, compensated = (
        losses(ProgramRunner(passes.run_passes(program, steps, completed=done)[0]), ids).mean()
        for steps in ((), plain.passes, found.passes)
    )
    assert compensated - base < 0.75 * (dropped - base)
    layer = program.layers[0]
    assert plain.added_work == ()
    assert found.added_work == (layer.hidden_size * (layer.top_k + 32) + 16,) * len(program.layers)


def test_a_budget_and_a_compensation_leave_the_kept_weights(checkpoint: Checkpoint, program: Program) -> None:
    found = plan(checkpoint, program, policy="ratio", budget=0.5, compensation=4)
    assert isinstance(found.passes[0], DynamicRouting)
    assert (found.passes[0].policy.compensation, found.passes[0].policy.renormalize) == (4, False)


@pytest.mark.parametrize("content", [b"", b"  \n", b"\x00\x01\xff", b"few words"])
def test_texts_that_cannot_serve(checkpoint: Checkpoint, program: Program, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        routing.calibrate(checkpoint, program, "ratio", [0.5], text=str(tmp_path / "text.txt"), progress=silent)
    assert caught.value.exit_code == 10


def test_batch_dependent_policies_and_senseless_budgets(golden_model: Path, tmp_path: Path) -> None:
    def calibrate(name: str, budget: str, output: Path = tmp_path / "c.json") -> None:
        budgets = routing.parse_budgets(budget)
        routing.calibrate_file(
            str(golden_model), name, budgets, output, text=None, trust_remote_code=False, progress=silent
        )

    with pytest.raises(UsageError, match="must depend on that token alone"):
        calibrate("capacity", "0.5")
    for budget in ("0", "1.5", "-1", "", "half"):
        with pytest.raises(UsageError):
            calibrate("top-p", budget)
    with pytest.raises(OutputError):
        calibrate("ratio", "0.5", tmp_path / "no" / "such" / "folder.json")
    calibrate("ratio", "0.5")
    first = (tmp_path / "c.json").read_bytes()
    calibrate("ratio", "0.5")
    assert (tmp_path / "c.json").read_bytes() == first


def test_the_search_stays_within_the_bound(checkpoint: Checkpoint, program: Program) -> None:
    found = plan(checkpoint, program, policy="ratio", max_quality_loss="5%")
    assert found.facts is not None
    calibration = found.facts["calibration"]
    losses = {item["budget"]: item["loss"] for item in calibration["tried"]}
    assert losses[calibration["budget"]] <= 0.05
    assert all(loss > 0.05 for budget, loss in losses.items() if budget < calibration["budget"])
    assert calibration["budget"] < 1


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "top-p", "budget": 0.5, "max_quality_loss": 0.1},
        {"policy": "top-p", "budget": 0.5, "parameters": {"mass": 0.5}},
        {"budget": 0.5},
        {"policy": "top-p", "budget": 1.5},
        {"policy": "top-p", "max_quality_loss": "much"},
        {"prune": 1.0},
        {"policies": "top-p"},
        {"compensation": 8},
        {"policy": "top-p", "budget": 0.5, "compensation": -1},
        {"policy": "top-p", "parameters": {"mass": 0.5}, "compensation": 8},
    ],
)
def test_sections_that_contradict_themselves(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make_recipe({"checkpoint": "a", "target": "onnx", "routing": fields})


def test_a_policy_needs_to_know_how_much(checkpoint: Checkpoint, program: Program) -> None:
    with pytest.raises(UsageError, match="neither parameters nor a budget"):
        plan(checkpoint, program, policy="top-p")


def test_sensitivities_fall_to_zero_without_a_saving(program: Program) -> None:
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (2, 16))
    found = measure_sensitivities(program, ids, masses=(1.0, 0.5))
    assert [len(row) for row in found.k_loss] == [4] * 4
    assert all(row[-1] == 0 and row[0] > row[2] > 0 for row in found.k_loss)
    assert all(row[0] == 0 and row[1] > 0 for row in found.mass_loss)
    assert measure_sensitivities(program, ids, ks=False, masses=(1.0, 0.5)).k_loss == ()


def test_accounting_is_against_the_pretrained_top_k(program: Program) -> None:
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (2, 16))
    routed = DynamicRouting(policy("layer-k", ks=[1, 2, 3, 4])).run(program).program
    skips = {Phase.PREFILL: Capabilities(skips_experts=False, reason="dense"), Phase.DECODE: Capabilities(True)}
    found = account(program, routed, collect(routed, ids), skips)
    assert found["kept_share"] == pytest.approx((1 + 2 + 3 + 4) / 16)
    assert [layer["kept_share"] for layer in found["layers"]] == [0.25, 0.5, 0.75, 1.0]
    assert found["layers"][1]["kept_by_k"] == [0, 0, 1, 0, 0]
    assert [sum(layer["tokens"]) for layer in found["layers"]] == [32, 64, 96, 128]
    assert found["phases"]["decode"] == {"executed_flops_share": 0.625, "bytes_per_token_share": 0.625}
    assert found["phases"]["prefill"] == {"executed_flops_share": 1.0, "reason": "logical saving only: dense"}
    view = token_view(routed, ids[0].tolist())
    assert view[0] == (int(ids[0, 0]), 0.625, (1, 2, 3, 4))


def test_traces_hold_what_the_router_said(program: Program) -> None:
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (5, 8))
    traces = collect(program, ids)
    assert [tuple(trace.weights.shape) for trace in traces] == [(40, 4)] * 4
    assert bool((traces[0].weights[:, :-1] >= traces[0].weights[:, 1:]).all())
    alone = collect(program, ids[:1])
    torch.testing.assert_close(traces[3].hidden_rms[:8], alone[3].hidden_rms, rtol=1e-4, atol=1e-5)


def fields(golden_model: Path, **section: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"checkpoint": str(golden_model), "target": "onnx"}
    return {**found, "routing": section} if section else found


def test_off_is_byte_for_byte_without(golden_model: Path, tmp_path: Path) -> None:
    compile_recipe(make_recipe(fields(golden_model)), tmp_path / "a", gates=False)
    compile_recipe(make_recipe(fields(golden_model, policy="off")), tmp_path / "b", gates=False)
    for name in ("moec.json", "model.onnx", "model.onnx_data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_export_with_routing_is_proven_and_can_be_validated(golden_model: Path, tmp_path: Path) -> None:
    section = {"policy": "threshold", "budget": 0.6, "prune": 0.125, "runtime_input": True}
    result = compile_recipe(make_recipe(fields(golden_model, **section)), tmp_path / "out")
    assert result.exit_code == 0, result.failed
    manifest = read_manifest(tmp_path / "out")
    accounting = manifest["routing"]["accounting"]
    assert 0.5 < accounting["kept_share"] < 0.7
    assert accounting["phases"]["decode"]["executed_flops_share"] == pytest.approx(accounting["kept_share"])
    assert manifest["routing"]["pruning"]["removed"] == [2, 2, 2, 2]
    again = validate_artifact(tmp_path / "out", str(golden_model))
    assert again.exit_code == 0, again.failed
    view = experts_by_token(str(tmp_path / "out"), "In the beginning", str(golden_model))
    assert "".join(token["text"] for token in view).split() == ["In", "the", "beginning"]
    assert "of the slots are used" in coloured(view).plain
    with pytest.raises(UsageError, match="in the format of its runtime"):
        experts_by_token(str(tmp_path / "out"), "In the beginning", None)


def test_pruning_that_the_router_does_not_allow_is_an_error(tiny_checkpoint: Any, tmp_path: Path) -> None:
    """A router that chooses groups first, even one group: nothing could be pruned, and the user asked for it."""
    fields = {"checkpoint": str(tiny_checkpoint("glm4_moe")), "target": "onnx"}
    removed = [[1, 3, 5], [0, 2]]
    with pytest.raises(LoweringError, match=r"mlp.*its router does not treat experts independently") as caught:
        compile_recipe(make_recipe({**fields, "routing": {"removed": removed}}), tmp_path / "out")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
