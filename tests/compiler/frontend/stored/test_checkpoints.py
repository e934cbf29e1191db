"""Whole tiny checkpoints in stored formats: captured, exported and compared with transformers' own reading of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moec import cli
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.gates.source import load_source
from moec.compiler.ir.encoded_weights import Encoded
from moec.compiler.ir.interpreter import ProgramRunner

IDS = np.random.default_rng(0).integers(3, 120, (2, 11))


def logits_of_transformers(directory: Path) -> torch.Tensor:
    """By transformers' own dequantization, in float32."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    form = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}[settings.pop("quant_method")]
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        attn_implementation="eager",
        dtype=torch.float32,
        quantization_config=form(dequantize=True, **settings),
    )
    model.set_experts_implementation("eager")
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.from_numpy(IDS)).logits
    return found


@pytest.mark.parametrize("name", ["gpt_oss mxfp4", "qwen3_moe fp8"])
def test_logits_equal_those_of_transformers(
    stored_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from transformers.quantizers import quantizer_finegrained_fp8

    # It asks for accelerate and needs nothing of it where everything is on the CPU.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    directory = stored_checkpoint(name)
    checkpoint = Checkpoint.open(directory)
    expected = logits_of_transformers(directory).numpy()
    scale = np.abs(expected).max()
    own = ProgramRunner(capture(checkpoint)).prefill(IDS)
    assert np.abs(own - expected).max() < 2e-5 * scale
    assert np.abs(load_source(checkpoint)(IDS) - expected).max() < 2e-5 * scale


@pytest.mark.parametrize("name", ["gpt_oss mxfp4", "mixtral awq"])
def test_reads_one_expert_of_a_stack(
    stored_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    program = capture(Checkpoint.open(stored_checkpoint(name)))
    decoded: list[int] = []
    rows = Encoded.rows

    def counted(self: Encoded, start: int, stop: int) -> torch.Tensor:
        value = rows(self, start, stop)
        decoded.append(value.numel())
        return value

    monkeypatch.setattr(Encoded, "rows", counted)
    stacks = [program.weights[name] for name in program.weight_names() if len(program.weights[name].shape) == 3]
    assert stacks
    for stack in stacks:
        decoded.clear()
        stack.rows(1, 2)
        assert sum(decoded) == stack.nbytes // stack.dtype.itemsize // stack.shape[0]


@pytest.mark.parametrize(
    "name",
    [
        "gpt_oss mxfp4",
        "mixtral gptq act-order",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("deepseek_v3 fp8", "mixtral awq", "qwen3_moe fp8", "qwen3_moe gptq", "qwen3_moe gptq 8")
        ),
    ],
)
def test_exports_and_passes_the_gates(stored_checkpoint: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    assert (
        cli.dispatch(["export", str(stored_checkpoint(name)), "-t", "onnx", "-o", str(out), "-q", "--dtype", "fp32"])
        == 0
    )
    verdicts = {item["gate"]: item["status"] for item in json.loads((out / "report.json").read_text())["verdicts"]}
    assert verdicts["parity: capture"] == "pass"
    assert verdicts["parity: artifact"] == "pass"
