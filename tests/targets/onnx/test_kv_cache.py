"""A KV cache in int8: GroupQueryAttention computes what the final Program computes, and the runner keeps its codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from moec.compiler.common.verdict import Status
from moec.compiler.gates.integrity import Comparisons
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import Constant
from moec.compiler.run.packing import pack_into
from moec.passes import default_passes, run_passes
from moec.passes.quantize_cache import QuantizeCache
from moec.quantize.kv_cache import measure_scales
from moec.targets import get_target
from moec.targets.onnx.stored import stored_weights
from moec.targets.runners import Row
from tests.support.lowered import Model
from tests.targets.onnx.conftest import lower_program

Coded = Callable[..., Program]


@pytest.fixture
def coded(capture_of: Any) -> Coded:
    """Family -> its Program with a cache in int8, with scales from random ids."""

    def make(family: str, dtype: torch.dtype = torch.float32) -> Program:
        program, log = run_passes(capture_of(family, dtype), default_passes())
        exact = run_passes(capture_of(family), default_passes())[0]
        ids = np.random.default_rng(2).integers(3, program.vocab_size, (4, 32))
        cache = QuantizeCache(measure_scales(exact, ids))
        return run_passes(program, (cache,), completed=[record.name for record in log])[0]

    return make


@pytest.fixture
def olmoe(coded: Coded, tmp_path: Path) -> Model:
    return lower_program(coded("olmoe"), tmp_path / "olmoe", flavor="genai")


def steps(program: Program, batch: int = 1) -> list[np.ndarray]:
    tokens = np.random.default_rng(0).integers(3, program.vocab_size, (batch, 45))
    return np.split(tokens, [30, 31, 40], axis=1)


FAMILIES = {
    "olmoe": torch.float32,
    "gpt_oss": torch.float32,  # sinks and windows
    "deepseek_v2": torch.float32,  # values narrower than keys, both filled up to the kernel's width
    "qwen3_next": torch.float32,  # states of other kinds beside the cache
    "mixtral": torch.float16,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_computes_the_program(family: str, coded: Coded, tmp_path: Path) -> None:
    program = coded(family, FAMILIES[family])
    model = lower_program(program, tmp_path / family, flavor="genai")
    reference, half = ProgramRunner(program), FAMILIES[family] is torch.float16
    for tokens in steps(program):
        got, want = model.runner.decode(tokens), reference.decode(tokens)
        errors = np.abs(got - want).max(-1) / np.abs(want).max()
        # In half precision a random router sends some tokens to other experts.
        assert np.quantile(errors, 0.8 if half else 1.0) <= (2e-2 if half else 3e-3)
    differing = []
    for state in program.caches:
        want = reference._states[state.input.name].numpy()
        held = model.runner._states.current(state.input.name)
        assert held.dtype == np.int8
        assert not held[..., want.shape[3] :].any()
        differing.append(np.abs(held[:, :, : want.shape[2], : want.shape[3]].astype(int) - want) > 1)
    assert np.mean(np.concatenate([each.ravel() for each in differing])) <= 1e-3


def test_the_graph_and_the_signature(olmoe: Model) -> None:
    graph = ir.load(olmoe.directory / "model.onnx").graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    for node in nodes:
        assert node.attributes["k_quant_type"].as_string() == "PER_CHANNEL"
        assert node.attributes["v_quant_type"].as_string() == "PER_CHANNEL"
        assert node.attributes["kv_cache_bit_width"].as_int() == 8
    caches = [value for value in (*graph.inputs, *graph.outputs) if "key" in value.name or "value" in value.name]
    assert {value.dtype for value in caches} == {ir.DataType.INT8}
    ends = [state[end] for state in olmoe.lowered.signature["states"] for end in ("input", "output")]
    assert {end["dtype"] for end in ends} == {"int8"}


def test_rounding_changes_the_logits(olmoe: Model, capture_of: Any) -> None:
    """So a kernel that kept floats would fail the test above."""
    exact = ProgramRunner(run_passes(capture_of("olmoe"), default_passes())[0])
    (tokens, *_) = steps(olmoe.program)
    want = exact.prefill(tokens)
    assert np.abs(olmoe.runner.prefill(tokens) - want).max() > 3e-3 * np.abs(want).max()


def test_batches_gather_and_fork(olmoe: Model) -> None:
    """Sequences of different lengths in one batch, with left padding, go on as each would alone."""
    first, second = steps(olmoe.program, 2)[0][:, :12]
    alone = [olmoe.runner.fork() for _ in range(2)]
    alone[0].prefill(first[None])
    alone[1].prefill(second[None, :7])
    batch = olmoe.runner.fork()
    rows = batch.gather([Row(each, 0, 0) for each in alone])
    assert [row.padding for row in rows] == [0, 5]
    mask = np.ones((2, 13), np.int64)
    mask[1, :5] = 0
    together = batch.decode(np.array([[5], [9]]), mask)
    for index, token in enumerate((5, 9)):
        want = alone[index].decode(np.array([[token]]))
        assert np.abs(together[index] - want[0]).max() <= 3e-3 * np.abs(want).max()


def test_packed_weights_give_the_same_bits(golden_model: Path, tmp_path: Path) -> None:
    import moec

    wanted = {"kv_cache": "int8", "windows": 2, "window": 32}
    moec.export(golden_model, target="onnx", output=tmp_path / "out", flavor="genai", gates=False, quantize=wanted)
    pack_into(tmp_path / "out", tmp_path / "packed", lambda *_: None)
    runners = [get_target("onnx").open(tmp_path / name, threads=1) for name in ("out", "packed")]
    ids = np.arange(3, 40)[None]
    first, second = (np.concatenate([each.prefill(ids), each.decode(ids[:, :1])], axis=1) for each in runners)
    assert np.array_equal(first, second)


def test_integrity_compares_the_scales(olmoe: Model) -> None:
    stored = stored_weights(olmoe.directory)
    name = "past_key_values.1.value.scale"
    assert name in stored
    assert Comparisons(olmoe.program, stored).judge().status is Status.PASS
    value = olmoe.program.weights.read(name).clone()
    value[1, 3] *= 1.001
    weights = olmoe.program.weights.with_tensors({name: Constant(value)})
    verdict = Comparisons(olmoe.program.replace(weights=weights), stored).judge()
    assert verdict.status is Status.FAIL
    assert name in verdict.summary


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("onnx", {}),
        ("onnx", {"flavor": "portable"}),
        ("onnx", {"flavor": "web"}),
        ("tflite", {}),
        ("coreml", {}),
        ("tensorrt", {}),
    ],
)
def test_targets_and_flavors_that_keep_floats_refuse_codes(target: str, options: dict[str, str], coded: Coded) -> None:
    found = get_target(target)
    (refused,) = found.refusals(coded("olmoe"), found.Options.model_validate(options))
    assert refused.where == "past_key_values.0.key"
    assert "int8 (4 states) is not supported here" in refused.reason
