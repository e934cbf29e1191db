"""What a target cannot build is refused with exit code 4, a reason and a hint, before anything is lowered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import fx

from moec import cli
from moec.compiler.common.errors import LoweringError
from moec.compiler.common.rejections import Rejection
from moec.compiler.common.validation import validate
from moec.compiler.ir.fake_values import fake_mode
from moec.compiler.ir.program import Program
from moec.compiler.ir.weights import LazyTensor
from moec.compiler.pipeline import program, quantization
from moec.compiler.pipeline.captures import Captures
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe
from moec.passes.quantize import Quantize
from moec.quantize.lazy import Coded
from moec.quantize.plan import requested
from moec.targets import get_target
from moec.targets.common.refusals import first_few

aten = torch.ops.aten
NAMES = ("onnx", "tflite", "tensorrt", "coreml")
PLANS = {"onnx": "int8", "tflite": "int8:channel", "tensorrt": "int8:channel", "coreml": "int4"}
DYNAMIC = {"activations": "int8-dynamic"}
ENGINE: dict[str, Any] = {"engine": False}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str, str]] = {
    # family, target, its options, quantization, what the message says, and the hint
    "onnx, experts of integers in standard ops": (
        *("olmoe", "onnx", {"flavor": "portable"}, {"format": "int8"}),
        *("layers.0.mlp.experts: standard ONNX has no product of quantized experts", "of these layers float"),
    ),
    "onnx, int4 in standard ops": (
        *("olmoe", "onnx", {"flavor": "portable"}, {"format": "int4"}),
        *("so experts in int4:64 are not supported here", "of these layers float"),
    ),
    "onnx, layers with other numbers of heads": (
        *("mimo_v2_flash", "onnx", {"flavor": "genai"}, {}),
        *("the same number of heads in all layers, not 2, 4", "--target onnx --help"),
    ),
    "onnx, zero points in standard ops": (
        *("olmoe", "onnx", {"flavor": "portable"}, {"format": {"formats": {"attention": "int4:32:asym"}}}),
        *("zero points are not supported in standard ops", "use a symmetric format"),
    ),
    "tflite, int4 with float activations": (
        *("olmoe", "tflite", {}, {"format": "int4:channel"}),
        *(
            "format int4:channel: LiteRT multiplies int4 weights only with activations that are rounded",
            "--activations int8-dynamic",
        ),
    ),
    "tflite, zero points": (
        *("olmoe", "tflite", {}, {"format": {"formats": {"attention": "int4:32:asym"}}, **DYNAMIC}),
        *(
            "format int4:32:asym:int8-dynamic: LiteRT has no kernel for weights with zero points",
            "all without zero points",
        ),
    ),
    "tflite, int8 in blocks": (
        *("olmoe", "tflite", {}, {"format": {"formats": {"attention": "int8:32"}}}),
        *("LiteRT supports int8 weights with one scale per row, but not in blocks", "int8:channel"),
    ),
    "tflite, an embedding in blocks": (
        *("olmoe", "tflite", {}, {"format": {"formats": {"embedding": "int4:32"}}, **DYNAMIC}),
        *(
            "model.embed_tokens: aten.embedding.default: model.embed_tokens.weight: an embedding quantized in blocks",
            "int8:ch",
        ),
    ),
    "tflite, what tflite-runtime computes wrongly": (
        *("olmoe", "tflite", {"runtime": "tflite-runtime"}, {"format": "int8:channel", **DYNAMIC}),
        *("tflite-runtime 2.14 silently computes zeros", "--runtime litert"),
    ),
    "tflite, a bundle with a state that is not a KV cache": (
        *("lfm2_moe", "tflite", {"bundle": True}, {}),
        *("layer 0: LiteRT-LM (--bundle) supports only KV caches", "export without --bundle"),
    ),
    "tensorrt, zero points": (
        *("olmoe", "tensorrt", ENGINE, {"format": {"formats": {"attention": "int4:32:asym"}}}),
        *("no zero points other than 0", "TensorRT supports int8"),
    ),
    "tensorrt, int4 by row": (
        *("olmoe", "tensorrt", ENGINE, {"format": "int4:channel"}),
        *("format int4:channel: int4 is supported in blocks only", "TensorRT supports int8"),
    ),
    "tensorrt, rounded activations": (
        *("olmoe", "tensorrt", ENGINE, {"format": "int8", **DYNAMIC}),
        *("the parser does not support DynamicQuantizeLinear", "TensorRT supports int8"),
    ),
    "tensorrt, rows that no block divides": (
        *("deepseek_v2", "tensorrt", ENGINE, {"format": "int8:channel"}),
        *("kv_b_proj.weight: format int8:channel: its block size is not a multiple of 16", "TensorRT supports int8"),
    ),
    "tensorrt, int4 on Turing": (
        *(
            "olmoe",
            "tensorrt",
            {**ENGINE, "compute_capability": ["7.5"]},
            {"format": {"formats": {"attention": "int4:32"}}},
        ),
        *("7.5 do not support int4", "TensorRT supports int8"),
    ),
    "tensorrt, an opset": (
        *("olmoe", "tensorrt", {**ENGINE, "opset": 27}, {}),
        *("--opset 27: the parser supports opsets 17 to 26", "--target tensorrt --help"),
    ),
    "tensorrt, more memory than there may be": (
        *("olmoe", "tensorrt", {"memory_limit": 1e-6}, {}),
        *("building the engine needs up to", "--no-engine"),
    ),
    "coreml, scales that are wider than the program": (
        *("olmoe", "coreml", {}, {"format": "int8:channel:fp32"}),
        *("format int8:channel:fp32: its scales are fp32, but the program computes in fp16", "--dtype fp32"),
    ),
    "coreml, caches that swift-transformers does not know": (
        *("mimo_v2_flash", "coreml", {"flavor": "swift-transformers"}, {}),
        *("KV caches that differ between layers", "use the default flavor"),
    ),
    "coreml, states that swift-transformers does not know": (
        *("lfm2_moe", "coreml", {"flavor": "swift-transformers"}, {}),
        *("layer 0: its state of kind conv is not a KV cache", "use the default flavor"),
    ),
}


@pytest.fixture(scope="module")
def captures() -> Captures:
    return Captures()


@pytest.fixture
def nothing_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(*_: object) -> NoReturn:
        raise AssertionError("lowered, although it is refused")

    for name in NAMES:
        monkeypatch.setattr(type(get_target(name)), "lower", lower)


@pytest.mark.usefixtures("nothing_is_lowered")
@pytest.mark.parametrize("case", sorted(CASES, key=lambda case: (CASES[case][0], CASES[case][1] == "coreml")))
def test_before_lowering(case: str, tiny_checkpoint: Any, captures: Captures, tmp_path: Path) -> None:
    family, name, options, quantize, message, hint = CASES[case]
    fields = {"checkpoint": str(tiny_checkpoint(family)), "target": name, "options": options}
    recipe = make_recipe(fields | ({"quantize": quantize} if quantize else {}))
    with pytest.raises(LoweringError) as caught:
        compile_recipe(recipe, tmp_path / "out", captures=captures)
    assert caught.value.exit_code == 4
    assert f"target {name} cannot build this model: " in caught.value.message
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_is_lowered")
def test_on_the_command_line(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-t", "tflite", "--quantize", "int4:channel", "-q", "-o", str(tmp_path / "out")]
    assert cli.dispatch(["export", str(tiny_checkpoint("olmoe")), *arguments]) == 4
    said = " ".join(capsys.readouterr().err.split())
    assert "LiteRT multiplies int4 weights only with activations that are rounded to int8" in said
    assert "hint: LiteRT supports int8:channel" in said
    assert not list(tmp_path.iterdir())


# What lowering refuses, lint refuses ---------------------------------------------------------------------------------


def norm_of_two_axes(graph: Any, hidden: Any) -> Any:
    column = graph.call_function(aten.unsqueeze.default, (hidden, 3))
    normed = graph.call_function(aten.layer_norm.default, (column, [64, 1], None, None, 1e-5, False))
    return graph.call_function(aten.squeeze.dims, (normed, [3]))


def without_lowering(graph: Any, hidden: Any) -> Any:
    return graph.call_function(aten.lgamma.default, (hidden,))


def before_the_head(program: Program, insert: Callable[[Any, Any], Any]) -> Program:
    """`program` with more ops on the hidden states [B, S, 64] that its head reads."""
    graph = program.copy_graph()
    head = [node for node in graph.nodes if node.target is aten.linear.default][-1]
    (hidden, *_), before = head.args, set(graph.nodes)
    with graph.inserting_before(head):
        made = insert(graph, hidden)
    with fake_mode(graph):
        for node in graph.nodes:
            if node not in before:
                values = fx.map_arg(node.args, lambda argument: argument.meta["val"])
                node.meta = {"val": node.target(*values), "module": "the.module"}
    head.replace_input_with(hidden, made)
    return program.replace(graph=graph)


def dtype_of(name: str) -> torch.dtype:
    return torch.float16 if name == "coreml" else torch.float32


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("insert", "reason"),
    [
        (norm_of_two_axes, "a layer norm over several axes is not supported"),
        (without_lowering, "no lowering for aten.lgamma.default"),
    ],
)
def test_lint_and_lowering_agree(name: str, insert: Any, reason: str, program_of: Any, tmp_path: Path) -> None:
    changed = before_the_head(program_of("olmoe", dtype_of(name)), insert)
    target = get_target(name)
    options = validate(target.Options, {"engine": False} if name == "tensorrt" else {}, where=name)
    (found,) = target.refusals(changed, options)
    assert (found.source, found.where) == (name, "the.module")
    assert reason in found.reason
    with pytest.raises(LoweringError, match=r"the\.module: .*") as caught:
        target.lower(changed, options, tmp_path, lambda *_: None)
    assert reason in caught.value.message
    assert caught.value.hint == found.hint


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_built_is_not_refused(name: str, program_of: Any) -> None:
    target = get_target(name)
    assert target.refusals(program_of("olmoe", dtype_of(name)), target.Options()) == ()


@pytest.mark.parametrize("name", ["tflite", "coreml"])
def test_a_padding_mask_that_is_read_otherwise(name: str, program_of: Any) -> None:
    program = program_of("olmoe", dtype_of(name))
    graph = program.copy_graph()
    mask = next(node for node in graph.find_nodes(op="placeholder") if node.target == "attention_mask")
    reader = next(iter(mask.users))
    with graph.inserting_before(reader):
        made = graph.call_function(aten.neg.default, (mask,))
    made.meta = {"val": mask.meta["val"], "module": "model.mask"}
    reader.replace_input_with(mask, made)
    target = get_target(name)
    (found,) = target.refusals(program.replace(graph=graph), target.Options())
    assert "model.mask: %neg_default uses the attention mask" in found.reason


def test_no_weight_is_read_to_know_it(program_of: Any) -> None:
    """CoreML's builder takes arrays: zeros without memory stand for the weights."""

    @dataclass(frozen=True)
    class Unread(LazyTensor):
        shape: tuple[int, ...]
        dtype: torch.dtype

        def rows(self, start: int, stop: int) -> NoReturn:
            raise AssertionError(f"rows {start} to {stop} are read")

    for name in NAMES:
        program = program_of("olmoe", dtype_of(name))
        own = {item: program.weights[item] for item in map(program.weights.resolve, program.weight_names())}
        for later in ((), (Quantize(requested(PLANS[name])),)):
            unread = {item: Unread(tuple(tensor.shape), tensor.dtype) for item, tensor in own.items()}
            changed = program.replace(weights=program.weights.with_tensors(unread))
            for quantize in later:
                changed = quantize.run(changed).program
            assert get_target(name).refusals(changed, get_target(name).Options()) == ()


