"""Scales of a KV cache: the largest values of each channel on a text, wherever in the context it stands."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler.common.errors import CheckpointError
from moec.compiler.common.model_config import context_length
from moec.compiler.ir.interpreter import ProgramRunner, empty_states
from moec.compiler.ir.program import ATTENTION, Program
from moec.passes import default_passes, run_passes
from moec.quantize import kv_cache
from moec.quantize.kv_cache import attention_caches, measure_scales, sha256_of_scale, unit_scales

LENGTH = 12


@pytest.fixture(scope="module")
def program(capture_of: Any) -> Program:
    return run_passes(capture_of("mixtral"), default_passes())[0]


def windows(program: Program, count: int) -> np.ndarray:
    return np.random.default_rng(5).integers(3, program.vocab_size, (count, LENGTH))


def keys_at(program: Program, ids: np.ndarray, start: int) -> list[Tensor]:
    """The keys [1, heads, tokens, width] of each layer for ids at the positions from `start` on."""
    seen: list[Tensor] = []
    runner = ProgramRunner(
        program, observer=lambda node, args, _: seen.append(args[1]) if node.target is ATTENTION else None
    )
    feeds = runner.inputs(ids[None], None, 0)
    runner.run({**feeds, **empty_states(program, 1), "position_ids": feeds["position_ids"] + start})
    return seen


def test_scales_are_the_largest_values_over_127(program: Program) -> None:
    (ids,) = windows(program, 1)
    scales = measure_scales(program, ids[None])
    assert scales.keys() == {state.input.name for state in program.states}
    for layer, keys in enumerate(keys_at(program, ids, 0)):
        want = keys.abs().amax((0, 2)) / 127
        assert torch.allclose(scales[f"past_key_values.{layer}.key"], want, rtol=1e-6)


def test_windows_are_spread_over_the_context(program: Program) -> None:
    """More windows than run together, each at a place of its own; the last one ends with the context."""
    every, last = windows(program, 6), context_length(program.config)
    assert last is not None
    starts = [round((last - LENGTH) * index / 5 - 0.49) for index in range(6)]
    assert starts[-1] + LENGTH == last
    keys = [keys_at(program, ids, start) for ids, start in zip(every, starts, strict=True)]
    scales = measure_scales(program, every)
    for layer in range(len(keys[0])):
        want = torch.stack([each[layer] for each in keys]).abs().amax((0, 1, 3)) / 127
        assert torch.allclose(scales[f"past_key_values.{layer}.key"], want, rtol=1e-5)
    first = torch.stack([keys_at(program, ids, 0)[0] for ids in every]).abs().amax((0, 1, 3)) / 127
    assert not torch.allclose(scales["past_key_values.0.key"], first, rtol=1e-2)


def test_a_channel_without_values_gets_a_scale() -> None:
    scale = kv_cache._scale("it", torch.tensor([[0.0, 254.0], [127.0, 0.0]]))
    assert scale.tolist() == [[2.0, 2.0], [1.0, 2.0]]
    assert kv_cache._scale("it", torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        kv_cache._scale("past_key_values.3.key", torch.tensor([[1.0, wrong]]))
    assert caught.value.exit_code == 10
    assert caught.value.hint


def test_only_attention_has_such_caches(capture_of: Any) -> None:
    hybrid = run_passes(capture_of("qwen3_next"), default_passes())[0]
    (cache,) = attention_caches(hybrid)
    assert cache.reason == ""
    assert [state.kind for state in cache.states] == ["key", "value"]
    assert {state.kind for state in hybrid.states} > {"conv", "recurrent"}
    scales = unit_scales(hybrid)
    assert {name: tuple(scale.shape) for name, scale in scales.items()} == {
        state.input.name: (state.input.shape[1], state.input.shape[3]) for state in cache.states
    }
    assert measure_scales(hybrid, windows(hybrid, 2)).keys() == scales.keys()


def test_the_digest_is_that_of_the_values() -> None:
    scale = torch.tensor([[0.5, 0.25]])
    assert sha256_of_scale(scale) == sha256_of_scale(scale.clone())
    assert sha256_of_scale(scale) != sha256_of_scale(torch.tensor([[0.5, 0.26]]))
