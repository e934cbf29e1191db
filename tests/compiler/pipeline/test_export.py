"""The whole way, with a real target: capture, passes, lowering, gates, report; then validated, rebuilt and run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moec
from moec.compiler.common.artifact import verify
from moec.compiler.common.errors import ArtifactError, CheckpointError, LoweringError, UsageError
from moec.compiler.common.verdict import Status
from moec.compiler.families.families_page import check, choose, markdown, write_page
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import Program
from moec.compiler.pipeline import export as pipeline
from moec.compiler.pipeline import program as program_module
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.export import Result, validate_artifact
from moec.compiler.pipeline.program import build_program
from moec.compiler.pipeline.recipe import Recipe, make_recipe
from moec.compiler.pipeline.stages import silent
from moec.compiler.report.summary import built_rows

Tiny = Callable[[str], Path]
REPORTS = {"report.json", "report.html", "report.xml"}
UNHASHED = {*REPORTS, "README.md", "moec.json", "provenance.json"}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return moec.export(tiny_checkpoint("olmoe"), target="onnx", output=tmp_path_factory.mktemp("onnx") / "out")


def test_every_gate_passes_and_is_in_the_report(exported: Result) -> None:
    *proofs, quality, latency = exported.verdicts
    assert {verdict.status for verdict in proofs} == {Status.PASS}
    assert {verdict.gate.split(":")[0] for verdict in proofs} == {"parity", "coverage", "integrity", "repeatability"}
    # Nobody has given a limit: it did not run, which is no pass.
    assert (quality.gate, quality.status) == ("quality", Status.NOT_RUN)
    assert (latency.gate, latency.status) == ("latency", Status.NOT_RUN)
    report = json.loads((exported.directory / "report.json").read_text())
    assert [verdict["gate"] for verdict in report["verdicts"]] == [verdict.gate for verdict in exported.verdicts]
    assert exported.exit_code == 0


def test_the_manifest_says_what_was_built_and_nothing_else(exported: Result, tiny_checkpoint: Tiny) -> None:
    text = (exported.directory / "moec.json").read_text()
    manifest = json.loads(text)
    recipe = {key: value for key, value in manifest["recipe"].items() if value is not None}
    assert recipe == {"target": "onnx", "dtype": "fp32", "inputs_embeds": False, "options": recipe["options"]}
    assert manifest["source"]["digests"].keys() == {"config.json", "model.safetensors"}
    assert manifest["files"].keys() == {path.name for path in exported.directory.iterdir()} - UNHASHED
    assert [record["name"] for record in manifest["passes"]]
    assert manifest["tools"]["moec"] == moec.__version__
    assert {"torch", "transformers"} <= manifest["tools"].keys()
    checkpoint = tiny_checkpoint("olmoe")
    assert manifest["source"]["bytes"] == (checkpoint / "model.safetensors").stat().st_size
    # README.md is the same on every rebuild too, and says what report.json says.
    readme = (exported.directory / "README.md").read_text()
    summary = json.loads((exported.directory / "report.json").read_text())["summary"]
    assert all(f"| {name} | {said} |" in readme for name, said in built_rows(summary))
    assert f"{summary['bytes'] / 1e3:.2f} kB, {summary['ratio']:.2f} times the checkpoint's" in readme
    for absent in (str(exported.directory.parent), str(checkpoint), "seconds"):
        assert absent not in text + readme


def test_a_rebuild_is_byte_identical(exported: Result, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for path in tiny_checkpoint("olmoe").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    again = moec.export(copy, target="onnx", output=tmp_path / "b", gates=False).directory
    first = {path.name: path.read_bytes() for path in exported.directory.iterdir() if path.name not in REPORTS}
    assert first == {path.name: path.read_bytes() for path in again.iterdir() if path.name not in REPORTS}


def test_builds_that_share_captures_are_those_that_do_not(
    exported: Result, tiny_checkpoint: Tiny, capture_of: Callable[[str], Program], tmp_path: Path
) -> None:
    captures, fields = Captures(), {"checkpoint": str(tiny_checkpoint("olmoe")), "target": "onnx"}
    recipes: list[dict[str, Any]] = [
        {"routing": {"policy": "top-p", "parameters": {"mass": 0.5}}, "quantize": {"format": "int4"}},
        {},
    ]
    for index, more in enumerate(recipes):
        recipe = make_recipe({**fields, **more}, where="test")
        result = pipeline.compile_recipe(recipe, tmp_path / str(index), gates=False, captures=captures)
    for path in exported.directory.iterdir():
        if path.name not in REPORTS:
            assert (result.directory / path.name).read_bytes() == path.read_bytes(), path.name
    shared = captures.of(Checkpoint.open(tiny_checkpoint("olmoe")), torch.float32)
    assert format_graph(shared) == format_graph(capture_of("olmoe"))


def test_validate_finds_nothing_and_then_what_was_changed(
    exported: Result, tiny_checkpoint: Tiny, tmp_path: Path
) -> None:
    demands = {"coverage": {"min": "25%"}}
    result = validate_artifact(exported.directory, str(tiny_checkpoint("olmoe")), demands=demands)
    statuses = {verdict.gate: verdict.status for verdict in result.verdicts}
    assert {gate for gate, status in statuses.items() if status is not Status.PASS} == {"quality", "latency"}
    assert next(item for item in result.verdicts if item.gate == "coverage").figures["minimum"] == 0.25
    with pytest.raises(CheckpointError, match=r"not the checkpoint .* config.json, model.safetensors differ"):
        validate_artifact(exported.directory, str(tiny_checkpoint("mixtral")))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in exported.directory.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    data = bytearray((damaged / "model.onnx_data").read_bytes())
    data[len(data) // 2] ^= 0x40
    (damaged / "model.onnx_data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.onnx_data differs"):
        validate_artifact(damaged, str(tiny_checkpoint("olmoe")))
    assert verify(exported.directory)


def test_the_artifact_generates_what_transformers_generates(exported: Result, tiny_checkpoint: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [3, 14, 15, 92, 65]
    generator = moec.load(exported.directory)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("olmoe"), attn_implementation="eager", dtype="float32")
    ids = torch.tensor([prompt])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)[0, 5:]
    expected = [token for token in expected.tolist() if token not in generator.eos_token_ids]
    assert list(generator.tokens(prompt, max_new_tokens=24)) == expected
    assert np.isfinite(generator.runner.prefill(np.asarray([prompt]))).all()


def test_build_program_is_what_is_lowered(exported: Result, tiny_checkpoint: Tiny) -> None:
    recipe = Recipe(checkpoint=str(tiny_checkpoint("olmoe")), target="onnx")
    program = build_program(recipe)
    assert [layer.module for layer in program.layers] == [
        layer["module"] for layer in exported.manifest["model"]["moe_layers"]
    ]
    with pytest.raises(UsageError, match="unknown key 'flavour'"):
        build_program(recipe.model_copy(update={"options": {"flavour": "x"}}))


def test_families_are_built_by_each_recipe() -> None:
    routed = {"target": "onnx", "routing": {"policy": "top-p", "parameters": {"mass": 0.55}}}
    (row,) = rows = check(["mixtral"], {"onnx": {"target": "onnx"}, "routed": routed}, progress=silent)
    assert row.works
    assert row.artifacts == {"onnx": "yes", "routed": "yes"}
    assert row.reasons == {}
    page = markdown(rows, "moec families")
    assert "| onnx artifact proven | routed artifact proven |" in page
    assert "built for onnx, routed" in page
    wrong = {"target": "onnx", "routing": {"policy": "top-p", "no-such": 1}}
    with pytest.raises(UsageError, match="no-such"):
        check(["mixtral"], {"wrong": wrong}, progress=silent)


def test_a_family_that_cannot_be_built_says_why() -> None:
    coarse = {"target": "onnx", "quantize": {"format": "int8:128", "rounding": "rtn"}}
    (row,) = check(["mixtral"], {"coarse": coarse}, progress=silent)
    assert row.captured
    assert row.proven
    assert not row.works
    assert set(row.reasons) == {"coarse"}
    assert "128" in row.reasons["coarse"]


def test_families_are_checked_and_tabulated(tmp_path: Path) -> None:
    rows = check(["olmoe", "switch_transformers"], {}, progress=silent)
    assert [(row.family, row.captured, row.proven) for row in rows] == [
        ("olmoe", True, True),
        ("switch_transformers", False, False),
    ]
    page = markdown(rows, "moec families --check")
    assert "| olmoe | yes | yes |" in page
    assert "1 of 2 families work." in page
    assert "| switch_transformers | no | no | captured: [1] |" in page
    assert page.endswith(f"1. {rows[1].reasons['captured']}")
    write_page(tmp_path / "families.md", page)
    assert (tmp_path / "families.md").read_text().startswith("# Model families")
    assert "olmoe" in choose([])


def test_what_is_said_to_be_pruned_is_gone(tiny_checkpoint: Tiny) -> None:
    program = build_program(Recipe(checkpoint=str(tiny_checkpoint("olmoe")), target="onnx"))
    program_module._check_removed(program, program, [[], []])
    with pytest.raises(LoweringError, match="2 of its 8 experts should be pruned, but 8 are left"):
        program_module._check_removed(program, program, [[0, 1], []])
