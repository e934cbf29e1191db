"""Whole verdicts on an ONNX model: as it was made, and with faults that each gate must find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moec import cli
from moec.compiler.common.verdict import Status
from moec.compiler.foreign.validate import validate_foreign
from moec.compiler.pipeline.export import Result
from tests.support.onnx_faults import attribute, exchange_tensors, weights, with_fault, zero

Make = Callable[..., Path]
Tiny = Callable[[str], Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short measurements, and reports in a folder of the test."""
    monkeypatch.setattr("moec.compiler.foreign.speed.SECONDS", 0.01)
    monkeypatch.chdir(tmp_path)


def statuses(result: Result) -> dict[str, Status]:
    return {verdict.gate: verdict.status for verdict in result.verdicts}


def summary(result: Result, gate: str) -> str:
    return next(verdict.summary for verdict in result.verdicts if verdict.gate == gate)


def test_a_good_file(foreign_onnx: Make, tiny_checkpoint: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = foreign_onnx(), sorted(foreign_onnx().iterdir())
    assert cli.dispatch(["validate", str(path), "--against", str(tiny_checkpoint("olmoe")), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    passed = {verdict["gate"] for verdict in found["verdicts"] if verdict["status"] == "pass"}
    assert passed == {
        *("parity: capture", "parity: artifact", "coverage", "integrity", "routing", "operators", "repeatability"),
    }
    assert "16 of 16 experts are right" in next(v["summary"] for v in found["verdicts"] if v["gate"] == "coverage")
    assert found["foreign"]["producer"] == "someone else"
    assert found["foreign"]["unused_expert"].startswith("nothing")
    assert {row["precision"] for row in found["foreign"]["tensors"]} == {"fp32"}
    assert sorted(path.iterdir()) == before
    page = Path(found["directory"], "report.html").read_text()
    assert "What was built" in page
    assert "someone else" in page
    assert found["summary"]["tokens_per_second"]
    assert found["summary"]["next"][0]["command"].startswith(f"moec validate {path}")


def test_exchanged_experts(foreign_onnx: Make, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    change = exchange_tensors("0.mlp.experts.down_proj.2", "0.mlp.experts.down_proj.5")
    fault = with_fault(foreign_onnx(), tmp_path / "fault", change)
    result = validate_foreign(fault, str(tiny_checkpoint("olmoe")))
    found = statuses(result)
    assert result.exit_code == 5
    assert [found[gate] for gate in ("parity: artifact", "coverage", "integrity")] == [Status.FAIL] * 3
    assert "model.layers.0.mlp.experts 2, 5" in summary(result, "coverage")
    assert "14 of 16 experts are right" in summary(result, "coverage")
    assert "in another place: model.layers.0.mlp.experts.down_proj[2]" in summary(result, "integrity")


def test_codes_that_the_runtime_reads_otherwise(foreign_onnx: Make, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    fault = with_fault(foreign_onnx("int4"), tmp_path / "fault", attribute("QMoE", "quant_type", "fp4"))
    result = validate_foreign(fault, str(tiny_checkpoint("olmoe")))
    assert result.exit_code == 5
    assert [gate for gate, status in statuses(result).items() if status is Status.FAIL] == ["operators"]
    assert "quant_type is fp4, but the codes are read as integers" in summary(result, "operators")


def test_a_lost_expert_among_codes(foreign_onnx: Make, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Rounding changes the logits of a random model more than a lost expert; its codes tell them apart."""
    good = validate_foreign(foreign_onnx("int4"), str(tiny_checkpoint("olmoe")), output=tmp_path / "good")
    assert not good.failed
    assert "against the values of its codes" in summary(good, "parity: artifact")
    assert "int4, block 16" in {row["precision"] for row in good.manifest["foreign"]["tensors"]}
    fault = with_fault(foreign_onnx("int4"), tmp_path / "fault", lambda model: _lose(model))
    result = validate_foreign(fault, str(tiny_checkpoint("olmoe")))
    found = statuses(result)
    assert found["integrity"] is found["coverage"] is Status.FAIL
    assert "model.layers.1.mlp.experts 3" in summary(result, "coverage")
    assert "experts.gate_up_proj[3]" in summary(result, "integrity")
    assert found["routing"] is Status.PASS


def _lose(model: object) -> None:
    assert weights(model, "1.mlp.experts.gate_up_proj.scales", zero(3)) == 1  # type: ignore[arg-type]
