"""`--quantize keep`: the codes of the checkpoint and of the artifact, each read by code of its own, are the same."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from moec import cli, passes
from moec.compiler.common.validation import validate
from moec.compiler.frontend.capture import capture
from moec.compiler.frontend.checkpoint import Checkpoint
from moec.compiler.ir.interpreter import ProgramRunner
from moec.compiler.ir.program import Program
from moec.compiler.pipeline.quantization import QuantizationInputs, manifest_facts, plan_quantization
from moec.compiler.pipeline.recipe import QuantizeRecipe
from moec.compiler.report.describe import describe_built
from moec.quantize.keep import SupportedFormats
from moec.targets import get_target
from moec.targets.stored_weights import Codes

LAYERS = "model.layers.{}"


def fields(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., W] -> [..., W * 32 / bits], the lowest bits first."""
    mask = (1 << bits) - 1
    return np.stack([(words.view(np.uint32) >> shift) & mask for shift in range(0, 32, bits)], -1).reshape(
        *words.shape[:-1], -1
    )


Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes [N, K], scales [N, G] and zero points [N, G] of a matrix."""


def of_gptq(stored: Mapping[str, np.ndarray], name: str, bits: int = 4) -> Parts:
    codes = fields(np.ascontiguousarray(stored[f"{name}.qweight"].T), bits)
    return codes, stored[f"{name}.scales"].T, fields(stored[f"{name}.qzeros"], bits).T + 1


def of_awq(stored: Mapping[str, np.ndarray], name: str) -> Parts:
    def unpacked(words: np.ndarray) -> np.ndarray:
        found = fields(words, 4).reshape(len(words), -1, 8)
        return found[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1).T

    return unpacked(stored[f"{name}.qweight"]), stored[f"{name}.scales"].T, unpacked(stored[f"{name}.qzeros"])


QWEN3 = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj")
MIXTRAL = ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2")


class Artifact:
    """Initializers of an ONNX model by name."""

    def __init__(self, directory: Path) -> None:
        model = onnx.load(directory / "model.onnx")
        self.tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
        self.nodes = model.graph.node

    def of(self, kind: str) -> list[list[Any]]:
        """Constant inputs of each node of a kind; None where an input is no constant."""
        return [[self.tensors.get(name) for name in node.input] for node in self.nodes if node.op_type == kind]


def halves(packed: np.ndarray) -> np.ndarray:
    """Bytes [..., W] -> [..., 2 W], the lower half first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)


