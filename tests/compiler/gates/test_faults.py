"""No fault of `benchmarks/faults` passes the gates: a few of them here, all of them under the mark slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
EXPECTED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("mask", "padded tokens leak into attention", "onnx", ("parity: artifact",)),
    ("cache", "past keys of another layer", "onnx", ("parity: artifact",)),
    ("positions", "one too high in decode", "tflite", ("parity: artifact",)),
    ("experts", "gate and up exchanged", "coreml", ("parity: artifact", "coverage", "integrity")),
    ("experts", "GELU in place of SiLU", "tflite", ("parity: artifact", "coverage")),
    ("router", "one expert per token less", "onnx", ("parity: artifact",)),
    ("precision", "logits rounded to float16", "onnx", ("parity: artifact",)),
    ("files", "one bit of an expert flipped, the lowest", "tflite", ("integrity",)),
    ("files", "a node reads the neighbouring expert", "onnx", ("parity: artifact", "coverage")),
    ("runtime", "states of the last sequence kept", "tflite", ("parity: artifact", "repeatability")),
    ("runtime", "lost updates on several threads", "onnx", ("repeatability",)),
)
"""Kind and name of a fault, a target, and the gates that fail."""


@pytest.fixture(scope="module")
def faults() -> Iterator[Any]:
    """The modules of the benchmark, which can only be imported from its directory."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import gate_power

        yield gate_power
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def workshop(faults: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return faults.Workshop(tmp_path_factory.mktemp("models"))


def test_names_are_distinct_and_there_are_enough(faults: Any) -> None:
    names = [(fault.kind, fault.name) for fault in faults.FAULTS]
    assert len(names) == len(set(names))
    assert len(names) >= 60


@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml"])
def test_no_gate_fails_without_a_fault(target: str, faults: Any, workshop: Any, tmp_path: Path) -> None:
    fault = faults.Fault("no fault", "mixtral", "mixtral")
    assert faults.judge(fault, target, workshop, tmp_path / "artifact").caught == ()


@pytest.mark.parametrize(("kind", "name", "target", "gates"), EXPECTED)
def test_a_fault_fails_these_gates(
    kind: str, name: str, target: str, gates: tuple[str, ...], faults: Any, workshop: Any, tmp_path: Path
) -> None:
    (fault,) = [fault for fault in faults.FAULTS if (fault.kind, fault.name) == (kind, name)]
    assert fault.model == "mixtral", "one model keeps this fast"
    assert faults.judge(fault, target, workshop, tmp_path / "artifact").caught == gates


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "tflite", "coreml", "tensorrt"])
def test_no_fault_passes_and_no_model_fails_without_one(target: str, faults: Any, tmp_path: Path) -> None:
    rows = faults.run(faults.FAULTS, [target], tmp_path, None)
    assert [*faults.survivors(rows)] == []
    assert [*faults.alarms(faults.run(faults.controls(faults.FAULTS), [target], tmp_path, None))] == []
