"""Engines: built in a process of their own, the same on every rebuild, judged by their gates."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moec.compiler.common.errors import ArtifactError, LoweringError, MissingExtraError, UsageError
from moec.compiler.common.validation import validate
from moec.compiler.pipeline.export import compile_recipe
from moec.compiler.pipeline.recipe import make_recipe
from moec.passes.quantize import Quantize
from moec.quantize.plan import requested
from moec.targets.base import GateSubject
from moec.targets.tensorrt import build, library
from moec.targets.tensorrt.builder import Listener
from moec.targets.tensorrt.gates import judge_contents
from moec.targets.tensorrt.profiles import Sizes, profiles, trtexec
from moec.targets.tensorrt.settings import FILE, Bounds, EngineSettings
from moec.targets.tensorrt.target import TensorrtOptions, TensorrtTarget

SMALL = {"context": 32, "piece": 8, "prompt": 4}


def export(checkpoint: Path, output: Path, **fields: Any) -> Any:
    options = {**SMALL, **fields.pop("options", {})}
    recipe = {"checkpoint": str(checkpoint), "target": "tensorrt", "options": options, **fields}
    return compile_recipe(make_recipe(recipe, where="test"), output)


def test_an_engine_and_its_gates(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantize = {"format": {"formats": {"attention": "int8:channel"}}, "rounding": "rtn"}
    result = export(tiny_checkpoint("granitemoe"), tmp_path / "out", dtype="fp16", quantize=quantize)
    verdicts = {verdict.gate: verdict for verdict in result.verdicts}
    assert not result.failed
    assert verdicts["engine: contents"].status == "pass"
    execution = verdicts["engine: execution"]
    assert (execution.status, execution.summary) == (
        "not run",
        "built for sm_86, sm_89, sm_120, not executed: no GPU (no CUDA driver)",
    )
    built = result.manifest["facts"]["engine"]
    assert built["constants"]["Int8"]
    assert built["weight_bytes"] < 1.5 * result.manifest["facts"]["weights"]["bytes"]
    assert built["inputs"]["past_key_values.0.key"] == ["HALF", [-1, 2, -1, 16]]
    assert "model.rtx.engine" in result.manifest["model_files"]
    # The script that stands beside the engine builds it again.
    again = tmp_path / "again.engine"
    command = [sys.executable, str(tmp_path / "out" / "build_engine.py"), "--library", "tensorrt_rtx"]
    subprocess.run([*command, "--output", str(again)], check=True, capture_output=True)
    assert again.stat().st_size == built["engine_bytes"]


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_an_engine_of_recurrent_layers(dtype: str, program_of: Any, lower: Any, assert_same: Any) -> None:
    """The parser reads a Scan, and the builder builds it, with key heads that serve several heads each."""
    kinds = {"fp32": torch.float32, "fp16": torch.float16}
    model = lower(program_of("qwen3_next", kinds[dtype]), engine=True, **SMALL)
    built = model.lowered.facts["engine"]
    assert built["inputs"]["past_recurrent.0"] == ["FLOAT", [-1, 4, 16, 16]]
    assert built["inputs"]["past_conv.0"][1] == [-1, 128, 4]
    assert "Scan" in {node.op_type for node in model.graph()}
    assert_same(model, {"fp32": 1e-4, "fp16": 2e-2}[dtype])


def test_contents_are_compared_with_the_plan(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    model = lower(program_of(tiny_checkpoint("mixtral")))
    subject = GateSubject(model.program, model.directory, model.lowered.facts, lambda *_: pytest.fail("not asked for"))
    assert judge_contents(subject).status == "not run"
    kinds = {torch.float32: "FLOAT", torch.int64: "INT64"}
    specs = [*model.program.inputs, *(end for state in model.program.states for end in (state.input, state.output))]
    tensors = {spec.name: [kinds[spec.dtype], [-1] * len(spec.shape)] for spec in specs}
    weights = model.lowered.facts["weights"]["bytes"]
    right = {
        "inputs": tensors,
        "outputs": {"logits": ["FLOAT", [-1, -1, 99]]},
        "network_layers": {},
        "constants": {},
        "weight_bytes": weights,
        "engine_bytes": 3,
        "engine_layers": {"gemm": 1},
    }
    (model.directory / "model.rtx.engine").write_bytes(b"abc")
    settings = json.loads((model.directory / "tensorrt.json").read_text())

    def verdict(**changes: Any) -> Any:
        changed = {**settings, "engine": "model.rtx.engine", "built": {**right, **changes}}
        (model.directory / "tensorrt.json").write_text(json.dumps(changed))
        return judge_contents(subject)

    assert verdict().status == "pass"
    assert "bytes of weights" in verdict(weight_bytes=2 * weights + 2**19).summary
    assert "not the file" in verdict(engine_bytes=4).summary
    assert "logits are missing" in verdict(outputs={}).summary
    assert (
        "past_key_values.0.key is HALF"
        in verdict(inputs={**tensors, "past_key_values.0.key": ["HALF", [-1, -1, -1, -1]]}).summary
    )


def test_what_the_library_says_of_an_engine() -> None:
    listener = Listener(lambda *_: None)
    listener.hear("INFO", "Total Weights Memory: 9476 bytes")
    constant = "{ Name: a_const, Dimensions: [1,256], Strides: [1,1], StrideOrder: [0,1], Datatype: Int8 }"
    listener.hear("VERBOSE", f"Layers:\nName: one, LayerType: kgen, Inputs: [], Constants: [ {constant}]\n")
    assert listener.facts() == {"engine_layers": {"kgen": 1}, "constants": {"Int8": 256}, "weight_bytes": 9476}


def test_a_build_that_takes_too_much_memory_is_refused_or_ended(
    tiny_checkpoint: Any, program_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(tiny_checkpoint("granitemoe"))
    options = TensorrtOptions(memory_limit=0.05, **SMALL)
    with pytest.raises(LoweringError, match=r"needs up to 0\.\d GB of memory, but 0\.1 GB may be used"):
        TensorrtTarget().lower(program, options, tmp_path, lambda *_: None)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(build, "check_memory", lambda *_: None)
    with pytest.raises(LoweringError, match=r"was ended: it used more than 0\.1 GB"):
        TensorrtTarget().lower(program, options, tmp_path, lambda *_: None)


def test_what_the_builder_refuses_is_told(
    tiny_checkpoint: Any, program_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    program = program_of(tiny_checkpoint("granitemoe"))
    target, options = TensorrtTarget(), TensorrtOptions(**SMALL)
    run = build.run

    def broken(folder: Path, *arguments: Any, **named: Any) -> Any:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        node = next(item for item in model.graph.node if item.op_type == "Softmax")
        node.op_type = "Hardmax"
        node.ClearField("attribute")
        node.attribute.append(onnx.helper.make_attribute("axis", 9))
        onnx.save(model, folder / "model.onnx")
        return run(folder, *arguments, **named)

    monkeypatch.setattr(build, "run", broken)
    with pytest.raises(LoweringError) as caught:
        target.lower(program, options, tmp_path, lambda *_: None)
    assert "Hardmax: TensorRT's parser failed" in caught.value.message
    assert caught.value.message.startswith("model.layers.0")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("9.0", ["H100", "Classic TensorRT", "build_engine.py"]),
        ("6.1", ["7.5, 8.0, 8.6, 8.9, 12.0, 12.1"]),
        ("", ["no compute capability"]),
    ],
)
def test_unknown_compute_capability(given: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        validate(TensorrtOptions, {"compute_capability": given.split(",") if given else []}, where="options")
    text = caught.value.message + caught.value.hint
    assert all(word in text for word in words)


def test_capabilities_are_read_in_every_spelling() -> None:
    options = TensorrtOptions(compute_capability=("sm_120", "8.9", "86", "8.6"))
    assert options.compute_capability == ("8.6", "8.9", "12.0")


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda _: False)
    with pytest.raises(MissingExtraError) as caught:
        TensorrtTarget().check(TensorrtOptions(), {})
    assert caught.value.hint == "pip install 'moec[tensorrt]'"
    TensorrtTarget().check(TensorrtOptions(engine=False), {})
    with pytest.raises(MissingExtraError, match="classic"):
        library.module_name(library.Library.CLASSIC)


@pytest.mark.parametrize(
    ("form", "options", "reason"),
    [
        ("int4:32:asym", {}, "no zero points other than 0"),
        ("int8:int8-dynamic", {}, "DynamicQuantizeLinear"),
        ("int4:channel", {}, "in blocks only"),
        ("int4:32", {"compute_capability": ("7.5", "8.6")}, "7.5 do not support int4"),
        ("int8", {"opset": 20}, "need opset 21 or later"),
        ("none", {"opset": 27}, "opsets 17 to 26"),
    ],
)
def test_what_is_refused_before_lowering(
    form: str, options: dict[str, Any], reason: str, tiny_checkpoint: Any, program_of: Any
) -> None:
    plan = requested({"formats": {"attention": form}})
    later = () if form == "none" else (Quantize(plan),)
    program = program_of(tiny_checkpoint("mixtral"), later=later)
    found = TensorrtTarget().lint(program, TensorrtOptions(engine=False, **options))
    assert found
    assert reason in found[0].reason


def test_context_of_the_model(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    with pytest.raises(UsageError, match="--context 99999"):
        lower(program_of(tiny_checkpoint("mixtral")), context=99999)


def test_profiles_and_the_line_for_trtexec() -> None:
    row = {"name": "past", "shape": ["batch_size", 2, "past_sequence_length", 16]}
    signature = {
        "inputs": [{"name": "input_ids", "shape": ["batch_size", "sequence_length"]}],
        "states": [{"input": row}],
    }
    decode, prefill = profiles({**signature}, Sizes(2, 64, 8, 16))
    assert decode.inputs["past"] == Bounds(min=(1, 2, 0, 16), opt=(1, 2, 64, 16), max=(2, 2, 64, 16))
    assert prefill.inputs["input_ids"] == Bounds(min=(1, 1), opt=(1, 8), max=(2, 16))
    line = trtexec("model.onnx", "model.engine", [decode, prefill])
    assert "--profile=1 --minShapes=input_ids:1x1,past:1x2x0x16" in line
    assert "--stronglyTyped" in line


def test_the_settings_of_an_engine_are_read_as_they_were_written(
    tiny_checkpoint: Any, program_of: Any, lower: Any
) -> None:
    directory = lower(program_of(tiny_checkpoint("mixtral"))).directory
    written = (directory / FILE).read_bytes()
    settings = EngineSettings.read(directory)
    assert (settings.engine, settings.built, settings.profiles[0].name) == (None, None, "decode")
    settings.write(directory)
    assert (directory / FILE).read_bytes() == written


def test_damaged_settings_of_an_engine_are_told(tiny_checkpoint: Any, program_of: Any, lower: Any) -> None:
    path = lower(program_of(tiny_checkpoint("mixtral"))).directory / FILE
    written = json.loads(path.read_text())
    damages: list[tuple[dict[str, Any], str]] = [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"batch": "many"}, "batch: Input should be a valid integer"),
        ({"profiles": [{"name": "decode", "inputs": {"past": {"min": [1]}}}]}, "profiles.0.inputs.past.opt: Field"),
    ]
    for change, message in damages:
        path.write_text(json.dumps({**written, **change}))
        with pytest.raises(ArtifactError, match=message):
            EngineSettings.read(path.parent)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="Invalid JSON"):
        EngineSettings.read(path.parent)


def test_the_same_files_on_every_rebuild(
    tiny_checkpoint: Any, program_of: Any, lower: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the directories are called, whatever the environment holds, and however many files are open.

    All three differ from build to build. Where the machine interrupts the builder's threads the order of some tables is
    left open, in any of the builds: two of six have to be the same.
    """
    program = program_of(tiny_checkpoint("granitemoe"))
    first, name = lower(program, engine=True, **SMALL), "model.rtx.engine"
    engines = {(first.directory / name).read_bytes()}
    with contextlib.ExitStack() as files:
        for number in range(1, 6):
            monkeypatch.setenv("OTHER", "x" * 1000 * number)
            for _ in range(30):
                files.enter_context(Path(os.devnull).open())
            again = lower(program, engine=True, **SMALL)
            assert first.lowered.facts == again.lowered.facts
            others = [other for other in first.lowered.model_files if other != name]
            assert all(_same(first.directory / other, again.directory / other) for other in others)
            built = (again.directory / name).read_bytes()
            if built in engines:
                return
            engines.add(built)
    pytest.fail(f"{len(engines)} builds, and no two are the same")


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()
