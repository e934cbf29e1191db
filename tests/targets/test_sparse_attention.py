"""Attention over the tokens that an indexer selects, where the layer sees fewer tokens than its indexer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.operands import Attention
from moec.compiler.ir.program import ATTENTION, INDEXER, Program
from moec.passes import run_passes
from moec.targets import get_target

OPTIONS: dict[str, dict[str, Any]] = {
    "onnx": {},
    "tflite": {"context": 64, "prefill": [16]},
    "coreml": {"context": 64, "prefill_chunk": 16},
    "tensorrt": {},
}
WINDOW = 7


@pytest.mark.parametrize("name", OPTIONS)
def test_a_selected_token_outside_the_window_is_not_attended_to(
    name: str, program_of: Callable[..., Program], tmp_path: Path
) -> None:
    captured = program_of("deepseek_v32")
    graph = captured.copy_graph()
    *_, last = graph.find_nodes(op="call_function", target=ATTENTION)
    own = Attention.of(last)
    assert own.selected is not None
    assert own.selected.args[0].target is INDEXER
    last.args = replace(own, kind="sliding", window=WINDOW).args
    target = get_target(name)
    options = target.Options(**OPTIONS[name])
    program, _ = run_passes(captured.replace(graph=graph), target.passes(options))
    target.lower(program, options, tmp_path, lambda *_: None)
    ids = np.random.default_rng(3).integers(3, program.vocab_size, (1, 40))
    runner = target.open_reference(tmp_path, threads=1)
    want = ProgramRunner(program).prefill(ids)
    got = np.concatenate([runner.prefill(ids[:, :30]), runner.decode(ids[:, 30:])], axis=1)
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
    wide = ProgramRunner(captured).prefill(ids)
    assert np.abs(wide - want)[:, WINDOW:].max() > 0.1, "the window makes a difference"
