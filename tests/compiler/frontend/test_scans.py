"""Recurrent layers: what is captured of them, against transformers, whole and in pieces, with padding and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.common.verdict import Status
from moec.compiler.families.tiny_models import tiny_config, tiny_model, write_tiny_checkpoint
from moec.compiler.frontend import scans
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.recording import Recording, recording
from moec.compiler.frontend.scans import FUNCTIONS, scans_as_ops
from moec.compiler.frontend.step_cache import cache_class
from moec.compiler.gates.cases import Prompts
from moec.compiler.gates.parity import check_capture
from moec.compiler.gates.source import load_source
from moec.compiler.gates.tolerance import TOLERANCES, Precision
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.operands import CausalConv, LinearAttention
from moec.compiler.ir.program import CAUSAL_CONV, LINEAR_ATTENTION, Program

KINDS = {
    "qwen3_next": ("gated_delta", 3),
    "kimi_linear": ("gated_delta", 4),
    "nemotron_h": ("gated", 3),
    "jamba": ("gated", 4),
    "minimax": ("gated", 3),
}
"""A family of each kind of scan: its update rule, and the axes of its decay."""
OTHERS = ("bailing_hybrid", "granitemoehybrid", "qwen3_5_moe_text")
FAMILIES = [*KINDS, "zaya", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
FEW = [
    *("qwen3_next", "nemotron_h"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("jamba", "kimi_linear", "minimax", "zaya", *OTHERS)),
]
"""For what takes seconds for each family."""
STATES = {
    "qwen3_next": {"conv": (128, 4), "recurrent": (4, 16, 16)},
    "kimi_linear": {"conv": (192, 4), "recurrent": (4, 16, 16)},
    "nemotron_h": {"conv": (192, 4), "recurrent": (4, 16, 32)},
    "jamba": {"conv": (128, 4), "recurrent": (128, 16, 1)},
    "minimax": {"recurrent": (4, 16, 16)},
    "zaya": {"conv": (96, 3), "recurrent": (1, 16)},
}
"""Kind of state -> its axes behind the batch, in the first layer."""


@pytest.fixture
def opened(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    return lambda family: Checkpoint.open(tiny_checkpoint(family))


def tokens(program: Program, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, program.vocab_size, (batch, length))


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=3e-5 * np.abs(want).max())


@pytest.mark.parametrize("family", FEW)
def test_the_gate_of_capture(family: str, opened: Any, program_of: Any) -> None:
    """(1, 1, 9), (2, 5, 0), (2, 5, 7), (1, 130, 0) and left padding, in steps, against transformers in one pass."""
    program = program_of(family)
    verdict = check_capture(opened(family), program, Prompts(program.vocab_size))
    assert verdict.status is Status.PASS, verdict.summary


@pytest.mark.parametrize("family", FAMILIES)
def test_every_division_into_steps_is_one_pass_of_transformers(family: str, opened: Any, capture_of: Any) -> None:
    program = capture_of(family)
    ids, runner = tokens(program, 2, 80), ProgramRunner(program)
    want = load_source(opened(family))(ids)
    for steps in ((80,), (1, 1, 2, 76), (33, 1, 46)):
        start, got = 0, []
        for step in steps:
            got.append((runner.decode if start else runner.prefill)(ids[:, start : start + step]))
            start += step
        close(np.concatenate(got, axis=1), want)


@pytest.mark.parametrize("family", FEW)
def test_a_prompt_of_several_chunks(family: str, opened: Any, capture_of: Any) -> None:
    """300 tokens in one piece and in two, neither a multiple of the 64 or 256 that transformers computes at a time."""
    program = capture_of(family)
    ids, runner = tokens(program, 1, 300), ProgramRunner(program)
    want = load_source(opened(family))(ids)
    limit = TOLERANCES[Precision.FP32].limit * np.abs(want).max()
    for steps in ((300,), (130, 170)):
        pieces = [
            runner.prefill(ids[:, : steps[0]]),
            *(runner.decode(ids[:, size:]) for size in steps[:1] if size < 300),
        ]
        np.testing.assert_allclose(np.concatenate(pieces, axis=1), want, rtol=0, atol=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_reaches_no_state(family: str, capture_of: Any) -> None:
    """Whatever token stands there, the states are those of the sequence without it: in the first layer bit for bit."""
    program = capture_of(family)
    ids, runner = tokens(program, 2, 9), ProgramRunner(program)
    mask = np.ones((2, 9), np.int64)
    mask[1, :2] = 0  # less than a kernel, so that the first tokens see it
    states = []
    for filler in (0, 7):
        runner.prefill(np.where(mask == 1, ids, filler), mask)
        states.append({state.input.name: runner._states[state.input.name] for state in program.replaced})
    alone = ProgramRunner(program)
    alone.prefill(ids[1:, 2:])
    for state in program.replaced:
        name, value = state.input.name, states[0][state.input.name]
        assert state.layer > program.replaced[0].layer or torch.equal(value, states[1][name]), name
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(value[1:], alone._states[name], rtol=1e-4, atol=1e-5)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCANS: dict[str, tuple[Callable[..., Any], int, tuple[Tensor, ...], dict[str, Any], tuple[int, ...]]] = {
    "delta": (
        scans.gated_delta_rule,
        1,
        (rand(1, 5, 2, 8), rand(1, 5, 2, 8, seed=1), rand(1, 5, 2, 6), -rand(1, 5, 2).exp(), rand(1, 5, 2).sigmoid()),
        {"use_qk_l2norm_in_kernel": True},
        (2, 8, 6),
    ),
    "mamba2": (
        scans.mamba2_scan,
        1,
        (rand(1, 5, 2, 6), rand(1, 5, 2), -rand(2).exp(), rand(1, 5, 1, 8), rand(1, 5, 1, 8, seed=1)),
        {"dt_softplus": True, "return_final_states": True},
        (2, 8, 6),
    ),
    "mamba": (
        scans.mamba_scan,
        2,
        (rand(1, 6, 5), rand(1, 6, 5, seed=1), -rand(6, 8).exp(), rand(1, 8, 5), rand(1, 8, 5, seed=1)),
        {"delta_softplus": True, "return_last_state": True},
        (6, 8, 1),
    ),
}
"""Function -> the axis of its 5 tokens, its arguments, and the axes of its state."""


@pytest.mark.parametrize("kind", SCANS)
def test_a_masked_token_leaves_the_state_alone_whatever_it_holds(kind: str) -> None:
    """Behind the tokens too, where a target pads the end of a prompt's piece."""
    scan, axis, arguments, settings, shape = SCANS[kind]
    module = nn.Module()
    module.layer_idx = 0

    def last(length: int, used: int) -> Tensor:
        mask = (torch.arange(length) < used).long()[None]
        past = {(0, "recurrent"): rand(1, *shape, seed=9)}
        record = Recording(64, {}, torch.arange(length), mask, past, running=[module])
        with recording(record):
            counted = [item.ndim > axis and item.shape[axis] == 5 for item in arguments]
            cut = [item.narrow(axis, 0, length) if of else item for item, of in zip(arguments, counted, strict=True)]
            scan(*cut, **settings)
        return record.present[0, "recurrent"]

    assert torch.equal(last(5, 3), last(3, 3))
    assert not torch.equal(last(5, 5), last(3, 3))


