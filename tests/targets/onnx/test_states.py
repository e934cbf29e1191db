"""States that are no caches, in the file and in its runner."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from moec.compiler.common.errors import LoweringError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.states import GrowingStates, zeros
from moec.targets.onnx.target import OnnxOptions, OnnxTarget


@pytest.fixture
def hybrid(tiny_checkpoint: Any, lower_checkpoint: Any) -> Any:
    return lower_checkpoint(tiny_checkpoint("lfm2_moe"))


def tokens(model: Any, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, model.program.vocab_size, (batch, length))


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_signature_has_the_names_and_sizes_of_transformers_js(hybrid: Any) -> None:
    graph = ir.load(hybrid.directory / "model.onnx").graph
    shapes = {value.name: [str(size) for size in value.shape] for value in (*graph.inputs, *graph.outputs)}
    assert shapes["past_conv.0"] == shapes["present_conv.0"] == ["batch_size", "64", "3"]
    assert shapes["past_key_values.1.key"] == ["batch_size", "2", "past_sequence_length", "16"]
    assert shapes["present.1.key"] == ["batch_size", "2", "total_sequence_length", "16"]
    first = hybrid.lowered.signature["states"][0]
    assert (first["kind"], first["input"]["name"], first["output"]["name"]) == ("conv", "past_conv.0", "present_conv.0")


def test_prefill_and_decode_are_one_pass_and_reset_forgets(hybrid: Any) -> None:
    ids = tokens(hybrid, 2, 12)
    want = ProgramRunner(hybrid.program).prefill(ids)
    runner = hybrid.runner
    for _ in range(2):
        got = [runner.prefill(ids[:, :5]), runner.decode(ids[:, 5:6]), runner.decode(ids[:, 6:])]
        close(np.concatenate(got, axis=1), want)
    runner.reset()
    close(runner.decode(ids), want)
    # Another batch: what was kept of two sequences must not be there.
    close(runner.prefill(ids[1:, :1]), ProgramRunner(hybrid.program).prefill(ids[1:, :1]))


@pytest.mark.parametrize("padding", [1, 2, 5])
def test_left_padding_does_not_reach_the_state(hybrid: Any, padding: int) -> None:
    ids = tokens(hybrid, 2, 12)
    mask = np.ones((2, 12), np.int64)
    mask[1, :padding] = 0
    got = [hybrid.runner.prefill(ids[:, :7], mask[:, :7]), hybrid.runner.decode(ids[:, 7:], mask)]
    alone = ProgramRunner(hybrid.program).prefill(ids[1:, padding:])
    close(np.concatenate(got, axis=1)[1:, padding:], alone)


def test_a_state_that_is_not_handed_on_is_noticed(hybrid: Any) -> None:
    """The convolution state matters at all: without it the tokens after a prefill differ."""

    ids, runner = tokens(hybrid, 1, 9), OnnxRunner(hybrid.directory, threads=1)
    want = ProgramRunner(hybrid.program).prefill(ids)
    runner.prefill(ids[:, :6])
    kept = runner._states
    assert isinstance(kept, GrowingStates)
    for spec in kept.specs:
        if "conv" in spec.name:
            kept.values[spec.name] = ort.OrtValue.ortvalue_from_numpy(zeros(spec, 1, 0))
    assert np.abs(runner.decode(ids[:, 6:]) - want[:, 6:]).max() > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize(("family", "kind"), [("lfm2_moe", "conv"), ("minimax", "recurrent")])
def test_onnxruntime_genai_wants_both_states_of_a_recurrent_layer(
    family: str, kind: str, tiny_checkpoint: Any, program_of: Any, tmp_path: Any
) -> None:
    program, options = program_of(tiny_checkpoint(family)), OnnxOptions(flavor="genai")
    (rejection,) = OnnxTarget().lint(program, options)
    assert (rejection.where, f"only a state of kind {kind}" in rejection.reason) == ("layer 0", True)
    with pytest.raises(LoweringError, match=f"kind {kind}"):
        OnnxTarget().lower(program, options, tmp_path, lambda *_: None)


@pytest.fixture(params=["default", "portable", "genai"])
def recurrent(request: pytest.FixtureRequest, tiny_checkpoint: Any, lower_checkpoint: Any) -> Any:
    """Gated delta rule in layer 0, attention in layer 1."""
    return lower_checkpoint(tiny_checkpoint("qwen3_next"), flavor=request.param)


def test_a_recurrent_model_in_pieces_with_padding_and_after_a_reset(recurrent: Any) -> None:
    ids, runner = tokens(recurrent, 2, 40), recurrent.runner
    mask = np.ones((2, 40), np.int64)
    mask[1, :3] = 0
    alone = [ProgramRunner(recurrent.program).prefill(ids[row : row + 1, 3 * row :]) for row in (0, 1)]
    for _ in range(2):
        parts = [runner.prefill(ids[:, :9], mask[:, :9])]
        for start, stop in ((9, 10), (10, 11), (11, 40)):
            parts.append(runner.decode(ids[:, start:stop], mask[:, :stop]))
        got = np.concatenate(parts, axis=1)
        close(got[:1], alone[0])
        close(got[1:, 3:], alone[1])
    twin = runner.fork()
    close(twin.prefill(ids[:1]), alone[0])
    close(runner.prefill(ids[:1, :1]), alone[0][:, :1])


def test_names_of_the_states_of_a_recurrent_layer(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    wanted = {
        "default": ("past_conv.0", "present_conv.0", "past_recurrent.0", "present_recurrent.0"),
        "genai": (
            *("past_key_values.0.conv_state", "present.0.conv_state"),
            *("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
        ),
    }
    for flavor, names in wanted.items():
        model = lower_checkpoint(tiny_checkpoint("qwen3_next"), flavor=flavor)
        graph = ir.load(model.directory / "model.onnx").graph
        shapes = {value.name: [str(size) for size in value.shape] for value in (*graph.inputs, *graph.outputs)}
        sizes = (["batch_size", "128", "4"], ["batch_size", "4", "16", "16"])
        assert [shapes[name] for name in names] == [sizes[0], sizes[0], sizes[1], sizes[1]]


def test_the_kernels_of_onnx_runtime_compute_a_recurrent_layer(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    found = {
        flavor: lower_checkpoint(tiny_checkpoint("qwen3_next"), flavor=flavor).lowered.facts["ops"]
        for flavor in ("default", "portable")
    }
    assert (found["default"]["LinearAttention"], found["default"]["CausalConvWithState"]) == (1, 1)
    assert found["portable"]["Scan"] == 1
    assert not {"LinearAttention", "CausalConvWithState"} & found["portable"].keys()
