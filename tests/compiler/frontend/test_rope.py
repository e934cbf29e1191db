"""Rotary tables that depend on the length: equal to transformers on both sides of the border, and across it."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moec.compiler.common.verdict import Status
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.parity import ParityOptions, check_capture
from moec.compiler.gates.source import load_source
from moec.compiler.ir.interpreter import ProgramRunner

BORDER = 24
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * index for index in range(8)]}
LONGROPE = {"type": "longrope", **FACTORS, "original_max_position_embeddings": BORDER}
OWN = {"original_max_position_embeddings": BORDER, "max_position_embeddings": 8 * BORDER}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("qwen3_moe", {"rope_scaling": LONGROPE, **OWN}),
    "longrope with a scale for each side": (
        "phimoe",
        {"rope_scaling": {**LONGROPE, "short_mscale": 1.1, "long_mscale": 1.3}, **OWN},
    ),
    "dynamic": ("qwen3_moe", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": BORDER}),
    "dynamic, complex": (
        "deepseek_v2",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": BORDER},
    ),
}
STEPS = [(9, 1), (BORDER + 9, 1, 2), (BORDER - 2, 1, 1, 1, 3), (BORDER - 1, 6)]
"""Below the border, above it, and across it in steps of one token and in one step."""


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    def make(form: str) -> Checkpoint:
        family, changes = FORMS[form]
        directory = write_tiny_checkpoint(family, tmp_path_factory.mktemp(family))
        config = json.loads((directory / "config.json").read_text())
        del config["rope_parameters"]
        (directory / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0, **changes}))
        return Checkpoint.open(directory)

    return make


def fed(runner: ProgramRunner, ids: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    pieces, offset = [], 0
    for step in steps:
        pieces.append((runner.decode if offset else runner.prefill)(ids[:, offset : offset + step]))
        offset += step
    runner.reset()
    return np.concatenate(pieces, axis=1)


@pytest.mark.parametrize("form", FORMS)
def test_every_step_has_the_frequencies_of_its_length(form: str, scaled: Callable[[str], Checkpoint]) -> None:
    checkpoint = scaled(form)
    program = capture(checkpoint)
    assert program.rotary_borders == (BORDER,)
    source, runner = load_source(checkpoint), ProgramRunner(program)
    ids = np.random.default_rng(0).integers(3, program.vocab_size, (2, 2 * BORDER))
    for steps in STEPS:
        tokens = ids[:, : sum(steps)]
        want, got = source(tokens, steps), fed(runner, tokens, steps)
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), err_msg=str(steps))
    whole, across = source(ids[:, : BORDER + 3], (BORDER + 3,)), source(ids[:, : BORDER + 3], (BORDER - 2, 1, 1, 1, 2))
    # Keys in the cache keep the frequencies of their step: one pass over the whole sequence is no reference.
    assert np.abs(whole - across).max() > 1e-3 * np.abs(whole).max()


def test_the_gate_feeds_the_reference_the_steps_of_the_case(scaled: Callable[[str], Checkpoint]) -> None:
    checkpoint = scaled("dynamic")
    program = capture(checkpoint)
    verdict = check_capture(checkpoint, program, Prompts(program.vocab_size), ParityOptions(max_tokens=64))
    assert verdict.status is Status.PASS
    names = [case["name"] for case in verdict.figures["cases"]]
    assert f"decode past the unscaled rotary window of {BORDER}" in names


def test_the_largest_position_of_the_batch_decides(scaled: Callable[[str], Checkpoint]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = scaled("longrope")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    runner = ProgramRunner(capture(checkpoint))
    ids = np.random.default_rng(1).integers(3, 100, (2, BORDER + 4))
    mask = np.ones_like(ids)
    mask[0, :9] = 0
    positions = torch.from_numpy(mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(torch.from_numpy(ids), torch.from_numpy(mask), position_ids=positions).logits.numpy()
    got = runner.prefill(ids, mask)
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], atol=1e-5 * np.abs(want).max())