@pytest.mark.parametrize("family", STATES)
def test_states_and_their_names(family: str, capture_of: Any) -> None:
    program = capture_of(family)
    layer = program.replaced[0].layer
    found = {state.kind: state for state in program.replaced if state.layer == layer}
    assert {kind: state.input.shape[1:] for kind, state in found.items()} == STATES[family]
    for kind, state in found.items():
        assert (state.input.name, state.output.name) == (f"past_{kind}.{layer}", f"present_{kind}.{layer}")
        assert state.input.shape == state.output.shape
        assert program.outputs()[state.output.name].meta["val"].shape[1:] == STATES[family][kind]


@pytest.mark.parametrize("family", KINDS)
def test_each_kind_of_scan_is_one_op(family: str, program_of: Any) -> None:
    program = program_of(family)
    rule, axes = KINDS[family]
    scans = [LinearAttention.of(node) for node in program.nodes(LINEAR_ATTENTION)]
    assert len(scans) == sum(state.kind == "recurrent" for state in program.states)
    assert {(scan.update_rule, scan.decay.meta["val"].ndim) for scan in scans if scan.decay} == {(rule, axes)}
    convolutions = [CausalConv.of(node) for node in program.nodes(CAUSAL_CONV)]
    assert len(convolutions) == sum(state.kind == "conv" for state in program.states)
    assert {own.activation for own in convolutions} <= {"silu"}
    loops = {"tril", "triu", "solve_triangular", "cumsum"}
    assert not {name for node in program.graph.nodes for name in loops if f".{name}" in str(node.target)}


