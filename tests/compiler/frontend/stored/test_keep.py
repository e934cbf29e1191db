"""`--quantize keep`: the codes of the checkpoint and of the artifact, each read by code of its own, are the same."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from moec import cli

LAYERS = "model.layers.{}"


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., W] -> [..., 8 W], the lowest four bits first."""
    return np.stack([(words.view(np.uint32) >> shift) & 15 for shift in range(0, 32, 4)], -1).reshape(
        *words.shape[:-1], -1
    )


def of_gptq(stored: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales [N, G] and zero points [N, G]."""
    codes = nibbles(np.ascontiguousarray(stored[f"{name}.qweight"].T))
    return codes, stored[f"{name}.scales"].T, nibbles(stored[f"{name}.qzeros"]).T + 1


def of_awq(stored: Mapping[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def unpacked(words: np.ndarray) -> np.ndarray:
        found = nibbles(words).reshape(len(words), -1, 8)
        return found[..., [0, 4, 1, 5, 2, 6, 3, 7]].reshape(len(words), -1).T

    return unpacked(stored[f"{name}.qweight"]), stored[f"{name}.scales"].T, unpacked(stored[f"{name}.qzeros"])


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
            ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
            True,
        ),
        (
            "mixtral awq",
            of_awq,
            0,
            ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3", "block_sparse_moe.experts.{}.w2"),
            False,
        ),
    ],
)
def test_codes_are_identical(
    stored_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    read: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]],
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
    form = "int4:32" if symmetric else "int4:32:asym"
    assert set(kept["experts_down"]) == set(kept["attention"]) == {f"{form}, the codes of the checkpoint"}
    assert manifest["quantization"]["classes"]["experts_down"]["relative_error"] == 0
    assert manifest["rejections"] == []


@pytest.mark.parametrize(
    ("name", "kept", "reason"),
    [
        (
            "mixtral gptq act-order",
            "int4:32 in place of gptq of 4 bits",
            "a scale holds for runs of 1 of its 64 columns",
        ),
        ("gpt_oss mxfp4", "int4:32 in place of mxfp4 of 4 bits", "its codes are no whole numbers of one width"),
        pytest.param(
            "qwen3_moe fp8",
            "int8:32 in place of fp8 of 8 bits",
            "its codes are no whole numbers",
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen3_moe gptq 8", "int8:32, the codes of the checkpoint", "", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_kept_is_rounded_and_said(
    stored_checkpoint: Callable[[str], Path], tmp_path: Path, name: str, kept: str, reason: str
) -> None:
    manifest = built(stored_checkpoint(name), tmp_path / "out", "--no-gates")
    facts = manifest["quantization"]
    assert set(facts["kept"]["experts_gate_up"]) == {kept}
    error = facts["classes"]["experts_gate_up"]["relative_error"]
    said = [item for record in manifest["passes"] for item in record["rejections"] if record["name"] == "keep-codes"]
    if reason:
        assert 0 < error < 0.2
        assert any(reason in item["reason"] and "experts_gate_up" in item["where"] for item in said)
    else:
        assert error == 0
        assert said == []


def test_floats_have_no_codes_to_keep(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(tiny_checkpoint("olmoe")), "-t", "onnx", "-o", str(tmp_path / "out"), "-q"]
    assert cli.dispatch([*arguments, "--quantize", "keep"]) == 2
    assert "no weight of this checkpoint is stored as codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
