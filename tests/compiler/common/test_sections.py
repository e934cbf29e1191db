"""Sections of moec.json and report.json hold what the views on them read, or the reader says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moec.compiler.common.artifact import read_manifest, write_manifest
from moec.compiler.common.errors import ArtifactError
from moec.compiler.common.sections import Figures, Summary
from moec.compiler.report.describe import describe_built
from moec.compiler.report.diff import _facts
from moec.compiler.report.inspect import inspect
from moec.compiler.report.schema import read_report
from moec.compiler.report.summary import readme, summarise

LAYER = {"num_experts": 8, "top_k": 2, "intermediate_size": 48}
MODEL = {
    "model_type": "olmoe",
    "layers": 1,
    "moe_layers": [LAYER],
    "parameters": {"total": 10, "active": 5},
    "states": {"count": 2, "kinds": ["key"], "bytes_per_token": 8},
    "vocab_size": 128,
    "max_position_embeddings": None,
}
WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"model": {"notes": 7}}, "model.notes"),
    ({"model": {**MODEL, "states": None}}, "model.states"),
    ({"model": {**MODEL, "source": None}}, "model.source"),
    ({"model": {**MODEL, "parameters": None}}, "model.parameters"),
    ({"routing": {"accounting": {"phases": {"decode": {"executed_flops_share": None}}}}}, "executed_flops_share"),
    ({"model": {"parameters": {"total": 10, "active": 5}}}, "it has parameters, but no layers"),
    ({"model": {**MODEL, "parameters": {"total": "text", "active": 5}}}, "model.parameters.total"),
    ({"model": {**MODEL, "parameters": {"total": 10**400, "active": 5}}}, "model.parameters.total"),
    ({"model": {**MODEL, "moe_layers": [{"num_experts": 8}]}}, "model.moe_layers.0.top_k"),
    ({"model": {**MODEL, "source": {"moe_layers": [LAYER]}}}, "its source has no parameters"),
    ({"model": {**MODEL, "source": {"parameters": MODEL["parameters"]}}}, "its source has no moe_layers"),
    ({"recipe": {"target": "onnx", "options": []}}, "recipe.options"),
    ({"routing": {"policy": "top-p", "parameters": "text"}}, "routing.parameters"),
    ({"routing": {"accounting": {"layers": [{}]}}}, "routing.accounting.layers.0.kept_share"),
    ({"routing": {"accounting": {"phases": {"decode": {"executed_flops_share": "x"}}}}}, "executed_flops_share"),
    ({"routing": {"pruning": {"removed": ["x"]}}}, "routing.pruning.removed.0"),
    ({"quantization": {"classes": []}}, "quantization.classes"),
    ({"quantization": {"kept": {"attention": "text"}}}, "quantization.kept.attention"),
    ({"quantization": {"kv_cache": {"format": 8}}}, "quantization.kv_cache.format"),
    ({"tensor_bytes": {"attention": None}}, "tensor_bytes.attention"),
    ({"facts": {"ops": 3}}, "facts.ops"),
    ({"source": {"bytes": -1}}, "source.bytes"),
)


@pytest.mark.parametrize(("sections", "told"), WRONG)
def test_a_value_of_another_type_is_named_where_it_is_read(sections: dict[str, Any], told: str, tmp_path: Path) -> None:
    write_manifest(tmp_path, sections)
    with pytest.raises(ArtifactError) as caught:
        read_manifest(tmp_path)
    assert told in str(caught.value)
    assert caught.value.hint


def test_what_may_be_missing_can_be_shown(report_with: Any, tmp_path: Path) -> None:
    sections = {
        "model": MODEL,
        "passes": [{"name": "quantize"}],
        "routing": {"policy": "top-p", "accounting": {"phases": {"decode": {}}}},
    }
    report_with(tmp_path, {})
    write_manifest(tmp_path, sections)
    manifest = read_manifest(tmp_path)
    assert describe_built(manifest)
    assert readme(manifest, {})
    assert dict(_facts(manifest, read_report(tmp_path)))
    assert inspect(str(tmp_path))["verdicts"][0]["gate"] == "quality"


@pytest.fixture
def report_with() -> Any:
    """Writes a report with a verdict of the quality gate that has these figures."""

    def write(directory: Path, figures: dict[str, Any], **more: Any) -> None:
        verdict = {"gate": "quality", "status": "pass", "summary": "", "exit_code": 7, "figures": figures}
        machine = {"cpu": "", "cores": 1, "logical_cores": 1, "memory_bytes": 1, "os": "", "python": ""}
        empty = {key: {} for key in ("timings", "versions", "model", "recipe", "files", "tensor_bytes")}
        content = {**empty, "schema_version": 1, "created": "", "exit_code": 0, "machine": machine, "rejections": []}
        (directory / "report.json").write_text(json.dumps({**content, "verdicts": [verdict], **more}))

    return write


@pytest.mark.parametrize(
    ("figures", "more"),
    [
        ({"workloads": {"decode128": {"candidate": {"wall": {}}}}}, {}),
        ({"increase": []}, {}),
        ({}, {"files": {"model.onnx": 10**400}}),
        ({}, {"summary": {"bytes": "text"}}),
        ({}, {"summary": {"ratio": 0.5}}),
    ],
)
def test_a_report_that_cannot_be_shown_is_damaged(
    figures: dict[str, Any], more: dict[str, Any], report_with: Any, tmp_path: Path
) -> None:
    report_with(tmp_path, figures, **more)
    with pytest.raises(ArtifactError, match="not a report"):
        read_report(tmp_path)


def test_infinity_is_a_text_in_the_file_and_a_number_where_it_is_shown(report_with: Any, tmp_path: Path) -> None:
    report_with(tmp_path, {"increase": "inf"}, summary={"bytes": 7, "perplexity_increase": "inf"})
    report = read_report(tmp_path)
    assert report.summary["perplexity_increase"] == float("inf")
    verdicts = [verdict.model_dump() for verdict in report.verdicts]
    assert summarise({}, {}, verdicts)["perplexity_increase"] == float("inf")
    assert Figures.model_validate({"increase": "nan"}, strict=False).increase is not None
    with pytest.raises(ValidationError):
        Summary.model_validate({"bytes": 1, "ratio": {}})