def test_recurrent_states_are_single_precision_in_a_graph_of_half(capture_of: Any) -> None:
    program = capture_of("qwen3_next", torch.float16)
    dtypes = {state.kind: state.input.dtype for state in program.states}
    half, single = torch.float16, torch.float32
    assert dtypes == {"conv": half, "recurrent": single, "key": half, "value": half}


def test_the_functions_of_transformers_are_as_before() -> None:
    model = tiny_model("qwen3_next")
    before = {name: vars(qwen)[name] for name in FUNCTIONS if name in vars(qwen)}
    assert "torch_chunk_gated_delta_rule" in before

    def failing() -> None:
        with scans_as_ops(model):
            assert all(vars(qwen)[name] is FUNCTIONS[name] for name in before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert {name: vars(qwen)[name] for name in before} == before


def test_a_cache_of_the_family_takes_the_place_of_the_common_one() -> None:
    from transformers.cache_utils import Cache

    assert cache_class(tiny_model("minimax")).__name__ == "MiniMaxCache"
    assert cache_class(tiny_model("qwen3_next")) is Cache


def captured_with(changes: dict[str, Any], opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(qwen.Qwen3NextGatedDeltaNet, name, value, raising=False)
    capture(opened("qwen3_next"))


def test_two_scans_in_one_layer_are_refused(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = qwen.Qwen3NextGatedDeltaNet.forward

    def twice(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out: Tensor = forward(self, forward(self, hidden_states, **kwargs), **kwargs)
        return out

    with pytest.raises(UnsupportedModelError, match=r"linear_attn: .* keeps more than one state of the kind conv"):
        captured_with({"forward": twice}, opened, monkeypatch)


def test_a_layer_that_does_not_say_which_it_is(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unnamed(self: Any, hidden_states: Tensor, cache: Any = None, **_: Any) -> Any:
        cache.update_conv_state(hidden_states, 0, conv_kernel_size=4)
        del self.layer_idx
        return qwen.causal_conv1d_fn(hidden_states, self.conv1d.weight, None)

    with pytest.raises(UnsupportedModelError, match="has no layer_idx that tells its layer"):
        captured_with({"forward": unnamed}, opened, monkeypatch)


def test_tiny_lightning_attention_keeps_the_rates_of_its_class() -> None:
    """Tables that a class derives from each other would mean nothing as random numbers."""
    attention = tiny_model("minimax").model.layers[0].self_attn
    assert torch.equal(attention.slope_rate, attention.get_slope_rate())
    assert tiny_config("minimax").layer_types[0] == "linear_attention"


def test_rates_that_a_checkpoint_of_half_precision_rounds_apart(tmp_path: Path) -> None:
    """A prompt in transformers goes by the rates, as the tokens after it do."""
    checkpoint = Checkpoint.open(write_tiny_checkpoint("minimax", tmp_path, dtype="bfloat16"))
    program = capture(checkpoint)
    ids = tokens(program, 1, 60)
    close(ProgramRunner(program).prefill(ids), load_source(checkpoint)(ids))


def test_the_reference_goes_from_token_to_token(opened: Any, capture_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In transformers a prompt in chunks is less exact, and the gate would take that for a fault of ours."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("a prompt was scanned in chunks")

    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", forbidden)
    program = capture_of("qwen3_next")
    ids = tokens(program, 1, 80)
    close(ProgramRunner(program).prefill(ids), load_source(opened("qwen3_next"))(ids))
    assert qwen.torch_chunk_gated_delta_rule is forbidden, "it is back in its place"
