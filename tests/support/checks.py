"""Assertions that several tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moec import cli
from moec.compiler.ir.program import Program
from moec.passes.base import Pass
from moec.targets.runners import Runner


def assert_recorded(runner: Runner, golden_model: Path, prompts: int | None = None) -> None:
    """Assert that `runner` computes the recorded float32 logits of transformers, and generates the same greedy tokens.

    See golden_models/README.md. `prompts`: how many of the recorded prompts to check; None: all.
    """
    recorded = np.load(golden_model / "golden_logits.npz")
    names = [name.removesuffix(".greedy") for name in recorded.files if name.endswith(".greedy")][:prompts]
    assert names
    for name in names:
        ids, logits, greedy = (recorded[f"{name}.{part}"] for part in ("input_ids", "logits", "greedy"))
        got = runner.prefill(ids[None])
        assert np.abs(got[0, -len(logits) :] - logits).max() <= 1e-4 * np.abs(logits).max()
        tokens = [int(got[0, -1].argmax())]
        while len(tokens) < len(greedy):
            tokens.append(int(runner.decode(np.array([tokens[-1:]]))[0, -1].argmax()))
        assert tokens == greedy.tolist()


def exported(checkpoint: Path, target: str, out: Path, *flags: str) -> dict[str, str]:
    """Export with all gates; returns name of each gate -> its status."""
    code = cli.dispatch(["export", str(checkpoint), "-t", target, "-o", str(out), "-q", *flags])
    assert code == 0
    return {item["gate"]: item["status"] for item in json.loads((out / "report.json").read_text())["verdicts"]}


def assert_left_alone(item: Pass, program: Program, reason: str) -> None:
    """Assert that the pass changes nothing, and rejects one node in module `block` with `reason`."""
    result = item.run(program)
    assert not result.modified
    assert result.program is program
    (rejection,) = result.rejections
    assert (rejection.source, rejection.where) == (item.name, "block")
    assert reason in rejection.reason
