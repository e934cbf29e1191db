"""The flavor for browsers: names and files as transformers.js expects them, and ops that its kernels have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import moec
from moec.compiler.common.errors import LoweringError
from moec.compiler.families.tiny_models import write_tiny_checkpoint
from moec.targets.onnx import web
from moec.targets.onnx.files import data_name, model_path
from moec.targets.onnx.stored import stored_weights

IDS = np.random.default_rng(0).integers(3, 128, (1, 24))


def exported(checkpoint: Path, directory: Path, **options: object) -> Path:
    moec.export(checkpoint, target="onnx", output=directory, gates=False, **options)
    return directory


def logits(directory: Path) -> np.ndarray:
    return moec.load(directory).runner.prefill(IDS)


@pytest.mark.parametrize(
    ("options", "dtype", "name"),
    [
        ({}, "fp32", "model.onnx"),
        ({"dtype": "fp16"}, "fp16", "model_fp16.onnx"),
        ({"quantize": "int4"}, "q4", "model_q4.onnx"),
        ({"quantize": "int8"}, "int8", "model_int8.onnx"),
        ({"quantize": "int4", "dtype": "fp16"}, "q4f16", "model_q4f16.onnx"),
    ],
)
def test_files_and_configuration(
    options: dict[str, str], dtype: str, name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = exported(tiny_checkpoint("qwen3_moe"), tmp_path / "web", flavor="web", **options)
    assert model_path(directory) == directory / "onnx" / name
    config = json.loads((directory / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["transformers.js_config"] == {"dtype": dtype, "use_external_data_format": {name: 1}}
    manifest = json.loads((directory / "moec.json").read_text())
    assert manifest["model_files"] == [f"onnx/{name}", f"onnx/{name}_data"]


def test_the_artifact_computes_what_the_default_one_does(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    # The head has codes of 8 bits, for which the default flavor rounds activations.
    for form, limit in (("none", 0.0), ("int4", 1e-2)):
        options = {} if form == "none" else {"quantize": {"format": form, "activations": "float"}}
        found, want = (
            logits(exported(tiny_checkpoint("olmoe"), tmp_path / f"{flavor}-{form}", flavor=flavor, **options))
            for flavor in ("web", "default")
        )
        assert np.abs(found - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("hidden", [64, 48])
def test_a_quantized_head_that_is_also_the_embedding(hidden: int, tmp_path: Path) -> None:
    # The table of the embedding and the matrix of the head have other shapes of codes and scales.
    checkpoint = write_tiny_checkpoint("olmoe", tmp_path / "model", hidden_size=hidden, tie_word_embeddings=True)
    options = {"quantize": {"format": "int8", "activations": "float"}}
    found, want = (
        logits(exported(checkpoint, tmp_path / flavor, flavor=flavor, **options)) for flavor in ("web", "default")
    )
    assert np.abs(found - want).max() <= 5e-2 * np.abs(want).max()


def test_the_kernel_of_quantized_experts_is_that_of_an_older_release(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = exported(tiny_checkpoint("olmoe"), tmp_path / "web", flavor="web", quantize="int4", experts="kernel")
    graph = onnx.load(model_path(directory), load_external_data=False).graph
    kernels = [node for node in graph.node if node.op_type == "QMoE"]
    assert kernels
    for node in kernels:
        assert len(node.input) < 15
        attributes = {item.name: item.i for item in node.attribute}
        assert attributes["normalize_routing_weights"] == 1
        assert not {"accuracy_level", "fc1_expert_weight_bits", "fc2_expert_weight_bits"} & set(attributes)


@pytest.mark.parametrize("form", ["int4", "int8"])
def test_codes_are_stored_for_a_session_that_decodes_them_once(
    form: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    directories = [
        exported(tiny_checkpoint("olmoe"), tmp_path / flavor, flavor=flavor, quantize=form)
        for flavor in ("web", "default")
    ]
    graph = onnx.load(model_path(directories[0]), load_external_data=False).graph
    ops = Counter(node.op_type for node in graph.node)
    assert ops["QMoE"] == ops["MatMulNBits"] == 0
    # Two layers: eight experts with two matrices, queries, keys and values together, the output; and the head.
    assert ops["DequantizeLinear"] == 2 * (2 * 8 + 2) + 1
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(model_path(directories[0])), options, providers=["CPUExecutionProvider"])
    assert not [
        node
        for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
        if "Dequantize" in node.op_type
    ]
    web, default = (stored_weights(directory) for directory in directories)
    assert set(web) == set(default)
    for name, weight in default.items():
        if weight.bits is None:
            continue
        stop = 3 if "experts" in name else 20
        want, found = weight.rows(1, stop), web[name].rows(1, stop)
        assert np.array_equal(found.codes, want.codes), name
        times = want.scales.shape[-1] // found.scales.shape[-1]
        assert np.array_equal(np.repeat(found.scales, times, -1).astype(np.float16), want.scales.astype(np.float16))


def test_data_is_cut_into_files_of_bounded_size(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "DATA_LIMIT", 100_000)
    directory = exported(tiny_checkpoint("olmoe"), tmp_path / "web", flavor="web")
    config = json.loads((directory / "config.json").read_text())
    chunks = config["transformers.js_config"]["use_external_data_format"]["model.onnx"]
    assert chunks > 2
    files = [directory / "onnx" / data_name("model.onnx", number) for number in range(chunks)]
    assert [path.name for path in files[:2]] == ["model.onnx_data", "model.onnx_data_1"]
    assert all(0 < path.stat().st_size <= 100_000 for path in files)
    located = {value.const_value.location for value in ir.load(model_path(directory)).graph.initializers.values()
               if isinstance(value.const_value, ir.ExternalTensor)}  # fmt: skip
    assert located == {path.name for path in files}
    monkeypatch.undo()
    want = logits(exported(tiny_checkpoint("olmoe"), tmp_path / "default"))
    assert np.array_equal(logits(directory), want)


def test_a_tensor_that_fits_no_file_is_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "DATA_LIMIT", 2000)
    with pytest.raises(LoweringError, match=r"has \d+ bytes, and a file of this flavor may have 2000"):
        exported(tiny_checkpoint("olmoe"), tmp_path / "web", flavor="web")
    assert not (tmp_path / "web").exists()


def test_states_have_the_names_of_transformers_js(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    for family, prefixes in (("granitemoehybrid", {"past_conv", "past_ssm"}), ("lfm2_moe", {"past_conv"})):
        directory = exported(tiny_checkpoint(family), tmp_path / family, flavor="web")
        names = {item.name for item in onnx.load(model_path(directory), load_external_data=False).graph.input}
        kinds = {name.split(".")[0] for name in names if name.startswith("past")}
        assert kinds == {"past_key_values", *prefixes}
        generator = moec.load(directory)
        generator.eos_token_ids = ()
        assert len(list(generator.tokens(IDS[0].tolist(), max_new_tokens=4))) == 4
