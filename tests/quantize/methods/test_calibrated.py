"""Calibration through the interpreter: what it holds in memory at a time, and the tokens of each expert."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moec import passes
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import Converted, LazyTensor
from moec.quantize.methods import calibrated as calibration
from moec.quantize.methods.calibrated import calibrate, file_backed_tensor
from moec.quantize.methods.gptq import GptqOptions
from moec.quantize.plan import requested

LAYERS, EXPERTS, TOP_K = 2, 8, 2


@dataclass(frozen=True)
class Watched(Converted):
    """A stack that remembers how many of its experts were read at a time."""

    source: LazyTensor
    reads: list[int] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.source.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        self.reads.append(stop - start)
        return self.source.rows(start, stop)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    directory: Path = tmp_path_factory.mktemp("model")
    tiny_model("olmoe", intermediate_size=96).save_pretrained(directory)
    return passes.run_passes(capture(Checkpoint.open(directory)), passes.default_passes())[0]


@pytest.fixture
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 128, (6, 64))


@pytest.fixture
def watched(program: Program) -> Program:
    stacks = {name: Watched(tensor) for name, tensor in program.weights.items() if len(tensor.shape) == 3}
    assert len(stacks) == 2 * LAYERS
    return program.replace(weights=program.weights.with_tensors(stacks))


def stacks_of(program: Program) -> list[Watched]:
    return [tensor for tensor in program.weights.values() if isinstance(tensor, Watched)]


def test_one_expert_is_in_memory_at_a_time(watched: Program, text: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "BATCH", 1)
    calibrate(watched, requested("int4:32"), text)
    for stack in stacks_of(watched):
        assert max(stack.reads) == 1
        # Each once for rounding, beside those that the text reached.
        assert len(stack.reads) >= EXPERTS


def test_the_same_codes_come_out_whatever_is_in_memory(
    program: Program, text: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = requested("int4:32:asym")
    whole = calibrate(program, plan, text).rounded
    monkeypatch.setattr(calibration, "BATCH", 1)
    small = calibrate(program, plan, text, memory=1).rounded
    assert whole.keys() == small.keys()
    for name, result in whole.items():
        one, other = result.tensor, small[name].tensor
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
        assert (one.zero_points is None) or torch.equal(one.zero_points, other.zero_points)  # type: ignore[arg-type]


def test_every_token_is_counted_once_for_each_of_its_experts(program: Program, text: np.ndarray) -> None:
    found = calibrate(program, requested("int4:32"), text, options=GptqOptions(minimum_tokens=150))
    assert len(found.tokens) == 2 * LAYERS
    for name, counts in found.tokens.items():
        assert sum(counts) == text.size * TOP_K
        reasons = [bool(report.reason) for report in found.rounded[name].matrices]
        assert reasons == [count < 150 for count in counts]


def test_codes_lie_in_a_file_that_is_gone_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    codes = file_backed_tensor((2, 3, 4))
    codes.fill_(7)
    assert codes.sum() == 7 * 24
    assert not list(tmp_path.iterdir())