def built(checkpoint: Path, out: Path, *flags: str) -> dict[str, Any]:
    assert (
        cli.dispatch(["export", str(checkpoint), "-t", "onnx", "-o", str(out), "-q", "--quantize", "keep", *flags]) == 0
    )
    found: dict[str, Any] = json.loads((out / "moec.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "read", "first", "experts", "symmetric"),
    [
        (
            "qwen3_moe gptq",
            of_gptq,
            1,  # layer 0 is dense
            QWEN3,
            True,
        ),
        (
            "mixtral awq",
            of_awq,
            0,
            MIXTRAL,
            False,
        ),
    ],
)
def test_codes_are_identical(
    stored_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    read: Callable[..., Parts],
    first: int,
    experts: tuple[str, str, str],
    symmetric: bool,
) -> None:
    checkpoint = stored_checkpoint(name)
    manifest = built(checkpoint, tmp_path / "out")
    stored, artifact = load_file(checkpoint / "model.safetensors"), Artifact(tmp_path / "out")
    nodes = artifact.of("QMoE")
    assert len(nodes) == 2
    for layer, inputs in enumerate(nodes, first):
        gate, up, down = (
            [read(stored, f"{LAYERS.format(layer)}.{part.format(expert)}") for expert in range(inputs[2].shape[0])]
            for part in experts
        )
        for position, source in ((2, (gate, up)), (5, (down,))):
            codes, scales, points = (
                np.stack([np.stack([half[expert][part] for half in source], 1) for expert in range(len(gate))])
                for part in range(3)
            )
            codes, scales, points = (item.reshape(len(gate), -1, item.shape[-1]) for item in (codes, scales, points))
            assert np.array_equal(halves(inputs[position]), codes)
            assert np.array_equal(inputs[position + 1], scales)
            found = inputs[11 if position == 2 else 12]
            assert (points == 8).all() if symmetric else np.array_equal(halves(found), points)
    kept = manifest["quantization"]["kept"]
    form = "int4:32:int8-dynamic" if symmetric else "int4:32:asym:int8-dynamic"
    assert set(kept["experts_down"]) == set(kept["attention"]) == {f"{form}, the codes of the checkpoint"}
    assert manifest["quantization"]["classes"]["experts_down"]["relative_error"] == 0
    assert manifest["rejections"] == []


ONNX, TENSORRT, COREML, TFLITE = "onnx", "tensorrt", "coreml", "tflite"
OPTIONS: dict[str, dict[str, Any]] = {
    ONNX: {},
    TENSORRT: {"engine": False},
    COREML: {"context": 16, "prefill_chunk": 8},
    TFLITE: {"prefill": (4,), "context": 16},
}
KEPT = "{}, the codes of the checkpoint"
BECAME = [
    # What a checkpoint stores, and what each target has in its place.
    ("qwen3_moe gptq", ONNX, KEPT.format("int4:32")),
    ("qwen3_moe gptq", TENSORRT, KEPT.format("int4:32")),
    ("qwen3_moe gptq", COREML, KEPT.format("int4:32")),
    ("qwen3_moe gptq", TFLITE, KEPT.format("int4:32:int8-dynamic")),
    ("mixtral awq", ONNX, KEPT.format("int4:32:asym")),
    ("mixtral awq", TENSORRT, "int4:32 in place of awq of 4 bits"),
    ("mixtral awq", COREML, KEPT.format("int4:32:asym")),
    ("mixtral awq", TFLITE, "int4:32:bf16:int8-dynamic in place of awq of 4 bits"),
    ("gpt_oss mxfp4", ONNX, "int4:32 in place of mxfp4 of 4 bits"),
    ("gpt_oss mxfp4", TENSORRT, "int4:32 in place of mxfp4 of 4 bits"),
    ("gpt_oss mxfp4", COREML, KEPT.format("table4:32")),
    ("gpt_oss mxfp4", TFLITE, "int4:32:bf16:int8-dynamic in place of mxfp4 of 4 bits"),
    *(
        pytest.param("qwen3_moe gptq 8", target, became, marks=pytest.mark.slow)
        for target, became in (
            (ONNX, KEPT.format("int8:32")),
            (TENSORRT, KEPT.format("int8:32")),
            (COREML, KEPT.format("int8:32")),
            (TFLITE, "int8:channel:fp32:int8-dynamic in place of gptq of 8 bits"),
        )
    ),
    ("mixtral gptq act-order", ONNX, "int4:32 in place of gptq of 4 bits"),
]


@dataclass(frozen=True)
class Lowered:
    """A Program with its codes kept as far as a target holds them, in that target's files."""

    directory: Path
    program: Program
    facts: Mapping[str, Any]
    log: Sequence[passes.PassRecord]

    @property
    def rejections(self) -> list[str]:
        return [item.reason for record in self.log for item in record.rejections if record.name == "keep-codes"]


@pytest.fixture(scope="module")
def captured(stored_checkpoint: Callable[[str], Path]) -> Callable[[str, torch.dtype], Program]:
    @functools.cache
    def program(name: str, dtype: torch.dtype) -> Program:
        found = capture(Checkpoint.open(stored_checkpoint(name)), dtype=dtype)
        return passes.run_passes(found, passes.default_passes())[0]

    return program


def lowered(program: Program, name: str, directory: Path) -> Lowered:
    target = get_target(name)
    options = validate(target.Options, OPTIONS[name], where=name)
    dtype = "fp16" if program.dtype is torch.float16 else "fp32"
    held = SupportedFormats(partial(target.kept_formats, options, dtype=dtype), partial(target.auto_formats, options))
    inputs = QuantizationInputs(None, program, None, None, None)  # type: ignore[arg-type]
    plan = plan_quantization(QuantizeRecipe(format="keep"), inputs, held, None)
    later, done = (*plan.passes, *target.passes(options)), [item.name for item in passes.default_passes()]
    final, log = passes.run_passes(program, later, completed=done)
    assert target.refusals(final, options) == ()
    directory.mkdir()
    target.lower(final, options, directory, lambda *_: None)
    return Lowered(directory, final, manifest_facts(plan, final), log)


@pytest.mark.parametrize(("name", "target", "became"), BECAME)
def test_the_report_says_what_was_kept_and_what_took_the_place_of_the_rest(
    captured: Callable[..., Program],
    stored_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    target: str,
    became: str,
) -> None:
    dtype = torch.float16 if (name, target) == ("gpt_oss mxfp4", COREML) else torch.float32
    found = lowered(captured(name, dtype), target, tmp_path / "out")
    assert found.facts["kept"].keys() >= {"experts_gate_up", "experts_down"}
    (said,) = (text for what, text in describe_built({"quantization": found.facts}) if what.startswith("codes of"))
    for each, outcomes in found.facts["kept"].items():
        assert outcomes.keys() == {became}
        assert f"{each}: {became} (" in said
        error = found.facts["classes"][each]["relative_error"]
        assert error == 0 if "codes of the checkpoint" in became else 0 < error < 0.2
    if "codes of the checkpoint" in became:
        assert found.rejections == []
        assert_codes_are_those_of(load_file(stored_checkpoint(name) / "model.safetensors"), found, name, target)
    else:
        runs = "its scales are shared by runs of 1 of 64 columns"
        why = runs if "act-order" in name else "the target does not support"
        assert all(why in reason for reason in found.rejections)
        assert found.rejections
    if (name, target) == ("gpt_oss mxfp4", COREML):
        assert_runs_as_the_program(found, target)


def assert_codes_are_those_of(stored: Mapping[str, np.ndarray], found: Lowered, name: str, target: str) -> None:
    """What a target reads back of experts is what the file holds, which is read here by code of its own."""
    weights = get_target(target).stored_weights(found.directory)
    for layer in found.program.layers:
        for down, weight in enumerate((layer.gate_up_proj, layer.down_proj)):
            whole = weights[weight].rows(0, layer.num_experts)
            assert isinstance(whole, Codes)
            assert whole.scales is not None
            for expert in range(layer.num_experts):
                place = layer.module[: layer.module.index(".mlp")]
                codes, scales, points = of_expert(stored, name, place, expert, down=bool(down))
                shift = 0 if whole.table is not None else 1 << (whole.bits - 1)
                assert np.array_equal(whole.codes[expert], codes - shift)
                # A kernel may want smaller blocks than those of the checkpoint.
                assert np.array_equal(whole.scales[expert][:, :: 32 // whole.block], scales)
                assert whole.zero_points is not None or whole.table is not None or (points == shift).all()
                assert whole.zero_points is None or np.array_equal(whole.zero_points[expert], points - shift)
                assert whole.table is None or np.array_equal(whole.table[expert], E2M1)


E2M1 = [[0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]]
"""Twice the values of MXFP4, whose scales are halved in turn."""


def of_expert(stored: Mapping[str, np.ndarray], name: str, layer: str, expert: int, *, down: bool) -> Parts:
    """One projection of an expert in a file, gate above up."""
    if "mxfp4" in name:
        own = f"{layer}.mlp.experts.{'down' if down else 'gate_up'}_proj"
        blocks, exponents = stored[f"{own}_blocks"][expert], stored[f"{own}_scales"][expert]
        scales = 2.0 ** (exponents.astype(np.float64) - 128)
        return halves(blocks).reshape(len(blocks), -1), scales, np.zeros_like(scales)
    parts = (MIXTRAL if "mixtral" in name else QWEN3)[2 * down : 2 + down]
    read = of_awq if "awq" in name else partial(of_gptq, bits=8 if name.endswith("8") else 4)
    found = [read(stored, f"{layer}.{part.format(expert)}") for part in parts]
    codes, scales, points = (np.concatenate(column) for column in zip(*found, strict=True))
    return codes.astype(np.int64), scales, points.astype(np.int64)


def assert_runs_as_the_program(found: Lowered, target: str) -> None:
    ids = np.arange(3, 15)[None]
    want, got = (
        runner.prefill(ids) for runner in (ProgramRunner(found.program), get_target(target).open(found.directory))
    )
    assert np.abs(got - want).max() <= 1e-2 * np.abs(want).max()


def test_floats_have_no_codes_to_keep(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(tiny_checkpoint("olmoe")), "-t", "onnx", "-o", str(tmp_path / "out"), "-q"]
    assert cli.dispatch([*arguments, "--quantize", "keep"]) == 2
    assert "no weight of this checkpoint is stored quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
