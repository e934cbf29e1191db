"""Capture: states of other kinds than caches, and what is said of a model that cannot be captured."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moec.compiler.common.errors import UnsupportedModelError
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.frontend import capture as capture_module
from moec.compiler.frontend.activations import gate_of
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.frontend.masks import Mask, MaskPattern, MaskUseError
from moec.compiler.frontend.meta_model import meta_model
from moec.compiler.frontend.recording import Recording, active_record, recording, watching
from moec.compiler.gates.source import load_source
from moec.compiler.ir.experts import Gate
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.printing import format_graph
from moec.compiler.ir.program import Program
from moec.compiler.measure.summary import model_summary

Checkpoints = Callable[[str], Path]
KERNEL, CHANNELS = 3, 64


@pytest.fixture(scope="module")
def hybrid(tiny_checkpoint: Checkpoints) -> tuple[Checkpoint, Program]:
    """Short convolutions in layers 0 and 2, attention in layer 1."""
    checkpoint = Checkpoint.open(tiny_checkpoint("lfm2_moe"))
    return checkpoint, capture(checkpoint)


def tokens(program: Program, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(3, program.vocab_size, (batch, length))


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_a_convolution_state_is_in_the_state_table(hybrid: Any) -> None:
    _, program = hybrid
    rows = [(state.layer, state.kind, state.input.name, state.output.name) for state in program.states]
    assert rows == [
        (0, "conv", "past_conv.0", "present_conv.0"),
        (1, "key", "past_key_values.1.key", "present.1.key"),
        (1, "value", "past_key_values.1.value", "present.1.value"),
        (2, "conv", "past_conv.2", "present_conv.2"),
    ]
    for state in (program.states[0], program.states[3]):
        assert state.input.shape == state.output.shape == ("batch", CHANNELS, KERNEL)
        assert program.outputs()[state.output.name].meta["val"].shape[1:] == (CHANNELS, KERNEL)
    assert [state.layer for state in program.caches] == [1, 1]
    assert model_summary(program)["states"] == {
        "count": 4,
        "layers": 3,
        "kinds": ["conv", "key", "value"],
        "bytes_per_token": 2 * 2 * 16 * 4,
        "cache_dtypes": ["float32"],
        "bytes_fixed": 2 * CHANNELS * KERNEL * 4,
    }


@pytest.mark.parametrize("steps", [(11,), (1,) * 11, (2, 1, 8), (7, 2, 2)])
def test_every_division_into_steps_is_one_pass_of_transformers(hybrid: Any, steps: tuple[int, ...]) -> None:
    checkpoint, program = hybrid
    ids, runner = tokens(program, 2, 11), ProgramRunner(program)
    want = load_source(checkpoint)(ids)
    for _ in range(2):  # the second time after a reset
        start, got = 0, []
        for step in steps:
            got.append((runner.decode if start else runner.prefill)(ids[:, start : start + step]))
            start += step
        close(np.concatenate(got, axis=1), want)


def test_padding_does_not_reach_the_convolution_state(hybrid: Any) -> None:
    checkpoint, program = hybrid
    ids, runner = tokens(program, 2, 12), ProgramRunner(program)
    mask = np.ones((2, 12), np.int64)
    mask[1, :2] = 0  # less than a kernel, so that the first tokens see it
    for filler in (0, 7):
        padded = np.where(mask == 1, ids, filler)
        got = np.concatenate([runner.prefill(padded[:, :8], mask[:, :8]), runner.decode(padded[:, 8:], mask)], axis=1)
        close(got[1:, 2:], load_source(checkpoint)(ids[1:, 2:]))
        close(got[:1], load_source(checkpoint)(ids[:1]))


REASONS = {
    "doge": r"^model\.layers\.0\.self_attn: DogeAttention of DogeForCausalLM .* computes on its attention mask",
    "nllb_moe": "^NllbMoeConfig describes an encoder-decoder",
    "switch_transformers": "^SwitchTransformersConfig describes an encoder-decoder",
    "llama": "^LlamaForCausalLM is a dense model",
}


@pytest.mark.parametrize("family", REASONS)
def test_the_reason_names_module_and_cause(family: str, tiny_checkpoint: Checkpoints) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint(family))
    with pytest.raises(UnsupportedModelError, match=REASONS[family]):
        capture(checkpoint)


@pytest.fixture
def changed(tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Capture a model whose layers do something else with what they get."""
    from transformers.models.mixtral import modeling_mixtral

    original = modeling_mixtral.MixtralDecoderLayer.forward

    def run(deed: Callable[..., Any]) -> None:
        def forward(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            deed(hidden_states, kwargs["attention_mask"], kwargs["cache" if "cache" in kwargs else "past_key_values"])
            return original(self, hidden_states, *args, **kwargs)

        monkeypatch.setattr(modeling_mixtral.MixtralDecoderLayer, "forward", forward)
        capture(Checkpoint.open(tiny_checkpoint("mixtral")))

    return run


MASKED = r"^model\.layers\.0: MixtralDecoderLayer of .* cannot be traced: it computes on its attention mask"


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        (lambda hidden, *_: bool(hidden.sum() > 0), "branches on the values of a tensor"),
        (lambda _, mask, __: mask.sum(), MASKED),
        (lambda _, mask, __: mask[:, :, 0], MASKED),
        (lambda hidden, mask, _: hidden + mask, MASKED),
        (lambda hidden, mask, _: torch.where(mask, hidden, 0), MASKED),
        (lambda hidden, *_: hidden.no_such_thing, "AttributeError: .* no attribute 'no_such_thing'"),
        (
            lambda hidden, _, cache: [cache.update_conv_state(hidden, 0, i, conv_kernel_size=4) for i in range(2)],
            r"^model\.layers\.0: MixtralDecoderLayer keeps the inputs of several convolutions",
        ),
        (
            lambda hidden, _, cache: cache.update_conv_state(hidden, 0),
            r"^model\.layers\.0: MixtralDecoderLayer keeps .*, or of one without a kernel size",
        ),
        (
            lambda hidden, _, cache: cache.update_conv_state(hidden, 0, conv_kernel_size=4),
            "MixtralForCausalLM: layer 0 keeps the inputs of a convolution that moec does not know",
        ),
        (
            lambda _, __, cache: cache.layers[0].store_compression_weights,
            "it keeps a state that moec does not know: its cache has no store_compression_weights",
        ),
        (
            lambda hidden, _, cache: cache.update_recurrent_state(hidden, 0),
            r"^model\.layers\.0: MixtralDecoderLayer keeps a recurrent state that no scan known to moec computed",
        ),
    ],
)
def test_what_a_module_did_is_said_in_plain_words(deed: Any, message: str, changed: Any) -> None:
    hooks = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
    before = [len(each) for each in hooks]
    with pytest.raises(UnsupportedModelError, match=message):
        changed(deed)
    assert [len(each) for each in hooks] == before


