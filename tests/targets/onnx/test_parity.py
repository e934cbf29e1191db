"""Whole tiny models against the interpreter, intermediates not exposed: prefill, decode, padding, past the window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.errors import UnsupportedModelError
from moec.compiler.interpreter import ProgramRunner
from moec.compiler.tiny_models import family_names, write_tiny_checkpoint

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
"""Of the largest logit: float32 differs by the order of sums alone, float16 by its 11 bits over a few layers."""
SHAPES = ((1, 1, 9), (2, 5, 0), (2, 5, 7), (1, 130, 0), (2, 1, 40))
"""(batch, new tokens, past); every window and chunk of the tiny models is shorter than 40."""
DEFAULT = ("olmoe", "gpt_oss")
NOT_CAPTURED = frozenset({"doge"})
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
FLAVORS = pytest.mark.parametrize("flavor", ["default", "portable"])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference in units of the largest logit; NaN where either has one."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def ids(program: Any, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * 1000 + length).integers(3, program.vocab_size, (batch, length))


def check_shapes(model: Any, dtype: torch.dtype) -> None:
    reference = ProgramRunner(model.program)
    for batch, new, past in SHAPES:
        tokens = ids(model.program, batch, past + new)
        for runner in (model.runner, reference):
            runner.reset()
            if past:
                runner.prefill(tokens[:, :past])
        got, want = (runner.decode(tokens[:, past:]) for runner in (model.runner, reference))
        assert relative(got, want) <= TOLERANCE[dtype], (batch, new, past)


def check_padding(model: Any, dtype: torch.dtype) -> None:
    """A left-padded batch gives the logits of its sequences alone, prefill and decode."""
    long, short = ids(model.program, 1, 30), ids(model.program, 1, 17)
    tokens = np.concatenate([long, np.concatenate([np.zeros((1, 13), np.int64), short], 1)])
    mask = (np.arange(30)[None] >= np.array([[0], [13]])).astype(np.int64)
    step, longer = ids(model.program, 2, 2), np.concatenate([mask, np.ones((2, 2), np.int64)], 1)
    prefill, decode = model.runner.prefill(tokens, mask), model.runner.decode(step, longer)
    alone = ProgramRunner(model.program)
    for row, (sequence, padding) in enumerate(((long, 0), (short, 13))):
        assert relative(prefill[row, padding:], alone.prefill(sequence)[0]) <= TOLERANCE[dtype]
        assert relative(decode[row], alone.decode(step[row : row + 1])[0]) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("flavor", ["default", "portable", "genai"])
@pytest.mark.parametrize("family", DEFAULT)
def test_family(family: str, flavor: str, dtype: torch.dtype, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), flavor=flavor, dtype=dtype)
    check_shapes(model, dtype)
    check_padding(model, dtype)


@pytest.mark.slow
@DTYPES
@FLAVORS
@pytest.mark.parametrize("family", sorted(set(family_names()) - NOT_CAPTURED - set(DEFAULT)))
def test_every_family(
    family: str, flavor: str, dtype: torch.dtype, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), flavor=flavor, dtype=dtype)
    check_shapes(model, dtype)
    check_padding(model, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(NOT_CAPTURED))
def test_the_others_cannot_be_captured(family: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        lower_checkpoint(tiny_checkpoint(family))


def test_golden_model(golden_model: Path, lower_checkpoint: Any) -> None:
    """Recorded logits of transformers in float32; see golden_models/README.md."""
    recorded = np.load(golden_model / "golden_logits.npz")
    model = lower_checkpoint(golden_model)
    prompts = [name.removesuffix(".greedy") for name in recorded.files if name.endswith(".greedy")]
    for prompt in prompts:
        ids, logits, greedy = (recorded[f"{prompt}.{name}"] for name in ("input_ids", "logits", "greedy"))
        got = model.runner.prefill(ids[None])
        assert relative(got[0, -len(logits) :], logits) <= TOLERANCE[torch.float32]
        tokens = [int(got[0, -1].argmax())]
        while len(tokens) < len(greedy):
            tokens.append(int(model.runner.decode(np.array([tokens[-1:]]))[0, -1].argmax()))
        assert tokens == greedy.tolist()


def test_bfloat16_checkpoint(tmp_path: Path, lower_checkpoint: Callable[..., Any]) -> None:
    model = lower_checkpoint(write_tiny_checkpoint("olmoe", tmp_path / "checkpoint", dtype="bfloat16"))
    check_shapes(model, torch.float32)