# Before calibration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "module", "function"),
    [
        ({"quantize": {"format": "int4:channel", "rounding": "gptq"}}, quantization, "calibrate"),
        ({"routing": {"policy": "top-p", "budget": 0.5}, "options": {"bundle": True}}, program, "plan_routing"),
    ],
    ids=["quantization", "routing"],
)
def test_before_anything_is_calibrated(
    section: dict[str, Any],
    module: Any,
    function: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    def calibrated(*_: object, **__: object) -> NoReturn:
        raise AssertionError("calibrated, although it is refused")

    monkeypatch.setattr(module, function, calibrated)
    fields = {"checkpoint": str(tiny_checkpoint("lfm2_moe")), "target": "tflite", **section}
    with pytest.raises(LoweringError, match="target tflite cannot build this model"):
        compile_recipe(make_recipe(fields), tmp_path / "out")


# Messages ------------------------------------------------------------------------------------------------------------


def test_one_rejection_for_all_weights_of_a_format(program_of: Any) -> None:
    program = Quantize(requested("int4:channel")).run(program_of("olmoe")).program
    (found,) = get_target("tflite").refusals(program, get_target("tflite").Options())
    assert isinstance(found, Rejection)
    first, second, third, more = found.where.replace(" and ", ", ").split(", ")
    assert {first, second, third} <= set(program.weight_names())
    tensors = {name: program.weights[name] for name in program.weight_names()}
    same = [name for name, own in tensors.items() if isinstance(own, Coded) and str(own.format) == "int4:channel"]
    assert more == f"{len(same) - 3} more"


def test_names_are_listed_once() -> None:
    assert first_few(["a", "b", "a"]) == "a, b"
    assert first_few(["a", "b", "a", "c", "d", "e"]) == "a, b, c and 2 more"


def test_the_report_says_nothing_of_hints() -> None:
    assert Rejection("tflite", "lm_head", "of a reason", "a hint").record() == {
        "source": "tflite",
        "where": "lm_head",
        "reason": "of a reason",
    }
