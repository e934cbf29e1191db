"""The recipes that come with moec: every one is valid, and what is said of it is what holds now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moec import cli
from moec.compiler.build.estimate import EstimateRequest, count_program, predict
from moec.compiler.common.artifact import read_manifest
from moec.compiler.common.errors import UsageError
from moec.compiler.families.released_models import write_hollow_checkpoint
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.measure.estimate.counting import count
from moec.compiler.measure.estimate.devices import device_names
from moec.compiler.pipeline.recipe import make_recipe, read_recipe, target_of
from moec.compiler.pipeline.routing import check_routing
from moec.compiler.zoo.entries import caution, entry_names, load_entry, load_model, model_names
from moec.passes.experts.prune_experts import PruneExperts
from moec.passes.quantize import Quantize
from moec.quantize.plan import QuantizationPlan

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = tuple(name for name in model_names() if (ROOT / "golden_models" / name).is_dir())
RELEASED = tuple(name for name in model_names() if name not in GOLDEN)
SMALL = "OLMoE-1B-7B-0924"


@pytest.mark.parametrize("name", entry_names())
def test_every_entry_is_valid_and_says_what_is_known(name: str) -> None:
    model, entry = load_entry(name)
    fields = read_recipe(Path(f"zoo:{name}"))
    assert "checkpoint" not in fields
    recipe = make_recipe({**fields, "checkpoint": "x"})
    target_of(recipe)
    if recipe.routing is not None:
        check_routing(recipe.routing)
    assert model.made["commit"]
    assert model.made["command"]
    if entry.quality == "measured":
        assert entry.measured is not None
        assert entry.measured.perplexity.low <= entry.measured.perplexity.value <= entry.measured.perplexity.high
        assert "fail" not in entry.measured.gates.values()
        assert model.source
    else:
        assert entry.estimated is not None
        assert entry.measured is None
        assert set(entry.estimated.devices) == set(device_names())
        assert f"--recipe zoo:{name} " in entry.measure
        assert not model.source


def test_models_that_are_here_are_measured_and_released_ones_are_not() -> None:
    assert "olmoe-tiny" in GOLDEN
    assert len(RELEASED) >= 5
    assert all(entry.quality == "measured" for name in GOLDEN for entry in load_model(name).recipes.values())
    assert all(entry.quality == "not measured" for name in RELEASED for entry in load_model(name).recipes.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_a_measured_model_is_the_one_that_is_here(name: str) -> None:
    assert load_model(name).source == Checkpoint.open(ROOT / "golden_models" / name).digests


def test_stated_sizes_are_those_of_the_model_that_the_recipe_makes(program_of: Callable[[str], Program]) -> None:
    program = program_of("golden")
    for entry in load_model("olmoe-tiny").recipes.values():
        assert entry.measured is not None
        made = program
        if removed := (entry.recipe.get("routing") or {}).get("removed"):
            made = PruneExperts(tuple(map(tuple, removed))).run(made).program
        if "quantize" in entry.recipe:
            made = Quantize(QuantizationPlan.from_dict(entry.recipe["quantize"]["format"])).run(made).program
        # A compensation of rank r adds H (E + 2 r) floats to a layer; see docs/routing.md.
        hidden_size = made.config["hidden_size"]
        policies = (entry.recipe.get("routing") or {}).get("parameters", {}).get("layers", [])
        ranks = [(policy or {}).get("compensation", 0) for policy in policies]
        added = sum(
            4 * hidden_size * (row.num_experts + 2 * rank)
            for row, rank in zip(made.layers, ranks, strict=False)
            if rank
        )
        assert entry.measured.values["size"] == pytest.approx(count(made).size + added, rel=1e-3)


def assert_stated(name: str, checkpoint: Path, recipe: str) -> None:
    entry = load_model(name).recipes[recipe]
    assert entry.estimated is not None
    routing = entry.recipe.get("routing", {})
    request: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "target": entry.recipe["target"],
        "quantize": entry.recipe["quantize"]["format"],
        "routing": routing.get("policy"),
        "kept_share": routing.get("budget", 1.0),
    }
    counts, stored = count_program(EstimateRequest(**request))
    assert (counts.size, counts.parameters, counts.active) == (
        entry.estimated.weights,
        entry.estimated.parameters,
        entry.estimated.active,
    )
    for device, stated in entry.estimated.devices.items():
        found = predict(counts, stored, EstimateRequest(**request, device=device), lambda *_: None)
        assert found["decode"]["roofline"] == pytest.approx(stated.decode_seconds)
        assert found["memory"] | {"fits": stated.fits} == found["memory"]
        assert found["memory"]["needed"] == entry.estimated.memory


def test_stated_estimates_are_those_of_moec_estimate(tmp_path: Path) -> None:
    assert_stated(SMALL, write_hollow_checkpoint(SMALL, tmp_path), "int4-routed")


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_all_stated_estimates_are_those_of_moec_estimate(name: str, tmp_path: Path) -> None:
    checkpoint = write_hollow_checkpoint(name, tmp_path)
    for recipe in load_model(name).recipes:
        assert_stated(name, checkpoint, recipe)


def test_a_recipe_of_the_zoo_is_exported(
    golden_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(golden_model), "--recipe", "zoo:olmoe-tiny/fast", "--rounding", "rtn", "--no-gates"]
    assert cli.dispatch([*command, "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "zoo:" not in said.err
    recorded = read_manifest(tmp_path / "out")["recipe"]
    entry = load_entry("olmoe-tiny/fast")[1]
    assert recorded["target"] == entry.recipe["target"]
    assert recorded["routing"]["policy"] == entry.recipe["routing"]["policy"]
    assert recorded["routing"]["parameters"]["layers"] == entry.recipe["routing"]["parameters"]["layers"]


def test_what_holds_for_no_other_checkpoint_is_said() -> None:
    model, _ = load_entry("olmoe-tiny/fast")
    assert caution("zoo:olmoe-tiny/fast", model.source) == ""
    assert "config.json differ" in caution("zoo:olmoe-tiny/fast", {**model.source, "config.json": "other"})
    assert "its quality was not measured; moec export" in caution(f"zoo:{SMALL}/int4", {})
    assert caution("recipe.yaml", {}) == ""


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["zoo", "show", "olmoe-tiny/fats"], "no recipe of olmoe-tiny 'fats'", "did you mean 'fast'?"),
        (["zoo", "show", "olmoe-tny/fast"], "the zoo has no model 'olmoe-tny'", "did you mean 'olmoe-tiny'?"),
        (["zoo", "show", "fast"], "'fast' is not MODEL/NAME", "'moec zoo' lists all"),
        (["zoo", "olmo"], "the zoo has no model 'olmo'", "its models"),
        (["export", "--recipe", "zoo:olmoe-tiny/fast", "-o", "x"], "no checkpoint is given", "give CHECKPOINT"),
        (["export", "M", "--recipe", "zoo:olmoe-tiny/x", "-o", "x"], "no recipe of olmoe-tiny 'x'", "its recipes"),
    ],
)
def test_what_is_not_there_is_said(
    capsys: pytest.CaptureFixture[str], golden_model: Path, arguments: list[str], message: str, hint: str
) -> None:
    given = [str(golden_model) if word == "M" else word for word in arguments]
    assert cli.dispatch(given) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert hint in said


def test_the_list_and_a_recipe_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.dispatch(["zoo"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if "/" in line.split(" ")[0]}
    assert rows.keys() >= set(entry_names())
    assert rows[f"{SMALL}/int4"][:3] == [f"{SMALL}/int4", "onnx", "3.68"]
    assert "not" in rows[f"{SMALL}/int4"]
    assert cli.dispatch(["zoo", "list", "olmoe-tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], list(found["models"])) == (True, ["olmoe-tiny"])
    assert cli.dispatch(["zoo", "show", f"{SMALL}/int4-routed"]) == 0
    shown = capsys.readouterr().out
    assert "# quality: not measured" in shown
    assert "# decode on rtx-4090: at least " in shown
    # What is shown is the recipe itself, with its figures as comments.
    assert yaml.safe_load(shown) == load_entry(f"{SMALL}/int4-routed")[1].recipe
    assert cli.dispatch(["zoo", "show", "olmoe-tiny/fast", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entry"]["quality"] == "measured"


def test_a_name_that_leads_elsewhere_is_no_model() -> None:
    with pytest.raises(UsageError, match="the zoo has no model"):
        load_model("../entries")