def test_a_mask_is_classified_when_a_layer_attends_with_it() -> None:
    asked: list[int] = []

    def sliding(_: Any, __: Any, query: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        asked.append(int(query))
        return (slots <= query) & (slots > query - 8)

    mask = Mask(sliding, 64)
    assert not hasattr(mask, "shape")
    with pytest.raises(MaskUseError, match="computes on its attention mask"):
        torch.zeros(2) * mask  # type: ignore[operator]
    assert not asked
    assert mask.pattern() == MaskPattern("sliding", 8)


def test_a_mask_that_sees_nothing_is_refused_in_words() -> None:
    nothing = Mask(lambda _, __, query, slots: (slots <= query) & (slots > query), 64)
    with pytest.raises(UnsupportedModelError, match="neither causal nor sliding"):
        nothing.pattern()


@pytest.mark.parametrize("fails", [False, True])
def test_the_garbage_collector_is_as_before(
    fails: bool, tiny_checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    during: list[tuple[int, int, int]] = []
    states = capture_module._states

    def watched(*args: object) -> object:
        during.append(gc.get_threshold())
        if fails:
            raise UnsupportedModelError("no")
        return states(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(capture_module, "_states", watched)
    before, checkpoint = gc.get_threshold(), Checkpoint.open(tiny_checkpoint("mixtral"))
    if fails:
        with pytest.raises(UnsupportedModelError):
            capture(checkpoint)
    else:
        capture(checkpoint)
    assert during != [before]
    assert gc.get_threshold() == before


def test_tables_are_kept_as_they_were_before_they_were_rounded(tmp_path: Path) -> None:
    tiny_model("gemma4_text", hidden_size=80).save_pretrained(tmp_path)
    model, tables = meta_model(Checkpoint.open(tmp_path), torch.float16)
    (name,) = (name for name in tables if name.endswith("embed_scale"))
    rounded = model.get_buffer(name)
    assert rounded.dtype == torch.float16
    assert float(rounded) != float(tables[name]) == float(torch.tensor(80.0).sqrt())
    assert all(value.dtype == torch.float32 for value in tables.values())


def test_a_gated_relu_is_no_steep_silu() -> None:
    """`x * sigmoid(48 * x)` is ReLU but for values near 0, and 48 is a number that the module keeps: its width."""
    experts = tiny_model("mixtral", hidden_act="relu", intermediate_size=48).model.layers[0].mlp.experts
    assert gate_of(experts, "here") == Gate("relu")


@pytest.mark.parametrize("limit", [0.5, 7.0, 2000.0])
def test_a_limit_shows_beyond_it(limit: float) -> None:
    experts = tiny_model("gpt_oss", swiglu_limit=limit).model.layers[0].mlp.experts
    found = gate_of(experts, "here")
    assert (found.activation, found.limit) == ("silu", limit)


def test_captures_in_two_threads_do_not_mix(tiny_checkpoint: Checkpoints) -> None:
    checkpoints = [Checkpoint.open(tiny_checkpoint(family)) for family in ("mixtral", "gpt_oss")]
    alone = [format_graph(capture(checkpoint)) for checkpoint in checkpoints]
    start = threading.Barrier(2)

    def together(checkpoint: Checkpoint) -> str:
        start.wait()
        return format_graph(capture(checkpoint))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(together, checkpoints)) == alone


def test_hooks_write_to_the_recording_of_their_thread() -> None:
    turn = threading.Barrier(2)

    def record(name: str) -> list[str]:
        module = nn.Linear(1, 1)
        with recording(Recording(8, {module: name})) as mine:
            turn.wait()
            active_record().attentions.append(active_record().name(module))
            turn.wait()
        return mine.attentions

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(record, ["first", "second"])) == [["first"], ["second"]]


def test_modules_of_other_models_are_not_watched() -> None:
    class Broken(nn.Module):
        def forward(self) -> None:
            raise ZeroDivisionError

    mine, other = Broken(), Broken()
    record = Recording(8, {})
    with watching(record, mine):
        for module, running in ((other, []), (mine, [mine])):
            with pytest.raises(ZeroDivisionError):
                module()
            assert record.running == running
    with pytest.raises(ZeroDivisionError):
        mine()
    assert record.running == [mine]
