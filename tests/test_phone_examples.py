"""The apps of examples/android and examples/ios use the names that artifacts have."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import moec
from moec.compiler.families.tiny_models import write_tiny_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
KOTLIN = EXAMPLES / "android" / "decoding" / "src" / "main" / "kotlin" / "moec" / "decoding" / "Artifact.kt"
SWIFT = EXAMPLES / "ios" / "Decoding" / "Sources" / "Decoding" / "Artifact.swift"
BUDGET = "routing_budget"
ROUTING = {"policy": "top-p", "parameters": {"mass": 0.75}, "runtime_input": True}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0 + index for index in range(8)],
    "factor": 8.0,
    "original_max_position_embeddings": 24,
}


def constants(source: Path, declaration: str) -> dict[str, str]:
    """Name -> value of the constants of strings in a source."""
    return dict(re.findall(rf'{declaration} (\w+) = "([^"]+)"', source.read_text()))


def manifest(directory: Path, checkpoint: Path, target: str, options: dict[str, Any]) -> dict[str, Any]:
    moec.export(checkpoint, target=target, output=directory, gates=False, routing=ROUTING, options=options)
    content: dict[str, Any] = json.loads((directory / "moec.json").read_text())
    return content


def named(rows: list[dict[str, Any]]) -> set[str]:
    return {row["name"] for row in rows}


def test_android(tmp_path: Path) -> None:
    """Every signature has exactly the tensors that the app binds; convolutions add the count of tokens to prefill."""
    own = constants(KOTLIN, "const val")
    assert set(own) == {"DECODE", "PREFILL", "TOKENS", "POSITIONS", "TOKEN_COUNT", "LOGITS"}
    checkpoint = write_tiny_checkpoint("lfm2_moe", tmp_path / "checkpoint", rope_parameters=LONGROPE)
    content = manifest(tmp_path / "out", checkpoint, "tflite", {"context": 32, "prefill": (8, 16)})
    states = named(content["signature"]["states"])
    signatures = content["signature"]["signatures"]
    assert set(signatures) == {own["DECODE"], f"{own['PREFILL']}8", f"{own['PREFILL']}16"}
    for name, signature in signatures.items():
        counts = set() if name == own["DECODE"] else {own["TOKEN_COUNT"]}
        assert named(signature["inputs"]) == {own["TOKENS"], own["POSITIONS"], BUDGET, *counts, *states}
        assert named(signature["outputs"]) == {own["LOGITS"], *states}
    facts = content["facts"]
    assert (facts["context"], facts["inputs"], facts["rotary_borders"]) == (32, {BUDGET: [0.75]}, [24])
    assert change_by_budget(tmp_path / "out") > 1e-4


def test_ios(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    own = constants(SWIFT, "public static let")
    assert set(own) == {"package", "decode", "prefill", "tokens", "positions", "logits"}
    content = manifest(tmp_path / "out", tiny_checkpoint("qwen3_moe"), "coreml", {"context": 32})
    assert (tmp_path / "out" / own["package"]).is_dir()
    assert set(content["signature"]) == {own["decode"], own["prefill"]}
    for signature in content["signature"].values():
        assert named(signature["inputs"]) == {own["tokens"], own["positions"], BUDGET}
        assert named(signature["outputs"]) == {own["logits"]}
    facts = content["facts"]
    assert (facts["context"], facts["prefill_chunk"], facts["inputs"]) == (32, 32, {BUDGET: [0.75]})
    assert change_by_budget(tmp_path / "out") > 1e-4


def change_by_budget(directory: Path) -> float:
    """By how much logits change if the added input gets another value than its default."""
    own, other = (moec.load(directory, inputs=inputs) for inputs in (None, {BUDGET: 0.1}))
    assert own.scalar_inputs == (BUDGET,)
    prompt = np.arange(5, 13)[None]
    return float(np.abs(own.runner.prefill(prompt) - other.runner.prefill(prompt)).max())
