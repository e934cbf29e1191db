"""States that are no caches, in the package and in its runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.coreml.executor.package import load_spec, model_file
from moec.targets.coreml.package import PACKAGE
from moec.targets.coreml.runner import CoremlRunner
from tests.support.checks import exported

LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2}


@pytest.fixture(scope="module", params=list(LIMITS), ids=["fp32", "fp16"])
def hybrid(request: pytest.FixtureRequest, tiny_checkpoint: Any, program_of: Any, lower: Any) -> Any:
    return lower(program_of(tiny_checkpoint("lfm2_moe"), request.param), context=48, prefill_chunk=16)


def prompt(model: Any, length: int = 40) -> np.ndarray:
    return np.random.default_rng(length).integers(3, model.program.vocab_size, (1, length))


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_convolutions_share_one_state(hybrid: Any) -> None:
    description = load_spec(model_file(hybrid.directory / PACKAGE)).description
    for function in description.functions:
        states = {item.name: list(item.type.stateType.arrayType.shape) for item in function.state}
        assert states["convState"] == [2, 64, 3]
        assert states["keyCache"] == [1, 2, 48, 16]
        assert ("convStateRemainder" in states) == (hybrid.program.dtype is torch.float32)
        assert all(item.shortDescription for item in function.state)


@pytest.mark.parametrize("cut", [1, 2, 7, 16, 21, 38])
def test_a_prompt_in_two_pieces_is_one_and_a_new_one_starts_from_nothing(hybrid: Any, cut: int) -> None:
    # 7: less than a chunk; 21: a chunk and a piece, then a token and pieces; 1 and 2: less than a kernel.
    ids, runner = prompt(hybrid), hybrid.runner()
    want = ProgramRunner(hybrid.program).prefill(ids)
    for _ in range(2):
        parts = [runner.prefill(ids[:, :cut]), runner.decode(ids[:, cut : cut + 1]), runner.decode(ids[:, cut + 1 :])]
        assert difference(np.concatenate(parts, axis=1), want) < LIMITS[hybrid.program.dtype]


def test_reset_forgets_and_a_fork_has_states_of_its_own(hybrid: Any) -> None:
    ids, runner = prompt(hybrid, 12), hybrid.runner()
    want = runner.prefill(ids)
    twin = runner.fork()
    assert np.array_equal(twin.decode(ids), want)
    runner.reset()
    assert np.array_equal(runner.decode(ids), want)


def test_a_state_that_is_not_handed_on_is_noticed(hybrid: Any) -> None:
    """The convolution state matters at all: without it the tokens after a prefill differ."""
    ids, runner = prompt(hybrid, 9), CoremlRunner(hybrid.directory)
    want = ProgramRunner(hybrid.program).prefill(ids)
    runner.prefill(ids[:, :6])
    state = runner._backend._state  # type: ignore[attr-defined]
    for name in state:
        if name.startswith("convState"):
            assert state.read(name).any()
            state.write(name, np.zeros_like(state.read(name)))
    assert difference(runner.decode(ids[:, 6:]), want[:, 6:]) > 3e-2


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_export_with_all_gates(dtype: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ("--dtype", dtype, "--context", "160", "--prefill-chunk", "32")
    verdicts = exported(tiny_checkpoint("lfm2_moe"), "coreml", out, *flags)
    assert {verdicts[gate] for gate in ("parity: artifact", "coverage", "integrity")} == {"pass"}


@pytest.fixture(scope="module", params=["qwen3_next", "jamba"])
def recurrent(request: pytest.FixtureRequest, tiny_checkpoint: Any, program_of: Any, lower: Any) -> Any:
    """Gated delta rule, and Mamba in two layers."""
    return lower(program_of(tiny_checkpoint(request.param)), context=48, prefill_chunk=16)


@pytest.mark.parametrize("cut", [1, 7, 21])
def test_a_recurrent_model_in_pieces_is_one_and_a_new_one_starts_from_nothing(recurrent: Any, cut: int) -> None:
    ids, runner = prompt(recurrent), recurrent.runner()
    want = ProgramRunner(recurrent.program).prefill(ids)
    for _ in range(2):
        parts = [runner.prefill(ids[:, :cut]), runner.decode(ids[:, cut : cut + 1]), runner.decode(ids[:, cut + 1 :])]
        assert difference(np.concatenate(parts, axis=1), want) < 2e-5


def test_states_of_scans_are_the_sum_of_two_in_half_precision_too(
    tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    model = lower(program_of(tiny_checkpoint("qwen3_next"), torch.float16), context=48, prefill_chunk=16)
    for function in load_spec(model_file(model.directory / PACKAGE)).description.functions:
        states = {item.name: list(item.type.stateType.arrayType.shape) for item in function.state}
        assert states["recurrentState"] == states["recurrentStateRemainder"] == [1, 4, 16, 16]
        assert "convStateRemainder" not in states
        assert all(item.shortDescription for item in function.state)
