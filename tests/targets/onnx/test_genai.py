"""The flavor for onnxruntime-genai: one buffer for past and present, its description, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from moec.compiler.common.errors import LoweringError, UsageError
from moec.compiler.ir.interpreter import ProgramRunner
from moec.targets.onnx import states
from moec.targets.onnx.target import OnnxOptions, OnnxTarget

MAX_LENGTH = 64


class SharedBuffer:
    """Runs a model as onnxruntime-genai does: each cache is one buffer of full length, past and present at once."""

    def __init__(self, model: Any) -> None:
        self.session = ort.InferenceSession(str(model.directory / "model.onnx"), providers=["CPUExecutionProvider"])
        self.states = model.program.states
        self.length = 0
        # Whatever lies behind the sequence must not be looked at.
        self.buffers = {
            state.input.name: ort.OrtValue.ortvalue_from_numpy(
                np.full((1, state.input.shape[1], MAX_LENGTH, state.input.shape[3]), 1e3, np.float32)
            )
            for state in self.states
        }

    def step(self, input_ids: np.ndarray) -> np.ndarray:
        new = input_ids.shape[1]
        binding = self.session.io_binding()
        total = self.length + new
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(self.length, total)[None])
        for state in self.states:
            buffer = self.buffers[state.input.name]
            binding.bind_ortvalue_input(state.input.name, buffer)
            binding.bind_ortvalue_output(state.output.name, buffer)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.length = total
        return np.asarray(binding.get_outputs()[-1].numpy())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_shared_buffer(family: str, tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint(family), flavor="genai")
    shared, reference = SharedBuffer(model), ProgramRunner(model.program)
    tokens = np.random.default_rng(0).integers(3, model.program.vocab_size, (1, 45))
    for start, stop in ((0, 30), (30, 31), (31, 40), (40, 45)):
        got, want = shared.step(tokens[:, start:stop]), reference.decode(tokens[:, start:stop])
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_runner_writes_into_one_buffer_and_makes_a_larger_one(
    batch: int, tiny_checkpoint: Any, lower_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "INITIAL_CAPACITY", 8)
    model = lower_checkpoint(tiny_checkpoint("olmoe"), flavor="genai")
    runner, reference = OnnxTarget().open(model.directory), ProgramRunner(model.program)
    tokens = np.random.default_rng(1).integers(3, model.program.vocab_size, (batch, 40))
    kept = runner._states
    for start, stop in ((0, 6), (6, 8), (8, 9), (9, 10), (10, 40)):
        before = {name: id(buffer) for name, buffer in kept.buffers.items()}
        got, want = runner.decode(tokens[:, start:stop]), reference.decode(tokens[:, start:stop])
        assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
        same = before == {name: id(buffer) for name, buffer in kept.buffers.items()}
        assert same == ((start, stop) in ((6, 8), (9, 10)))
    assert kept.length == 40
    again = runner.prefill(tokens[:, :6])
    reference.reset()
    assert np.abs(again - reference.decode(tokens[:, :6])).max() <= 1e-4 * np.abs(again).max()


def test_description(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    model = lower_checkpoint(tiny_checkpoint("olmoe"), flavor="genai")
    config, said = model.program.config, json.loads((model.directory / "genai_config.json").read_text())
    decoder = said["model"]["decoder"]
    assert model.lowered.model_files == ("model.onnx", "model.onnx_data", "genai_config.json")
    assert (said["model"]["vocab_size"], "search" in said) == (128, False)
    generation = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.05}
    (model.directory / "config.json").write_text(json.dumps(dict(config)))
    (model.directory / "generation_config.json").write_text(json.dumps(generation))
    OnnxTarget().package(OnnxOptions(flavor="genai"), model.directory)
    said = json.loads((model.directory / "genai_config.json").read_text())
    assert said["model"]["eos_token_id"] == [2, 7]
    search = {name: said["search"][name] for name in ("do_sample", "temperature", "top_k", "repetition_penalty")}
    assert search == {"do_sample": True, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.05}
    assert said["search"]["past_present_share_buffer"] is True
    assert (decoder["num_hidden_layers"], decoder["hidden_size"]) == (2, config["hidden_size"])
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 16)
    graph = ir.load(model.directory / "model.onnx").graph
    layers = range(decoder["num_hidden_layers"])
    caches = [decoder["inputs"][f"past_{kind}_names"] % layer for layer in layers for kind in ("key", "value")]
    plain = [decoder["inputs"][name] for name in ("input_ids", "attention_mask", "position_ids")]
    assert [value.name for value in graph.inputs if value.const_value is None] == plain + caches
    present = [decoder["outputs"][f"present_{kind}_names"] % layer for layer in layers for kind in ("key", "value")]
    assert [value.name for value in graph.outputs] == ["logits", *present]


def test_an_execution_provider_is_named_on_request(tiny_checkpoint: Any, lower_checkpoint: Any) -> None:
    found = {}
    for provider in ("cpu", "cuda"):
        model = lower_checkpoint(tiny_checkpoint("olmoe"), flavor="genai", provider=provider)
        said = json.loads((model.directory / "genai_config.json").read_text())
        found[provider] = said["model"]["decoder"]["session_options"]["provider_options"]
    assert found == {"cpu": [], "cuda": [{"cuda": {}}]}
    with pytest.raises(UsageError, match="only the flavor genai"):
        OnnxTarget().check(OnnxOptions(provider="cuda"), {})


@pytest.mark.parametrize(("family", "width"), [("deepseek_v3", 32), ("kimi_linear", 32)])
def test_caches_of_latent_attention_are_filled_up(
    family: str, width: int, tiny_checkpoint: Any, lower_checkpoint: Any
) -> None:
    """Keys of 28 and values of 20 are both 32 wide in the cache, which has one head size for all."""
    model = lower_checkpoint(tiny_checkpoint(family), flavor="genai")
    said = json.loads((model.directory / "genai_config.json").read_text())
    assert said["model"]["decoder"]["head_size"] == width
    caches = [
        item for item in ir.load(model.directory / "model.onnx").graph.inputs if item.name.endswith((".key", ".value"))
    ]
    assert caches
    assert {item.shape[3] for item in caches} == {width}
    ids = np.random.default_rng(0).integers(3, model.program.vocab_size, (2, 20))
    want = ProgramRunner(model.program).prefill(ids)
    found = np.concatenate([model.runner.prefill(ids[:, :9]), model.runner.decode(ids[:, 9:])], axis=1)
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


def test_refusals(tmp_path: Any, tiny_checkpoint: Any, program_of: Any) -> None:
    """Layers whose caches differ in the number of heads."""
    program = program_of(tiny_checkpoint("mimo_v2_flash"))
    options = OnnxOptions(flavor="genai")
    (first, *_) = OnnxTarget().lint(program, options)
    assert "the same number of heads in all layers" in first.reason
    with pytest.raises(LoweringError, match="the same number of heads"):
        OnnxTarget().lower(program, options, tmp_path, lambda *_: None)
    assert OnnxTarget().lint(program, OnnxOptions()) == ()
