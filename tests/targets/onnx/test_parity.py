"""Whole tiny models against the interpreter, intermediates not exposed: prefill, decode, padding, past the window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.families.tiny_models import family_names, write_tiny_checkpoint
from moec.compiler.gates.cases import Case
from moec.compiler.gates.compare import compare, run_case
from moec.compiler.gates.reference import Oracle
from moec.compiler.gates.tolerance import TOLERANCES, Precision
from tests.support.checks import assert_recorded

PRECISION = {torch.float32: Precision.FP32, torch.float16: Precision.FP16}
MAX_EXCUSED = 0.2
"""Share of the positions where a tied router decision may go either way, as in the parity gate."""
SHAPES = ((1, 1, 9), (2, 5, 0), (2, 5, 7), (1, 130, 0), (2, 1, 40))
"""(batch, new tokens, past); every window and chunk of the tiny models is shorter than 40."""
LONG = (1, 300, 0)
"""For recurrent layers in float32, whose states go through every token. In float16 they add up its rounding."""
DEFAULT = ("olmoe", "gpt_oss")
RECURRENT = ("qwen3_next", "nemotron_h")
TURNED_BY_HALF = frozenset({"bailing_hybrid", "jamba"})
"""Families whose tiny models choose other experts in float16, which a state hands on to later tokens.
The interpreter is as far from itself in float32."""
NOT_CAPTURED = frozenset(["doge", "llama", "nllb_moe", "switch_transformers"])
"""Encoder-decoders, a dense model and a dynamic mask: docs/families.md has the reasons."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
FORMS: dict[str, dict[str, str]] = {
    "default": {},
    "kernel": {"experts": "kernel"},
    "portable": {"flavor": "portable"},
    "genai": {"flavor": "genai"},
}


def ids(program: Any, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(batch * 1000 + length).integers(3, program.vocab_size, (batch, length))


def cases(program: Any) -> Iterator[Case]:
    recurrent = program.dtype is torch.float32 and any(state.kind == "recurrent" for state in program.states)
    for batch, new, past in (*SHAPES, LONG) if recurrent else SHAPES:
        steps = (past, new) if past else (new,)
        yield Case(f"{batch, new, past}", ids(program, batch, past + new), None, steps)
    # Llama 4 scales its queries by slots, padding included, from floor_scale on: in transformers too.
    length = min(32, int(program.config.get("floor_scale") or 32) - 1)
    mask = (np.arange(length)[None] >= np.array([[0], [length // 2]])).astype(np.int64)
    yield Case("left-padded batch", ids(program, 2, length) * mask, mask, (length - 2, 2))


def check(model: Any, dtype: torch.dtype) -> None:
    """Every position against the interpreter, which sees each sequence whole and without padding."""
    tolerance = TOLERANCES[PRECISION[dtype]]
    oracle = Oracle(model.program, tolerance.tie_margin)
    results = []
    for case in cases(model.program):
        trace = oracle.trace(case.input_ids, case.attention_mask)
        results.append(compare(case, run_case(model.runner, case), trace, tolerance)[0])
        assert results[-1].error <= tolerance.limit, results[-1]
    assert sum(result.excused for result in results) <= MAX_EXCUSED * sum(result.positions for result in results)


@DTYPES
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", DEFAULT)
def test_family(family: str, form: str, dtype: torch.dtype, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), dtype=dtype, **FORMS[form])
    check(model, dtype)


@DTYPES
@pytest.mark.parametrize("form", ["default", "portable"])
@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_family(
    family: str, form: str, dtype: torch.dtype, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), dtype=dtype, **FORMS[form])
    check(model, dtype)


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("form", ["default", "kernel", "portable"])
@pytest.mark.parametrize("family", sorted(set(family_names()) - NOT_CAPTURED - set(DEFAULT)))
def test_every_family(family: str, form: str, dtype: torch.dtype, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    if family in TURNED_BY_HALF:
        dtype = torch.float32
    model = lower_checkpoint(tiny_checkpoint(family), dtype=dtype, **FORMS[form])
    check(model, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(NOT_CAPTURED))
def test_the_others_cannot_be_captured(family: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    with pytest.raises(UnsupportedModelError):
        lower_checkpoint(tiny_checkpoint(family))


def test_golden_model(golden_model: Path, lower_checkpoint: Any) -> None:
    """Recorded logits of transformers in float32; see golden_models/README.md."""
    assert_recorded(lower_checkpoint(golden_model).runner, golden_model)


def test_bfloat16_checkpoint(tmp_path: Path, lower_checkpoint: Callable[..., Any]) -> None:
    model = lower_checkpoint(write_tiny_checkpoint("olmoe", tmp_path / "checkpoint", dtype="bfloat16"))
    check(model, torch.float32)
